"""Evaluation: base, experts, RL model and merged model on every specialty, through the rollout engine.

Greedy decoding; strict answer extraction (nothing extracted is wrong). Unless ``eval.guideline`` names one,
question i is asked under guideline i mod 4, so that adherence is measured for all four.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedx_fast import ranks
from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.guidelines import adherence
from mmedx_fast.prompts import Question
from mmedx_fast.rollout import BASE_VERSION, Rollout, Sampling
from mmedx_fast.run_folder import Stage, write_json, write_text
from mmedx_fast.scoring import extract_answer, format_ok, medevalkit_score, strict_score, think_text
from mmedx_fast.stages.caci import caci_stage, merged_model
from mmedx_fast.stages.common import finish, is_done
from mmedx_fast.stages.context import Context
from mmedx_fast.stages.dsa import expert_adapter, expert_stage
from mmedx_fast.stages.gba import gba_stage, rl_model
from mmedx_fast.stages.rollouts import image_findings, own_share
from mmedx_fast.stats import macro_average, wilson_interval

LOG = logging.getLogger(__name__)


def model_names(ctx: Context) -> list[str]:
    """The models of ``eval.models``, the experts by specialty."""
    names: list[str] = []
    for name in ctx.cfg.eval.models:
        names.extend(ctx.cfg.dsa.specialties if name == "experts" else (name,))
    return names


def eval_stage(ctx: Context, model: str) -> Stage:
    """The model's place under ``eval/``; it depends on what made the model and on how it is asked."""
    made_by = ""
    if model in ctx.cfg.dsa.specialties:
        made_by = expert_stage(ctx, model).fingerprint
    elif model in ("rl", "rl_start"):
        made_by = gba_stage(ctx).fingerprint
    elif model == "merged":
        made_by = caci_stage(ctx).fingerprint
    asked = ctx.cfg.fingerprint("eval", "data", "phantom", "model", "seed")
    return ctx.run.stage(f"eval/{model}", asked + made_by)


def run_eval(ctx: Context, models: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate what is not done yet; returns each model's result."""
    results = {}
    for model in models or model_names(ctx):
        stage = eval_stage(ctx, model)
        if not is_done(stage):
            _evaluate(ctx, stage, model)
        results[model] = stage.result()
    return results


def _evaluate(ctx: Context, stage: Stage, model: str) -> None:
    from mmedx_fast.cost import PhaseMeter

    meter = PhaseMeter()
    questions = ctx.questions("test")
    with meter.phase("load"):
        serve(ctx, model)
    with meter.phase("eval"):
        rows = ask(ctx, questions, description=f"Evaluating {model}")
    meter.add("eval", tokens=sum(row["tokens"] for row in rows))
    result = summarise(rows) | {
        "seconds": sum(phase["seconds"] for phase in meter.to_dict().values()),
        "phases": meter.to_dict(),
    }
    if ranks.is_main():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(stage.dir / "predictions.jsonl", lines)
        write_json(stage.dir / "metrics.json", result)
    finish(stage, result)


def serve(ctx: Context, model: str) -> None:
    """Put a model into the engine. ``rl_start`` is an adapter on the base, whatever RL then trained."""
    whole: Path | None = None
    if model == "merged":
        whole = merged_model(ctx)
    elif model == "rl" and ctx.cfg.gba.finetuning_type == "full":
        whole = rl_model(ctx)
    if whole is not None:
        ctx.serve_weights(whole).load_adapter(None, BASE_VERSION)
        return
    adapter: Path | None = None
    if model in ctx.cfg.dsa.specialties:
        adapter = expert_adapter(ctx, model)
    elif model == "rl":
        adapter = rl_model(ctx)
    elif model == "rl_start":
        start = gba_stage(ctx).dir / "start"
        adapter = {"base": None, "experts_mean": start}.get(ctx.cfg.gba.start, start)
        if ctx.cfg.gba.start in ctx.cfg.dsa.specialties:
            adapter = expert_adapter(ctx, ctx.cfg.gba.start)
    engine = ctx.serve_weights(ctx.model_path)
    engine.load_adapter(adapter, version=model_names(ctx).index(model))


def ask(
    ctx: Context, questions: Sequence[Question], description: str = "Asking"
) -> list[dict[str, Any]]:
    """Greedy answers, scored: one JSON-ready row per question.

    With several ranks each asks its share (rank 0 all of it where one server serves them), and every
    rank gets all rows.
    """
    shares = ranks.all_gather(_ask_own(ctx, questions, description))
    rows = [row for share in shares for row in share]
    return [row for _, row in sorted(rows, key=lambda numbered: int(numbered[0]))]


def _ask_own(
    ctx: Context, questions: Sequence[Question], description: str
) -> list[tuple[int, dict[str, Any]]]:
    """This rank's rows, each with its question's number."""
    from mmedx_fast.progress import progress

    own = own_share(ctx.engine, len(questions))
    if not own:
        return []
    fixed = ctx.cfg.eval.guideline
    asked = [(questions[i], fixed or GUIDELINE_NAMES[i % len(GUIDELINE_NAMES)]) for i in own]
    sampling = Sampling(greedy=True, max_tokens=ctx.cfg.eval.max_completion_length)
    with progress(len(asked), description, unit="question") as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.done)

        rollouts = ctx.engine.generate_requests(asked, sampling, show)
    return [
        (number, _row(question, guideline, rollout))
        for number, (question, guideline), rollout in zip(own, asked, rollouts, strict=True)
    ]


def _row(question: Question, guideline: str, rollout: Rollout) -> dict[str, Any]:
    record = question.record
    predicted = extract_answer(rollout.text, record.options)
    followed = adherence(
        think_text(rollout.text),
        guideline,
        question=record.question,
        options=record.options,
        answer=predicted,
        findings=image_findings(record.meta),
    )
    return {
        "id": record.id,
        "dataset": record.dataset,
        "specialty": record.specialty,
        "guideline": guideline,
        "question": record.question,
        "options": record.options,
        "answer": record.answer,
        "answer_label": record.answer_label,
        "images": [str(image) for image in record.images],
        "completion": rollout.text,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.token_ids),
        "predicted": predicted,
        "correct": bool(strict_score(rollout.text, record.options, _gold(record))),
        "correct_medevalkit": bool(medevalkit_score(rollout.text, record.options, _gold(record))),
        "format_ok": format_ok(rollout.text),
        "adherence": followed.score,
    }


def _gold(record: Any) -> str:
    return record.answer_label if record.options and record.answer_label else record.answer


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with 95 % intervals by specialty and as macro-average, and the rates beside it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["specialty"]), []).append(row)
    hits = {name: [float(row["correct"]) for row in part] for name, part in groups.items()}
    macro = macro_average(hits)
    by_guideline: dict[str, list[float]] = {}
    for row in rows:
        by_guideline.setdefault(row["guideline"], []).append(row["adherence"])
    return {
        "questions": len(rows),
        "macro_accuracy": macro.value,
        "macro_interval": [macro.low, macro.high],
        "accuracy": {name: _mean(values) for name, values in hits.items()},
        "intervals": {
            name: list(wilson_interval(int(sum(values)), len(values)))
            for name, values in hits.items()
        },
        "micro_accuracy": _mean([row["correct"] for row in rows]),
        "medevalkit_accuracy": _mean([row["correct_medevalkit"] for row in rows]),
        "format_rate": _mean([row["format_ok"] for row in rows]),
        "unparsed_rate": _mean([row["predicted"] is None for row in rows]),
        "truncated_rate": _mean([row["finish_reason"] == "length" for row in rows]),
        "adherence": {name: _mean(values) for name, values in by_guideline.items()},
        "tokens": sum(row["tokens"] for row in rows),
    }


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
