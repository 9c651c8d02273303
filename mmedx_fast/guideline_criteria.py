"""The criteria of the four guidelines, by the table of :mod:`mmedx_fast.guidelines`, and their marks."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmedx_fast.guideline_bayes import read_updates
from mmedx_fast.guideline_lexicon import (
    ABSENCE,
    ASSOCIATE,
    CAUSE,
    CUE_STEMS,
    EXCLUDE,
    NEGATED_CAUSE,
    PROBABILITY,
    REASON,
    SUPPORT,
    affirmed,
    mechanisms,
)
from mmedx_fast.guideline_trace import Causal, Trace


def _differential(trace: Trace) -> dict[str, bool]:
    listed = trace.listed
    needed = min(3, max(2, len(trace.case.letters))) if len(trace.case.letters) > 1 else 3
    enough = min(2, len(trace.case.letters))
    start, letters, count = listed if listed is not None else (len(trace.sentences), set(), 0)
    excluded = supported = False
    for sentence in trace.sentences[start + 1 : trace.end + 1]:
        others = sentence.letters - {trace.winner}
        said = sentence.stems - CUE_STEMS
        reason = (
            sentence.findings
            or (said and ABSENCE.search(sentence.lower))
            or (len(said) >= 2 and REASON.search(sentence.lower))
        )
        if sentence.denies:
            reason = None
        if len(trace.case.letters) < 2:  # open question: the candidates' names are not known
            others = {"?"}
        excluded |= bool(others and EXCLUDE.search(sentence.lower) and reason)
        supported |= bool(
            trace.winner in sentence.letters
            and affirmed(SUPPORT, sentence.lower)
            and sentence.findings
        )
    return {
        "D1_list": listed is not None,
        "D2_candidates": count >= needed and len(letters) >= enough,
        "D3_exclusion": excluded,
        "D3_support": supported,
        "D4_winner_listed": trace.winner in letters,
    }


def _intuitive(trace: Trace) -> dict[str, bool]:
    at = next(
        (
            index
            for index, s in enumerate(trace.sentences)
            if len(s.findings) >= 2 and trace.winner in s.letters and affirmed(ASSOCIATE, s.lower)
        ),
        None,
    )
    economical = (
        len(trace.words) <= 120
        and not PROBABILITY.search(trace.think.lower())
        and not _lists(trace)
        and sum(len(CAUSE.findall(s.lower)) for s in trace.sentences) <= 1
    )
    return {
        "I1_association": at is not None,
        "I2_prompt": at is not None and 0 <= trace.end - at <= 2,
        "I3_economy": economical,
    }


def _analytic(trace: Trace) -> dict[str, bool]:
    causal = trace.causal
    sentences = [sentence for sentence, *_ in causal]
    terms = set().union(*(mechanism for *_, mechanism in causal)) if causal else set()
    causes = {s.start for s in sentences}
    denied = any(
        s.start not in causes
        and NEGATED_CAUSE.search(s.lower)
        and affirmed(CAUSE, s.lower) is None
        and not s.letters - {trace.winner}
        for s in trace.sentences
    )
    explains = any(
        trace.case.findings_in(effect) and mechanisms(origin - trace.case.finding_stems)
        for _, _, effect, origin, _ in causal
    )
    ties = [tied for link in causal if (tied := _tied(trace, link))]
    chain = any(
        causal[i][2] & causal[j][1] for i in range(len(causal)) for j in range(i + 1, len(causal))
    )
    return {
        "A1_causal": len(causal) >= 2 and not denied,
        "A2_mechanism": len(terms) >= 2,
        "A3_explains": explains and len(ties) >= 2 and len(set().union(*ties)) >= 2,
        "A4_chain": len(causal) >= 2 and (chain or len(causal) >= 3),
    }


def _tied(trace: Trace, link: Causal) -> set[int]:
    """The findings on one side of a causal sentence that has a mechanism on the other.

    A word that is a mechanism itself names no finding of further words: "fluid leads to pressure" is
    no word on the "spinal fluid".
    """
    sentence, _, effect, origin, _ = link
    found: set[int] = set()
    for side, other in ((effect, origin), (origin, effect)):
        if mechanisms(other - trace.case.finding_stems):
            for index in trace.case.findings_in(side):
                words = trace.case.findings[index]
                plain = words - mechanisms(words)
                if not plain or plain & side:
                    found.add(index)
    return found & sentence.findings


def _bayesian(trace: Trace) -> dict[str, bool]:
    return read_updates(trace.sentences, trace.winner, trace.case.finding_stems)


def _lists(trace: Trace) -> bool:
    listed = trace.listed
    return listed is not None and listed[2] >= min(3, max(2, len(trace.case.letters)))


def marks_of(trace: Trace) -> set[str]:
    """Guidelines a trace shows even a weak mark of; intuitive has none of its own."""
    marks = {"differential"} if _lists(trace) else set()
    if any(mechanism for *_, mechanism in trace.causal):
        marks.add("analytic")
    if any(PROBABILITY.search(s.lower) and re.search(r"\d", s.lower) for s in trace.sentences):
        marks.add("bayesian")
    return marks


CRITERIA: dict[str, Callable[[Trace], dict[str, bool]]] = {
    "differential": _differential,
    "intuitive": _intuitive,
    "analytic": _analytic,
    "bayesian": _bayesian,
}
CORE = {
    "differential": ("D1_list", "D2_candidates", "D3_exclusion", "D3_support"),
    "intuitive": ("I1_association", "I3_economy"),
    "analytic": ("A1_causal", "A2_mechanism", "A3_explains", "A4_chain"),
    "bayesian": ("B1_prior", "B2_updates", "B3_numbers", "B6_highest"),
}
