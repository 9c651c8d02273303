"""The merge of a list of linears in plain torch: block by block, experts in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import register_torch
from ._lora_gram import interference
from ._lora_trim import (
    blocks,
    default_tile,
    delta_block,
    random_bits,
    random_keep,
    round_stochastic,
    stream_key,
)
from ._lora_trim import thresholds as find_thresholds
from ._lora_types import ConflictReport, Linear, MergeSpec

OnLinear = Callable[[str, ConflictReport], None]


@dataclass(frozen=True)
class Merged:
    """Reports in the linears' order, and with a global scope the model's thresholds and ties, [E] f64."""

    reports: list[ConflictReport]
    common: tuple[Tensor, Tensor] | None = None


@register_torch("lora_merge")
@torch.no_grad()
def merge_torch(
    linears: Sequence[Linear],
    spec: MergeSpec,
    tile: int | None,
    on_linear: OnLinear | None,
    thresholds: Tensor | None = None,
) -> Merged:
    """``thresholds`` [E] f64: of a global scope, where they are known already."""
    touched = [linear for linear in linears if linear.touched]
    if tile is None and touched:
        largest = max(linear.shape[0] * linear.shape[1] for linear in touched)
        tile = default_tile(largest, len(touched[0].experts))
    common = None
    if spec.trim_scope == "global" and spec.trims:
        if thresholds is None:
            common = find_thresholds([linear.experts for linear in linears], spec, tile)
        else:
            common = thresholds, torch.zeros_like(thresholds)
    reports = []
    for linear in linears:
        report = ConflictReport.empty(linear.name, len(linear.experts))
        if linear.touched:
            _merge_one(linear, spec, tile, common, report)
        reports.append(report)
        if on_linear is not None:
            on_linear(linear.name, report)
    return Merged(reports, common)


def start_report(
    linear: Linear, threshold: Tensor, tied: Tensor, pairs: Tensor, report: ConflictReport
) -> None:
    """Fill in what does not come from looking at elements. ``pairs`` [3, E, E] is of ``interference``."""
    elements = linear.shape[0] * linear.shape[1]
    present = torch.tensor([f is not None for f in linear.experts], dtype=torch.float64)
    report.linears, report.elements = 1, elements
    report.threshold, report.tied = threshold.clone(), tied.clone()
    report.size = present * elements
    report.dot, report.output_overlap, report.input_overlap = pairs.unbind()
    report.pair_linears = present[:, None] * present


def _merge_one(
    linear: Linear,
    spec: MergeSpec,
    tile: int | None,
    common: tuple[Tensor, Tensor] | None,
    report: ConflictReport,
) -> None:
    if common is None:
        threshold, tied = find_thresholds([linear.experts], spec, tile)
    else:  # equal elements beyond the k-th are a matter of the whole model: no linear owns them
        threshold, tied = common[0], torch.zeros_like(common[1])
    start_report(linear, threshold, tied, interference(linear.experts).cpu(), report)
    cut = threshold.tolist()
    for rows, columns, right in blocks(linear.experts, tile):
        stack = _trimmed(linear, rows, columns, right, spec, cut, report)
        _count_conflicts(stack, report)
        if linear.base is not None:
            _write(linear, rows, columns, _merged(stack, spec), spec, report)


def _trimmed(
    linear: Linear,
    rows: slice,
    columns: slice,
    right: Sequence[Tensor | None],
    spec: MergeSpec,
    cut: Sequence[float],
    report: ConflictReport,
) -> Tensor:
    """[E, n, m] f32 deltas of the block after trimming or dropping, zeros for None."""
    size = (len(right), rows.stop - rows.start, columns.stop - columns.start)
    device = next(a.device for a in right if a is not None)
    stack = torch.zeros(size, dtype=torch.float32, device=device)
    for e, (factors, a) in enumerate(zip(linear.experts, right, strict=True)):
        if factors is None or a is None:
            continue
        delta = delta_block(factors, rows, a, spec.delta_dtype)
        report.energy[e] += _energy(delta)
        if spec.trims:
            torch.mul(delta, delta.abs() >= cut[e], out=stack[e])
        elif spec.drops:
            keep = random_keep(
                rows,
                linear.shape[1],
                spec.density,
                spec.seed,
                linear.name,
                e,
                delta.device,
                columns,
            )
            torch.div(delta.mul_(keep), spec.density, out=stack[e])
        else:
            stack[e] = delta
        report.kept_energy[e] += _energy(stack[e])
    return stack


def _energy(x: Tensor) -> Tensor:
    wide = x.flatten().double()
    return torch.dot(wide, wide).cpu()


def _merged(stack: Tensor, spec: MergeSpec) -> Tensor:
    """[n, m] merge of trimmed deltas [E, n, m]; sums run over the experts in order."""
    weights = spec.expert_weights(len(stack))
    weighted = [delta if w == 1 else delta * w for delta, w in zip(stack, weights, strict=True)]
    if not spec.elects:
        return _sum(weighted).mul_(spec.lam)
    voters = weighted if spec.election == "weighted" else list(stack)
    vote = _sum([v.sign() for v in voters] if spec.election == "frequency" else voters)
    elected = torch.where(vote >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(vote), torch.zeros_like(vote)
    for voter, delta, weight in zip(voters, weighted, weights, strict=True):
        agrees = voter * elected > 0
        total += delta * agrees
        divisor.add_(agrees, alpha=1 if spec.divisor == "count" else weight)
    if spec.divisor == "count":
        divisor.clamp_(min=1)
    else:
        divisor.masked_fill_(divisor.abs() < 1e-8, 1.0)
    return total.div_(divisor).mul_(spec.lam)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _write(
    linear: Linear,
    rows: slice,
    columns: slice,
    update: Tensor,
    spec: MergeSpec,
    report: ConflictReport,
) -> None:
    """Add to the block of the base, rounding once."""
    assert linear.base is not None
    base = linear.base[rows, columns]
    wide = torch.promote_types(base.dtype, torch.float32)
    new = base.to(wide) + update.to(wide)
    if spec.rounding == "stochastic" and base.dtype in (torch.bfloat16, torch.float16):
        keys = stream_key(spec.seed, linear.name, "rounding")
        draw = random_bits(rows, columns, linear.shape[1], keys, base.device)
        new = round_stochastic(new, base.dtype, draw)
    else:
        new = new.to(base.dtype)
    moved = update != 0
    broken = base.isfinite() & ~new.isfinite()
    report.update_energy += torch.where(broken.any(), torch.inf, _energy(update)).cpu()
    report.updates += moved.sum().cpu()
    report.lost_updates += moved.logical_and_(new == base).sum().cpu()
    base.copy_(new)


def _count_conflicts(stack: Tensor, report: ConflictReport) -> None:
    flat = stack.flatten(1)
    apart = (flat.amax(0) > 0).logical_and_(flat.amin(0) < 0)
    summed = flat.sum(0).double()
    sign = flat.sign()
    aligned = sign @ sign.t()  # counts below 2^24: exact in float32
    changed = sign.abs_()
    both = changed @ changed.t()
    several = changed.sum(0) >= 2
    torch.abs(flat, out=sign)
    magnitude = sign.sum(0).double()
    report.kept += both.diagonal().double().cpu()
    report.pair_overlap += both.double().cpu()
    report.pair_conflicts += (0.5 * (both - aligned)).double().cpu()
    report.overlap += several.sum().cpu()
    report.conflicts += apart.sum().cpu()
    report.overlap_magnitude += torch.dot(magnitude, several.double()).cpu()
    report.conflict_magnitude += torch.dot(magnitude, apart.double()).cpu()
    report.sum_energy += torch.dot(summed, summed).cpu()
    report.aligned_energy += torch.dot(magnitude, magnitude).cpu()
