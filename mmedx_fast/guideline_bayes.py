"""Following the probabilities of a Bayesian trace: prior, updates, posterior, by hypothesis."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from mmedx_fast.guideline_lexicon import NEGATED
from mmedx_fast.guideline_text import Mention, Sentence

_PRIOR = re.compile(
    r"\bprior(?! to\b)|\bpre-?test\b|\bbase[- ]?rate|\bprevalence|\b(?:initial|starting"
    r"|baseline) prob"
)
_POSTERIOR = re.compile(r"\bposterior|\bpost-?test|\b(?:final|updated|resulting) (?:prob|estimate)")
_NUMBER = re.compile(
    r"(?<![\w.])(-?\d+(?:\.\d+)?)(?:\s*[-\u2013]\s*(\d+(?:\.\d+)?))?\s*(?:%|per ?cent\b)"
)
_DECIMAL = re.compile(
    r"(?<![\w.])(0?\.\d+|1\.0+)(?![\d%])(?!\s*(?:[mnpk]?g|[mck]?m|m?l|[mn]mol|u|iu|mmhg|\u00b0"
    r"|\u00b5)\b|\s*/)"
)
_DIRECTION = re.compile(
    r"\b(?:(?P<up>increas\w*|rais(?:e[sd]?|ing)|ris(?:es?|ing)|rose|boost\w*|climb\w*|up|lift\w*"
    r"|jump\w*|elevat\w*|bump\w*|strengthen\w*|grow\w*|higher)|(?P<down>lower\w*|reduc\w*|decreas\w*|drop\w*|falls?"
    r"|falling|fell|down|diminish\w*|shrink\w*|weaken\w*|cuts?)|(?P<any>updat\w*|revis\w*|chang\w*"
    r"|becom\w*|shift\w*|bring\w*|brought|mov(?:e[sd]?|ing)|push(?:e[sd]|ing)?|tak(?:e[ns]?|ing)|took"
    r"|driv(?:e[ns]?|ing)|drove|sen(?:ds?|ding|t)|adjust\w*|likelihood ratio|lr))\b"
)
_FROM = re.compile(r"\bfrom\s+(?:about\s+|around\s+|roughly\s+)?$")
_BY = re.compile(r"\bby\s+(?:about\s+|around\s+|roughly\s+)?$")
_AFTER = re.compile(r"\s*(?:for|of|that|chance of|probability of)\b[^,;]{0,20}$")
_SLACK = 5.0


@dataclasses.dataclass
class _Stated:
    """One number of a sentence, in percent: its hypothesis ("" = unnamed), direction, and role."""

    value: float
    letter: str
    direction: str  # "up", "down", "any", "taken back" or ""
    role: str  # "to", "from" or "by"


def _numbers(sentence: Sentence) -> list[tuple[float, int, int]]:
    found = []
    for match in _NUMBER.finditer(sentence.lower):
        low, high = float(match.group(1)), match.group(2)
        found.append(((low + float(high)) / 2 if high else low, match.start(), match.end()))
    if not found:
        for match in _DECIMAL.finditer(sentence.lower):
            found.append((100.0 * float(match.group(1)), match.start(), match.end()))
    return found


def _stated(sentence: Sentence) -> Iterator[_Stated]:
    """The numbers in order; verb and hypothesis are the last before the number, else carried over
    from the number before, else (hypothesis) named right after it: "30 % for X"."""
    start, letter, direction = 0, "", ""
    used: set[int] = set()
    for value, begin, end in _numbers(sentence):
        before = sentence.lower[start:begin]
        named = [m for m in sentence.mentions if start <= m.start < begin and id(m) not in used]
        following = _named_after(sentence, end)
        if named:
            letter = named[-1].letter
        elif following is not None:
            letter = following.letter
            used.add(id(following))
        verbs = list(_DIRECTION.finditer(before))
        if verbs:
            back = NEGATED.search(before, max(0, verbs[-1].start() - 40), verbs[-1].start())
            direction = "taken back" if back else verbs[-1].lastgroup or ""
        role = "from" if _FROM.search(before) else "by" if _BY.search(before) else "to"
        yield _Stated(value, letter, direction, role)
        start = end


def _named_after(sentence: Sentence, end: int) -> Mention | None:
    for mention in sentence.mentions:
        if mention.start >= end:
            return mention if _AFTER.fullmatch(sentence.lower[end : mention.start]) else None
    return None


class _Ledger:
    """The current probability of each hypothesis while the sentences go by."""

    def __init__(self, winner: str | None) -> None:
        self.winner = winner
        self.priors: dict[str, float] = {}  # the first value of each hypothesis
        self.opening: dict[str, float] = {}  # those called priors, which must fit together
        self.values: dict[str, float] = {}
        self.updated: dict[str, float] = {}
        self.findings: set[int] = set()
        self.evidence: set[str] = set()  # content words of the sentences that move a number
        self.focus = ""
        self.valid = True
        self.update_sentences = 0
        self.last_update = -1
        self.posterior_at = -1
        self.posterior_sum_ok = True

    def read_prior(self, sentence: Sentence) -> None:
        for number in _stated(sentence):
            if number.letter:
                self.valid &= 0.0 <= number.value <= 100.0
                self.priors.setdefault(number.letter, number.value)
        self.opening.update(self.priors)
        self.values.update(self.priors)
        self.focus = self.winner if self.winner in self.priors else next(iter(self.priors), "")

    def read_update(self, index: int, sentence: Sentence) -> None:
        posterior = bool(_POSTERIOR.search(sentence.lower))
        moved = False
        told: dict[str, float] = {}
        for number in _stated(sentence):
            letter = number.letter or self.focus
            if letter not in self.values:
                self.valid &= 0.0 <= number.value <= 100.0
                self.priors[letter] = self.values[letter] = told[letter] = number.value
                if _PRIOR.search(sentence.lower):
                    self.opening[letter] = number.value
            elif number.direction or posterior:
                moved |= self._move(letter, number, posterior)
                told[letter] = self.values[letter]
        if told:  # what "it" means from here on: the winner if it was named, else the last named
            self.focus = self.winner if self.winner in told else list(told)[-1]
        if moved and sentence.findings - self.findings:  # evidence counts once
            self.update_sentences += 1
            self.findings |= sentence.findings
            self.evidence |= sentence.stems
        if moved:
            self.last_update = index
        if posterior and told:
            self.posterior_sum_ok &= sum(told.values()) <= 100.0 + _SLACK
            letters = sentence.letters
            if self.winner in letters or (not letters and self.focus == self.winner):
                self.posterior_at = index

    def _move(self, letter: str, number: _Stated, posterior: bool) -> bool:
        """Apply one number; False if it only restates. Wrong moves clear ``valid``."""
        now, value = self.values[letter], number.value
        if number.direction == "taken back":  # "does not raise it to 50 %"
            self.valid = False
            return False
        if number.role == "from":
            self.valid &= abs(value - now) <= 1.0
            return False
        if number.role == "by" and number.direction in ("up", "down"):
            value = now + value if number.direction == "up" else now - value
        self.valid &= 0.0 <= value <= 100.0
        net = now - self.priors[letter]
        if posterior and abs(value - now) <= _SLACK:
            return False
        if posterior and not number.direction:
            self.valid &= (value - now) * net > 0
        elif number.direction == "up":
            self.valid &= value > now
        elif number.direction == "down":
            self.valid &= value < now
        else:
            self.valid &= value != now
        self.values[letter] = self.updated[letter] = value
        return value != now


def read_updates(
    sentences: Sequence[Sentence], winner: str | None, findings: frozenset[str]
) -> dict[str, bool]:
    """Criteria B1 to B6 of :mod:`mmedx_fast.guidelines`; the trace concludes on ``winner``, and
    ``findings`` are the stems of the findings' words."""
    ledger = _Ledger(winner)
    for index, sentence in enumerate(sentences):
        if not _numbers(sentence):
            continue
        if ledger.priors:
            ledger.read_update(index, sentence)
        elif _PRIOR.search(sentence.lower) and sentence.mentions:
            ledger.read_prior(sentence)
    prior = bool(ledger.priors)
    sums = (ledger.opening, ledger.updated)
    changed = any(ledger.values[letter] != ledger.priors[letter] for letter in ledger.values)
    return {
        "B1_prior": prior,
        "B2_updates": ledger.update_sentences >= 2
        and len(ledger.evidence & findings) >= min(3, len(findings)),
        "B3_numbers": prior and ledger.valid and changed,
        "B4_posterior": ledger.posterior_at >= max(ledger.last_update, 0)
        and ledger.last_update >= 0,
        "B5_sums": prior
        and ledger.posterior_sum_ok
        and all(sum(values.values()) <= 100.0 + _SLACK for values in sums),
        "B6_highest": prior
        and winner in ledger.values
        and ledger.values[winner] == max(ledger.values.values()),
    }
