"""Evaluation: base, experts, RL model and merged model on the run's test set or on the sets of ``eval.sets``,
through the rollout engine.

Strict answer extraction (nothing extracted is wrong). Unless ``eval.guideline`` says otherwise, question i is
asked under guideline i mod 4, so that adherence is measured for all four.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast import ranks
from mmedx_fast.config import Config
from mmedx_fast.data.records import Record
from mmedx_fast.evaluation.asking import Asking
from mmedx_fast.evaluation.chunks import Questioner
from mmedx_fast.evaluation.metrics import summarise
from mmedx_fast.evaluation.results import (
    JOURNAL,
    METRICS,
    PREDICTIONS,
    NothingAnsweredError,
    RejectedRows,
    conclude,
)
from mmedx_fast.evaluation.rows import prediction_row
from mmedx_fast.evaluation.sets import EvalSet, OnRejected
from mmedx_fast.prompts import Question
from mmedx_fast.rollout import BASE_VERSION, Rollout
from mmedx_fast.run_folder import Stage, write_json
from mmedx_fast.stages.caci import caci_stage, merged_model
from mmedx_fast.stages.common import finish, is_done
from mmedx_fast.stages.context import Context, StageError
from mmedx_fast.stages.dsa import expert_adapter, expert_stage
from mmedx_fast.stages.gba import gba_stage, rl_model
from mmedx_fast.stages.rollouts import own_share

__all__ = ["ask", "eval_sets", "eval_stage", "model_names", "run_eval", "serve", "summarise"]
LOG = logging.getLogger(__name__)
PAGE = "eval/predictions.html"
OWN = "test"
"""The name of the run's own test set."""


def model_names(ctx: Context) -> list[str]:
    """The models of ``eval.models``, the experts by specialty."""
    names: list[str] = []
    for name in ctx.cfg.eval.models:
        names.extend(ctx.cfg.dsa.specialties if name == "experts" else (name,))
    return names


def eval_sets(ctx: Context) -> dict[str, EvalSet]:
    """The sets to evaluate on: those of ``eval.sets``, else the run's own test set."""
    if ctx.cfg.eval.sets:
        return ctx.eval_sets

    def own(on_rejected: OnRejected | None) -> Iterator[Record]:
        return iter(ctx.records(OWN))  # the context has noted what its loader refused

    return {OWN: EvalSet(OWN, own, "")}


def eval_stage(ctx: Context, model: str, chosen: EvalSet | None = None) -> Stage:
    """The place under ``eval/`` of a model, on a set of ``eval.sets`` where one is given; it depends on what made
    the model and on what is asked how."""
    made_by = ""
    if model in ctx.cfg.dsa.specialties:
        made_by = expert_stage(ctx, model).fingerprint
    elif model in ("rl", "rl_start"):
        made_by = gba_stage(ctx).fingerprint
    elif model == "merged":
        made_by = caci_stage(ctx).fingerprint
    if chosen is None or not ctx.cfg.eval.sets:
        asked = ctx.cfg.fingerprint("eval", "data", "phantom", "model", "seed")
        return ctx.run.stage(f"eval/{model}", asked + made_by)
    asked = asked_fingerprint(ctx.cfg, chosen)
    return ctx.run.stage(place(ctx, model, chosen.name), asked + made_by)


def asked_fingerprint(cfg: Config, chosen: EvalSet) -> str:
    """A hash of what the answers to a set depend on beside the model; the other sets are no part of it."""
    parts = [
        cfg.fingerprint("model"),
        repr(Asking.of(cfg.eval, cfg.seed)),
        cfg.data.answer_format,
        cfg.data.system_prompt,
        cfg.data.max_prompt_length,
        chosen.identity,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run_eval(
    ctx: Context, models: Sequence[str] | None = None, sets: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate what is not done yet; returns each model's result, with ``eval.sets`` under ``model/set``."""
    results: dict[str, dict[str, Any]] = {}
    worked = False
    for model in models or model_names(ctx):
        served = False
        for name, chosen in eval_sets(ctx).items():
            if sets and name not in sets:
                continue
            stage = eval_stage(ctx, model, chosen)
            if not is_done(stage):
                _evaluate(ctx, stage, model, chosen, serve_first=not served)
                served = worked = True
            results[f"{model}/{name}" if ctx.cfg.eval.sets else model] = stage.result()
    page = ctx.run.path / PAGE

    def show() -> None:
        if worked or not page.exists():
            write_page(ctx, page)

    ranks.main_only(show)
    return results


def _evaluate(ctx: Context, stage: Stage, model: str, chosen: EvalSet, serve_first: bool) -> None:
    from mmedx_fast.cost import PhaseMeter

    own = not ctx.cfg.eval.sets
    total = len(ctx.records(OWN)) if own else ctx.eval_sizes[chosen.name][0]
    meter = PhaseMeter()
    with meter.phase("load"):
        if serve_first:
            serve(ctx, model)
    must_fit = (None, *ctx.cfg.gba.guidelines) if own else ()
    name = model if own else f"{model} on {chosen.name}"
    found = answer_set(ctx, chosen, stage.dir, stage.fingerprint, total, name, must_fit)
    meter.add("eval", found["seconds"], found["tokens"], calls=1)
    result = found | {
        "seconds": sum(phase["seconds"] for phase in meter.to_dict().values()),
        "phases": meter.to_dict(),
    }
    if ranks.is_main():
        write_json(stage.dir / METRICS, result)
    finish(stage, result)
    ranks.main_only(lambda: (stage.dir / JOURNAL).unlink(missing_ok=True))


def answer_set(
    ctx: Context,
    chosen: EvalSet,
    folder: Path,
    fingerprint: str,
    total: int,
    name: str,
    must_fit: tuple[str | None, ...] = (),
) -> dict[str, Any]:
    """Ask the served model the questions of a set that ``folder`` has no answer of; on every rank the figures of
    all, whose predictions are then in ``folder``.

    Raises StageError when no question of the set can be asked.
    """
    settings = ctx.cfg.eval
    refused = RejectedRows(folder / "rejected.part") if ranks.is_main() else None
    try:
        Questioner(
            engine=ctx.engine,
            builder=ctx.asking_builder,
            asking=Asking.of(settings, ctx.cfg.seed),
            chunk_size=settings.chunk_size,
            must_fit=() if settings.prompt == "medevalkit" else must_fit,
        ).answer(
            chosen.records(refused),
            chosen.name,
            folder / JOURNAL,
            fingerprint,
            total=total,
            description=f"Evaluating {name}",
        )
    finally:
        if refused is not None:
            refused.close()
    found: list[dict[str, Any]] = []

    def count() -> None:
        assert refused is not None
        try:
            found.append(conclude(folder, chosen.name, refused.path))
        except NothingAnsweredError as error:
            raise StageError(str(error)) from None

    ranks.main_only(count)
    result: dict[str, Any] = ranks.from_main(found[0] if found else None)
    return result


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
    """Greedy answers to a few questions, in the training prompt, scored: one prediction row per question.

    With several ranks each asks its share (rank 0 all of it where one server serves them), and every
    rank gets all rows. ``eval.guideline`` each stands for all in turn here.
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
    asking = Asking.greedy(ctx.cfg.eval)
    asked = [(questions[i], asking.guidelines(i)[0]) for i in own]
    with progress(len(asked), description, unit="question") as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.done)

        rollouts: list[Rollout] = ctx.engine.generate_requests(asked, asking.sampling, show)
    return [
        (number, prediction_row(question.record, question.record.split, [rollout]))
        for number, (question, _), rollout in zip(own, asked, rollouts, strict=True)
    ]


def place(ctx: Context, model: str, set_name: str | None = None) -> str:
    """Where a model's results on a set lie in the run folder, by default on the set that is shown first."""
    sets = ctx.cfg.eval.sets
    return f"eval/{model}/{set_name or next(iter(sets))}" if sets else f"eval/{model}"


def write_page(ctx: Context, page: Path) -> None:
    """One page over everything that this run has evaluated, unless ``eval.browse_rows`` is 0."""
    from mmedx_fast.evaluation.browse import Source, write_browser

    settings = ctx.cfg.eval
    sources = [
        Source(model, name, path, chosen)
        for model in model_names(ctx)
        for name, chosen in eval_sets(ctx).items()
        if (path := ctx.run.path / place(ctx, model, name) / PREDICTIONS).is_file()
    ]
    if sources and settings.browse_rows:
        title = f"Run {ctx.cfg.name}"
        write_browser(page, title, sources, settings.browse_rows, settings.browse_images)
