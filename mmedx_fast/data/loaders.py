"""From a folder or file on disk to records: format detection, one loop for every loader, rejected
rows kept and counted.

A further format is a module with a ``Loader`` (see ``rows.py``) and one line in ``LOADERS``.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmedx_fast.data import medxpertqa, mmedexpert
from mmedx_fast.data.images import image_digest
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import SPLIT_NAMES, ImageFinder, Loader, Row, RowContext, RowError
from mmedx_fast.data.specialties import assign_specialty

LOADERS: dict[str, Loader] = {
    loader.name: loader for loader in (medxpertqa.LOADER, mmedexpert.LOADER)
}

_SNIFFED_ROWS = 100


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that could not be used: ``row`` is the line number from 1, ``value`` at most 200
    characters.
    """

    file: str
    row: int
    id: str | None
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        return f"{self.file}:{self.row}{name}: {self.field}={self.value}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """Records in file order and the rows that gave none.

    ``specialty_rules`` counts the rule by which each record got its specialty ("column" where the
    data says it).
    """

    records: list[Record]
    rejected: list[Rejected]
    format: str
    files: list[Path]
    specialty_rules: collections.Counter[str]

    @property
    def reasons(self) -> collections.Counter[str]:
        """Number of rejected rows by reason."""
        return collections.Counter(row.reason for row in self.rejected)

    def summary(self) -> str:
        """One line for the terminal and the log."""
        text = f"{_listed(self.files)} [{self.format}]: {len(self.records)} records"
        if self.rejected:
            text += f", {len(self.rejected)} rejected ({_counted(self.reasons)})"
        return text

    def write_rejected(self, path: Path) -> Path:
        """Write the rejected rows as JSONL (an empty file when there are none), whole or not at
        all.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part{os.getpid()}")
        with part.open("w", encoding="utf-8") as out:
            for row in self.rejected:
                out.write(json.dumps(dataclasses.asdict(row)) + "\n")
        os.replace(part, path)
        return path


def detect_format(path: Path | str) -> str:
    """Name of the format of a data file or folder, from its first rows. Raises ``ValueError`` when
    no loader, or more than one, knows them.
    """
    path = Path(path)
    columns: set[str] = set()
    files: dict[Path, None] = {}
    for loader in LOADERS.values():
        for file in _any_files(loader, path):
            files[file] = None
            for _, row in itertools.islice(loader.rows(file), _SNIFFED_ROWS):
                if isinstance(row, dict):
                    matching = [name for name, other in LOADERS.items() if other.detect(row)]
                    if len(matching) == 1:
                        return matching[0]
                    columns |= row.keys()
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{_listed(files)}: the file is empty; copy it again from its source")
    known = "; ".join(f"{name}: {loader.columns}" for name, loader in LOADERS.items())
    raise ValueError(
        f"{_listed(files)}: format not recognised (columns found: "
        f"{', '.join(sorted(columns)) or 'none, there are no data rows'}); "
        f"give the format by name or use one of these columns: {known}"
    )


def load_records(
    path: Path | str,
    *,
    split: str,
    format: str | None = None,
    check_images: bool = True,
    require_reasoning: bool = False,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoadResult:
    """Load one split of a data set.

    ``path``: a data file, or a folder that holds the split's file (``train``; ``validation``,
    ``val``, ``valid`` or
    ``dev``; ``test``). ``format``: a name in ``LOADERS``, detected if ``None``. ``check_images``:
    reject rows whose image files are missing; the images themselves are not opened.
    ``require_reasoning``: reject rows without a trace to train on.
    ``limit``: stop after that many records. ``options``: choices that the format offers, by name
    (``Loader.options``). Records without a specialty get one by the rules of
    ``specialties.yaml``.

    Raises ``ValueError`` for a path without the split, an unknown format or option, an empty file, an id that
    occurs twice, and when every row was rejected. Single bad rows end up in
    ``LoadResult.rejected``.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a positive number or None")
    loader = _loader(path, format)
    chosen = loader.chosen(options or {})
    files = loader.files(path, split)
    memory: dict[str, Any] = {}
    result = LoadResult([], [], loader.name, files, collections.Counter())
    first_seen: dict[str, str] = {}
    for file in files:
        context = RowContext(
            split,
            require_reasoning,
            ImageFinder(file, check=check_images, levels=loader.image_levels),
            file,
            files=tuple(files),
            options=chosen,
            memory=memory,
        )
        for number, outcome in _outcomes(loader, file, context):
            if isinstance(outcome, Rejected):
                result.rejected.append(outcome)
                continue
            _refuse_duplicate(outcome, f"{file}:{number}", first_seen)
            specialty, rule = assign_specialty(outcome)
            result.specialty_rules[rule] += 1
            result.records.append(dataclasses.replace(outcome, specialty=specialty))
            if len(result.records) == limit:
                return result
    if not result.records:
        _raise_nothing_usable(result)
    return result


def _loader(path: Path, format: str | None) -> Loader:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the data path")
    name = format or detect_format(path)
    if name not in LOADERS:
        raise ValueError(f"format {name!r} is unknown; use one of {', '.join(sorted(LOADERS))}")
    return LOADERS[name]


def _outcomes(
    loader: Loader, file: Path, context: RowContext
) -> Iterator[tuple[int, Record | Rejected]]:
    """Every row of a file with its number, as a record or as the rejected row that it is."""
    for number, row in loader.rows(file):
        try:
            if isinstance(row, RowError):
                raise row
            yield number, loader.parse(row, number, context)
        except RowError as error:
            yield number, _rejected(file, number, row, error)


def _refuse_duplicate(record: Record, place: str, first_seen: dict[str, str]) -> None:
    if record.id in first_seen:
        raise ValueError(
            f"{place}: id {record.id!r} was used before at {first_seen[record.id]}; "
            "ids must be unique, rename or remove one of the two rows"
        )
    first_seen[record.id] = place


def _rejected(file: Path, number: int, row: Row | RowError, error: RowError) -> Rejected:
    native = row.get("id") if isinstance(row, dict) else None
    return Rejected(
        file=str(file),
        row=number,
        id=None if native is None else str(native)[:200],
        field=error.field,
        value=repr(error.value)[:200],
        reason=error.reason,
    )


def _raise_nothing_usable(result: LoadResult) -> None:
    names = _listed(result.files)
    if not result.rejected:
        raise ValueError(f"{names}: no data rows; copy the file again from its source")
    raise ValueError(
        f"{names}: all {len(result.rejected)} rows were rejected ({_counted(result.reasons)}); "
        f"the first: {result.rejected[0]}; correct the data or the data path"
    )


def _any_files(loader: Loader, path: Path) -> Iterable[Path]:
    """Some split's files of a folder, whichever there are."""
    if path.is_file():
        return [path]
    for split in SPLIT_NAMES:
        try:
            return loader.files(path, split)
        except ValueError:
            continue
    # Nothing named like a split: let the loader say what it looked for.
    return loader.files(path, "train")


def _listed(files: Iterable[Path]) -> str:
    return ", ".join(map(str, files))


def _counted(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())


def assert_disjoint(train: Iterable[Record], test: Iterable[Record]) -> None:
    """Refuse to train on what is tested: no id in both, and no question with the same images in
    both.

    Questions are compared without regard to case and blanks, images by their encoded bytes; only
    images of questions that occur in both are read. Raises ``ValueError`` naming up to five
    overlaps, ``ImageError`` for an image that cannot be read.
    """
    by_question: dict[str, list[Record]] = collections.defaultdict(list)
    ids: set[str] = set()
    for record in train:
        by_question[_question_key(record)].append(record)
        ids.add(record.id)
    overlaps: list[str] = []
    train_images: dict[str, dict[tuple[str, ...], str]] = {}
    for record in test:
        if record.id in ids:
            overlaps.append(f"id {record.id!r} in both")
            continue
        question = _question_key(record)
        if question not in by_question:
            continue
        if question not in train_images:
            train_images[question] = {_image_key(r): r.id for r in by_question[question]}
        same = train_images[question].get(_image_key(record))
        if same is not None:
            overlaps.append(
                f"test {record.id!r} asks the same of the same images as train {same!r}"
            )
    if overlaps:
        raise ValueError(
            f"training and test data overlap in {len(overlaps)} questions: "
            f"{'; '.join(overlaps[:5])}; remove them from the training data"
        )


def _question_key(record: Record) -> str:
    return " ".join(record.question.casefold().split())


def _image_key(record: Record) -> tuple[str, ...]:
    return tuple(sorted(image_digest(ref) for ref in record.images))
