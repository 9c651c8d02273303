"""What the report is made from: the files of a run folder, read so that nothing missing stops
it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from mmedx_fast.data.records import SPECIALTIES
from mmedx_fast.metrics import read_metrics

Rows = list[dict[str, Any]]
_MOST_ROWS = 2000
"""Predictions of a model that the report reads; evaluations may have 100,000."""
_MEASURES = {
    "sign_conflict": ("sign_conflict", "sign_conflict_rate"),
    "weighted_sign_conflict": ("weighted_sign_conflict", "sign_conflict_weighted"),
    "kept_fraction": ("kept_fraction", "kept"),
    "cancelled_energy": ("cancelled_energy",),
}


@dataclasses.dataclass(frozen=True)
class Conflicts:
    """``caci/conflicts.json``: per linear layer and summed, measures in [0, 1]."""

    experts: list[str]
    linears: dict[str, dict[str, float]]
    summed: dict[str, float]
    cosine: list[list[float]] | None

    def grid(self, measure: str) -> tuple[list[str], list[str], list[list[float]]]:
        """(row labels, column labels, values) of ``measure`` by layer and module; NaN where
        absent."""
        cells = {_place(name): row.get(measure, math.nan) for name, row in self.linears.items()}
        layers = sorted({layer for layer, _ in cells}, key=_natural)
        modules = list(dict.fromkeys(module for _, module in cells))
        values = [[cells.get((layer, m), math.nan) for m in modules] for layer in layers]
        return layers, modules, values


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything found; empty where a stage has not run. ``problems`` says what could not be
    read."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    sft: dict[str, Rows]
    rl: Rows
    conflicts: Conflicts | None
    predictions: dict[str, Rows]
    problems: list[str]


def load_run(folder: Path) -> RunData:
    """Read what is there. Raises FileNotFoundError only when ``folder`` is no folder at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}: give the one that mmedx run made")
    problems: list[str] = []

    def attempt(path: Path, reader: Callable[[Path], Any], empty: Any) -> Any:
        if not path.exists():
            return empty
        try:
            return reader(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            problems.append(f"{path.relative_to(folder)} could not be read: {error}")
            return empty

    sft = {
        p.parent.name: attempt(p, read_metrics, []) for p in _found(folder, "dsa/*/metrics.jsonl")
    }
    config = attempt(folder / "config.yaml", _read_yaml, {})
    shown = _shown_set(config)
    predictions = {
        p.relative_to(folder / "eval").parts[0]: attempt(p, _read_predictions, [])
        for p in _found(folder, f"eval/*/{shown}predictions.jsonl")
    }
    return RunData(
        folder=folder,
        config=config,
        summary=attempt(folder / "summary.json", _read_object, {}),
        sft={name: sft[name] for name in sorted(sft, key=_rank) if sft[name]},
        rl=attempt(folder / "gba" / "metrics.jsonl", read_metrics, []),
        conflicts=attempt(folder / "caci" / "conflicts.json", _read_conflicts, None),
        predictions={m: predictions[m] for m in sorted(predictions, key=_rank) if predictions[m]},
        problems=problems,
    )


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a finite number under ``key``."""
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    return [step for step, _ in points], [float(value) for _, value in points]


def totals(rows: Rows, prefix: str) -> dict[str, float]:
    """Sums over all rows of the keys ``<prefix>/<name>``, by name."""
    out: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            head, _, name = key.partition("/")
            if head == prefix and name and is_number(value):
                out[name] = out.get(name, 0.0) + value
    return out


def label(name: Any) -> str:
    """A name of the project as people read it: ``rl_start`` -> ``RL start``."""
    text = str(name).replace("_", " ").removesuffix(" reward")
    return re.sub(r"^(rl|dsa|gba|caci)\b", lambda found: found[1].upper(), text)


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(model: str) -> tuple[int, str]:
    order = ("base", *SPECIALTIES, "rl_start", "rl", "merged")
    return (order.index(model) if model in order else order.index("rl_start"), model)


def _found(folder: Path, pattern: str) -> list[Path]:
    # Folders of earlier settings (pediatrics.old-1) are history, not part of this run.
    return [
        p
        for p in sorted(folder.glob(pattern))
        if not any(re.search(r"\.old-\d+$", part) for part in p.relative_to(folder).parts)
    ]


def _shown_set(config: dict[str, Any]) -> str:
    """The folder, with its slash, of the evaluation set that the report shows; empty for the run's own."""
    evaluation = config.get("eval")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    return f"{next(iter(sets))}/" if isinstance(sets, dict) and sets else ""


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it must hold a JSON object")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it must hold a mapping")
    return value


def _read_predictions(path: Path) -> Rows:
    """The first rows, which samples are chosen from."""
    rows: Rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, _MOST_ROWS), start=1):
            if line.strip():
                rows.append(_prediction(line, number))
    return rows


def _prediction(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict) or "id" not in row:
        raise ValueError(f"line {number}: not an object with an 'id'")
    return row


def _read_conflicts(path: Path) -> Conflicts:
    data = _read_object(path)
    linears = data.get("linears") or {}
    if isinstance(linears, list):
        linears = {row["name"]: row for row in linears}
    summed = data.get("summed") or {}
    cosine = summed.get("cosine")
    count = len(cosine) if cosine else 0
    if cosine and any(len(row) != count for row in cosine):
        raise ValueError("summed.cosine must be a square matrix")
    names = [str(name) for name in data.get("experts") or []]
    return Conflicts(
        experts=names if len(names) == count or not count else [f"#{i + 1}" for i in range(count)],
        linears={str(name): _measures(row) for name, row in linears.items()},
        summed=_measures(summed),
        cosine=[[float(x) if is_number(x) else math.nan for x in r] for r in cosine or []] or None,
    )


def _measures(row: dict[str, Any]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, keys in _MEASURES.items():
        value = next((row[key] for key in keys if key in row), None)
        if isinstance(value, list) and value and all(map(is_number, value)):  # one per expert
            value = sum(value) / len(value)
        if is_number(value):
            out[name] = float(value)  # type: ignore[arg-type]
    return out


def _place(name: str) -> tuple[str, str]:
    """('12', 'q_proj') of ``...layers.12.self_attn.q_proj``; vision blocks become 'v12'."""
    found = re.search(r"(layers|blocks)\.(\d+)\.", name)
    module = name.rsplit(".", 1)[-1]
    if found is None:
        return "-", module
    return ("v" if found[1] == "blocks" else "") + found[2], module


def _natural(label: str) -> tuple[str, int]:
    digits = re.sub(r"\D", "", label)
    return re.sub(r"\d", "", label), int(digits or -1)
