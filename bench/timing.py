"""Interleaved timing: every provider once a round, in an order that turns, on a cold L2 cache.

On CUDA each call stands between two events, and the host waits once a round. On a CPU the wall
clock, or the process's own, is read around each call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
# Calls before the first that counts: the most, the fewest, and what they may take together.
WARM_UP, WARM_UP_LEAST, WARM_UP_SECONDS = 10, 3, 0.5
# Rounds from which the first is left out: the caches still hold what came before.
DISCARDING = 6


@dataclass(frozen=True)
class Times:
    """Milliseconds of the calls of one provider."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        return cls(
            statistics.median(samples), quantile(samples, 0.2), quantile(samples, 0.8), len(samples)
        )


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between order statistics. Raises ValueError for no sample."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class Clock:
    """Starts and stops a measurement on one device."""

    def __init__(self, device: torch.device, process_time: bool = False) -> None:
        self._now = time.process_time if process_time else time.perf_counter
        self.cuda = device.type == "cuda"
        self._pending: list[tuple[str, Any, Any]] = []
        self._flush: torch.Tensor | None = None
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * max(cache, 1 << 25), dtype=torch.int8, device=device)

    def once(self, name: str, call: Call) -> None:
        """One call from a cold cache; its time comes out of :meth:`collect`."""
        if self._flush is None:
            start = self._now()
            call()
            self._pending.append((name, start, self._now()))
            return
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self._pending.append((name, begin, end))

    def collect(self) -> list[tuple[str, float]]:
        """(name, milliseconds) of the calls since the last time; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            found = [(name, begin.elapsed_time(end)) for name, begin, end in self._pending]
        else:
            found = [(name, 1e3 * (end - begin)) for name, begin, end in self._pending]
        self._pending.clear()
        return found


def order(names: list[str], turn: int) -> list[str]:
    """The names rotated by ``turn``: over len(names) rounds each stands once in every place."""
    at = turn % len(names) if names else 0
    return names[at:] + names[:at]


def warm_up(call: Call, device: torch.device) -> float:
    """Call until :data:`WARM_UP` calls or :data:`WARM_UP_SECONDS` have passed; seconds of the quickest."""
    best = math.inf
    begun = time.perf_counter()
    for done in range(WARM_UP):
        if done >= WARM_UP_LEAST and time.perf_counter() - begun > WARM_UP_SECONDS:
            break
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def rounds_for(seconds: Mapping[str, float], budget: float, most: int) -> dict[str, int]:
    """How many rounds each provider takes part in, from the seconds of one call.

    Everyone gets the same share of the budget: a call of 10 s is made once or twice and does not
    take the others' rounds. At least 1, at most ``most``.
    """
    share = budget / max(len(seconds), 1)
    return {n: int(min(most, max(1, share / max(s, 1e-9)))) for n, s in seconds.items()}


def interleave(
    calls: Mapping[str, Call], rounds: Mapping[str, int], clock: Clock
) -> dict[str, Times]:
    """Time every call in turn, each for its number of rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(rounds.values(), default=0)):
        for name in order([n for n in calls if rounds[n] > turn], turn):
            clock.once(name, calls[name])
        for name, milliseconds in clock.collect():
            samples[name].append(milliseconds)
    return {n: Times.of(x[1:] if len(x) >= DISCARDING else x) for n, x in samples.items()}
