"""Reasoning traces of other projects' files, as ``Record.reasoning`` wants them: without tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmedx_fast.data.conclusion import concluded_option
from mmedx_fast.data.fields import letter_or_text
from mmedx_fast.data.mmedexpert import TAGS
from mmedx_fast.data.rows import RowContext, RowError

_TAGGED = re.compile(
    r"\s*<think(?:ing)?>(?P<thought>.*?)</think(?:ing)?>(?P<rest>.*?)"
    r"(?:<answer>(?P<answer>.*?)</answer>\s*)?",
    re.DOTALL,
)


def tagless_trace(
    raw: Any,
    options: Mapping[str, str] | None,
    label: str | None,
    context: RowContext,
    field: str = "reasoning",
) -> dict[str, str]:
    """``Record.reasoning`` from text that may be ``<think>..</think> .. <answer>..</answer>``.

    What stands between the two blocks stays as the last paragraph. Raises ``RowError`` when a trace
    is needed and there is none, when tags are left over, and when the trace's own answer or its last
    words name another option than the gold one.
    """
    if raw is not None and not isinstance(raw, str):
        raise RowError(field, raw, "reasoning is not text")
    text = (raw or "").strip()
    stated = None
    if tagged := _TAGGED.fullmatch(text):
        text = "\n\n".join(p for p in (tagged["thought"].strip(), tagged["rest"].strip()) if p)
        stated = tagged["answer"]
    if any(tag in text for tag in (*TAGS, "<thinking>", "</thinking>")):
        raise RowError(field, text[-200:], "reasoning contains a think or answer tag")
    if options is not None:
        ends = {concluded_option(text, options), stated and _stated(stated, options, field)}
        if ends - {None, "", label}:
            raise RowError(
                field, (raw or "")[-200:], "reasoning ends on another option than the answer"
            )
    if not text and context.require_reasoning:
        raise RowError(field, raw, "reasoning is empty and a trace is needed to train on")
    return {"": text} if text else {}


def _stated(answer: str, options: Mapping[str, str], field: str) -> str:
    try:
        return letter_or_text(options, answer, field)
    except RowError:
        raise RowError(
            field, answer, "answer inside the reasoning is not among the options"
        ) from None
