"""Conflict statistics and TIES / DARE / linear merging straight from LoRA factors.

A full delta is never in memory: row tiles of ``scale * B @ A`` are recomputed for each pass (two
counting passes for the exact trim threshold, one that elects, merges, counts conflicts and writes).
Inner products of deltas come from the factors' Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ._dispatch import register_torch, resolve
from ._lora_lowrank import core_factors, delta_spaces, lora_mean, truncated
from ._lora_trim import global_thresholds, row_tiles, tensor_thresholds, trimmed_tile
from ._lora_types import ConflictReport, Experts, LoraFactors, MergeSpec, sum_reports

__all__ = [
    "ConflictReport",
    "LoraFactors",
    "MergeSpec",
    "lora_conflicts",
    "lora_mean",
    "lora_merge_",
    "lora_merge_as_lora",
    "merge_model_",
    "model_conflicts",
    "sum_reports",
]


def lora_conflicts(
    experts: Experts, spec: MergeSpec, *, layer: str = "", tile: int | None = None
) -> ConflictReport:
    """How the experts' deltas of one linear conflict, after the trimming or dropping the spec asks
    for.

    Args:
        experts: one entry per expert, None = it does not touch this linear; ranks may differ.
        layer: the linear's name: in the report, in errors, and in the key of DARE's random draws.
        tile: elements of all experts' tiles together; only speed and memory depend on it.

    Raises ValueError if the experts' shapes differ or the spec's weights do not fit.
    """
    return _one(None, experts, spec, layer, tile, None)


def lora_merge_(
    base_weight: Tensor,  # [out, in]
    experts: Experts,
    spec: MergeSpec,
    *,
    layer: str = "",
    tile: int | None = None,
) -> ConflictReport:
    """Add lam * merge(deltas) to ``base_weight`` in place, and report the conflicts met on the way.

    Sums are formed in float32 (float64 for a float64 base) and rounded once to the base's dtype;
    ``report.lost_updates`` counts updates too small to survive that. See :func:`lora_conflicts` for
    the arguments; with ``trim_scope='global'`` this linear is the whole model (use
    :func:`merge_model_` for several).

    Raises ValueError if shapes do not fit; the base is then untouched.
    """
    return _one(base_weight, experts, spec, layer, tile, None)


def merge_model_(
    weights: Mapping[str, Tensor],
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    *,
    tile: int | None = None,
    on_linear: Callable[[str, ConflictReport], None] | None = None,
) -> dict[str, Any]:
    """Merge into all of a model's linears, in place.

    Args:
        weights: base weight [out, in] by linear; names without experts are left alone.
        experts: the experts' factors by linear, the same number of experts everywhere.
        spec: with ``trim_scope='global'`` each expert has one threshold over all its linears.
        on_linear: called with each linear's name and report when it is written (progress).

    Returns:
        {"linears": {name: report}, "total": report}, each ``ConflictReport.to_dict()``.

    Raises:
        ValueError: a linear the model does not have, or factors that do not fit it; nothing is
            written then.
    """
    missing = sorted(set(experts) - set(weights))
    if missing:
        raise ValueError(
            f"the base model has no linear {missing[0]!r} ({len(missing)} of the experts' "
            f"{len(experts)} are missing): are they of another base?"
        )
    for name, factors in experts.items():
        _check(weights[name], factors, spec, name)
    return _model(weights, experts, spec, tile, on_linear)


def model_conflicts(
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    *,
    tile: int | None = None,
    on_linear: Callable[[str, ConflictReport], None] | None = None,
) -> dict[str, Any]:
    """The report of :func:`merge_model_` without a merge."""
    for name, factors in experts.items():
        _check(None, factors, spec, name)
    return _model(None, experts, spec, tile, on_linear)


def lora_merge_as_lora(
    experts: Experts, spec: MergeSpec, rank: int, *, layer: str = ""
) -> tuple[LoraFactors, float]:
    """Merge in the experts' common low-rank space (Core Space, arXiv 2509.17786) and return it as a
    LoRA.

    Every delta is Ub C_e Ua^T with common orthonormal Ub, Ua (left / right singular vectors of the
    stacked factors); the small C_e are merged as the spec says and the result is cut to ``rank``.
    This is not the merge of the deltas themselves, which has no low rank.

    Returns:
        factors of exactly ``rank`` (zero-padded if the result has less), scale 1, and the share of
        the merged core's energy (squared norm) that the cut keeps.

    Raises ValueError for ``trim_scope='global'`` (a core is trimmed by itself) and for no expert.
    """
    if spec.trim_scope == "global":
        raise ValueError(
            "a core-space merge trims each linear by itself: "
            "set trim_scope='tensor' to export a LoRA"
        )
    _check(None, experts, spec, layer)
    left, right, cores = core_factors(experts)
    core = torch.zeros((left.shape[1], right.shape[1]), device=left.device)
    lora_merge_(core, cores, spec, layer=layer)
    dtype = next(f.A.dtype for f in experts if f is not None)
    return truncated(left, core.double(), right, rank, dtype)


def _model(
    weights: Mapping[str, Tensor] | None,
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    tile: int | None,
    on_linear: Callable[[str, ConflictReport], None] | None,
) -> dict[str, Any]:
    counts = {len(factors) for factors in experts.values()}
    if len(counts) != 1:
        raise ValueError(f"every linear needs the same number of experts, got {sorted(counts)}")
    common = None
    if spec.trim_scope == "global" and spec.trims:
        threshold, tied = global_thresholds(list(experts.values()), spec, tile)
        # equal elements beyond the k-th are a matter of the whole model: no linear owns them
        common = threshold, torch.zeros_like(tied)
    reports: list[ConflictReport] = []
    for name, factors in experts.items():
        base = None if weights is None else weights[name]
        reports.append(_one(base, factors, spec, name, tile, common))
        if on_linear is not None:
            on_linear(name, reports[-1])
    total = sum_reports(reports)
    if common is not None:
        total.threshold, total.tied = threshold, tied
    return {"linears": {r.name: r.to_dict() for r in reports}, "total": total.to_dict()}


def _check(base: Tensor | None, experts: Experts, spec: MergeSpec, layer: str) -> None:
    where = f"linear {layer!r}: " if layer else ""
    spec.expert_weights(len(experts))
    shape = None if base is None else tuple(base.shape)
    owner = "the base weight"
    for e, factors in enumerate(experts):
        if factors is None:
            continue
        if shape is not None and factors.shape != shape:
            raise ValueError(
                f"{where}expert {e} changes a {factors.shape} matrix, but {owner} is {shape}"
            )
        shape, owner = factors.shape, f"expert {e}'s" if base is None else owner


def _one(
    base: Tensor | None,
    experts: Experts,
    spec: MergeSpec,
    layer: str,
    tile: int | None,
    thresholds: tuple[Tensor, Tensor] | None,
) -> ConflictReport:
    _check(base, experts, spec, layer)
    if not any(f is not None for f in experts):
        return ConflictReport.empty(layer, len(experts))
    device = next(f.A.device for f in experts if f is not None)
    return resolve("lora_merge", device)(base, experts, spec, layer, tile, thresholds)


@register_torch("lora_merge")
@torch.no_grad()
def _lora_merge_torch(
    base: Tensor | None,
    experts: Experts,
    spec: MergeSpec,
    layer: str,
    tile: int | None,
    thresholds: tuple[Tensor, Tensor] | None,
) -> ConflictReport:
    out, width = next(f.shape for f in experts if f is not None)
    threshold, tied = thresholds or tensor_thresholds(experts, spec, tile)
    present = torch.tensor([f is not None for f in experts], dtype=torch.float64)
    report = ConflictReport.empty(layer, len(experts))
    report.linears, report.elements = 1, out * width
    report.threshold, report.tied = threshold.clone(), tied.clone()
    report.size = present * (out * width)
    report.dot, report.output_overlap, report.input_overlap = _pairwise(experts)
    report.pair_linears = present[:, None] * present
    for rows in row_tiles(out, width * len(experts), tile):
        stack, energy = trimmed_tile(experts, rows, width, spec, threshold, layer)
        report.energy += energy
        _count_conflicts(stack, report)
        if base is not None:
            _write(base[rows], _merged(stack, spec), report)
    return report


def _merged(stack: Tensor, spec: MergeSpec) -> Tensor:
    """[n, in] merge of trimmed deltas [E, n, in]; sums run over the experts in order."""
    weights = spec.expert_weights(len(stack))
    weighted = [delta * w for delta, w in zip(stack, weights, strict=True)]
    if spec.method in ("linear", "dare_linear"):
        return reduce(torch.add, weighted).mul_(spec.lam)
    voters = weighted if spec.election == "weighted" else list(stack)
    if spec.election == "frequency":
        vote = reduce(torch.add, (v.sign() for v in voters))
    else:
        vote = reduce(torch.add, voters)
    elected = torch.where(vote >= 0, 1.0, -1.0)
    agree = [v.sign() == elected for v in voters]
    total = reduce(torch.add, (x * a for x, a in zip(weighted, agree, strict=True)))
    if spec.divisor == "count":
        divisor = reduce(torch.add, (a.float() for a in agree)).clamp_(min=1)
    else:
        divisor = reduce(torch.add, (w * a.float() for w, a in zip(weights, agree, strict=True)))
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return (total / divisor).mul_(spec.lam)


def _write(base: Tensor, update: Tensor, report: ConflictReport) -> None:
    """Add to the rows of the base, rounding once."""
    update = update.to(base.device)
    wide = torch.promote_types(base.dtype, torch.float32)
    new = (base.to(wide) + update.to(wide)).to(base.dtype)
    moved = update != 0
    report.update_energy += update.double().square().sum().cpu()
    report.updates += moved.sum().cpu()
    report.lost_updates += (moved & (new == base)).sum().cpu()
    base.copy_(new)


def _count_conflicts(stack: Tensor, report: ConflictReport) -> None:
    sign = stack.sign().flatten(1)
    changed = sign.abs()
    both = changed @ changed.t()  # counts below 2^24: exact in float32
    report.kept += changed.sum(1, dtype=torch.float64).cpu()
    report.pair_overlap += both.double().cpu()
    report.pair_conflicts += (0.5 * (both - sign @ sign.t())).double().cpu()
    several = changed.sum(0) >= 2
    apart = (sign.amax(0) > 0) & (sign.amin(0) < 0)
    magnitude = stack.abs().flatten(1).double().sum(0)
    report.overlap += several.sum().cpu()
    report.conflicts += apart.sum().cpu()
    report.overlap_magnitude += magnitude[several].sum().cpu()
    report.conflict_magnitude += magnitude[apart].sum().cpu()
    report.kept_energy += stack.flatten(1).double().square().sum(1).cpu()
    report.sum_energy += stack.flatten(1).double().sum(0).square().sum().cpu()
    report.aligned_energy += magnitude.square().sum().cpu()


def _pairwise(experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """[E, E] inner products of the deltas, and overlaps of their output and input spaces, from the
    factors."""
    n = len(experts)
    dot, output, inputs = (torch.zeros((n, n), dtype=torch.float64) for _ in range(3))
    spaces = [None if f is None else delta_spaces(f) for f in experts]
    for i, first in enumerate(experts):
        for j, second in enumerate(experts[: i + 1]):
            if first is None or second is None:
                continue
            gram = (first.B.double().t() @ second.B.double()) * (
                first.A.double() @ second.A.double().t()
            )
            dot[i, j] = dot[j, i] = first.scale * second.scale * float(gram.sum())
            a, b = spaces[i], spaces[j]
            assert a is not None and b is not None
            for into, u, v in ((output, a[0], b[0]), (inputs, a[1], b[1])):
                least = min(u.shape[1], v.shape[1])
                share = float((u.t() @ v).square().sum()) / least if least else 0.0
                into[i, j] = into[j, i] = share
    return dot, output, inputs
