"""SLAKE (https://huggingface.co/datasets/BoKelvin/SLAKE): train.json, validation.json (also
validate.json), test.json and ``imgs/``.

Half of its questions are Chinese. The option ``language`` says which are loaded: ``en`` (default,
what papers usually mean), ``zh`` or ``both`` (what MedEvalKit scores); rows in the other language
are counted as rejected. CLOSED questions are not only yes/no ("Left", "T2"): ``yesno`` are those
with an English yes or no, whatever its case, the rest ``closed``.
"""

from __future__ import annotations

from pathlib import Path

from mmedx_fast.data.fields import answer_text, is_yes_or_no, left_over, no_reasoning
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
)

LANGUAGES = ("en", "zh", "both")
"""What the option ``language`` may be, its default first."""

_USED = ("qid", "img_name", "question", "answer", "answer_type", "specialty")


def detect(row: Row) -> bool:
    """Whether a row has SLAKE's columns."""
    return {"img_name", "question", "answer", "q_lang"} <= row.keys()


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "SLAKE")
    wanted = context.options["language"]
    language = required_text(row, "q_lang").lower()
    if wanted not in ("both", language):
        raise RowError("q_lang", language, f"row is not in the language asked for ({wanted})")
    answer = answer_text(row)
    return Record(
        id=f"slake:{id_field(row, 'qid')}",
        dataset="slake",
        split=context.split,
        images=(_image(row, context),),
        question=required_text(row, "question"),
        options=None,
        answer_label=None,
        answer=answer,
        answer_type=_answer_type(required_text(row, "answer_type"), answer),
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


def _answer_type(raw: str, answer: str) -> AnswerType:
    if raw.upper() == "OPEN":
        return "open"
    if raw.upper() == "CLOSED":
        return "yesno" if is_yes_or_no(answer) else "closed"
    raise RowError("answer_type", raw, "answer_type is neither OPEN nor CLOSED")


def _image(row: Row, context: RowContext) -> ImageRef:
    """Every image is called source.jpg: without its folder the name says nothing."""
    name = required_text(row, "img_name")
    return context.images.find(name, "img_name", places=("imgs",), exact=True)


def files(path: Path, split: str) -> list[Path]:
    """The split's JSON file; the validation split was once called validate."""
    return hub_files(path, split, also=("validate",) if split == "validation" else ())


LOADER = Loader(
    name="slake",
    columns="qid, img_name, question, answer, q_lang, answer_type",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
    options={"language": LANGUAGES},
)
