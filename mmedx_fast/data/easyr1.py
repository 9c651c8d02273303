"""EasyR1's generic format (parquet, JSON, JSONL): ``problem`` with one ``<image>`` token per image,
``images``, ``answer``.

Options that are the problem's last lines ("A. ...") make it multiple choice; everything else is an
open or yes/no question.
"""

from __future__ import annotations

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_or_text,
    no_reasoning,
    place_images,
    row_id,
    split_option_lines,
    yesno_or_open,
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

_USED = ("problem", "image", "images", "answer", "specialty")


def detect(row: Row) -> bool:
    """Whether a row has EasyR1's columns."""
    return {"problem", "answer"} <= row.keys() and not {"solution", "question"} & row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``, also when tokens and images are not as many."""
    no_reasoning(context, "EasyR1's format")
    images = image_refs(row, context, "images", "image")
    text = place_images(required_text(row, "problem"), len(images), "problem", needed=True)
    stem, options = split_option_lines(text)
    if not stem:
        raise RowError("problem", row["problem"], "question has no text")
    answer = answer_text(row)
    label = letter_or_text(options, answer) if options else None
    return Record(
        id=row_id("easyr1", number, context),
        dataset="easyr1",
        split=context.split,
        images=images,
        question=stem,
        options=options,
        answer_label=label,
        answer=options[label] if options and label else answer,
        answer_type="mcq" if options else yesno_or_open(answer),
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


LOADER = Loader(
    name="easyr1",
    columns="problem (with <image> tokens), images, answer",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
