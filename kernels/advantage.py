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
from typing import Any

import torch
from torch import Tensor

from . import _advantage_torch  # noqa: F401
from ._checks import check_integers
from ._dispatch import register_triton, resolve

COMBINE = ("sum_then_normalize", "normalize_then_sum")
SCALE = ("guideline", "group", "batch", "none")
BASELINE = ("mean", "leave_one_out")
MAX_REWARDS = 256  # of the Triton kernel, whose tiles have one axis over them


@dataclass(frozen=True)
class AdvantageTables:
    """The statistics once per question and once per (question, guideline) pair that occurs: P and Q rows,
    ascending by id."""

    question: Tensor  # [P] int64 question ids
    mu_p: Tensor  # [P] f32
    sd_p: Tensor  # [P] f32
    count_p: Tensor  # [P] int64
    zero_variance: Tensor  # [P] bool
    pk_question: Tensor  # [Q] int64, index into ``question``
    pk_guideline: Tensor  # [Q] int64 guideline ids
    mu_pk: Tensor  # [Q] f32
    sd_pk: Tensor  # [Q] f32
    count_pk: Tensor  # [Q] int64
    question_index: Tensor  # [B] int64, each rollout's index into ``question``


@dataclass(frozen=True)
class AdvantageStats:
    """What the advantages were made from, told to every rollout about its own question and guideline.

    No shape depends on the values, so nothing waits for the device. Statistics are over valid
    rollouts. The three packed tensors are the op's own; a property is a view of one of their rows.
    """

    group: Tensor  # [B] the question ids given
    guideline: Tensor  # [B] the guideline ids given
    reward_mean: Tensor  # [M] f32, mean of each reward over the rollouts it applies to
    floats: Tensor  # [6, B] f32: advantage, reward, mu_p, sd_p, mu_pk, sd_pk
    counts: Tensor  # [2, B] int64: count_p, count_pk
    flags: Tensor  # [4, B] bool: valid, zero_variance, first_p, first_pk

    @property
    def mu_p(self) -> Tensor:
        """[B] f32, mean combined reward of the rollout's question, NaN where nothing is valid."""
        return self.floats[2]

    @property
    def sd_p(self) -> Tensor:
        """[B] f32, its standard deviation, 0 for ``ddof`` values or fewer."""
        return self.floats[3]

    @property
    def count_p(self) -> Tensor:
        """[B] int64, valid rollouts of the question."""
        return self.counts[0]

    @property
    def zero_variance(self) -> Tensor:
        """[B] bool, all of them got the same reward, or there is none: no signal."""
        return self.flags[1]

    @property
    def first_p(self) -> Tensor:
        """[B] bool, this rollout is the first of its question in the batch."""
        return self.flags[2]

    @property
    def mu_pk(self) -> Tensor:
        """[B] f32, mean combined reward of the rollout's guideline within its question."""
        return self.floats[4]

    @property
    def sd_pk(self) -> Tensor:
        """[B] f32, its standard deviation."""
        return self.floats[5]

    @property
    def count_pk(self) -> Tensor:
        """[B] int64, valid rollouts of the guideline within the question."""
        return self.counts[1]

    @property
    def first_pk(self) -> Tensor:
        """[B] bool, this rollout is the first of its question and guideline."""
        return self.flags[3]

    @property
    def reward(self) -> Tensor:
        """[B] f32, combined reward R_i, NaN where the rollout is not valid."""
        return self.floats[1]

    @property
    def valid(self) -> Tensor:
        """[B] bool, at least one reward applies."""
        return self.flags[0]

    def question_mean(self, x: Tensor) -> Tensor:
        """Mean over the questions of a per-question statistic x [B], e.g. ``sd_p`` or ``zero_variance``.

        Returns a float32 scalar on the tensors' device, NaN for no question; does not wait for it.
        """
        return torch.where(self.first_p, x.float(), 0.0).sum() / self.first_p.sum()

    def tables(self) -> AdvantageTables:
        """Compact tables. Their lengths depend on the ids, so this waits for the device."""
        question, question_index = torch.unique(self.group.long(), return_inverse=True)
        first_p = self.first_p.nonzero().squeeze(1)
        first_p = first_p[torch.argsort(question_index[first_p])]
        first_pk = self.first_pk.nonzero().squeeze(1)
        first_pk = first_pk[torch.argsort(self.guideline[first_pk], stable=True)]
        first_pk = first_pk[torch.argsort(question_index[first_pk], stable=True)]
        return AdvantageTables(
            question=question,
            mu_p=self.mu_p[first_p],
            sd_p=self.sd_p[first_p],
            count_p=self.count_p[first_p],
            zero_variance=self.zero_variance[first_p],
            pk_question=question_index[first_pk],
            pk_guideline=self.guideline[first_pk].long(),
            mu_pk=self.mu_pk[first_pk],
            sd_pk=self.sd_pk[first_pk],
            count_pk=self.count_pk[first_pk],
            question_index=question_index,
        )


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
        Nothing here is differentiable.

    On CUDA (up to 256 rewards) this is one launch of a Triton kernel, two for ``normalize_then_sum`` with
    ``scale='batch'``; deterministic, without a host synchronisation, fit for a CUDA graph and for
    ``torch.compile(fullgraph=True)``. There the values are not inspected: an infinite reward makes
    its question NaN (with ``scale='batch'`` the batch), a guideline id without a weight its
    rollout's advantage. On CPU, outside a compiled graph, both are refused.

    Raises:
        ValueError: wrong shape, dtype, device or option; on CPU an infinite reward or a guideline
            id without a weight.
    """
    _check_options(combine, scale, baseline, eps, ddof)
    _check_tensors(rewards, group, guideline, reward_weights, guideline_weights)
    floats, counts, flags, reward_mean = torch.ops.mmedx_fast.guideline_advantages(
        rewards.detach(),
        group,
        guideline,
        reward_weights,
        guideline_weights,
        combine,
        scale,
        within,
        between,
        baseline,
        eps,
        ddof,
    )
    return floats[0], AdvantageStats(group, guideline, reward_mean, floats, counts, flags)


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
        what = f"[{rewards.shape[0]}] ids, one per rollout"
        check_integers(name, ids, what)
        if ids.shape != rewards.shape[:1]:
            raise ValueError(f"{name} must be {what}, got {tuple(ids.shape)}")
    for name, weights in (
        ("reward_weights", reward_weights),
        ("guideline_weights", guideline_weights),
    ):
        if weights is not None and weights.is_complex():
            raise ValueError(f"{name} must be real, got {weights.dtype}")
    if reward_weights is not None and reward_weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"reward_weights must have shape [{rewards.shape[1]}], one per reward, "
            f"got {tuple(reward_weights.shape)}"
        )
    if guideline_weights is not None and (
        guideline_weights.dim() != 1 or not len(guideline_weights)
    ):
        raise ValueError(
            f"guideline_weights must be [K], K > 0, got {tuple(guideline_weights.shape)}"
        )
    for name, tensor in (
        ("group", group),
        ("guideline", guideline),
        ("reward_weights", reward_weights),
        ("guideline_weights", guideline_weights),
    ):
        if tensor is not None and tensor.device != rewards.device:
            raise ValueError(f"{name} is on {tensor.device}, rewards on {rewards.device}")
    # looking at values would wait for the device, or cut a graph
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(rewards, guideline, guideline_weights)


def _check_values(rewards: Tensor, guideline: Tensor, guideline_weights: Tensor | None) -> None:
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


# A torch.library op, so that torch.compile sees one node; it returns the packed tensors of AdvantageStats
# and reward_mean. `custom_op` would do the same at three times the overhead a call.
_library = torch.library.Library("mmedx_fast", "FRAGMENT")
_library.define(
    "guideline_advantages(Tensor rewards, Tensor group, Tensor guideline, Tensor? reward_weights, "
    "Tensor? guideline_weights, str combine, str scale, float within, float between, str baseline, "
    "float eps, int ddof) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(rewards: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = rewards.shape[1]
    beyond = f"at most {MAX_REWARDS} rewards, got {m}" if m > MAX_REWARDS else None
    return resolve("guideline_advantages", rewards.device, beyond)(rewards, *arguments)


def _shapes(rewards: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, m = rewards.shape
    return (
        rewards.new_empty((6, b), dtype=torch.float32),
        rewards.new_empty((2, b), dtype=torch.int64),
        rewards.new_empty((4, b), dtype=torch.bool),
        rewards.new_empty(m, dtype=torch.float32),
    )


_library.impl("guideline_advantages", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmedx_fast::guideline_advantages", _shapes, lib=_library)


@register_triton("guideline_advantages", limit=f"up to {MAX_REWARDS} rewards")
def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Imported at the first use: a machine without a GPU does not wait for Triton."""
    from ._advantage_triton import guideline_advantages_triton

    return guideline_advantages_triton(*arguments)
