"""The four reasoning guidelines: what the model is told, and how far a trace follows it.

Paradigms after Savage et al. 2024 (npj Digital Medicine 7:20, Table 2); instructions and criteria
are this project's own. A score is 0 if a gate fails, else the mean of the guideline's criteria,
times ``CORE_PENALTY`` if one of its core criteria (*) fails: half of the form does not pay.

Gates of every guideline
    length      15 to 600 words
    sentences   at least two of three words or more
    diversity   distinct words above 30 %
    repeats     no line or sentence three times
    prose       function words at least 15 %, at most one broken word pair ("due of", "to."), none
                that no sentence has ("the his", "with are"), no "The" in the middle of one
    own_words   at most half of the 4-word runs copied from the stem
    single      not the marks of two further guidelines besides the own one
    named       a concluding sentence (most likely, therefore, thus, best explained by, answer is,
                diagnosis is, conclude), last or in the last 30 %, names an option (text or letter)
    agrees      that option is the answer, and no other sentence with "answer is", "diagnosis is",
                "therefore" or "thus" concludes on another one, or takes it back ("the answer is
                never X"); contradiction pays nothing
    backed      no other option is supported by as many sentences of its own as the answer
    findings    two distinct findings are named (three if intuitive, if the stem has so many;
                a phrase of three words or more is then two)

A cue that is taken back ("does not support", "never leads to", "not at all typical of") is none.
A *finding* is a phrase of the question stem (or of ``findings``) named outside an option's text:
"fever", "tracheal deviation"; words of any vignette or picture ("abnormality", "chest") are none.
Fewer than two of them, and no guideline applies (``Adherence.applies``): a trace that argues from
what the image alone shows cannot be told from one that argues from nothing. A sentence that says
that a finding of the stem is missing ("without fever") names none. All checks are within ONE
sentence unless they say otherwise.

differential
    D1_list*          a cue (differential, possible, consider, candidates, could be, include) with
                      two or more options, a numbered list of three, or bullets that begin with
                      three options
    D2_candidates*    the list has three candidates (all, if fewer options), two of them options
    D3_exclusion*     after the list: another option + less likely / unlikely / against / ruled out
                      / excluded / does not fit + a finding, or no / without / absence of / lacks
                      and a content word, or because / since / given and two of them
    D3_support*       after the list: the winner + supports / favours / fits / suggests ... + a
                      finding
    D4_winner_listed  the concluded option stands in the list
intuitive
    I1_association*   two findings + suggests / consistent with / classic for / characteristic of /
                      typical of / points to / seen in ... + the concluded option
    I2_prompt         the conclusion is that sentence or at most two later
    I3_economy*       at most 120 words, no probability or %, no differential list, at most one
                      causal connective
analytic
    A1_causal*        two sentences with because / due to / leads to / results in / causes /
                      causing / in response to ... and content on both sides; none denies a cause
    A2_mechanism*     two distinct mechanism terms (``guideline_lexicon.MECHANISM``) in those
    A3_explains*      one of them has a mechanism term in its cause and a finding in its effect; two
                      have a mechanism term on one side and a finding on the other, and not the
                      same finding: a chain of mechanisms explains nothing by itself
    A4_chain*         a word of one's effect is in the cause or topic of a later one, or there are
                      three causal sentences
bayesian
    B1_prior*         prior / pre-test / base rate / prevalence + an option + a number (20 %, 0.2)
    B2_updates*       two later sentences: a finding not used before + raises / lowers / updates
                      ... + a new number; three words of findings among them
    B3_numbers*       all within 0..100 %; each moves as its verb says; "from" repeats the last
                      value; the posterior does not turn back; the end differs from the prior
    B4_posterior      at or after the last update: posterior / post-test + a number + the winner
                      (or "it")
    B5_sums           priors, updated values and jointly stated posteriors sum to at most 105 %
    B6_highest*       the concluded option has the highest final number
all but intuitive
    focus             no other guideline's full form beside the own one
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.guideline_criteria import CORE, CRITERIA, marks_of
from mmedx_fast.guideline_lexicon import (
    ASSOCIATE,
    BROKEN,
    CONCLUDE,
    EXCLUDE,
    LIST_CUE,
    SHATTERED,
    SPLICED,
    STRONG_CONCLUDE,
    SUPPORT,
    TURNED,
    affirmed,
)
from mmedx_fast.guideline_text import FUNCTION_WORDS, copied_share, read_case
from mmedx_fast.guideline_trace import Trace, concluded, read_trace
from mmedx_fast.scoring import match_option

CORE_PENALTY = 0.3
MIN_FINDINGS = 2


@dataclasses.dataclass(frozen=True)
class Guideline:
    """A guideline's name and the sentence that closes the user prompt in training."""

    name: str
    instruction: str


@dataclasses.dataclass(frozen=True)
class Adherence:
    """``score`` in [0, 1] with the gates and criteria it came from.

    Where the question has too few findings to be argued from, no guideline ``applies``: the score is
    0, and not to be paid or counted.
    """

    score: float
    gates: dict[str, bool]
    criteria: dict[str, bool]
    applies: bool = True


# The first words differ, so that prompts of one question part only where the guideline begins.
_INSTRUCTIONS = {
    "differential": "List a differential diagnosis of at least three candidates, exclude "
    "alternatives by their findings, say what supports the best one, then conclude.",
    "intuitive": "Recognise the pattern: in two or three sentences, link the key findings to the "
    "diagnosis they are characteristic of, then conclude.",
    "analytic": "Explain the pathophysiology from cause to effect, step by step, until the "
    "mechanism accounts for the findings, then conclude.",
    "bayesian": "State a prior probability in percent, update it with each finding, give the "
    "posterior probability, then conclude with the most probable option.",
}
GUIDELINES: dict[str, Guideline] = {
    name: Guideline(name, _INSTRUCTIONS[name]) for name in GUIDELINE_NAMES
}


def _common_gates(trace: Trace, answer: str | None) -> dict[str, bool]:
    words, count, lower = trace.words, len(trace.words), trace.think.lower()
    lines = Counter(line.strip().lower() for line in trace.think.splitlines() if line.strip())
    said = Counter(" ".join(s.words) for s in trace.sentences)
    strong = [
        concluded(s, STRONG_CONCLUDE)
        for s in trace.sentences
        if s.mentions and answer not in s.letters and not LIST_CUE.search(s.lower)
    ]
    taken_back = any(
        s.letters == {answer} and CONCLUDE.search(s.lower) and concluded(s, CONCLUDE) is None
        for i, s in enumerate(trace.sentences)
        if i != trace.end
    )
    return {
        "length": 15 <= count <= 600,
        "sentences": sum(len(s.words) >= 3 or i == trace.end for i, s in enumerate(trace.sentences))
        >= 2,
        "diversity": len(set(words)) > 0.3 * count,
        "repeats": max([*lines.values(), *said.values(), 0]) < 3,
        "prose": sum(word in FUNCTION_WORDS for word in words) >= 0.15 * count
        and len(BROKEN.findall(lower)) <= 1
        and not SHATTERED.search(lower)
        and not SPLICED.search(trace.think),
        "own_words": copied_share(words, trace.case.question_words) <= 0.5,
        "named": trace.winner is not None,
        "agrees": trace.winner is not None
        and trace.winner == answer
        and not any(strong)
        and not taken_back,
        "backed": _backed(trace, answer),
        "findings": len(trace.named) >= min(2, max(1, len(trace.case.findings))),
    }


def _backed(trace: Trace, answer: str | None) -> bool:
    """Whether no option is supported by as many sentences of its own as the answer, or more."""
    votes: Counter[str] = Counter()
    others = {m.letter for s in trace.sentences[: trace.end] for m in s.mentions} - {answer}
    for sentence in trace.sentences[: trace.end] if others else ():
        named = answer if answer in sentence.letters else min(sentence.letters, default=None)
        if named is None or (named != answer and len(sentence.letters) > 1):
            continue
        cue = affirmed(SUPPORT, sentence.lower) or affirmed(ASSOCIATE, sentence.lower)
        if cue and not EXCLUDE.search(sentence.lower) and not TURNED.search(sentence.lower):
            votes[named] += 1
    own = votes.pop(answer or "", 0)
    return not votes or max(votes.values()) < max(own, 1)


def _weight(trace: Trace) -> int:
    """How many findings are named; a phrase of three words, all of them said, is two ("pleuritic
    pain", "after a flight" without a word between)."""
    said = set().union(*(s.stems for s in trace.sentences if s.findings))
    named = [trace.case.findings[index] for index in trace.named]
    return sum(2 if len(phrase) >= 3 and phrase <= said else 1 for phrase in named)


def _judge(trace: Trace, guideline: str, gates: dict[str, bool]) -> Adherence:
    applies = trace.case.own_findings >= MIN_FINDINGS
    foreign = marks_of(trace) - {guideline}
    gates = gates | {"single": len(foreign) < 2}
    criteria = CRITERIA[guideline](trace)
    if guideline == "intuitive":
        gates["findings"] = _weight(trace) >= min(3, max(1, len(trace.case.findings)))
    else:
        criteria["focus"] = not any(all(CRITERIA[name](trace).values()) for name in foreign)
    gates["findings"] &= applies
    if not all(gates.values()):
        return Adherence(0.0, gates, criteria, applies)
    score = sum(criteria.values()) / len(criteria)
    core = all(criteria[name] for name in CORE[guideline])
    return Adherence(score if core else CORE_PENALTY * score, gates, criteria)


def _prepare(
    think: str,
    question: str,
    options: Mapping[str, str] | None,
    answer: str | None,
    findings: tuple[str, ...],
) -> tuple[Trace, dict[str, bool]]:
    letter = None
    if options:
        pairs = tuple(options.items())
        if answer is not None:
            letter = answer if answer in options else match_option(answer, options)
    else:  # an open question: the answer itself is the one hypothesis known by name
        pairs = (("=", answer),) if answer else ()
        letter = "=" if answer else None
    trace = read_trace(think, read_case(question, pairs, tuple(findings)))
    return trace, _common_gates(trace, letter)


def adherence(
    think: str,
    guideline: str,
    *,
    question: str,
    options: Mapping[str, str] | None,
    answer: str | None,
    findings: tuple[str, ...] = (),
) -> Adherence:
    """How far a reasoning text follows ``guideline``, by the criteria of the module's table.

    ``think`` is the text inside ``<think>`` alone; ``question`` the stem without options;
    ``answer`` the letter (or option text; without ``options`` the free text) that the completion
    itself gives, whether right or wrong, and None if it gives none, which fails ``agrees``.
    ``findings`` are further phrases that count as findings, such as the image's description; with
    fewer than two in all, ``applies`` is False, whatever the text.
    ValueError for an unknown guideline.
    """
    if guideline not in GUIDELINES:
        raise ValueError(f"unknown guideline {guideline!r}; choose one of {', '.join(GUIDELINES)}")
    trace, gates = _prepare(think, question, options, answer, findings)
    return _judge(trace, guideline, gates)


def adherence_all(
    think: str,
    *,
    question: str,
    options: Mapping[str, str] | None,
    answer: str | None,
    findings: tuple[str, ...] = (),
) -> dict[str, Adherence]:
    """:func:`adherence` to every guideline, by name; the text is read once."""
    trace, gates = _prepare(think, question, options, answer, findings)
    return {name: _judge(trace, name, gates) for name in GUIDELINES}
