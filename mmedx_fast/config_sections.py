"""The sections of the configuration, less those of rollouts and RL (``config_rl``); the whole is in ``config``.

Field names follow TRL where TRL has one.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


def known_names(value: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """``value``, if it is names of ``allowed``, at least one and none twice; ValueError otherwise."""
    unknown = [name for name in value if name not in allowed]
    if unknown or not value:
        raise ValueError(
            f"unknown {unknown}; choose from {list(allowed)}" if unknown else "is empty"
        )
    if len(set(value)) != len(value):
        raise ValueError(f"repeats a name: {list(value)}")
    return value


class ModelConfig(Section):
    path: str = "tiny"
    """A local folder or hub name of a Qwen2-VL / Qwen2.5-VL model; ``tiny`` is the one that ships with
    the package."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "dense", "varlen", "flash", "flex"] = "auto"
    """How the packed tree attends: ``auto`` is varlen, of a float32 model on CUDA dense; ``dense`` (a mask of
    every pair) is the simplest; ``flash`` (flash-attn, where it is installed) and ``flex`` (FlexAttention)
    need CUDA."""
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
    """A step whose gradient norm before clipping exceeds this is skipped and written to ``bad_steps/``: clipping
    would still take a step of full length in the direction of whatever exploded. Null skips only where the
    loss or the norm is not finite. What is healthy depends on model and loss, so there is no default; the 7B
    and 2B recipes have a hundred times ``max_grad_norm``."""
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
        return known_names(value, SPECIALTIES)


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
        return known_names(value, ("base", "experts", "rl_start", "rl", "merged"))

    @field_validator("guideline")
    @classmethod
    def _guideline(cls, value: str | None) -> str | None:
        if value is not None:
            known_names((value,), (*GUIDELINE_NAMES, "each", "none"))
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
