"""A reasoning text as the guidelines' criteria read it: what it concludes, lists and explains."""

from __future__ import annotations

import dataclasses
import functools
import re

from mmedx_fast.guideline_lexicon import (
    CAUSE,
    CLAUSE,
    CONCLUDE,
    CUE_STEMS,
    EXCLUDE,
    LIST_CUE,
    MECHANISM_PATTERN,
    NEGATED,
    affirmed,
)
from mmedx_fast.guideline_text import (
    WORD,
    Case,
    Mention,
    Sentence,
    bullet_items,
    content_stems,
    masked,
    numbered_items,
    read_sentences,
)

# A causal sentence: stems of its cause and topic, of its effect, of its cause alone, mechanism terms.
Causal = tuple[Sentence, set[str], set[str], set[str], set[str]]


@dataclasses.dataclass
class Trace:
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


def concluded(sentence: Sentence, cue: re.Pattern[str]) -> str | None:
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


def read_trace(think: str, case: Case) -> Trace:
    """Read ``think`` as an argument about ``case``."""
    sentences = read_sentences(think, case)
    end, winner = -1, None
    length = sum(len(s.text) for s in sentences)
    done = 0
    for index, sentence in enumerate(sentences):
        done += len(sentence.text)
        late = index == len(sentences) - 1 or done > 0.7 * length
        if late and (letter := concluded(sentence, CONCLUDE)) is not None:
            end, winner = index, letter
    return Trace(think, WORD.findall(think.lower()), case, sentences, end, winner)


def _candidate_list(trace: Trace) -> tuple[int, set[str], int] | None:
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


def _causal(trace: Trace) -> list[Causal]:
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
