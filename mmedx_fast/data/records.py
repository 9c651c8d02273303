"""The one record that every loader emits, and the vocabulary the whole project shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

Specialty = Literal["adult_medicine", "pediatrics", "brain_senses", "oncology_surgery"]
SPECIALTIES: tuple[str, ...] = get_args(Specialty)
GUIDELINE_NAMES: tuple[str, ...] = ("differential", "intuitive", "analytic", "bayesian")

AnswerType = Literal["mcq", "yesno", "closed", "open"]

_new = object.__new__


class _InFolder:
    """The one thing that an image made by ``image_in`` knows: its folder and its name there."""

    __slots__ = ("_place",)
    _place: tuple[Path, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef(_InFolder):
    """Where an image lies; nothing is opened until ``mmedx_fast.data.images.load_image``.

    Exactly one is set: ``path`` (a file), ``data`` (encoded bytes), ``member`` (a zip file and the
    name inside it), ``span`` (a file, and offset and length in bytes of base64 text in it) or
    ``cell`` (a parquet file or saved data set, row from 0, column, position in the row's list or -1).
    """

    path: Path | None = None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    member: tuple[Path, str] | None = None
    span: tuple[Path, int, int] | None = None
    cell: tuple[Path, int, str, int] | None = None

    def __post_init__(self) -> None:
        sources = (self.path, self.data, self.member, self.span, self.cell)
        if sources.count(None) != len(sources) - 1:
            raise ValueError("an ImageRef needs exactly one of path, data, member, span and cell")

    if not TYPE_CHECKING:  # with it, mypy would take any attribute for one

        def __getattr__(self, name: str) -> Path | None:
            """What ``image_in`` left out, when it is first asked for."""
            if name not in _SOURCES:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            folder, image = self._place
            for source in _SOURCES:
                object.__setattr__(self, source, folder / image if source == "path" else None)
            return getattr(self, name)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        if self.member is not None:
            return f"{self.member[0]}!{self.member[1]}"
        if self.span is not None:
            return f"{self.span[0]}@{self.span[1]}+{self.span[2]}"
        if self.cell is not None:
            file, row, column, position = self.cell
            return f"{file}!{column}[{row}]" + (f"[{position}]" if position >= 0 else "")
        return f"<{len(self.data or b'')} bytes>"


_SOURCES = frozenset(field.name for field in dataclasses.fields(ImageRef))
_set_place: Callable[[ImageRef, tuple[Path, str]], None] = vars(_InFolder)["_place"].__set__


def image_in(folder: Path, name: str) -> ImageRef:
    """``ImageRef(path=folder / name)``; the path is put together when it is first asked for, which takes
    longer than all else about a row.
    """
    ref = _new(ImageRef)
    _set_place(ref, (folder, name))
    return ref


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One question, as every stage sees it.

    ``question`` is the stem alone (option text removed), ``options`` maps upper-case letters to option
    text in the order shown, ``answer`` is the gold option's text (or the free answer), and ``reasoning``
    maps a guideline name to its step-by-step trace (key ``""`` for a trace of no particular guideline).

    A ``msgspec.Struct``, for it is made in a third of a dataclass's time; a changed copy is
    ``msgspec.structs.replace(record, id="...")`` (``copy.replace`` from Python 3.13 on).
    """

    id: str
    dataset: str
    split: str
    images: tuple[ImageRef, ...]
    question: str
    options: dict[str, str] | None
    answer_label: str | None
    answer: str
    answer_type: AnswerType = "mcq"
    reasoning: dict[str, str] = msgspec.field(default_factory=dict)
    specialty: str | None = None
    meta: dict[str, Any] = msgspec.field(default_factory=dict)
