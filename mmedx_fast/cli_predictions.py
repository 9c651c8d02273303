"""``mmedx compare``, ``mmedx export`` and ``mmedx judge``: what can be done with predictions afterwards."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
_WHERE = "predictions.jsonl, or a folder that holds one (runs/demo/eval/rl)"


def add_commands(add: Add) -> None:
    """Add the commands; ``add`` makes a subparser of (name, command, help)."""
    sub = add("compare", _compare, "Compare two models on the same questions, pair by pair")
    sub.add_argument("first", metavar="PREDICTIONS_A", help=_WHERE)
    sub.add_argument("second", metavar="PREDICTIONS_B")
    sub.add_argument("--by", metavar="COLUMN", help="instead of by set, e.g. specialty, guideline")

    sub = add("export", _export, "Write predictions in another evaluation's form")
    sub.add_argument("predictions", metavar="PREDICTIONS", help=_WHERE)
    sub.add_argument("--to", required=True, choices=["vlmevalkit"])
    sub.add_argument("--out", metavar="FILE", help=".tsv or .xlsx (default: beside PREDICTIONS)")

    sub = add("judge", _judge, "Ask a language model about open answers (never changes the score)")
    sub.add_argument("predictions", metavar="PREDICTIONS", help=_WHERE)
    sub.add_argument(
        "--url", required=True, help="OpenAI-compatible, e.g. http://localhost:8000/v1"
    )
    sub.add_argument("--model", required=True, metavar="NAME")
    sub.add_argument("--all", action="store_true", help="also questions with options and yes/no")
    sub.add_argument("--key-env", default="OPENAI_API_KEY", metavar="VARIABLE",
                     help="environment variable with the key (default %(default)s)")  # fmt: skip
    sub.add_argument(
        "--workers", type=int, default=8, help="questions at once (default %(default)s)"
    )
    sub.add_argument("--timeout", type=float, default=60.0, help="seconds (default %(default)s)")


def _compare(options: argparse.Namespace) -> int:
    from mmedx_fast.compare import compare, comparison_table
    from mmedx_fast.predictions import read_predictions

    parts = compare(
        read_predictions(options.first), read_predictions(options.second), by=options.by
    )
    print(f"A: {options.first}\nB: {options.second}\n")
    print(comparison_table(parts))
    return 0


def _export(options: argparse.Namespace) -> int:
    from mmedx_fast.predictions import prediction_files, read_predictions
    from mmedx_fast.vlmeval_export import has_openpyxl, vlmevalkit_table, write_table

    files = prediction_files(options.predictions)
    if options.out and len(files) > 1:
        raise ValueError(
            f"{options.predictions} holds {len(files)} sets; leave --out away, or export one: "
            f"{', '.join(str(file) for file in files)}"
        )
    for file in files:
        table = vlmevalkit_table(read_predictions(file))
        suffixes = (".tsv", ".xlsx") if has_openpyxl() else (".tsv",)
        beside = [file.with_name(f"{file.stem}.vlmevalkit{suffix}") for suffix in suffixes]
        for path in [Path(options.out)] if options.out else beside:
            write_table(table, path)
            print(f"{path}: {len(table.rows)} questions")
        if table.left_out:
            print(f"  {table.left_out} without options left out")
        if table.stopped:
            print(f"  {table.stopped} texts that pandas takes for missing end in a stop ('None.')")
        if not options.out and not has_openpyxl():
            print("  no .xlsx: openpyxl is not installed; set PRED_FORMAT=tsv for VLMEvalKit")
    return 0


def _judge(options: argparse.Namespace) -> int:
    from mmedx_fast.judge import Judge
    from mmedx_fast.predictions import prediction_files

    for file in prediction_files(options.predictions):
        cache = file.with_name(f"{file.stem}.judge-cache.jsonl")
        key = os.environ.get(options.key_env)
        with Judge(options.url, options.model, cache, key=key, timeout=options.timeout) as judge:
            counts = _judge_file(file, judge, options)
        _say(counts)
    return 0


def _judge_file(file: Path, judge: Any, options: argparse.Namespace) -> dict[str, Any]:
    from mmedx_fast.judge import judge_rows
    from mmedx_fast.predictions import read_predictions
    from mmedx_fast.progress import progress

    out = file.with_name(f"{file.stem}.judged.jsonl")
    part = out.with_name(f"{out.name}.part")
    counts: dict[str, Any] = {
        "file": out,
        "asked": 0,
        "rows": 0,
        "strict": 0,
        "same": 0,
        "different": 0,
    }
    counts["unjudged"] = 0
    total = sum(1 for _ in read_predictions(file))
    with progress(total, "Judging", unit="question") as bar, part.open("w", encoding="utf-8") as to:
        rows = judge_rows(
            read_predictions(file), judge, every=options.all, workers=options.workers,
            show=lambda done: bar.update(done - bar.done),
        )  # fmt: skip
        for row in rows:
            to.write(json.dumps(row, ensure_ascii=False) + "\n")
            if row["judge"] is not None:
                counts["rows"] += 1
                counts["strict"] += bool(row["correct"])
                counts[row["judge"]] += 1
        to.flush()
        os.fsync(to.fileno())
    os.replace(part, out)
    return counts | {"asked": judge.asked}


def _say(counts: dict[str, Any]) -> None:
    rows = counts["rows"]
    print(f"{counts['file']}: {rows} answers judged, {counts['asked']} requests")
    if rows:
        print(
            f"  strict {counts['strict'] / rows:.1%}, same meaning {counts['same'] / rows:.1%}; "
            f"{counts['unjudged']} unjudged (counted as not the same; judge_reply says why)"
        )
