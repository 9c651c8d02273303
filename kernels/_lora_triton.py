"""The merge of all linears of a model in Triton: one launch per phase over tables of pointers.

Phases: per wave of linears (as many as their histograms' share of the workspace allows) two sampled and
two exact counting passes find the trimming thresholds on the device; one launch then merges everything.
The host waits once, to ask whether every threshold is found (heavy ties or an unlucky sample take more
passes, each asked for), and once for the report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._dispatch import register_triton
from ._lora_gram import interference
from ._lora_kernels import _lora_apply_kernel, _lora_count_kernel, _lora_sample_kernel
from ._lora_plan import Plan, make_plans
from ._lora_search import Search
from ._lora_torch import Merged, OnLinear, start_report
from ._lora_types import ConflictReport, Linear, MergeSpec
from ._triton import INTERPRETING, CompileCase, launch_options

ROWS, COLUMNS, WARPS = 64, 128, 8
BINS = 1 << 10
# Blocks of SIDE x SIDE elements of every delta (or SAMPLE_GLOBAL times as many of an expert's whole
# model) place the first interval; each program takes one in PER_UNIT. Small deltas have no sample.
SIDE, SAMPLE_BLOCKS, SAMPLE_GLOBAL, PER_UNIT, SAMPLED_FROM = 16, 1 << 10, 4, 128, 1 << 20
# Exact passes that suffice: of 2^19 patterns at most after a sample, of 2^31 without.
PASSES_SAMPLED, PASSES_WHOLE = 2, 4
# Bytes of a search target: its histogram (i32), and what Search makes of it.
_TARGET_BYTES = BINS * (4 + 32)
_TYPES = {
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


def tile_options(plan: Plan, spec: MergeSpec) -> dict[str, Any]:
    """Compile-time arguments that every kernel's tiles share."""
    return {
        "EXPERTS": plan.experts,
        "R": plan.rank,
        "STEP": min(plan.rank, 64),
        "FACTOR": _TYPES[plan.factor_dtype],
        "DELTA": _TYPES[spec.delta_dtype],
        "UPCAST": INTERPRETING,
    }


@register_triton("lora_merge")
@torch.no_grad()
def merge_triton(
    linears: Sequence[Linear], spec: MergeSpec, tile: int | None, on_linear: OnLinear | None
) -> Merged:
    """``tile`` is of the plain torch implementation; the kernels' tiles are fixed."""
    touched = [linear for linear in linears if linear.touched]
    found: dict[int, ConflictReport] = {}
    common = None
    if touched:
        with _on(touched[0]):
            plans = make_plans(touched, spec, (ROWS, COLUMNS))
            cuts, common = _thresholds(plans, spec)
            for plan, cut in zip(plans, cuts, strict=True):
                reports = _apply(plan, spec, cut)
                found |= {id(x): r for x, r in zip(plan.linears, reports, strict=True)}
    reports = []
    for linear in linears:
        empty = ConflictReport.empty(linear.name, len(linear.experts))
        reports.append(found.get(id(linear), empty))
        if on_linear is not None:
            on_linear(linear.name, reports[-1])
    _check_kept(reports, common, spec)
    return Merged(reports, common)


def _on(linear: Linear) -> contextlib.AbstractContextManager[Any]:
    device = next(f.A.device for f in linear.experts if f is not None)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Thresholds


@dataclass(frozen=True)
class _Cut:
    """[L, E] f64 thresholds and ties of a plan's linears, on the device."""

    threshold: Tensor
    tied: Tensor


def _thresholds(
    plans: Sequence[Plan], spec: MergeSpec
) -> tuple[list[_Cut], tuple[Tensor, Tensor] | None]:
    """Every plan's thresholds, NaN where nothing is trimmed, and the common ones of a global scope."""
    if not spec.trims:
        return [_cut(plan, None, None) for plan in plans], None
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


def _cut(plan: Plan, threshold: Tensor | None, tied: Tensor | None) -> _Cut:
    shape = plan.scales.shape
    absent = plan.factors[:, :, 1] == 0
    if threshold is None or tied is None:
        nothing = torch.zeros(shape, dtype=torch.float64, device=plan.scales.device)
        return _Cut(nothing + torch.nan, nothing)
    return _Cut(
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
) -> tuple[list[_Cut], tuple[Tensor, Tensor]]:
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
    cuts = [_cut(plan, search.threshold, torch.zeros_like(search.tied)) for plan in plans]
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


# Merging


def apply_options(spec: MergeSpec, experts: int, base: torch.dtype | None) -> dict[str, Any]:
    """Compile-time arguments of the apply kernel that the spec and the base decide."""
    write = base is not None
    weighted = write and any(w != 1 for w in spec.expert_weights(experts))
    elect = spec.election if write and spec.elects else ""
    return {
        "STATS": 1 << (experts * (experts + 2) + 9 - 1).bit_length(),
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "CUT": "trim" if spec.trims else "drop" if spec.drops else "",
        "ELECT": "total" if elect == "weighted" and not weighted else elect,
        "BY_WEIGHT": weighted and spec.divisor == "weight",
        "WEIGHTED": weighted,
        "BASE": _TYPES[base or torch.float32],
        "WRITE": write,
        "STOCHASTIC": spec.rounding == "stochastic" and base in (torch.bfloat16, torch.float16),
    }


def _apply(plan: Plan, spec: MergeSpec, cut: _Cut) -> list[ConflictReport]:
    made = apply_options(spec, plan.experts, plan.base_dtype)
    stats = torch.empty(
        (len(plan.jobs), made["STATS"]), dtype=torch.float64, device=plan.scales.device
    )
    _lora_apply_kernel[(len(plan.jobs),)](
        plan.shapes, plan.factors, plan.scales, plan.keys, plan.weights, plan.jobs,
        cut.threshold.float(), stats, float(spec.density), float(spec.lam),
        ALIGNED=plan.aligned, **tile_options(plan, spec), **made, **options(),
    )  # fmt: skip
    pairs = torch.stack([interference(linear.experts) for linear in plan.linears]).cpu()
    sums = torch.zeros((len(plan.linears), made["STATS"]), dtype=torch.float64)
    sums.index_add_(0, torch.tensor(plan.job_linear), stats.cpu())
    thresholds, tied = cut.threshold.cpu(), cut.tied.cpu()
    reports = []
    for i, linear in enumerate(plan.linears):
        report = ConflictReport.empty(linear.name, plan.experts)
        start_report(linear, thresholds[i], tied[i], pairs[i], report)
        read_stats(sums[i], report, made)
        reports.append(report)
    return reports


def read_stats(sums: Tensor, report: ConflictReport, made: dict[str, Any]) -> None:
    """Fill in the report from the apply kernel's sums of a linear."""
    experts = report.experts
    pairs = experts * (experts - 1) // 2
    sizes = [experts] * 3 + [pairs] * 2 + [9]
    energy, kept_energy, kept, both, apart, rest = sums[: sum(sizes)].split(sizes)
    report.energy = energy
    report.kept_energy = kept_energy if made["CUT"] else energy.clone()
    report.kept = kept
    i, j = torch.tril_indices(experts, experts, -1)
    for matrix, values in ((report.pair_overlap, both), (report.pair_conflicts, apart)):
        matrix[i, j] = matrix[j, i] = values
    report.pair_overlap += kept.diag()
    (
        report.overlap,
        report.conflicts,
        report.overlap_magnitude,
        report.conflict_magnitude,
        report.sum_energy,
        report.aligned_energy,
        report.update_energy,
        report.updates,
        report.lost_updates,
    ) = rest.unbind()


def _check_kept(
    reports: Sequence[ConflictReport], common: tuple[Tensor, Tensor] | None, spec: MergeSpec
) -> None:
    """Count and apply saw the same elements: k and those tied with the k-th are kept."""
    if not spec.trims:
        return
    groups = [reports] if common is not None else [[report] for report in reports]
    for group in groups:
        size = sum(report.size for report in group)
        kept = sum(report.kept for report in group)
        threshold, tied = common or (group[0].threshold, group[0].tied)
        want = torch.tensor([int(spec.density * n) for n in torch.as_tensor(size).tolist()]) + tied
        wrong = (kept != want) & (threshold > 0)
        if bool(torch.as_tensor(wrong).any()):
            raise RuntimeError(
                f"linear {group[0].name!r}: {kept} elements were kept, {want} are due: "
                "the kernels' tiles differ between passes"
            )


# What bench/compile_kernels.py compiles: five experts, as in the pipeline.

_TABLES = {
    **dict.fromkeys(("shapes", "factors", "keys", "units", "targets", "low", "shift"), "*i64"),
    **dict.fromkeys(("jobs", "above"), "*i64"),
    **dict.fromkeys(("scales", "weights", "threshold"), "*fp32"),
    **dict.fromkeys(("density", "lam"), "fp32"),
    "stats_at": "*fp64",
    "found": "*i32",
    "counts": "*i32",
    "per_unit": "i32",
}


def _case(name: str, kernel: Any, rank: int, factor: torch.dtype, **constants: Any) -> CompileCase:
    common = {
        "EXPERTS": 5,
        "R": rank,
        "STEP": min(rank, 64),
        "FACTOR": _TYPES[factor],
        "DELTA": tl.float32,
        "ALIGNED": True,
        "UPCAST": False,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "BINS": BINS,
        "SIDE": SIDE,
    } | constants
    names = list(kernel.arg_names)
    signature = {n: _TABLES[n] for n in names if n in _TABLES}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={n: common[n] for n in names if n in common},
        num_warps=WARPS,
        num_stages=2,
        aligned=tuple(n for n, kind in signature.items() if kind[0] == "*" and n != "jobs"),
        matrix=factor != torch.float32,
        options={"enable_fp_fusion": False},
    )


def _apply_case(
    name: str,
    spec: MergeSpec,
    rank: int = 64,
    factor: torch.dtype = torch.bfloat16,
    base: torch.dtype | None = torch.bfloat16,
    **constants: Any,
) -> CompileCase:
    made = apply_options(spec, 5, base)
    return _case(f"lora_apply {name}", _lora_apply_kernel, rank, factor, **(made | constants))


_UNEQUAL = (1.0, 1.0, 1.0, 1.0, 2.0)
_BF16, _FP32 = torch.bfloat16, torch.float32
COMPILE_CASES = [
    _case("lora_sample r64", _lora_sample_kernel, 64, _BF16),
    _case("lora_sample r64 fp32", _lora_sample_kernel, 64, _FP32),
    _case("lora_count r16", _lora_count_kernel, 16, _BF16),
    _case("lora_count r64", _lora_count_kernel, 64, _BF16),
    _case("lora_count r128", _lora_count_kernel, 128, _BF16),
    _case("lora_count r64 fp16, unaligned", _lora_count_kernel, 64, torch.float16, ALIGNED=False),
    _case("lora_count r64 fp32", _lora_count_kernel, 64, _FP32),
    _apply_case("ties r16", MergeSpec(), 16),
    _apply_case("ties r64", MergeSpec()),
    _apply_case("ties r128", MergeSpec(), 128),
    _apply_case("ties r256", MergeSpec(), 256),
    _apply_case("ties r64 unaligned", MergeSpec(), ALIGNED=False),
    _apply_case("ties r64 fp32 factors", MergeSpec(), factor=_FP32),
    _apply_case("ties r64 fp32 base", MergeSpec(), base=_FP32),
    _apply_case("ties r64 bf16 deltas", MergeSpec(delta_dtype=_BF16), DELTA=tl.bfloat16),
    _apply_case("ties r64 weights", MergeSpec(weights=_UNEQUAL)),
    _apply_case(
        "ties r64 weighted election",
        MergeSpec(weights=_UNEQUAL, election="weighted", divisor="weight"),
    ),
    _apply_case("ties r64 frequency", MergeSpec(weights=_UNEQUAL, election="frequency")),
    _apply_case("ties r64 stochastic", MergeSpec(rounding="stochastic")),
    _apply_case("dare_ties r64", MergeSpec(method="dare_ties")),
    _apply_case("dare_linear r64", MergeSpec(method="dare_linear", weights=_UNEQUAL)),
    _apply_case("linear r64", MergeSpec(method="linear")),
    _apply_case("conflicts r64", MergeSpec(), base=None),
]
