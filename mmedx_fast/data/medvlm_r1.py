"""MedVLM-R1's training file (``MRI_CT_XRAY_300each_dataset.json``): HuatuoGPT's evaluation rows with
the finished prompt (``problem``) and the gold letter (``solution``) beside the columns they are
made of.
"""

from __future__ import annotations

from pathlib import Path

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_or_text,
    listed_options,
    no_reasoning,
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

FILE = "MRI_CT_XRAY_300each_dataset.json"
_USED = ("image", "problem", "solution", "question", "options", "answer", "specialty")


def detect(row: Row) -> bool:
    """Whether a row has MedVLM-R1's columns."""
    return {"image", "problem", "solution", "question", "options", "answer"} <= row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "MedVLM-R1")
    options = listed_options(row.get("options"))
    if options is None:
        raise RowError("options", row.get("options"), "options are missing")
    label = label_field(row, "solution", options)
    if letter_or_text(options, answer_text(row)) != label:
        raise RowError("answer", row["answer"], "answer is not the text of the labelled option")
    return Record(
        id=row_id("medvlm_r1", number, context),
        dataset="medvlm_r1",
        split=context.split,
        images=image_refs(row, context, "image"),
        question=required_text(row, "question"),
        options=options,
        answer_label=label,
        answer=options[label],
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


def files(path: Path, split: str) -> list[Path]:
    """The published file is for training."""
    return hub_files(path, split, released=(FILE,) if split == "train" else ())


LOADER = Loader(
    name="medvlm_r1",
    columns="image, problem, solution, question, options, answer",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
)
