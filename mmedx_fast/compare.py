"""Two models on the same questions: paired differences and McNemar's tests, by set and overall."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mmedx_fast.eval_breakdown import MISSING, group_of
from mmedx_fast.meter import render_table
from mmedx_fast.predictions import set_of
from mmedx_fast.stats import Estimate, holm, mcnemar_counts, paired_interval

Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One group of shared questions. ``difference`` is second minus first, with its 95 % paired
    bootstrap interval; ``holm_p`` is ``p_value`` corrected for the number of groups."""

    name: str
    n: int
    first: float
    second: float
    only_first: int
    only_second: int
    difference: Estimate
    p_value: float
    mid_p: float
    holm_p: float | None


class _Told(NamedTuple):
    correct: bool
    group: str
    gold: str


def compare(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], by: str | None = None
) -> list[Comparison]:
    """All questions together, then each set (or each value of the column ``by``).

    ``first`` and ``second`` are the prediction rows of two models on the same questions, paired by
    set and id. ValueError, naming ids, where one has questions that the other lacks, where a
    question comes twice, or where the gold answers differ. Questions asked under several guidelines
    are paired with ``by="guideline"`` alone, and have no line for all together: their rows are not
    independent.
    """
    one, two = _read(first, "first", by), _read(second, "second", by)
    _check_shared(one, two)
    groups: dict[str, list[Key]] = {}
    for key, told in one.items():
        other = two[key]
        if told.gold != other.gold or told.group != other.group:
            what = "answer" if told.gold != other.gold else by
            values = (told.gold, other.gold) if what == "answer" else (told.group, other.group)
            raise ValueError(
                f"question {key[1]!r} has {what} {values[0]!r} in the first file and "
                f"{values[1]!r} in the second; compare models on the same questions"
            )
        groups.setdefault(told.group, []).append(key)
    parts = [_part(name, groups[name], one, two) for name in sorted(groups)]
    adjusted = holm([part.p_value for part in parts])
    parts = [dataclasses.replace(part, holm_p=p) for part, p in zip(parts, adjusted, strict=True)]
    if len({key[:2] for key in one}) < len(one):
        return parts
    whole = _part("all", list(one), one, two)
    return [whole] if by is None and len(parts) == 1 else [whole, *parts]


def _read(rows: Iterable[Mapping[str, Any]], which: str, by: str | None) -> dict[Key, _Told]:
    told: dict[Key, _Told] = {}
    found = False
    for row in rows:
        key: Key = (set_of(row), str(row["id"]))
        if by == "guideline":
            key = (*key, str(row.get("guideline")))
        if key in told:
            raise ValueError(
                f"question {row['id']!r} comes twice in the {which} file: give one model's "
                "predictions; if each guideline was asked, compare with --by guideline"
            )
        group = set_of(row) if by is None else group_of(row, by)
        found |= group is not None
        gold = str(row.get("answer_label") or row.get("answer"))
        told[key] = _Told(bool(row["correct"]), MISSING if group is None else group, gold)
    if not told:
        raise ValueError(f"the {which} file holds no predictions")
    if not found:
        raise ValueError(f"no row of the {which} file has the column {by!r}; choose another --by")
    return told


def _check_shared(one: Mapping[Key, _Told], two: Mapping[Key, _Told]) -> None:
    faults = []
    for which, here, there in (("first", one, two), ("second", two, one)):
        alone = [key[1] for key in here if key not in there]
        if alone:
            more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
            faults.append(f"{len(alone)} only in the {which} ({', '.join(alone[:5])}{more})")
    if faults:
        raise ValueError(
            f"the files do not hold the same questions: {'; '.join(faults)}. Evaluate both models "
            "on the same sets, with the same limit"
        )


def _part(
    name: str, keys: list[Key], one: Mapping[Key, _Told], two: Mapping[Key, _Told]
) -> Comparison:
    pairs = [(one[key].correct, two[key].correct) for key in keys]
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    test = mcnemar_counts(only_first, only_second)
    return Comparison(
        name=name,
        n=len(pairs),
        first=sum(a for a, _ in pairs) / len(pairs),
        second=sum(b for _, b in pairs) / len(pairs),
        only_first=only_first,
        only_second=only_second,
        difference=paired_interval(only_first, only_second, len(pairs)),
        p_value=test.p_value,
        mid_p=test.mid_p,
        holm_p=None,
    )


def comparison_table(parts: Iterable[Comparison]) -> str:
    """The comparisons as a plain table; accuracies and differences in percent."""
    header = ["", "n", "A %", "B %", "B - A", "95 % interval", "only A", "only B", "p", "mid-p", "Holm p"]  # fmt: skip
    rows = []
    for part in parts:
        value, low, high = (100 * x for x in part.difference)
        rows.append(
            [
                part.name or MISSING,
                str(part.n),
                f"{100 * part.first:.1f}",
                f"{100 * part.second:.1f}",
                f"{value:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                str(part.only_first),
                str(part.only_second),
                _p(part.p_value),
                _p(part.mid_p),
                "" if part.holm_p is None else _p(part.holm_p),
            ]
        )
    return render_table(header, rows)


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"
