"""PMC-VQA (https://huggingface.co/datasets/RadGenome/PMC-VQA), CSV, both published versions.

- Version 1 (``train.csv``, ``test.csv``, ``test_clean.csv``): ``Figure_path, Question, Answer, Choice A``
  to ``Choice D, Answer_label``; ``Answer`` is text, older revisions spell it ``Anwser``. Figures lie in
  ``images/`` or ``images.zip``.
- Version 2 (``train_2.csv``, ``test_2.csv``): ``index, Figure_path, Caption, Question, Choice A`` to
  ``Choice D, Answer, split``, with or without that header; ``Answer`` is the letter. Figures lie in
  ``figures/`` or ``images_2.zip``.

Which test is scored matters: MedEvalKit takes ``test_2``, most others the 2,000 questions of
``test_clean``. A folder that has several must be asked for one of them by that name.

``meta`` has ``version`` ("1" or "2"), ``file`` (the CSV's name without ending) and the columns not
used elsewhere. An id is the file's name and the line where the row begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import (
    SPLIT_NAMES,
    Loader,
    Row,
    RowContext,
    RowError,
    SeveralFiles,
    no_split_file,
    required_text,
    specialty_field,
)
from mmedx_fast.data.tables import read_table

LETTERS = "ABCD"
CHOICES = tuple(f"Choice {letter}" for letter in LETTERS)
_VERSION_2 = ("index", "Figure_path", "Caption", "Question", *CHOICES, "Answer", "split")
_RENAMED = {"": "index", "Unnamed: 0": "index", "Anwser": "Answer"}
_USED = frozenset(("Figure_path", "Question", "Answer", "Answer_label", "specialty", *CHOICES))
_PREFIX = re.compile(r"([A-Za-z])\s*:")
_NO_TEXT = " \t\r\n\xa0\u200a\"'"


def detect(row: Row) -> bool:
    """Whether a row has PMC-VQA's columns."""
    return {"Figure_path", "Question", "Answer", *CHOICES} <= row.keys()


def rows(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Rows of one of the CSV files, named as above, with or without header."""
    return read_table(file, delimiter=b",", rename=_rename, headless=_headless)


def _rename(name: str) -> str:
    return _RENAMED.get(name.strip(), name.strip())


def _headless(first: list[str]) -> tuple[str, ...] | None:
    """The columns of version 2, if the first row is one of its questions."""
    if len(first) == len(_VERSION_2) and "Figure_path" not in map(_rename, first):
        letter = _clean(first[_VERSION_2.index("Answer")]).upper()
        if letter and letter in LETTERS:
            return _VERSION_2
    return None


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    if context.require_reasoning:
        raise RowError("reasoning", None, "PMC-VQA has no reasoning traces to train on")
    first = "Answer_label" in row
    options = {letter: _option(row, letter) for letter in LETTERS}
    label = _clean(required_text(row, "Answer_label" if first else "Answer")).upper()
    if label not in options:
        raise RowError(
            "Answer_label" if first else "Answer", label, "answer is not among the options"
        )
    if first:
        _check_text(required_text(row, "Answer"), label, options[label])
    stem = context.file.stem
    places = ("images", "figures") if first else ("figures", "images")
    name = required_text(row, "Figure_path")
    rest = {key: value for key, value in row.items() if key not in _USED}
    return Record(
        id=f"pmc_vqa:{stem}:{number}",
        dataset="pmc_vqa",
        split=context.split,
        images=(context.images.find(name, "Figure_path", places=places),),
        question=_question(row),
        options=options,
        answer_label=label,
        answer=options[label],
        specialty=specialty_field(row),
        meta={**rest, "version": "1" if first else "2", "file": stem},
    )


def _clean(text: str) -> str:
    """Without the blanks and quotes around it, those of typesetting too."""
    return text.strip(_NO_TEXT)


def _question(row: Row) -> str:
    question = required_text(row, "Question").replace("\xa0", " ").replace("\u200a", " ").strip()
    if not question:
        raise RowError("Question", row["Question"], "Question is missing or empty")
    return question


def _option(row: Row, letter: str) -> str:
    """The text of an option without its prefix, which must name the column it stands in."""
    field = f"Choice {letter}"
    text = _clean(required_text(row, field).replace("\xa0", " ").replace("\u200a", " "))
    prefix = _PREFIX.match(text)
    if prefix is not None:
        if prefix[1].upper() != letter:
            raise RowError(field, text, "option's prefix is another letter than its column")
        text = _clean(text[prefix.end() :])
    if not text:
        raise RowError(field, row[field], "option text is missing or empty")
    return text


def _check_text(answer: str, label: str, option: str) -> None:
    text = _clean(answer.replace("\xa0", " ").replace("\u200a", " "))
    for spelling in (text, _clean(text.removeprefix(f"{label}:"))):
        if spelling.casefold().split() == option.casefold().split():
            return
    raise RowError("Answer", answer, "answer is not the text of the labelled option")


def files(path: Path, split: str) -> list[Path]:
    """The CSV of a split: ``path`` itself, ``<split>.csv`` (``test_2``, ``test_clean``), or for a plain
    name (``test``) the only one that begins with it. Raises ``ValueError`` when there is none, or several
    to choose from.
    """
    if path.is_file():
        return [path]
    names = SPLIT_NAMES.get(split, (split,))
    wanted = [f"{name}.csv" for name in names]
    if split in SPLIT_NAMES:
        wanted += [f"{name}{version}.csv" for name in names for version in ("_2", "_clean")]
    for folder in (path, path / "data"):
        found = [folder / name for name in wanted if (folder / name).is_file()]
        if len(found) > 1:
            listed = ", ".join(file.stem for file in found)
            raise SeveralFiles(
                f"{folder}: split {split!r} may be {listed}; they are different questions, and "
                f"scores on them do not compare; ask for split {found[-1].stem!r} or give the file",
                found,
            )
        if found:
            return found
    raise no_split_file(path, split, wanted, (".csv",))


LOADER = Loader(
    name="pmc_vqa",
    columns="Figure_path, Question, Choice A, ..., Choice D, Answer[, Answer_label]",
    detect=detect,
    parse=parse,
    files=files,
    rows=rows,
    suffixes=(".csv",),
)
