"""TRL's GRPO trainer for questions that are asked under several guidelines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from mmedx_fast.integrations import _trl_rows as rows
from mmedx_fast.integrations.trl import use_fused_head
from mmedx_fast.ops import guideline_advantages

# TRL's names for the divisor of advantages, as divisors of ours.
_SCALES = {"group": "guideline", "batch": "batch", "none": "none"}


class GuidelineGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose advantages compare a rollout with those of its guideline, and the guideline with
    the question's others (``ops.guideline_advantages``).

    The dataset comes in one of two forms:

    - One row per question. Each is asked under every guideline of ``guidelines``: the instruction closes the last
      user message (or the prompt, if it is a string), after images and question, as in ``mmedx_fast.prompts``. The
      reward functions get the column ``guideline``.
    - One row per question and guideline, named in a column ``guideline``, with the instruction already in the
      prompt. The rows of a question follow one another, each question has the same number of guidelines, and
      ``guidelines`` is not given. If there is a column ``question_id``, it must agree.

    ``num_generations`` counts the rollouts of a question; they are split equally among its guidelines.

    Args:
        *args, **kwargs: as for ``GRPOTrainer``. ``reward_weights``, ``multi_objective_aggregation`` and
            ``scale_rewards`` keep their meaning. Without an ``environment_factory``.
        guidelines: names from ``mmedx_fast.guidelines.GUIDELINES``, or instructions by name; None: all four, unless
            the dataset has its own.
        within, between, baseline, guideline_weights: as in ``ops.guideline_advantages``; weights by name.
        scale: the divisors, as there. None follows ``scale_rewards``: "group" becomes ``guideline`` (each term by
            the deviation of its own group), the others keep their names; ``normalize_then_sum`` divides by the
            batch's, as in TRL. With ``scale="group"`` (or the batch's, or none) and within = between = 1 the
            advantages are those of ``GRPOTrainer``.
        fused_head: score by :func:`use_fused_head`.

    Logged beside TRL's metrics: ``guideline/<name>/reward`` (the weighted sum) and, with several reward functions,
    ``guideline/<name>/rewards/<function>``: means over the rollouts they apply to.

    Raises:
        ValueError: at construction, for a dataset, option or number that does not fit; the message names it.
    """

    _signature_columns: list[str]

    def __init__(
        self,
        *args: Any,
        guidelines: Sequence[str] | Mapping[str, str] | None = None,
        within: float = 1.0,
        between: float = 1.0,
        scale: str | None = None,
        baseline: str = "mean",
        guideline_weights: Mapping[str, float] | None = None,
        fused_head: bool = True,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("environment_factory") is not None:
            raise ValueError(
                "environment_factory is set: an environment writes prompts itself, after the guideline. Leave it "
                "out, or ask under guidelines in its reset() and use trl.GRPOTrainer"
            )
        train = given.get("train_dataset")
        self._has_column = rows.has_column(train)
        self._instructions = {} if self._has_column else rows.instructions(guidelines)
        if self._has_column and guidelines is not None:
            raise ValueError(
                f"the dataset has a column {rows.COLUMN!r} and guidelines={guidelines!r} is given: remove one"
            )
        self._names = list(self._instructions) or rows.check_blocks(train, "train_dataset")
        self._check_eval(given.get("eval_dataset"))
        super().__init__(*args, **kwargs)
        rows.check_share(self.num_generations, len(self._names), "num_generations")
        if given.get("eval_dataset") is not None:
            rows.check_share(self.num_generations_eval, len(self._names), "num_generations_eval")
        self._options = {
            "combine": self.multi_objective_aggregation,
            "scale": self._scale(scale),
            "within": within,
            "between": between,
            "baseline": baseline,
            "guideline_weights": self._weights(guideline_weights),
            "eps": 1e-4,
            "ddof": 1,
        }
        # an option that the op does not know is refused now, not after the first rollouts
        self._advantages_of(torch.zeros(2, len(self.reward_funcs)), torch.zeros(2).long(), 2)
        if fused_head:
            use_fused_head(self)

    def _check_eval(self, dataset: Any) -> None:
        if dataset is None:
            return
        for name, part in rows.datasets_in(dataset, "eval_dataset"):
            if rows.has_column(part) != self._has_column:
                one, other = (
                    ("train_dataset", name) if self._has_column else (name, "train_dataset")
                )
                raise ValueError(
                    f"{one} has a column {rows.COLUMN!r} and {other} has none: give it to both or to neither"
                )
            if self._has_column and set(found := rows.check_blocks(part, name)) != set(self._names):
                raise ValueError(
                    f"{name} has the guidelines {sorted(found)}, train_dataset {sorted(self._names)}: "
                    "evaluate under those that are trained"
                )

    def _scale(self, scale: str | None) -> str:
        if scale is not None:
            return scale
        if self.multi_objective_aggregation == "normalize_then_sum":
            return "batch"
        if self.scale_rewards not in _SCALES:
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not known: use one of {', '.join(_SCALES)}"
            )
        return _SCALES[self.scale_rewards]

    def _weights(self, weights: Mapping[str, float] | None) -> torch.Tensor | None:
        if weights is None:
            return None
        if set(weights) != set(self._names):
            raise ValueError(
                f"guideline_weights has {sorted(weights)}, the guidelines are {sorted(self._names)}: "
                "give one weight for each"
            )
        return torch.tensor([float(weights[name]) for name in self._names])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if rows.COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, rows.COLUMN]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        return rows.GuidelineSampler(sampler, len(self._names)) if self._has_column else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        return rows.GuidelineSampler(sampler, len(self._names)) if self._has_column else sampler

    def _group_size(self) -> int:
        """Rollouts of one question; they are neighbours in the batch of all ranks."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # an engine asked for n rollouts takes every n-th prompt for its n copies: those are a guideline's
        share = max(1, num_generations // len(self._names))
        return super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, share, *args, **kwargs
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards_of_batch = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_of_batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        size, start = self._group_size(), self.accelerator.process_index * len(inputs)
        if not self._has_column:
            share = size // len(self._names)
            asked = [self._names[(start + i) % size // share] for i in range(len(inputs))]
            inputs = [
                rows.ask(row, name, self._instructions[name])
                for row, name in zip(inputs, asked, strict=True)
            ]
        names = [row[rows.COLUMN] for row in inputs]
        self._log_completion_extra(rows.COLUMN, names)
        output = super()._generate_and_score_completions(inputs)
        rewards = self._rewards_of_batch
        order = {name: k for k, name in enumerate(self._names)}
        ids = torch.tensor([order[name] for name in gather_object(names)], device=rewards.device)
        advantages = self._advantages_of(rewards, ids, size)
        output["advantages"] = advantages[start : start + len(inputs)]
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        self._log_guidelines(rewards, ids)
        return output

    def _advantages_of(self, rewards: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
        """[B] advantages from rewards [B, M] of all ranks, the guidelines [B] and rollouts of a question."""
        weights = self._options["guideline_weights"]
        options = {
            **self._options,
            "guideline_weights": None if weights is None else weights.to(rewards.device),
        }
        question = torch.arange(len(rewards), device=rewards.device) // size
        reward_weights = self.reward_weights.to(rewards.device)
        return guideline_advantages(
            rewards, question, ids, reward_weights=reward_weights, **options
        )[0]

    def _log_guidelines(self, rewards: torch.Tensor, ids: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        for k, name in enumerate(self._names):
            mine = ids == k
            metrics[f"guideline/{name}/reward"].append(total[mine].nanmean().item())
            if rewards.shape[1] > 1:
                for function, column in zip(self.reward_func_names, rewards.T, strict=True):
                    key = f"guideline/{name}/rewards/{function}"
                    metrics[key].append(column[mine].nanmean().item())
