"""The merge of all linears of a model in Triton: one launch per phase over tables of pointers.

``_lora_thresholds`` finds where to trim; one launch of the apply kernel then merges everything, and the
report is read from its sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._lora_gram import interference
from ._lora_kernels import _lora_apply_kernel, _lora_count_kernel, _lora_sample_kernel
from ._lora_plan import Plan, make_plans
from ._lora_thresholds import (
    BINS,
    COLUMNS,
    ROWS,
    SIDE,
    TYPES,
    WARPS,
    Cut,
    find_thresholds,
    options,
    step_of,
    tile_options,
)
from ._lora_torch import Merged, OnLinear, start_report
from ._lora_types import ConflictReport, Linear, MergeSpec
from ._triton import CompileCase


@torch.no_grad()
def merge_triton(
    linears: Sequence[Linear],
    spec: MergeSpec,
    tile: int | None,
    on_linear: OnLinear | None,
    thresholds: Tensor | None = None,
) -> Merged:
    """``tile`` is of the plain torch implementation; the kernels' tiles are fixed. ``thresholds`` [E] f64:
    of a global scope, where they are known already."""
    touched = [linear for linear in linears if linear.touched]
    found: dict[int, ConflictReport] = {}
    common = None
    if touched:
        with _on(touched[0]):
            plans = make_plans(touched, spec, (ROWS, COLUMNS))
            cuts, common = find_thresholds(plans, spec, thresholds)
            for plan, cut in zip(plans, cuts, strict=True):
                reports = _apply(plan, spec, cut)
                found |= {id(x): r for x, r in zip(plan.linears, reports, strict=True)}
    reports = []
    for linear in linears:
        empty = ConflictReport.empty(linear.name, len(linear.experts))
        reports.append(found.get(id(linear), empty))
        if on_linear is not None:
            on_linear(linear.name, reports[-1])
    if thresholds is None:
        _check_kept(reports, common, spec)
    return Merged(reports, common)


def _on(linear: Linear) -> contextlib.AbstractContextManager[Any]:
    device = next(f.A.device for f in linear.experts if f is not None)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
        "BASE": TYPES[base or torch.float32],
        "WRITE": write,
        "STOCHASTIC": spec.rounding == "stochastic" and base in (torch.bfloat16, torch.float16),
    }


def _registers(write: bool) -> dict[str, int]:
    """Without the write ptxas aims at two blocks a multiprocessor (sm_80), and spills for it."""
    return {} if write else {"maxnreg": 160}


def _apply(plan: Plan, spec: MergeSpec, cut: Cut) -> list[ConflictReport]:
    made = apply_options(spec, plan.experts, plan.base_dtype)
    stats = torch.empty(
        (len(plan.jobs), made["STATS"]), dtype=torch.float64, device=plan.scales.device
    )
    _lora_apply_kernel[(len(plan.jobs),)](
        plan.shapes, plan.factors, plan.scales, plan.keys, plan.weights, plan.jobs,
        cut.threshold.float(), stats, float(spec.density), float(spec.lam),
        ALIGNED=plan.aligned, **tile_options(plan, spec), **made, **options(),
        **_registers(made["WRITE"]),
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
        # NaN is above no threshold: ``_refuse_overflow`` says more
        whole = torch.as_tensor(sum(report.energy for report in group)).isfinite()
        wrong = (kept != want) & (threshold > 0) & whole
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
        "STEP": step_of(rank, factor),
        "FACTOR": TYPES[factor],
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
    case = _case(f"lora_apply {name}", _lora_apply_kernel, rank, factor, **(made | constants))
    return replace(case, options=dict(case.options) | _registers(made["WRITE"]))


_UNEQUAL = (1.0, 1.0, 1.0, 1.0, 2.0)
_BF16, _FP32 = torch.bfloat16, torch.float32
COMPILE_CASES = [
    _case("lora_sample r64", _lora_sample_kernel, 64, _BF16),
    _case("lora_sample r64 fp32", _lora_sample_kernel, 64, _FP32),
    _case("lora_count r64", _lora_count_kernel, 64, _BF16),
    _case("lora_count r128", _lora_count_kernel, 128, _BF16),
    _case("lora_count r64 fp16, unaligned", _lora_count_kernel, 64, torch.float16, ALIGNED=False),
    _case("lora_count r64 fp32", _lora_count_kernel, 64, _FP32),
    _apply_case("ties r64", MergeSpec()),
    _apply_case("ties r128", MergeSpec(), 128),
    _apply_case("ties r256", MergeSpec(), 256),
    _apply_case("ties r64 unaligned", MergeSpec(), ALIGNED=False),
    _apply_case("ties r64 fp32 factors", MergeSpec(), factor=_FP32),
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
