"""CACI: the experts and the RL model become one model. Conflicts are measured first, then the task vectors
are merged with TIES (or DARE, or linearly) straight from their LoRA factors into a copy of the base. An RL
model that was trained in full takes part with all it changed (:mod:`.caci_full`).

Where the configuration gives several strengths (density, scale, weight of the RL model), each candidate is
written, asked the validation questions, and the best one is kept; the test set plays no part in it.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast import ranks
from mmedx_fast.config import CaciConfig
from mmedx_fast.merge_report import describe, measures, merge_device, short_name
from mmedx_fast.progress import progress
from mmedx_fast.run_folder import Stage, write_folder, write_json
from mmedx_fast.stages.common import finish, is_done
from mmedx_fast.stages.context import Context, StageError
from mmedx_fast.stages.dsa import expert_adapter
from mmedx_fast.stages.gba import gba_stage, rl_model

if TYPE_CHECKING:
    import torch

    from mmedx_fast.ops import LoraFactors, MergeSpec
    from mmedx_fast.stages.caci_full import FullTaskVector

Factors = dict[str, "list[LoraFactors | None]"]


def caci_stage(ctx: Context) -> Stage:
    """The stage's place in the run folder, under the settings its result depends on."""
    rl = gba_stage(ctx).fingerprint
    return ctx.run.stage("caci", ctx.cfg.fingerprint("caci", "dsa", "lora") + rl)


def merged_model(ctx: Context) -> Path:
    """The merged model's folder. Raises StageError when the merge has not finished."""
    stage = caci_stage(ctx)
    if not stage.done():
        raise StageError(f"there is no merged model in {stage.dir}; run mmedx merge first")
    return stage.dir / "merged"


def merge_sources(ctx: Context) -> dict[str, Path]:
    """What is merged: the experts by specialty, then ``rl``."""
    sources = {name: expert_adapter(ctx, name) for name in ctx.cfg.dsa.specialties}
    return sources | {"rl": rl_model(ctx)}


def candidates(caci: CaciConfig, experts: int) -> list[MergeSpec]:
    """One spec per combination of the strengths the configuration lists; the last expert is the RL model."""
    from mmedx_fast.ops import MergeSpec

    return [
        MergeSpec(
            method=caci.method,
            density=density,
            trim_scope=caci.trim_scope,
            election=caci.election,
            divisor=caci.divisor,
            dare_mode=caci.dare_mode,
            rounding=caci.rounding,
            lam=scale,
            weights=(caci.expert_weight,) * (experts - 1) + (rl_weight,),
            seed=caci.seed,
        )
        for density, scale, rl_weight in itertools.product(caci.density, caci.scale, caci.rl_weight)
    ]


def run_conflicts(ctx: Context) -> dict[str, Any]:
    """Measure the conflicts between experts and RL model under the first candidate's trimming, and write
    ``caci/conflicts.json`` (per linear and summed). Rank 0 does it, and all ranks return it."""
    path = caci_stage(ctx).dir / "conflicts.json"
    ranks.main_only(lambda: write_json(path, _conflicts(ctx)))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _conflicts(ctx: Context) -> dict[str, Any]:
    from mmedx_fast.ops import model_conflicts

    sources = merge_sources(ctx)
    factors = _read(ctx, sources)
    spec = candidates(ctx.cfg.caci, len(sources))[0]
    linears = factors if isinstance(factors, dict) else factors.experts
    with ctx.engine_asleep(), progress(len(linears), "Conflicts", unit="linear") as bar:
        device = merge_device(_factor_bytes(factors))
        if isinstance(factors, dict):
            factors = _moved(factors, device)
            report = model_conflicts(factors, spec, on_linear=lambda *_: bar.update(1))
        else:
            report = factors.conflicts(spec, device, lambda *_: bar.update(1))
    return {
        "experts": list(sources),
        "spec": describe(spec),
        "linears": {short_name(name): measures(one) for name, one in report["linears"].items()},
        "summed": measures(report["total"]),
        "full": report,
    }


def run_caci(ctx: Context) -> dict[str, Any]:
    """Measure, merge, choose; returns the stage's result.

    Rank 0 merges; the candidates are asked on all ranks.
    """
    stage = caci_stage(ctx)
    if is_done(stage):
        return stage.result()
    from mmedx_fast.cost import PhaseMeter

    meter = PhaseMeter()
    with meter.phase("conflicts"):
        conflicts = run_conflicts(ctx)
    sources = merge_sources(ctx)
    factors = _read(ctx, sources) if ranks.is_main() else {}
    specs = candidates(ctx.cfg.caci, len(sources))
    tried: list[dict[str, Any]] = []
    best = 0
    if len(specs) > 1:
        tried = [
            _try(ctx, stage, number, spec, factors, meter)
            for number, spec in enumerate(progress(specs, "Merge candidates", unit="merge"))
        ]
        best = max(range(len(specs)), key=lambda i: (tried[i]["validation_accuracy"], -i))
    with meter.phase("merge"):
        ranks.main_only(lambda: _write_best(ctx, stage, factors, specs[best]))
    report = json.loads((stage.dir / "merge.json").read_text(encoding="utf-8"))
    phases = meter.to_dict()
    finish(
        stage,
        {
            "chosen": describe(specs[best]),
            "candidates": tried,
            "conflict_rate": conflicts["summed"]["sign_conflict"],
            "lost_update_fraction": report["total"]["lost_update_fraction"],
            "seconds": sum(phase["seconds"] for phase in phases.values()),
            "phases": phases,
        },
    )
    return stage.result()


def _write_best(
    ctx: Context, stage: Stage, factors: Factors | FullTaskVector, spec: MergeSpec
) -> None:
    with write_folder(stage.dir / "merged") as folder:
        report = write_merged(ctx, factors, spec, folder)
    shutil.rmtree(stage.dir / "candidates", ignore_errors=True)
    write_json(stage.dir / "merge.json", report)


def write_merged(
    ctx: Context, factors: Factors | FullTaskVector, spec: MergeSpec, folder: Path
) -> dict[str, Any]:
    """Merge into a fresh copy of the base and save a complete model folder (weights, processor)."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mmedx_fast.ops import merge_model_

    model = AutoModelForImageTextToText.from_pretrained(
        ctx.model_path,
        dtype=getattr(torch, ctx.cfg.model.dtype),
        local_files_only=ctx.cfg.model.offline,
        trust_remote_code=ctx.cfg.model.trust_remote_code,
    )
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with ctx.engine_asleep():
        model.to(merge_device(needed + _factor_bytes(factors)))
        weights = {
            name.removesuffix(".weight"): param.data
            for name, param in model.named_parameters()
            if param.dim() == 2 and name.endswith(".weight")
        }
        with torch.no_grad():
            if isinstance(factors, dict):
                report = merge_model_(weights, factors, spec)
            else:
                report = factors.merge_(model, spec)
        model.to("cpu")
    model.save_pretrained(folder)
    ctx.builder.processor.save_pretrained(folder)
    return report


def _factor_bytes(factors: Factors | FullTaskVector) -> int:
    if not isinstance(factors, dict):
        return factors.nbytes
    pairs = [f for experts in factors.values() for f in experts if f is not None]
    return sum(x.numel() * x.element_size() for f in pairs for x in (f.A, f.B))


def _moved(factors: Factors, device: torch.device) -> Factors:
    from mmedx_fast.ops import LoraFactors

    if device.type == "cpu":
        return factors
    return {
        name: [f and LoraFactors(f.A.to(device), f.B.to(device), f.scale) for f in experts]
        for name, experts in factors.items()
    }


def _try(
    ctx: Context,
    stage: Stage,
    number: int,
    spec: MergeSpec,
    factors: Factors | FullTaskVector,
    meter: Any,
) -> dict[str, Any]:
    """Validation accuracy of one candidate; a finished one is not tried again."""
    from mmedx_fast.stages.evaluate import ask

    path = stage.dir / "candidates" / f"{number:03d}.json"
    if ranks.from_main(path.is_file()):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    model = stage.dir / "candidates" / f"{number:03d}"

    def write() -> None:
        with write_folder(model) as folder:
            write_merged(ctx, factors, spec, folder)

    with meter.phase("merge"):
        ranks.main_only(write)
    questions = _selection(ctx)
    with meter.phase("select"):
        ctx.serve_weights(model)
        rows = ask(ctx, questions)  # every rank has read the model when this returns
    accuracy = sum(row["correct"] for row in rows) / len(rows)
    result = {"spec": describe(spec), "validation_accuracy": accuracy, "questions": len(rows)}
    if ranks.is_main():
        shutil.rmtree(model)
        write_json(path, result)
    return result


def _selection(ctx: Context) -> list[Any]:
    """The same validation questions for every candidate, spread over the specialties."""
    by_specialty: dict[str | None, list[Any]] = {}
    for question in ctx.questions("validation"):
        by_specialty.setdefault(question.record.specialty, []).append(question)
    turns = itertools.zip_longest(*by_specialty.values())
    spread = [question for turn in turns for question in turn if question is not None]
    return spread[: ctx.cfg.caci.selection_limit]


def _read(ctx: Context, sources: dict[str, Path]) -> Factors | FullTaskVector:
    import torch

    from mmedx_fast.stages.adapters import base_notes, by_linear, load_factors
    from mmedx_fast.stages.caci_full import FullTaskVector

    base_notes(sources)
    if ctx.cfg.gba.finetuning_type == "lora":
        return by_linear({name: load_factors(path) for name, path in sources.items()})
    *experts, rl = sources
    factors = by_linear({name: load_factors(sources[name]) for name in experts})
    dtype = getattr(torch, ctx.cfg.model.dtype)
    return FullTaskVector(factors, len(experts), sources[rl], ctx.model_path, dtype)
