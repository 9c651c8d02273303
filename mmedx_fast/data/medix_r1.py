"""MediX-R1 (https://huggingface.co/datasets/MBZUAI/medix-rl-data): open questions whose gold answer
carries the imaging modality before it, ``<CT_SCAN>left lung``.

The tag goes to ``meta["modality"]``; the answer is the text after it.
"""

from __future__ import annotations

import re

from mmedx_fast.data.fields import (
    image_refs,
    left_over,
    no_reasoning,
    place_images,
    row_id,
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

_USED = ("image", "images", "problem", "solution", "specialty")
_SOLUTION = re.compile(r"\s*<([A-Z][A-Z0-9_/ -]*)>\s*(.*?)\s*", re.DOTALL)


def detect(row: Row) -> bool:
    """Whether a row has MediX-R1's columns and a modality tag before its solution."""
    return (
        {"problem", "solution"} <= row.keys()
        and bool({"image", "images"} & row.keys())
        and not {"question", "options"} & row.keys()
        and _SOLUTION.fullmatch(str(row["solution"])) is not None
    )


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "MediX-R1")
    solution = _SOLUTION.fullmatch(required_text(row, "solution"))
    if solution is None:
        raise RowError("solution", row["solution"], "solution does not begin with <MODALITY_TAG>")
    modality, answer = solution.groups()
    if not answer:
        raise RowError("solution", row["solution"], "solution has no answer after its tag")
    images = image_refs(row, context, "image", "images")
    question = place_images(required_text(row, "problem"), len(images), "problem", needed=False)
    if not question:
        raise RowError("problem", row["problem"], "question has no text")
    return Record(
        id=row_id("medix_r1", number, context),
        dataset="medix_r1",
        split=context.split,
        images=images,
        question=question,
        options=None,
        answer_label=None,
        answer=answer,
        answer_type=yesno_or_open(answer),
        specialty=specialty_field(row),
        meta={**left_over(row, _USED), "modality": modality},
    )


LOADER = Loader(
    name="medix_r1",
    columns="image, problem, solution (<MODALITY_TAG>answer)",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
