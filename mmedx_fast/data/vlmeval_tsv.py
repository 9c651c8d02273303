"""Benchmarks as VLMEvalKit's TSV files, GMAI-MMBench among them, read without holding their images.

Columns (case ignored but for the option letters): ``index, question, A, B, ... , answer`` and

- ``image``: base64; or a list of base64, written as text; or, up to 64 characters, the ``index`` of
  the row that holds the image, before or after, in any part of the split;
- or ``image_path``: a file name or a list of them.

An option that is empty, NaN or "None" is absent. Without option columns the question is open, or
yes/no. ``hint`` goes before the question. An image becomes an ``ImageRef.span``: its place in the TSV.

GMAI-MMBench (known by its columns) becomes the data set "gmai", any other "vlmeval"; the file's name
is ``meta["source_file"]``. ``category``, which in GMAI-MMBench spells the gold answer, is kept as
``meta["gold_category"]``: nothing that goes into a prompt may read it. Its TEST parts have no ``answer``
column and are only loaded with ``allow_unanswered``; the published scores are on VAL.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedx_fast.data.medxpertqa import strip_choices
from mmedx_fast.data.records import AnswerType, ImageRef, Record
from mmedx_fast.data.rows import (
    SPLIT_NAMES,
    Loader,
    Row,
    RowContext,
    RowError,
    SeveralFiles,
    clean_options,
    data_files,
    no_split_file,
    required_text,
    specialty_field,
    text_field,
)
from mmedx_fast.data.tables import Cell, read_table

MAX_REFERENCE = 64
"""An image field of up to that many characters is the index of another row."""

_GMAI = {"department", "modality", "perceptual granularity"}
_ABSENT = ("", "nan", "None")
_LETTERS = frozenset(string.ascii_uppercase)
_USED = (
    _LETTERS
    | {"index", "image", "image_path", "question", "hint", "answer", "category"}
    | {"specialty"}
)
_BASE64 = (string.ascii_letters + string.digits + "+/=").encode() + b" \t\r\n"
_ITEM = re.compile(rb"""[^'"\[\],\s]+""")
_PART = re.compile(r"_part_?(\d+)$", re.IGNORECASE)


def detect(row: Row) -> bool:
    """Whether a row has the columns of a VLMEvalKit TSV."""
    return {"index", "question"} <= row.keys() and bool(
        {"image", "image_path", "answer"} & row.keys()
    )


def rows(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Rows of a TSV; ``image`` is a ``Cell``."""
    return read_table(file, delimiter=b"\t", lazy=("image",), rename=_rename)


def _rename(name: str) -> str:
    name = name.strip()
    return name if name in _LETTERS else name.lower()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    if context.require_reasoning:
        raise RowError("reasoning", None, "a VLMEvalKit TSV has no reasoning traces to train on")
    index = _index(row.get("index"))
    options = _options(row)
    label, answer = _answer(row, options, context.allow_unanswered)
    dataset = "gmai" if row.keys() >= _GMAI else "vlmeval"
    stem = _PART.sub("", context.file.stem)
    return Record(
        id=f"{dataset}:{stem}:{index}",
        dataset=dataset,
        split=context.split,
        images=_images(row, context),
        question=_question(row, options),
        options=options,
        answer_label=label,
        answer=answer,
        answer_type=_answer_type(options, answer),
        specialty=specialty_field(row),
        meta=_meta(row, context.file.stem),
    )


def _index(value: Any) -> str:
    """A row's index; whole numbers in one spelling, as references to them may say 7 or 7.0."""
    text = required_text({"index": value}, "index")
    whole = re.fullmatch(r"0*(\d{1,18})(\.0*)?", text, re.ASCII)
    return whole[1] if whole else text


def _options(row: Row) -> dict[str, str] | None:
    """The options that are there, or ``None`` for a question without any."""
    given: dict[str, str] = {}
    for letter in string.ascii_uppercase:
        text = text_field(row, letter, required=False)
        if text is not None and not _absent(text):
            given[letter] = text
    return clean_options(given, "A") if given else None


def _absent(text: str) -> bool:
    return text in _ABSENT or text.lower() == "nan"


def _answer(
    row: Row, options: dict[str, str] | None, allow_unanswered: bool
) -> tuple[str | None, str]:
    """Gold letter and text: the answer is a letter, or one option's text."""
    text = text_field(row, "answer", required=False)
    if text is None or _absent(text):
        if allow_unanswered:
            return None, ""
        if "answer" not in row:
            raise RowError(
                "answer",
                None,
                "no answer column: a test part without gold answers cannot be scored",
            )
        raise RowError("answer", row["answer"], "answer is missing or empty")
    if options is None:
        return None, text
    label = text.upper()
    if label not in options:
        same = [k for k, option in options.items() if option.casefold() == text.casefold()]
        if len(same) != 1:
            raise RowError("answer", text, "answer is not among the options")
        label = same[0]
    return label, options[label]


def _answer_type(options: dict[str, str] | None, answer: str) -> AnswerType:
    if options is not None:
        return "mcq"
    return "yesno" if answer.casefold() in ("yes", "no") else "open"


def _question(row: Row, options: dict[str, str] | None) -> str:
    question = required_text(row, "question")
    if options is not None:
        question = strip_choices(question)
    hint = text_field(row, "hint", required=False)
    return question if hint is None or _absent(hint) else f"{hint}\n{question}"


def _meta(row: Row, stem: str) -> dict[str, Any]:
    meta = {key: value for key, value in row.items() if key not in _USED}
    if "category" in row:
        meta["gold_category"] = row["category"]
    return {**meta, "source_file": stem}


# ---- images


def _images(row: Row, context: RowContext) -> tuple[ImageRef, ...]:
    if "image" in row:
        return _stored_images(row["image"], context)
    if "image_path" in row:
        names = _names(required_text(row, "image_path"))
        return tuple(context.images.find(name, "image_path") for name in names)
    return ()


def _stored_images(cell: Any, context: RowContext) -> tuple[ImageRef, ...]:
    if not isinstance(cell, Cell):
        raise RowError("image", cell, "image is not a field of a TSV file")
    text = cell.raw.strip()
    if not text or _absent(text.decode("utf-8", "replace")):
        raise RowError("image", text, "image is missing or empty")
    if len(text) > MAX_REFERENCE:
        return _spans(cell)
    index = _index(text.decode("utf-8", "replace"))
    found = _ImageIndex.of(context).find(index)
    if found is None:
        raise RowError("image", text, "image is the index of no row that holds an image")
    return found


def _spans(cell: Cell) -> tuple[ImageRef, ...]:
    """The places of the images in a field: the whole field, or the items of a list."""
    raw = cell.raw
    listed = raw.strip().startswith(b"[")
    if listed and not raw.strip().endswith(b"]"):
        raise RowError("image", raw[:80], "list of images is cut off")
    # Without the head of a data URI, whose comma and blanks are no base64.
    start = raw.find(b",") + 1 if raw.lstrip().startswith(b"data:") else 0
    places = (
        [item.span() for item in _ITEM.finditer(raw) if not item[0].startswith(b"data:")]
        if listed
        else [(start, len(raw))]
    )
    for begin, end in places:
        item = raw[begin:end]
        if len(item) <= MAX_REFERENCE or item.translate(None, _BASE64):
            raise RowError("image", item[:80], "image is not base64")
    return tuple(
        ImageRef(span=(cell.file, cell.offset + begin, end - begin)) for begin, end in places
    )


class _ImageIndex:
    """Where the images of a split's rows lie, by index: read as far as references ask for, beginning
    with the file that has the first one.
    """

    def __init__(self, context: RowContext) -> None:
        self._found: dict[str, tuple[ImageRef, ...]] = {}
        self._rest = self._scan((context.file, *(f for f in context.files if f != context.file)))

    @classmethod
    def of(cls, context: RowContext) -> _ImageIndex:
        if "images" not in context.memory:
            context.memory["images"] = cls(context)
        return context.memory["images"]

    def find(self, index: str) -> tuple[ImageRef, ...] | None:
        while index not in self._found:
            entry = next(self._rest, None)
            if entry is None:
                return None
            self._found.setdefault(*entry)
        return self._found[index]

    @staticmethod
    def _scan(files: tuple[Path, ...]) -> Iterator[tuple[str, tuple[ImageRef, ...]]]:
        for file in files:
            for _, row in rows(file):
                cell = row.get("image") if isinstance(row, dict) else None
                if isinstance(cell, Cell) and len(cell.raw.strip()) > MAX_REFERENCE:
                    try:
                        yield _index(row.get("index")), _spans(cell)  # type: ignore[union-attr]
                    except RowError:
                        continue


def _names(text: str) -> list[str]:
    """The file names of an ``image_path`` field: itself, or the items of a list."""
    if not text.startswith("["):
        return [text]
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RowError("image_path", text, "image_path is not a list of file names")
    return names


# ---- files


def files(path: Path, split: str) -> list[Path]:
    """The TSVs of a split: ``path`` itself, or those of a folder whose name ends in one of the split's
    names (``..._VAL.tsv``, ``..._TEST_part_1.tsv``, in the order of their numbers); a file that names
    no split is test data. Raises ``ValueError`` when there is none, when a part is missing, and
    ``SeveralFiles`` when there is more than one data set.
    """
    if path.is_file():
        return [path]
    names = SPLIT_NAMES.get(split, (split,))
    found: dict[str, dict[int, Path]] = {}
    for file in data_files(path, (".tsv",)) if path.is_dir() else ():
        part = _PART.search(file.stem)
        stem = file.stem[: part.start()] if part else file.stem
        if _split_of(stem) in names:
            found.setdefault(f"{file.parent}/{stem}", {})[int(part[1]) if part else 0] = file
    if not found:
        raise no_split_file(path, split, (f"*_{name}.tsv" for name in names), (".tsv",))
    if len(found) > 1 or (len(next(iter(found.values()))) > 1 and 0 in next(iter(found.values()))):
        several = [file for parts in found.values() for file in parts.values()]
        raise SeveralFiles(
            f"{path}: several data sets for split {split!r} "
            f"({', '.join(str(file.relative_to(path)) for file in several[:10])}); "
            "give the file meant",
            several,
        )
    return _in_order(path, next(iter(found.values())))


def _split_of(stem: str) -> str:
    last = re.split(r"[_\-.]", stem.lower())[-1]
    known = {name for names in SPLIT_NAMES.values() for name in names}
    return last if last in known else "test"


def _in_order(path: Path, parts: dict[int, Path]) -> list[Path]:
    numbers = sorted(parts)
    missing = sorted(set(range(numbers[0] if numbers[0] == 0 else 1, numbers[-1])) - set(numbers))
    if missing:
        raise ValueError(
            f"{path}: {parts[numbers[0]].name} and others: part {missing[0]} is missing; "
            "fetch it, or give single files"
        )
    return [parts[number] for number in numbers]


LOADER = Loader(
    name="vlmeval_tsv",
    columns="index, image or image_path, question, A, B, ..., answer",
    detect=detect,
    parse=parse,
    files=files,
    rows=rows,
    suffixes=(".tsv",),
)
