"""Safetensors files of models and checkpoints: which tensors they hold, and writing them shard by shard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedx_fast.atomic import write_json

INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)(\.index\.json)?")


class ModelFilesError(ValueError):
    """A model folder that cannot be read; the message names the file."""


def local_folder(model: str | Path) -> Path:
    """The model's folder: itself, or where a hub name lies in the local cache.

    Raises:
        ModelFilesError: neither exists.
    """
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    try:
        config = cached_file(str(model), "config.json", local_files_only=True)
    except OSError:
        config = None
    if config is None:
        raise ModelFilesError(f"{model}: no model folder, nor a model in the local hub cache")
    return Path(config).parent


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of a model folder, as written there -> its file.

    Raises:
        ModelFilesError: a shard is missing or damaged.
    """
    index = folder / INDEX_NAME
    files = [folder / "model.safetensors"]
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    return {key: file for file in files for key in safetensors_keys(file)}


def safetensors_keys(file: Path) -> list[str]:
    """Raises ModelFilesError for a file that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(f"{file}: cannot be read as safetensors ({error})") from error


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of :func:`tensor_files`, file after file, one in memory at a time."""
    from safetensors import safe_open

    for file in dict.fromkeys(files.values()):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():
                if key in files:
                    yield key, opened.get_tensor(key)


def canonical(name: str) -> str:
    """One spelling for the tensor names of published checkpoints and of transformers 5."""
    name = name.removeprefix("model.")
    return name.removeprefix("language_model.").removeprefix("model.")


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelFilesError when it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{folder}: no readable config.json ({error})") from error
    return config


class ShardWriter:
    """Writes tensors as ``<stem>.safetensors``, or as several ``<stem>-00001-of-00003.safetensors``.

    Holds one shard: at most `max_shard_size` bytes, or one tensor that is larger (null: no bound).
    """

    def __init__(self, folder: Path, stem: str, max_shard_size: int | None = None) -> None:
        self.folder, self.stem, self.limit = Path(folder), stem, max_shard_size
        self.bytes = 0
        """Of all tensors so far."""
        self._shards: list[list[str]] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor of any shape, dtype and device; on a CPU it must stay as it is until
        :meth:`finish`."""
        size = tensor.numel() * tensor.element_size()
        if self.limit is not None and self._held and self._held_bytes + size > self.limit:
            self._flush()
        self._held[name] = self._own(tensor)
        self._held_bytes += size
        self.bytes += size

    def _own(self, tensor: Tensor) -> Tensor:
        """Contiguous, on the CPU, alone in its storage: safetensors refuses shared ones."""
        held = tensor.detach().to("cpu").contiguous()
        storage = held.untyped_storage()
        shared = any(
            storage.data_ptr() == other.untyped_storage().data_ptr()
            for other in self._held.values()
        )
        if shared or storage.nbytes() != held.numel() * held.element_size():
            held = held.clone()
        return held

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}.part"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._shards.append(list(self._held))
        save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        self._held, self._held_bytes = {}, 0

    def finish(self) -> dict[str, str]:
        """Write what is held and give the files their names; returns tensor name -> file name."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        where: dict[str, str] = {}
        for number, keys in enumerate(self._shards, 1):
            part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            file = f"{self.stem}{part}.safetensors"
            self._part(number).rename(self.folder / file)
            where |= dict.fromkeys(keys, file)
        return where


def write_model(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    base: Path,
    dtype: torch.dtype,
    max_shard_size: int,
) -> None:
    """Fill `folder` with a model that transformers and vLLM load: `weights` in shards with an index, and
    every file of the folder `base` but its weights (configuration, tokenizer, processor)."""
    write_shards(folder, weights, max_shard_size)
    copy_companions(folder, base)
    write_json(folder / "config.json", _with_dtype(read_config(base), dtype))


def write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]], max_shard_size: int) -> None:
    """`weights` as transformers names them: one file, or several with an index."""
    writer = ShardWriter(folder, "model", max_shard_size)
    for name, tensor in weights:
        writer.add(name, tensor)
    where = writer.finish()
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": writer.bytes}, "weight_map": where}
        write_json(folder / INDEX_NAME, index)


def copy_companions(folder: Path, base: Path) -> None:
    """Every file of a model's folder `base` but its weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and not _WEIGHTS.fullmatch(file.name) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration, saying which dtype the weights are written in."""
    name = str(dtype).removeprefix("torch.")
    changed: dict[str, Any] = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return changed | {key: name for key in ("dtype", "torch_dtype") if key in config}
