"""One HTML file to look through right and wrong answers, with nothing to load from anywhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import heapq
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast.atomic import write_text
from mmedx_fast.data.images import ImageError, load_image
from mmedx_fast.data.records import ImageRef, Record
from mmedx_fast.evaluation.browse_page import page
from mmedx_fast.evaluation.metrics import read_rows
from mmedx_fast.evaluation.sets import EvalSet

_EDGE = 320
"""Longest edge, in pixels, of an image in the page."""
_LONGEST = 6000
"""Characters of a completion in the page."""
_SAMPLES = 8
"""Further answers of a question in the page."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's predictions on a set. ``records`` gives the questions' images; None shows none."""

    model: str
    set: str
    predictions: Path
    records: EvalSet | None = None


def write_browser(
    path: Path, title: str, sources: Sequence[Source], most_rows: int, most_images: int
) -> None:
    """Write the page for at most ``most_rows`` answers, shared evenly by ``sources``, and the images of at most
    ``most_images`` questions.

    Of a longer set a fixed sample of questions is shown, the same for every model; the page says how many there
    are and keeps the counts of all. Only the sample is held in memory.
    """
    each = max(1, most_rows // max(1, len(sources)))
    by_set: dict[str, list[Source]] = {}
    for source in sources:
        by_set.setdefault(source.set, []).append(source)
    rows: list[dict[str, Any]] = []
    counts: list[dict[str, Any]] = []
    images: dict[str, list[str]] = {}
    for name, members in by_set.items():
        chosen = _sample((row["id"] for row in read_rows(members[0].predictions)), each)
        for source in members:
            shown, count = _rows(source, set(chosen))
            rows += shown
            counts.append(count)
        pictured = set(chosen[: max(1, most_images // len(by_set)) if most_images else 0])
        if pictured and members[0].records is not None:
            for record in members[0].records.records(None):
                if record.id in pictured and record.images:
                    images[f"{name}/{record.id}"] = _pictures(record)
    write_text(path, page(title, {"rows": rows, "counts": counts, "images": images}))


def _sample(ids: Iterable[str], most: int) -> list[str]:
    """At most ``most`` ids, the same ones whatever their order."""
    return heapq.nsmallest(most, ids, key=lambda id: hashlib.sha256(id.encode()).digest())


def _rows(source: Source, chosen: set[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chosen rows as the page takes them, and the counts of all."""
    count: dict[str, Any] = {"model": source.model, "set": source.set, "questions": 0, "shown": 0}
    count |= {"right": 0, "wrong": 0, "unparsed": 0}
    shown = []
    for row in read_rows(source.predictions):
        outcome = _outcome(row)
        count[outcome] += 1
        count["questions"] += 1
        if row["id"] in chosen:
            count["shown"] += 1
            shown.append(_shown(row, source, outcome))
    return shown, count


def _outcome(row: dict[str, Any]) -> str:
    if row["correct"]:
        return "right"
    return "unparsed" if row["predicted"] is None else "wrong"


def _shown(row: dict[str, Any], source: Source, outcome: str) -> dict[str, Any]:
    keys = ("id", "specialty", "guideline", "question", "options", "answer", "answer_label")
    samples = row.get("samples") or []
    return {
        **{key: row.get(key) for key in keys},
        "model": source.model,
        "set": source.set,
        "outcome": outcome,
        "predicted": row["predicted"],
        "votes": (row.get("vote") or {}).get("votes"),
        "finish": row["finish_reason"],
        "completion": _cut(row["completion"], _LONGEST),
        "samples": [
            {
                "guideline": s["guideline"],
                "predicted": s["predicted"],
                "correct": s["correct"],
                "completion": _cut(s["completion"], _LONGEST // 4),
            }
            for s in samples[:_SAMPLES]
        ],
        "more": max(0, len(samples) - _SAMPLES),
        "pictures": len(row.get("images") or []),
    }


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[:most]} … ({len(text) - most:,} more characters in predictions.jsonl)"


def _pictures(record: Record) -> list[str]:
    """Data addresses of a question's images, or what is wrong with one."""
    return [_picture(image) for image in record.images]


def _picture(ref: ImageRef) -> str:
    try:
        image = load_image(ref, max_pixels=_EDGE * _EDGE * 4)
    except ImageError as error:
        return str(error)
    image.thumbnail((_EDGE, _EDGE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def read_page(text: str) -> dict[str, Any]:
    """The data that a page holds."""
    start = text.index(">", text.index('<script type="application/json"')) + 1
    found: dict[str, Any] = json.loads(text[start : text.index("</script>", start)])
    return found
