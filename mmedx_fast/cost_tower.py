"""Bytes that the vision tower holds in an update: its features, and where it is trained what its graph keeps.
Imports no torch.

Counted per patch from what autograd saves in transformers' Qwen2-VL / Qwen2.5-VL vision blocks with
scaled-dot-product attention: h is the tower's hidden size, i its MLP's width, H the language model's hidden
size, `size` the bytes of a weight. Liger's kernels are for the language model alone.
"""

from __future__ import annotations

import dataclasses

from mmedx_fast.cost_activations import WIDE, Training
from mmedx_fast.flops import ModelShape, VisionShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Image tokens (each ``merge`` x ``merge`` patches) that one GPU holds something of."""

    row: int
    """Of a row, which the tower takes at once."""
    row_images: int
    held: int
    """Of all images whose features are kept at once, and whose graph where the tower is trained."""
    waits: bool = False
    """A trained tower's graph waits for several rows; their gradients meet at its output."""


@dataclasses.dataclass(frozen=True)
class TowerMemory:
    """Bytes of a trained tower."""

    saved: int
    """What autograd keeps from the tower's forward to its backward."""
    kept: int
    """That, and the row's pixels."""
    layer: int
    """Of one block's backward, on top of ``kept``. The language model's activations are gone by then."""


def saved_bytes(vision: VisionShape, size: int) -> int:
    """Bytes a patch leaves in one block for its backward."""
    h, i = vision.hidden, vision.intermediate
    # RMSNorm (Qwen2.5-VL) keeps its input in float32 and the factor of its weight, LayerNorm its input; the
    # linear layers keep their outputs.
    norms = 2 * h * (WIDE + 2 * size if vision.gated else 2 * size)
    # All of the product qkv, for v is a view of it; q and k as rotated; the attention's output, and once
    # more for the projection, its windows put together; the log-sum-exp.
    attention = 7 * h * size + WIDE * vision.heads
    # Gate, silu(gate), up and the product; without a gate the first layer, its sigmoid and the product.
    mlp = (4 if vision.gated else 3) * i * size
    return norms + attention + mlp


def tower_memory(model: ModelShape, how: Training, images: Images) -> TowerMemory:
    """Bytes of a trained tower; 0 for a model without one."""
    vision = model.vision
    if vision is None:
        return TowerMemory(0, 0, 0)
    h, size, gated = vision.hidden, how.size, vision.gated
    held, row = (tokens * vision.merge**2 for tokens in (images.held, images.row))  # patches
    block = saved_bytes(vision, size)
    blocks = vision.depth * (h * size if how.checkpointing else block)
    # The merger: a norm as above, the first layer's output and its GELU.
    merger = h * (WIDE + 4 * size if gated else 4 * size)
    # Pixels as the patch embedding reads them; cosines and sines in float32, which all blocks share.
    once = size * vision.patch_values + 2 * WIDE * (h // vision.heads)
    saved = held * (blocks + merger + once)
    # The row's own pixels are float32: in a float32 model the same tensor. A run that waits lets go of them.
    pixels = 0 if size == WIDE or images.waits else row * WIDE * vision.patch_values
    # The block's incoming gradient, and of its MLP three where the product was kept.
    gradients = size * (h + 2 * vision.intermediate)
    # But for a float32 copy, the first norm keeps the block's input, which the checkpoint has.
    shared = 0 if gated and size != WIDE else h * size
    again = block - shared if how.checkpointing else 0
    # The merger's backward came first.
    return TowerMemory(saved, saved + pixels, max(0, row * (again + gradients - merger)))


def feature_bytes(model: ModelShape, how: Training, images: Images, *, trained: bool) -> int:
    """Bytes of the tower's output [image tokens, H], from the first row that shows an image to the last.

    Several images of a row are put together, which copies them. Where a trained tower's graph waits, so
    does a float32 leaf with its gradient, of which a row reads a copy in the model's dtype.
    """
    each = model.hidden * how.size
    if not trained:
        return each * (images.held + (images.row if images.row_images > 1 else 0))
    if not images.waits:
        return each * images.row
    copied = images.row if images.row_images > 1 or how.size != WIDE else 0
    return each * (images.held + copied) + 2 * WIDE * model.hidden * images.held
