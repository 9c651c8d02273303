"""lora_conflicts (signs after trimming, element by element) and lora_interference (Gram matrices)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench import lora
from bench.lora import LoraInputs
from bench.ours import plain_torch
from bench.registry import FLOOR, OURS, Bound, Call, Op, Outputs, Provider, Sizes
from mmedx_fast.kernels._lora_gram import interference
from mmedx_fast.ops import LoraFactors, lora_conflicts

SINGLE = {
    "tiny": lora.TINY[:1],
    "qwen2_5_vl_7b": lora.SINGLE_7B,
    "qwen2_vl_2b": lora.SINGLE_2B,
}


def _experts(x: LoraInputs) -> list[LoraFactors]:
    return x.experts["linear"]


def _conflicts(x: LoraInputs) -> Call:
    def call() -> Outputs:
        report = lora_conflicts(_experts(x), lora.SPEC)
        return {"conflicts": report.conflicts, "overlap": report.overlap, "kept": report.kept}

    return call


def _count(stack: Tensor) -> Outputs:
    """Of trimmed deltas [E, out, in]: elements that two or more change, those they pull apart, kept."""
    several = (stack != 0).sum(0) >= 2
    apart = (stack.amax(0) > 0) & (stack.amin(0) < 0)
    kept = (stack != 0).sum((1, 2))
    return {"conflicts": apart.sum(), "overlap": several.sum(), "kept": kept}


def _reference_conflicts(x: LoraInputs) -> Outputs:
    return {name: count.double().cpu() for name, count in _count(lora.trimmed(_experts(x))).items()}


def _materialised_conflicts(x: LoraInputs) -> Call:
    from peft.utils.merge_utils import prune

    def call() -> Outputs:
        deltas = [(f.B.float() @ f.A.float()) * f.scale for f in _experts(x)]
        return _count(torch.stack([prune(d, lora.SPEC.density, "magnitude") for d in deltas]))

    return call


def _delta_gemms(x: LoraInputs) -> Call:
    experts = _experts(x)
    target = experts[0].B.new_empty(experts[0].shape)

    def call() -> Outputs:
        for f in experts:
            torch.mm(f.B, f.A, out=target)
        return {}

    return call


def _interference(x: LoraInputs) -> Call:
    def call() -> Outputs:
        dot, output, inputs = interference(_experts(x))
        return {"dot": dot, "output_overlap": output, "input_overlap": inputs}

    return call


def _reference_interference(x: LoraInputs) -> Outputs:
    """Inner products of whole deltas; overlaps as trace of the product of the projections."""
    experts = _experts(x)
    flat = torch.stack([d.flatten() for d in lora.deltas(experts, torch.float64)])
    b, a = ([getattr(f, name).double() for f in experts] for name in "BA")
    return {
        "dot": (flat @ flat.t()).cpu(),
        "output_overlap": _overlap(b).cpu(),
        "input_overlap": _overlap([f.t() for f in a]).cpu(),
    }


def _overlap(bases: list[Tensor]) -> Tensor:
    """[E, E] trace(P_i P_j) / r, with P the orthogonal projection onto the columns of a basis."""
    rows = []
    for u in bases:
        left = torch.linalg.solve(u.t() @ u, u.t())
        row = [
            torch.trace((left @ v) @ torch.linalg.solve(v.t() @ v, v.t() @ u)) / u.shape[1]
            for v in bases
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _materialised_dot(x: LoraInputs) -> Call:
    def call() -> Outputs:
        flat = torch.stack([((f.B.float() @ f.A.float()) * f.scale).flatten() for f in _experts(x)])
        return {"dot": flat @ flat.t()}

    return call


def _copy_factors(x: LoraInputs) -> Call:
    factors = [factor for f in _experts(x) for factor in (f.A, f.B)]
    targets = [torch.empty_like(factor) for factor in factors]

    def call() -> Outputs:
        torch._foreach_copy_(targets, factors)
        return {}

    return call


def _factor_bytes(s: Sizes, itemsize: int) -> float:
    """Factors read; the results are a few numbers."""
    return itemsize * lora.factor_elements(s)


def _gram_flops(s: Sizes) -> float:
    """The r x r blocks of the Gram matrices on either side, one for each pair and each expert itself."""
    return s["E"] * (s["E"] + 1.0) * s["r"] ** 2 * (s["out"] + s["in"])


def _delta_bytes(s: Sizes, itemsize: int, copies: float) -> float:
    return 4.0 * s["E"] * lora.elements(s) * copies


OPS = (
    Op(
        name="lora_conflicts",
        title="sign conflicts of LoRA experts after trimming",
        inputs=lora.inputs,
        reference=_reference_conflicts,
        bounds={name: Bound("relative", 1e-4) for name in ("conflicts", "overlap", "kept")},
        flops=lora.delta_flops,
        bytes=_factor_bytes,
        shapes=SINGLE,
        providers=(
            Provider("ours", _conflicts, OURS),
            plain_torch(_conflicts, "lora_merge", lora.small),
            Provider(
                "torch.mm", _delta_gemms, FLOOR,
                note="every delta once, written to memory: a fused op need not write it",
            ),
            Provider(
                "materialised", _materialised_conflicts, needs=("peft",),
                memory=partial(_delta_bytes, copies=3.0), note="peft's prune on whole deltas",
                limits=dict.fromkeys(("conflicts", "overlap", "kept"), 1e-3),
            ),
        ),
        dispatch="lora_merge",
        axis="weights",
    ),
    Op(
        name="lora_interference",
        title="inner products and subspace overlaps of LoRA experts",
        inputs=lora.inputs,
        reference=_reference_interference,
        bounds={
            "dot": Bound("relative", 1e-5),
            "output_overlap": Bound("absolute", 1e-4),
            "input_overlap": Bound("absolute", 1e-4),
        },
        flops=_gram_flops,
        bytes=_factor_bytes,
        shapes=SINGLE,
        providers=(
            Provider("ours", _interference, OURS),
            Provider("copy", _copy_factors, FLOOR, note="every factor read and written once", computes=False),
            Provider(
                "materialised", _materialised_dot, limits={"dot": 1e-3},
                memory=partial(_delta_bytes, copies=2.0), note="whole deltas; inner products only",
            ),
        ),
        dispatch="lora_merge",
        axis="weights",
    ),
)  # fmt: skip
