"""The rollout engine of every rank but the first where one server serves all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
    EngineStats,
    Progress,
    Request,
    Rollout,
    RolloutError,
    Sampling,
)

FOLDERS_ONLY = "a rollout server takes weights in folders only: use load_weights"


class ServerFollower(AsksByQuestion):
    """Makes nothing: rank 0 asks the servers for all ranks."""

    name = "server"
    shared = True
    takes_tensors = False

    def __init__(self) -> None:
        self.version = BASE_VERSION

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        if requests:
            raise RolloutError("rank 0 asks the rollout servers for all ranks")
        return []

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        self.version = BASE_VERSION if folder is None else version

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        self.version = version

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        raise RolloutError(FOLDERS_ONLY)

    def interrupt(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def reset_caches(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(
            requests=0, sequences=0, generated_tokens=0, seconds=0.0, prefix_cache_hit_rate=None
        )

    def close(self) -> None:
        pass
