"""The ``mmedx`` command. Parses first; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmedx_fast import __version__
from mmedx_fast.cli_data import add_data
from mmedx_fast.cli_merge import COMMANDS, HINT, takes_adapters
from mmedx_fast.cli_merge import parse as parse_merge
from mmedx_fast.cli_predictions import add_commands

if TYPE_CHECKING:
    from mmedx_fast.config import Config
    from mmedx_fast.stages.context import Context

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (1: doctor found a problem, 2: bad input, 130: interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    _set_up_logging(options.verbose)
    try:
        code: int = options.command(options)
        return code
    except KeyboardInterrupt as stop:
        said = (
            f"{stop}. " if str(stop) else "Interrupted; finished stages and checkpoints are kept. "
        )
        if _rank() == 0:
            print(f"\n{said}Go on with: {_again(arguments)}", file=sys.stderr)
        return 130
    except _expected_errors() as error:
        if options.verbose:
            raise
        print(f"mmedx: {error}" if _rank() == 0 else f"rank {_rank()}: {error}", file=sys.stderr)
        return 2


def _rank() -> int:
    """The number that a launcher gave this process, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def _again(arguments: Sequence[str]) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same launcher command"
    return shlex.join(["mmedx", *arguments])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; ``key=value`` may stand on either side of an option, which argparse alone does not take."""
    parser = _parser()
    # DeepSpeed's launcher puts this first; the rank is in the environment too.
    arguments = [item for item in arguments if not item.startswith("--local_rank=")]
    if arguments[:1] == ["bench"]:  # all that follows belongs to bench/run.py
        options = parser.parse_args(arguments[:1])
        options.rest = list(arguments[1:])
        return options
    if takes_adapters(arguments):
        return parse_merge(arguments)
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmedx",
        description="Train medical vision-language models with MMedExpert-R1: specialty experts (DSA), "
        "guideline RL (GBA), conflict-aware merge (CACI), evaluation.",
    )
    parser.add_argument("--version", action="version", version=f"mmedx-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("-v", "--verbose", action="store_true", help="log more; show tracebacks")
        return sub

    for name, command, text in (
        ("run", _run, "All stages in order; goes on where an earlier run stopped"),
        ("dsa", _dsa, "Train the specialty experts (LoRA, supervised)"),
        ("gba", _gba, "Reinforcement learning under the clinical guidelines"),
        ("conflicts", _conflicts, "Measure how the experts and the RL model conflict"),
        ("merge", _merge, "Merge the experts and the RL model"),
        ("eval", _eval, "Evaluate a run's models, or any model on any data set"),
        ("report", _report, "Write report.html and summary.json of a run"),
        ("plan", _plan, "Tokens, memory and GPU hours of a run, before it starts"),
    ):
        sub = add(name, command, text)
        sub.add_argument("config", help="YAML file, or the name of one that ships (demo.yaml)")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. gba.steps=50")
        if name in COMMANDS:
            sub.epilog = HINT.format(command=name)
        if name in ("dsa", "eval"):
            what = "specialty" if name == "dsa" else "model"
            sub.add_argument("--only", action="append", metavar=what.upper(), help=f"one {what}")
        if name == "eval":
            from mmedx_fast.cli_eval import add_arguments

            add_arguments(sub)
        if name in ("dsa", "gba"):
            sub.add_argument(
                "--plan", action="store_true", help="show the first step's packed rows and stop"
            )
        if name == "plan":
            sub.add_argument("--gpu", default="h200", help="a100, h100, h200, b200, l40s, rtx4090")
            sub.add_argument("--gpus", type=int, default=1, help="how many (default %(default)s)")
            sub.add_argument("--price", type=float, help="dollars an hour of one GPU")

    add_commands(add)

    sub = add(
        "doctor", _doctor, "What this machine has, and whether all is well (exit code 0 or 1)"
    )
    sub.add_argument("config", nargs="?", help="also what this config would use")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    add("bench", _bench, "Measure the ops against their peers (in a checkout; bench --help)")

    sub = add("phantom", _phantom, "Write the synthetic phantom-clinic data set to a folder")
    sub.add_argument("folder")
    for split, count in (("train", 480), ("validation", 120), ("test", 400)):
        sub.add_argument(
            f"--{split}", type=int, default=count, help="questions (default %(default)s)"
        )
    sub.add_argument("--seed", type=int, default=0)
    add_data(commands)
    return parser


def _config(options: argparse.Namespace) -> Config:
    from mmedx_fast._paths import find_config
    from mmedx_fast.config import load_config

    return load_config(find_config(options.config), options.overrides)


def _prepared(options: argparse.Namespace) -> Config:
    """The config, with the environment set that torch and the engine read at import."""
    cfg = _config(options)
    from mmedx_fast._env import prepare_environment

    prepare_environment(offline=cfg.model.offline)
    return cfg


def _in_context(
    options: argparse.Namespace,
    work: Callable[[Context], Any],
    show: Callable[[Context, Any], None],
    *,
    reads: bool = False,
) -> int:
    """``work`` on every rank of a launch; rank 0 then shows what came of it. Work that only ``reads`` may
    be done beside a run."""
    cfg = _prepared(options)
    from mmedx_fast import ranks
    from mmedx_fast.stages.context import open_context

    with open_context(cfg, reads=reads) as ctx:
        found = work(ctx)
        ranks.main_only(lambda: show(ctx, found))
    return 0


def _run(options: argparse.Namespace) -> int:
    cfg = _prepared(options)
    from mmedx_fast.pipeline import run_pipeline

    run_pipeline(cfg, print if _rank() == 0 else lambda text: None)
    return 0


def _dsa(options: argparse.Namespace) -> int:
    if options.plan:

        def plans(ctx: Context) -> list[str]:
            from mmedx_fast.stages.row_plan import dsa_plan

            return [dsa_plan(ctx, name) for name in _only(options, ctx.cfg.dsa.specialties)]

        return _in_context(
            options, plans, lambda ctx, tables: print("\n\n".join(tables)), reads=True
        )

    def work(ctx: Context) -> dict[str, dict[str, Any]]:
        from mmedx_fast.stages.dsa import run_dsa

        return run_dsa(ctx, _only(options, ctx.cfg.dsa.specialties))

    def show(ctx: Context, experts: dict[str, dict[str, Any]]) -> None:
        from mmedx_fast.stages.dsa import expert_stage

        for name, result in experts.items():
            print(f"{name}: loss {result['loss']:.4f}, {expert_stage(ctx, name).dir / 'adapter'}")

    return _in_context(options, work, show)


def _gba(options: argparse.Namespace) -> int:
    if options.plan:

        def plan(ctx: Context) -> str:
            from mmedx_fast.stages.row_plan import gba_plan

            return gba_plan(ctx)

        return _in_context(options, plan, lambda ctx, table: print(table), reads=True)

    def work(ctx: Context) -> dict[str, Any]:
        from mmedx_fast.stages.dsa import run_dsa
        from mmedx_fast.stages.gba import run_gba

        if ctx.cfg.gba.start != "base":
            run_dsa(ctx)
        return run_gba(ctx)

    def show(ctx: Context, result: dict[str, Any]) -> None:
        from mmedx_fast.stages.gba import rl_model

        print(f"reward {result['reward']:.4f}, {rl_model(ctx)}")

    return _in_context(options, work, show)


def _conflicts(options: argparse.Namespace) -> int:
    def work(ctx: Context) -> dict[str, Any]:
        from mmedx_fast.stages.caci import run_conflicts

        return run_conflicts(ctx)

    def show(ctx: Context, found: dict[str, Any]) -> None:
        from mmedx_fast.cost import render_table
        from mmedx_fast.report_data import load_run
        from mmedx_fast.report_plots import conflict_png
        from mmedx_fast.run_folder import write_bytes
        from mmedx_fast.stages.caci import caci_stage

        keys = ("sign_conflict", "weighted_sign_conflict", "cancelled_energy", "kept_fraction")
        rows = [[name, *(f"{row[k]:.3f}" for k in keys)] for name, row in found["linears"].items()]
        rows.append(["all", *(f"{found['summed'][k]:.3f}" for k in keys)])
        print(render_table(["linear", *keys], rows))
        folder = caci_stage(ctx).dir
        data = load_run(ctx.run.path).conflicts
        assert data is not None
        write_bytes(folder / "conflicts.png", conflict_png(data, "sign_conflict"))
        print(f"{folder / 'conflicts.json'}, {folder / 'conflicts.png'}")

    return _in_context(options, work, show)


def _merge(options: argparse.Namespace) -> int:
    def work(ctx: Context) -> dict[str, Any]:
        from mmedx_fast.stages.caci import run_caci

        return run_caci(ctx)

    def show(ctx: Context, result: dict[str, Any]) -> None:
        from mmedx_fast.stages.caci import merged_model

        print(f"sign conflicts {result['conflict_rate']:.3f}, {merged_model(ctx)}")

    return _in_context(options, work, show)


def _eval(options: argparse.Namespace) -> int:
    from mmedx_fast.cli_eval import run

    return run(options, _prepared, _in_context)


def _report(options: argparse.Namespace) -> int:
    def show(ctx: Context, _: None) -> None:
        from mmedx_fast.pipeline import make_report, write_summary

        write_summary(ctx)
        print(make_report(ctx.run.path))

    return _in_context(options, lambda ctx: None, show)


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from mmedx_fast.cost import plan, plan_text
    from mmedx_fast.gpus import find_gpu

    gpu = find_gpu(options.gpu)
    if options.price is not None:
        gpu = replace(gpu, dollars_per_hour=options.price)
    print(plan_text(plan(_config(options), gpu=gpu, gpus=options.gpus)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    cfg = _config(options) if options.config else None
    from mmedx_fast._env import prepare_environment

    prepare_environment(offline=True)
    from mmedx_fast.doctor import examine

    found = examine(cfg)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.text())
    return 0 if found.well else 1


def _bench(options: argparse.Namespace) -> int:
    from mmedx_fast.doctor import run_bench

    return run_bench(options.rest)


def _phantom(options: argparse.Namespace) -> int:
    from pathlib import Path

    from mmedx_fast.data.phantom import write_phantom

    folder = write_phantom(
        Path(options.folder),
        train=options.train,
        validation=options.validation,
        test=options.test,
        seed=options.seed,
    )
    print(folder)
    return 0


def _only(options: argparse.Namespace, known: tuple[str, ...]) -> tuple[str, ...]:
    return chosen_names("--only", options.only, known)


def chosen_names(
    option: str, given: Sequence[str] | None, known: tuple[str, ...]
) -> tuple[str, ...]:
    """What an option was given, once or more often, among the names it knows; without it all of them."""
    from mmedx_fast.config import ConfigError

    for name in given or ():
        if name not in known:
            raise ConfigError(f"{option} {name}: choose from {', '.join(known)}")
    return tuple(given) if given else known


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user; anything else is a defect and keeps its traceback."""
    modules = sys.modules
    found: list[type[Exception]] = [ValueError, FileNotFoundError]
    for module, names in (
        ("mmedx_fast.run_folder", ("RunFolderError", "DiskFullError")),
        ("mmedx_fast.stages.context", ("StageError",)),
        ("mmedx_fast.rollout.base", ("RolloutError",)),
        ("mmedx_fast.policy", ("TreeMismatchError",)),
        ("mmedx_fast.ranks", ("OtherRankError",)),
    ):
        if module in modules:
            found.extend(getattr(modules[module], name) for name in names)
    return tuple(found)


def _set_up_logging(verbose: bool) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    if not verbose:
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"(torch|transformers|vllm|deepspeed)\b.*")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
