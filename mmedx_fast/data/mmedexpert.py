"""The project's own JSONL: questions with options, images and step-by-step traces, one object a
line.

    {"id", "specialty", "images": [paths relative to the file], "question", "options": {letter:
    text}, "answer_label", "answer", "reasoning", "paradigm", "source", "license"}

``reasoning`` is one trace (its guideline in ``paradigm``, or null) or an object {guideline: trace}.
Two more columns are optional: ``dataset`` (default "mmedexpert"; when it is there, ``id`` is taken
as it is) and ``answer_type``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from mmedx_fast.data.conclusion import concluded_option
from mmedx_fast.data.images import read_encoded
from mmedx_fast.data.records import (
    GUIDELINE_NAMES,
    AnswerType,
    ImageRef,
    Record,
    Specialty,
)
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
    text_field,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_USED = frozenset(
    "id dataset specialty images question options answer_label answer answer_type".split()
) | {"reasoning", "paradigm", "meta"}
_NOT_PLAIN = (ValueError, KeyError, RecursionError, msgspec.MsgspecError)
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"))


def detect(row: Row) -> bool:
    """Whether a row has this format's columns; OpenMedReason has ``image``, MedVLThinker its options
    as text.
    """
    own = {"question", "answer"} <= row.keys() and bool({"answer_label", "reasoning"} & row.keys())
    return own and "image" not in row and not isinstance(row.get("options"), str)


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    options = None if row.get("options") is None else clean_options(row["options"])
    label, answer = _answer(row, options)
    dataset = None if row.get("dataset") is None else text_field(row, "dataset", required=False)
    native = id_field(row)
    find = context.images.find
    return Record(
        id=native if dataset else f"mmedexpert:{native}",
        dataset=dataset or "mmedexpert",
        split=context.split,
        images=tuple([find(name) for name in _image_names(row)]),
        question=required_text(row, "question"),
        options=options,
        answer_label=label,
        answer=answer,
        answer_type=_answer_type(row, options),
        reasoning=_reasoning(
            row.get("reasoning"),
            text_field(row, "paradigm", required=False),
            options,
            label,
            required=context.require_reasoning,
        ),
        specialty=specialty_field(row),
        meta=_meta(row),
    )


_FINDINGS = ("findings", "finding")


class _Plain(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The columns that a row of this format has, with the types that they mostly have."""

    id: str
    dataset: str | None = None
    specialty: Specialty | None = None
    images: list[str] | None = None
    question: str
    options: dict[str, str]
    answer_label: str
    answer: str | None = None
    answer_type: Literal["mcq"] | None = None
    reasoning: str | dict[str, str] | None = None
    paradigm: str | None = None
    source: Any = msgspec.UNSET
    license: Any = msgspec.UNSET
    meta: dict[str, Any] | None = None


def plain(context: RowContext) -> PlainLine:
    """``Loader.plain``: what ``parse`` would clean or refuse is left to it."""
    decode = msgspec.json.Decoder(_Plain).decode
    find, split, required = context.images.usual, context.split, context.require_reasoning

    def read(line: bytes) -> Record | None:
        try:
            row = decode(line)
            native, question, options, label = row.id, row.question, row.options, row.answer_label
            answer, dataset, names = options[label], row.dataset, row.images
            if (
                not native
                or native.strip() != native
                or not question
                or question.strip() != question
                or not are_plain(options)
                or (row.answer != answer and row.answer is not None)
                or (dataset is not None and (not dataset or dataset.strip() != dataset))
                or (row.meta and not row.meta.keys().isdisjoint(_FINDINGS))
            ):
                return None
            reasoning: dict[str, str] = {}
            if required or row.reasoning is not None:
                paradigm = (row.paradigm or "").strip() or None
                reasoning = _reasoning(row.reasoning, paradigm, options, label, required=required)
            return Record(
                id=native if dataset else f"mmedexpert:{native}",
                dataset=dataset or "mmedexpert",
                split=split,
                images=find(names) if names else (),
                question=question,
                options=options,
                answer_label=label,
                answer=answer,
                reasoning=reasoning,
                specialty=row.specialty,
                meta=_plain_meta(row),
            )
        except _NOT_PLAIN:
            return None

    return read


def _plain_meta(row: _Plain) -> dict[str, Any]:
    meta = row.meta or {}
    if row.source is not msgspec.UNSET:
        meta["source"] = row.source
    if row.license is not msgspec.UNSET:
        meta["license"] = row.license
    return meta


def _answer(row: Row, options: dict[str, str] | None) -> tuple[str | None, str]:
    """Gold letter and text; they must agree. Without a letter the text must be exactly one
    option's.
    """
    text = text_field(row, "answer", required=options is None)
    if options is None:
        return None, text or ""
    if row.get("answer_label") is None:
        matches = [letter for letter, option in options.items() if option == text]
        if len(matches) != 1:
            raise RowError("answer", text, "answer is not among the options")
        return matches[0], options[matches[0]]
    label = label_field(row, "answer_label", options)
    if text is not None and text != options[label] and text.casefold() != options[label].casefold():
        # The row's answer may still carry the prefix or quotes that were cleaned off the options.
        raw = str(next(v for k, v in row["options"].items() if str(k).strip().upper() == label))
        if text != raw.strip():
            raise RowError("answer", text, "answer is not the text of the labelled option")
    return label, options[label]


def _answer_type(row: Row, options: dict[str, str] | None) -> AnswerType:
    default: AnswerType = "mcq" if options else "open"
    if row.get("answer_type") is None:
        return default
    kind = text_field(row, "answer_type", required=False) or default
    if kind not in get_args(AnswerType) or (kind == "mcq" and options is None):
        raise RowError("answer_type", kind, "answer_type is unknown, or mcq without options")
    return kind  # type: ignore[return-value]


def _image_names(row: Row) -> Sequence[str]:
    names = row.get("images")
    if names is None:
        return ()
    if not isinstance(names, list) or not all([isinstance(name, str) for name in names]):
        raise RowError("images", names, "images is not a list of file names")
    return names


def _meta(row: Row) -> dict[str, Any]:
    nested = row.get("meta") or {}
    if not isinstance(nested, dict):
        raise RowError("meta", nested, "meta is not an object")
    return {**nested, **{key: value for key, value in row.items() if key not in _USED}}


def _reasoning(
    raw: Any,
    paradigm: str | None,
    options: dict[str, str] | None,
    label: str | None,
    *,
    required: bool,
) -> dict[str, str]:
    if raw is None and not required:
        return {}
    if isinstance(raw, dict):
        if paradigm is not None:
            raise RowError("paradigm", paradigm, "paradigm is set although reasoning names its own")
        traces = raw
    else:
        blank = raw is None or (isinstance(raw, str) and not raw.strip())
        traces = {} if blank else {paradigm or "": raw}
    if required and not traces:
        raise RowError("reasoning", raw, "reasoning is empty and a trace is needed to train on")
    for guideline, trace in traces.items():
        if guideline and guideline not in GUIDELINE_NAMES:
            raise RowError("paradigm", guideline, f"guideline is not one of {GUIDELINE_NAMES}")
        check_trace(f"reasoning.{guideline}".rstrip("."), trace, options, label)
    return {guideline: trace.strip() for guideline, trace in traces.items()}


def check_trace(field: str, trace: Any, options: dict[str, str] | None, label: str | None) -> None:
    if not isinstance(trace, str) or not trace.strip():
        raise RowError(field, trace, "reasoning is empty or not text")
    for tag in TAGS:
        if tag in trace:
            raise RowError(field, trace, "reasoning contains a think or answer tag")
    if options is not None and concluded_option(trace, options) not in (None, label):
        raise RowError(field, trace[-200:], "reasoning ends on another option than the answer")


def write_mmedexpert(records: Iterable[Record], folder: Path, split: str) -> Path:
    """Write ``<folder>/<split>.jsonl`` and its images under ``<folder>/images/``; returns the
    JSONL's path.

    Images that already lie in ``folder`` are referred to where they are; all others are copied,
    encoded bytes unchanged. Each file is written under a temporary name and renamed, the JSONL
    last, so that a reader never sees half a split. Reading the split back gives the same records
    (image references then point into
    ``folder``). Raises ``ValueError`` for duplicate ids and for records that JSON cannot hold,
    ``ImageError`` for images that cannot be read.
    """
    folder = folder.resolve()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    target = folder / f"{split}.jsonl"
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    seen: set[str] = set()
    try:
        with part.open("w", encoding="utf-8", newline="\n") as out:
            for record in records:
                if record.id in seen:
                    raise ValueError(f"{target}: id {record.id!r} twice; ids must be unique")
                seen.add(record.id)
                out.write(_to_line(record, folder) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _to_line(record: Record, folder: Path) -> str:
    meta = dict(record.meta)
    top = {key: meta.pop(key) for key in ("source", "license") if isinstance(meta.get(key), str)}
    single = len(record.reasoning) == 1
    row = {
        "id": record.id,
        "dataset": record.dataset,
        "specialty": record.specialty,
        "images": [_store(record, i, ref, folder) for i, ref in enumerate(record.images)],
        "question": record.question,
        "options": record.options,
        "answer_label": record.answer_label,
        "answer": record.answer,
        "answer_type": record.answer_type,
        "reasoning": next(iter(record.reasoning.values())) if single else record.reasoning or None,
        "paradigm": (next(iter(record.reasoning)) or None) if single else None,
        **top,
        "meta": meta,
    }
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record {record.id!r} cannot be written as JSON ({error}); check its meta"
        ) from error


def _store(record: Record, index: int, ref: ImageRef, folder: Path) -> str:
    """The name of an image relative to ``folder``, copying it there if it lies elsewhere."""
    if ref.path is not None and ref.path.resolve().is_relative_to(folder):
        return ref.path.resolve().relative_to(folder).as_posix()
    encoded = read_encoded(ref)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", record.id).lstrip(".")
    if stem != record.id:  # "a/b" and "a b" must not share a file
        stem = f"{stem[:80]}-{hashlib.sha256(record.id.encode()).hexdigest()[:8]}"
    name = f"images/{stem}-{index}{_suffix(ref, encoded)}"
    part = folder / f"{name}.part{os.getpid()}"
    try:
        part.write_bytes(encoded)
        os.replace(part, folder / name)
    finally:
        part.unlink(missing_ok=True)
    return name


def _suffix(ref: ImageRef, encoded: bytes) -> str:
    if encoded[128:132] == b"DICM":
        return ".dcm"
    for magic, suffix in _MAGIC:
        if encoded.startswith(magic):
            return suffix
    name = str(ref.path or (ref.member or ("", ""))[1])
    return Path(name).suffix.lower()


LOADER = Loader(
    name="mmedexpert",
    columns="id, question, options, answer_label, answer, reasoning, images",
    detect=detect,
    parse=parse,
    files=split_files,
    rows=read_jsonl,
    plain=plain,
    suffixes=(".jsonl", ".json"),
)
