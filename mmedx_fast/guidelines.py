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
    findings    two distinct findings are named (three if intuitive; all, if the stem has fewer)

A cue that is taken back ("does not support", "never leads to", "not at all typical of") is none.
A *finding* is a phrase of the question stem (or of ``findings``) named outside an option's text:
"fever", "tracheal deviation". A sentence that says that a finding of the stem is missing ("without
fever") names none. All checks are within ONE sentence unless they say otherwise.

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
    A3_explains*      one of them has a mechanism term in its cause and a finding in its effect; all
                      of them name two findings
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
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping

from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.guideline_bayes import read_updates
from mmedx_fast.guideline_lexicon import (
    ABSENCE,
    ASSOCIATE,
    BROKEN,
    CAUSE,
    CLAUSE,
    CONCLUDE,
    CUE_STEMS,
    EXCLUDE,
    LIST_CUE,
    MECHANISM_PATTERN,
    NEGATED,
    NEGATED_CAUSE,
    PROBABILITY,
    REASON,
    SHATTERED,
    SPLICED,
    STRONG_CONCLUDE,
    SUPPORT,
    TURNED,
    affirmed,
)
from mmedx_fast.guideline_text import (
    FUNCTION_WORDS,
    WORD,
    Case,
    Mention,
    Sentence,
    bullet_items,
    content_stems,
    copied_share,
    masked,
    numbered_items,
    read_case,
    read_sentences,
)
from mmedx_fast.scoring import match_option

CORE_PENALTY = 0.3


@dataclasses.dataclass(frozen=True)
class Guideline:
    """A guideline's name and the sentence that closes the user prompt in training."""

    name: str
    instruction: str


@dataclasses.dataclass(frozen=True)
class Adherence:
    """``score`` in [0, 1] with the gates and criteria it came from."""

    score: float
    gates: dict[str, bool]
    criteria: dict[str, bool]


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


# A causal sentence: stems of its cause and topic, of its effect, of its cause alone, mechanism terms.
Causal = tuple[Sentence, set[str], set[str], set[str], set[str]]


@dataclasses.dataclass
class _Trace:
    """A read trace: sentences, the concluding sentence's index (-1: none) and its option."""

    think: str
    words: list[str]
    case: Case
    sentences: list[Sentence]
    end: int
    winner: str | None

    @functools.cached_property
    def named(self) -> set[int]:
        """The findings that any sentence names."""
        return set().union(*(s.findings for s in self.sentences)) if self.sentences else set()

    @functools.cached_property
    def listed(self) -> tuple[int, set[str], int] | None:
        return _candidate_list(self)

    @functools.cached_property
    def causal(self) -> list[Causal]:
        return _causal(self)


def _clauses(sentence: Sentence) -> list[tuple[int, int, bool]]:
    """(start, end, excluded) of each clause; a comma inside an option's text does not cut."""
    cuts: list[tuple[int, bool]] = [(0, False)]
    for match in CLAUSE.finditer(sentence.lower):
        if not any(m.start < match.start() < m.end for m in sentence.mentions):
            cuts.append((match.start(), match.group("turn") is not None))
    clauses = []
    for (start, turned), (end, _) in zip(
        cuts, [*cuts[1:], (len(sentence.lower), False)], strict=True
    ):
        clauses.append((start, end, turned or bool(EXCLUDE.search(sentence.lower, start, end))))
    return clauses


def _concluded(sentence: Sentence, cue: re.Pattern[str]) -> str | None:
    """The option a sentence concludes on: by its cue's clause first, what it rejects left out."""
    if not sentence.mentions:
        return None
    cues = [
        match.start()
        for match in cue.finditer(sentence.lower)
        if not NEGATED.search(sentence.lower, max(0, match.start() - 40), match.start())
    ]
    if not cues:
        return None
    at = cues[-1]
    clauses = _clauses(sentence)
    home = next(i for i, (start, end, _) in enumerate(clauses) if start <= at < max(end, start + 1))

    def rank(mention: Mention) -> tuple[int, int]:
        index = max(i for i, (start, _, _) in enumerate(clauses) if start <= mention.start)
        if clauses[index][2]:
            return (9, 0)
        order = 0 if index == home and mention.start > at else 1 if index == home else 2
        return (order if index >= home else 3, abs(mention.start - at))

    best = min(sentence.mentions, key=rank)
    return None if rank(best)[0] == 9 else best.letter


def _read(think: str, case: Case) -> _Trace:
    sentences = read_sentences(think, case)
    end, winner = -1, None
    length = sum(len(s.text) for s in sentences)
    done = 0
    for index, sentence in enumerate(sentences):
        done += len(sentence.text)
        late = index == len(sentences) - 1 or done > 0.7 * length
        if late and (letter := _concluded(sentence, CONCLUDE)) is not None:
            end, winner = index, letter
    return _Trace(think, WORD.findall(think.lower()), case, sentences, end, winner)


def _common_gates(trace: _Trace, answer: str | None) -> dict[str, bool]:
    words, count, lower = trace.words, len(trace.words), trace.think.lower()
    lines = Counter(line.strip().lower() for line in trace.think.splitlines() if line.strip())
    said = Counter(" ".join(s.words) for s in trace.sentences)
    strong = [
        _concluded(s, STRONG_CONCLUDE)
        for s in trace.sentences
        if s.mentions and answer not in s.letters and not LIST_CUE.search(s.lower)
    ]
    taken_back = any(
        s.letters == {answer} and CONCLUDE.search(s.lower) and _concluded(s, CONCLUDE) is None
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


def _backed(trace: _Trace, answer: str | None) -> bool:
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


def _candidate_list(trace: _Trace) -> tuple[int, set[str], int] | None:
    """(index of its first sentence, options in it, number of candidates) of the first list."""
    items, bullets = numbered_items(trace.think), bullet_items(trace.think)
    heads = [
        ms[0].letter for item in bullets if (ms := trace.case.mentions(item)) and ms[0].start < 5
    ]
    if len(set(heads)) >= 3:  # bullets are steps as often as candidates
        items = items or bullets
    if len(items) >= 3:
        named = [trace.case.mentions(item) for item in items]
        first = next((i for i, s in enumerate(trace.sentences) if items[0].startswith(s.text)), 0)
        # An item may argue about its own candidate, so D3 may stand inside a numbered list.
        return first - 1, {ms[0].letter for ms in named if ms}, len(items)
    for index, sentence in enumerate(trace.sentences):
        cue = LIST_CUE.search(sentence.lower)
        if cue and (len(sentence.letters) >= 2 or len(trace.case.letters) < 2):
            listed = masked(sentence.lower, sentence.mentions)[cue.end() :]
            parts = re.split(r",|;|\band\b|\bor\b|:", listed)
            extra = sum(1 for part in parts if content_stems(part) - CUE_STEMS)
            return index, sentence.letters, len(sentence.letters) + extra
    return None


def _differential(trace: _Trace) -> dict[str, bool]:
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


def _intuitive(trace: _Trace) -> dict[str, bool]:
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


def _causal(trace: _Trace) -> list[Causal]:
    """The causal sentences in which both sides of the connective say something."""
    found = []
    for sentence in trace.sentences:
        match = affirmed(CAUSE, sentence.lower)
        if match is None:
            continue
        before, after = sentence.lower[: match.start()], sentence.lower[match.end() :]
        if match.group("back") and not content_stems(before) - CUE_STEMS:
            after, _, before = after.partition(",")  # "Because A, B"
        left, right = content_stems(before) - CUE_STEMS, content_stems(after) - CUE_STEMS
        if left and right:
            said = masked(sentence.lower, sentence.mentions)
            terms = set(MECHANISM_PATTERN.findall(said))
            if match.group("back"):
                found.append((sentence, left | right, left, right, terms))
            else:
                found.append((sentence, left, right, left, terms))
    return found


def _analytic(trace: _Trace) -> dict[str, bool]:
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
    found = set().union(*(s.findings for s in sentences)) if causal else set()
    explains = any(
        trace.case.findings_in(effect)
        and MECHANISM_PATTERN.search(" ".join(origin - trace.case.finding_stems))
        for _, _, effect, origin, _ in causal
    )
    chain = any(
        causal[i][2] & causal[j][1] for i in range(len(causal)) for j in range(i + 1, len(causal))
    )
    return {
        "A1_causal": len(causal) >= 2 and not denied,
        "A2_mechanism": len(terms) >= 2,
        "A3_explains": explains and len(found) >= min(2, len(trace.case.findings)),
        "A4_chain": len(causal) >= 2 and (chain or len(causal) >= 3),
    }


def _bayesian(trace: _Trace) -> dict[str, bool]:
    return read_updates(trace.sentences, trace.winner, trace.case.finding_stems)


def _lists(trace: _Trace) -> bool:
    listed = trace.listed
    return listed is not None and listed[2] >= min(3, max(2, len(trace.case.letters)))


def _marks(trace: _Trace) -> set[str]:
    """Guidelines a trace shows even a weak mark of; intuitive has none of its own."""
    marks = {"differential"} if _lists(trace) else set()
    if any(mechanism for *_, mechanism in trace.causal):
        marks.add("analytic")
    if any(PROBABILITY.search(s.lower) and re.search(r"\d", s.lower) for s in trace.sentences):
        marks.add("bayesian")
    return marks


_CRITERIA: dict[str, Callable[[_Trace], dict[str, bool]]] = {
    "differential": _differential,
    "intuitive": _intuitive,
    "analytic": _analytic,
    "bayesian": _bayesian,
}
_CORE = {
    "differential": ("D1_list", "D2_candidates", "D3_exclusion", "D3_support"),
    "intuitive": ("I1_association", "I3_economy"),
    "analytic": ("A1_causal", "A2_mechanism", "A3_explains", "A4_chain"),
    "bayesian": ("B1_prior", "B2_updates", "B3_numbers", "B6_highest"),
}


def _judge(trace: _Trace, guideline: str, gates: dict[str, bool]) -> Adherence:
    foreign = _marks(trace) - {guideline}
    gates = gates | {"single": len(foreign) < 2}
    criteria = _CRITERIA[guideline](trace)
    if guideline == "intuitive":
        gates["findings"] = len(trace.named) >= min(3, max(1, len(trace.case.findings)))
    else:
        criteria["focus"] = not any(all(_CRITERIA[name](trace).values()) for name in foreign)
    if not all(gates.values()):
        return Adherence(0.0, gates, criteria)
    score = sum(criteria.values()) / len(criteria)
    core = all(criteria[name] for name in _CORE[guideline])
    return Adherence(score if core else CORE_PENALTY * score, gates, criteria)


def _prepare(
    think: str,
    question: str,
    options: Mapping[str, str] | None,
    answer: str | None,
    findings: tuple[str, ...],
) -> tuple[_Trace, dict[str, bool]]:
    letter = None
    if options:
        pairs = tuple(options.items())
        if answer is not None:
            letter = answer if answer in options else match_option(answer, options)
    else:  # an open question: the answer itself is the one hypothesis known by name
        pairs = (("=", answer),) if answer else ()
        letter = "=" if answer else None
    trace = _read(think, read_case(question, pairs, tuple(findings)))
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
    ``findings`` are further phrases that count as findings, such as the image's description.
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
