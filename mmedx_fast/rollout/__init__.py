"""Rollout engines: vLLM in this process, vLLM's server elsewhere, or plain transformers where vLLM is
not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedx_fast.config import ModelConfig, RolloutConfig
from mmedx_fast.prompts import PromptBuilder
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    EngineError,
    EngineStats,
    Interrupted,
    Progress,
    Request,
    Rollout,
    RolloutEngine,
    RolloutError,
    Sampling,
)

__all__ = [
    "BASE_VERSION",
    "EngineError",
    "EngineStats",
    "Interrupted",
    "Progress",
    "Request",
    "Rollout",
    "RolloutEngine",
    "RolloutError",
    "Sampling",
    "create_engine",
]


def create_engine(
    model: ModelConfig,
    rollout: RolloutConfig,
    builder: PromptBuilder,
    *,
    max_model_len: int | None = None,
    max_images: int = 1,
    lora: bool = True,
    seed: int = 0,
    log: Path | None = None,
    **vllm_options: Any,
) -> RolloutEngine:
    """Start the engine that ``rollout.engine`` names on the model folder ``model.path``.

    ``max_model_len``: tokens of prompt plus response, by default ``data.max_prompt_length`` +
    ``rollout.max_completion_length``. ``max_images``: most images in one question. ``lora``:
    whether adapters will be loaded. ``log``: the file that a server started here prints to.
    ``vllm_options`` go to ``vllm.LLM`` or to that server and override what this project chooses.
    With ``engine: server`` rank 0 talks to the servers, and the other ranks' engines do nothing.
    Raises ``RolloutError``, also when vLLM is not installed.
    """
    if max_model_len is None:
        max_model_len = builder.data.max_prompt_length + rollout.max_completion_length
    if rollout.engine == "server":
        from mmedx_fast import ranks
        from mmedx_fast.rollout.server_follower import ServerFollower

        ranks.join()
        if not ranks.is_main():
            return ServerFollower()
        from mmedx_fast.rollout.server_engine import ServerEngine

        return ServerEngine(
            model,
            rollout,
            builder,
            max_model_len=max_model_len,
            max_images=max_images,
            lora=lora,
            seed=seed,
            log=log,
            **vllm_options,
        )
    if rollout.engine == "vllm":
        from mmedx_fast.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model,
            rollout,
            builder,
            max_model_len=max_model_len,
            max_images=max_images,
            lora=lora,
            seed=seed,
            **vllm_options,
        )
    if vllm_options:
        raise ValueError(f"the transformers engine takes no vLLM options: {sorted(vllm_options)}")
    from mmedx_fast.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        model, rollout, builder, max_model_len=max_model_len, max_images=max_images, lora=lora
    )
