"""Any data set in the Hugging Face manner with columns ``image`` or ``images``, ``question``,
``answer`` and perhaps options: parquet shards, JSONL, or a folder that ``datasets`` saved.

Options are a column ``options`` or ``choices`` (list, object, or either as JSON text) or columns
named by single letters. With options the answer is a letter or an option's text; without, it is
free text. Sets with a format of their own are recognised before this one.
"""

from __future__ import annotations

import string
from typing import Any

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_or_text,
    listed_options,
    no_reasoning,
    place_images,
    row_id,
    yesno_or_open,
)
from mmedx_fast.data.huatuo import detect as is_huatuo
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.pathvqa import detect as is_pathvqa
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import (
    Loader,
    Row,
    RowContext,
    RowError,
    required_text,
    specialty_field,
)
from mmedx_fast.data.vqa_rad import detect as is_vqa_rad

_LETTERS = tuple(string.ascii_uppercase)
_USED = frozenset({"image", "images", "question", "answer", "options", "choices", "specialty"})
_OTHERS = frozenset(
    "problem solution conversations answer_label label reasoning q_lang phrase_type index".split()
)
"""Columns that mark a format of its own."""


def detect(row: Row) -> bool:
    """Whether a row has the columns and no format of its own."""
    return (
        {"question", "answer"} <= row.keys()
        and bool({"image", "images"} & row.keys())
        and not _OTHERS & row.keys()
        and not any(known(row) for known in (is_huatuo, is_vqa_rad, is_pathvqa))
    )


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "this format")
    images = image_refs(row, context, "images", "image")
    question = place_images(required_text(row, "question"), len(images), "question", needed=False)
    if not question:
        raise RowError("question", row["question"], "question has no text")
    options, answer = _options(row), answer_text(row)
    label = letter_or_text(options, answer) if options else None
    used = _USED | set(_LETTERS) if options else _USED
    return Record(
        id=row_id("huggingface", number, context),
        dataset="huggingface",
        split=context.split,
        images=images,
        question=question,
        options=options,
        answer_label=label,
        answer=options[label] if options and label else answer,
        answer_type="mcq" if options else yesno_or_open(answer),
        specialty=specialty_field(row),
        meta=left_over(row, used),
    )


def _options(row: Row) -> dict[str, str] | None:
    for field in ("options", "choices"):
        if row.get(field) is not None:
            return listed_options(row[field], field)
    columns: dict[str, Any] = {letter: row[letter] for letter in _LETTERS if letter in row}
    return listed_options(columns, "A-Z") if columns else None


LOADER = Loader(
    name="huggingface",
    columns="image or images, question, answer, options (optional)",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
