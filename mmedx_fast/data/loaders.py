"""From a folder or file on disk to records: format detection, one loop for every loader, rejected
rows kept and counted.

A further format is a module with a ``Loader`` (see ``rows.py``) and one line in ``LOADERS``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import force_setattr

from mmedx_fast.data import (
    detection,
    easyr1,
    huatuo,
    huggingface,
    med_r1,
    medix_r1,
    medvlm_r1,
    medvlthinker,
    medxpertqa,
    mmedexpert,
    omnimedvqa,
    openmedreason,
    pathvqa,
    pmc_vqa,
    pubmedvision,
    slake,
    vlmeval_tsv,
    vqa_rad,
)
from mmedx_fast.data.fields import image_findings
from mmedx_fast.data.image_finder import ImageFinder
from mmedx_fast.data.images import image_digest
from mmedx_fast.data.records import Record
from mmedx_fast.data.rejected import Rejected, RejectedFile, rejected_row
from mmedx_fast.data.rows import Loader, RawRow, Row, RowContext, RowError, read_plain
from mmedx_fast.data.specialties import assign_specialty

LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        medxpertqa.LOADER,
        mmedexpert.LOADER,
        omnimedvqa.LOADER,
        pmc_vqa.LOADER,
        vlmeval_tsv.LOADER,
        slake.LOADER,
        vqa_rad.LOADER,
        pathvqa.LOADER,
        pubmedvision.LOADER,
        huatuo.LOADER,
        med_r1.LOADER,
        medvlm_r1.LOADER,
        medvlthinker.LOADER,
        medix_r1.LOADER,
        openmedreason.LOADER,
        easyr1.LOADER,
        huggingface.LOADER,
    )
}

id_hash = hash


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
        return _summary(self.files, self.format, len(self.records), self.reasons)

    def write_rejected(self, path: Path) -> Path:
        """Write the rejected rows as JSONL (an empty file when there are none), whole or not at
        all.
        """
        with RejectedFile(path) as rejected:
            for row in self.rejected:
                rejected(row)
        return path


class RecordStream(Iterator[Record]):
    """The records of a split, made one at a time (``iter_records``), and what was counted so far.

    ``reasons``: rejected rows by reason; ``first_rejected``: the first of them; ``excluded``: records
    that ``include`` left out; ``count``: records given; ``specialty_rules``: as in ``LoadResult``.
    """

    def __init__(
        self,
        loader: Loader,
        files: list[Path],
        context: Callable[[Path], RowContext],
        *,
        limit: int | None,
        on_rejected: Callable[[Rejected], object] | None,
        include: Callable[[Record], bool] | None,
    ) -> None:
        self.format = loader.name
        self.files = files
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first_rejected: Rejected | None = None
        self.excluded = 0
        self.count = 0
        self._loader = loader
        self._context = context
        self._limit = limit
        self._on_rejected = on_rejected
        self._include = include
        self._by_rule: collections.Counter[str] = collections.Counter()
        self._records = self._read()

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def __next__(self) -> Record:
        return next(self._records)

    @property
    def specialty_rules(self) -> collections.Counter[str]:
        by_column = self.count - self._by_rule.total()
        return +collections.Counter({"column": by_column, **self._by_rule})

    def summary(self) -> str:
        """One line for the terminal and the log."""
        return _summary(self.files, self.format, self.count, self.reasons)

    def _read(self) -> Iterator[Record]:
        ids: set[int] = set()
        include = self._include
        for file in self.files:
            context = self._context(file)
            for first, rows in self._rows(file, context):
                for number, record in enumerate(rows, first):
                    if not isinstance(record, Record):
                        if (made := self._parse(record, file, number, context)) is None:
                            continue
                        record = made
                    known = len(ids)
                    ids.add(id_hash(record.id))
                    if len(ids) == known:
                        self._refuse_duplicate(record.id, file, number)
                    rule = None
                    if record.specialty is None:
                        specialty, rule = assign_specialty(record)
                        # It was made just now and nobody else has it; a copy takes as long as all the rest.
                        force_setattr(record, "specialty", specialty)
                    if include is not None and not include(record):
                        self.excluded += 1
                        continue
                    if rule is not None:
                        self._by_rule[rule] += 1
                    self.count += 1
                    yield record
                    if self.count == self._limit:
                        return
        if not self.count and not self.excluded:
            self._raise_nothing_usable()

    def _rows(self, file: Path, context: RowContext) -> Iterator[tuple[int, Sequence[RawRow]]]:
        """The rows of a file, some at a time, with the number of the first of them."""
        if self._loader.plain:
            return read_plain(file, self._loader.plain(context))
        return ((number, (row,)) for number, row in self._loader.rows(file))

    def _parse(
        self, row: Row | RowError | None, file: Path, number: int, context: RowContext
    ) -> Record | None:
        """The record of a row; one that gives none is counted, unless it is blank."""
        if row is None:
            return None
        try:
            if isinstance(row, RowError):
                raise row
            record = self._loader.parse(row, number, context)
            image_findings(record.meta)  # rewards and scores read them long after
            return record
        except RowError as error:
            self._reject(rejected_row(file, number, row, error))
            return None

    def _reject(self, row: Rejected) -> None:
        self.reasons[row.reason] += 1
        self.first_rejected = self.first_rejected or row
        if self._on_rejected is not None:
            self._on_rejected(row)

    def _refuse_duplicate(self, name: str, file: Path, number: int) -> None:
        """Only hashes of the ids are kept, so that a million cost 60 MB and not 150: the first row
        is looked for again, and if there is none two ids merely share a hash.
        """
        for earlier in self.files[: self.files.index(file) + 1]:
            context = self._context(earlier)
            for at, row in self._loader.rows(earlier):
                if earlier == file and at == number:
                    return
                with contextlib.suppress(RowError):
                    if isinstance(row, dict) and self._loader.parse(row, at, context).id == name:
                        raise ValueError(
                            f"{file}:{number}: id {name!r} was used before at {earlier}:{at}; "
                            "ids must be unique, rename or remove one of the two rows"
                        )

    def _raise_nothing_usable(self) -> None:
        names = _listed(self.files)
        if self.first_rejected is None:
            raise ValueError(f"{names}: no data rows; copy the file again from its source")
        raise ValueError(
            f"{names}: all {self.reasons.total()} rows were rejected ({_counted(self.reasons)}); "
            f"the first: {self.first_rejected}; correct the data or the data path"
        )


def iter_records(
    path: Path | str,
    *,
    split: str,
    format: str | None = None,
    check_images: bool = True,
    require_reasoning: bool = False,
    allow_unanswered: bool = False,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_rejected: Callable[[Rejected], object] | None = None,
    include: Callable[[Record], bool] | None = None,
) -> RecordStream:
    """The records of one split of a data set, one at a time and in file order.

    ``path``: a data file, or a folder that holds the split's files (``train``; ``validation``,
    ``val``, ``valid`` or ``dev``; ``test``; or as the format names them). ``format``: a name in
    ``LOADERS``, detected if ``None``. ``check_images``: reject rows whose image files are missing;
    the images themselves are not opened. ``require_reasoning``: reject rows without a trace to
    train on. ``allow_unanswered``: take questions of formats whose test parts have no gold answers
    (``answer`` is then ""). ``limit``: stop after that many records. ``options``: choices that the
    format offers, by name (``Loader.options``). ``on_rejected`` is called with every row that gave
    no record, ``include`` with every record, to say whether it is wanted. Records without a
    specialty get one by the rules of ``specialties.yaml``.

    Memory does not grow with the number of rows but for 60 bytes an id and the names of the image
    files. Rejected rows are counted; only the first is kept.

    Raises ``ValueError`` at the call for a path without the split and for an unknown format or
    option; while records are taken, for an id that occurs twice, a file that breaks off, and, at
    the end, when there was no row or every row was rejected.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a positive number or None")
    loader = _loader(path, format)
    chosen = loader.chosen(options or {})
    files = loader.files(path, split)
    memory: dict[str, Any] = {}

    def context(file: Path) -> RowContext:
        return RowContext(
            split,
            require_reasoning,
            ImageFinder(file, check=check_images, levels=loader.image_levels),
            file,
            files=tuple(files),
            options=chosen,
            allow_unanswered=allow_unanswered,
            memory=memory,
        )

    return RecordStream(
        loader, files, context, limit=limit, on_rejected=on_rejected, include=include
    )


def load_records(
    path: Path | str,
    *,
    split: str,
    format: str | None = None,
    check_images: bool = True,
    require_reasoning: bool = False,
    allow_unanswered: bool = False,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    include: Callable[[Record], bool] | None = None,
) -> LoadResult:
    """Load one split of a data set into memory; arguments and errors are those of
    ``iter_records``, errors of the data all raised here. Single bad rows end up in
    ``LoadResult.rejected``.
    """
    rejected: list[Rejected] = []
    stream = iter_records(
        path,
        split=split,
        format=format,
        check_images=check_images,
        require_reasoning=require_reasoning,
        allow_unanswered=allow_unanswered,
        limit=limit,
        options=options,
        on_rejected=rejected.append,
        include=include,
    )
    return LoadResult(list(stream), rejected, stream.format, stream.files, stream.specialty_rules)


def detect_format(path: Path | str) -> str:
    """Name of the format of a data file or folder, from its first rows. Raises ``ValueError`` when
    no loader, or more than one, knows them.
    """
    return detection.detect(Path(path), LOADERS)


def _loader(path: Path, format: str | None) -> Loader:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the data path")
    name = format or detect_format(path)
    if name not in LOADERS:
        raise ValueError(f"format {name!r} is unknown; use one of {', '.join(sorted(LOADERS))}")
    return LOADERS[name]


def _summary(files: list[Path], format: str, count: int, reasons: collections.Counter[str]) -> str:
    text = f"{_listed(files)} [{format}]: {count} records"
    if reasons:
        text += f", {reasons.total()} rejected ({_counted(reasons)})"
    return text


def _listed(files: Iterable[Path]) -> str:
    named = [str(file) for file in files]
    return ", ".join(named if len(named) <= 4 else [*named[:3], f"... ({len(named)} files)"])


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
