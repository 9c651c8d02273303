"""One update of GBA: advantages of the step's rollouts, packed rows, the passes over them, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mmedx_fast.config import Config, GbaConfig
from mmedx_fast.prompts import Question
from mmedx_fast.rollout import Rollout
from mmedx_fast.stages.common import all_parts, row_tokens
from mmedx_fast.stages.context import StageError
from mmedx_fast.stages.guard import RowBound, StepRows, finite_loss
from mmedx_fast.stages.rollouts import rollout_trees

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmedx_fast.cost import PhaseMeter
    from mmedx_fast.meter import StepRates
    from mmedx_fast.ops import PolicyLossSpec
    from mmedx_fast.planner import RowPlan
    from mmedx_fast.policy import Policy, Use
    from mmedx_fast.rewards import RewardRunner
    from mmedx_fast.tree import PackedRow


def rollout_advantages(
    gba: GbaConfig, rewards: RewardRunner, rollouts: list[Rollout], scores: np.ndarray
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(advantage [B], which rollouts train [B] bool, metrics)."""
    import torch

    from mmedx_fast.ops import guideline_advantages

    adv = gba.advantage
    names = list(gba.guidelines)
    group = torch.tensor([r.question for r in rollouts])
    guideline = torch.tensor([names.index(r.guideline or "") for r in rollouts])
    weights = None
    if adv.guideline_weights is not None:
        weights = torch.tensor([adv.guideline_weights.get(name, 1.0) for name in names])
    values, stats = guideline_advantages(
        torch.from_numpy(scores),
        group,
        guideline if adv.group_by == "guideline" else torch.zeros_like(guideline),
        reward_weights=torch.tensor(rewards.weights, dtype=torch.float32),
        guideline_weights=weights if adv.group_by == "guideline" else None,
        combine=adv.combine,
        scale=adv.scale,
        within=adv.within,
        between=adv.between,
        baseline=adv.baseline,
        eps=adv.eps,
        ddof=adv.ddof,
    )
    use = stats.valid.clone()
    if gba.filter_zero_variance:
        use &= ~stats.zero_variance
    metrics = {
        "reward": float(stats.reward.nanmean()),
        "reward_std": float(stats.question_mean(stats.sd_p)),
        "frac_reward_zero_std": float(stats.question_mean(stats.zero_variance)),
    }
    for index, name in enumerate(rewards.names):
        metrics[f"rewards/{name}/mean"] = float(stats.reward_mean[index])
    for index, name in enumerate(names):
        picked = stats.reward[guideline == index]
        metrics[f"reward_guideline/{name}"] = float(picked.nanmean())
    metrics |= adherence_metrics(gba, rewards.names, scores)
    return values, use, metrics


def adherence_metrics(gba: GbaConfig, names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """How adherence goes with accuracy over the step's rollouts; nothing where it cannot be told.

    The reward's own weighting of wrong answers is undone first, since it makes a correlation by itself.
    Near zero, the form is followed whether the answer is right or not: what a gamed reward looks like.
    """
    import numpy as np

    from mmedx_fast.reward_functions import share_if_wrong
    from mmedx_fast.stats import correlation

    if not {"accuracy_reward", "guideline_reward"} <= set(names):
        return {}
    at = list(names).index("guideline_reward")
    kwargs = gba.rewards[at].kwargs
    share = share_if_wrong(kwargs.get("gate", "weighted"), kwargs.get("on_wrong", 0.25))
    if share == 0.0:
        return {}
    right = scores[:, list(names).index("accuracy_reward")]
    followed = np.where(right == 1.0, scores[:, at], scores[:, at] / share)
    found = correlation(followed, right)
    return {} if math.isnan(found) else {"adherence_accuracy_correlation": found}


@dataclass(frozen=True)
class _Batch:
    """The packed rows of a step, and what the loss needs beside them, an entry per row."""

    rows: list[PackedRow]
    members: list[list[int]]
    """For each branch of a row its rollout."""
    tensors: list[dict[str, Tensor]]
    weights: list[Tensor]
    tokens: tuple[int, int]
    """As plain rows, and as computed; all ranks together."""


class Learner:
    """Updates the policy from rollouts; every rank makes the same calls."""

    def __init__(
        self, cfg: Config, policy: Policy, meter: PhaseMeter, rates: StepRates, bound: RowBound
    ) -> None:
        self.cfg, self.gba = cfg, cfg.gba
        self.policy, self.meter, self.rates, self.bound = policy, meter, rates, bound
        self.spec = _loss_spec(cfg)

    def update(
        self, questions: list[Question], rollouts: list[Rollout], advantages: Tensor, use: Tensor
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """(metrics, the raw ones of every row); without rows where no rollout trains."""
        from mmedx_fast.ops import reduce_metrics

        chosen = [i for i, used in enumerate(use.tolist()) if used]
        if not chosen:
            # Nothing to learn from: no gradient, but the step counts, so that the schedule holds.
            self.policy.skip(self.gba.num_iterations)
            return {"skipped": 1.0, "tokens_saved": math.nan}, []
        trees, flat = rollout_trees(questions, rollouts, chosen)
        fixed: dict[str, dict[int, Tensor]] = {}
        pack = partial(self._pack, flat, chosen, rollouts, advantages, fixed)
        rows = StepRows(self.policy, trees, self.bound, pack)
        for later in reversed(range(self.gba.num_iterations)):
            with self.meter.phase("train"):
                raw = all_parts(rows.run(self._backward))
                stepped = self.policy.step(refuse=not finite_loss(raw))
            plain, computed = rows.packed.tokens
            self.meter.add("train", tokens=computed)
            self.rates.add(rows.packed.rows)
            metrics = reduce_metrics(raw) | stepped
            if stepped["skipped"]:
                self.policy.skip(later)
                break
            self._check_mismatch(metrics.get("sampling/sampling_logp_difference/mean", 0.0))
        return metrics | {"tokens_saved": plain / computed}, raw

    def _backward(self, batch: _Batch) -> list[dict[str, float]]:
        """Gradients of all rows; their raw metrics."""

        def work(i: int, row: PackedRow) -> dict[str, float]:
            return self.policy.backward(
                row, token_weight=batch.weights[i], spec=self.spec, **batch.tensors[i]
            )

        return self.policy.over_rows(batch.rows, work)

    def _pack(
        self,
        flat: list[int],
        chosen: list[int],
        rollouts: list[Rollout],
        advantages: Tensor,
        fixed: dict[str, dict[int, Tensor]],
        plans: list[RowPlan],
    ) -> _Batch:
        with self.meter.phase("pack"):
            rows = [plan.pack(self.policy.rope_index) for plan in plans]
            if self.gba.num_iterations > 1 or self.spec.beta > 0:
                # Several passes read them; a single one lets go of them row by row.
                rows = self.policy.with_image_features(rows)
        batch = _Batch(
            rows,
            [[flat[branch] for branch in plan.branches] for plan in plans],
            [
                self._targets(plan, row, flat, rollouts, advantages)
                for plan, row in zip(plans, rows, strict=True)
            ],
            self._weights(plans, rows, rollouts, chosen, self.spec.loss_type),
            row_tokens(rows),
        )
        if self.spec.entropy_coef:  # TRL's bonus is a plain mean over tokens whatever the loss type
            means = self._weights(plans, rows, rollouts, chosen, "dapo")
            for tensors, mean in zip(batch.tensors, means, strict=True):
                tensors["entropy_weight"] = mean
        self._fixed_passes(batch, fixed)
        return batch

    def _targets(
        self,
        plan: RowPlan,
        row: PackedRow,
        flat: list[int],
        rollouts: list[Rollout],
        advantages: Tensor,
    ) -> dict[str, Tensor]:
        """Per-target tensors of a row; its branch b is rollout ``flat[plan.branches[b]]``."""
        import torch

        if not plan.branches:  # without work: the numbers meet weight 0
            nothing = torch.zeros(len(row.targets))
            return {"advantages": nothing, "rollout_logprob": nothing}
        members = [flat[branch] for branch in plan.branches]
        sampled = torch.tensor([p for i in members for p in rollouts[i].logprobs])
        return {
            "advantages": advantages[torch.tensor(members)][row.branch_index],
            "rollout_logprob": sampled,
        }

    def _weights(
        self,
        plans: list[RowPlan],
        rows: list[PackedRow],
        rollouts: list[Rollout],
        chosen: list[int],
        loss_type: str,
    ) -> list[Tensor]:
        """Token weights that add up over all rows of the step, all ranks together."""
        from mmedx_fast.ops import token_weights

        tokens = sum(len(rollouts[i].token_ids) for i in chosen)
        return [
            token_weights(
                row.branch_index,
                loss_type,
                num_sequences=len(chosen),
                num_items_in_batch=tokens,
                max_completion_length=self.cfg.rollout.max_completion_length,
            )
            * (1.0 if plan.branches else 0.0)
            for plan, row in zip(plans, rows, strict=True)
        ]

    def _fixed_passes(self, batch: _Batch, fixed: dict[str, dict[int, Tensor]]) -> None:
        """Old log-probs when a batch is used more than once; reference ones only with a KL term.

        ``fixed`` keeps them by rollout, for rows that are packed anew after the policy has changed.
        """
        import torch

        passes: dict[str, Use] = {}
        if self.gba.num_iterations > 1:
            passes["old_logprob"] = "policy"
        if self.spec.beta > 0:
            passes["ref_logprob"] = "reference"
        for name, use in passes.items():
            if name in fixed:
                for members, tensors in zip(batch.members, batch.tensors, strict=True):
                    tensors[name] = torch.cat([fixed[name][i] for i in members])
                continue
            with self.meter.phase(name, tokens=batch.tokens[1]):
                found = self.policy.over_rows(batch.rows, partial(self._logprobs, use), use=use)
            for logprob, tensors in zip(found, batch.tensors, strict=True):
                tensors[name] = logprob
            fixed[name] = {
                rollout: tensors[name][row.branch_index == branch]
                for row, members, tensors in zip(
                    batch.rows, batch.members, batch.tensors, strict=True
                )
                for branch, rollout in enumerate(members)
            }

    def _logprobs(self, use: Use, _: int, row: PackedRow) -> Tensor:
        return self.policy.logprobs(row, temperature=self.spec.temperature, use=use)[0]

    def _check_mismatch(self, mismatch: float) -> None:
        if not mismatch <= self.gba.max_rollout_mismatch:
            raise StageError(
                f"the rollout engine's log-probs differ from the trainer's by {mismatch:.3f} nat per "
                f"token on average (gba.max_rollout_mismatch = {self.gba.max_rollout_mismatch}): the "
                "engine serves other weights than the trainer has, or computes something else"
            )


def _loss_spec(cfg: Config) -> PolicyLossSpec:
    from mmedx_fast.ops import PolicyLossSpec

    loss = cfg.gba.loss.model_dump()
    return PolicyLossSpec(temperature=cfg.rollout.temperature, **loss)
