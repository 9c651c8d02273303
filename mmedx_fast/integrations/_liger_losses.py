"""The losses of Liger's signature that our fused op does not have: SAPO, LUSPO and VESPO.

Elementwise, over log-probs that are there already. Formulas after liger-kernel 0.8.5, which follows TRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOSS_TYPES = ("sapo", "luspo", "vespo")
# VESPO's bounds of the log of a ratio.
LOWEST, HIGHEST = math.log(1e-8), 20.0


class Settings(Protocol):
    """What is read of a loss module."""

    beta: float
    delta: float | None
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


@dataclass(frozen=True)
class Completions:
    """B completions of T tokens, finite everywhere; log-probs carry the gradient."""

    logp: Tensor  # [B, T]
    old: Tensor  # [B, T]
    ref: Tensor | None  # [B, T]
    advantage: Tensor  # [B, 1]
    mask: Tensor  # [B, T] float, 1 for the tokens that count
    importance: Tensor | None  # [B, T] or [B, 1]


@dataclass(frozen=True)
class Outcome:
    """Per token [B, T], or per completion [B, 1] where nothing in it is by token."""

    value: Tensor
    kl: Tensor | None
    clipped: Tensor


def token_losses(x: Completions, s: Settings) -> Outcome:
    """The loss before its reduction, differentiable by ``x.logp``."""
    log_ratio = x.logp - x.old
    if s.importance_sampling_level == "sequence":
        length = x.mask.sum(-1, keepdim=True).clamp(min=1.0)
        log_ratio = (log_ratio * x.mask).sum(-1, keepdim=True) / length
    ratio = log_ratio.exp()
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if s.loss_type == "sapo":
        value = -_sapo_gate(ratio, x.advantage, s) * x.advantage
    elif s.loss_type == "vespo":
        value = -_vespo_weight(x, log_ratio, s) * x.advantage * x.logp
    else:
        value, clipped = _clipped(ratio, x.advantage, s)
    if x.importance is not None and s.loss_type != "vespo":
        value = value * x.importance
    if x.ref is None:
        return Outcome(value, None, clipped)
    gap = x.ref - x.logp
    kl = torch.expm1(gap) - gap
    if s.use_bias_correction_kl:
        kl = kl * ratio
    return Outcome(value + s.beta * kl, kl.detach(), clipped)


def _clipped(ratio: Tensor, advantage: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    low, high = 1 - s.epsilon_low, 1 + s.epsilon_high
    plain = ratio if s.delta is None else ratio.clamp(max=s.delta)
    value = -torch.minimum(plain * advantage, ratio.clamp(low, high) * advantage)
    return value, ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))


def _sapo_gate(ratio: Tensor, advantage: Tensor, s: Settings) -> Tensor:
    """A sigmoid instead of the clip (arXiv 2511.20347)."""
    temperature = torch.where(advantage > 0, s.sapo_temperature_pos, s.sapo_temperature_neg)
    return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature


@torch.no_grad()
def _vespo_weight(x: Completions, log_ratio: Tensor, s: Settings) -> Tensor:
    """[B, 1] exp(l + k log w - l w) of the completion's ratio w, the engine's gap in it."""
    log_w = (log_ratio.clamp(-HIGHEST, HIGHEST) * x.mask).sum(-1, keepdim=True)
    if x.importance is not None:
        log_w = log_w + x.importance.log().clamp(LOWEST, HIGHEST).sum(-1, keepdim=True)
    log_w = log_w.clamp(LOWEST, HIGHEST)
    better = x.advantage >= 0
    k = torch.where(better, s.vespo_k_pos, s.vespo_k_neg)
    rate = torch.where(better, s.vespo_lambda_pos, s.vespo_lambda_neg).clamp(min=1e-4)
    weight = (rate + k * log_w - rate * log_w.exp()).exp()
    return weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
