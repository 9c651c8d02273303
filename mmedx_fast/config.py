"""The typed configuration: YAML in, dotted overrides on top, unknown keys refused, resolved copy out.

Imports neither torch nor anything heavy, so that ``mmedx --help`` and a config check stay instant.
The sections and the meaning of every field are in ``config_sections`` and ``config_rl``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mmedx_fast._paths import find_config
from mmedx_fast.config_deepspeed import check_deepspeed
from mmedx_fast.config_rl import (
    AdvantageConfig,
    GbaConfig,
    LossConfig,
    RewardConfig,
    RolloutConfig,
)
from mmedx_fast.config_sections import (
    CaciConfig,
    DataConfig,
    DsaConfig,
    EvalConfig,
    EvalSetConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PhantomConfig,
    Section,
    SplitName,
)

__all__ = [
    "AdvantageConfig",
    "CaciConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DsaConfig",
    "EvalConfig",
    "EvalSetConfig",
    "GbaConfig",
    "HOW",
    "LATER",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhantomConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "SplitName",
    "deepspeed_settings",
    "load_config",
]

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

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, dict):
            check_deepspeed(value)
        return value

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
    try:
        check_deepspeed(settings)
    except ValueError as error:
        raise ConfigError(f"deepspeed = {cfg.deepspeed}: {error}") from None
    return settings


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
