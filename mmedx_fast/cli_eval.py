"""``mmedx eval``: the models of a run on its sets, or any model on any data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedx_fast.config import Config
    from mmedx_fast.stages.context import Context

_SINGLE = ("model", "split", "format", "limit", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside config, overrides and ``--only``."""
    parser.add_argument("--set", action="append", metavar="SET", help="one set of eval.sets")
    single = parser.add_argument_group("any model on any data, without a run")
    single.add_argument("--data", metavar="PATH", help="a folder or file to ask, or phantom")
    single.add_argument(
        "--model", metavar="DIR", help="checkpoint or PEFT adapter folder (default: model.path)"
    )
    single.add_argument("--split", help="of the data (default test)")
    single.add_argument("--format", help="of the data (default: detected)")
    single.add_argument("--limit", type=int, help="ask only the first this many questions")
    single.add_argument("--out", metavar="DIR", help="results go here (default evals/MODEL-DATA)")


def run(
    options: argparse.Namespace,
    prepared: Callable[[argparse.Namespace], Config],
    in_context: Callable[..., int],
) -> int:
    """The command. ``prepared`` reads the config and sets the environment; ``in_context`` opens a run."""
    if options.data is not None:
        return _single(options, prepared)
    from mmedx_fast.config import ConfigError

    given = [f"--{name}" for name in _SINGLE if getattr(options, name) is not None]
    if given:
        raise ConfigError(f"{given[0]} goes with --data: give the questions to ask there")
    return in_context(options, lambda ctx: _of_a_run(options, ctx), _show)


def _of_a_run(options: argparse.Namespace, ctx: Context) -> None:
    from mmedx_fast.cli import chosen_names
    from mmedx_fast.stages.evaluate import eval_sets, model_names, run_eval

    models = chosen_names("--only", options.only, tuple(model_names(ctx)))
    run_eval(ctx, models, chosen_names("--set", options.set, tuple(eval_sets(ctx))))


def _show(ctx: Context, _: None) -> None:
    from mmedx_fast.pipeline import headline, write_summary

    print(headline(write_summary(ctx)))
    page = ctx.run.path / "eval" / "predictions.html"
    if page.is_file():
        print(f"Answers: {page}")


def _single(options: argparse.Namespace, prepared: Callable[[argparse.Namespace], Config]) -> int:
    from mmedx_fast.config import ConfigError

    for name in ("only", "set"):
        if getattr(options, name):
            raise ConfigError(f"--{name} chooses within a run and does not go with --data")
    cfg = prepared(options)
    from mmedx_fast import ranks
    from mmedx_fast.config import EvalSetConfig
    from mmedx_fast.stages.eval_single import evaluate

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit}: give a positive number")
    chosen = EvalSetConfig(
        path=options.data, split=options.split or "test", format=options.format, limit=options.limit
    )
    out, found = evaluate(cfg, options.model, chosen, options.out and Path(options.out))
    if ranks.is_main():
        print(
            f"{_figures(found)}\nAnswers: {out / 'predictions.html'}\nNumbers: {out / 'metrics.json'}"
        )
    return 0


def _figures(found: dict[str, Any]) -> str:
    """The result as a small table, in per cent."""
    from mmedx_fast.meter import render_table

    names = {
        "micro_accuracy": "accuracy",
        "macro_accuracy": "macro over specialties",
        "medevalkit_accuracy": "as MedEvalKit scores",
        "mean_accuracy": "mean of single answers",
        "unparsed_rate": "no answer read",
        "truncated_rate": "cut by length",
    }
    rows = [["questions", f"{found['questions']:,}"]]
    rows += [[text, f"{100 * found[key]:.1f}"] for key, text in names.items() if key in found]
    rows += [[f"pass@{k}", f"{100 * value:.1f}"] for k, value in found.get("pass_at", {}).items()]
    if found["rejected"]:
        rows.append(["left out", f"{found['rejected']:,}"])
    return render_table(["", "%"], rows)
