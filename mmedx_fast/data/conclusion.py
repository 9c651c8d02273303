"""Which option a reasoning trace ends on, as far as its last words say so plainly."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SENTENCE_END = re.compile(r"(?<=[.!?])[\s*]+|\n+")
# "answer is (B)", "Answer: **B**", "choose option B": the cue, then whatever stands where the
# letter would.
_ANSWER_CUE = re.compile(
    r"\b(?P<cue>answer|choice|option|select|choose|pick)\b(?:\s+(?:is|would\s+be|should\s+be|remains))?"
    r"\s*[:=]?[\s*(\[\"']*(?=(?P<rest>\S.*))",
    re.IGNORECASE,
)
# The letter must end there or be followed by a reason, else "answer is A patient ..." would be
# option A.
_LETTER = re.compile(
    r"(?P<letter>[A-Z])(?=$|[).\]:;,!*\"']|\s+(?:because|since|as|given)\b|\s*[-–—(]\s)"
)
_CONCLUDES = re.compile(
    r"\b(?:therefore|thus|hence|so|conclu\w+|most likely|best explain\w*|answer|final\w*"
    r"|diagnosis (?:is|of))\b",
    re.IGNORECASE,
)
_NEGATES = re.compile(
    r"\b(?:not|no|nor|never|unlikely|less likely|rul\w+ out|exclud\w+|against|rather than"
    r"|instead of|over|without|wrong|incorrect)\b",
    re.IGNORECASE,
)


def concluded_option(reasoning: str, options: Mapping[str, str]) -> str | None:
    """The option letter that the last two sentences conclude with, or ``None`` when they do not say
    it plainly.

    An explicit "answer is X" decides, X being an option's text or its letter. Otherwise the last
    sentence counts if it concludes ("therefore", "most likely", ...), negates nothing, and names
    exactly one option's text.
    """
    sentences = [s for s in _SENTENCE_END.split(reasoning.strip()) if s.strip(" *.")]
    for sentence in reversed(sentences[-2:]):
        negated = _NEGATES.search(sentence) is not None
        for cue in reversed(list(_ANSWER_CUE.finditer(sentence))):
            if negated and cue["cue"].lower() != "answer":  # "option B, C and D are excluded"
                continue
            letter = _leading_option(cue["rest"], options)
            if letter is not None:
                return letter
    last = sentences[-1] if sentences else ""
    if not _CONCLUDES.search(last) or _NEGATES.search(last):
        return None
    named = named_options(last, options)
    return named[0] if len(named) == 1 else None


def named_options(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options whose text occurs as whole words; a text inside a longer one that
    occurs is not counted.
    """
    rest = text.casefold()
    named = []
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        pattern = rf"(?<!\w){re.escape(option.casefold())}(?!\w)"
        if re.search(pattern, rest):
            named.append(letter)
            rest = re.sub(pattern, "\0", rest)
    return named


def _leading_option(rest: str, options: Mapping[str, str]) -> str | None:
    folded = rest.casefold()
    for article in ("", "a ", "an ", "the "):
        for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
            text = article + option.casefold()
            if folded.startswith(text) and not folded[len(text) :][:1].isalnum():
                return letter
    found = _LETTER.match(rest)
    return found["letter"] if found and found["letter"] in options else None
