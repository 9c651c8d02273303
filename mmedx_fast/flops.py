"""FLOPs of a Qwen2-VL / Qwen2.5-VL and tokens of a question, packed as a tree or plain.

A FLOP is one multiplication or one addition: a [m, k] x [k, n] product has 2mkn. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A Qwen2-VL or Qwen2.5-VL vision tower; sizes in features, ``patch`` and ``window`` in
    pixels."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    mlp_matrices: int
    """3 with a gate (Qwen2.5-VL), 2 without (Qwen2-VL)."""
    patch: int
    merge: int
    """``merge`` x ``merge`` patches make one token of the language model."""
    patch_values: int
    """Input values of one patch: channels x frames x pixels."""
    out: int
    window: int | None
    """Edge of the attention window, None where every block sees the whole image."""
    full_blocks: int
    """Blocks that see the whole image."""

    @property
    def gated(self) -> bool:
        """Qwen2.5-VL's blocks, with RMSNorm; else Qwen2-VL's, with LayerNorm."""
        return self.mlp_matrices == 3

    @property
    def linear_params(self) -> int:
        """Weights of the blocks, the patch embedding and the merger."""
        merged = self.hidden * self.merge**2
        block = 4 * self.hidden**2 + self.mlp_matrices * self.hidden * self.intermediate
        embed = self.patch_values * self.hidden
        return self.depth * block + embed + merged * merged + merged * self.out

    def block_flops(self) -> float:
        """Forward FLOPs of the blocks' linear layers per patch."""
        block = 4 * self.hidden**2 + self.mlp_matrices * self.hidden * self.intermediate
        return 2.0 * self.depth * block

    def patch_flops(self) -> float:
        """As :meth:`block_flops`, with patch embedding and merger (one row per merge^2 patches)."""
        merged = self.hidden * self.merge**2
        merger = merged * (merged + self.out) / self.merge**2
        return self.block_flops() + 2 * (self.patch_values * self.hidden + merger)

    def attention_flops(self, patches: int) -> float:
        """Forward FLOPs of the attention over one image of that many patches."""
        near = patches if self.window is None else min(patches, (self.window // self.patch) ** 2)
        pairs = patches * (self.full_blocks * patches + (self.depth - self.full_blocks) * near)
        return 4.0 * self.hidden * pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a language model with GQA and a gated MLP, and of its vision tower."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    vision: VisionShape | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the content of a Hugging Face ``config.json``, with or without ``text_config``.

        Raises ValueError naming the key that is missing or is not a positive integer.
        """
        text = {**config, **(config.get("text_config") or {})}
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        vision = config.get("vision_config")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            hidden=hidden,
            intermediate=_size(text, "intermediate_size"),
            layers=_size(text, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(text, "num_key_value_heads", heads),
            head_dim=_size(text, "head_dim", hidden // heads),
            vocab=_size(text, "vocab_size"),
            tied=bool(tied),
            vision=_vision_shape(vision, hidden) if vision else None,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the seven linear layers of one block."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def params(self) -> int:
        """Weights of all linear layers and embeddings (norms and biases, under 0.1 %, left out)."""
        head = self.hidden * self.vocab * (1 if self.tied else 2)
        return (
            self.layer_params + head + (self.vision.linear_params if self.vision is not None else 0)
        )

    @property
    def layer_params(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears().values())

    def lora_params(self, rank: int) -> int:
        """Weights of a LoRA on all linear layers of the language model."""
        return self.layers * rank * sum(i + o for i, o in self.linears().values())

    def token_flops(self) -> float:
        """Forward FLOPs of the linear layers per token, the head aside."""
        return 2.0 * self.layer_params

    def down_flops(self) -> float:
        """The part of :meth:`token_flops` that the down projections have."""
        return 2.0 * self.layers * self.hidden * self.intermediate

    def first_inputs_flops(self) -> float:
        """The part of :meth:`token_flops` that q, k and v of one block have."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2.0 * self.hidden * (query + 2 * key)

    def pair_flops(self) -> float:
        """Forward FLOPs of QK^T and PV per (query, key) pair, over all layers and heads."""
        return 4.0 * self.layers * self.heads * self.head_dim

    def head_flops(self) -> float:
        """Forward FLOPs of the lm_head per token that reaches it."""
        return 2.0 * self.hidden * self.vocab

    def image_flops(self, image_tokens: int) -> float:
        """Forward FLOPs of the vision tower for one image that becomes ``image_tokens`` tokens."""
        if self.vision is None or image_tokens == 0:
            return 0.0
        patches = image_tokens * self.vision.merge**2
        return patches * self.vision.patch_flops() + self.vision.attention_flops(patches)

    def image_backward_flops(self, image_tokens: int, checkpointing: bool) -> float:
        """FLOPs that training the vision tower adds to :meth:`image_flops`: two products for each one,
        but pixels need no gradient; with checkpointing the blocks once more."""
        if self.vision is None or image_tokens == 0:
            return 0.0
        patches = image_tokens * self.vision.merge**2
        pixels = 2.0 * patches * self.vision.patch_values * self.vision.hidden
        again = patches * self.vision.block_flops() + self.vision.attention_flops(patches)
        return 2 * self.image_flops(image_tokens) - pixels + (again if checkpointing else 0.0)

    def kv_bytes(self, dtype_bytes: int = 2) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


def _vision_shape(vision: Mapping[str, Any], text_hidden: int) -> VisionShape:
    old = (
        "embed_dim" in vision
    )  # Qwen2-VL: hidden_size is the language model's, no gate, no windows
    hidden = _size(vision, "embed_dim" if old else "hidden_size")
    depth, patch = _size(vision, "depth"), _size(vision, "patch_size", 14)
    channels = _size(vision, "in_channels", _size(vision, "in_chans", 3))
    ratio = float(vision.get("mlp_ratio", 4))
    return VisionShape(
        depth=depth,
        hidden=hidden,
        heads=_size(vision, "num_heads", 16),
        intermediate=round(hidden * ratio) if old else _size(vision, "intermediate_size"),
        mlp_matrices=2 if old else 3,
        patch=patch,
        merge=_size(vision, "spatial_merge_size", 2),
        patch_values=channels * _size(vision, "temporal_patch_size", 2) * patch**2,
        out=text_hidden if old else _size(vision, "out_hidden_size", text_hidden),
        window=None if old else _size(vision, "window_size", 112),
        full_blocks=depth if old else len(vision.get("fullatt_block_indexes", [])),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model config: {key} must be a positive integer, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What one question puts through the model: ``pairs`` are the (query, key) pairs of
    attention."""

    tokens: int
    pairs: int
    targets: int
    """Response tokens, the only ones that reach the head."""
    images: int
    """Times the question's images go through the vision tower."""


def tree_counts(prompt: int, guideline: int, response: int, *, guidelines: int, n: int) -> Counts:
    """One packed row: the prompt once, each guideline once, ``n`` responses under each.

    ``prompt`` counts image tokens too. tokens = P + K G + K n R.
    """
    p, g, r, k = prompt, guideline, response, guidelines
    pairs = _triangle(p) + k * (_triangle(g) + g * p) + k * n * (_triangle(r) + r * (p + g))
    return Counts(tokens=p + k * g + k * n * r, pairs=pairs, targets=k * n * r, images=1)


def plain_counts(prompt: int, guideline: int, response: int, *, guidelines: int, n: int) -> Counts:
    """One sequence per rollout: tokens = K n (P + G + R)."""
    sequences, length = guidelines * n, prompt + guideline + response
    return Counts(
        tokens=sequences * length,
        pairs=sequences * _triangle(length),
        targets=sequences * response,
        images=sequences,
    )


def segment_counts(segments: Sequence[tuple[int, int, int]], targets: int) -> Counts:
    """Of a packed row from the (start, length, parent) of its segments; its images not counted."""
    above: list[int] = []  # keys before a segment's own
    ends: list[int] = []
    for _, length, parent in segments:
        above.append(ends[parent] if parent >= 0 else 0)
        ends.append(above[-1] + length)
    lengths = [length for _, length, _ in segments]
    pairs = sum(_triangle(n) + n * k for n, k in zip(lengths, above, strict=True))
    return Counts(tokens=sum(lengths), pairs=pairs, targets=targets, images=0)


def one_level_tokens(prompt: int, guideline: int, response: int, *, guidelines: int, n: int) -> int:
    """Tokens when only the ``n`` rollouts of one whole prompt share it: K (P + G + n R)."""
    return guidelines * (prompt + guideline + n * response)


def forward_flops(model: ModelShape, counts: Counts, image_tokens: int = 0) -> float:
    """FLOPs of one forward pass over ``counts``, the head on the response tokens alone."""
    image = model.image_flops(image_tokens)
    return _layers(model, counts) + counts.targets * model.head_flops() + counts.images * image


def train_flops(
    model: ModelShape,
    counts: Counts,
    image_tokens: int = 0,
    *,
    lora_rank: int = 16,
    checkpointing: bool = True,
    full: bool = False,
    train_tower: bool = False,
) -> float:
    """FLOPs of forward and backward; the attention's own recomputation in its backward is left out.

    With a LoRA the frozen linear layers have no weight gradient, so their backward is one product (of
    the input's gradient), not two, and the first block's q, k and v have none: embeddings are frozen.
    ``full`` trains every weight of the language model. The head, whose product is never computed again,
    has one more for its weight then. A frozen tower's features need no gradient: no backward, no
    recomputation.
    """
    linear, pairs = counts.tokens * model.token_flops(), counts.pairs * model.pair_flops()
    head = counts.targets * model.head_flops()
    total = forward_flops(model, counts, image_tokens) + 2 * pairs
    if full:
        total += 2 * linear + 2 * head
        # A checkpoint stops where the last kept tensor is back: before the down projection's product.
        again = linear - counts.tokens * model.down_flops() + pairs
    else:
        adapter = 2.0 * model.lora_params(lora_rank) * counts.tokens
        total += linear - counts.tokens * model.first_inputs_flops() + head + 3 * adapter
        again = linear + pairs + adapter
    if train_tower:
        total += counts.images * model.image_backward_flops(image_tokens, checkpointing)
    return total + (again if checkpointing else 0.0)


def _layers(model: ModelShape, counts: Counts) -> float:
    return counts.tokens * model.token_flops() + counts.pairs * model.pair_flops()


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
