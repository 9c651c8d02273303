"""What the loaders of question-answer data share: images in every spelling, options in every
spelling, gold answers as letters, ids of rows that have none.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mmedx_fast.data.records import AnswerType, ImageRef
from mmedx_fast.data.rows import Row, RowContext, RowError, clean_options

IMAGE_TOKEN = "<image>"
_ABSENT = ("", "none", "nan", "null")
_OPTION_LINE = re.compile(r"[ \t]*\(?([A-Z])\s*[.):]\s*(\S.*?)[ \t]*")
_OPTIONS_HEAD = re.compile(r"\s*(?:answer\s+)?(?:options|choices)\s*:\s*", re.IGNORECASE)


def row_id(dataset: str, number: int, context: RowContext) -> str:
    """The id of a row that has none of its own: data set, split, file and row number, so that two
    shards or two splits never share one.
    """
    stem = context.file.stem
    place = stem if context.split in stem else f"{context.split}-{stem}"
    return f"{dataset}:{place}:{number}"


def no_reasoning(context: RowContext, name: str) -> None:
    """Refuse the row of a format that has no traces where one is needed to train on."""
    if context.require_reasoning:
        raise RowError("reasoning", None, f"{name} has no reasoning traces to train on")


def image_refs(row: Mapping[str, Any], context: RowContext, *fields: str) -> tuple[ImageRef, ...]:
    """The images of a row from the first of ``fields`` that it has: a name, an ``ImageRef`` (of
    parquet), an object with ``path``, or a list of these. None and an empty list are no images.

    Raises ``RowError`` for anything else and for images that are not there.
    """
    field = next((name for name in fields if row.get(name) is not None), fields[0])
    value = row.get(field)
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(_image_ref(item, field, context) for item in items)


def _image_ref(item: Any, field: str, context: RowContext) -> ImageRef:
    if isinstance(item, ImageRef):
        return item
    if isinstance(item, Mapping) and not item.get("bytes"):
        item = item.get("path")
    if item is None:
        raise RowError(field, item, "image is null")
    if not isinstance(item, str):
        raise RowError(field, item, "image is not a file name")
    return context.images.find(item, field)


def answer_text(row: Mapping[str, Any], field: str = "answer") -> str:
    """The gold answer as text; numbers are taken too ("3" for 3 and for 3.0)."""
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value).removesuffix(".0")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(field, value, f"{field} is missing or empty")
    if not isinstance(value, str):
        raise RowError(field, value, f"{field} is not text")
    return value.strip()


def is_yes_or_no(answer: str) -> bool:
    """Case ignored: the published sets write "yes", "Yes" and "YES"."""
    return answer.strip().casefold() in ("yes", "no")


def yesno_or_open(answer: str) -> AnswerType:
    """The type of an answer in data without such a column (VQA-RAD and PathVQA on the hub)."""
    return "yesno" if is_yes_or_no(answer) else "open"


def listed_options(raw: Any, field: str = "options") -> dict[str, str] | None:
    """Options from a list of texts, an object {letter: text}, or either as JSON text; None when
    there are none.

    Nulls, not-a-numbers and empty texts at the end of a list are no options.
    """
    if isinstance(raw, str):
        if raw.strip().casefold() in _ABSENT:
            return None
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise RowError(field, raw, f"{field} is text but not JSON") from None
    if isinstance(raw, list):
        if len(raw) > len(string.ascii_uppercase):
            raise RowError(field, raw, "more than 26 options")
        present = [item for item in raw if not _absent(item)]
        if raw[: len(present)] != present:
            raise RowError(field, raw, "an option before the last one is empty")
        raw = dict(zip(string.ascii_uppercase, present, strict=False))
    elif isinstance(raw, Mapping):
        raw = {key: text for key, text in raw.items() if not _absent(text)}
    if raw is None or raw == {}:
        return None
    return clean_options(raw, field)


def _absent(text: Any) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return text is None or (isinstance(text, float) and math.isnan(text))


def letter_of_text(options: Mapping[str, str], text: str, field: str = "answer") -> str:
    """The letter of the option with that text: exactly, else without regard to case and blanks, else
    as written with its letter before it ("B. CT").
    """
    for key in (str.strip, _folded):
        letters = [letter for letter, option in options.items() if key(option) == key(text)]
        if len(letters) == 1:
            return letters[0]
        if letters:
            raise RowError(field, text, "answer is the text of more than one option")
    line = _OPTION_LINE.fullmatch(text)
    if line and line[1] in options and _folded(line[2]) == _folded(options[line[1]]):
        return line[1]
    raise RowError(field, text, "answer is not among the options")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def letter_or_text(options: Mapping[str, str], answer: str, field: str = "answer") -> str:
    """The gold letter from an answer that is a letter or an option's text.

    A lone letter that is both a label and another option's text is refused.
    """
    text = answer.strip()
    bare = text.strip("().: ")
    if bare.upper() in options and len(bare) == 1:
        others = [k for k, v in options.items() if v.strip() == text and k != bare.upper()]
        if others:
            raise RowError(field, answer, "answer is a letter and the text of another option")
        return bare.upper()
    return letter_of_text(options, text, field)


def split_option_lines(question: str) -> tuple[str, dict[str, str] | None]:
    """A question into its stem and the options that are its last lines ("A. ...", "B) ..."), or the
    question and None when it ends otherwise.

    The letters must run A, B, C, ...; a line that starts otherwise belongs to the option before it.
    """
    lines = question.strip().splitlines()
    marks = [
        (number, match[1])
        for number, line in enumerate(lines)
        if (match := _OPTION_LINE.fullmatch(line))
    ]
    starts = [index for index, (_, letter) in enumerate(marks) if letter == "A"]
    if not starts:
        return question.strip(), None
    own = marks[starts[-1] :]
    letters = [letter for _, letter in own]
    if letters != list(string.ascii_uppercase[: len(letters)]) or len(letters) < 2:
        return question.strip(), None
    ends = [number for number, _ in own[1:]] + [len(lines)]
    options: dict[str, Any] = {}
    for (number, letter), end in zip(own, ends, strict=True):
        match = _OPTION_LINE.fullmatch(lines[number])
        assert match is not None
        options[letter] = " ".join([match[2], *(t.strip() for t in lines[number + 1 : end])])
    stem = lines[: own[0][0]]
    while stem and (not stem[-1].strip() or _OPTIONS_HEAD.fullmatch(stem[-1])):
        stem.pop()
    return "\n".join(stem).strip(), clean_options(options, "question")


def place_images(text: str, count: int, field: str, *, needed: bool) -> str:
    """A text without its ``<image>`` tokens, since prompts put the images first.

    Tokens at the start or end go; one inside a sentence becomes "the image", or "Figure B" by its
    place among several. Raises ``RowError`` unless there are ``count`` tokens; none at all is right
    too unless ``needed``.
    """
    if count > len(string.ascii_uppercase):
        raise RowError(field, count, "more than 26 images")
    tokens = text.count(IMAGE_TOKEN)
    if tokens != count and (tokens or needed):
        raise RowError(field, text, "number of <image> tokens is not the number of images")
    start, end = re.match(r"(?:\s|<image>)*", text), re.search(r"(?:\s|<image>)*\Z", text)
    assert start is not None and end is not None
    figure = iter(string.ascii_uppercase[start[0].count(IMAGE_TOKEN) :])
    inner = text[start.end() : max(start.end(), end.start())]
    return re.sub(
        IMAGE_TOKEN, lambda _: f"Figure {next(figure)}" if count > 1 else "the image", inner
    )


def image_findings(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row says its images show (column ``findings`` or ``finding``: a text or a list of texts);
    never in a prompt. Nulls and empty texts are none; raises ``RowError`` for anything else.
    """
    field = "finding" if _absent(meta.get("findings")) else "findings"
    value = meta.get(field)
    items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    found = [item for item in items if not _absent(item)]
    if not all(isinstance(item, str) for item in found):
        raise RowError(field, value, f"{field} is not text or a list of texts")
    return tuple(found)


def left_over(row: Row, used: Sequence[str] | frozenset[str]) -> dict[str, Any]:
    """The native columns a loader does not use otherwise, for ``Record.meta``."""
    return {key: value for key, value in row.items() if key not in used and not _is_image(value)}


def _is_image(value: Any) -> bool:
    return isinstance(value, ImageRef) or (
        isinstance(value, list) and any(isinstance(item, ImageRef) for item in value)
    )
