"""What a data set holds: counts by split, specialty, answer type and images, rows that cannot be
used, and sample questions. One pass, a question at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmedx_fast.data.hub import WrongShards
from mmedx_fast.data.loaders import LOADERS, detect_format, iter_records
from mmedx_fast.data.records import SPECIALTIES, Record
from mmedx_fast.data.rows import SPLIT_NAMES, SeveralFiles
from mmedx_fast.data.vqa_rad import OSF_FILE

MISSING = "image file is missing"


Sample = tuple[Record, str]
"""A question and the rule that decided on its specialty."""


@dataclasses.dataclass
class Problem:
    """Rows that were rejected for one reason: how many, and the first of them."""

    count: int
    first: str


@dataclasses.dataclass
class SplitCounts:
    """One split of a data set, or one of several files that are called the same split.

    ``specialties`` counts (specialty, deciding rule); ``images`` and ``options`` count questions by
    how many they have; ``reasoning`` counts traces by guideline ("" for none in particular);
    ``cut`` says that the limit ended it; ``samples`` are questions by specialty; ``broken`` are
    questions whose image files are missing, which training rejects and which count as ``rejected``.
    """

    split: str
    path: Path
    files: list[Path] = dataclasses.field(default_factory=list)
    records: int = 0
    cut: bool = False
    specialties: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    answer_types: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    images: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    options: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    reasoning: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejected: dict[str, Problem] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)
    broken: list[Sample] = dataclasses.field(default_factory=list)

    def add(self, record: Record, rule: str) -> None:
        """Count one question that can be used, and the rule that decided on its specialty."""
        self.records += 1
        self.specialties[record.specialty or "", rule] += 1
        self.answer_types[record.answer_type if record.answer else "no gold answer"] += 1
        self.images[len(record.images)] += 1
        self.options[len(record.options or ())] += 1
        self.reasoning.update(record.reasoning.keys())

    def reject(self, reason: str, example: str) -> None:
        """Count one rejected row."""
        problem = self.rejected.setdefault(reason, Problem(0, example))
        problem.count += 1


@dataclasses.dataclass
class Inspection:
    """A data set's format, its splits, and why others cannot be read ({split: message})."""

    path: Path
    format: str
    splits: list[SplitCounts]
    unread: dict[str, str]


def inspect_data(
    path: Path,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    samples: int = 0,
) -> Inspection:
    """Read a data file or folder through and count what it holds.

    ``split``: that one only; otherwise all there are. A split of several files that do not belong
    together is counted file by file. ``limit``: stop after that many questions of a split.
    ``samples``: how many questions a specialty to keep, drawn evenly from the whole split, the same
    ones each time. ``options``: those of the format, as in ``load_records``.

    A question whose image file is missing counts as rejected, as it does for training. Raises
    ``ValueError`` as ``load_records`` does, but not when all rows are rejected: those are the
    result.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the data path")
    name = format or detect_format(path)
    if name not in LOADERS:
        raise ValueError(f"format {name!r} is unknown; use one of {', '.join(sorted(LOADERS))}")
    sources, unread = _sources(path, name, split)
    found = [
        _count(SplitCounts(label, file), name, limit, options or {}, samples)
        for label, file in sources
    ]
    return Inspection(path, name, found, unread)


def _sources(
    path: Path, format: str, split: str | None
) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """(split, file or folder) of everything to read, and why a split cannot be read."""
    if path.is_file():
        return [(name, path) for name in ([split] if split else _splits_of_file(path))], {}
    found: list[tuple[str, Path]] = []
    unread: dict[str, str] = {}
    seen: list[list[Path]] = []
    for name in [split] if split else SPLIT_NAMES:
        try:
            files = LOADERS[format].files(path, name)
        except WrongShards as error:
            unread[name] = str(error)
        except SeveralFiles as several:
            found += [(name, file) for file in several.files]
        except ValueError as error:
            unread[name] = str(error)
        else:
            # Formats without splits give the same files for any; OSF's one file holds two splits.
            if files not in seen or files[0].name == OSF_FILE:
                found.append((name, path))
            seen.append(files)
    if not found:
        raise ValueError(next(iter(unread.values())))
    return found, unread


def _splits_of_file(file: Path) -> list[str]:
    """The splits that a file's name tells; "test" where it tells none."""
    if file.name == OSF_FILE:
        return ["train", "test"]
    stem = file.stem.lower()
    return [next((s for s, names in SPLIT_NAMES.items() if any(n in stem for n in names)), "test")]


def _count(
    counts: SplitCounts, format: str, limit: int | None, options: Mapping[str, Any], samples: int
) -> SplitCounts:
    stream = iter_records(
        counts.path,
        split=counts.split,
        format=format,
        check_images=False,  # looked for below, so that the questions can still be shown
        options=options,
        allow_unanswered=True,
        limit=limit,
        on_rejected=lambda row: counts.reject(row.reason, str(row)),
    )
    counts.files = stream.files
    rng = random.Random(0)
    rules: collections.Counter[str] = collections.Counter()
    taken: collections.Counter[str] = collections.Counter()
    try:
        for record in stream:
            (rule,) = stream.specialty_rules - rules
            rules[rule] += 1
            if missing := _missing(record):
                counts.reject(MISSING, f"{record.id}: {missing}")
                _sample(counts.broken, (record, rule), counts.rejected[MISSING].count, samples, rng)
                continue
            counts.add(record, rule)
            specialty = record.specialty or ""
            taken[specialty] += 1
            kept = counts.samples.setdefault(specialty, [])
            _sample(kept, (record, rule), taken[specialty], samples, rng)
    except ValueError:
        if stream.count or not counts.rejected:
            raise
    counts.cut = limit is not None and stream.count == limit
    return counts


def _missing(record: Record) -> Path | None:
    """The first image of a question that is named but not there."""
    paths = (ref.path for ref in record.images if ref.path is not None)
    return next((path for path in paths if not os.path.isfile(path)), None)


def _sample(kept: list[Sample], sample: Sample, seen: int, size: int, rng: random.Random) -> None:
    """Reservoir sampling: every question of ``seen`` has the same chance to be among ``size``."""
    if len(kept) < size:
        kept.append(sample)
    elif size and (place := rng.randrange(seen)) < size:
        kept[place] = sample


# ---- for the terminal


def report_text(found: Inspection) -> str:
    """The counts as text."""
    lines = [f"{found.path}: {found.format}"]
    for split in found.splits:
        lines += ["", *_split_lines(found, split)]
    lines += [f"\n{name}: not read: {why}" for name, why in found.unread.items()]
    return "\n".join(lines)


def _split_lines(found: Inspection, split: SplitCounts) -> Iterator[str]:
    place = "" if split.path == found.path else f" ({split.path})"
    files = f"{len(split.files)} files" if len(split.files) > 1 else split.files[0].name
    cut = ", stopped at the limit" if split.cut else ""
    yield f"{split.split}{place}: {split.records:,} questions in {files}{cut}"
    shown = tables(split)
    width = max((len(name) for rows in shown.values() for name, _ in rows), default=0)
    for title, rows in shown.items():
        if rows:
            yield f"  {title}"
            yield from (f"    {name:<{width}}  {count:>9,}" for name, count in rows)
    if split.rejected:
        yield f"  rejected: {sum(p.count for p in split.rejected.values()):,} rows"
    for reason, problem in by_count(split.rejected):
        yield f"    {problem.count:>9,} x {reason}"
        yield f"              first: {problem.first}"


def by_count(rejected: Mapping[str, Problem]) -> list[tuple[str, Problem]]:
    """Reasons, the most frequent first."""
    return sorted(rejected.items(), key=lambda item: -item[1].count)


def tables(split: SplitCounts) -> dict[str, list[tuple[str, int]]]:
    """Everything counted in a split as {title: rows of (name, count)}, in the order to show it."""
    specialties: list[tuple[str, int]] = []
    for name in SPECIALTIES:
        own = {r: n for (s, r), n in split.specialties.most_common() if s == name}
        how = ", ".join(f"{rule} {count:,}" for rule, count in own.items())
        specialties.append((f"{name} ({how})" if how else name, sum(own.values())))
    return {
        "specialty (by rule)": specialties if split.records else [],
        "answer": split.answer_types.most_common(),
        "images a question": [(str(n), count) for n, count in sorted(split.images.items())],
        "options a question": [(str(n), count) for n, count in sorted(split.options.items())],
        "reasoning traces": [(n or "no guideline", c) for n, c in split.reasoning.most_common()],
    }
