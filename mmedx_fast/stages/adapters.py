"""PEFT LoRA adapters as factors of each linear, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmedx_fast.config import LoraConfig
from mmedx_fast.policy_adapter import (
    BASE_NAME,
    WEIGHTS_NAME,
    AdapterError,
    read_config,
    write_adapter,
)

if TYPE_CHECKING:
    from mmedx_fast.ops import LoraFactors

T = TypeVar("T")
_KEY = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_(?P<factor>[AB])\.weight")


def load_factors(folder: Path) -> dict[str, LoraFactors]:
    """Linear's name in the base model -> its factors, scale included.

    Handles rsLoRA, rank and alpha patterns. Raises AdapterError for anything that is not a plain LoRA.
    """
    from safetensors.torch import load_file

    from mmedx_fast.ops import LoraFactors

    config = read_config(folder)
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{path} is missing; this folder holds no adapter weights")
    pairs: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{path}: {key} is not a LoRA factor of a linear layer")
        pairs.setdefault(match["linear"], {})[match["factor"]] = tensor.float()
    factors = {}
    for linear, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path}: {linear} has only its lora_{next(iter(pair))} factor")
        scale = _scale(config, linear, pair["A"].shape[0])
        factors[linear] = LoraFactors(pair["A"], pair["B"], scale)
    return factors


def _scale(config: Any, linear: str, rank: int) -> float:
    alpha = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", linear):
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def base_notes(sources: Mapping[str, Path]) -> dict[str, Any]:
    """The base that all adapters share. Raises AdapterError naming two that differ."""
    first: tuple[str, dict[str, Any]] | None = None
    for name, folder in sources.items():
        path = Path(folder) / BASE_NAME
        note = json.loads(path.read_text()) if path.is_file() else {}
        if not note:
            continue
        if first is None:
            first = (name, note)
        elif note.get("base_fingerprint") != first[1].get("base_fingerprint"):
            raise AdapterError(
                f"{name} ({folder}) was trained on the base {note.get('base_model_name_or_path')} "
                f"(weights {note.get('base_fingerprint')}), {first[0]} on "
                f"{first[1].get('base_model_name_or_path')} (weights "
                f"{first[1].get('base_fingerprint')}): only adapters of one base can be merged"
            )
    return first[1] if first else {}


def by_linear(adapters: Mapping[str, Mapping[str, T]]) -> dict[str, list[T | None]]:
    """Linear -> one entry per adapter in order, None where it does not touch the linear."""
    names = sorted({linear for factors in adapters.values() for linear in factors}, key=_natural)
    return {name: [factors.get(name) for factors in adapters.values()] for name in names}


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_mean_adapter(
    folder: Path, sources: Mapping[str, Path], lora: LoraConfig, factor: float = 1.0
) -> float:
    """Write ``factor`` times the mean of the adapters' deltas, cut to ``lora.r``, as an adapter of its own.

    ``mean.json`` beside it says how much of the mean's energy (squared norm) the cut keeps, per linear
    and over all; the latter is returned.
    """
    from mmedx_fast.ops import lora_mean

    note = base_notes(sources)
    adapters = {name: load_factors(path) for name, path in sources.items()}
    config = read_config(next(iter(sources.values())))
    config.r, config.lora_alpha, config.use_rslora = lora.r, lora.lora_alpha, lora.use_rslora
    config.rank_pattern, config.alpha_pattern = {}, {}
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    tensors, kept, energy = {}, {}, {}
    for linear, factors in by_linear(adapters).items():
        weights = [factor / len(factors)] * len(factors)
        mean, share = lora_mean(factors, weights, rank=lora.r)
        mean = mean.rescaled(scale)
        tensors[f"base_model.model.{linear}.lora_A.weight"] = mean.A.float().contiguous()
        tensors[f"base_model.model.{linear}.lora_B.weight"] = mean.B.float().contiguous()
        kept[linear] = share
        energy[linear] = float((mean.B.T @ mean.B * (mean.A @ mean.A.T)).sum()) * scale**2
    whole = sum(energy[name] / kept[name] for name in kept if kept[name] > 0)
    share = sum(energy.values()) / whole if whole else 1.0
    write_adapter(
        folder,
        tensors,
        config,
        str(note.get("base_model_name_or_path", "")),
        str(note.get("base_fingerprint", "")),
    )
    report: dict[str, Any] = {
        "experts": list(sources),
        "factor": factor,
        "rank": lora.r,
        "energy_kept": share,
    }
    report["by_linear"] = kept
    (folder / "mean.json").write_text(json.dumps(report, indent=1))
    return share
