"""What a vLLM worker process of its own gets from this project (``worker_extension_cls``)."""

from __future__ import annotations

from mmedx_fast.rollout import vllm_cpu_lora

# A worker imports this module before it loads the model; that is where its products are rebound.
vllm_cpu_lora.install()


class CpuLoraWorker:
    """Added to vLLM's CPU worker, which then multiplies LoRA factors as the in-process engine
    does."""
