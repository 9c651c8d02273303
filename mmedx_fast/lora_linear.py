"""A linear layer and its LoRA as one autograd function.

PEFT's own forward scales the adapter's product and adds it in two passes over the layer's width, autograd
scales and adds that often again, and beside a bfloat16 model each layer keeps a float32 copy of its
input. Here the scale falls on the rank's width, the adapter's products are added by the GEMMs themselves,
and the input is kept as it came, once for all layers that read it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        inner = nn.functional.linear(x.to(a.dtype), a).mul_(scale)
        out = nn.functional.linear(x, weight, bias)
        _add_product(out, inner, b.t())
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, inner = ctx.saved_tensors
        wide = _rows(grad).to(b.dtype)
        d_inner = torch.mm(wide, b).mul_(ctx.scale)
        d_a = torch.mm(d_inner.t(), _rows(x).to(a.dtype))
        # Not the other way around: a CPU's GEMM is half as long at [width, tokens] x [tokens, rank] again.
        d_b = torch.mm(_rows(inner).t(), wide).t()
        del wide
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.matmul(grad, weight)
            _add_product(d_x, d_inner, a)
        return d_x, None, None, d_a, d_b, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, rounded once where the factors are wider than the total."""
    flat, left = total.view(-1, total.shape[-1]), _rows(left)
    if flat.dtype == left.dtype:
        flat.addmm_(left, right)
    else:
        flat.add_(left @ right)


def lora_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    bias: Tensor | None,  # [O], frozen
    a: Tensor,  # [rank, I]
    b: Tensor,  # [O, rank]
    scale: float,
) -> Tensor:
    """``x @ weight^T + bias + scale * x @ a^T @ b^T`` in the dtype of ``x``, the adapter's share computed in
    the adapter's; differentiable once with respect to ``x``, ``a`` and ``b``. Keeps ``x`` and the scaled
    ``x @ a^T``."""
    return _LoraLinear.apply(x, weight, bias, a, b, scale)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _plain_adapter(layer)
    if name is None or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    return lora_linear(x, base.weight, base.bias, a.weight, b.weight, layer.scaling[name])


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter, if it is a LoRA without dropout, bias or variants over a frozen layer.

    Not where weights are partitioned (ZeRO-3): they are whole only inside their own modules' forward.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    name, base = active[0], layer.base_layer
    if name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    weight = base.weight
    return None if weight.requires_grad or hasattr(weight, "ds_id") else name


def set_fused(model: nn.Module, on: bool) -> int:
    """Give PEFT's LoRA layers over plain linear layers this forward, or their own back; returns how many there
    are."""
    from peft.tuners.lora import Linear

    found = [m for m in model.modules() if type(m) is Linear and type(m.base_layer) is nn.Linear]
    for layer in found:
        layer.__dict__.pop("forward", None)
        if on:
            layer.__dict__["forward"] = MethodType(_forward, layer)
    return len(found)
