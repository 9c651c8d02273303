"""vLLM's CPU LoRA products, without a copy of the adapter per token.

vLLM 0.32 gathers ``weights[index of each token]``, tokens x rank x width numbers per linear, which
takes 60 % of a small model's generation. Rollouts use one adapter at a time: one matmul does it.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Rebind the three products in vLLM's modules; batches with several adapters take vLLM's own.

    Installing it again changes nothing.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name, make in (
        ("bgmv_shrink", _shrink),
        ("bgmv_expand", _expand),
        ("bgmv_expand_slice", _expand_slice),
    ):
        original = getattr(lora_ops, name)
        if not hasattr(original, "__wrapped__"):
            # The prefill functions find it in lora_ops, the decode methods in punica_cpu.
            replacement = make(original)
            setattr(lora_ops, name, replacement)
            setattr(punica_cpu, name, replacement)


def _product(inputs: Any, weights: Any, indices: Any, dtype: Any) -> Any:
    """inputs [N, I] times the adapter [O, I] that all tokens use -> [N, O]; None if they differ.

    ``weights``: [slots, O, I] or [slots, 1, O, I]; ``indices``: [N] int, the slot of each token.
    """
    if len(indices) != len(inputs) or not bool((indices == indices[:1]).all()):
        return None
    matrix = weights[int(indices[0])]
    if matrix.ndim == 3:
        matrix = matrix.squeeze(0)
    return inputs.to(dtype) @ matrix.to(dtype).T


def _shrink(original: Any) -> Any:
    @functools.wraps(original)
    def shrink(inputs: Any, weights: Any, out: Any, indices: Any, scaling: float = 1.0) -> None:
        product = _product(inputs, weights, indices, out.dtype)
        if product is None:
            original(inputs, weights, out, indices, scaling)
        else:
            out[:, : product.shape[1]] = product * scaling

    return shrink


def _expand(original: Any) -> Any:
    @functools.wraps(original)
    def expand(inputs: Any, weights: Any, out: Any, indices: Any, add_inputs: bool = True) -> None:
        product = _product(inputs, weights, indices, out.dtype)
        if product is None or len(product) != len(out):
            original(inputs, weights, out, indices, add_inputs)
            return
        # The adapter and the model may pad their outputs differently.
        width = min(product.shape[1], out.shape[1])
        _write(out[:, :width], product[:, :width], add_inputs)

    return expand


def _expand_slice(original: Any) -> Any:
    @functools.wraps(original)
    def expand_slice(
        inputs: Any,
        weights: Any,
        out: Any,
        indices: Any,
        slice_offset: int,
        slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        product = _product(inputs, weights, indices, out.dtype)
        if product is None:
            original(inputs, weights, out, indices, slice_offset, slice_size, add_inputs)
        else:
            _write(out[:, slice_offset : slice_offset + slice_size], product, add_inputs)

    return expand_slice


def _write(out: Any, values: Any, add: bool) -> None:
    if add:
        out += values
    else:
        out.copy_(values)
