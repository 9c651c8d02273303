"""Med-R1's splits of OmniMedVQA (``Splits/{modality,question_type}/{train,test}/*.json``): options
inside the question's line, the gold letter inside an answer tag.

    {"image": "Images/...", "problem": "Question? A)x, B)y, C)z", "solution": "<answer> C </answer>"}

Options are parted at ", B)". An option's own text may hold commas and brackets, "vitamins (A, B)"
too; where that leaves more than one way to read the letters the row is rejected.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

from mmedx_fast.data.fields import image_refs, left_over, no_reasoning, row_id
from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import (
    SPLIT_NAMES,
    Loader,
    Row,
    RowContext,
    RowError,
    SeveralFiles,
    clean_options,
    label_field,
    required_text,
    specialty_field,
)

_USED = ("image", "problem", "solution", "specialty")
_SOLUTION = re.compile(r"\s*<answer>\s*([A-Za-z])\s*[.)]?\s*</answer>\s*")
_MARK = re.compile(r"(?:^|(?<=[\s,;.?:]))([A-Z])\)")


def detect(row: Row) -> bool:
    """Whether a row has Med-R1's columns and its answer tag."""
    return (
        {"image", "problem", "solution"} <= row.keys()
        and not {"question", "options"} & row.keys()
        and "<answer>" in str(row["solution"])
    )


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    no_reasoning(context, "Med-R1")
    stem, raw = split_inline_options(required_text(row, "problem"))
    options = clean_options(raw, "problem")
    solution = _SOLUTION.fullmatch(required_text(row, "solution"))
    if solution is None:
        raise RowError("solution", row["solution"], "solution is not a letter in an answer tag")
    label = label_field({"solution": solution[1]}, "solution", options)
    return Record(
        id=row_id("med_r1", number, context),
        dataset="med_r1",
        split=context.split,
        images=image_refs(row, context, "image"),
        question=stem,
        options=options,
        answer_label=label,
        answer=options[label],
        specialty=specialty_field(row),
        meta=left_over(row, _USED),
    )


def split_inline_options(problem: str) -> tuple[str, dict[str, str]]:
    """The stem and the options of "Question? A)x, B)y". Raises ``RowError`` where the letters can
    be read in no way or in more than one.
    """
    marks = [m for m in _MARK.finditer(problem) if not _closes_a_bracket(problem, m.end() - 1)]
    letters = [m[1] for m in marks]
    if letters != list(string.ascii_uppercase[: len(marks)]):
        raise RowError("problem", problem[:200], "options cannot be told apart without doubt")
    if len(marks) < 2:
        raise RowError("problem", problem[:200], "options are missing")
    stem = problem[: marks[0].start()].strip()
    if not stem:
        raise RowError("problem", problem[:200], "question has no text before its options")
    ends = [m.start() for m in marks[1:]] + [len(problem)]
    texts = [problem[m.end() : end].strip() for m, end in zip(marks, ends, strict=True)]
    last = texts.pop()
    texts = [text.removesuffix(",").rstrip() for text in texts]  # the comma before the next letter
    return stem, dict(zip(letters, [*texts, last], strict=True))


def _closes_a_bracket(text: str, at: int) -> bool:
    """Whether the bracket at ``at`` closes one that was opened before it."""
    depth = 0
    for character in text[:at]:
        depth = depth + 1 if character == "(" else max(0, depth - 1) if character == ")" else depth
    return depth > 0


def files(path: Path, split: str) -> list[Path]:
    """All JSON files of the folder named after the split, which is ``path`` or lies in it."""
    if path.is_dir():
        names = SPLIT_NAMES.get(split, (split,))
        for pattern in ("", "*/", "*/*/"):
            here = [path] if not pattern and path.name in names else []
            folders = here + [f for n in names for f in path.glob(f"{pattern}{n}") if f.is_dir()]
            found = {folder: sorted(folder.glob("*.json")) for folder in folders}
            found = {folder: inside for folder, inside in found.items() if inside}
            if len(found) > 1:
                listed = ", ".join(str(folder) for folder in found)
                raise SeveralFiles(
                    f"{path}: several folders for split {split!r} ({listed}); give the one meant",
                    [file for inside in found.values() for file in inside],
                )
            for inside in found.values():
                return inside
    return hub_files(path, split)


LOADER = Loader(
    name="med_r1",
    columns="image, problem (options inside), solution (<answer> letter </answer>)",
    detect=detect,
    parse=parse,
    files=files,
    rows=read_any,
    suffixes=SUFFIXES,
    image_levels=4,
)
