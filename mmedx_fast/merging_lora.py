"""A merge of LoRA adapters as an adapter of its own, cut to one rank, with the energy that the cut keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedx_fast.merge_report import merge_device
from mmedx_fast.ops import LoraFactors, MergeSpec, lora_merge_, lora_merge_as_lora
from mmedx_fast.peft_adapters import Adapter, AdapterError, LoraLayer
from mmedx_fast.policy_adapter import WEIGHTS_NAME, write_base_note
from mmedx_fast.progress import progress

DEFAULT_ENERGY = 0.99
SPACES = ("core", "delta")
Rows = Mapping[str, Sequence[LoraLayer | None]]


def merge_to_adapter(
    folder: Path,
    adapters: Sequence[Adapter],
    rows: Rows,
    spec: MergeSpec,
    rank: int | None,
    energy: float | None,
    space: str,
) -> dict[str, Any]:
    """Write the adapter into `folder`; see :func:`mmedx_fast.merging.merge` for the arguments.

    Returns ``rank``, ``energy_kept`` (share of the squared norm of the merged change, over all modules),
    ``energy_kept_by_linear`` and ``space``. Raises ValueError for options that contradict each other.
    """
    if space not in SPACES:
        raise ValueError(f"space={space!r} is not known: use one of {SPACES}")
    if rank is not None and (rank < 1 or energy is not None):
        raise ValueError(f"give a rank of at least 1 or an energy, got {rank} and {energy}")
    wanted = DEFAULT_ENERGY if energy is None else energy
    if not 0 < wanted <= 1:
        raise ValueError(f"energy must lie above 0 and at most at 1, got {energy}")
    merged, spectra = _merged(rows, spec, space, rank)
    chosen = _rank_for(spectra.values(), wanted) if rank is None else rank
    kept = {key: float(s[:chosen].sum()) for key, s in spectra.items()}
    whole = {key: float(s.sum()) for key, s in spectra.items()}
    layers = {key: next(x for x in row if x is not None) for key, row in rows.items()}
    cut = {key: _cut(factors, chosen) for key, factors in merged.items()}
    _write(folder, adapters, layers, cut, chosen)
    total = sum(whole.values())
    return {
        "space": space,
        "rank": chosen,
        "energy_kept": sum(kept.values()) / total if total else 1.0,
        "energy_kept_by_linear": {
            key: kept[key] / whole[key] if whole[key] else 1.0 for key in whole
        },
    }


def _merged(
    rows: Rows, spec: MergeSpec, space: str, rank: int | None
) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    """Factors of every merged change (no more than `rank` of them), largest part first, and each one's
    spectrum: the squared singular values."""
    made, spectra = {}, {}
    device = merge_device(1 << 30)
    for key, row in progress(rows.items(), "Merge", unit="linear"):
        factors = [None if layer is None else _wide(layer.factors) for layer in row]
        if space == "core":
            most = sum(f.rank for f in factors if f is not None)
            found, _ = lora_merge_as_lora(factors, spec, most, layer=key)
        else:
            found = _decomposed(factors, spec, key, device)
        # both factors carry the root of the singular values: see ``truncated``
        spectra[key] = found.A.double().square().sum(1).square().cpu()
        made[key] = found if rank is None else _cut(found, rank)
    return made, spectra


def _wide(f: LoraFactors) -> LoraFactors:
    """In 32 bits at least: 16 would round every part of a merged change."""
    wide = torch.promote_types(f.A.dtype, torch.float32)
    return LoraFactors(f.A.to(wide), f.B.to(wide), f.scale)


def _decomposed(
    factors: Sequence[LoraFactors | None], spec: MergeSpec, key: str, device: torch.device
) -> LoraFactors:
    if spec.trim_scope == "global" and spec.trims:
        raise ValueError(
            "an adapter's matrices are trimmed each by itself: set trim_scope='tensor' to export one"
        )
    shape = next(f.shape for f in factors if f is not None)
    delta = torch.zeros(shape, device=device)
    lora_merge_(delta, factors, spec, layer=key)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s.sqrt()
    dtype = next(f.A.dtype for f in factors if f is not None)
    return LoraFactors((root[:, None] * vh).to(dtype).cpu(), (u * root).to(dtype).cpu())


def _rank_for(spectra: Any, energy: float) -> int:
    """The smallest rank that keeps `energy` of the sum of all spectra, 1 at least."""
    longest = max(len(s) for s in spectra)
    total = torch.zeros(longest, dtype=torch.float64)
    for s in spectra:
        total[: len(s)] += s
    kept = total.cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, longest)


def _cut(factors: LoraFactors, rank: int) -> LoraFactors:
    """The first `rank` parts, padded with zeros where there are fewer."""
    a, b = factors.A[:rank], factors.B[:, :rank]
    missing = rank - a.shape[0]
    if missing > 0:
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(b, (0, missing))
    return LoraFactors(a.contiguous(), b.contiguous(), factors.scale)


def _write(
    folder: Path,
    adapters: Sequence[Adapter],
    layers: Mapping[str, LoraLayer],
    factors: Mapping[str, LoraFactors],
    rank: int,
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, LoraFactors]] = {}
    for key, layer in layers.items():
        if layer.kind == "stacked":
            stacks.setdefault(layer.name, {})[layer.index] = factors[key]
        else:
            tensors |= _tensors_of(layer, factors[key])
    for name, parts in stacks.items():
        matrices = [parts[e] for e in range(len(parts))]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([f.A for f in matrices])
        # PEFT's order: the expert runs fastest along B's columns
        b = torch.stack([f.B for f in matrices], -1).flatten(1)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    _write_config(folder, adapters, layers.values(), rank)


def _tensors_of(layer: LoraLayer, f: LoraFactors) -> dict[str, Tensor]:
    prefix = f"base_model.model.{layer.name}"
    if layer.kind == "embedding":
        return {f"{prefix}.lora_embedding_A": f.A, f"{prefix}.lora_embedding_B": f.B}
    a, b = f.A, f.B
    if layer.kind == "conv":
        a = a.reshape(f.rank, *layer.kernel)
        b = b.reshape(*b.shape, *(1 for _ in layer.kernel[1:]))
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _write_config(folder: Path, adapters: Sequence[Adapter], layers: Any, rank: int) -> None:
    from peft import LoraConfig

    configs = [adapter.config for adapter in adapters]
    tasks = {config.get("task_type") for config in configs}
    bases = {adapter.base for adapter in adapters if adapter.base}
    modules = sorted({x.name for x in layers if x.kind != "stacked"})
    stacked = any(layer.kind == "stacked" for layer in layers)
    parameters = next((c["target_parameters"] for c in configs if c.get("target_parameters")), None)
    nested = [x.name for x in layers if x.kind != "stacked" and x.name.endswith(".base_layer")]
    if nested:
        raise AdapterError(f"{nested[0]}: two target_parameters of one module: merge into a model")
    LoraConfig(
        r=rank,
        lora_alpha=rank,  # the factors carry their scale
        target_modules=modules,
        target_parameters=list(parameters or ()) if stacked else None,
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_model_name_or_path=min(bases, default=None),
        inference_mode=True,
    ).save_pretrained(str(folder))
    prints = {adapter.fingerprint for adapter in adapters}
    if len(prints) == 1 and "" not in prints:
        write_base_note(folder, min(bases, default=""), prints.pop())
