"""PubMedVision (https://huggingface.co/datasets/FreedomIntelligence/PubMedVision): conversations
about one or several figures, all open questions without options.

The training split is ``PubMedVision_Alignment_VQA.json`` and
``PubMedVision_InstructionTuning_VQA.json``, whichever are in the folder. There is no ``<image>``
token in the text; a few rows name images that were never published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedx_fast.data.fields import image_refs, left_over, no_reasoning, place_images
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import Loader, Row, RowContext, RowError, id_field, specialty_field

_FILES = ("PubMedVision_Alignment_VQA.json", "PubMedVision_InstructionTuning_VQA.json")
_USED = ("id", "image", "conversations", "specialty")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


def detect(row: Row) -> bool:
    """Whether a row has PubMedVision's columns."""
    return {"id", "image", "conversations"} <= row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "PubMedVision")
    question, answer = _turns(row.get("conversations"))
    images = image_refs(row, context, "image")
    if not images:
        raise RowError("image", row.get("image"), "row has no image")
    stem = place_images(question, len(images), "conversations", needed=False)
    if not stem:
        raise RowError("conversations", question, "question has no text")
    return Record(
        id=f"pubmedvision:{id_field(row)}",
        dataset="pubmedvision",
        split=context.split,
        images=images,
        question=stem,
        options=None,
        answer_label=None,
        answer=answer,
        answer_type="open",
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


def _turns(raw: Any) -> tuple[str, str]:
    """The one question and its answer."""
    if not isinstance(raw, list) or len(raw) < 2:
        raise RowError("conversations", raw, "conversations is not a list of two turns")
    if len(raw) > 2:
        raise RowError("conversations", len(raw), "conversation has more than one question")
    texts = []
    for turn, speakers in zip(raw, (_ASKS, _ANSWERS), strict=True):
        if not isinstance(turn, dict) or turn.get("from") not in speakers:
            raise RowError("conversations", turn, f"turn is not from {' or '.join(speakers)}")
        text = turn.get("value")
        if not isinstance(text, str) or not text.strip():
            raise RowError("conversations", text, "turn is empty or not text")
        texts.append(text.strip())
    return texts[0], texts[1]


def files(path: Path, split: str) -> list[Path]:
    """The published files make up the training split; there is no other."""
    return hub_files(path, split, released=_FILES if split == "train" else ())


LOADER = Loader(
    name="pubmedvision",
    columns="id, image, conversations, modality, body_part",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
)
