"""verl's policy losses over log-probs, with the gradient made beside the value.

verl asks for a loss of log-probs that are there already, so what is left is elementwise: one pass gives the
loss, its derivative and verl's metrics, backward only scales, and the metrics wait for the device once
instead of three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmedx_fast.integrations._verl_advantage import read

AGG_MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean",
)  # fmt: skip
# verl's bounds of the log of a ratio.
LOG_RATIO, GSPO_LOG_RATIO = 20.0, 10.0


@dataclass(frozen=True)
class Clip:
    """The ratio counts within [low, high]; for negative advantages the loss stops at ``cap``."""

    low: float
    high: float
    cap: float

    @classmethod
    def of(cls, config: Any) -> Clip:
        """From verl's actor config."""
        if config is None:
            raise ValueError("a policy loss needs config, verl's actor config")
        both = config.clip_ratio
        low, high = config.clip_ratio_low, config.clip_ratio_high
        cap = read(config, "clip_ratio_c", 3.0)
        if not cap > 1:
            raise ValueError(f"actor.clip_ratio_c must exceed 1, got {cap}")
        return cls(1 - (both if low is None else low), 1 + (both if high is None else high), cap)


@dataclass(frozen=True)
class Result:
    """Per token [B, R]: the loss, its derivative by the log-prob, and what verl counts."""

    value: Tensor
    slope: Tensor
    clipped: Tensor
    capped: Tensor | None
    log_ratio: Tensor


def _clipped(ratio: Tensor, advantage: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A r, -A clip(r)), its derivative by r, and where the second is the larger."""
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(clip.low, clip.high)
    stopped = bounded > plain
    return torch.maximum(plain, bounded), torch.where(stopped, 0.0, -advantage), stopped


def _vanilla(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: Clip) -> Result:
    log_ratio, inside = _log_ratio(logp, old)
    ratio = log_ratio.exp()
    value, slope, stopped = _clipped(ratio, advantage, clip)
    limit = -advantage * clip.cap
    capped = (advantage < 0) & (value > limit)
    value = torch.where(capped, limit, value)
    slope = torch.where(capped | ~inside, 0.0, slope * ratio)
    return Result(value, slope, stopped, capped, log_ratio)


def _gspo(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: Clip) -> Result:
    log_ratio = logp - old
    mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    # The sequence's ratio, whose derivative by each of its tokens is the ratio itself (GSPO-token).
    ratio = mean.clamp(max=GSPO_LOG_RATIO).exp().expand_as(logp)
    value, slope, stopped = _clipped(ratio, advantage, clip)
    slope = torch.where(mean > GSPO_LOG_RATIO, 0.0, slope * ratio)
    return Result(value, slope, stopped, None, log_ratio)


def _cispo(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: Clip) -> Result:
    log_ratio, _ = _log_ratio(logp, old)
    ratio = log_ratio.exp()
    weight = ratio.clamp(clip.low, clip.high)
    slope = -weight * advantage
    return Result(slope * logp, slope, ratio != weight, None, log_ratio)


def _log_ratio(logp: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    gap = logp - old
    return gap.clamp(-LOG_RATIO, LOG_RATIO), gap.abs() <= LOG_RATIO


FORMULAS = {"vanilla": _vanilla, "gspo": _gspo, "cispo": _cispo}


def policy_loss(
    formula: str,
    old_log_prob: Tensor,  # [B, R]
    log_prob: Tensor,  # [B, R]
    advantages: Tensor,  # [B, R]
    response_mask: Tensor,  # [B, R]
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,  # [B, R]
) -> tuple[Tensor, dict[str, float]]:
    """(loss, verl's three metrics) of one of ``FORMULAS``; float32, or the dtype of wider log-probs."""
    clip = Clip.of(config)
    mask = response_mask.bool()
    acc = torch.promote_types(log_prob.dtype, torch.float32)
    with torch.no_grad():
        # What stands in the padding, NaN too, has no effect.
        logp, old, advantage = (
            torch.where(mask, x.detach().to(acc), 0.0) for x in (log_prob, old_log_prob, advantages)
        )
        found = FORMULAS[formula](logp, old, advantage, mask, clip)
        weight = token_weights(mask, loss_agg_mode, acc, **config.global_batch_info)
        if rollout_is_weights is not None:
            weight = weight * torch.where(mask, rollout_is_weights.to(acc), 0.0)
        loss = (weight * found.value).sum()
        metrics = _metrics(found, mask)
    return _TokenLoss.apply(log_prob, loss, weight * found.slope), metrics


def token_weights(
    mask: Tensor,  # [B, R] bool
    mode: str,
    dtype: torch.dtype,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    """[B, R] weights with which a sum over tokens is verl's ``agg_loss`` of this mode.

    Raises:
        ValueError: an unknown mode, or a mean over several ranks without its global count.
    """
    if mode not in AGG_MODES:
        raise ValueError(f"loss_agg_mode={mode!r} is not known: use {', '.join(AGG_MODES)}")
    weight = mask.to(dtype) * dp_size
    if mode == "token-sum":
        return weight
    name, count = "global_batch_size", global_batch_size
    if mode == "token-mean":
        name, count = "batch_num_tokens", batch_num_tokens
    if count is None:
        if dp_size > 1:
            raise ValueError(f"loss_agg_mode={mode!r} with dp_size={dp_size} needs {name}")
        count = (mask if mode == "token-mean" else mask.any(-1)).sum().clamp(min=1)
    weight = weight / count
    if mode == "seq-mean-token-mean":
        return weight / (mask.sum(-1, keepdim=True) + 1e-8)
    if mode == "seq-mean-token-sum-norm":
        return weight / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return weight


def _metrics(found: Result, mask: Tensor) -> dict[str, float]:
    count = mask.sum() + 1e-8  # verl's masked_mean
    capped = torch.zeros_like(mask) if found.capped is None else found.capped
    sums = torch.stack(
        [(found.clipped & mask).sum(), (-found.log_ratio * mask).sum(), (capped & mask).sum()]
    )
    clipped, kl, lower = (sums / count).tolist()
    return {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": lower}


class _TokenLoss(torch.autograd.Function):
    """A loss whose derivative by the log-probs [B, R] is known."""

    @staticmethod
    def forward(ctx, log_prob: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope.to(log_prob.dtype))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        (slope,) = ctx.saved_tensors
        return slope * d_loss, None, None
