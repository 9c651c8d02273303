"""What an answer of the teacher must hold to become a trace, checked in a fixed order.

answer      the strictly extracted answer is the gold one
format      all of it is ``<think>..</think><answer>..</answer>``, each tag once
guideline   adherence to the guideline is at least ``min_adherence``
length      the trace has ``min_words`` to ``max_words`` words
row         the MMedExpert row rules: no tag or control token inside, no other option concluded on
leak        only when the answer was revealed: the trace does not mention that it was

The first that fails is what a dropped trace is counted by; its evidence says how it failed.

The guideline's criteria ask for findings, and those of an image stand in no question text. So the row's own
column ``findings`` counts, and with ``stated_findings`` what the trace itself says that an image shows.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mmedx_fast.builder.config import FilterConfig
from mmedx_fast.data.fields import image_findings
from mmedx_fast.data.mmedexpert import check_trace
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import RowError
from mmedx_fast.guidelines import adherence
from mmedx_fast.scoring import extract_answer, format_ok, strict_score, think_text

TRACE_FILTERS = ("answer", "format", "guideline", "length", "row", "leak")

_CONTROL = re.compile(r"<\|[^|<>]{1,40}\|>|</?(?:think|answer)>", re.IGNORECASE)
_LEAK = re.compile(
    r"\b(?:(?:given|provided|stated|revealed|supplied|reference|gold)\W+(?:answer|option|label)"
    r"|answer\W+(?:is|was|has\W+been|as)\W+(?:given|provided|told|revealed|stated|known|supplied)"
    r"|(?:I|we)\W+(?:was|were|am|are|have\W+been)\W+(?:told|given))\b",
    re.IGNORECASE,
)


_SHOWN = re.compile(
    r"\b(?:images?|films?|scans?|slides?|photographs?|figures?|radiographs?|x-?rays?|ct|mri|ultrasound|oct"
    r"|fundus|micrographs?|tomogra\w+|sonogra\w+|angiogra\w+|mammogra\w+|views?|pictures?|histolog\w+)\b"
    r"[^.;:]*?\b(?:shows?|reveals?|demonstrates?|depicts?|displays?|exhibits?)\s+(?P<what>[^.;:]+)",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r",|\band\b|\bwith\b|\bas well as\b|\([^)]*\)", re.IGNORECASE)
_MOST_WORDS = 5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``reason``: the filter that dropped it, None for a trace that is kept."""

    reason: str | None
    trace: str
    adherence: float
    evidence: dict[str, Any]


def judge(
    text: str, record: Record, guideline: str, cfg: FilterConfig, *, revealed: bool = False
) -> Verdict:
    """Whether ``text``, a whole answer of the teacher, gives a trace for ``record`` under ``guideline``."""
    trace = think_text(text)
    predicted = extract_answer(text, record.options)
    gold = record.answer_label if record.options and record.answer_label else record.answer

    def dropped(reason: str, score: float = 0.0, **evidence: Any) -> Verdict:
        return Verdict(reason, trace, score, evidence)

    if strict_score(text, record.options, gold) != 1.0:
        return dropped("answer", predicted=predicted, gold=gold)
    if not format_ok(text):
        return dropped("format", tags=_tags(text))
    found = adherence(
        trace,
        guideline,
        question=record.question,
        options=record.options,
        answer=predicted,
        findings=(
            *image_findings(record.meta),
            *(stated_findings(trace) if cfg.stated_findings else ()),
        ),
    )
    if found.score < cfg.min_adherence:
        failed = [
            k for part in (found.gates, found.criteria) for k, held in part.items() if not held
        ]
        return dropped("guideline", found.score, adherence=round(found.score, 4), failed=failed)
    count = len(trace.split())
    if not cfg.min_words <= count <= cfg.max_words:
        return dropped("length", found.score, words=count)
    if problem := _row_problem(trace, record):
        return dropped("row", found.score, problem=problem)
    if revealed and (leak := _LEAK.search(trace)):
        return dropped("leak", found.score, mention=leak.group())
    return Verdict(None, trace, found.score, {"words": count})


def stated_findings(trace: str) -> tuple[str, ...]:
    """What a trace says that an image shows, in phrases of at most five words: "the film shows a lobar
    opacity and clear apices" states two."""
    phrases = [
        phrase.strip(" \n\"'")
        for shown in _SHOWN.finditer(trace)
        for phrase in _BETWEEN.split(shown["what"])
    ]
    return tuple(dict.fromkeys(p for p in phrases if 0 < len(p.split()) <= _MOST_WORDS))


def _tags(text: str) -> dict[str, int]:
    return {tag: text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")}


def _row_problem(trace: str, record: Record) -> str | None:
    if control := _CONTROL.search(trace):
        return f"it holds {control.group()}"
    try:
        check_trace("reasoning", trace, record.options, record.answer_label)
    except RowError as error:
        return error.reason
    return None
