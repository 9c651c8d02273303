"""lora_merge: TIES over E experts, from factors into the base weight; one linear and a whole model."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from bench import lora
from bench.lora import LoraInputs
from bench.ours import plain_torch
from bench.registry import FLOOR, OURS, Bound, Call, Op, Outputs, Provider, Sizes
from mmedx_fast.ops import LoraFactors, merge_model_

LINEARS = ("linear", *(f"0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")))
# Elements at the threshold may fall on either side, and a sum may round the other way: some in 10^5.
BOUNDS = {name: Bound("relative", 1e-2, against=f"update:{name}") for name in LINEARS}


def _ours(x: LoraInputs) -> Call:
    weights = lora.copies(x)

    def call() -> Outputs:
        merge_model_(weights, x.experts, lora.SPEC)
        return {name: weights[name] for name in x.checked}

    return call


def _copy(x: LoraInputs) -> Call:
    weights = lora.copies(x)

    def call() -> Outputs:
        for name, weight in weights.items():
            weight.copy_(x.weights[name])
        return {}

    return call


def _peft_deltas(x: LoraInputs, dtype: torch.dtype) -> Call:
    """The whole delta of every expert, as ``get_delta_weight`` makes it, through peft's ``ties``."""
    from peft.utils.merge_utils import ties

    def update(experts: list[LoraFactors]) -> Tensor:
        deltas = [(f.B.to(dtype) @ f.A.to(dtype)) * f.scale for f in experts]
        return ties(deltas, deltas[0].new_ones(len(deltas)), lora.SPEC.density)

    return lora.merging(x, update)


def _peft_factors(x: LoraInputs) -> Call:
    """``add_weighted_adapter(combination_type='ties')``: A and B are merged separately."""
    from peft.utils.merge_utils import ties

    def update(experts: list[LoraFactors]) -> Tensor:
        def merged(factors: list[Tensor]) -> Tensor:
            return ties(factors, factors[0].new_ones(len(factors)), lora.SPEC.density)

        root = [math.sqrt(f.scale) for f in experts]
        a = merged([f.A * s for f, s in zip(experts, root, strict=True)])
        b = merged([f.B * s for f, s in zip(experts, root, strict=True)])
        return b @ a

    return lora.merging(x, update)


def _peft_svd(x: LoraInputs) -> Call:
    """``combination_type='ties_svd'``: the deltas' merge, cut back to the experts' rank by a full SVD."""
    from peft.utils.merge_utils import ties

    def update(experts: list[LoraFactors]) -> Tensor:
        deltas = [(f.B.float() @ f.A.float()) * f.scale for f in experts]
        whole = ties(deltas, deltas[0].new_ones(len(deltas)), lora.SPEC.density)
        u, s, vh = torch.linalg.svd(whole, full_matrices=True)
        r = experts[0].rank
        return (u[:, :r] * s[:r]) @ vh[:r]

    return lora.merging(x, update)


def _too_large(sizes: Sizes) -> str | None:
    """A full SVD takes its time: one rank is enough."""
    if "L" in sizes or sizes["r"] not in (4, 64):
        return "a full SVD of a linear takes seconds to minutes; see one linear at r=64"
    return lora.small(sizes)


def _one_layer(sizes: Sizes) -> str | None:
    return "takes minutes; see one layer" if sizes.get("L", 1) > 1 else None


def _peft_bytes(s: Sizes, itemsize: int, wide: int) -> float:
    """Deltas, their stack, masks, signs, and topk's values and int64 indices of the largest linear."""
    largest = max(out * width for out, width in lora.linears(s).values())
    return largest * (4.0 * s["E"] * wide + 8 + 12)


def _bytes(s: Sizes, itemsize: int) -> float:
    """Factors and weights read, weights written."""
    return itemsize * (2 * lora.elements(s) + lora.factor_elements(s))


OPS = (
    Op(
        name="lora_merge",
        title="TIES merge of LoRA experts into the base",
        inputs=lora.inputs,
        reference=lora.reference_merge,
        bounds=BOUNDS,
        flops=lora.delta_flops,
        bytes=_bytes,
        shapes={
            "tiny": lora.TINY,
            "qwen2_5_vl_7b": lora.MODEL_7B + lora.SINGLE_7B,
            "qwen2_vl_2b": lora.MODEL_2B + lora.SINGLE_2B,
        },
        providers=(
            Provider("ours", _ours, OURS),
            plain_torch(_ours, "lora_merge", lora.small),
            Provider("copy", _copy, FLOOR, note="every weight read and written once", computes=False),
            Provider(
                "materialised TIES",
                partial(_peft_deltas, dtype=torch.float32),
                needs=("peft",),
                lacking=_one_layer,
                memory=partial(_peft_bytes, wide=4),
                note="peft's ties on whole float32 deltas",
            ),
            Provider(
                "materialised TIES, bf16",
                partial(_peft_deltas, dtype=torch.bfloat16),
                needs=("peft",),
                lacking=_one_layer,
                limits=None,
                memory=partial(_peft_bytes, wide=2),
                note="peft's ties on whole bf16 deltas, which tie at the threshold",
            ),
            Provider(
                "peft ties", _peft_factors, needs=("peft",), lacking=_one_layer, limits=None,
                note="merges A and B separately: not TIES of the deltas",
            ),
            Provider(
                "peft ties_svd", _peft_svd, needs=("peft",), lacking=_too_large, limits=None,
                note="cut back to the experts' rank", last=True,
            ),
        ),
        dispatch="lora_merge",
        axis="weights",
    ),
)  # fmt: skip
