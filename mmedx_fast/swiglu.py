"""``silu(gate) * up`` that keeps its two inputs for backward and computes the rest again: half of what
autograd keeps of an MLP's elementwise part. Liger has this as a Triton kernel; this one is plain torch."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# transformers' MLPs of Qwen2-VL and Qwen2.5-VL whose forward is down(act(gate(x)) * up(x)).
_MLPS = ("Qwen2MLP", "Qwen2_5_VLMLP")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, nn.functional.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors of one shape and dtype, to the bit what eager torch makes of
    it, gradients included; saves `gate` and `up` alone."""
    return _SwiGLU.apply(gate, up)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-any-return]


def set_recompute(model: nn.Module, on: bool) -> int:
    """Give the model's SwiGLU MLPs this forward, or their own back; returns how many there are.

    Projections that PEFT or DeepSpeed wrapped are called as they are.
    """
    found = [m for m in model.modules() if type(m).__name__ in _MLPS and _is_silu(m)]
    for mlp in found:
        mlp.__dict__.pop("forward", None)
        if on:
            mlp.__dict__["forward"] = MethodType(_forward, mlp)
    return len(found)


def _is_silu(mlp: Any) -> bool:
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
