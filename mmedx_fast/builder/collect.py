"""Questions by guidelines by attempts, until each has a trace or the numbers asked for are met.

Work goes in waves of questions and, within a wave, in rounds of attempts: everything is asked once, then what
did not pass a second time, and so on. What happens depends on the answers alone, not on the order in which
they arrive, so that a build that was killed goes on to the same data.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mmedx_fast.builder.config import BuildConfig
from mmedx_fast.builder.journal import Journal
from mmedx_fast.builder.sources import Candidate, Dropped
from mmedx_fast.builder.teacher import Ask, Ledger, QuestionError, Reply, Teacher, make_ask
from mmedx_fast.builder.trace_filters import judge
from mmedx_fast.data.records import SPECIALTIES
from mmedx_fast.progress import progress


@dataclasses.dataclass(frozen=True)
class Trace:
    """One that passed, with where it came from."""

    text: str
    attempt: int
    adherence: float
    key: str
    model: str


@dataclasses.dataclass
class Outcome:
    """What became of a question that was taken up: traces by guideline, what was dropped, and which
    guidelines have an attempt that could not be asked (``missing``)."""

    candidate: Candidate
    guidelines: tuple[str, ...]
    """Those of the present wave."""
    earlier: tuple[str, ...] = ()
    traces: dict[str, Trace] = dataclasses.field(default_factory=dict)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    attempts: int = 0

    def drop(
        self, reason: str, evidence: dict[str, Any], guideline: str, attempt: int, text: str | None
    ) -> None:
        self.dropped.append(
            Dropped(
                self.candidate.record,
                self.candidate.source,
                reason,
                evidence,
                guideline,
                attempt,
                text,
            )
        )


@dataclasses.dataclass(frozen=True)
class Collected:
    """``outcomes`` of the questions taken up and ``left`` those that were not needed, in source order."""

    outcomes: list[Outcome]
    left: list[Candidate]


class Collector:
    """Brings a teacher, its journal and the filters together."""

    def __init__(
        self, cfg: BuildConfig, journal: Journal, ledger: Ledger, teacher: Teacher | None
    ) -> None:
        """``teacher`` None: only what the journal holds is used."""
        self._cfg, self._journal, self._ledger, self._teacher = cfg, journal, ledger, teacher

    def collect(self, candidates: Sequence[Candidate], limit: int | None = None) -> Collected:
        """Take up questions until the balance's numbers are met, none is left, or ``limit`` were."""
        order = {candidate.record.id: n for n, candidate in enumerate(candidates)}
        pool = shuffled(candidates, self._cfg.seed)
        unasked: list[Candidate] = []
        if self._teacher is None:
            unasked = [candidate for candidate in pool if not self._was_asked(candidate)]
            pool = [candidate for candidate in pool if self._was_asked(candidate)]
        outcomes: list[Outcome] = []
        while wave := self._further(outcomes) or self._next(pool, outcomes, limit):
            taken = {outcome.candidate.record.id for outcome in wave}
            pool = [candidate for candidate in pool if candidate.record.id not in taken]
            for attempt in range(self._cfg.teacher.attempts):
                self._round(wave, attempt)
            outcomes += [outcome for outcome in wave if not outcome.earlier]
        outcomes.sort(key=lambda outcome: order[outcome.candidate.record.id])
        left = sorted(pool + unasked, key=lambda candidate: order[candidate.record.id])
        return Collected(outcomes, left)

    def kept(self, outcome: Outcome) -> bool:
        return len(outcome.traces) >= self._cfg.min_guidelines

    def _was_asked(self, candidate: Candidate) -> bool:
        return any(
            ask_of(candidate, g, 0, self._cfg).key in self._journal for g in self._cfg.guidelines
        )

    def _further(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Kept questions to ask under a further guideline, whose number their first wave left open."""
        traces = self._traces(outcomes)
        wave = []
        for outcome in filter(self.kept, outcomes):
            asked = outcome.earlier + outcome.guidelines
            more = tuple(g for g in self._wanted(traces) if g not in asked)
            if more:
                traces.update(more)
                outcome.earlier, outcome.guidelines = asked, more
                wave.append(outcome)
        return wave

    def _next(
        self, pool: Sequence[Candidate], outcomes: Sequence[Outcome], limit: int | None
    ) -> list[Outcome]:
        """As many new questions as would meet the numbers if all of their traces passed."""
        kept = [outcome for outcome in outcomes if self.kept(outcome)]
        questions = collections.Counter(o.candidate.record.specialty for o in kept)
        traces = self._traces(outcomes)
        numbers = self._cfg.balance.questions
        room = len(pool) if limit is None else max(0, limit - len(outcomes))
        wave: list[Outcome] = []
        for candidate in pool:
            wanted = self._wanted(traces)
            # A question that cannot be kept is not worth its price.
            if len(wave) == room or len(wanted) < self._cfg.min_guidelines:
                break
            specialty = candidate.record.specialty or ""
            if specialty in numbers and questions[specialty] >= numbers[specialty]:
                continue
            questions[specialty] += 1
            traces.update(wanted)
            wave.append(Outcome(candidate, wanted))
        return wave

    def _traces(self, outcomes: Sequence[Outcome]) -> collections.Counter[str]:
        """Kept traces by guideline."""
        return collections.Counter(g for o in outcomes if self.kept(o) for g in o.traces)

    def _wanted(self, traces: collections.Counter[str]) -> tuple[str, ...]:
        """Guidelines of which there are too few."""
        numbers = self._cfg.balance.traces
        names = self._cfg.guidelines
        return tuple(g for g in names if g not in numbers or traces[g] < numbers[g])

    def _round(self, wave: Sequence[Outcome], attempt: int) -> None:
        """Ask what has no trace yet, then judge all answers in the order of the questions."""
        cfg = self._cfg.teacher
        asks = [
            (outcome, ask_of(outcome.candidate, guideline, attempt, self._cfg))
            for outcome in wave
            for guideline in outcome.guidelines
            if guideline not in outcome.traces and guideline not in outcome.missing
        ]
        errors = self._ask([ask for _, ask in asks if ask.key not in self._journal], attempt)
        for outcome, ask in asks:
            if ask.key not in self._journal:
                reason = errors.get(ask.key)
                outcome.missing[ask.guideline] = "not_asked" if reason is None else "teacher"
                outcome.drop(
                    outcome.missing[ask.guideline],
                    {} if reason is None else {"problem": reason},
                    ask.guideline,
                    attempt + 1,
                    None,
                )
                continue
            entry = self._journal.get(ask.key)
            outcome.attempts += 1
            verdict = judge(
                entry["text"],
                ask.record,
                ask.guideline,
                self._cfg.filters,
                revealed=cfg.reveal_answer,
            )
            if verdict.reason is None:
                outcome.traces[ask.guideline] = Trace(
                    verdict.trace, attempt + 1, verdict.adherence, ask.key, entry.get("model", "")
                )
            else:
                evidence = verdict.evidence | {"finish_reason": entry.get("finish_reason")}
                outcome.drop(verdict.reason, evidence, ask.guideline, attempt + 1, entry["text"])

    def _ask(self, asks: Sequence[Ask], attempt: int) -> dict[str, str]:
        """Have the teacher answer into the journal; key -> message of those that got no answer."""
        errors: dict[str, str] = {}
        if not asks or self._teacher is None:
            return errors
        label = f"Asking the teacher, attempt {attempt + 1} of {self._cfg.teacher.attempts}"
        with progress(len(asks), label, unit="answer") as bar:

            def on_reply(ask: Ask, reply: Reply) -> None:
                self._journal.append(
                    {"key": ask.key, "id": ask.record.id, "guideline": ask.guideline}
                    | {"attempt": ask.attempt + 1}
                    | dataclasses.asdict(reply)
                )
                bar.update(1, **self._running())

            def on_error(ask: Ask, error: QuestionError) -> None:
                errors[ask.key] = str(error)
                bar.update(1, **self._running())

            self._teacher.ask(asks, on_reply, on_error)
        return errors

    def _running(self) -> dict[str, Any]:
        ledger = self._ledger
        fields: dict[str, Any] = {"in": f"{ledger.tokens_in:,}", "out": f"{ledger.tokens_out:,}"}
        if self._cfg.teacher.price_input or self._cfg.teacher.price_output:
            fields["spent"] = ledger.money(ledger.spent)
        return fields


def ask_of(candidate: Candidate, guideline: str, attempt: int, cfg: BuildConfig) -> Ask:
    return make_ask(
        candidate.record,
        [image.digest for image in candidate.images],
        sum(min(image.pixels, cfg.teacher.max_pixels) for image in candidate.images),
        guideline,
        attempt,
        cfg.teacher,
    )


def shuffled(candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """An order drawn by ``seed`` in which the specialties take turns."""
    drawn = list(candidates)
    random.Random(seed).shuffle(drawn)
    names = dict.fromkeys([*SPECIALTIES, *(c.record.specialty for c in drawn)])
    by_specialty = [[c for c in drawn if c.record.specialty == name] for name in names]
    return [c for turn in itertools.zip_longest(*by_specialty) for c in _present(turn)]


def _present(turn: Sequence[Candidate | None]) -> Iterator[Candidate]:
    return (candidate for candidate in turn if candidate is not None)
