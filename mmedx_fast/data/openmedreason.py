"""OpenMedReason (https://huggingface.co/datasets/neginb/OpenMedReason): one image, a question whose
last lines are its options, a tagged reasoning trace and the gold letter.
"""

from __future__ import annotations

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_or_text,
    place_images,
    row_id,
    split_option_lines,
)
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import (
    Loader,
    Row,
    RowContext,
    RowError,
    required_text,
    specialty_field,
)
from mmedx_fast.data.traces import tagless_trace

_USED = ("image", "question", "reasoning", "answer", "specialty")


def detect(row: Row) -> bool:
    """Whether a row has OpenMedReason's columns; MMedExpert and MedVLThinker have ``images``."""
    columns = {"image", "question", "reasoning", "answer"}
    return columns <= row.keys() and not {"options", "answer_label", "images"} & row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    images = image_refs(row, context, "image")
    text = place_images(required_text(row, "question"), len(images), "question", needed=False)
    stem, options = split_option_lines(text)
    if options is None:
        raise RowError("question", text[-200:], "question does not end with lines of options")
    if not stem:
        raise RowError("question", text[:200], "question has no text before its options")
    label = letter_or_text(options, answer_text(row))
    return Record(
        id=row_id("openmedreason", number, context),
        dataset="openmedreason",
        split=context.split,
        images=images,
        question=stem,
        options=options,
        answer_label=label,
        answer=options[label],
        reasoning=tagless_trace(row.get("reasoning"), options, label, context),
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


LOADER = Loader(
    name="openmedreason",
    columns="image, question (options as lines), reasoning, answer (letter)",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
