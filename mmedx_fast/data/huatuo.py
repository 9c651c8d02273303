"""HuatuoGPT-Vision's evaluation bundle
(https://huggingface.co/datasets/FreedomIntelligence/Medical_Multimodal_Evaluation_Data): multiple
choice from several benchmarks in one file, the gold answer as text.

``dataset`` and ``subset`` (for OmniMedVQA the modality) stay in ``meta``.
"""

from __future__ import annotations

from pathlib import Path

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    left_over,
    letter_of_text,
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
    required_text,
    specialty_field,
)

FILE = "medical_multimodel_evaluation_data.json"  # so spelled
_USED = ("image", "question", "options", "answer", "specialty")


def detect(row: Row) -> bool:
    """Whether a row has the bundle's columns; MedVLM-R1 adds ``problem`` to them."""
    return (
        {"image", "question", "options", "answer", "dataset"} <= row.keys()
        and not {"problem", "answer_label"} & row.keys()
        and isinstance(row["options"], list)
    )


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "HuatuoGPT's evaluation data")
    options = listed_options(row.get("options"))
    if options is None:
        raise RowError("options", row.get("options"), "options are missing")
    label = letter_of_text(options, answer_text(row))
    return Record(
        id=row_id("huatuo", number, context),
        dataset="huatuo",
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
    """The bundle is a test set in one file."""
    return hub_files(path, split, released=(FILE,) if split == "test" else ())


LOADER = Loader(
    name="huatuo",
    columns="image, question, options (list), answer (text), dataset, subset",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
)
