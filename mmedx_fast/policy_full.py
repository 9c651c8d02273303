"""Training every weight: the start merged into the base, what is frozen, names on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedx_fast.model_files import ModelFilesError, canonical, local_folder, tensor_files
from mmedx_fast.policy_adapter import read_config, read_tensors
from mmedx_fast.policy_engine import by_block, gathered
from mmedx_fast.policy_model import lora_layers, wrap


def merge_adapter_(base: Any, folder: Path) -> Any:
    """The base with an adapter's delta added to its weights, each sum in float32 and rounded once.

    Raises:
        AdapterError: the adapter does not fit.
    """
    model = wrap(base, read_config(folder), seed=0, with_reference=False)
    marked = {
        name.replace(".default.", "."): param
        for name, param in model.named_parameters()
        if ".lora_" in name
    }
    tensors = read_tensors(folder, {key: param.shape for key, param in marked.items()})
    with torch.no_grad():
        for key, param in marked.items():
            param.copy_(tensors[key])
        for layer in lora_layers(model):
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight("default"))
    return model.unload()


def thaw_(base: Any, freeze_vision_tower: bool) -> None:
    """Make the weights trainable; of the vision tower (projector included) only where asked to."""
    base.requires_grad_(True)
    if freeze_vision_tower:
        base.model.visual.requires_grad_(False)


def checkpoint_names(model: nn.Module, path: str | Path) -> dict[str, nn.Parameter]:
    """The model's parameters under the names that the checkpoint at `path` has for them.

    Of tied weights the first alone.

    Raises:
        ValueError: a parameter that the checkpoint does not have.
    """
    try:
        written = {canonical(name): name for name in tensor_files(local_folder(path))}
    except ModelFilesError as error:
        raise ValueError(f"full-parameter training needs safetensors: {error}") from None
    found = {}
    for name, param in model.named_parameters():
        if canonical(name) not in written:
            raise ValueError(f"{path}: the checkpoint has no tensor for the parameter {name}")
        found[written[canonical(name)]] = param
    return found


def whole_weights(params: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Own copies of the live weights, on their device, gathered block by block (all ranks go through
    them)."""
    for block in by_block(params):
        with gathered(list(block.values())):
            copies = [(name, param.detach().clone()) for name, param in block.items()]
        yield from copies
