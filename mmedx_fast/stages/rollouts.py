"""What GBA does with a step's rollouts beside learning from them: columns for the rewards, trees, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmedx_fast import ranks
from mmedx_fast.data.fields import image_findings
from mmedx_fast.prompts import Question
from mmedx_fast.rollout import Rollout, RolloutEngine

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmedx_fast.tree import Tree


def reward_columns(
    questions: Sequence[Question], rollouts: Sequence[Rollout]
) -> dict[str, list[Any]]:
    """Keyword arguments of every reward function, a list entry per rollout (TRL's convention)."""
    records = [questions[r.question].record for r in rollouts]
    return {
        "prompts": [record.question for record in records],
        "completions": [r.text for r in rollouts],
        "completion_ids": [r.token_ids for r in rollouts],
        "guideline": [r.guideline for r in rollouts],
        "id": [record.id for record in records],
        "specialty": [record.specialty for record in records],
        "question": [record.question for record in records],
        "options": [record.options for record in records],
        "answer": [record.answer for record in records],
        "answer_label": [record.answer_label for record in records],
        "findings": [image_findings(record.meta) for record in records],
    }


def own_share(engine: RolloutEngine, count: int) -> range:
    """Which of ``count`` questions this rank asks: its share, or with an engine for all ranks rank 0
    asks them all."""
    if engine.shared:
        return range(count if ranks.is_main() else 0)
    return range(ranks.rank(), count, ranks.world_size())


def gather_rollouts(made: list[Rollout], own: Sequence[int]) -> list[Rollout]:
    """All ranks' rollouts by question; ``own[k]`` is the number of this rank's k-th question."""
    if ranks.world_size() == 1:
        return made
    rows = [vars(r) | {"question": own[r.question]} for r in made]
    found = [Rollout(**row) for part in ranks.all_gather(rows) for row in part]
    return sorted(found, key=lambda r: r.question)


def rollout_trees(
    questions: Sequence[Question], rollouts: Sequence[Rollout], chosen: Sequence[int]
) -> tuple[list[Tree], list[int]]:
    """A tree per question with its chosen rollouts, and the rollout index of every branch."""
    from mmedx_fast.tree import Branch, Tree

    by_question: dict[int, list[int]] = {}
    for i in chosen:
        by_question.setdefault(rollouts[i].question, []).append(i)
    trees, flat = [], []
    for number, members in by_question.items():
        question = questions[number]
        branches = tuple(Branch(rollouts[i].prompt_ids, rollouts[i].token_ids) for i in members)
        trees.append(Tree(branches, question.pixel_values, question.image_grid_thw, question.id))
        flat.extend(members)
    return trees, flat


def rollout_records(
    columns: dict[str, list[Any]],
    rollouts: Sequence[Rollout],
    scores: np.ndarray,
    advantages: Tensor,
    use: Tensor,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Everything an update was made of, a mapping per rollout; ``names`` are the rewards'."""
    return [
        {
            "id": columns["id"][i],
            "guideline": rollout.guideline,
            "sample": rollout.sample,
            "text": rollout.text,
            "finish_reason": rollout.finish_reason,
            "rewards": dict(zip(names, scores[i].tolist(), strict=True)),
            "advantage": float(advantages[i]),
            "trained": bool(use[i]),
            "prompt_ids": rollout.prompt_ids,
            "token_ids": rollout.token_ids,
            "logprobs": rollout.logprobs,
        }
        for i, rollout in enumerate(rollouts)
    ]


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = [len(r.token_ids) for r in rollouts]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(r.finish_reason == "length" for r in rollouts)
        / len(rollouts),
    }
