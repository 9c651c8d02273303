"""How the first step's questions become packed rows, shown before anything is trained: ``mmedx dsa --plan``
and ``mmedx gba --plan``. Loads data and tokenizer, no model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmedx_fast.stages.common import rank_rows, row_target
from mmedx_fast.stages.context import Context, batches

if TYPE_CHECKING:
    from mmedx_fast.planner import RowPlan
    from mmedx_fast.tree import Tree


def dsa_plan(ctx: Context, specialty: str) -> str:
    """The rows of a specialty's first step, as a table."""
    from mmedx_fast.stages.dsa import sft_tree, training_questions

    dsa = ctx.cfg.dsa
    questions = training_questions(ctx, specialty)
    order = batches(len(questions), dsa.questions_per_step, 1, (ctx.cfg.seed, specialty))
    picked = [questions[i] for i in next(iter(order))]
    trees = [sft_tree(q, dsa.traces_per_question, 1 + n)[0] for n, q in enumerate(picked)]
    return f"DSA {specialty}, step 1\n{_table(ctx, trees)}"


def gba_plan(ctx: Context) -> str:
    """The rows of the first step, as a table, for responses of half the longest length."""
    from mmedx_fast.tree import Branch, Tree

    cfg = ctx.cfg
    length = max(1, cfg.rollout.max_completion_length // 2)
    questions = ctx.questions("train")
    order = batches(len(questions), cfg.gba.questions_per_step, 1, (cfg.seed, "gba"))
    trees = []
    for question in (questions[i] for i in next(iter(order))):
        # Ids that no response shares, as those of answers part at once.
        branches = tuple(
            Branch(question.prompt_ids(guideline), [-1 - sample] * length)
            for guideline in cfg.gba.guidelines
            for sample in range(cfg.rollout.num_generations)
        )
        trees.append(Tree(branches, question.pixel_values, question.image_grid_thw, question.id))
    return f"GBA, step 1, with responses of {length} tokens\n{_table(ctx, trees)}"


def _table(ctx: Context, trees: list[Tree]) -> str:
    import torch

    from mmedx_fast._env import default_device
    from mmedx_fast.attention import choose_backend
    from mmedx_fast.meter import render_table

    device, model = default_device(), ctx.cfg.model
    backend = choose_backend(model.attention, device, getattr(torch, model.dtype))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    plans = rank_rows(trees, world, ctx.cfg.gba, row_target(backend, device))
    rows = [
        [rank, number, *cells]
        for rank, own in enumerate(plans)
        for number, cells in enumerate(map(_cells, own), start=1)
    ]
    plain = sum(_plain(plan) for own in plans for plan in own)
    packed = sum(plan.n_tokens for own in plans for plan in own)
    head = ["rank", "row", "questions", "responses", "tokens", "plain", "response tokens", "images"]
    saved = f"{packed:,} tokens instead of {plain:,}: {plain / packed:.2f} times fewer"
    return f"{render_table(head, rows)}\n{saved}"


def _cells(plan: RowPlan) -> Iterator[object]:
    yield len({tree.name for tree in plan.trees}) if plan.branches else 0
    yield len(plan.branches)
    yield plan.n_tokens
    yield _plain(plan)
    yield sum(len(b.response_ids) for tree in plan.trees for b in tree.branches)
    yield sum(0 if t.image_grid_thw is None else len(t.image_grid_thw) for t in plan.trees)


def _plain(plan: RowPlan) -> int:
    return sum(len(b.prompt_ids) + len(b.response_ids) for t in plan.trees for b in t.branches)
