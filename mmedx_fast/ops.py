"""The public ops. They need nothing but torch; Triton is used where it is present and an op has a kernel.

``MMEDX_KERNELS=torch|triton|auto`` chooses the implementation (default auto).
"""

from mmedx_fast.kernels.advantage import AdvantageStats, guideline_advantages
from mmedx_fast.kernels.linear_logprob import linear_logprob
from mmedx_fast.kernels.policy_loss import (
    PolicyLossSpec,
    linear_policy_loss,
    merge_metrics,
    reduce_metrics,
    token_weights,
)

__all__ = [
    "AdvantageStats",
    "PolicyLossSpec",
    "guideline_advantages",
    "linear_logprob",
    "linear_policy_loss",
    "merge_metrics",
    "reduce_metrics",
    "token_weights",
]
