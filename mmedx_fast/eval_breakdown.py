"""Accuracy by column of the prediction rows, in one pass that keeps counts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmedx_fast.stats import accuracy_interval, macro_accuracy, wilson_interval

COLUMNS: tuple[str, ...] = (
    "set", "dataset", "specialty", "medical_task", "body_system", "modality", "modality_type",
    "question_type", "department", "answer_type", "image_count", "guideline",
)  # fmt: skip
SMALL = 30  # questions under which a group's accuracy says little
MAX_GROUPS = 200  # of one column; further ones are counted together
MISSING, OTHERS = "(none)", "(others)"


@dataclasses.dataclass
class Counts:
    """Of one group: rows, and how many are right by either scorer, unparsed, cut by the limit."""

    n: int = 0
    correct: int = 0
    correct_medevalkit: int = 0
    unparsed: int = 0
    truncated: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self.n += 1
        self.correct += bool(row["correct"])
        self.correct_medevalkit += bool(row.get("correct_medevalkit"))
        self.unparsed += row.get("predicted") is None
        self.truncated += row.get("finish_reason") == "length"


def group_of(row: Mapping[str, Any], column: str) -> str | None:
    """The row's group in ``column``: its own key, else its ``meta``'s; None if it has neither.

    ``image_count`` is the number of ``images``. Lists are joined, so that a question of two
    modalities is a group of that pair.
    """
    if column == "image_count" and column not in row:
        images = row.get("images")
        return None if images is None else str(len(images))
    value = row.get(column)
    if value in (None, ""):
        value = (row.get("meta") or {}).get(column)
    if value in (None, ""):
        return None
    if isinstance(value, list | tuple):
        return ", ".join(sorted(str(item) for item in value)) or None
    return str(value)


def breakdown(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> dict[str, Any]:
    """``{"overall": group, "columns": {column: {"groups": {name: group}, "macro": ...}}}``.

    ``rows`` are prediction rows (``predictions.jsonl``), read once; memory goes with the number of
    groups. A group has ``n``, ``accuracy`` with its 95 % ``interval`` and ``method`` (Wilson where
    fewer than ten are right or wrong, else the percentile bootstrap), ``medevalkit_accuracy``,
    ``unparsed_rate``, ``truncated_rate``, and ``small`` under 30 questions. ``macro`` is the mean
    over groups with its stratified interval. Rows without a value are the group "(none)"; from the
    201st group of a column on, rows count as "(others)", and ``folded`` says how many. Without
    ``columns`` those of :data:`COLUMNS` that some row has; a named one that no row has is a
    ValueError, as are no rows at all.
    """
    wanted = COLUMNS if columns is None else tuple(columns)
    overall = Counts()
    tables: dict[str, dict[str, Counts]] = {column: {} for column in wanted}
    for row in rows:
        if "correct" not in row:
            raise ValueError(f"row {overall.n} ({row.get('id')!r}) has no key 'correct'")
        overall.add(row)
        for column, table in tables.items():
            name = group_of(row, column) or MISSING
            if name not in table and name != MISSING and len(table) >= MAX_GROUPS:
                name = OTHERS
            table.setdefault(name, Counts()).add(row)
    if overall.n == 0:
        raise ValueError("there are no prediction rows to break down")
    empty = [column for column, table in tables.items() if set(table) == {MISSING}]
    if columns is not None and empty:
        raise ValueError(f"no row has the column {empty[0]!r}, neither itself nor in its meta")
    return {
        "overall": _group(overall),
        "columns": {column: _column(tables[column]) for column in wanted if column not in empty},
    }


def _column(table: dict[str, Counts]) -> dict[str, Any]:
    macro = macro_accuracy({name: (counts.correct, counts.n) for name, counts in table.items()})
    return {
        "groups": {name: _group(table[name]) for name in sorted(table)},
        "macro": {"accuracy": macro.value, "interval": [macro.low, macro.high]},
        "folded": table[OTHERS].n if OTHERS in table else 0,
    }


def _group(counts: Counts) -> dict[str, Any]:
    few = min(counts.correct, counts.n - counts.correct) < 10
    low, high = (
        wilson_interval(counts.correct, counts.n)
        if few
        else accuracy_interval(counts.correct, counts.n)[1:]
    )
    return {
        "n": counts.n,
        "correct": counts.correct,
        "accuracy": counts.correct / counts.n,
        "interval": [low, high],
        "method": "wilson" if few else "bootstrap",
        "medevalkit_accuracy": counts.correct_medevalkit / counts.n,
        "unparsed_rate": counts.unparsed / counts.n,
        "truncated_rate": counts.truncated / counts.n,
        "small": counts.n < SMALL,
    }
