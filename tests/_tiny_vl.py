"""A random Qwen2-VL / Qwen2.5-VL of a few thousand weights, and rollouts for it. Loaded by path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmedx_fast.tree import Branch, Tree

VOCAB = 300
IMAGE, VIDEO, VISION_START, VISION_END = 290, 291, 292, 293
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    },
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PATCH_FEATURES = 3 * 2 * 14 * 14


def build(kind: str = "qwen2_5_vl", seed: int = 0) -> Any:
    """The model, float32, weights wide enough that attention is peaky and a wrong mask shows."""
    import transformers

    torch.manual_seed(seed)
    if kind == "qwen2_5_vl":
        vision = VISION | {
            "hidden_size": 32,
            "intermediate_size": 49,  # no rank gets the same share of it
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        config = transformers.Qwen2_5_VLConfig(
            text_config=dict(TEXT), vision_config=vision, tie_word_embeddings=False, **TOKENS
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {**VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(
            text_config=dict(TEXT), vision_config=vision, tie_word_embeddings=False, **TOKENS
        )
        model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(0.0, 0.12)
    return model.eval()


def save(folder: Path, kind: str = "qwen2_5_vl", seed: int = 0) -> Path:
    build(kind, seed).save_pretrained(folder)
    return folder


def image_tokens(grids: Sequence[Sequence[int]]) -> list[int]:
    ids: list[int] = []
    for t, h, w in grids:
        ids += [VISION_START, *[IMAGE] * (t * h * w // 4), VISION_END]
    return ids


def make_tree(
    generator: torch.Generator,
    guidelines: int = 3,
    generations: int = 2,
    grids: Sequence[Sequence[int]] = ((1, 4, 6),),
    question: int = 9,
    guideline: int = 4,
    response: int = 7,
    name: str = "q",
) -> Tree:
    """K guidelines x n rollouts; response lengths differ, one of them is a single token."""

    def words(n: int) -> list[int]:
        return torch.randint(1, 280, (n,), generator=generator).tolist()

    stem = words(3) + image_tokens(grids) + words(question)
    branches = []
    for k in range(guidelines):
        # A first token of its own, so that guidelines fork here whatever is drawn.
        prompt = [*stem, 281 + k, *words(guideline)]
        for n in range(generations):
            length = 1 if k == n == 0 else response + (k + n) % 3
            branches.append(Branch(prompt, words(length)))
    patches = sum(t * h * w for t, h, w in grids)
    return Tree(
        branches=tuple(branches),
        pixel_values=torch.randn(patches, PATCH_FEATURES, generator=generator) if grids else None,
        image_grid_thw=torch.tensor(grids) if grids else None,
        name=name,
    )
