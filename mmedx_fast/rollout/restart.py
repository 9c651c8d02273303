"""A rollout engine that is started anew when it fails, and asked again."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmedx_fast import ranks
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
    EngineError,
    EngineStats,
    Progress,
    Request,
    Rollout,
    RolloutEngine,
    RolloutError,
    Sampling,
)

LOG = logging.getLogger(__name__)
Answer = TypeVar("Answer")


Load = Callable[[RolloutEngine], None]
"""Gives an engine weights or an adapter."""


class Weights:
    """A model's tensors by name, to be gone through as often as an engine needs them."""

    def __init__(self, walk: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        self._walk = walk

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._walk()


class RestartingEngine(AsksByQuestion):
    """:class:`mmedx_fast.rollout.base.RolloutEngine` around another one.

    An engine that raises ``EngineError``, whatever it was asked, is closed; a new one gets the weights and
    the adapter that are wanted, and the same question. Seeds travel with the question, so the answer is the
    one that the first engine would have given. Errors of the input are raised at once.
    """

    def __init__(
        self,
        make: Callable[[], RolloutEngine],
        max_restarts: int,
        failure: Callable[[str], Exception] = RolloutError,
    ) -> None:
        """``make`` starts an engine. ``failure``: made of a message and raised when the engine has failed
        ``max_restarts`` + 1 times in a row."""
        self._make = make
        self._max_restarts = max_restarts
        self._failure = failure
        self._weights: Load | None = None
        self._adapter: Load | None = None
        self._closed = False
        self._engine: RolloutEngine | None = make()
        self.name, self.version = self._engine.name, self._engine.version
        self.shared, self.takes_tensors = self._engine.shared, self._engine.takes_tensors

    @property
    def _inner(self) -> RolloutEngine:
        if self._engine is None:
            raise RolloutError("the rollout engine is closed")
        return self._engine

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        return self._ask(lambda e: e.generate_requests(requests, sampling, progress))

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        def load(engine: RolloutEngine) -> None:
            engine.load_adapter(folder, version)

        self._serve(load, self._weights, load)

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        def load(engine: RolloutEngine) -> None:
            engine.load_weights(folder, version)

        self._serve(load, load, None)

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """``weights`` are gone through again for an engine that is started anew: see :class:`Weights`."""

        def load(engine: RolloutEngine) -> None:
            engine.update_weights(weights, version)

        self._serve(load, load, None)

    def _serve(self, load: Load, weights: Load | None, adapter: Load | None) -> None:
        """``load``; ``weights`` and then ``adapter`` are what a new engine is given from now on. What was
        served before stays wanted where ``load`` fails."""
        before = self._weights, self._adapter
        self._weights, self._adapter = weights, adapter
        try:
            self._ask(load, _nothing)
        except BaseException:
            self._weights, self._adapter = before
            raise
        self.version = self._inner.version

    def interrupt(self) -> None:
        if self._engine is not None:
            self._engine.interrupt()

    def sleep(self) -> None:
        self._ask(lambda engine: engine.sleep())

    def wake(self) -> None:
        self._ask(lambda engine: engine.wake(), _nothing)

    def reset_caches(self) -> None:
        self._ask(lambda engine: engine.reset_caches(), _nothing)

    def stats(self) -> EngineStats:
        return self._ask(lambda engine: engine.stats())

    def close(self) -> None:
        self._closed = True
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ask(
        self,
        ask: Callable[[RolloutEngine], Answer],
        anew: Callable[[RolloutEngine], Answer] | None = None,
    ) -> Answer:
        """``anew``: asked instead of an engine that was started here, with all that is wanted."""
        if self._closed:
            raise RolloutError("the rollout engine is closed")
        for left in reversed(range(self._max_restarts + 1)):
            try:
                if self._engine is None:
                    self._start()
                    ask = anew or ask
                return ask(self._inner)
            except EngineError as error:
                if ranks.world_size() > 1:
                    # Starting an engine is a collective, and the other ranks are elsewhere.
                    raise
                reason = str(error)
            # Outside the handler, because the error's traceback holds the engine.
            self._drop()
            if left:
                LOG.warning("%s: the rollout engine is started anew and asked again", reason)
        raise self._failure(
            f"the rollout engine failed {self._max_restarts + 1} times in a row "
            f"(rollout.max_restarts = {self._max_restarts}), the last time: {reason}"
        )

    def _start(self) -> None:
        """A new engine with all that is wanted. With ``EngineError`` it is left to be dropped."""
        try:
            self._engine = self._make()
            for load in (self._weights, self._adapter):
                if load is not None:
                    load(self._engine)
        except EngineError:
            raise
        except RolloutError as error:
            raise EngineError(f"the engine does not start again: {error}") from error
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            with _default_group_kept():
                engine.close()
        except Exception as error:  # what is left of a broken engine may break in any way
            LOG.warning("the failed rollout engine could not be closed in full: %s", error)
        del engine
        gc.collect()


def _nothing(_: RolloutEngine) -> None:
    """What a new engine is still to do where it has all that is wanted."""


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """In the block, torch.distributed's default group cannot be destroyed.

    vLLM destroys it as it closes, whoever made it, and the trainer's DeepSpeed engine lives on it.
    """
    import torch.distributed as dist

    destroy = dist.destroy_process_group

    def only_others(group: dist.ProcessGroup | None = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    dist.destroy_process_group = only_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
