"""DSA: one LoRA expert per specialty, trained on step-by-step traces under every guideline it has.

The traces of one question share [images + question] in a packed row, so that its image and stem are computed
once for all four guidelines.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast import ranks
from mmedx_fast.config import deepspeed_settings
from mmedx_fast.progress import progress
from mmedx_fast.prompts import Question
from mmedx_fast.run_folder import Stage
from mmedx_fast.stages.common import (
    Stopped,
    StopSignal,
    all_parts,
    check_tree,
    data_note,
    finish,
    is_done,
    load_progress,
    metrics_log,
    row_tokens,
    save_progress,
    seed_everything,
    step_rates,
    take_over,
)
from mmedx_fast.stages.context import Context, StageError, batches
from mmedx_fast.stages.guard import BadSteps, RowBound, StepRows, finite_loss

if TYPE_CHECKING:
    from torch import Tensor

    from mmedx_fast.meter import StepRates
    from mmedx_fast.planner import RowPlan
    from mmedx_fast.policy import Policy
    from mmedx_fast.tree import PackedRow, Tree

LOG = logging.getLogger(__name__)


def expert_stage(ctx: Context, specialty: str) -> Stage:
    """The specialty's place in the run folder, under the settings its result depends on."""
    return ctx.run.stage(
        f"dsa/{specialty}", ctx.cfg.fingerprint("seed", "model", "data", "phantom", "lora", "dsa")
    )


def expert_adapter(ctx: Context, specialty: str) -> Path:
    """The trained adapter's folder. Raises StageError when DSA has not finished for it."""
    stage = expert_stage(ctx, specialty)
    if not stage.done():
        raise StageError(
            f"there is no finished expert for {specialty} in {stage.dir}; run mmedx dsa first"
        )
    return stage.dir / "adapter"


def run_dsa(ctx: Context, specialties: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Train the experts that are not done yet; returns each one's result."""
    results = {}
    for specialty in specialties or ctx.cfg.dsa.specialties:
        stage = expert_stage(ctx, specialty)
        if not is_done(stage):
            if ctx.cfg.dsa.reuse is not None:
                take_over(stage, Path(ctx.cfg.dsa.reuse))
            else:
                _train_expert(ctx, stage, specialty)
        results[specialty] = stage.result()
    return results


def sft_tree(
    question: Question, traces: int | None = None, turn: int = 0
) -> tuple[Tree, list[int]]:
    """The question with its traces as branches, and each target's token count.

    ``traces`` of them (null: all), beginning with number ``turn`` and wrapping around.
    """
    from mmedx_fast.tree import Branch, Tree

    keys = list(question.record.reasoning)
    if traces is not None and traces < len(keys):
        keys = [keys[(turn + k) % len(keys)] for k in range(traces)]
    branches = []
    for key in keys:
        guideline = key or None
        text = question.builder.target_text(question.record, guideline)
        branches.append(Branch(question.prompt_ids(guideline), question.builder.response_ids(text)))
    tree = Tree(tuple(branches), question.pixel_values, question.image_grid_thw, question.id)
    return tree, [len(branch.response_ids) for branch in branches]


def training_questions(ctx: Context, specialty: str) -> list[Question]:
    """The specialty's questions with a trace. Raises StageError where there are none."""
    questions = [q for q in ctx.questions("train") if q.record.specialty == specialty]
    if not questions:
        raise StageError(
            f"the training data has no questions of {specialty}; leave it out with dsa.specialties=[...]"
        )
    traced = [q for q in questions if q.record.reasoning]
    if not traced:
        raise StageError(
            f"none of the {len(questions)} training questions of {specialty} has a reasoning trace; "
            "DSA needs them (MMedExpert JSONL). For RL alone: mmedx gba gba.start=base"
        )
    if len(traced) < len(questions):
        LOG.warning(
            "%s: %d of %d questions have no trace and are left out of DSA",
            specialty,
            len(questions) - len(traced),
            len(questions),
        )
    return traced


def _train_expert(ctx: Context, stage: Stage, specialty: str) -> None:
    from mmedx_fast.cost import PhaseMeter
    from mmedx_fast.policy import Policy

    began = time.perf_counter()
    cfg, dsa = ctx.cfg, ctx.cfg.dsa
    questions = training_questions(ctx, specialty)
    seed_everything(cfg.seed)
    policy = Policy.load(
        ctx.model_path,
        model=ctx.model,
        lora=cfg.lora,
        optimizer=dsa.optimizer,
        total_steps=dsa.steps,
        deepspeed=deepspeed_settings(cfg),
        seed=cfg.seed,
        banned_token_ids=ctx.builder.banned_token_ids,
    )
    try:
        check_tree(policy, questions, lambda q: [key or None for key in q.record.reasoning])
        done, meter_state, extra = load_progress(stage, policy, questions, cfg.data.train)
        meter, rates = PhaseMeter(meter_state), step_rates(policy, cfg)
        meter.add("start", time.perf_counter() - began, calls=1)
        bound = RowBound(cfg.gba, extra.get("row_bound"), stage.dir)
        bad_steps = BadSteps(stage, dsa.optimizer, "dsa.optimizer", extra.get("bad_steps", 0))
        order = list(
            batches(len(questions), dsa.questions_per_step, dsa.steps, (cfg.seed, specialty))
        )
        with (
            metrics_log(stage, ctx.run.path / "tb" / stage.name, done) as log,
            progress(dsa.steps, f"DSA {specialty}", unit="step", start=done) as bar,
            StopSignal() as stop,
        ):
            for step in range(done + 1, dsa.steps + 1):
                batch = [questions[i] for i in order[step - 1]]
                metrics, raw = _update(policy, batch, step, meter, rates, ctx, bound)
                records = partial(_records, batch, step, ctx)
                bad_steps.check(step, metrics, raw, records)
                taken = meter.take()
                log.log(step, metrics | taken | rates.take(taken, len(batch)))
                stopping = stop.agreed()
                due = step % dsa.save_steps == 0 or stopping
                if due and step < dsa.steps:
                    extra = {
                        "data": data_note(questions),
                        "row_bound": bound.state,
                        "bad_steps": bad_steps.in_a_row,
                    }
                    with meter.phase("checkpoint"):
                        save_progress(stage, step, policy, meter, cfg, extra)
                    if stopping:
                        ranks.barrier()  # a rank that ends makes launchers end those that still write
                        raise Stopped(f"DSA {specialty} stopped after step {step}; it is saved")
                bar.update(1, loss=metrics["loss"])
        policy.save_adapter(stage.dir / "adapter")
        phases = meter.to_dict()
        finish(
            stage,
            {
                "specialty": specialty,
                "questions": len(questions),
                "steps": dsa.steps,
                "loss": metrics["loss"],
                "base_fingerprint": policy.fingerprint,
                "seconds": sum(phase["seconds"] for phase in phases.values()),
                "phases": phases,
            },
        )
        if stop.agreed():
            raise Stopped(f"DSA {specialty} is finished")
    finally:
        policy.close()


def _batch_trees(questions: list[Question], step: int, ctx: Context) -> tuple[list[Tree], int]:
    """A tree per question with the traces whose turn it is, and all their target tokens."""
    traces = ctx.cfg.dsa.traces_per_question
    made = [sft_tree(question, traces, step + n) for n, question in enumerate(questions)]
    return [tree for tree, _ in made], sum(sum(lengths) for _, lengths in made)


def _records(questions: list[Question], step: int, ctx: Context) -> list[dict[str, Any]]:
    """What a step learns from, a mapping per trace."""
    trees, _ = _batch_trees(questions, step, ctx)
    return [
        {
            "id": question.id,
            "text": question.builder.tokenizer.decode(branch.response_ids),
            "prompt_ids": list(branch.prompt_ids),
            "token_ids": list(branch.response_ids),
        }
        for question, tree in zip(questions, trees, strict=True)
        for branch in tree.branches
    ]


def _update(
    policy: Policy,
    questions: list[Question],
    step: int,
    meter: Any,
    rates: StepRates,
    ctx: Context,
    bound: RowBound,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """One optimizer step: the mean over all target tokens of the batch's negative log-likelihood.

    Returns (metrics, the raw ones of every row).
    """
    import torch

    from mmedx_fast.ops import merge_metrics

    with meter.phase("data"):
        trees, tokens = _batch_trees(questions, step, ctx)

    def pack(plans: list[RowPlan]) -> list[tuple[PackedRow, Tensor]]:
        with meter.phase("data"):
            made = [plan.pack(policy.rope_index) for plan in plans]
        # A row without work takes part with weight 0.
        shares = [1.0 / tokens if plan.branches else 0.0 for plan in plans]
        return [
            (row, torch.full(row.targets.shape, share))
            for row, share in zip(made, shares, strict=True)
        ]

    def backward(packed: list[tuple[PackedRow, Tensor]]) -> list[dict[str, float]]:
        rows, weights = [row for row, _ in packed], [weight for _, weight in packed]
        return policy.over_rows(rows, lambda i, row: policy.sft_backward(row, weights[i]))

    rows = StepRows(policy, trees, bound, pack)
    with meter.phase("train"):
        raw = all_parts(rows.run(backward))
        stepped = policy.step(refuse=not finite_loss(raw))
    rates.add(row for row, _ in rows.packed)
    plain, computed = row_tokens(row for row, _ in rows.packed)
    meter.add("train", tokens=computed)
    loss = merge_metrics(raw)["sum:loss"]
    return {"loss": loss, "tokens_saved": plain / computed, **stepped}, raw
