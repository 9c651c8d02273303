"""Where a base model keeps the matrix that an adapter's layer changes: file, tensor, and which way round.

Names differ between the files of a model and the modules of transformers' classes, some weights are stored
transposed (Conv1D), stacked (experts) or once for two modules (tied embeddings). transformers' own class,
made without memory for its weights, says which.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmedx_fast.model_files import (
    INDEX_NAME,
    ModelFilesError,
    canonical,
    local_folder,
    read_config,
    tensor_files,
)
from mmedx_fast.peft_adapters import LoraLayer
from mmedx_fast.policy_adapter import AdapterError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class BaseLayout:
    """A base model's folder: names, files and shapes of its tensors. Weights are read by others.

    Raises ModelFilesError for a folder without safetensors, or with quantised weights.
    """

    def __init__(self, model: str | Path) -> None:
        self.folder = local_folder(model)
        self.config = read_config(self.folder)
        quantised = self.config.get("quantization_config")
        if quantised:
            raise ModelFilesError(
                f"{self.folder}: its weights are quantised ({quantised.get('quant_method')}): a merge needs "
                "the base in 16 or 32 bits; give the folder of the model it was quantised from"
            )
        self._refuse_pickles()
        self.files = tensor_files(self.folder)
        """Name of every tensor as written -> its file."""
        self._by_name: dict[str, str] = {}
        for name in self.files:
            other = self._by_name.setdefault(self.key(name), name)
            if other != name:
                raise ModelFilesError(f"{self.folder}: {other} and {name} are one weight")

    def _refuse_pickles(self) -> None:
        if (self.folder / INDEX_NAME).is_file() or (self.folder / "model.safetensors").is_file():
            return
        found = sorted(self.folder.glob("pytorch_model*.bin"))
        if found:
            raise ModelFilesError(
                f"{found[0]} is a pickle, which can run code when it is read; only safetensors are. If you "
                "trust it, load the model once with transformers and save_pretrained it"
            )

    @cached_property
    def module(self) -> nn.Module | None:
        """The model on torch's meta device; None where transformers has no class for it."""
        import transformers

        names = self.config.get("architectures") or []
        found = getattr(transformers, names[0], None) if names else None
        if found is None:
            return None
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        with torch.device("meta"):
            made: nn.Module = found(config)
        return made

    def key(self, name: str) -> str:
        """One spelling of a weight or module, whoever wrote its name."""
        prefix = str(getattr(self.module, "base_model_prefix", "") or "")
        return canonical(name.removeprefix(f"{prefix}.") if prefix else name)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        if self.module is None:
            return {}
        return {self.key(name): part for name, part in self.module.named_modules() if name}

    @cached_property
    def _module_names(self) -> dict[str, str]:
        if self.module is None:
            return {}
        return {self.key(name): name for name, _ in self.module.named_modules() if name}

    def module_name(self, name: str) -> str | None:
        """A module's name in transformers' class, which PEFT looks for, whoever wrote `name`."""
        inner = name
        while inner.endswith(".base_layer"):
            inner = inner.removesuffix(".base_layer")
        found = self._module_names.get(self.key(inner))
        return None if found is None else found + name[len(inner) :]

    @cached_property
    def tied_names(self) -> dict[str, str]:
        """Weights that are another one's (the head the embedding's), with that one's name."""
        if self.module is None:
            ties = self.config.get("tie_word_embeddings") and "embed_tokens.weight" in self._by_name
            return {"lm_head.weight": "embed_tokens.weight"} if ties else {}
        found: dict[str, str] = self.module.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
        return found

    @cached_property
    def tied(self) -> dict[str, str]:
        """:attr:`tied_names` by key."""
        return {self.key(name): self.key(source) for name, source in self.tied_names.items()}

    def weight_key(self, layer: LoraLayer, parameters: list[str]) -> str:
        """Key of the weight that `layer` changes. `parameters`: the adapter's ``target_parameters``."""
        name, outer = layer.name, 0
        while name.endswith(".base_layer"):
            name, outer = name.removesuffix(".base_layer"), outer + 1
        if not parameters or (layer.kind != "stacked" and outer == 0 and self._has_weight(name)):
            return self.key(f"{name}.weight")
        owner = self._modules.get(self.key(name))
        if owner is None:
            raise AdapterError(
                f"the base {self.folder} has no module {name}, which {layer.name} is of"
            )
        # PEFT wraps a module once for each targeted parameter, in the module's order: the last is outermost
        wrapped = [
            parameter
            for parameter, _ in owner.named_parameters(recurse=False)
            if any(f".{name}.{parameter}".endswith(f".{target}") for target in parameters)
        ]
        if outer >= len(wrapped):
            raise AdapterError(
                f"{layer.name}: target_parameters {parameters} do not say which parameter of {name} it is"
            )
        return self.key(f"{name}.{wrapped[len(wrapped) - 1 - outer]}")

    def _has_weight(self, module: str) -> bool:
        return self.key(f"{module}.weight") in self._by_name

    def tensor(self, key: str) -> str | None:
        """Name in the files of the weight with this key; a tied one's source where it has none."""
        return self._by_name.get(key) or self._by_name.get(self.tied.get(key, ""))

    def has(self, name: str) -> bool:
        """Whether the files hold this weight itself, by any spelling of its name."""
        return self.key(name) in self._by_name

    def empty(self, name: str) -> Tensor:
        """A tensor of the files without its values (on torch's meta device)."""
        with safe_open(self.files[name], framework="pt") as opened:
            part = opened.get_slice(name)
            shape, dtype = part.get_shape(), _DTYPES.get(part.get_dtype(), torch.int8)
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """A tensor of the files."""
        with safe_open(self.files[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def require(self, key: str, layer: LoraLayer) -> str:
        """:meth:`tensor`, or AdapterError naming the layer and the remedy."""
        found = self.tensor(key)
        if found is not None:
            return found
        apart = layer.kind == "stacked"
        raise AdapterError(
            f"the base {self.folder} has no tensor for {layer.name} ({key})"
            + (
                ": its files hold the experts one by one; save the base once with transformers' "
                "save_pretrained(..., save_original_format=False) and give that folder"
                if apart
                else ": is the adapter of another base?"
            )
        )

    def view(self, weight: Tensor, layer: LoraLayer) -> Tensor:
        """The matrix [out, in] of `weight` that `layer` changes, in the adapter's orientation: a view.

        Raises AdapterError if the shapes do not fit, or if a square matrix may be stored either way.
        """
        if weight.dtype not in _DTYPES.values():
            raise AdapterError(
                f"{layer.name}: the base {self.folder} holds it in 8 bits or fewer; give it in 16 or 32 bits"
            )
        matrix = weight
        if layer.kind == "conv" and tuple(weight.shape[1:]) == layer.kernel:
            matrix = weight.flatten(1)
        elif layer.kind == "stacked" and weight.dim() == 3 and layer.index < weight.shape[0]:
            matrix = weight[layer.index]
        if matrix.dim() == 2 and self._turned(matrix, layer):
            matrix = matrix.t()
        if tuple(matrix.shape) != layer.factors.shape:
            raise AdapterError(
                f"{layer.name}: the adapter changes a {layer.factors.shape} matrix ({layer.kind}), but the "
                f"base's weight is {tuple(weight.shape)}: is the adapter of another base?"
            )
        return matrix

    def _turned(self, matrix: Tensor, layer: LoraLayer) -> bool:
        """Whether the base stores [in, out]: an embedding, a Conv1D, some models' stacked experts."""
        if layer.kind in ("embedding", "conv"):
            return layer.kind == "embedding"
        out, width = layer.factors.shape
        if out != width:
            return tuple(matrix.shape) == (width, out)
        owner = self._modules.get(self.key(layer.name.replace(".base_layer", "")))
        if owner is None and (layer.fan_in_fan_out or layer.kind == "stacked"):
            raise AdapterError(
                f"{layer.name} is square, and transformers has no class for the base {self.folder} that says "
                "which way round it is stored: merge the adapters with the model's own code"
            )
        return type(owner).__name__ == "Conv1D" or bool(getattr(owner, "is_transposed", False))


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head and embedding are two weights."""
    changed: dict[str, Any] = json.loads(json.dumps(config)) | {"tie_word_embeddings": False}
    for part in changed.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    return changed
