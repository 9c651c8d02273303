"""One-step-ahead rollouts: a thread makes those of step s + 1 while step s trains.

They come from the adapter of step s - 1, which the engine serves until step s is over. Which adapter a
step's rollouts come from follows from the step's number alone: version max(0, s - 2) for step s. The
rollouts that wait for their step belong to the checkpoint, because the adapter they came from is gone by
then.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmedx_fast.prompts import Question
from mmedx_fast.rollout import Rollout
from mmedx_fast.stages.context import StageError

_STOP_SECONDS = 60.0
_KEPT = ("question", "guideline", "sample", "token_ids", "logprobs", "finish_reason", "text")


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step's rollouts and how they were made."""

    rollouts: list[Rollout]
    version: int
    """Version of the adapter they came from: the number of updates it had seen."""
    hit_rate: float | None
    """The prefix cache's, over these rollouts."""


Make = Callable[[int], Batch]
"""Makes the rollouts of a step with the adapter that the engine serves."""


class Ahead:
    """Rollouts by step: made now, under way, or waiting for their step.

    ``make`` runs in a thread of its own and must touch no collective, no random generator and no
    meter. ``cancel`` makes a running ``make`` raise soon.
    """

    def __init__(self, make: Make, cancel: Callable[[], None] = lambda: None) -> None:
        self._make, self._cancel = make, cancel
        self._batches: dict[int, Batch] = {}
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def start(self, step: int) -> None:
        """Begin with the rollouts of ``step`` in the background, unless they are there already."""
        self.wait()
        if step in self._batches:
            return
        self._step = step
        self._thread = threading.Thread(target=self._run, name=f"rollouts-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way: the engine is free then. Raises what ``make`` raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take(self, step: int) -> Batch:
        """The rollouts of ``step``, made now if nobody began them; they stay until a later step's
        are taken, for a step that is done again."""
        self.wait()
        self._batches = {s: batch for s, batch in self._batches.items() if s >= step}
        if step not in self._batches:
            self._batches[step] = self._make(step)
        return self._batches[step]

    def state(self, step: int) -> dict[str, Any] | None:
        """What :meth:`restore` needs to go on at ``step``: plain JSON; None when nothing waits for
        it."""
        self.wait()
        batch = self._batches.get(step)
        if batch is None:
            return None
        rows = [[getattr(rollout, name) for name in _KEPT] for rollout in batch.rollouts]
        return {
            "step": step,
            "version": batch.version,
            "hit_rate": batch.hit_rate,
            "fields": list(_KEPT),
            "rollouts": rows,
        }

    def restore(
        self,
        state: Mapping[str, Any] | None,
        step: int,
        questions: Sequence[Question],
        *,
        own: bool = True,
    ) -> None:
        """Put the rollouts of ``step`` back; prompts are made again from its ``questions``.

        ``own``: whether this rank made them. One that did not waits with none of them, as it did before.

        Raises StageError when the state is that of another step, or there is none.
        """
        if state is None or state["step"] != step:
            found = "none" if state is None else f"those of step {state['step']}"
            raise StageError(
                f"the checkpoint holds {found} of the rollouts that step {step} needs, and the adapter "
                "they came from is gone; delete this checkpoint to go on from the one before"
            )
        rollouts = []
        for row in state["rollouts"] if own else ():
            values = dict(zip(state["fields"], row, strict=True))
            prompt = questions[values["question"]].prompt_ids(values["guideline"])
            rollouts.append(Rollout(prompt_ids=prompt, **values))
        self._batches[step] = Batch(rollouts, state["version"], state["hit_rate"])

    def drop(self) -> None:
        """Give up what is under way; what waits for its step stays."""
        until = time.monotonic() + _STOP_SECONDS
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:
            self._cancel()  # which does nothing as long as it has not asked the engine
            self._thread.join(1.0)
        self._thread = self._error = None

    def close(self) -> None:
        """Give up everything."""
        self.drop()
        self._batches = {}

    def _run(self) -> None:
        try:
            self._batches[self._step] = self._make(self._step)
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
