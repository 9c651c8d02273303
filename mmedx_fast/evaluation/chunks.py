"""The questions of a set, asked chunk by chunk: memory does not grow with the set, and a killed evaluation goes
on behind the last question that was answered.

Under a launcher every rank reads the set, opens the images of its share and asks it (rank 0 asks all where one
server serves all ranks); rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmedx_fast import ranks
from mmedx_fast.data.images import ImageError
from mmedx_fast.data.loaders import Rejected
from mmedx_fast.data.records import Record
from mmedx_fast.evaluation.asking import Asking
from mmedx_fast.evaluation.journal import Journal, JournalError, entries
from mmedx_fast.evaluation.rows import prediction_row
from mmedx_fast.progress import progress
from mmedx_fast.prompts import PromptBuilder, PromptError, Question
from mmedx_fast.rollout.base import Request, Rollout, RolloutEngine

_THREADS = 8
Outcome = tuple[int, str, dict[str, Any]]
"""A question's number, ``row`` or ``reject``, and what is written of it."""
Prepared = tuple[int, Record, "Future[Question | Rejected] | None"]
"""A question's number, its record, and the question in the making where this rank asks it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questioner:
    """What asks: an engine with its model served, the prompts' builder, and how.

    ``must_fit``: guidelines whose prompts, beside those asked, a question must have room for.
    """

    engine: RolloutEngine
    builder: PromptBuilder
    asking: Asking
    chunk_size: int = 512
    must_fit: tuple[str | None, ...] = ()

    def answer(
        self,
        records: Iterable[Record],
        set_name: str,
        journal: Path,
        fingerprint: str,
        *,
        total: int | None = None,
        description: str = "Asking",
    ) -> None:
        """Ask all ``records`` that ``journal`` has no answer of and write the answers there.

        ``fingerprint``: of all that the answers depend on; ``total``: how many records there are, for the
        progress bar. Every rank calls it. Raises ``JournalError`` when the journal belongs to other settings or
        other questions.
        """
        opened: list[Journal] = []
        ranks.main_only(lambda: opened.append(Journal(journal, fingerprint)))
        done: int = ranks.from_main(opened[0].count if opened else None)
        try:
            left = _behind(records, done, journal if opened else None)
            with progress(total, description, unit="question", start=done) as bar:
                for chunk in self._chunks(left, done):
                    began = time.perf_counter()
                    outcomes = self._ask(chunk, set_name, bar)
                    if opened:
                        _write(opened[0], outcomes, time.perf_counter() - began)
        finally:
            for file in opened:
                file.close()

    def _chunks(self, records: Iterator[Record], first: int) -> Iterator[list[Prepared]]:
        """Chunks whose images are being opened; those of the next one while this one is asked."""
        numbered = enumerate(records, first)
        ahead: list[Prepared] | None = None
        pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "images")
        try:
            while chunk := list(itertools.islice(numbered, self.chunk_size)):
                made = [
                    (n, record, pool.submit(self._open, record) if self._own(n) else None)
                    for n, record in chunk
                ]
                if ahead is not None:
                    yield ahead
                ahead = made
            if ahead is not None:
                yield ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _own(self, number: int) -> bool:
        """Whether this rank asks the question."""
        if self.engine.shared:
            return ranks.is_main()
        return number % ranks.world_size() == ranks.rank()

    def _open(self, record: Record) -> Question | Rejected:
        try:
            return self.builder.question(record)
        except (PromptError, ImageError) as error:
            return unusable(record, error)

    def _ask(self, chunk: list[Prepared], set_name: str, bar: progress) -> list[Outcome]:
        """Every rank's outcomes of a chunk, by number."""
        own: list[Outcome] = []
        asked: list[tuple[int, Question]] = []
        for number, record, future in chunk:
            if future is None:
                continue
            question = future.result()
            if isinstance(question, Question):
                try:
                    for guideline in (*self.asking.guidelines(number), *self.must_fit):
                        question.prompt_ids(guideline)
                    asked.append((number, question))
                    continue
                except PromptError as error:
                    question = unusable(record, error)
            own.append((number, "reject", dataclasses.asdict(question)))
        own += self._answers(asked, set_name, bar)
        shares = ranks.all_gather(own)
        outcomes = sorted((outcome for share in shares for outcome in share), key=lambda o: o[0])
        bar.update(chunk[-1][0] + 1 - bar.done)
        return outcomes

    def _answers(
        self, asked: list[tuple[int, Question]], set_name: str, bar: progress
    ) -> list[Outcome]:
        requests: list[Request] = []
        owners: list[int] = []
        for place, (number, question) in enumerate(asked):
            for guideline in self.asking.guidelines(number):
                requests.append((question, guideline))
                owners.append(place)
        if not requests:
            return []
        before = bar.done

        def show(finished: int, sequences: int) -> None:
            bar.update(before + finished * len(asked) // sequences - bar.done)

        rollouts: list[list[Rollout]] = [[] for _ in asked]
        for rollout in self.engine.generate_requests(requests, self.asking.sampling, show):
            rollouts[owners[rollout.question]].append(rollout)
        bare = self.asking.prompt == "medevalkit"
        return [
            (number, "row", prediction_row(question.record, set_name, found, bare=bare))
            for (number, question), found in zip(asked, rollouts, strict=True)
        ]


def unusable(record: Record, error: PromptError | ImageError) -> Rejected:
    """The note of a question that cannot be asked."""
    return Rejected(
        file=str(record.images[0]) if record.images else "",
        row=0,
        id=record.id,
        field="images" if isinstance(error, ImageError) else "prompt",
        value="",
        reason=str(error),
    )


def _write(journal: Journal, outcomes: list[Outcome], seconds: float) -> None:
    for number, kind, value in outcomes:
        assert number == journal.count, f"question {number} is written as {journal.count}"
        journal.add(kind, value)  # type: ignore[arg-type]
    journal.add_time(seconds)
    journal.flush()


def _behind(records: Iterable[Record], done: int, journal: Path | None) -> Iterator[Record]:
    """The records after the first ``done``, which must be those that the journal has outcomes of."""
    left = iter(records)
    written: Iterator[Any] = entries(journal) if journal and done else itertools.repeat(None)
    passed = 0
    for record, entry in zip(itertools.islice(left, done), written, strict=False):
        passed += 1
        if entry is not None and (found := json.loads(entry[2])["id"]) != record.id:
            raise JournalError(
                f"{journal}: question {entry[1]} was {found!r} and is now {record.id!r}: the data has changed "
                "since this evaluation began; delete the file to begin again"
            )
    if passed < done:
        raise JournalError(
            f"{journal}: {done} questions were asked and the data now has {passed}: it has changed since "
            "this evaluation began; delete the file to begin again"
        )
    return left
