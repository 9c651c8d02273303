"""VQA-RAD in both public forms.

- Hub (https://huggingface.co/datasets/flaviagiammarino/vqa-rad): parquet with ``image``,
  ``question``, ``answer``. Closed are the answers yes and no. PathVQA and others have the same
  columns, so the form is recognised by a folder or file name with "vqa-rad" (or "vqa_rad") in it.
- OSF: "VQA_RAD Dataset Public.json" beside "VQA_RAD Image Folder". Test rows are those whose
  ``phrase_type`` starts with ``test_``; rows of the other split are counted as rejected. There is
  no validation split.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmedx_fast.data.fields import (
    answer_text,
    image_refs,
    is_yes_or_no,
    left_over,
    no_reasoning,
    row_id,
    yesno_or_open,
)
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import AnswerType, ImageRef, Record
from mmedx_fast.data.rows import (
    Loader,
    Row,
    RowContext,
    RowError,
    id_field,
    required_text,
    specialty_field,
    text_field,
)

OSF_FILE = "VQA_RAD Dataset Public.json"
_BARE = frozenset({"image", "question", "answer", "specialty"})
_USED = ("qid", "image_name", "question", "answer", "answer_type", "specialty")


def is_bare(row: Row, name: str) -> bool:
    """Whether a row has an image, a question, an answer and no more, from a file or folder whose
    name says (as the regular expression ``name``) which data set it is.
    """
    image = row.get("image")
    if not {"image", "question", "answer"} <= row.keys() <= _BARE:
        return False
    return isinstance(image, ImageRef) and bool(re.search(name, str(image), re.IGNORECASE))


def parse_bare(row: Row, number: int, context: RowContext, dataset: str) -> Record:
    """A row of image, question and answer alone to a record; raises ``RowError``."""
    no_reasoning(context, dataset)
    images = image_refs(row, context, "image")
    if not images:
        raise RowError("image", None, "image is null")
    answer = answer_text(row)
    return Record(
        id=row_id(dataset, number, context),
        dataset=dataset,
        split=context.split,
        images=images,
        question=required_text(row, "question"),
        options=None,
        answer_label=None,
        answer=answer,
        answer_type=yesno_or_open(answer),
        specialty=specialty_field(row),
        meta=left_over(row, ("image", "question", "answer", "specialty")),
    )


def detect(row: Row) -> bool:
    """Whether a row is of either form."""
    osf = {"phrase_type", "image_name", "question", "answer"} <= row.keys()
    return osf or is_bare(row, r"vqa[-_ ]?rad")


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    if "phrase_type" not in row:
        return parse_bare(row, number, context, "vqa_rad")
    no_reasoning(context, "VQA-RAD")
    split = "test" if required_text(row, "phrase_type").lower().startswith("test_") else "train"
    if split != context.split:
        raise RowError("phrase_type", row["phrase_type"], f"row is of the {split} split")
    answer = answer_text(row)
    return Record(
        id=f"vqa_rad:{id_field(row, 'qid')}",
        dataset="vqa_rad",
        split=split,
        images=(_image(required_text(row, "image_name"), context),),
        question=required_text(row, "question"),
        options=None,
        answer_label=None,
        answer=answer,
        answer_type=_answer_type(row, answer),
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


def _answer_type(row: Row, answer: str) -> AnswerType:
    """The column carries blanks in places, and both spellings of case."""
    kind = text_field(row, "answer_type", required=False)
    if kind is None:
        return yesno_or_open(answer)
    if kind.upper() not in ("OPEN", "CLOSED"):
        raise RowError("answer_type", kind, "answer_type is neither OPEN nor CLOSED")
    if kind.upper() == "OPEN":
        return "open"
    return "yesno" if is_yes_or_no(answer) else "closed"


def _image(name: str, context: RowContext) -> ImageRef:
    return context.images.find(name, "image_name", places=("VQA_RAD Image Folder", "images"))


def files(path: Path, split: str) -> list[Path]:
    """The split's parquet shards, or the one JSON of the OSF release, which holds both splits."""
    return hub_files(path, split, released=(OSF_FILE,) if split in ("train", "test") else ())


LOADER = Loader(
    name="vqa_rad",
    columns="image, question, answer (in a folder named vqa-rad), or qid, image_name, phrase_type",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
)
