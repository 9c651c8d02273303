"""The plain torch path of :mod:`advantage`, in float64: sort by id, then reduce each segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import register_torch


class _Segments:
    """The rollouts that share an id, or a tuple of ids. Sums and extremes of each segment, handed back to its
    rollouts.

    Fixed shapes (as many segments as rollouts, the last ones empty), no host synchronisation, and an
    order of summation that does not depend on the device's scheduling.
    """

    def __init__(self, *ids: Tensor) -> None:
        count = len(ids[0])
        order = torch.arange(count, device=ids[0].device)
        for key in reversed(ids):
            order = order[torch.argsort(key[order], stable=True)]
        changes = torch.zeros_like(order, dtype=torch.bool)
        for key in ids:
            key = key[order]
            changes[1:] |= key[1:] != key[:-1]
        number = changes.cumsum(0)
        ends = torch.arange(count + 1, device=order.device)
        self.order = order
        self.lengths = torch.searchsorted(number, ends).diff()
        self.index = torch.zeros_like(number).scatter(0, order, number)

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        found = torch.segment_reduce(x[self.order], how, lengths=self.lengths, unsafe=True)
        return found[self.index]

    def total(self, x: Tensor) -> Tensor:
        return self._reduce(x, "sum")

    def least(self, x: Tensor) -> Tensor:
        return self._reduce(x, "min")

    def first(self) -> Tensor:
        """[B] bool, the rollout is the first of its segment in the batch."""
        row = torch.arange(len(self.order), device=self.order.device).double()
        return self.least(row) == row


@dataclass(frozen=True)
class _Moments:
    """Of each rollout's segment."""

    count: Tensor  # f64
    mean: Tensor  # f64, NaN where count is 0
    sd: Tensor  # f64, 0 where count <= ddof


def _moments(x: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor], ddof: int) -> _Moments:
    """Two-pass mean and standard deviation of the valid entries; x [B] or [B, M], any value where not
    valid. ``total`` sums over what shares the moments."""
    count = total(valid.to(x.dtype))
    mean = total(torch.where(valid, x, 0.0)) / count
    centred = torch.where(valid, x - mean, 0.0)
    variance = total(centred.square()) / (count - ddof).clamp(min=1)
    return _Moments(count, mean, torch.where(count > ddof, variance, 0.0).sqrt())


def _combine(
    rewards: Tensor,
    weights: Tensor | None,
    questions: _Segments,
    combine: str,
    eps: float,
    ddof: int,
) -> Tensor:
    """[B] f64 combined reward; 0 where nothing applies."""
    applies = ~rewards.isnan()
    if combine == "normalize_then_sum":
        per_reward = _moments(rewards, applies, questions.total, ddof)
        rewards = (rewards - per_reward.mean) / (per_reward.sd + eps)
    if weights is not None:
        rewards = rewards * weights.to(rewards)
    return torch.where(applies, rewards, 0.0).sum(1)


def _centre(reward: Tensor, q: _Moments, pk: _Moments, baseline: str) -> tuple[Tensor, Tensor]:
    """The two differences of the formula, [B] each, before scaling."""
    mu_q, mu_pk = q.mean, pk.mean
    if baseline == "leave_one_out":
        # mean of the others = mean - (x - mean) / (n - 1); the only one of its kind stands for
        # itself
        others = (q.count - 1).clamp(min=1)
        mu_q = torch.where(q.count > 1, mu_q - (reward - mu_q) / others, reward)
        others = (pk.count - 1).clamp(min=1)
        mu_pk = torch.where(pk.count > 1, mu_pk - (reward - mu_pk) / others, reward)
    inner = torch.where(pk.count > 1, reward - mu_pk, 0.0)
    return inner, mu_pk - mu_q


def _flat(reward: Tensor, valid: Tensor, questions: _Segments) -> Tensor:
    """[B] bool, the question's valid rewards are all the same, or there is none."""
    low = questions.least(torch.where(valid, reward, torch.inf))
    high = -questions.least(torch.where(valid, -reward, torch.inf))
    # float32 rewards that add up to the same number in another order are the same reward
    same = high - low <= 1e-8 + 1e-6 * torch.maximum(high.abs(), low.abs())
    return same | (low == torch.inf)


def _weight_of(guideline: Tensor, weights: Tensor) -> Tensor:
    """[B] f64, NaN where the id is not in 0..K-1."""
    inside = (guideline >= 0) & (guideline < len(weights))
    picked = weights.double()[guideline.clamp(0, len(weights) - 1)]
    return torch.where(inside, picked, torch.nan)


@register_torch("guideline_advantages")
def _guideline_advantages_torch(
    rewards: Tensor,
    group: Tensor,
    guideline: Tensor,
    reward_weights: Tensor | None,
    guideline_weights: Tensor | None,
    combine: str,
    scale: str,
    within: float,
    between: float,
    baseline: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, group, guideline = rewards.double(), group.long(), guideline.long()
    questions, pairs = _Segments(group), _Segments(group, guideline)
    valid = (~rewards.isnan()).any(1)
    reward = _combine(rewards, reward_weights, questions, combine, eps, ddof)
    q = _moments(reward, valid, questions.total, ddof)
    pk = _moments(reward, valid, pairs.total, ddof)
    inner, outer = _centre(reward, q, pk, baseline)
    if scale == "guideline":
        inner, outer = inner / (pk.sd + eps), outer / (q.sd + eps)
    elif scale == "group":
        inner, outer = inner / (q.sd + eps), outer / (q.sd + eps)
    elif scale == "batch":
        sd = _moments(reward, valid, torch.sum, ddof).sd
        inner, outer = inner / (sd + eps), outer / (sd + eps)
    advantage = within * inner + between * outer
    if guideline_weights is not None:
        advantage = advantage * _weight_of(guideline, guideline_weights)
    advantage = torch.where(valid, advantage, 0.0)
    shown = torch.where(valid, reward, torch.nan)
    return (
        torch.stack((advantage, shown, q.mean, q.sd, pk.mean, pk.sd)).float(),
        torch.stack((q.count, pk.count)).long(),
        torch.stack((valid, _flat(reward, valid, questions), questions.first(), pairs.first())),
        rewards.nanmean(0).float(),
    )
