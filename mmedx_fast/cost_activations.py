"""Bytes that one packed row holds between its forward and its backward. Imports no torch.

Counted per token from what autograd saves in transformers' Qwen2-VL / Qwen2.5-VL blocks and the LoRA
layers: H is the hidden size, I the MLP's width, `size` the bytes of a weight. Norms compute in float32, so
that a bfloat16 model keeps float32 copies of what goes into them; so do PEFT's own LoRA layers.
"""

from __future__ import annotations

import dataclasses

from mmedx_fast.flops import ModelShape

WIDE = 4
"""Bytes of float32: norms, adapters, statistics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How the blocks are trained, as far as it decides what is kept."""

    size: int
    """Bytes of a weight and of an activation: 2 (bfloat16) or 4."""
    checkpointing: bool
    full: bool = False
    """Every weight of the language model is trained; else a LoRA of ``rank`` on its linear layers."""
    rank: int = 16
    stock_lora: bool = False
    """PEFT's own LoRA layers, as under ZeRO-3; else :mod:`mmedx_fast.lora_linear`."""
    liger: bool = False
    """Liger's RMSNorm and SwiGLU, which keep less than transformers' own."""


@dataclasses.dataclass(frozen=True)
class RowMemory:
    """Bytes of one row. ``layer`` and ``head`` take turns on top of ``kept``."""

    kept: int
    """From the forward until the backward of each block."""
    layer: int
    """Of one block's backward: what a checkpoint computes again, and gradients."""
    head: int
    """Around the loss: the last norm, the states that reach the head and their gradient; with full
    training also the head's float32 gradient. The logits tile comes on top."""


def saved_bytes(model: ModelShape, how: Training) -> int:
    """Bytes a token leaves in one block for its backward, keys and values aside."""
    h, i, size = model.hidden, model.intermediate, how.size
    query = model.heads * model.head_dim
    # Each of the two norms keeps its input in float32; Liger's as it comes.
    norms = 2 * h * (size if how.liger else WIDE)
    # Gate, up, and (without Liger) silu(gate); attention keeps queries, output and the log-sum-exp.
    mlp = (2 if how.liger else 3) * i * size
    attention = 2 * query * size + WIDE * model.heads
    return norms + mlp + attention + _inputs(h, i, query, how)


def _inputs(h: int, i: int, query: int, how: Training) -> int:
    """What the linear layers keep of their inputs for the gradient of a weight or an adapter."""
    if how.full:
        # Two normed states (the weight of transformers' norm keeps its own factor too), the product of
        # the MLP; the output projection's input is the attention's output.
        return how.size * ((2 if how.liger else 4) * h + i)
    adapters = 7 * WIDE * how.rank  # what lies between A and B
    if how.size == WIDE or not how.stock_lora:
        return how.size * (2 * h + i) + adapters  # the layers that read the same state share it
    # PEFT casts the input of each of the seven layers for itself.
    return WIDE * (5 * h + query + i) + adapters


def gradient_bytes(model: ModelShape, how: Training) -> int:
    """Bytes a token adds to :func:`saved_bytes` at the worst moment of a block's backward."""
    h, i, size = model.hidden, model.intermediate, how.size
    if how.full or size == WIDE:
        # The block's incoming gradient, and of the MLP three gradients where the product was kept: of
        # the product and of its two factors (LoRA: the product's by two ways, and their sum). Liger
        # writes the factors' gradients over the factors.
        return size * (h + (1 if how.liger and how.full else 2) * i)
    if not how.stock_lora:
        # The gradient of the MLP's product: the adapter's share in float32, and the base's. The incoming
        # gradient and the residual's.
        return (WIDE + size) * i + 2 * size * h
    # While the up projection is computed again: the adapter's product before and after its scale in
    # float32 and the base's; less what this projection and the next leave, counted already.
    mlp = 2 * WIDE * i + size * i - (size + WIDE) * i
    # The incoming gradient, its copies for the adapter (float32) and the base, the MLP's input and the
    # residual.
    return mlp + h * (WIDE + 4 * size)


def row_memory(
    model: ModelShape, how: Training, *, tokens: int, keys: int, targets: int
) -> RowMemory:
    """Bytes of a row of ``tokens`` with ``targets``; ``keys`` are those the attention gathers."""
    h, size = model.hidden, how.size
    whole = tokens * saved_bytes(model, how) + 2 * keys * model.kv_heads * model.head_dim * size
    gradients = tokens * gradient_bytes(model, how)
    rotary = 2 * tokens * model.head_dim * size
    # The last norm's input in float32 and its output, with full training its factor too.
    last = tokens * h * (WIDE + (2 if how.full else 1) * size)
    head = last + 2 * targets * h * size
    if how.full:
        head += WIDE * model.hidden * model.vocab
    # In float32 the first norm keeps the block's input itself.
    shared = tokens * h * WIDE if size == WIDE else 0
    if how.checkpointing:
        inputs = tokens * h * size * model.layers
        return RowMemory(inputs + rotary, whole - shared + gradients, head)
    # Frozen embeddings need no gradient: the first norm keeps nothing.
    unneeded = 0 if how.full else tokens * h * WIDE
    return RowMemory(model.layers * whole - unneeded + rotary, gradients, head)
