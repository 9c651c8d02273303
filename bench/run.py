"""Measure ops against their peers and their floors, in one process.

    python -m bench.run --op all --shapes qwen2_5_vl_7b --out DIR --minutes 8

Every provider is checked against a reference in float64 before anything is timed; one that is off is
listed and not timed, and if that one is ours the run ends with status 1. Then all take turns on a
cold L2 cache (medians with 20th and 80th percentiles). JSON and Markdown are written after every
shape, a plot after every op. Without a GPU small shapes are measured in place of a GPU's; the set
cpu_large (head ops and train_step) takes minutes and several GB.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedx_fast._env import prepare_environment

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16", "float16")
TINY = "tiny"
CPU_SETS = (TINY, "cpu_large")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--op", nargs="+", default=["all"], help="names of ops, or all")
    made.add_argument("--shapes", help="a set of shapes; default: qwen2_5_vl_7b, tiny on a CPU")
    made.add_argument(
        "--providers", nargs="+", default=[], metavar="NAME", help="only peers named like this"
    )
    made.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on a CPU")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    made.add_argument("--minutes", type=float, help="for all ops together; default: 8, 2 on a CPU")
    made.add_argument("--rounds", type=int, default=50, help="most calls of one provider")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=ROOT / "bench/results")
    made.add_argument("--commit", help="recorded where the sources are no git checkout")
    made.add_argument("--no-plots", action="store_true")
    made.add_argument(
        "--list", action="store_true", help="list ops, shapes and providers, and stop"
    )
    return made


@dataclass(frozen=True)
class _Unit:
    op: Any
    shape: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0: all fine, 1: ours was wrong somewhere, 2: bad arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    prepare_environment(offline=True)
    # read when torch is imported: the profiler, which counts a CPU's memory, announces every start
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from bench import registry

    ops = registry.load()
    unknown = [name for name in options.op if name != "all" and name not in ops]
    if unknown:
        print(f"--op {unknown[0]}: choose from all, {', '.join(ops)}", file=sys.stderr)
        return 2
    chosen = [op for name, op in ops.items() if "all" in options.op or name in options.op]
    if options.list:
        print(listing(chosen))
        return 0
    try:
        settings, shapes = _settings(options, chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.run", *arguments])
    return run(chosen, shapes, settings, options, command)


def _settings(options: argparse.Namespace, ops: list[Any]) -> tuple[Any, str]:
    """Device, dtype and shapes from the options; leaves those of ``ops`` that have the shapes.

    Raises ValueError for a set that none has.
    """
    import torch

    from bench.measure import Settings

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    known = sorted({name for op in ops for name in op.shapes})
    shapes = options.shapes or ("qwen2_5_vl_7b" if kind == "cuda" else TINY)
    if shapes not in known:
        raise ValueError(f"--shapes {shapes}: choose from {', '.join(known)}")
    if kind == "cpu":
        asked, shapes = shapes, shapes if shapes in CPU_SETS else TINY
        told = "" if shapes == asked else f" instead of {asked}"
        print(f"No GPU in use: small shapes ({shapes}){told}. These times say nothing about a GPU.")
    ops[:] = [op for op in ops if shapes in op.shapes]
    if not ops:
        raise ValueError(f"--shapes {shapes}: none of the chosen ops has this set (see --list)")
    dtype = options.dtype or ("bfloat16" if kind == "cuda" else "float32")
    if options.minutes is None:
        options.minutes = 8.0 if kind == "cuda" else 2.0
    device = torch.device(kind)
    named = tuple(options.providers)
    return Settings(device, getattr(torch, dtype), options.seed, options.rounds, named), shapes


def run(ops: list[Any], shapes: str, settings: Any, options: Any, command: str) -> int:
    """Measure every op at every shape, writing as it goes."""
    from bench import results
    from bench.measure import measure

    end = time.monotonic() + 60 * options.minutes
    env = results.environment(command, settings.device, options.commit)
    units = in_turn(ops, shapes)
    rows: dict[str, list[dict[str, Any]]] = {op.name: [] for op in ops}
    wrong = 0
    for at, unit in enumerate(units):
        seconds = max((end - time.monotonic()) / (len(units) - at), 0.1)
        row = measure(unit.op, unit.shape, settings, seconds)
        wrong += bool(row["failed"])
        rows[unit.op.name].append(row)
        data = results.document(unit.op, shapes, env, rows[unit.op.name])
        path = options.out / results.stem(unit.op.name, env["device"], env["date"])
        results.write_json(path.with_suffix(".json"), data)
        results.write(path.with_suffix(".md"), results.markdown(data))
        print("\n".join(_summary(unit, row)), flush=True)
        if not any(later.op is unit.op for later in units[at + 1 :]):
            _picture(data, path, options.no_plots)
    if wrong:
        print(f"{wrong} shapes were not timed because ours is wrong there", file=sys.stderr)
    return 1 if wrong else 0


def in_turn(ops: list[Any], shapes: str) -> list[_Unit]:
    """Every op's first shape, then every op's second: a run cut short has the main shapes of all.

    Ops with the same inputs thereby follow each other, and the inputs are made once.
    """
    longest = max(len(op.shapes[shapes]) for op in ops)
    return [
        _Unit(op, op.shapes[shapes][i])
        for i in range(longest)
        for op in ops
        if i < len(op.shapes[shapes])
    ]


def _picture(data: dict[str, Any], path: Path, skip: bool) -> None:
    if skip:
        print(path.with_suffix(".json"))
        return
    from bench.plots import picture

    path.with_suffix(".png").write_bytes(picture(data))
    print(f"{path}.json, .md, .png")


def _summary(unit: _Unit, row: dict[str, Any]) -> Iterator[str]:
    from bench.results import number

    yield f"{unit.op.name}  {row['shape']}  {row['dtype']}"
    for p in row["providers"]:
        if "median_ms" not in p:
            yield f"    {p['name']:<28} {p['status']}"
            continue
        yield (
            f"    {p['name']:<28} {p['median_ms']:>10.4g} ms  "
            f"{number(p['ratio_to_floor'], '8.2f')}x floor  {p['peak_bytes'] / 2**20:9.3g} MiB"
            f"{_saved(p)}"
        )


def _saved(p: dict[str, Any]) -> str:
    kept = p.get("saved_bytes")
    return "" if kept is None else f"  {kept / 2**20:9.3g} MiB saved"


def listing(ops: list[Any]) -> str:
    """Ops, their sets of shapes, and their providers with what keeps them from running here."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for op in ops:
        lines.append(f"{op.name}: {op.title}")
        lines += [
            f"    shapes {name}: {', '.join(s.name for s in op.shapes[name])}" for name in op.shapes
        ]
        for p in op.ordered():
            why = p.unavailable(device, op.shapes[TINY][0].sizes)
            lines.append(f"    {p.name} ({p.kind})" + (f": {why}" if why else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
