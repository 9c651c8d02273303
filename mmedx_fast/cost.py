"""What a run will cost: tokens, FLOPs, memory and GPU hours, stage by stage.

Imports no torch: ``mmedx plan`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast.config import Config
from mmedx_fast.cost_evaluation import EvaluationCount, merge_candidates
from mmedx_fast.cost_memory import (
    Part,
    Row,
    engine_here,
    fit,
    images_at_once,
    memory_parts,
    trained_params,
    trains_tower,
)
from mmedx_fast.cost_text import plan_text
from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.flops import (
    Counts,
    ModelShape,
    forward_flops,
    one_level_tokens,
    plain_counts,
    train_flops,
    tree_counts,
)
from mmedx_fast.gpus import Gpu
from mmedx_fast.meter import PhaseMeter, render_table

__all__ = [
    "Assumptions",
    "Counts",
    "ModelShape",
    "PhaseMeter",
    "forward_flops",
    "one_level_tokens",
    "plain_counts",
    "plan",
    "plan_text",
    "render_table",
    "train_flops",
    "tree_counts",
]

_VISION_2_5 = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _known(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b-instruct": _known(3584, 18944, 28, 28, 4, 152064)
    | {"vision_config": _VISION_2_5},
    "qwen2.5-vl-3b-instruct": _known(2048, 11008, 36, 16, 2, 151936)
    | {"vision_config": _VISION_2_5, "tie_word_embeddings": True},
    "qwen2-vl-2b-instruct": _known(1536, 8960, 28, 12, 2, 151936)
    | {"vision_config": {"depth": 32, "embed_dim": 1280}, "tie_word_embeddings": True},
}
"""Sizes from the models' published ``config.json``, for a plan made before anything is
downloaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot read from the configuration; every number is printed with the plan."""

    tflops: float = 400.0
    """Sustained bf16 TFLOP/s of one GPU (about 40 % of an H100's or H200's peak)."""
    bandwidth: float = 2.4
    """Sustained memory bandwidth in TB/s, the bound of decoding."""
    text_tokens: int = 200
    """Question, options and chat frame, without image and guideline."""
    guideline_tokens: int = 60
    response_tokens: int | None = None
    """Mean response length; null takes half of ``rollout.max_completion_length``."""
    image_tokens: int | None = None
    """All images of a question; null takes one image of ``model.max_pixels``."""
    test_questions: int | None = None
    """Of the run's own test set, and of every set of ``eval.sets`` without a ``limit`` that is not the phantom;
    null takes the phantom's size or ``data.limit`` for the former, else 2000 (MedXpertQA-MM's test set)."""

    @classmethod
    def of(cls, gpu: Gpu) -> Assumptions:
        """The speed of ``gpu``, all else as by default."""
        return cls(tflops=gpu.tflops, bandwidth=gpu.bandwidth)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (
                value > 0 or (field.name == "image_tokens" and value == 0)
            ):
                raise ValueError(f"{field.name} = {value} must be above 0")


def plan(
    cfg: Config,
    assume: Assumptions | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    gpu: Gpu | None = None,
    gpus: int = 1,
) -> dict[str, Any]:
    """Estimate a run: rows, tokens, FLOPs, memory and GPU hours of every stage, as plain JSON.

    ``gpus`` GPUs share the questions. A ``gpu`` adds money and whether the run fits; the speed is
    that of ``assume``, or of ``gpu`` where ``assume`` is not given.

    ``model_config`` is a Hugging Face config; null finds the model's own on disk, or takes the
    sizes of a known model. ``*_plain`` values are the same work with one sequence per rollout
    instead of a tree. Raises ValueError when the model is neither on disk nor known.
    """
    if gpus < 1:
        raise ValueError(f"gpus = {gpus} must be at least 1")
    share = cfg.rollout.tensor_parallel_size
    if engine_here(cfg) and share > gpus:
        raise ValueError(
            f"rollout.tensor_parallel_size = {share} needs as many GPUs, and the plan is for gpus = {gpus}: "
            f"plan for more (--gpus {share}), lower it, or give the engine GPUs of its own "
            "(rollout.engine=server with server_gpus or server_urls)"
        )
    if assume is None:
        assume = Assumptions.of(gpu) if gpu else Assumptions()
    model = ModelShape.from_config(model_config or find_model(cfg.model.path))
    facts = _Facts(cfg, assume, model, gpu, gpus)
    stages = [facts.dsa(), facts.rollout(), facts.update(), facts.evaluation()]
    keys = ("flops", "flops_plain", "gpu_hours", "gpu_hours_plain")
    parts = facts.memory()
    return {
        "model": {
            "path": cfg.model.path,
            "parameters": model.params,
            "lora_parameters": model.lora_params(cfg.lora.r),
            "trained_parameters": trained_params(cfg, model),
            "gflops_per_token": model.token_flops() / 1e9,
        },
        "assumptions": dataclasses.asdict(assume) | facts.lengths(),
        "evaluation": facts.asked.to_dict(),
        "stages": stages,
        "total": {key: sum(stage[key] for stage in stages) for key in keys},
        "memory": [dataclasses.asdict(part) for part in parts],
        "machine": facts.machine(parts),
        "per_1000_questions": facts.per_thousand(stages),
    }


class _Facts:
    """The numbers behind one plan; every method gives one of its rows."""

    def __init__(
        self, cfg: Config, assume: Assumptions, model: ModelShape, gpu: Gpu | None, gpus: int
    ):
        self.cfg, self.assume, self.model, self.gpu, self.gpus = cfg, assume, model, gpu, gpus
        image = assume.image_tokens
        self.image = _max_image_tokens(cfg, model) if image is None else image
        self.prompt = self.image + assume.text_tokens
        self.guideline = assume.guideline_tokens
        self.response = assume.response_tokens or max(1, cfg.rollout.max_completion_length // 2)
        self.asked = EvaluationCount.of(cfg, assume.test_questions)
        self.bytes = 2 if cfg.model.dtype == "bfloat16" else 4

    def lengths(self) -> dict[str, int | None]:
        sizes = self.asked.sets.values()
        shown = [size.questions for size in sizes if size.assumed or not self.cfg.eval.sets]
        return {
            "image_tokens": self.image,
            "prompt_tokens": self.prompt,
            "response_tokens": self.response,
            "test_questions": shown[0] if shown else None,
        }

    def dsa(self) -> dict[str, Any]:
        """Every question with its traces of a step, packed as a tree with one response each."""
        dsa = self.cfg.dsa
        rows = 0 if dsa.reuse else len(dsa.specialties) * dsa.steps * dsa.questions_per_step
        known = len(GUIDELINE_NAMES)
        traces = min(self.cfg.dsa.traces_per_question or known, known)
        steps = rows // dsa.questions_per_step
        return self._train("DSA: experts", rows, traces, n=1, passes=1, steps=steps)

    def update(self) -> dict[str, Any]:
        gba = self.cfg.gba
        rows = gba.steps * gba.questions_per_step
        n, inner = self.cfg.rollout.num_generations, gba.num_iterations
        forwards = (inner > 1) + (gba.loss.beta > 0)
        guidelines = len(gba.guidelines)
        return self._train(
            *("GBA: updates", rows, guidelines),
            n=n,
            passes=inner,
            forwards=forwards,
            steps=gba.steps,
            full=gba.finetuning_type == "full",
        )

    def rollout(self) -> dict[str, Any]:
        gba, n = self.cfg.gba, self.cfg.rollout.num_generations
        batch = gba.questions_per_step * len(gba.guidelines) * n
        return self._generate(
            "GBA: rollouts",
            gba.steps,
            gba.questions_per_step,
            len(gba.guidelines),
            n,
            batch,
            self.guideline,
        )

    def evaluation(self) -> dict[str, Any]:
        """Merge candidates answer validation questions once, the models what ``eval`` asks."""
        asked, guideline = self.asked, self.guideline if self.asked.guided else 0
        prompts, samples = asked.prompts_per_question, asked.answers_per_prompt
        name, every = "CACI and evaluation", asked.questions
        batch = every * prompts * samples
        row = self._generate(name, 1, every, prompts, samples, batch, guideline)
        if candidates := merge_candidates(self.cfg):
            every = candidates * self.cfg.caci.selection_limit
            guideline = 0 if self.cfg.eval.guideline == "none" else self.guideline
            more = self._generate(name, 1, every, 1, 1, every, guideline)
            row |= {key: row[key] + more[key] for key in row if key not in ("stage", "steps")}
        return row

    def memory(self) -> list[Part]:
        """Bytes on one GPU, where every answer of the longest row is as long as it may be."""
        longest = self.cfg.rollout.max_completion_length
        lengths = (self.prompt, self.guideline, longest, self.gpus)
        row = Row.of(self.cfg, *lengths)
        images = images_at_once(self.cfg, self.image, *lengths)
        return memory_parts(
            self.cfg, self.model, row, images, self._sequence(), self.gpu, self.gpus
        )

    def machine(self, parts: Sequence[Part]) -> dict[str, Any] | None:
        """The GPUs and whether one of them holds its part; None where none was named."""
        if self.gpu is None:
            return None
        sequence = self._sequence() * self.model.kv_bytes(self.bytes)
        held = fit(self.cfg, parts, sequence, self.gpu)
        return dataclasses.asdict(self.gpu) | {"gpus": self.gpus} | held

    def per_thousand(self, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """GPU hours and dollars of GBA for 1,000 questions with all their rollouts."""
        gba = [stage for stage in stages if stage["stage"].startswith("GBA")]
        questions = max(1, gba[0]["rows"])
        found: dict[str, Any] = {"responses": 1000 * len(self.cfg.gba.guidelines) * self._n()}
        for kind in ("", "_plain"):
            hours = 1000 * sum(stage[f"gpu_hours{kind}"] for stage in gba) / questions
            found[f"gpu_hours{kind}"] = hours
            price = None if self.gpu is None else self.gpu.dollars_per_hour
            found[f"dollars{kind}"] = None if price is None else hours * price
        return found

    def _sequence(self) -> int:
        """Tokens of a rollout at full length."""
        return self.prompt + self.guideline + self.cfg.rollout.max_completion_length

    def _n(self) -> int:
        return self.cfg.rollout.num_generations

    def _train(
        self,
        name: str,
        rows: int,
        guidelines: int,
        *,
        n: int,
        passes: int,
        steps: int,
        forwards: int = 0,
        full: bool = False,
    ) -> dict[str, Any]:
        lengths = (self.prompt, self.guideline, self.response)
        pair = [
            count(*lengths, guidelines=guidelines, n=n) for count in (tree_counts, plain_counts)
        ]
        flops = [
            rows
            * (
                passes * self._step_flops(c, full)
                + forwards * forward_flops(self.model, c, self.image)
            )
            for c in pair
        ]
        tokens = [rows * c.tokens for c in pair]
        return self._row(name, rows, rows * guidelines * n, tokens, flops, steps)

    def _step_flops(self, counts: Counts, full: bool) -> float:
        return train_flops(
            self.model,
            counts,
            self.image,
            lora_rank=self.cfg.lora.r,
            checkpointing=self.cfg.model.gradient_checkpointing,
            full=full,
            train_tower=full and trains_tower(self.cfg),
        )

    def _generate(
        self,
        name: str,
        calls: int,
        questions: int,
        guidelines: int,
        n: int,
        batch: int,
        guideline: int,
    ) -> dict[str, Any]:
        """``calls`` batches of ``questions``, with ``guideline`` tokens in each prompt after the question. Decoding
        reads weights and cache once per token step."""
        lengths = (self.prompt, guideline, self.response)
        tree = tree_counts(*lengths, guidelines=guidelines, n=n)
        rows, rollouts = calls * questions, calls * questions * guidelines * n
        bare = (self.prompt, guideline, 0)
        plain = plain_counts(*lengths, guidelines=guidelines, n=n)
        cold = plain_counts(*bare, guidelines=guidelines, n=n)
        flops = [rows * forward_flops(self.model, c, self.image) for c in (tree, plain)]
        tokens = [rows * c.tokens for c in (tree, plain)]
        each = math.ceil(batch / self.gpus)  # rollouts of one GPU; every one reads all weights
        at_once = max(1, min(each, self.cfg.rollout.max_num_seqs))
        steps = self.gpus * calls * math.ceil(each / at_once) * self.response
        context = self.prompt + guideline + self.response / 2
        cache = rollouts * self.response * context * self.model.kv_bytes(self.bytes)
        reads = (steps * self.model.params * self.bytes + cache) / (self.assume.bandwidth * 1e12)
        shared = tree.tokens - tree.targets
        row = self._row(name, rows, rollouts, tokens, flops, calls, at_least=reads)
        return row | {"prefill_tokens": rows * shared, "prefill_tokens_plain": rows * cold.tokens}

    def _row(
        self,
        name: str,
        rows: int,
        rollouts: int,
        tokens: Sequence[int],
        flops: Sequence[float],
        steps: int,
        at_least: float = 0.0,
    ) -> dict[str, Any]:
        hours = [max(f / (self.assume.tflops * 1e12), at_least) / 3600 for f in flops]
        seconds = [3600 * h / self.gpus / max(1, steps) for h in hours]
        return {
            "stage": name,
            "rows": rows,
            "responses": rollouts,
            "tokens": tokens[0],
            "tokens_plain": tokens[1],
            "flops": flops[0],
            "flops_plain": flops[1],
            "gpu_hours": hours[0],
            "gpu_hours_plain": hours[1],
            "steps": steps,
            "seconds_per_step": seconds[0],
            "seconds_per_step_plain": seconds[1],
        }


def _read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` in ``path``. Raises ValueError naming the file."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the model's {file}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return config


def find_model(path: str) -> dict[str, Any]:
    """The model's ``config.json``: of ``tiny``, of a folder, or of a name in the local hub cache."""
    if path == "tiny":
        from mmedx_fast.tiny import assets_folder

        return _read_config(assets_folder())
    if Path(path).is_dir():
        return _read_config(Path(path))
    known = _cached_config(path) or KNOWN_MODELS.get(path.rsplit("/", 1)[-1].lower())
    if known is None:
        raise ValueError(
            f"model.path = {path!r} is neither a folder, nor a model in the local hub cache, nor one "
            f"whose sizes are known ({', '.join(KNOWN_MODELS)}); give the folder of a local copy"
        )
    return known


def _cached_config(name: str) -> dict[str, Any] | None:
    """The ``config.json`` of a hub model that was downloaded before; asks no hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path
        return None
    return _read_config(Path(found).parent) if isinstance(found, str) else None


def _max_image_tokens(cfg: Config, model: ModelShape) -> int:
    if model.vision is None:
        return 0
    pixels = cfg.model.max_pixels
    if cfg.model.path == "tiny":
        from mmedx_fast.tiny import IMAGE_SIZE

        pixels = min(pixels, IMAGE_SIZE**2)
    return max(1, pixels // (model.vision.patch * model.vision.merge) ** 2)
