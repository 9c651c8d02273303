"""Conflict statistics and TIES / DARE / linear merging straight from LoRA factors.

A full delta is never in memory: tiles of ``scale * B @ A`` are recomputed for each pass (counting
passes for the exact trim threshold, one pass that elects, merges, counts conflicts and writes). Beside
factors and base an operation takes at most 5 % of the bytes of the model's largest matrix in 16 bits
(from some ten million elements on), on CUDA as on the CPU. Inner products of deltas come from the
factors' Gram matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import register_triton, resolve
from ._lora_lowrank import core_factors, lora_mean, truncated
from ._lora_plan import MAX_EXPERTS
from ._lora_torch import Merged, OnLinear
from ._lora_types import (
    ConflictReport,
    Experts,
    Linear,
    LoraFactors,
    MergeOverflowError,
    MergeSpec,
    sum_reports,
)

# A block's counts are float32 products of signs, exact below 2^24.
MOST_TILE = 1 << 22
# What the sum is rounded to; anything else would be written as if it were a number of these.
BASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

__all__ = [
    "ConflictReport",
    "LoraFactors",
    "MergeOverflowError",
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
        tile: elements of a block in plain torch, 4 Mi at most; only speed and memory depend on it.

    Raises ValueError if the experts' shapes differ or the spec's weights do not fit,
    MergeOverflowError if deltas overflow (see :func:`lora_merge_`).
    """
    return _one(None, experts, spec, layer, tile)


def lora_merge_(
    base_weight: Tensor,  # [out, in] bf16, f16, f32 or f64
    experts: Experts,
    spec: MergeSpec,
    *,
    layer: str = "",
    tile: int | None = None,
    thresholds: Tensor | None = None,  # [E] f64
) -> ConflictReport:
    """Add lam * merge(deltas) to ``base_weight`` in place, and report the conflicts met on the way.

    Sums are formed in float32 (float64 for a float64 base) and rounded once to the base's dtype;
    ``report.lost_updates`` counts updates too small to survive that. Deltas are float64 products in
    plain torch; Triton multiplies 16-bit factors exactly and adds in float32, and rounds factors of
    other or mixed dtypes to float32 (a copy of them) first. See :func:`lora_conflicts` for
    the arguments; with ``trim_scope='global'`` this linear is the whole model (use
    :func:`merge_model_` for several), unless ``thresholds`` are given: a model whose weights are not all
    in memory is merged linear by linear with the thresholds that :func:`model_conflicts` reports.

    Raises ValueError if shapes or the base's dtype do not fit, or a threshold is NaN or negative; the
    base is then untouched. Raises MergeOverflowError (a ValueError) if deltas are not finite in
    ``delta_dtype`` (their squares in Triton's float32), or finite elements of the base did not stay so
    in its dtype. That is known once the sums are: the base is written by then, and useless.
    """
    return _one(base_weight, experts, spec, layer, tile, thresholds)


def merge_model_(
    weights: Mapping[str, Tensor],
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    *,
    tile: int | None = None,
    on_linear: OnLinear | None = None,
) -> dict[str, Any]:
    """Merge into all of a model's linears, in place.

    Args:
        weights: base weight [out, in] by linear, bf16, f16, f32 or f64; names without experts are
            left alone.
        experts: the experts' factors by linear, the same number of experts everywhere.
        spec: with ``trim_scope='global'`` each expert has one threshold over all its linears.
        on_linear: called with each linear's name and report when it is written (progress).

    Returns:
        {"linears": {name: report}, "total": report}, each ``ConflictReport.to_dict()``.

    Raises:
        ValueError: a linear the model does not have, factors that do not fit it, or two linears
            that share elements (tied weights); nothing is written then.
        MergeOverflowError: as in :func:`lora_merge_`, after the last linear; names the linears.
    """
    missing = sorted(set(experts) - set(weights))
    if missing:
        raise ValueError(
            f"the base model has no linear {missing[0]!r} ({len(missing)} of the experts' "
            f"{len(experts)} are missing): are they of another base?"
        )
    for name, factors in experts.items():
        _check(weights[name], factors, spec, name)
    _check_apart({n: weights[n] for n, f in experts.items() if any(x is not None for x in f)})
    return _model(weights, experts, spec, tile, on_linear)


def model_conflicts(
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    *,
    tile: int | None = None,
    on_linear: OnLinear | None = None,
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
    size = (left.shape[1], right.shape[1])
    core = torch.zeros(size, dtype=torch.float32, device=left.device)
    lora_merge_(core, cores, spec, layer=layer)
    dtype = next(f.A.dtype for f in experts if f is not None)
    return truncated(left, core.double(), right, rank, dtype)


def _model(
    weights: Mapping[str, Tensor] | None,
    experts: Mapping[str, Experts],
    spec: MergeSpec,
    tile: int | None,
    on_linear: OnLinear | None,
) -> dict[str, Any]:
    counts = {len(factors) for factors in experts.values()}
    if len(counts) != 1:
        raise ValueError(f"every linear needs the same number of experts, got {sorted(counts)}")
    linears = [
        Linear(name, None if weights is None else weights[name], factors)
        for name, factors in experts.items()
    ]
    merged = _merge(linears, spec, tile, on_linear)
    total = sum_reports(merged.reports)
    if merged.common is not None:
        total.threshold, total.tied = merged.common
    return {"linears": {r.name: r.to_dict() for r in merged.reports}, "total": total.to_dict()}


def _check(base: Tensor | None, experts: Experts, spec: MergeSpec, layer: str) -> None:
    where = f"linear {layer!r}: " if layer else ""
    spec.expert_weights(len(experts))
    if base is not None and base.dtype not in BASE_DTYPES:
        raise ValueError(
            f"{where}the base weight is {base.dtype}: a merge writes "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in BASE_DTYPES)}; "
            "dequantize it first"
        )
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


def _check_apart(weights: Mapping[str, Tensor]) -> None:
    """Tied weights would take both names' deltas. Parts of one tensor (a fused projection) are no ties."""
    near: list[tuple[str, Tensor]] = []
    for name, weight in sorted(weights.items(), key=lambda item: _span(item[1])):
        near = [(n, w) for n, w in near if _span(w)[1] >= _span(weight)[0]]
        for other, before in near:
            if _share(weight, before):
                raise ValueError(
                    f"linears {other!r} and {name!r} share memory (tied weights?) and would be merged "
                    "into twice: give experts to one of them, or untie them"
                )
        near.append((name, weight))


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last element."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + last * x.element_size()


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices whose spans overlap have an element in common."""
    if a.dtype != b.dtype or a.stride() != b.stride():
        return True  # not parts of one matrix: nothing is known of their order
    row, column = (0, 1) if a.stride(0) >= a.stride(1) else (1, 0)
    line, step = max(a.stride(row), 1), max(a.stride(column), 1)
    apart = (a.data_ptr() - b.data_ptr()) // a.element_size()
    for rows in (apart // line, apart // line + 1):
        columns, between = divmod(apart - rows * line, step)
        if (
            not between
            and -a.shape[row] < rows < b.shape[row]
            and -a.shape[column] < columns < b.shape[column]
        ):
            return True
    return False


def _one(
    base: Tensor | None,
    experts: Experts,
    spec: MergeSpec,
    layer: str,
    tile: int | None,
    thresholds: Tensor | None = None,
) -> ConflictReport:
    _check(base, experts, spec, layer)
    if thresholds is None:
        return _merge([Linear(layer, base, experts)], spec, tile, None).reports[0]
    if spec.trim_scope != "global" or tuple(thresholds.shape) != (len(experts),):
        raise ValueError(
            f"thresholds are one per expert ({len(experts)}), of trim_scope='global'; got "
            f"{tuple(thresholds.shape)} and trim_scope={spec.trim_scope!r}"
        )
    common = thresholds.double().cpu()
    for e, (factors, threshold) in enumerate(zip(experts, common.tolist(), strict=True)):
        # nothing compares to NaN, and the expert would be dropped without a word
        if factors is not None and spec.trims and not threshold >= 0:
            where = f"linear {layer!r}: " if layer else ""
            raise ValueError(
                f"{where}the threshold of expert {e} is {threshold}: it must be 0 or more "
                "(infinity keeps nothing)"
            )
    return _merge([Linear(layer, base, experts)], spec, tile, None, common).reports[0]


def _merge(
    linears: Sequence[Linear],
    spec: MergeSpec,
    tile: int | None,
    on_linear: OnLinear | None,
    thresholds: Tensor | None = None,
) -> Merged:
    """Hand the linears of each device to its implementation: a base's device, else the factors'."""
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be at least 1 element, got {tile}")
    tile = None if tile is None else min(tile, MOST_TILE)
    count = max((len(linear.experts) for linear in linears), default=0)
    beyond = f"at most {MAX_EXPERTS} experts, got {count}" if count > MAX_EXPERTS else None
    parts: dict[torch.device, list[Linear]] = {}
    for linear in map(_gathered, linears):
        device = _device(linear) if linear.touched else torch.device("cpu")
        parts.setdefault(device, []).append(linear)
    if len(parts) == 1:
        ((device, part),) = parts.items()
        merge = resolve("lora_merge", device, beyond)
        merged: Merged = merge(part, spec, tile, on_linear, thresholds)
        _refuse_overflow(merged.reports)
        return merged
    if spec.trim_scope == "global" and spec.trims:
        raise ValueError(f"trim_scope='global' needs all linears on one device, got {set(parts)}")
    found = [
        report
        for device, part in parts.items()
        for report in resolve("lora_merge", device, beyond)(part, spec, tile, on_linear).reports
    ]
    _refuse_overflow(found)
    by_name = {report.name: report for report in found}
    return Merged([by_name[linear.name] for linear in linears])


def _refuse_overflow(reports: Sequence[ConflictReport]) -> None:
    """Read from sums that are on the host already: no pass, no wait."""
    broken = [
        repr(report.name)
        for report in reports
        if not bool((report.energy.sum() + report.update_energy).isfinite())
    ]
    if broken:
        raise MergeOverflowError(
            f"{len(broken)} of {len(reports)} linears did not stay finite: {', '.join(broken[:8])}"
            f"{', ...' if len(broken) > 8 else ''}. Deltas or merged weights exceed their dtype: use a "
            "wider base or delta_dtype, or a smaller scale or lam. A base that was merged into is "
            "to be thrown away"
        )


@register_triton("lora_merge", limit=f"up to {MAX_EXPERTS} experts")
def _merge_triton(
    linears: Sequence[Linear],
    spec: MergeSpec,
    tile: int | None,
    on_linear: OnLinear | None,
    thresholds: Tensor | None = None,
) -> Merged:
    """Imported when it is called: Triton may be absent."""
    from ._lora_triton import merge_triton

    return merge_triton(linears, spec, tile, on_linear, thresholds)


def _gathered(linear: Linear) -> Linear:
    """The linear with its factors on one device, the base's if there is one."""
    if not linear.touched:
        return linear
    to = _device(linear) if linear.base is None else linear.base.device
    experts = [
        f
        if f is None or (f.A.device == to and f.B.device == to)
        else LoraFactors(f.A.to(to), f.B.to(to), f.scale)
        for f in linear.experts
    ]
    return Linear(linear.name, linear.base, experts)


def _device(linear: Linear) -> torch.device:
    return next(f.A.device for f in linear.experts if f is not None)
