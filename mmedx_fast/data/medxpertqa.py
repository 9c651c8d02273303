"""MedXpertQA (https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA), subsets MM and Text, both
public spellings.

- Hub: ``options`` {letter: text}, ``label`` a letter, ``images`` a list of bare file names.
- GitHub evaluation input: ``options`` a list of {letter, content}, ``label`` a list of letters,
  ``images`` a list of {image_path}.

Every published stem repeats its options after "Answer Choices:"; that part is cut off.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mmedx_fast.data.records import SPECIALTIES, Record
from mmedx_fast.data.rows import (
    Loader,
    PlainLine,
    Row,
    RowContext,
    RowError,
    are_plain,
    clean_options,
    id_field,
    label_field,
    read_jsonl,
    required_text,
    specialty_field,
    split_files,
)

_CHOICES = "Answer Choices:"
_USED = ("id", "question", "options", "label", "images", "specialty")
_NOT_PLAIN = (ValueError, KeyError, RecursionError, msgspec.MsgspecError)


def detect(row: Row) -> bool:
    """Whether a row has MedXpertQA's columns; MMedExpert says ``answer_label`` instead of
    ``label``.
    """
    return {"id", "question", "options", "label"} <= row.keys() and "answer_label" not in row


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    if context.require_reasoning:
        raise RowError("reasoning", None, "MedXpertQA has no reasoning traces to train on")
    options = clean_options(_options(row.get("options")))
    label = label_field({"label": _single(row.get("label"))}, "label", options)
    stem = strip_choices(required_text(row, "question"))
    return Record(
        id=f"medxpertqa:{id_field(row)}",
        dataset="medxpertqa",
        split=context.split,
        images=tuple(context.images.find(name) for name in _image_names(row.get("images"))),
        question=stem,
        options=options,
        answer_label=label,
        answer=options[label],
        specialty=specialty_field(row),
        meta={key: value for key, value in row.items() if key not in _USED},
    )


class _Plain(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The columns of a row as on the hub."""

    id: str
    question: str
    options: dict[str, str]
    label: str
    images: list[str] | None = None
    specialty: str | None = None
    medical_task: Any = msgspec.UNSET
    body_system: Any = msgspec.UNSET
    question_type: Any = msgspec.UNSET


def plain(context: RowContext) -> PlainLine:
    """``Loader.plain``: what ``parse`` would clean or refuse is left to it."""
    decode = msgspec.json.Decoder(_Plain).decode
    find, split, required = context.images.usual, context.split, context.require_reasoning

    def read(line: bytes) -> Record | None:
        try:
            row = decode(line)
            native, question, options, specialty = row.id, row.question, row.options, row.specialty
            if (
                required
                or not native
                or native.strip() != native
                or not (stem := strip_choices(question.strip()))
                or not are_plain(options)
                or (specialty is not None and specialty not in SPECIALTIES)
            ):
                return None
            return Record(
                id=f"medxpertqa:{native}",
                dataset="medxpertqa",
                split=split,
                images=find(row.images) if row.images else (),
                question=stem,
                options=options,
                answer_label=row.label,
                answer=options[row.label],
                specialty=specialty,
                meta=_plain_meta(row),
            )
        except _NOT_PLAIN:
            return None

    return read


def _plain_meta(row: _Plain) -> dict[str, Any]:
    columns = {
        "medical_task": row.medical_task,
        "body_system": row.body_system,
        "question_type": row.question_type,
    }
    if msgspec.UNSET in columns.values():
        return {name: value for name, value in columns.items() if value is not msgspec.UNSET}
    return columns


def strip_choices(question: str) -> str:
    """The stem before its last "Answer Choices:" that begins a line."""
    at = len(question)
    while (at := question.rfind(_CHOICES, 0, at)) >= 0:
        stem = question[:at].rstrip()
        if not stem:
            raise RowError("question", question, "question has no text before its options")
        if "\n" in question[len(stem) : at]:
            return stem.lstrip()
    return question


def _options(raw: Any) -> Any:
    if not isinstance(raw, list):
        return raw
    options: dict[str, Any] = {}
    for item in raw:
        if not isinstance(item, dict) or "letter" not in item or "content" not in item:
            raise RowError("options", item, "option is not an object with letter and content")
        if str(item["letter"]) in options:
            raise RowError("options", item, "option letter is not one letter, or twice there")
        options[str(item["letter"])] = item["content"]
    return options


def _single(label: Any) -> Any:
    if not isinstance(label, list):
        return label
    if len(label) != 1:
        raise RowError("label", label, "not exactly one gold letter")
    return label[0]


def _image_names(raw: Any) -> list[str]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise RowError("images", raw, "images is not a list")
    names = []
    for item in raw:
        name = item.get("image_path") if isinstance(item, dict) else item
        if not isinstance(name, str):
            raise RowError("images", raw, "image is not a file name")
        names.append(name)
    return names


LOADER = Loader(
    name="medxpertqa",
    columns="id, question, options, label, images",
    detect=detect,
    parse=parse,
    files=split_files,
    rows=read_jsonl,
    plain=plain,
    suffixes=(".jsonl", ".json"),
)
