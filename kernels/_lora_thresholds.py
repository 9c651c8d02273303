"""Trimming thresholds of all linears of a model in Triton, exact (``_lora_search``).

Per wave of linears, as many as their histograms' share of the workspace allows, two sampled and two exact
counting passes find the thresholds on the device. The host then asks once whether all are found; heavy
ties or an unlucky sample take more passes, each asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._lora_kernels import _lora_count_kernel, _lora_sample_kernel
from ._lora_plan import Plan
from ._lora_search import Search
from ._lora_types import MergeSpec
from ._triton import INTERPRETING, launch_options

ROWS, COLUMNS, WARPS = 64, 64, 8
BINS = 1 << 10
# Blocks of SIDE x SIDE elements of every delta (or SAMPLE_GLOBAL times as many of an expert's whole
# model) place the first interval; each program takes one in PER_UNIT. Small deltas have no sample.
SIDE, SAMPLE_BLOCKS, SAMPLE_GLOBAL, PER_UNIT, SAMPLED_FROM = 16, 1 << 10, 4, 128, 1 << 20
# Exact passes that suffice: of 2^19 patterns at most after a sample, of 2^31 without.
PASSES_SAMPLED, PASSES_WHOLE = 2, 4
# Bytes of a search target: its histogram (i32), and what Search makes of it.
_TARGET_BYTES = BINS * (4 + 32)
TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def options() -> dict[str, Any]:
    """No contraction: a weighted sum rounds its products, as torch and peft do."""
    return launch_options(WARPS, 2) | {"enable_fp_fusion": False}


@dataclass(frozen=True)
class _Wave:
    """Linears first..last - 1 of a plan whose thresholds are searched together."""

    plan: Plan
    first: int
    last: int
    targets: Tensor  # [L, E] i64 over the whole plan: the search's target, -1 for no expert
    units: Tensor  # [(last - first) * E, 2] i64: linear * E + expert, blocks to sample


def step_of(rank: int, factor: torch.dtype) -> int:
    """Ranks per dot: without matrix instructions (fp32) operands are held in registers."""
    return min(rank, 32 if factor == torch.float32 else 64)


def tile_options(plan: Plan, spec: MergeSpec) -> dict[str, Any]:
    """Compile-time arguments that every kernel's tiles share."""
    return {
        "EXPERTS": plan.experts,
        "R": plan.rank,
        "STEP": step_of(plan.rank, plan.factor_dtype),
        "FACTOR": TYPES[plan.factor_dtype],
        "DELTA": TYPES[spec.delta_dtype],
        "UPCAST": INTERPRETING,
    }


@dataclass(frozen=True)
class Cut:
    """[L, E] f64 thresholds and ties of a plan's linears, on the device."""

    threshold: Tensor
    tied: Tensor


def find_thresholds(
    plans: Sequence[Plan], spec: MergeSpec, known: Tensor | None = None
) -> tuple[list[Cut], tuple[Tensor, Tensor] | None]:
    """Every plan's thresholds, NaN where nothing is trimmed, and the common ones of a global scope; those
    may be ``known`` [E]."""
    if not spec.trims:
        return [_cut(plan, None, None) for plan in plans], None
    if known is not None:
        to = plans[0].scales.device
        none_tied = torch.zeros_like(known)
        cuts = [_cut(plan, known.to(to), none_tied.to(to), known.isnan().to(to)) for plan in plans]
        return cuts, (known, none_tied)
    if spec.trim_scope == "global":
        return _global_thresholds(plans, spec)
    budget = max(x.shape[0] * x.shape[1] for plan in plans for x in plan.linears) * 6 // 100
    searches: list[tuple[Search, list[_Wave]]] = []
    for plan in plans:
        step = max(1, budget // (_TARGET_BYTES * plan.experts))
        searches += _search_linears(plan, spec, step)
    _finish(searches, spec)
    cuts = []
    for plan in plans:
        own = [search for search, waves in searches if waves[0].plan is plan]
        cuts.append(
            _cut(plan, torch.cat([s.threshold for s in own]), torch.cat([s.tied for s in own]))
        )
    return cuts, None


def _cut(
    plan: Plan, threshold: Tensor | None, tied: Tensor | None, absent: Tensor | None = None
) -> Cut:
    """``absent`` says where there is no threshold; by default where a linear has no such expert."""
    shape = plan.scales.shape
    absent = plan.factors[:, :, 4] == 0 if absent is None else absent
    if threshold is None or tied is None:
        nothing = torch.zeros(shape, dtype=torch.float64, device=plan.scales.device)
        return Cut(nothing + torch.nan, nothing)
    return Cut(
        threshold.view(-1, shape[1]).expand(shape).masked_fill(absent, torch.nan),
        tied.double().view(-1, shape[1]).expand(shape),
    )


def _sizes(plan: Plan) -> Tensor:
    """[L, E] i64 elements of every delta on the host, 0 for no expert."""
    return torch.tensor(
        [[0 if f is None else x.shape[0] * x.shape[1] for f in x.experts] for x in plan.linears]
    )


def _ranks(sizes: Tensor, spec: MergeSpec) -> Tensor:
    """int(density * size), in Python's arithmetic."""
    return torch.tensor([int(spec.density * size) for size in sizes.flatten().tolist()])


def _search_linears(plan: Plan, spec: MergeSpec, step: int) -> list[tuple[Search, list[_Wave]]]:
    """One threshold per linear and expert, ``step`` linears at a time."""
    sizes, device, experts = _sizes(plan), plan.scales.device, plan.experts
    number = torch.arange(sizes.numel()).view(sizes.shape)
    local = torch.where(sizes > 0, number % (step * experts), -1).to(device)
    blocks = torch.where(sizes > 0, SAMPLE_BLOCKS, 0)
    units = torch.stack([number, blocks], -1).view(-1, 2).to(device)
    elements, ranks = sizes.flatten().to(device), _ranks(sizes, spec).to(device)
    found = []
    for first in range(0, len(plan.linears), step):
        last = min(first + step, len(plan.linears))
        of = slice(first * experts, last * experts)
        wave = _Wave(plan, first, last, local, units[of])
        sampled = SAMPLE_BLOCKS * SIDE**2 if int(sizes[first:last].max()) >= SAMPLED_FROM else 0
        search = _search([wave], ranks[of], elements[of], sampled, torch.int32, spec)
        found.append((search, [wave]))
    return found


def _global_thresholds(
    plans: Sequence[Plan], spec: MergeSpec
) -> tuple[list[Cut], tuple[Tensor, Tensor]]:
    """One threshold per expert over all linears of all plans."""
    device, experts = plans[0].scales.device, plans[0].experts
    sizes = torch.cat([_sizes(plan) for plan in plans])
    total = sizes.sum(0)
    # rounded sums, not sums of rounded shares: the sample stays in proportion to the sizes
    upto = (sizes.cumsum(0) * (SAMPLE_BLOCKS * SAMPLE_GLOBAL) / total.clamp(min=1)).round().long()
    blocks = upto.diff(dim=0, prepend=torch.zeros_like(upto[:1]))
    waves, start = [], 0
    for plan in plans:
        own = slice(start, start + len(plan.linears))
        start = own.stop
        targets = torch.where(sizes[own] > 0, torch.arange(experts), -1)
        number = torch.arange(targets.numel()).view(targets.shape)
        units = torch.stack([number, blocks[own]], -1).view(-1, 2)
        waves.append(_Wave(plan, 0, len(plan.linears), targets.to(device), units.to(device)))
    sampled = blocks.sum(0).to(device) * SIDE**2 if int(total.max()) >= SAMPLED_FROM else 0
    ranks = _ranks(total, spec).to(device)
    search = _search(waves, ranks, total.to(device), sampled, torch.int64, spec)
    _finish([(search, waves)], spec)
    absent = (total == 0).to(device)
    # ties are a matter of the whole model: no linear owns them
    none_tied = torch.zeros_like(search.tied)
    cuts = [_cut(plan, search.threshold, none_tied, absent) for plan in plans]
    threshold = search.threshold.cpu().masked_fill(total == 0, torch.nan)
    return cuts, (threshold, search.tied.double().cpu())


def _search(
    waves: Sequence[_Wave],
    ranks: Tensor,
    elements: Tensor,
    sampled: Tensor | int,
    dtype: torch.dtype,
    spec: MergeSpec,
) -> Search:
    """All passes that a search takes if its sample is lucky, without a host sync."""
    search = Search(ranks, BINS, dtype)
    whole = isinstance(sampled, int) and sampled == 0
    for _ in range(0 if whole else 2):
        search.aim(*_sample_pass(waves, search, spec), sampled, elements)
    for _ in range(PASSES_WHOLE if whole else PASSES_SAMPLED):
        search.narrow(*_count_pass(waves, search, spec))
    return search


def _finish(searches: Sequence[tuple[Search, list[_Wave]]], spec: MergeSpec) -> None:
    """More passes for searches that have not ended. The one place where merging waits for the device."""
    done = torch.stack([search.found.all() for search, _ in searches]).tolist()
    for (search, waves), ended in zip(searches, done, strict=True):
        while not ended:
            search.narrow(*_count_pass(waves, search, spec))
            ended = bool(search.found.all())


def _sample_pass(waves: Sequence[_Wave], search: Search, spec: MergeSpec) -> tuple[Tensor, Tensor]:
    counts, above = search.empty_counts()
    for wave in waves:
        plan = wave.plan
        _lora_sample_kernel[(len(wave.units) * PER_UNIT,)](
            plan.shapes, plan.factors, plan.scales, wave.units, wave.targets,
            search.low, search.shift, counts, above, PER_UNIT,
            SIDE=SIDE, BINS=BINS, **tile_options(plan, spec), **options(),
        )  # fmt: skip
    return counts, above


def _count_pass(waves: Sequence[_Wave], search: Search, spec: MergeSpec) -> tuple[Tensor, Tensor]:
    counts, above = search.empty_counts()
    found = search.found.to(torch.int32)
    for wave in waves:
        plan = wave.plan
        jobs = plan.jobs_of(wave.first, wave.last)
        _lora_count_kernel[(len(jobs),)](
            plan.shapes, plan.factors, plan.scales, jobs, wave.targets,
            search.low, search.shift, found, counts, above,
            ROWS=ROWS, COLUMNS=COLUMNS, BINS=BINS, ALIGNED=plan.aligned,
            **tile_options(plan, spec), **options(),
        )  # fmt: skip
    return counts, above
