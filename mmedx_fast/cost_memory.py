"""Memory of a run by part, and whether it fits a GPU. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

from mmedx_fast.config import Config, deepspeed_settings
from mmedx_fast.cost_activations import WIDE, Training, row_memory
from mmedx_fast.cost_tower import Images, feature_bytes, tower_memory
from mmedx_fast.flops import ModelShape, tree_counts
from mmedx_fast.gpus import Gpu

LOGITS_TILE = 750_000_000
"""Most bytes of a logits tile on CUDA, as in ``kernels/_logits.py``."""

TOWER = "activations kept by the vision tower"

Phase = Literal["always", "update", "layer", "head", "tower", "rollout"]
"""When a part is held; ``layer`` (a block's backward), ``head`` (the loss) and ``tower`` (a trained tower's
backward) take turns in the update."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes on one GPU, and the phase that holds them."""

    name: str
    bytes: int
    phase: Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The longest packed row of an update."""

    tokens: int
    targets: int
    """Response tokens, the ones that reach the head."""
    keys: int
    """Keys that the attention gathers: of every segment, all those on its way from the root."""

    @classmethod
    def of(cls, cfg: Config, prompt: int, guideline: int, response: int, gpus: int) -> Row:
        """As many questions as ``gba.max_row_tokens`` and a GPU's share of the step allow."""
        k, n = len(cfg.gba.guidelines), cfg.rollout.num_generations
        tree = tree_counts(prompt, guideline, response, guidelines=k, n=n)
        questions = math.ceil(cfg.gba.questions_per_step / gpus)
        tokens = min(cfg.gba.max_row_tokens, questions * tree.tokens)
        stem = prompt + guideline
        keys = prompt + k * stem + k * n * (stem + response)
        share = tokens / tree.tokens
        return cls(tokens=tokens, targets=int(tree.targets * share), keys=int(keys * share))


def images_at_once(
    cfg: Config, image: int, prompt: int, guideline: int, response: int, gpus: int
) -> Images:
    """The most images, of ``image`` tokens for each question, that a GPU has in a row and in a step.

    Answers may be short: a row takes as many questions as their prompts leave room for. A question that is
    split (its answers ``response`` tokens long) is held until the last row that shows it. Rows go by length,
    so that may be all questions.
    """
    gba = cfg.gba
    questions = math.ceil(gba.questions_per_step / gpus)
    # A part of a question has at least one answer to one guideline.
    fitting = max(1, gba.max_row_tokens // (prompt + guideline + 1))
    row = min(questions, fitting, gba.max_images or questions)
    k, n = len(gba.guidelines), cfg.rollout.num_generations
    tree = tree_counts(prompt, guideline, response, guidelines=k, n=n)
    split = tree.tokens > gba.max_row_tokens or tree.targets > (
        gba.max_response_tokens or tree.targets
    )
    if trains_tower(cfg):
        # Where gradients meet within a backward, every row runs the tower itself.
        waits = split and not (gpus > 1 and zero_stage(cfg) > 1)
        kept = waits
    else:
        # Features are computed for all rows at once where several passes read them.
        waits, kept = False, split or gba.num_iterations > 1 or gba.loss.beta > 0
    return Images(
        row=row * image,
        row_images=row,
        held=(questions if kept else row) * image,
        waits=waits,
    )


def trains_tower(cfg: Config) -> bool:
    """Whether GBA trains the vision tower; a LoRA is taken to be on the language model alone."""
    return cfg.gba.finetuning_type == "full" and not cfg.gba.freeze_vision_tower


def training(cfg: Config, gpu: Gpu | None) -> Training:
    """How GBA trains; Liger's kernels are taken as installed where a GPU is named."""
    liger = cfg.model.use_liger_kernel
    return Training(
        size=_size(cfg),
        checkpointing=cfg.model.gradient_checkpointing,
        full=cfg.gba.finetuning_type == "full",
        rank=cfg.lora.r,
        stock_lora=zero_stage(cfg) == 3,
        liger=gpu is not None if liger == "auto" else liger,
    )


def memory_parts(
    cfg: Config,
    model: ModelShape,
    row: Row,
    images: Images,
    sequence: int,
    gpu: Gpu | None,
    gpus: int,
) -> list[Part]:
    """What one of ``gpus`` GPUs holds in GBA, its dearest stage.

    ``sequence`` is the tokens of a full-length rollout. With ``gpu`` the KV cache is what vLLM takes
    there; without, what all sequences need at full length.
    """
    how, size = training(cfg, gpu), _size(cfg)
    used = row_memory(model, how, tokens=row.tokens, keys=row.keys, targets=row.targets)
    share = cfg.rollout.tensor_parallel_size
    engine = model.params * size // share if engine_here(cfg) else 0
    return [
        *_held_by_training(cfg, model, how, gpus),
        Part(f"activations kept of a row of {row.tokens:,} tokens", used.kept, "update"),
        Part("one block's backward", used.layer, "layer"),
        Part("states and gradients at the head", used.head, "head"),
        Part("logits tile, fp32", logits_tile(model.vocab, row.targets), "head"),
        *_held_by_images(cfg, model, how, images, used.kept),
        Part("rollout engine weights", engine, "rollout"),
        Part("KV cache", kv_cache(cfg, model, sequence, size, gpu, engine), "rollout"),
    ]


def _held_by_images(
    cfg: Config, model: ModelShape, how: Training, images: Images, kept: int
) -> list[Part]:
    """Features, and of a trained tower its activations. Its blocks go backward when the ``kept`` activations
    of the row are gone: what counts is how much more they take."""
    trained = trains_tower(cfg)
    found = [Part("image features", feature_bytes(model, how, images, trained=trained), "update")]
    if trained:
        tower = tower_memory(model, how, images)
        name = f"{TOWER} of {images.held:,} image tokens"
        beyond = max(0, tower.layer - kept)
        found.append(Part(name, tower.kept, "update"))
        found.append(
            Part("a vision block's backward, beyond the row's activations", beyond, "tower")
        )
    return found


def logits_tile(vocab: int, targets: int) -> int:
    """Bytes of the largest tile of logits; its gradient is written over it."""
    return min(LOGITS_TILE, WIDE * vocab * targets)


def _held_by_training(cfg: Config, model: ModelShape, how: Training, gpus: int) -> list[Part]:
    """Weights, gradients and optimizer states, by what each ZeRO stage shards over the GPUs: the
    optimizer (1), gradients (2), weights (3).

    An adapter is float32 and its own master copy without ZeRO, which always makes one. Weights that are
    trained in full have the model's dtype; their gradients add up in float32, and bfloat16 ones have
    masters, for which stage 0 becomes stage 1.
    """
    zero = zero_settings(cfg)
    each = how.size if how.full else WIDE
    stage = zero_stage(cfg)
    stage = max(stage, 1) if each != WIDE else stage
    trained, frozen = trained_params(cfg, model), model.params
    if how.full:
        frozen -= trained
    moments, grads, weights = (gpus if stage >= least else 1 for least in (1, 2, 3))
    parts = [
        Part("frozen weights", frozen * how.size // weights, "always"),
        Part("trained weights", trained * each // weights, "always"),
        Part("gradients, fp32", WIDE * trained // grads, "always"),
        Part("master weights, fp32", WIDE * trained // moments if stage else 0, "always"),
        Part("optimizer: Adam's two moments", 2 * WIDE * trained // moments, "always"),
    ]
    if stage and zero.get("contiguous_gradients", True):
        # Buffers of this many elements whatever is trained, two of them where one is filled while the
        # other is reduced; ZeRO-3 has one and keeps it. Stage 1 reduces the float32 gradients.
        twice = stage < 3 and zero.get("overlap_comm", False)
        wide = WIDE if stage == 1 else each
        bucket = int(zero.get("reduce_bucket_size", 5e8)) * wide * (2 if twice else 1)
        parts.append(Part("ZeRO's gradient buckets", bucket, "always" if stage == 3 else "update"))
    if stage == 3 and gpus > 1:
        live = min(model.params, int(zero.get("stage3_max_live_parameters", 1e9)))
        parts.append(Part("ZeRO-3's gathered weights, at most", live * how.size, "update"))
    return parts


def trained_params(cfg: Config, model: ModelShape) -> int:
    """Weights that GBA trains."""
    if cfg.gba.finetuning_type == "lora":
        return model.lora_params(cfg.lora.r)
    tower = 0 if model.vision is None else model.vision.linear_params
    return model.params - (0 if trains_tower(cfg) else tower)


def engine_here(cfg: Config) -> bool:
    """Whether the rollout engine's weights and cache are on the trainer's GPUs."""
    rollout = cfg.rollout
    return rollout.engine != "server" or not (rollout.server_urls or rollout.server_gpus)


def _size(cfg: Config) -> int:
    return 2 if cfg.model.dtype == "bfloat16" else 4


def kv_cache(
    cfg: Config, model: ModelShape, sequence: int, size: int, gpu: Gpu | None, engine: int
) -> int:
    """Bytes of the rollout engine's cache; 0 where vLLM's share does not even hold the weights, and where the
    engine is on other GPUs."""
    if not engine_here(cfg):
        return 0
    if cfg.rollout.kv_cache_memory_bytes is not None:
        return cfg.rollout.kv_cache_memory_bytes
    needed = cfg.rollout.max_num_seqs * sequence * model.kv_bytes(size)
    if gpu is None or cfg.rollout.engine == "transformers":
        return needed
    return max(0, int(cfg.rollout.gpu_memory_utilization * gpu.memory) - engine)


def fit(cfg: Config, parts: Iterable[Part], sequence_bytes: int, gpu: Gpu) -> dict[str, Any]:
    """Peak bytes of a GPU, whether they fit, and what is wrong if not.

    The phases take turns where the engine sleeps during the update; else they add up. The cache
    must hold one sequence of ``sequence_bytes``; how many it holds is given as ``sequences``, None for an
    engine on other GPUs.
    """
    parts = list(parts)
    held = {p: sum(x.bytes for x in parts if x.phase == p) for p in get_args(Phase)}
    update = held["update"] + max(held["layer"], held["head"], held["tower"])
    rollout = cfg.rollout
    sleeps = rollout.sleep and rollout.engine != "transformers" and not rollout.async_steps
    turns = max(update, held["rollout"]) if sleeps else update + held["rollout"]
    peak = held["always"] + turns
    cache = next(part.bytes for part in parts if part.name == "KV cache")
    problems = []
    if peak > gpu.usable:
        tower = sum(part.bytes for part in parts if part.name.startswith(TOWER)) + held["tower"]
        remedy = _remedy(cfg, held["always"], update, held["rollout"], tower, gpu)
        problems.append(f"needs {peak / 1e9:.1f} GB of {gpu.usable / 1e9:.1f} GB usable; {remedy}")
    here = engine_here(cfg)
    if here and cache < sequence_bytes:
        problems.append(
            f"the KV cache of {cache / 1e9:.2f} GB holds no full sequence "
            f"({sequence_bytes / 1e9:.2f} GB); raise rollout.gpu_memory_utilization"
        )
    sequences = min(cfg.rollout.max_num_seqs, cache // max(1, sequence_bytes)) if here else None
    return {"peak": peak, "fits": not problems, "problems": problems, "sequences": sequences}


def _remedy(cfg: Config, always: int, update: int, rollout: int, tower: int, gpu: Gpu) -> str:
    larger = "take a larger GPU"
    if always > gpu.usable / 2:
        fewer = "shard with deepspeed/zero3.json over more GPUs"
        if cfg.gba.finetuning_type == "full":
            return f"{fewer}, set gba.finetuning_type=lora, or {larger}"
        return f"{fewer} or {larger}"
    if update >= rollout and tower > update / 2:
        return f"lower model.max_pixels, set gba.freeze_vision_tower=true or {larger}"
    knob = "gba.max_row_tokens" if update >= rollout else "rollout.gpu_memory_utilization"
    return f"lower {knob} or {larger}"


def zero_settings(cfg: Config) -> dict[str, Any]:
    """The ``zero_optimization`` object of ``cfg.deepspeed``. Raises ConfigError where it is none."""
    zero: dict[str, Any] = deepspeed_settings(cfg).get("zero_optimization", {})
    return zero


def zero_stage(cfg: Config) -> int:
    """The ZeRO stage of ``cfg.deepspeed``. Raises ConfigError for a file that is no such JSON."""
    return int(zero_settings(cfg).get("stage", 0))
