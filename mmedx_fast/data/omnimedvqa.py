"""OmniMedVQA (https://huggingface.co/datasets/foreverbeliever/OmniMedVQA): JSON lists of questions.

    Images/<source>/...
    QA_information/Open-access/<source>.json
    QA_information/Restricted-access/<source>.json     (its images are not in the release)

A row: ``dataset`` (the source), ``question_id, question_type, question, gt_answer`` (text),
``image_path`` (from the root), ``option_A`` to ``option_D`` of which two may be absent, null or "", and
``modality_type`` (``modality`` in some rows). There are no splits: everything is test data.
``meta`` keeps ``dataset``, ``question_type``, ``modality_type`` and what else there is, and says
``access`` (open or restricted).

The gold letter is that of the only option with the gold text. Two options with that text have no right
letter; such rows, and rows whose gold text is no option, are rejected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedx_fast.data.json_array import read_json
from mmedx_fast.data.records import ImageRef, Record
from mmedx_fast.data.rows import (
    Loader,
    Row,
    RowContext,
    RowError,
    id_field,
    no_split_file,
    required_text,
    specialty_field,
    text_field,
)

OPTION_FIELDS = {letter: f"option_{letter}" for letter in "ABCD"}
_USED = frozenset(
    ("question_id", "question", "gt_answer", "image_path", "modality", "specialty")
) | {*OPTION_FIELDS.values()}
_RESTRICTED = "Restricted-access"


def detect(row: Row) -> bool:
    """Whether a row has OmniMedVQA's columns."""
    return {"question_id", "question", "gt_answer", "image_path", "option_A"} <= row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    if context.require_reasoning:
        raise RowError("reasoning", None, "OmniMedVQA has no reasoning traces to train on")
    options = _options(row)
    label = _label(required_text(row, "gt_answer"), options)
    restricted = context.file.parent.name == _RESTRICTED
    return Record(
        id=f"omnimedvqa:{id_field(row, 'question_id')}",
        dataset="omnimedvqa",
        split=context.split,
        images=(_image(required_text(row, "image_path"), context, restricted),),
        question=required_text(row, "question"),
        options=options,
        answer_label=label,
        answer=options[label],
        specialty=specialty_field(row),
        meta=_meta(row, restricted),
    )


def _options(row: Row) -> dict[str, str]:
    options = {
        letter: text
        for letter, field in OPTION_FIELDS.items()
        if (text := text_field(row, field, required=False)) is not None
    }
    if len(options) < 2:
        raise RowError("option_B", row.get("option_B"), "fewer than two options")
    return options


def _label(gold: str, options: dict[str, str]) -> str:
    """The letter of the gold text, as written or, if that is no option, but for case, blanks and a
    full stop.
    """
    for same in (str.strip, _loosely):
        found = [letter for letter, text in options.items() if same(text) == same(gold)]
        if len(found) > 1:
            raise RowError("gt_answer", gold, "two options have the gold text")
        if found:
            return found[0]
    raise RowError("gt_answer", gold, "answer is not among the options")


def _loosely(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def _image(name: str, context: RowContext, restricted: bool) -> ImageRef:
    # By its whole path only: many sources have a file of the same last name.
    try:
        return context.images.find(name, "image_path", exact=True)
    except RowError as error:
        if not restricted:
            raise
        raise RowError(
            error.field,
            error.value,
            "image of a restricted source; get it from the source's owners",
        ) from None


def _meta(row: Row, restricted: bool) -> dict[str, Any]:
    meta = {key: value for key, value in row.items() if key not in _USED}
    if "modality_type" not in meta and "modality" in row:
        meta["modality_type"] = row["modality"]
    return {**meta, "access": "restricted" if restricted else "open"}


def files(path: Path, split: str) -> list[Path]:
    """The files of sources under the release's root, ``QA_information`` or one of its folders, open
    ones first; or ``path`` itself. Raises ``ValueError`` when there are none, and for another split than
    "test" of a folder.
    """
    if path.is_file():
        return [path]
    folders = [
        folder / access
        for folder in (path / "QA_information", path)
        for access in ("Open-access", _RESTRICTED)
    ]
    if path.name in ("Open-access", _RESTRICTED):
        folders.append(path)
    found = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    if found and split != "test":
        raise ValueError(
            f"{path}: OmniMedVQA has no split {split!r}, all of it is test data; "
            "give single files if they are meant"
        )
    if not found:
        wanted = ("QA_information/Open-access/*.json", f"{_RESTRICTED}/*.json")
        raise no_split_file(path, split, wanted, (".json",))
    return found


LOADER = Loader(
    name="omnimedvqa",
    columns="question_id, question, gt_answer, image_path, option_A, option_B, dataset, modality_type",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_json,
    image_levels=2,
    suffixes=(".json",),
)
