"""The public ops: they need nothing but torch, and use Triton where an op has a kernel for it.

``MMEDX_KERNELS=torch|triton|auto`` chooses the implementation (default auto).
"""

from mmedx_fast.kernels.advantage import AdvantageStats, guideline_advantages
from mmedx_fast.kernels.linear_logprob import head_weight, linear_logprob
from mmedx_fast.kernels.lora_merge import (
    ConflictReport,
    LoraFactors,
    MergeSpec,
    lora_conflicts,
    lora_mean,
    lora_merge_,
    lora_merge_as_lora,
    merge_model_,
    model_conflicts,
    sum_reports,
)
from mmedx_fast.kernels.policy_loss import (
    PolicyLossSpec,
    linear_policy_loss,
    merge_metrics,
    reduce_metrics,
    token_weights,
)

__all__ = [
    "AdvantageStats",
    "ConflictReport",
    "LoraFactors",
    "MergeSpec",
    "PolicyLossSpec",
    "guideline_advantages",
    "head_weight",
    "linear_logprob",
    "linear_policy_loss",
    "lora_conflicts",
    "lora_mean",
    "lora_merge_",
    "lora_merge_as_lora",
    "merge_metrics",
    "merge_model_",
    "model_conflicts",
    "reduce_metrics",
    "sum_reports",
    "token_weights",
]
