"""Peak memory of one call beyond what was there before it, its outputs included.

Read from the allocator: on CUDA its own peak, on a CPU the allocations and releases that the profiler
records. A Triton kernel under the interpreter works in numpy's memory, which neither sees.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def watched(call: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What ``call`` returns, and the most bytes it held at once on top of what was held before."""
    if device.type != "cuda":
        return _profiled(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before


def _profiled(call: Callable[[], T]) -> tuple[T, int]:
    from torch.profiler import ProfilerActivity, profile

    # The profiler sees the whole process: what earlier work left for the collector must not be found
    # during the call, and counted as freed by it.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as record:
            out = call()
    finally:
        if collecting:
            gc.enable()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return out, peak


def free_bytes(device: torch.device) -> int:
    """Bytes a call may still take: of the device, or of this machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0])
