"""Memory of a run by part, and whether it fits a GPU. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from mmedx_fast.config import Config, ConfigError, deepspeed_settings
from mmedx_fast.flops import Counts, ModelShape
from mmedx_fast.gpus import Gpu

LOGITS_TILE = 750_000_000
"""Most bytes of a logits tile on CUDA, as in ``kernels/_logits.py``."""

Phase = Literal["always", "update", "rollout"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes on one GPU, and the phase that holds them."""

    name: str
    bytes: int
    phase: Phase


def memory_parts(
    cfg: Config, model: ModelShape, tree: Counts, sequence: int, gpu: Gpu | None, gpus: int
) -> list[Part]:
    """What one of ``gpus`` GPUs holds.

    ``tree`` is one question's row, ``sequence`` the tokens of a full-length rollout. With ``gpu``
    the KV cache is what vLLM takes there; without, what all sequences need at full length.
    """
    size = 2 if cfg.model.dtype == "bfloat16" else 4
    stage = zero_stage(cfg)
    weights, lora = model.params * size, model.lora_params(cfg.lora.r)
    tokens = min(cfg.gba.max_row_tokens, cfg.gba.questions_per_step * tree.tokens)
    targets = tokens * tree.targets // tree.tokens
    shared = gpus if stage >= 2 else 1
    activations = _activations(cfg, model, tokens, size)
    engine = weights if cfg.rollout.engine == "vllm" else 0
    cache = kv_cache(cfg, model, sequence, size, gpu, engine)
    return [
        Part("trainer weights (frozen)", weights // (gpus if stage == 3 else 1), "always"),
        Part("LoRA: fp32 weights and gradient", 4 * lora + 4 * lora // shared, "always"),
        Part("optimizer: Adam's two moments", 8 * lora // (gpus if stage else 1), "always"),
        Part(f"activations of a row of {tokens:,} tokens", activations, "update"),
        Part("logits tile, fp32", min(LOGITS_TILE, 4 * model.vocab * targets), "update"),
        Part("rollout engine weights", engine, "rollout"),
        Part("KV cache", cache, "rollout"),
    ]


def _activations(cfg: Config, model: ModelShape, tokens: int, size: int) -> int:
    layer = tokens * (4 * model.hidden + 3 * model.intermediate) * size
    kept = tokens * model.hidden * size * model.layers
    return kept + layer if cfg.model.gradient_checkpointing else layer * model.layers


def kv_cache(
    cfg: Config, model: ModelShape, sequence: int, size: int, gpu: Gpu | None, engine: int
) -> int:
    """Bytes of the rollout engine's cache; 0 where vLLM's share does not even hold the weights."""
    if cfg.rollout.kv_cache_memory_bytes is not None:
        return cfg.rollout.kv_cache_memory_bytes
    needed = cfg.rollout.max_num_seqs * sequence * model.kv_bytes(size)
    if gpu is None or not engine:
        return needed
    return max(0, int(cfg.rollout.gpu_memory_utilization * gpu.memory) - engine)


def fit(cfg: Config, parts: Iterable[Part], sequence_bytes: int, gpu: Gpu) -> dict[str, Any]:
    """Peak bytes of a GPU, whether they fit, and what is wrong if not.

    The phases take turns where the engine sleeps during the update; else they add up. The cache
    must hold one sequence of ``sequence_bytes``; how many it holds is given as ``sequences``.
    """
    parts = list(parts)
    held = {p: sum(x.bytes for x in parts if x.phase == p) for p in ("always", "update", "rollout")}
    sleeps = cfg.rollout.sleep and cfg.rollout.engine == "vllm"
    turns = max(held["update"], held["rollout"])
    peak = held["always"] + (turns if sleeps else held["update"] + held["rollout"])
    cache = next(part.bytes for part in parts if part.name == "KV cache")
    problems = []
    if peak > gpu.usable:
        problems.append(
            f"needs {peak / 1e9:.1f} GB of {gpu.usable / 1e9:.1f} GB usable; lower "
            f"{_knob(held['update'] >= held['rollout'])} or take a larger GPU"
        )
    if cache < sequence_bytes:
        problems.append(
            f"the KV cache of {cache / 1e9:.2f} GB holds no full sequence "
            f"({sequence_bytes / 1e9:.2f} GB); raise rollout.gpu_memory_utilization"
        )
    sequences = min(cfg.rollout.max_num_seqs, cache // max(1, sequence_bytes))
    return {"peak": peak, "fits": not problems, "problems": problems, "sequences": sequences}


def _knob(update: bool) -> str:
    return "gba.max_row_tokens" if update else "rollout.gpu_memory_utilization"


def zero_stage(cfg: Config) -> int:
    """The ZeRO stage of ``cfg.deepspeed``. Raises ConfigError for a file that is no such JSON."""
    zero = deepspeed_settings(cfg).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed: zero_optimization needs a stage from 0 to 3, got {zero!r}")
    return int(stage)
