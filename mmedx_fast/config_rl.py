"""The sections ``rollout`` and ``gba`` of the configuration, with what lies in them.

Field names follow TRL where TRL has one (``num_generations``, ``max_completion_length``, ``epsilon`` ...).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmedx_fast.config_sections import OptimizerConfig, Section, known_names
from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES


class RolloutConfig(Section):
    engine: Literal["vllm", "transformers", "server"] = "vllm"
    """``vllm`` and ``transformers`` run in the trainer's process, one engine a rank; ``server`` is vLLM's
    own HTTP server on other GPUs or machines, one for all ranks."""
    num_generations: int = Field(4, ge=1)
    """Rollouts per question AND guideline."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    max_completion_length: int = Field(512, ge=1)
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1 << 20)
    """Fixed size of the KV cache; null lets the engine choose from gpu_memory_utilization."""
    max_num_seqs: int = Field(64, ge=1)
    block_size: int | None = Field(None, ge=16)
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 64
    sleep: bool = True
    """Free the engine's memory while the trainer works (CUDA only)."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model, in the engine or in the server that the trainer starts."""
    async_steps: int = Field(0, ge=0, le=1)
    """1 makes the rollouts of the next step while the current one trains, with the adapter of one update
    before: needs ``engine: server`` and an importance-sampling correction."""
    server_urls: tuple[str, ...] = ()
    """Running servers (``http://host:port``) that share the requests; empty starts one with the trainer.
    They must see the run folder and the model under the trainer's paths (a shared file system), and be
    started with the flags that the trainer asks for. VLLM_API_KEY is sent where it is set."""
    server_args: tuple[str, ...] = ()
    """Further ``vllm serve`` flags of the server that the trainer starts, ``--flag=value`` each."""
    server_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES of the server that the trainer starts, such as ``4,5``; null: the trainer's."""
    server_timeout: float = Field(600, gt=0)
    """Seconds to wait for the server to start, and for any answer while it generates."""
    timeout: float = Field(600.0, gt=0)
    """Seconds without a new token after which an engine in the trainer's process counts as hung; a server has
    ``server_timeout``."""
    max_restarts: int = Field(2, ge=0)
    """How often in a row an engine that failed or hangs is started anew and asked again."""

    @field_validator("server_urls")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        bad = [url for url in value if not url.startswith(("http://", "https://"))]
        if bad or len(set(value)) != len(value):
            raise ValueError(f"give different addresses as http://host:port, got {bad or value}")
        return tuple(url.rstrip("/") for url in value)

    @model_validator(mode="after")
    def _server(self) -> RolloutConfig:
        if self.engine != "server":
            given = [n for n in ("server_urls", "server_args", "server_gpus") if getattr(self, n)]
            if given:
                raise ValueError(f"{given[0]} belongs to engine: server, not to {self.engine}")
            if self.async_steps:
                raise ValueError(
                    f"async_steps = 1 needs engine: server: {self.engine} shares the trainer's process, "
                    "GPU and random generators, so nothing would overlap; with a server on other GPUs "
                    "(server_urls or server_gpus) it does"
                )
        if self.server_urls and (self.server_args or self.server_gpus):
            raise ValueError(
                "server_args and server_gpus are for a server that the trainer starts; leave "
                "server_urls empty, or start those servers with the flags yourself"
            )
        named = self.server_gpus.split(",") if self.server_gpus else None
        if named is not None and self.tensor_parallel_size > len(named):
            raise ValueError(
                f"tensor_parallel_size = {self.tensor_parallel_size} needs as many GPUs, and server_gpus = "
                f"{self.server_gpus} names {len(named)}"
            )
        if self.engine == "server" and self.num_generations > self.max_num_seqs:
            raise ValueError(
                f"num_generations = {self.num_generations} exceeds max_num_seqs = {self.max_num_seqs}: a "
                "server takes a question's samples only as long as they can run together"
            )
        if self.engine == "transformers" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size needs engine: vllm or server")
        return self


class AdvantageConfig(Section):
    """Arguments of ``mmedx_fast.ops.guideline_advantages`` (contract and formula there)."""

    group_by: Literal["guideline", "question"] = "guideline"
    """``question`` forgets the guidelines: plain GRPO over the same rollouts (the K = 1 ablation)."""
    scale: Literal["guideline", "group", "batch", "none"] = "guideline"
    within: float = Field(1.0, ge=0)
    between: float = Field(1.0, ge=0)
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    eps: float = Field(1e-4, gt=0)
    ddof: Literal[0, 1] = 1
    guideline_weights: dict[str, float] | None = None

    @field_validator("guideline_weights")
    @classmethod
    def _known(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None:
            known_names(tuple(value), GUIDELINE_NAMES)
        return value


class LossConfig(Section):
    """Fields of ``mmedx_fast.ops.PolicyLossSpec``."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"] = "dapo"
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(0.28, gt=0)
    delta: float | None = Field(None, gt=1)
    beta: float = Field(0.0, ge=0)
    """Weight of the KL term to the frozen starting adapter; 0 runs no reference pass."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    importance_sampling_clip_max: float | None = Field(2.0, gt=0)
    importance_sampling_clip_min: float | None = Field(None, gt=0)
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio, which makes k3's gradient that of the reverse KL (as TRL)."""


class RewardConfig(Section):
    name: str
    """A built-in (accuracy_reward, format_reward, guideline_reward) or ``package.module.function``."""
    weight: float = 1.0
    kwargs: dict[str, Any] = Field(default_factory=dict)


class GbaConfig(Section):
    finetuning_type: Literal["lora", "full"] = "lora"
    """What RL trains: a LoRA on the frozen base, or (``full``) all weights of the language model. Experts
    are LoRAs either way."""
    freeze_vision_tower: bool = True
    """With ``full``: leave the vision tower and its projector as they are, so that image features are
    computed once a step; false trains them too."""
    max_shard_size: int = Field(5_000_000_000, ge=1 << 20)
    """With ``full``: bytes of one file of the model or of a checkpoint, and the most of either that is
    gathered on rank 0 at a time (a larger matrix comes alone)."""
    start: str = "experts_mean"
    """``experts_mean`` (truncated SVD of the mean expert delta), ``base``, or one specialty's expert."""
    start_scale: float = Field(1.0, gt=0)
    """Factor on the mean expert delta of ``experts_mean``; with E experts, E makes the mean their sum."""
    guidelines: tuple[str, ...] = GUIDELINE_NAMES
    steps: int = Field(100, ge=1)
    questions_per_step: int = Field(4, ge=1)
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps on each batch of rollouts; above 1 the old log-probs are computed first."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, lr_scheduler_type="constant")
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    rewards: tuple[RewardConfig, ...] = (
        RewardConfig(name="accuracy_reward", weight=1.0),
        RewardConfig(name="format_reward", weight=0.2),
        RewardConfig(name="guideline_reward", weight=0.3),
    )
    filter_zero_variance: bool = True
    """Leave questions whose rollouts all earn the same out of the update, and count them."""
    save_steps: int = Field(10, ge=1)
    max_row_tokens: int = Field(8192, ge=64)
    """Bound on the unique tokens of one packed row (activations); DSA's rows keep to it too."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Bound on the response tokens of one packed row (the head's work); null is no bound of its own."""
    max_images: int | None = Field(None, ge=1)
    """Bound on the images of one packed row (the vision tower's memory); null is no bound of its own."""
    reuse: str | None = None
    """A run folder whose finished RL adapter is taken instead of training a new one (ablations)."""
    max_rollout_mismatch: float = Field(1.0, gt=0)
    """Stop when the mean |trainer - engine| log-prob of a step exceeds this (nat): a wrong adapter is
    loaded or the engine computes something else."""

    @field_validator("guidelines")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_names(value, GUIDELINE_NAMES)

    @field_validator("start")
    @classmethod
    def _start(cls, value: str) -> str:
        known_names((value,), ("experts_mean", "base", *SPECIALTIES))
        return value
