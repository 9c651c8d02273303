"""What a merge says about itself, and where it runs: shared by the pipeline's stage and by merges of any adapters."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmedx_fast.ops import MergeSpec

LOG = logging.getLogger(__name__)


def describe(spec: MergeSpec) -> dict[str, Any]:
    """The spec as plain JSON values."""
    made = dataclasses.asdict(spec)
    return {key: str(value) if key == "delta_dtype" else value for key, value in made.items()} | {
        "weights": list(spec.weights or ())
    }


def short_name(linear: str) -> str:
    """A linear's name without what all linears of a language model share."""
    return linear.removeprefix("model.").replace("language_model.", "")


def measures(report: dict[str, Any]) -> dict[str, Any]:
    """The measures of conflict that tables and plots show, of ``ConflictReport.to_dict()``."""
    kept = report["kept_fraction"]
    return {
        "sign_conflict": report["sign_conflict_rate"],
        "weighted_sign_conflict": report["weighted_sign_conflict_rate"],
        "cancelled_energy": report["cancelled_energy"],
        "kept_fraction": sum(kept) / len(kept),
        "cosine": report["cosine"],
    }


def merge_device(needed: int) -> torch.device:
    """CUDA where a device has ``needed`` bytes free and a tenth more, the CPU elsewhere."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info()
    if free < 1.1 * needed:
        LOG.warning(
            "merging on the CPU: %.1f GiB of GPU memory are free and the merge takes %.1f GiB",
            free / 2**30,
            1.1 * needed / 2**30,
        )
        return torch.device("cpu")
    return torch.device("cuda")
