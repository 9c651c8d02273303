"""The typed configuration: YAML in, dotted overrides on top, unknown keys refused, resolved copy out.

Imports neither torch nor anything heavy, so that ``mmedx --help`` and a config check stay instant.
Field names follow TRL where TRL has one (``num_generations``, ``max_completion_length``, ``epsilon`` ...).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmedx_fast._paths import find_config
from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES

HOW = (
    "model.gradient_checkpointing",
    "model.offline",
    "dsa.save_steps",
    "eval.browse_images",
    "eval.browse_rows",
    "eval.chunk_size",
    "gba.save_steps",
    "gba.max_row_tokens",
    "gba.max_response_tokens",
    "gba.max_images",
    "gba.max_shard_size",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_memory_bytes",
    "rollout.max_num_seqs",
    "rollout.max_restarts",
    "rollout.server_args",
    "rollout.server_gpus",
    "rollout.server_timeout",
    "rollout.server_urls",
    "rollout.sleep",
    "rollout.tensor_parallel_size",
    "rollout.timeout",
)
"""Settings of memory, machines and patience: another value changes results by rounding at most, so that a run
that met the limits of its machine goes on with it instead of beginning again."""

LATER = (
    "eval.num_samples",
    "eval.prompt",
    "eval.sets",
    "eval.temperature",
    "eval.top_p",
)
"""Settings that runs made before them do not have: at their defaults they are left out of fingerprints, so that
what those runs finished still counts."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file, key and value."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: str = "tiny"
    """A local folder or hub name of a Qwen2-VL / Qwen2.5-VL model; ``tiny`` is the one that ships with
    the package."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "dense", "varlen", "flash", "flex"] = "auto"
    """How the packed tree attends: ``auto`` is varlen; ``dense`` (a mask of every pair) is the
    simplest; ``flash`` (flash-attn, where it is installed) and ``flex`` (FlexAttention) need CUDA."""
    gradient_checkpointing: bool = True
    use_liger_kernel: bool | Literal["auto"] = "auto"
    """Liger's RMSNorm, SwiGLU and RoPE in the trainer's language model: ``auto`` takes them on CUDA where
    liger-kernel is installed."""
    trust_remote_code: bool = False
    offline: bool = True
    """Never ask a hub; a model that is not on disk is then an error that names its path."""
    max_pixels: int = Field(401_408, ge=784)
    """Upper bound on the pixels of one image after resizing; larger images are scaled down."""


SplitName = Literal["train", "validation", "test"]


class DataConfig(Section):
    train: str = "phantom"
    """``phantom`` (made by the program) or a folder / file in a supported format."""
    validation: str | None = None
    """As ``train``; null takes ``phantom`` with phantom training data, else holds out a share of train."""
    test: str = "phantom"
    format: str | dict[SplitName, str] | None = None
    """Format name for real data, or one by split (``{test: slake}``); null, or a split left out, detects it."""
    options: dict[SplitName, dict[str, Any]] = Field(default_factory=dict)
    """By split, what the split's format offers to choose: ``{test: {language: both}}`` for SLAKE."""
    answer_format: Literal["letter", "text"] = "letter"
    """What stands between the answer tags: the option's letter, or its text."""
    system_prompt: str | None = None
    """Overrides the built-in system prompt."""
    max_prompt_length: int = Field(4096, ge=32)
    """Tokens, image tokens included; a longer prompt is rejected with its id."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    limit: int | None = Field(None, ge=1)
    """Use at most this many rows of each split (for a trial run)."""


class PhantomConfig(Section):
    train: int = Field(480, ge=20)
    """Questions in all, spread evenly over the specialties."""
    validation: int = Field(120, ge=20)
    test: int = Field(400, ge=20)
    seed: int = 0


class LoraConfig(Section):
    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    use_rslora: bool = False
    target_modules: str = (
        r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )
    """A regular expression on module names; the default leaves the vision tower alone."""


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_step_grad_norm: float | None = Field(None, gt=0)
    """A step whose gradient norm before clipping exceeds this is skipped and written to ``bad_steps/``;
    null skips only where the loss or the norm is not finite."""
    max_bad_steps: int = Field(3, ge=1)
    """The stage stops when this many steps in a row had to be skipped."""


class DsaConfig(Section):
    specialties: tuple[str, ...] = SPECIALTIES
    steps: int = Field(100, ge=1)
    questions_per_step: int = Field(8, ge=1)
    traces_per_question: int | None = Field(None, ge=1)
    """How many of a question's traces each step takes (which, turns from step to step); null takes all."""
    optimizer: OptimizerConfig = OptimizerConfig()
    save_steps: int = Field(20, ge=1)
    reuse: str | None = None
    """A run folder whose finished experts are taken instead of training new ones (ablations)."""

    @field_validator("specialties")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known_names(value, SPECIALTIES)


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
            _known_names(tuple(value), GUIDELINE_NAMES)
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
        return _known_names(value, GUIDELINE_NAMES)

    @field_validator("start")
    @classmethod
    def _start(cls, value: str) -> str:
        _known_names((value,), ("experts_mean", "base", *SPECIALTIES))
        return value


class CaciConfig(Section):
    """Fields of ``mmedx_fast.ops.MergeSpec``, and how its strength is chosen."""

    method: Literal["ties", "dare_ties", "dare_linear", "linear"] = "ties"
    density: tuple[float, ...] = (0.3,)
    """Share of each delta that is kept; several values are tried on the validation set."""
    scale: tuple[float, ...] = (1.0,)
    """Lambda, the factor on the merged delta; several values are tried on the validation set."""
    trim_scope: Literal["tensor", "global"] = "tensor"
    election: Literal["total", "weighted", "frequency"] = "total"
    divisor: Literal["count", "weight"] = "count"
    dare_mode: Literal["sample", "expectation"] = "sample"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    expert_weight: float = Field(1.0, ge=0)
    rl_weight: tuple[float, ...] = (1.0,)
    """Weight of the RL model beside each expert's; several values are tried on the validation set."""
    seed: int = 0
    selection_limit: int = Field(120, ge=1)
    """Validation questions per candidate when there is more than one."""

    @model_validator(mode="after")
    def _ranges(self) -> CaciConfig:
        for name in ("density", "scale", "rl_weight"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        bad = [d for d in self.density if not 0 < d <= 1]
        if bad:
            raise ValueError(f"density must lie in (0, 1], got {bad}")
        if self.method == "dare_ties" and self.dare_mode == "expectation":
            raise ValueError("dare_mode: expectation is exact for dare_linear only, not dare_ties")
        return self


class EvalSetConfig(Section):
    """One data set to evaluate on."""

    path: str
    """A folder or file in a supported format, or ``phantom``."""
    split: str = "test"
    format: str | None = None
    """Format name; null detects it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the format's loader takes beside path and split."""
    limit: int | None = Field(None, ge=1)
    """Only the first this many questions."""


class EvalConfig(Section):
    models: tuple[str, ...] = ("base", "experts", "rl_start", "rl", "merged")
    sets: dict[str, EvalSetConfig] = Field(default_factory=dict)
    """Name -> data set; results go to ``eval/<model>/<name>``, and the first set is the one that summary and
    report show first. Empty: the run's own test set, in ``eval/<model>``."""
    prompt: Literal["train", "medevalkit"] = "train"
    """``train`` is the template that the model is trained with; ``medevalkit`` asks as MedEvalKit does (no
    guideline, no tags), so that results can be put beside those of other papers."""
    guideline: str | None = None
    """Ask every question under this guideline; null takes ``guidelines`` in turn by question, ``each`` asks every
    question under all of them and lets the answers vote, ``none`` asks without one."""
    num_samples: int = Field(1, ge=1, le=1024)
    """Answers per question and guideline: 1 decodes greedily, more are sampled and vote."""
    temperature: float = Field(0.7, ge=0.01, le=2)
    """Of the samples, where there are several."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most probable tokens that together have this probability."""
    max_completion_length: int = Field(512, ge=1)
    chunk_size: int = Field(512, ge=1)
    """Questions whose images are in memory at a time, and after which what was answered is on disk."""
    samples_in_report: int = Field(8, ge=0)
    browse_rows: int = Field(2000, ge=0)
    """Answers in the page of right and wrong answers, shared evenly by models and sets (a fixed sample of
    longer sets); 0 writes no page."""
    browse_images: int = Field(200, ge=0)
    """Questions of that page whose images are in it."""

    @field_validator("models")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known_names(value, ("base", "experts", "rl_start", "rl", "merged"))

    @field_validator("guideline")
    @classmethod
    def _guideline(cls, value: str | None) -> str | None:
        if value is not None:
            _known_names((value,), (*GUIDELINE_NAMES, "each", "none"))
        return value

    @field_validator("sets")
    @classmethod
    def _set_names(cls, value: dict[str, EvalSetConfig]) -> dict[str, EvalSetConfig]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or ".old-" in name:
                raise ValueError(
                    f"a set's name becomes a folder: letters, digits and ._- only, not {name!r}"
                )
        return value

    @model_validator(mode="after")
    def _parity(self) -> EvalConfig:
        if self.prompt == "medevalkit" and self.guideline not in (None, "none"):
            raise ValueError(
                f"prompt = medevalkit asks without a guideline, guideline = {self.guideline} wants one: "
                "leave guideline at null, or set prompt=train"
            )
        return self


class Config(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    run_dir: str | None = None
    """The run's folder; null is ``runs/<name>``."""
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    phantom: PhantomConfig = PhantomConfig()
    lora: LoraConfig = LoraConfig()
    dsa: DsaConfig = DsaConfig()
    rollout: RolloutConfig = RolloutConfig()
    gba: GbaConfig = GbaConfig()
    caci: CaciConfig = CaciConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: str | dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 0}}
    )
    """A DeepSpeed JSON file (looked for beside the config, then in the package) or its content."""
    keep_checkpoints: int = Field(2, ge=1)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.gba.loss.loss_type == "cispo" and (self.gba.loss.epsilon_high or 0) < 1:
            raise ValueError(
                "gba.loss.epsilon_high is the largest weight itself for cispo: give it, e.g. 5.0 "
                f"(got {self.gba.loss.epsilon_high})"
            )
        if self.gba.finetuning_type == "full" and self.gba.loss.beta > 0:
            raise ValueError(
                f"gba.loss.beta = {self.gba.loss.beta} needs the starting model as reference, which "
                "gba.finetuning_type = full would have to hold a second time: set gba.loss.beta=0, or "
                "gba.finetuning_type=lora, whose reference is the frozen starting adapter"
            )
        whole_model = self.caci.method == "ties" and self.caci.trim_scope == "global"
        if self.gba.finetuning_type == "full" and whole_model:
            raise ValueError(
                "caci.trim_scope = global ranks the changes of the whole model together, and "
                "gba.finetuning_type = full merges them one matrix at a time: set "
                "caci.trim_scope=tensor"
            )
        if self.rollout.async_steps and self.gba.loss.importance_sampling_correction == "none":
            raise ValueError(
                "rollout.async_steps = 1 trains on rollouts of an older adapter, which "
                "gba.loss.importance_sampling_correction must correct: set it to token_truncate "
                "(got none)"
            )
        if self.rollout.engine == "server" and self.eval.num_samples > self.rollout.max_num_seqs:
            raise ValueError(
                f"eval.num_samples = {self.eval.num_samples} exceeds rollout.max_num_seqs = "
                f"{self.rollout.max_num_seqs}: a server takes a question's samples only as long as they "
                "can run together"
            )
        if self.lora.r > self.rollout.max_lora_rank:
            raise ValueError(
                f"lora.r = {self.lora.r} exceeds rollout.max_lora_rank = {self.rollout.max_lora_rank}"
            )
        return self

    def fingerprint(self, *sections: str) -> str:
        """A hash of the named sections, less :data:`HOW` and unused :data:`LATER`: what a finished stage
        depends on."""
        data = self.model_dump(mode="json")
        defaults = type(self)().model_dump(mode="json")
        for name in (*HOW, *LATER):
            *parents, last = name.split(".")
            node, default = data, defaults
            for parent in parents:
                node, default = node[parent], default[parent]
            if name in HOW or node[last] == default[last]:
                del node[last]
        text = json.dumps({name: data[name] for name in sections}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def deepspeed_settings(cfg: Config) -> dict[str, Any]:
    """The DeepSpeed dictionary of ``cfg.deepspeed``: given in place, or read from its JSON file."""
    if isinstance(cfg.deepspeed, dict):
        return cfg.deepspeed
    path = find_config(cfg.deepspeed)
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"deepspeed = {cfg.deepspeed}: cannot be read as JSON ({error})"
        ) from None
    if not isinstance(settings, dict):
        raise ConfigError(f"deepspeed = {cfg.deepspeed}: must hold an object")
    return settings


def _known_names(value: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in value if name not in allowed]
    if unknown or not value:
        raise ValueError(
            f"unknown {unknown}; choose from {list(allowed)}" if unknown else "is empty"
        )
    if len(set(value)) != len(value):
        raise ValueError(f"repeats a name: {list(value)}")
    return value


def load_config(
    path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """Read ``path`` (YAML; null gives the defaults), apply ``a.b=value`` overrides, validate.

    Values of overrides are parsed as YAML, so ``gba.steps=5``, ``gba.guidelines=[bayesian]`` and
    ``data.train=folder`` all mean what they look like. Raises :class:`ConfigError`.
    """
    raw: Any = {}
    if path is not None:
        raw = _read_yaml(Path(path))
    for item in overrides:
        _apply_override(raw, item)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path or "defaults"))) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if raw is None:
        raise ConfigError(f"{path} is empty: see configs/demo.yaml for a complete one")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping at its top level, not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override {item!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.strip().split(".")
    node = raw
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: {name!r} is a value, not a section")
    node[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key; {_suggest(item['loc'])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"  {key}: {message} (got {_short(item.get('input'))})")
    return f"{source}: the configuration cannot be used\n" + "\n".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _suggest(loc: tuple[int | str, ...]) -> str:
    import difflib

    model: Any = Config
    for part in loc[:-1]:
        fields = getattr(model, "model_fields", None)
        if fields is None:  # a mapping's key or a list's index: on to what it holds
            held = [item for item in get_args(model) if hasattr(item, "model_fields")]
            model = held[0] if held else None
            continue
        if part not in fields:
            break
        model = fields[part].annotation
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
