"""Guideline-relative advantages: one question, several guidelines, several rollouts under each.

With ``R_i`` the combined reward of rollout i, question p and guideline k::

    A_i = within * (R_i - mu_pk) / (sd_pk + eps)  +  between * (mu_pk - mu_p) / (sd_p + eps)

The first part compares a rollout with its siblings under the same guideline, the second the
guideline with the others on the same question. ``within = between = 1`` with ``scale`` group or
none is GRPO or Dr.GRPO; one guideline is GRPO. Rewards carry TRL's conventions: NaN means "does not
apply".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import register_torch, resolve

COMBINE = ("sum_then_normalize", "normalize_then_sum")
SCALE = ("guideline", "group", "batch", "none")
BASELINE = ("mean", "leave_one_out")


@dataclass(frozen=True)
class AdvantageStats:
    """What the advantages were made from. P questions, Q (question, guideline) pairs that occur, M
    rewards.

    A mean over nothing is NaN; a standard deviation of ``ddof`` values or fewer is 0.
    """

    question: Tensor  # [P] int64, the distinct values of ``group``, ascending
    mu_p: Tensor  # [P] f32, mean combined reward of the question's valid rollouts
    sd_p: Tensor  # [P] f32
    count_p: Tensor  # [P] int64, valid rollouts
    zero_variance: (
        Tensor  # [P] bool, all valid rollouts got the same reward (or there is none): no signal
    )
    pk_question: Tensor  # [Q] int64, index into ``question``
    pk_guideline: Tensor  # [Q] int64, guideline id
    mu_pk: Tensor  # [Q] f32
    sd_pk: Tensor  # [Q] f32
    count_pk: Tensor  # [Q] int64
    reward: Tensor  # [B] f32, combined reward R_i, NaN where the rollout is not valid
    reward_mean: Tensor  # [M] f32, mean of each reward over the rollouts it applies to
    valid: Tensor  # [B] bool, at least one reward applies
    question_index: Tensor  # [B] int64, each rollout's index into ``question``


def guideline_advantages(
    rewards: Tensor,  # [B, M]
    group: Tensor,  # [B]
    guideline: Tensor,  # [B]
    *,
    reward_weights: Tensor | None = None,  # [M]
    guideline_weights: Tensor | None = None,  # [K]
    combine: str = "sum_then_normalize",
    scale: str = "guideline",
    within: float = 1.0,
    between: float = 1.0,
    baseline: str = "mean",
    eps: float = 1e-4,
    ddof: int = 1,
) -> tuple[Tensor, AdvantageStats]:
    """Advantage of every rollout among its siblings.

    Args:
        rewards: [B, M] float. NaN = this reward does not apply to this rollout. A rollout with only
            NaN gets advantage 0 and stays out of every statistic.
        group: [B] integer question ids; any values, any order, uneven counts.
        guideline: [B] integer guideline ids (all equal = plain GRPO).
        reward_weights: [M], default ones.
        guideline_weights: [K], multiplies the advantages of guideline k; ids must then lie in
            0..K-1.
        combine: ``sum_then_normalize``: R = weighted sum of the rewards. ``normalize_then_sum``
            (GDPO, arXiv 2601.05242): each reward is first normalised over the question's rollouts,
            with ``eps`` and ``ddof``. With ``scale='batch'`` and within = between = 1 that is TRL's
            ``multi_objective_aggregation`` of this name.
        scale: the divisors. ``guideline``: as in the formula. ``group``: sd_p in both terms.
            ``batch``: the standard deviation of all valid R in both. ``none``: 1.
        within, between: weights of the two terms.
        baseline: ``mean``, or ``leave_one_out``: both means leave rollout i out (a guideline's only
            rollout stands for its own mean, a question's only rollout gets 0), so within = between
            = 1 and scale none is RLOO.
        eps, ddof: TRL uses 1e-4 and 1, verl 1e-6 and 1.

    Returns:
        advantages [B] float32 and :class:`AdvantageStats`. Statistics are accumulated in float64.
        Nothing here is differentiable. On CPU an infinite reward is refused; on CUDA values are not
        inspected.

    Raises:
        ValueError: wrong shape, dtype or option, or an infinite reward.
    """
    _check_options(combine, scale, baseline, eps, ddof)
    _check_tensors(rewards, group, guideline, reward_weights, guideline_weights)
    impl = resolve("guideline_advantages", rewards.device)
    return impl(
        rewards,
        group,
        guideline,
        reward_weights=reward_weights,
        guideline_weights=guideline_weights,
        combine=combine,
        scale=scale,
        within=within,
        between=between,
        baseline=baseline,
        eps=eps,
        ddof=ddof,
    )


def _check_options(combine: str, scale: str, baseline: str, eps: float, ddof: int) -> None:
    for name, value, known in (
        ("combine", combine, COMBINE),
        ("scale", scale, SCALE),
        ("baseline", baseline, BASELINE),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(known)}")
    if not eps > 0 or ddof not in (0, 1):
        raise ValueError(f"eps must be > 0 and ddof 0 or 1, got eps={eps}, ddof={ddof}")


def _check_tensors(
    rewards: Tensor,
    group: Tensor,
    guideline: Tensor,
    reward_weights: Tensor | None,
    guideline_weights: Tensor | None,
) -> None:
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be a float [B, M] tensor, got {rewards.dtype} {tuple(rewards.shape)}"
        )
    for name, ids in (("group", group), ("guideline", guideline)):
        if ids.shape != rewards.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"{name} must be an integer [{rewards.shape[0]}] tensor, "
                f"got {ids.dtype} {tuple(ids.shape)}"
            )
    if reward_weights is not None and reward_weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"reward_weights must have shape [{rewards.shape[1]}], one per reward, "
            f"got {tuple(reward_weights.shape)}"
        )
    if guideline_weights is not None and guideline_weights.dim() != 1:
        raise ValueError(f"guideline_weights must be [K], got {tuple(guideline_weights.shape)}")
    if rewards.device.type != "cpu":
        return  # looking at values would wait for the device
    infinite = rewards.isinf().nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise ValueError(
            f"rewards[{row}, {column}] is infinite: a reward must be finite, "
            "or NaN if it does not apply"
        )
    if guideline_weights is not None and guideline.numel():
        low, high = int(guideline.min()), int(guideline.max())
        if low < 0 or high >= len(guideline_weights):
            raise ValueError(
                f"guideline ids run from {low} to {high}, but guideline_weights has "
                f"{len(guideline_weights)} entries: ids must lie in 0..K-1"
            )


class _Segments:
    """Sums and extremes over the rows of each segment, in an order that does not depend on the
    device's scheduling."""

    def __init__(self, index: Tensor, count: int) -> None:
        self.index = index
        self.order = torch.argsort(index, stable=True)
        self.lengths = torch.bincount(index, minlength=count)

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x[self.order], how, lengths=self.lengths, unsafe=True)

    def total(self, x: Tensor) -> Tensor:
        return self._reduce(x, "sum")

    def spread(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        inf = torch.full_like(x, torch.inf)
        return self._reduce(torch.where(valid, x, inf), "min"), self._reduce(
            torch.where(valid, x, -inf), "max"
        )


@dataclass(frozen=True)
class _Moments:
    count: Tensor  # f64
    mean: Tensor  # f64, NaN where count is 0
    sd: Tensor  # f64, 0 where count <= ddof


def _moments(x: Tensor, valid: Tensor, segments: _Segments, ddof: int) -> _Moments:
    """Two-pass mean and standard deviation of the valid entries of each segment; x [B] or [B, M],
    any value where not valid."""
    x = torch.where(valid, x, 0.0)
    count = segments.total(valid.to(x.dtype))
    mean = segments.total(x) / count
    centred = torch.where(valid, x - mean[segments.index], 0.0)
    variance = segments.total(centred.square()) / (count - ddof).clamp(min=1)
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
        per_reward = _moments(rewards, applies, questions, ddof)
        at = questions.index
        rewards = (rewards - per_reward.mean[at]) / (per_reward.sd[at] + eps)
    if weights is not None:
        rewards = rewards * weights.to(rewards)
    return torch.where(applies, rewards, 0.0).sum(1)


def _centre(
    reward: Tensor, q: _Moments, pk: _Moments, at_q: Tensor, at_pk: Tensor, baseline: str
) -> tuple[Tensor, Tensor]:
    """The two differences of the formula, [B] each, before scaling."""
    mu_q, mu_pk = q.mean[at_q], pk.mean[at_pk]
    if baseline == "leave_one_out":
        n_q, n_pk = q.count[at_q], pk.count[at_pk]
        # mean of the others = mean - (x - mean) / (n - 1); the only one of its kind stands for
        # itself
        mu_q = torch.where(n_q > 1, mu_q - (reward - mu_q) / (n_q - 1).clamp(min=1), reward)
        mu_pk = torch.where(n_pk > 1, mu_pk - (reward - mu_pk) / (n_pk - 1).clamp(min=1), reward)
    inner = torch.where(pk.count[at_pk] > 1, reward - mu_pk, 0.0)
    return inner, mu_pk - mu_q


@register_torch("guideline_advantages")
def _guideline_advantages_torch(
    rewards: Tensor,
    group: Tensor,
    guideline: Tensor,
    *,
    reward_weights: Tensor | None,
    guideline_weights: Tensor | None,
    combine: str,
    scale: str,
    within: float,
    between: float,
    baseline: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, AdvantageStats]:
    rewards = rewards.detach().double()
    question, at_q = torch.unique(group.long(), return_inverse=True)
    guideline_id, at_k = torch.unique(guideline.long(), return_inverse=True)
    pair, at_pk = torch.unique(at_q * max(len(guideline_id), 1) + at_k, return_inverse=True)
    questions, pairs = _Segments(at_q, len(question)), _Segments(at_pk, len(pair))

    valid = ~rewards.isnan().all(1) if rewards.shape[1] else rewards.new_zeros(len(rewards)).bool()
    reward = _combine(rewards, reward_weights, questions, combine, eps, ddof)
    q = _moments(reward, valid, questions, ddof)
    pk = _moments(reward, valid, pairs, ddof)
    inner, outer = _centre(reward, q, pk, at_q, at_pk, baseline)
    if scale == "guideline":
        inner, outer = inner / (pk.sd[at_pk] + eps), outer / (q.sd[at_q] + eps)
    elif scale == "group":
        inner, outer = inner / (q.sd[at_q] + eps), outer / (q.sd[at_q] + eps)
    elif scale == "batch":
        whole = _moments(reward, valid, _Segments(torch.zeros_like(at_q), 1), ddof)
        inner, outer = inner / (whole.sd + eps), outer / (whole.sd + eps)
    low, high = questions.spread(reward, valid)
    # float32 rewards that add up to the same number in another order are the same reward
    flat = high - low <= 1e-8 + 1e-6 * torch.maximum(high.abs(), low.abs())
    advantage = within * inner + between * outer
    if guideline_weights is not None:
        advantage = advantage * guideline_weights.to(advantage)[guideline.long()]
    advantage = torch.where(valid, advantage, 0.0)

    width = max(len(guideline_id), 1)
    stats = AdvantageStats(
        question=question,
        mu_p=q.mean.float(),
        sd_p=q.sd.float(),
        count_p=q.count.long(),
        zero_variance=flat | (q.count == 0),
        pk_question=pair // width,
        pk_guideline=guideline_id[pair % width],
        mu_pk=pk.mean.float(),
        sd_pk=pk.sd.float(),
        count_pk=pk.count.long(),
        reward=torch.where(valid, reward, torch.nan).float(),
        reward_mean=rewards.nanmean(0).float(),
        valid=valid,
        question_index=at_q,
    )
    return advantage.float(), stats
