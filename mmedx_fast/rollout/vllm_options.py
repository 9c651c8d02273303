"""vLLM's engine options as this project chooses them: for ``vllm.LLM`` and for ``vllm serve``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mmedx_fast.config import ModelConfig, RolloutConfig

_MIN_KV_BYTES = 64 << 20
_MAX_CPU_KV_BYTES = 4 << 30
_CPU_BATCHED_TOKENS = 4096
_CPU_BLOCK_SIZE = 32
"""vLLM's CPU default is 128, and only full blocks are shared: short prompts would share nothing."""
_CPU_WORKER = "mmedx_fast.rollout.vllm_worker.CpuLoraWorker"


def engine_options(
    model: ModelConfig,
    rollout: RolloutConfig,
    *,
    device: str,
    max_model_len: int,
    max_images: int,
    lora: bool,
    seed: int,
    own_workers: bool,
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``.

    ``device``: "cpu" or "cuda". ``max_model_len``: prompt plus response, tokens. ``max_images``:
    images per prompt. ``lora``: room for one adapter. ``own_workers``: whether the model runs in
    processes that vLLM starts, where nothing of this process is patched.
    """
    options: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        # Log-probs of the distribution sampled from: after temperature and banned ids.
        "logprobs_mode": "processed_logprobs",
        # Stop tokens are ours; a model folder's sampling defaults must not leak in.
        "generation_config": "vllm",
        "trust_remote_code": model.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
        "block_size": rollout.block_size,
        "kv_cache_memory_bytes": rollout.kv_cache_memory_bytes,
    }
    if lora:
        options |= {
            "enable_lora": True,
            "max_lora_rank": rollout.max_lora_rank,
            "max_loras": 1,
            "max_cpu_loras": 2,
        }
    if rollout.tensor_parallel_size > 1:
        # The vision tower is small: every worker has all of it and encodes its share of the images.
        options["mm_encoder_tp_mode"] = "data"
    if device == "cpu":
        options["enforce_eager"] = True
        options["skip_mm_profiling"] = True
        # vLLM draws a token for every chunk of a prompt and then rewinds the seeded generator,
        # which CPU generators cannot do ("does not use offset"): prompts go in whole.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, max_model_len)
        options["block_size"] = rollout.block_size or _CPU_BLOCK_SIZE
        if rollout.kv_cache_memory_bytes is None:
            options["kv_cache_memory_bytes"] = _cpu_kv_bytes(
                model, rollout.max_num_seqs, max_model_len
            )
        if lora and own_workers:
            options["worker_extension_cls"] = _CPU_WORKER
    else:
        options["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        options["enable_sleep_mode"] = rollout.sleep and not rollout.async_steps
    return {key: value for key, value in options.items() if value is not None}


def _cpu_kv_bytes(model: ModelConfig, max_num_seqs: int, max_model_len: int) -> int:
    """Room for every sequence at full length, within bounds: a CPU's memory is not the
    engine's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model.path, local_files_only=model.offline, trust_remote_code=model.trust_remote_code
    ).get_text_config()
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim
    bytes_per_token *= 4 if model.dtype == "float32" else 2
    block = _CPU_BLOCK_SIZE
    tokens = max_num_seqs * math.ceil(max_model_len / block + 1) * block
    return max(_MIN_KV_BYTES, min(_MAX_CPU_KV_BYTES, tokens * bytes_per_token))


def command_line(options: Mapping[str, Any]) -> list[str]:
    """The options as flags of ``vllm serve``: booleans as ``--x`` or ``--no-x``, mappings as
    JSON."""
    flags = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            text = json.dumps(value) if isinstance(value, Mapping) else str(value)
            flags += [f"--{name}", text]
    return flags
