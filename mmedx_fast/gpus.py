"""GPUs a plan can be made for: published peaks, and an hourly price to multiply by. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmedx_fast.config import RolloutConfig

COMPUTE_SHARE = 0.40
"""Part of the dense bf16 peak that training sustains."""
BANDWIDTH_SHARE = 0.50
"""Part of the peak memory bandwidth that decoding sustains."""
USABLE_SHARE = 0.94
"""Part of the memory that is left by the CUDA context and by fragmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, by its data sheet; the price is an assumption."""

    name: str
    memory: int
    """Bytes."""
    peak_tflops: float
    """Dense bf16 with float32 accumulation."""
    peak_bandwidth: float
    """TB/s."""
    dollars_per_hour: float
    """About what clouds ask for one by the hour; ``mmedx plan --price`` takes yours."""

    @property
    def tflops(self) -> float:
        """Sustained, by :data:`COMPUTE_SHARE`."""
        return COMPUTE_SHARE * self.peak_tflops

    @property
    def bandwidth(self) -> float:
        """Sustained TB/s, by :data:`BANDWIDTH_SHARE`."""
        return BANDWIDTH_SHARE * self.peak_bandwidth

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return USABLE_SHARE * self.memory


def _gpu(name: str, gb: int, tflops: float, bandwidth: float, price: float) -> Gpu:
    return Gpu(
        name=name,
        memory=gb * 10**9,
        peak_tflops=tflops,
        peak_bandwidth=bandwidth,
        dollars_per_hour=price,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 2.04, 1.8),
        _gpu("h100", 80, 989, 3.35, 2.8),
        _gpu("h200", 141, 989, 4.8, 3.5),
        _gpu("b200", 180, 2250, 7.7, 5.5),
        _gpu("l40s", 48, 362, 0.864, 0.9),
        _gpu("rtx4090", 24, 165, 1.01, 0.4),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in any case. Raises ValueError naming the known ones."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ValueError(f"gpu {name!r} is unknown; choose from {', '.join(GPUS)}")
    return gpu


def match_gpu(device: str) -> Gpu | None:
    """The GPU that a driver's name means ("NVIDIA H100 80GB HBM3"), None where it is not in the table.

    A name that says another form than the one in the table (PCIe, NVL) has other peaks: None.
    """
    words = device.lower().replace("rtx ", "rtx").replace("-", " ").split()
    if {"pcie", "nvl", "laptop"} & set(words):
        return None
    return next((GPUS[word] for word in words if word in GPUS), None)


def engine_gpus(rollout: RolloutConfig, ranks: int) -> int:
    """GPUs that the rollout engine holds beside those of ``ranks`` training processes, as far as the
    configuration says: servers elsewhere are taken to have ``tensor_parallel_size`` each."""
    if rollout.server_urls:
        return len(rollout.server_urls) * rollout.tensor_parallel_size
    if rollout.server_gpus is None:
        return max(0, rollout.tensor_parallel_size - ranks)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = visible.split(",")[:here] if visible else map(str, range(here))
    theirs = {name.strip() for name in rollout.server_gpus.split(",")}
    return len(theirs - {name.strip() for name in mine})
