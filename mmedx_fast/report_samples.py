"""Sample answers for the report: which questions to show, and how."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast.report_data import Rows, RunData, label

if TYPE_CHECKING:
    from mmedx_fast.data.records import ImageRef

_CELL = re.compile(r"(?P<file>.+)!(?P<column>[^!\[\]]+)\[(?P<row>\d+)\](?:\[(?P<position>\d+)\])?")
_SPAN = re.compile(r"(?P<file>.+)@(?P<start>\d+)\+(?P<length>\d+)")
_EDGE = 400
"""Longest edge, in pixels, of an image in the report."""


def samples(data: RunData, count: int) -> str:
    """``count`` questions with their images and every model's answer, right and wrong ones."""
    by_id = _by_question(data.predictions)
    chosen = choose(data.predictions, count)
    return "\n".join(_article(data.folder, by_id[key]) for key in chosen)


def choose(predictions: dict[str, Rows], count: int) -> list[str]:
    """Ids of at most ``count`` questions that show each model right and wrong, in every specialty.

    Greedy and deterministic: each next question is the first that adds the most new (model,
    outcome) and (specialty, outcome) pairs; questions that models disagree on go first among
    equals.
    """
    by_id = _by_question(predictions)
    wanted: set[tuple[str, ...]] = set()
    shows: dict[str, set[tuple[str, ...]]] = {}
    for key, answers in by_id.items():
        pairs: set[tuple[str, ...]] = set()
        for model, row in answers.items():
            outcome = "right" if row.get("correct") else "wrong"
            pairs |= {("model", model, outcome), ("specialty", str(row.get("specialty")), outcome)}
        shows[key] = pairs
    chosen: list[str] = []
    rest = list(by_id)
    position = {key: number for number, key in enumerate(rest)}
    while rest and len(chosen) < count:
        best = max(
            rest, key=lambda key: (len(shows[key] - wanted), len(shows[key]), -position[key])
        )
        if not shows[best] - wanted:
            wanted = set()  # everything was shown once: start over with what is left
        chosen.append(best)
        rest.remove(best)
        wanted |= shows[best]
    return chosen


def _by_question(predictions: dict[str, Rows]) -> dict[str, dict[str, dict[str, Any]]]:
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for model, rows in predictions.items():
        for row in rows:
            out.setdefault(str(row["id"]), {})[model] = row
    return out


def _article(folder: Path, answers: dict[str, dict[str, Any]]) -> str:
    first = next(iter(answers.values()))
    images = [str(image) for image in first.get("images") or []]
    pictures = "".join(
        _picture(folder, image, f"Image {i} of question {first['id']}")
        for i, image in enumerate(images, start=1)
    )
    tag = f"{label(first.get('specialty') or '')} · {first['id']}".removeprefix(" · ")
    body = "".join(_answer(model, row) for model, row in answers.items())
    return (
        f'<article><div class="pics">{pictures or "<span class=muted>no image</span>"}</div><div>'
        f'<div class="tag">{escape(tag)}</div><p>{escape(str(first.get("question", "")))}</p>'
        f"{_options(first)}{body}</div></article>"
    )


def _options(row: dict[str, Any]) -> str:
    options = row.get("options")
    answer = str(row.get("answer", ""))
    if not isinstance(options, dict) or not options:
        return f'<p class="right">Answer: {escape(answer)}</p>'
    lines = []
    for letter, text in options.items():
        line = f"{escape(str(letter))}. {escape(str(text))}"
        gold = answer in (str(letter), str(text))
        lines.append(f'<li class="right">{line} ← answer</li>' if gold else f"<li>{line}</li>")
    return f'<ul class="options">{"".join(lines)}</ul>'


def _answer(model: str, row: dict[str, Any]) -> str:
    right = bool(row.get("correct"))
    predicted = row.get("predicted")
    said = "no answer found" if predicted in (None, "") else escape(str(predicted))
    under = f", {escape(str(row['guideline']))}" if row.get("guideline") else ""
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return (
        f"<details><summary>{mark} <b>{escape(label(model))}</b>"
        f'<span class="muted">{under}</span>: {said}</summary>'
        f"<pre>{escape(str(row.get('completion', '')))}</pre></details>"
    )


def _picture(folder: Path, image: str, alt: str) -> str:
    return embedded(_reference(folder, image), alt)


def _reference(folder: Path, image: str) -> ImageRef:
    """The image that a prediction names as ``str`` of an ``ImageRef`` does."""
    from mmedx_fast.data.records import ImageRef

    archive, mark, member = image.partition("!")
    if mark and Path(archive).suffix.lower() == ".zip":
        return ImageRef(member=(Path(archive), member))
    if cell := _CELL.fullmatch(image):
        position = -1 if cell["position"] is None else int(cell["position"])
        return ImageRef(cell=(Path(cell["file"]), int(cell["row"]), cell["column"], position))
    if span := _SPAN.fullmatch(image):
        return ImageRef(span=(Path(span["file"]), int(span["start"]), int(span["length"])))
    path = Path(image)
    beside = folder / path
    return ImageRef(path=path if path.is_absolute() or not beside.exists() else beside)


def embedded(ref: ImageRef, alt: str) -> str:
    """An image, shrunken, inside the page; what is wrong with it where it cannot be shown."""
    from mmedx_fast.data.images import load_image

    try:
        picture = load_image(ref)
    except (ValueError, OSError) as error:
        return f'<p class="muted">{escape(str(error))}</p>'
    picture.thumbnail((_EDGE, _EDGE))
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt, quote=True)}">'
