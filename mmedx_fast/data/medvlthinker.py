"""MedVLThinker's hub sets (parquet or JSONL): ``images``, ``question``, ``options`` as JSON text,
``answer_label``, ``answer``, sometimes ``reasoning``, and ``misc`` as JSON text.

What ``misc`` holds becomes ``meta`` of its own, since the columns of the original set are in it.
"""

from __future__ import annotations

import json
from typing import Any

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_or_text,
    listed_options,
    place_images,
    row_id,
)
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import (
    Loader,
    Row,
    RowContext,
    RowError,
    label_field,
    required_text,
    specialty_field,
)
from mmedx_fast.data.traces import tagless_trace

_USED = (
    "images",
    "question",
    "options",
    "answer_label",
    "answer",
    "reasoning",
    "misc",
    "specialty",
)


def detect(row: Row) -> bool:
    """Whether a row has MedVLThinker's columns, its options as text."""
    columns = {"images", "question", "options", "answer_label", "answer"}
    return columns <= row.keys() and isinstance(row["options"], str)


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    options = listed_options(row.get("options"))
    if options is None:
        raise RowError("options", row.get("options"), "options are missing")
    label = label_field(row, "answer_label", options)
    if row.get("answer") is not None and letter_or_text(options, answer_text(row)) != label:
        raise RowError("answer", row["answer"], "answer is not the text of the labelled option")
    images = image_refs(row, context, "images")
    question = place_images(required_text(row, "question"), len(images), "question", needed=False)
    if not question:
        raise RowError("question", row["question"], "question has no text")
    return Record(
        id=row_id("medvlthinker", number, context),
        dataset="medvlthinker",
        split=context.split,
        images=images,
        question=question,
        options=options,
        answer_label=label,
        answer=options[label],
        reasoning=tagless_trace(row.get("reasoning"), options, label, context),
        specialty=specialty_field(row),
        meta={**_misc(row.get("misc")), **left_over(row, _USED)},
    )


def _misc(raw: Any) -> dict[str, Any]:
    if raw is None or raw == "":
        return {}
    try:
        misc = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        raise RowError("misc", raw, "misc is text but not JSON") from None
    if misc is None:
        return {}
    if not isinstance(misc, dict):
        raise RowError("misc", raw, "misc is not an object")
    return misc


LOADER = Loader(
    name="medvlthinker",
    columns="images, question, options (JSON text), answer_label, answer, reasoning, misc",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
