"""Merge LoRA adapters made by anyone into their base, or into one adapter, and measure how they conflict.

    from mmedx_fast.merging import conflicts, merge
    from mmedx_fast.ops import MergeSpec

    found = conflicts(["cardiology", "radiology"])
    merge(["cardiology", "radiology"], "merged", MergeSpec(density=0.3), base="Qwen2.5-VL-7B-Instruct")

The deltas themselves are merged, from their factors (:mod:`mmedx_fast.ops`), and no delta is ever whole in
memory. A merged model is written shard by shard: beside the adapters' factors, memory holds one output shard
and one tensor of the base. ``mmedx conflicts`` and ``mmedx merge`` are the same from a shell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmedx_fast.atomic import write_folder, write_json
from mmedx_fast.merge_report import describe, measures, merge_device, short_name
from mmedx_fast.model_files import copy_companions, read_tensors, write_shards
from mmedx_fast.ops import (
    ConflictReport,
    LoraFactors,
    MergeSpec,
    lora_merge_,
    model_conflicts,
    sum_reports,
)
from mmedx_fast.peft_adapters import Adapter, AdapterError, LoraLayer, read_adapters
from mmedx_fast.progress import progress
from mmedx_fast.stages.adapters import by_linear

if TYPE_CHECKING:
    from mmedx_fast.base_layout import BaseLayout

__all__ = ["conflicts", "merge"]

REPORT_NAME = "merge.json"
MAX_SHARD_SIZE = 2 << 30
Row = list[LoraLayer | None]


def conflicts(
    adapters: Sequence[str | Path], spec: MergeSpec | None = None, *, any_base: bool = False
) -> dict[str, Any]:
    """How the adapters' changes conflict, after the trimming that `spec` asks for. No base is needed.

    Args:
        adapters: folders in PEFT's format.
        spec: only its trimming or dropping matters.
        any_base: take adapters that name different bases for adapters of one.

    Returns:
        ``experts`` (names), ``notes``, ``spec``, ``linears`` and ``summed`` (measures of conflict in 0..1, cosines
        [E, E]), and ``full``, every count of :class:`mmedx_fast.ops.ConflictReport`.

    Raises AdapterError for an adapter that cannot be used, naming it and the remedy.
    """
    spec = spec or MergeSpec()
    _check_density(spec)
    read = read_adapters(adapters, any_base)
    _check_stacked(read)
    spec.expert_weights(len(read))
    rows = _rows(read)
    device = merge_device(_bytes_of(rows))
    with progress(len(rows), "Conflicts", unit="linear") as bar:
        report = model_conflicts(
            {key: _factors(row, device) for key, row in rows.items()},
            spec,
            on_linear=lambda *_: bar.update(1),
        )
    return {
        "experts": [adapter.name for adapter in read],
        "notes": _unseen_copies(read),
        "spec": describe(spec),
        "linears": {short_name(name): measures(one) for name, one in report["linears"].items()},
        "summed": measures(report["total"]),
        "full": report,
    }


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    spec: MergeSpec | None = None,
    *,
    base: str | Path | None = None,
    as_lora: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    space: str = "core",
    any_base: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> dict[str, Any]:
    """Merge adapters into a copy of their base, or (`as_lora`) into one adapter, in the new folder `out`.

    Args:
        adapters: folders in PEFT's format; ranks, scales and targets may differ.
        out: must not exist, or be empty. It appears complete or not at all.
        base: folder of the base (or its name in the local hub cache). A model needs it; everything in it
            but its weights is carried over. For an adapter it is held against the adapters and says what
            the modules are called; without one they keep the adapters' names, which must be of one form.
        rank: of the adapter, for all modules. Without it the smallest that keeps `energy` (0.99) of the
            merged change's squared norm, summed over all modules.
        space: core: the adapters' common low-rank space is merged, with no delta in memory. delta: every
            merged delta is decomposed, as PEFT's ``*_svd`` do (slow: an SVD of each matrix).
        any_base: take adapters that name different bases for adapters of one.
        max_shard_size: bytes of an output file at most, unless one tensor is larger.

    Returns:
        What also is in ``merge.json`` there: ``form`` (model or adapter), ``adapters``, ``spec``, ``notes``,
        ``total`` and ``linears`` (conflicts and lost updates), and of an adapter ``rank`` and
        ``energy_kept``.

    Raises:
        AdapterError: adapters or base cannot be used; nothing is written then.
        ValueError: options that contradict each other.
    """
    spec = spec or MergeSpec()
    _check_density(spec)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not empty: name a new folder for the merge")
    if not as_lora and (rank is not None or energy is not None):
        raise ValueError("rank and energy are of a merge into an adapter: set as_lora (--as-lora)")
    read = read_adapters(adapters, any_base)
    spec.expert_weights(len(read))
    document: dict[str, Any] = {
        "form": "adapter" if as_lora else "model",
        "adapters": [_describe_adapter(adapter) for adapter in read],
        "spec": describe(spec),
        "notes": [],
    }
    if as_lora:
        from mmedx_fast.adapter_names import named_rows
        from mmedx_fast.merging_lora import merge_to_adapter

        _check_stacked(read)
        plan = plan_merge(read, base) if base else None
        document["notes"] = plan.notes if plan else _unseen_copies(read)
        rows = named_rows(read, _rows(read), plan.layout if plan else None)
        with write_folder(out) as folder:
            document |= merge_to_adapter(folder, read, rows, spec, rank, energy, space)
            write_json(folder / REPORT_NAME, document)
        return document
    if base is None:
        raise ValueError("a merged model needs its base: give base (--base), or set as_lora")
    plan = plan_merge(read, base)
    document |= {"base": str(plan.layout.folder), "notes": plan.notes, "untied": plan.untie}
    with write_folder(out) as folder:
        document |= _write_model(folder, plan, spec, max_shard_size)
        write_json(folder / REPORT_NAME, document)
    return document


@dataclass
class Plan:
    """Which layers change which weight of the base, checked against its files."""

    layout: BaseLayout
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    """Weight's key -> layer's key -> the adapters' layers."""
    untie: bool = False
    """Weights that the base holds once become several."""
    notes: list[str] = field(default_factory=list)


def plan_merge(adapters: Sequence[Adapter], base: str | Path) -> Plan:
    """Raises AdapterError where an adapter does not fit the base."""
    from mmedx_fast.base_layout import BaseLayout

    layout = BaseLayout(base)
    plan = Plan(layout)
    for key, row in _rows(adapters).items():
        owners = {
            layout.weight_key(layer, adapter.config.get("target_parameters") or [])
            for adapter, layer in zip(adapters, row, strict=True)
            if layer is not None
        }
        if len(owners) > 1:
            raise AdapterError(
                f"{key}: the adapters' target_parameters make it {' and '.join(sorted(owners))}; "
                "only adapters with the same ones can be merged"
            )
        plan.rows.setdefault(owners.pop(), {})[key] = row
    _check_shapes(plan)
    _check_copies(plan, adapters)
    _resolve_ties(plan)
    given = {layout.folder.name, Path(base).name}
    names = sorted({Path(a.base).name for a in adapters if a.base} - given)
    if names:
        plan.notes.append(
            f"the adapters name {', '.join(names)} as their base; merged into {layout.folder}"
        )
    for adapter in adapters:
        if str(adapter.config.get("init_lora_weights")).lower() == "loftq":
            plan.notes.append(
                f"{adapter.name} began as LoftQ's correction of a quantised base, which is part of what it adds"
            )
    return plan


def _check_density(spec: MergeSpec) -> None:
    """0 is right for the op, as it is for PEFT's, but it keeps nothing of any adapter."""
    if spec.trims and spec.density == 0:
        raise ValueError("density = 0 would keep nothing of the adapters: it must be above 0")


def _unseen_copies(adapters: Sequence[Adapter]) -> list[str]:
    """What only a base could settle."""
    return [
        f"{adapter.name} carries {', '.join(sorted(adapter.copies))} of its base, taken to be unchanged: "
        "give the base to hold them against it"
        for adapter in adapters
        if adapter.copies
    ]


def _check_shapes(plan: Plan) -> None:
    for key, rows in plan.rows.items():
        for row in rows.values():
            layer = next(layer for layer in row if layer is not None)
            name = plan.layout.require(key, layer)
            plan.layout.view(plan.layout.empty(name), layer)


def _check_copies(plan: Plan, adapters: Sequence[Adapter]) -> None:
    """PEFT saves the embedding beside an adapter of it: the base's own is no change, another one is."""
    for adapter in adapters:
        for copied in adapter.copies:
            name = plan.layout.tensor(plan.layout.key(copied))
            if name is None or not _same(adapter.copy(copied), plan.layout.read(name)):
                raise AdapterError(
                    f"{adapter.folder} carries weights of its own for {copied}, which are not the base's (was "
                    "the vocabulary resized?): merge it by itself with PEFT, or train with the base's"
                )


def _same(copy: Tensor, weight: Tensor) -> bool:
    """Equal in the coarser of their dtypes."""
    if copy.shape != weight.shape:
        return False
    coarse = min((copy.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(copy.to(coarse), weight.to(coarse))


def _resolve_ties(plan: Plan) -> None:
    """An adapter of a tied head (or embedding) changes one of two uses of a weight: they become two weights,
    unless all adapters change both alike (ensure_weight_tying)."""
    for key, source in plan.layout.tied.items():
        if key not in plan.rows and source not in plan.rows:
            continue
        both = plan.rows.get(key, {}), plan.rows.get(source, {})
        if all(len(rows) == 1 for rows in both):
            (head,), (embedding,) = (list(rows.values()) for rows in both)
            if all(_mirrored(a, b) for a, b in zip(head, embedding, strict=True)):
                del plan.rows[key]
                continue
        plan.untie = True
    if plan.untie:
        plan.notes.append(
            "the base shares one weight between embedding and head, which the adapters change apart: the "
            "merged model holds both (tie_word_embeddings = false)"
        )


def _mirrored(head: LoraLayer | None, embedding: LoraLayer | None) -> bool:
    if head is None or embedding is None:
        return head is embedding
    a, b = head.factors, embedding.factors
    if head.kind == embedding.kind or a.scale != b.scale or a.shape != b.shape[::-1]:
        return False
    return torch.equal(a.A, b.B.t()) and torch.equal(a.B, b.A.t())


def _write_model(folder: Path, plan: Plan, spec: MergeSpec, max_shard_size: int) -> dict[str, Any]:
    from mmedx_fast.base_layout import untied_config

    everything = {key: row for rows in plan.rows.values() for key, row in rows.items()}
    device = merge_device(_bytes_of(everything) + 12 * _largest(everything))
    thresholds = _thresholds(everything, spec, device)
    reports: list[ConflictReport] = []

    def merged(key: str, tensor: Tensor) -> Tensor:
        rows = plan.rows.get(key)
        if rows is None:
            return tensor
        weight = tensor.to(device, copy=True)
        for name, row in rows.items():
            layer = next(layer for layer in row if layer is not None)
            reports.append(
                lora_merge_(
                    plan.layout.view(weight, layer),
                    _factors(row, device),
                    spec,
                    layer=name,
                    thresholds=thresholds,
                )
            )
        return weight

    write_shards(folder, _merged_weights(plan, merged), max_shard_size)
    copy_companions(folder, plan.layout.folder)
    if plan.untie:
        write_json(folder / "config.json", untied_config(plan.layout.config))
    total = sum_reports(reports)
    if thresholds is not None:
        total.threshold = thresholds
    return {"total": total.to_dict(), "linears": {r.name: r.to_dict() for r in reports}}


def _merged_weights(
    plan: Plan, merged: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    layout = plan.layout
    apart: dict[str, list[str]] = {}
    if plan.untie:
        for name, source in layout.tied_names.items():
            if not layout.has(name):
                apart.setdefault(layout.key(source), []).append(name)
    with progress(len(layout.files), "Merge", unit="tensor") as bar:
        for name, tensor in read_tensors(layout.files):
            bar.update(1)
            key = layout.key(name)
            for other in apart.get(key, []):
                yield other, merged(layout.key(other), tensor)
            yield name, merged(key, tensor)


def _thresholds(
    rows: Mapping[str, Row], spec: MergeSpec, device: torch.device
) -> Tensor | None:  # [E] f64
    """Those of the whole model, where one linear cannot find its own."""
    if spec.trim_scope != "global" or not spec.trims:
        return None
    report = model_conflicts({key: _factors(row, device) for key, row in rows.items()}, spec)
    found = report["total"]["threshold"]
    return torch.tensor([math.inf if x is None else x for x in found], dtype=torch.float64)


def _check_stacked(adapters: Sequence[Adapter]) -> None:
    """Without a base only the configuration says which parameter a stacked layer is of."""
    wanted = {
        tuple(sorted(adapter.config.get("target_parameters") or ()))
        for adapter in adapters
        if any(layer.kind == "stacked" for layer in adapter.layers.values())
    }
    if len(wanted) > 1:
        raise AdapterError(
            f"the adapters' target_parameters differ ({sorted(wanted)}): only adapters with the same ones "
            "can be compared or merged into an adapter"
        )


def _rows(adapters: Sequence[Adapter]) -> dict[str, Row]:
    """Layer's key -> one entry per adapter, None where it does not touch it, in the models' order."""
    return by_linear({adapter.name: adapter.layers for adapter in adapters})


def _factors(row: Row, device: torch.device) -> list[LoraFactors | None]:
    made = []
    for layer in row:
        f = None if layer is None else layer.factors
        if f is not None and f.A.device != device:
            f = LoraFactors(f.A.to(device), f.B.to(device), f.scale)
        made.append(f)
    return made


def _bytes_of(rows: Mapping[str, Row]) -> int:
    layers = [layer for row in rows.values() for layer in row if layer is not None]
    return sum(x.numel() * x.element_size() for y in layers for x in (y.factors.A, y.factors.B))


def _largest(rows: Mapping[str, Row]) -> int:
    """Elements of the largest matrix."""
    return max(math.prod(layer.factors.shape) for row in rows.values() for layer in row if layer)


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    layers = adapter.layers.values()
    return {
        "name": adapter.name,
        "folder": str(adapter.folder),
        "base": adapter.base,
        "modules": len(layers),
        "ranks": sorted({layer.factors.rank for layer in layers}),
        "scales": sorted({layer.factors.scale for layer in layers}),
    }
