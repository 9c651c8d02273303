"""One op at one shape: correctness of every provider first, then memory, then interleaved times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import timing
from bench.memory import free_bytes, watched
from bench.ours import path_of
from bench.registry import FLOOR, OURS, Call, Case, Op, Outputs, Provider, Shape, compare
from bench.saved import saved_for_backward

# A call slower than this is neither warmed up nor called once more for its memory.
SLOW_SECONDS = 2.0
# No peer is begun after this part of a shape's time; the rest is for timing.
CHECK_SHARE = 0.7


@dataclass(frozen=True)
class Settings:
    """What the command line fixes for every op and shape."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    rounds: int = 50
    providers: tuple[str, ...] = ()
    """Only peers whose name contains one of these; empty takes all. Ours and the floor always run."""

    def wants(self, provider: Provider) -> bool:
        named = any(name.lower() in provider.name.lower() for name in self.providers)
        return provider.kind != "peer" or not self.providers or named


@dataclass
class _Entry:
    """A provider on its way through a shape."""

    provider: Provider
    status: str = "ok"
    call: Call | None = None
    making: float = 0.0
    """Seconds its make took: imports, mostly. They do not count against the shape."""
    seconds: float = 0.0
    """Of one call."""
    peak: int = 0
    saved: int | None = None
    """Bytes kept for backward, where the op asks for them."""
    errors: dict[str, float] = field(default_factory=dict)
    times: timing.Times | None = None


def measure(op: Op, shape: Shape, settings: Settings, seconds: float) -> dict[str, Any]:
    """The row of results of one shape, as written to JSON. ``seconds`` is what it may take.

    The row's ``failed`` says why it holds no times, if ours did not hold its bounds.
    """
    case = Case(shape.sizes, settings.device, settings.dtype, settings.seed)
    inputs = op.inputs(case)
    reference = op.reference(inputs)
    gc.collect()
    begun = time.perf_counter()
    entries: list[_Entry] = []
    for provider in op.ordered():
        if not settings.wants(provider):
            continue
        spent = time.perf_counter() - begun - sum(e.making for e in entries)
        entries.append(_Entry(provider))
        _prepare(entries[-1], op, case, inputs, reference, spent > CHECK_SHARE * seconds)
        if provider.kind == OURS and entries[-1].status != "ok":
            break
    failed = entries[0].status if entries[0].status != "ok" else ""
    if not failed:
        left = max(seconds - (time.perf_counter() - begun), 0.2 * seconds)
        clock = timing.Clock(settings.device, op.process_time)
        _time([e for e in entries if e.call is not None], settings, left, clock)
    return _row(op, shape, settings, entries, failed)


def _prepare(
    entry: _Entry, op: Op, case: Case, inputs: Any, reference: Outputs, late: bool
) -> None:
    """Make the provider's call and check it, or say in ``status`` why not."""
    provider = entry.provider
    reason = provider.unavailable(case.device, case.sizes)
    needed = provider.memory(case.sizes, case.dtype.itemsize)
    if reason is None and needed and needed > 0.9 * free_bytes(case.device):
        reason = f"skipped: needs about {needed / 1e9:.0f} GB of memory"
    if reason is None and late and provider.kind not in (OURS, FLOOR):
        reason = "skipped: no time left"
    if reason is not None:
        entry.status = reason
        return
    try:
        start = time.perf_counter()
        call = provider.make(inputs)
        entry.making = time.perf_counter() - start
        start = time.perf_counter()
        out, entry.peak = watched(call, case.device)
        entry.seconds = time.perf_counter() - start
        if provider.kind != FLOOR:
            entry.errors, wrong = compare(out, reference, op.bounds, provider.limits)
            if wrong:
                entry.status = f"wrong: {'; '.join(wrong)}"
                return
        del out
        if op.saving is not None:
            with saved_for_backward(op.saving(inputs)) as saved:
                call()
            entry.saved = saved.peak
        if entry.seconds < SLOW_SECONDS:
            # again, without what only a first call allocates
            entry.peak = watched(call, case.device)[1]
    except torch.cuda.OutOfMemoryError:
        entry.status = "skipped: out of memory"
    except (
        Exception
    ) as error:  # a peer may fail in any way, and the others are still to be measured
        entry.status = f"failed: {type(error).__name__}: {_first_line(error)}"
    else:
        entry.call = call


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def _time(entries: list[_Entry], settings: Settings, seconds: float, clock: timing.Clock) -> None:
    begun = time.perf_counter()
    calls: dict[str, Callable[[], Any]] = {}
    for entry in entries:
        assert entry.call is not None
        calls[entry.provider.name] = entry.call
        if entry.seconds < SLOW_SECONDS:
            entry.seconds = timing.warm_up(entry.call, settings.device)
    left = max(seconds - (time.perf_counter() - begun), 0.5 * seconds)
    costs = {e.provider.name: e.seconds for e in entries}
    rounds = timing.rounds_for(costs, left, settings.rounds)
    found = timing.interleave(calls, rounds, clock)
    for entry in entries:
        entry.times = found[entry.provider.name]


def _row(
    op: Op, shape: Shape, settings: Settings, entries: list[_Entry], failed: str
) -> dict[str, Any]:
    flops, moved = op.flops(shape.sizes), op.bytes(shape.sizes, settings.dtype.itemsize)
    floor = next((e.times.median for e in entries if e.provider.kind == FLOOR and e.times), None)
    return {
        "shape": shape.name,
        "sizes": dict(shape.sizes),
        "tokens": shape.tokens,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "flops": flops,
        "bytes": moved,
        "path": path_of(op.dispatch, settings.device),
        "failed": failed,
        "providers": [_result(e, flops, floor) for e in entries],
    }


def _result(entry: _Entry, flops: float, floor: float | None) -> dict[str, Any]:
    provider, times = entry.provider, entry.times
    result: dict[str, Any] = {
        "name": provider.name,
        "kind": provider.kind,
        "note": provider.note,
        "status": entry.status,
        "judged": provider.limits is not None and provider.kind != FLOOR,
        "errors": entry.errors,
    }
    if times is not None:
        result |= {
            "median_ms": times.median,
            "p20_ms": times.p20,
            "p80_ms": times.p80,
            "calls": times.calls,
            "peak_bytes": entry.peak,
            "saved_bytes": entry.saved,
            "tflops": flops / times.median / 1e9 if provider.computes else None,
            "ratio_to_floor": None if floor is None else times.median / floor,
        }
    return result
