"""A recipe's model with its architecture kept and its sizes cut. Loaded by path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmedx_fast.cost import KNOWN_MODELS
from mmedx_fast.tiny import assets_folder

HEAD_DIM = 32
"""Of 128: M-RoPE's sections keep their 16 : 24 : 24 as 4 : 6 : 6."""


def shrink(name: str) -> dict[str, Any]:
    """A Hugging Face config with the recipe's ratio of query to key heads and of MLP to width, its tied
    or untied head, and of the vision tower the family's windows and the share of blocks that see all;
    two layers, the tiny model's vocabulary."""
    real = KNOWN_MODELS[name.rsplit("/", 1)[-1].lower()]
    tiny = json.loads((assets_folder() / "config.json").read_text())
    heads = real["num_attention_heads"] // real["num_key_value_heads"]
    width = heads * HEAD_DIM
    old = "embed_dim" in real["vision_config"]
    text = {key: value for key, value in tiny["text_config"].items() if key != "layer_types"}
    text |= {
        "model_type": "qwen2_vl_text" if old else "qwen2_5_vl_text",
        "hidden_size": width,
        "intermediate_size": width * real["intermediate_size"] // real["hidden_size"],
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 6, 6],
        },
        "tie_word_embeddings": real.get("tie_word_embeddings", False),
    }
    vision: dict[str, Any] = {"depth": 4, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
    if old:
        vision |= {"embed_dim": 64, "hidden_size": width, "mlp_ratio": 4}
    else:
        inner = 64 * real["vision_config"]["intermediate_size"]
        vision |= {
            "hidden_size": 64,
            "intermediate_size": inner // real["vision_config"]["hidden_size"],
            "out_hidden_size": width,
            "window_size": 56,
            "fullatt_block_indexes": [3],
        }
    ids = {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    return {
        **ids,
        "model_type": "qwen2_vl" if old else "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def save_shrunk(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """Random weights in ``dtype`` beside the tiny model's tokenizer and processor."""
    import transformers

    sizes = shrink(name)
    kind = sizes["model_type"]
    config = transformers.AutoConfig.for_model(
        kind, **{key: value for key, value in sizes.items() if key != "model_type"}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    for asset in assets_folder().iterdir():
        if asset.name not in ("config.json", "model.safetensors"):
            shutil.copy(asset, folder)
    if kind == "qwen2_vl":
        for file in ("processor_config.json", "tokenizer_config.json"):
            old = (folder / file).read_text()
            (folder / file).write_text(old.replace("Qwen2_5_VLProcessor", "Qwen2VLProcessor"))
    return folder


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Differs between the rollouts of a random model, which earn nothing otherwise."""
    return [float(len(text)) for text in completions]
