"""Adapters on disk: PEFT's format, plus a note of which base they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedx_fast.atomic import write_folder

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
BASE_NAME = "base_model.json"
"""Beside PEFT's own files: the base's name and fingerprint."""

_SAMPLES = 1024


class AdapterError(ValueError):
    """An adapter that cannot be used with this base model; the message names folder, file and
    key."""


def base_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash that tells base models apart, the same whether they are held in float32 or
    bfloat16.

    Names, shapes and at most 1024 evenly spread elements per weight, as bfloat16. Any order of
    `weights`.
    """
    lines = []
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
        digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
        lines.append(f"{name} {tuple(weight.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def weights_checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over every byte, name, dtype and shape. Any order of `weights`."""
    lines = []
    for name, weight in weights:
        data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(data.numpy().data).hexdigest()
        lines.append(f"{name} {weight.dtype} {tuple(weight.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Any,
    base_name: str,
    fingerprint: str,
    *,
    durable: bool = True,
) -> None:
    """Write an adapter that `PeftModel.from_pretrained` and vLLM load. The folder appears complete
    or not at all.

    Args:
        tensors: PEFT's keys (without the adapter's name) -> contiguous CPU tensors.
        config: the `peft.LoraConfig`.
        base_name: path or name of the base model.
        fingerprint: :func:`base_fingerprint` of its weights.
        durable: as in :func:`mmedx_fast.atomic.write_folder`.

    Raises:
        DiskFullError: an older adapter is as it was.
    """
    from safetensors.torch import save_file

    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with write_folder(Path(folder), nbytes, durable=durable) as partial:
        save_file(dict(tensors), partial / WEIGHTS_NAME, metadata={"format": "pt"})
        saved = {
            **_plain(config.to_dict()),
            "base_model_name_or_path": base_name,
            "inference_mode": True,
        }
        _write_json(partial / CONFIG_NAME, saved)
        write_base_note(partial, base_name, fingerprint)


def write_base_note(folder: Path, base_name: str, fingerprint: str) -> None:
    """Say in `folder` which base its weights were trained from."""
    note = {"base_model_name_or_path": base_name, "base_fingerprint": fingerprint}
    _write_json(folder / BASE_NAME, note)


def _plain(value: Any) -> Any:
    """`value` in JSON's types; PEFT's configs hold sets and enums."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path) -> Any:
    """The adapter's `peft.LoraConfig`.

    Raises:
        AdapterError: no adapter there, damaged, not a LoRA, or a LoRA this trainer does not run.
    """
    from peft import LoraConfig

    path = Path(folder) / CONFIG_NAME
    raw = _read_json(path)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be used"
        )
    for key in (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_bias",
    ):
        if raw.get(key):
            raise AdapterError(f"{path}: {key} = {raw[key]!r} is not supported; train without it")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias = {raw['bias']!r} is not supported; use 'none'")
    # Dropout would give tokens that rollouts share one mask for all of them.
    return LoraConfig.from_pretrained(str(folder), lora_dropout=0.0, inference_mode=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}; this folder holds no adapter") from None
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} must hold an object, not {type(raw).__name__}")
    return raw


def check_base(folder: Path, base_name: str, fingerprint: str) -> None:
    """Refuse an adapter that was trained on another base.

    The fingerprint decides where the adapter carries one; otherwise (an adapter made elsewhere) the
    last part of the base's name does.

    Raises:
        AdapterError: naming the adapter's base and this one.
    """
    note = Path(folder) / BASE_NAME
    if note.exists():
        raw = _read_json(note)
        if raw.get("base_fingerprint") == fingerprint:
            return
        theirs = f"{raw.get('base_model_name_or_path')} (weights {raw.get('base_fingerprint')})"
        ours = f"{base_name} (weights {fingerprint})"
    else:
        theirs = str(_read_json(Path(folder) / CONFIG_NAME).get("base_model_name_or_path") or "")
        if not theirs or Path(theirs).name == Path(base_name).name:
            return
        ours = base_name
    raise AdapterError(
        f"adapter {folder} belongs to the base model {theirs}, but this run's base is {ours}: "
        f"set model.path to the adapter's base, or train the adapter again"
    )


def read_tensors(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The adapter's tensors, float32, exactly the keys of `shapes`.

    Raises:
        AdapterError: unreadable file, missing or unknown key, wrong shape, a value that is not
            finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    if not path.exists():
        raise AdapterError(f"{path} does not exist; only safetensors adapters are read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    missing, unknown = (
        sorted(shapes.keys() - tensors.keys()),
        sorted(tensors.keys() - shapes.keys()),
    )
    if missing or unknown:
        raise AdapterError(
            f"{path} does not fit this model: {len(missing)} keys missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}"
        )
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise AdapterError(
                f"{path}: {key} is {tuple(tensors[key].shape)}, the model needs {tuple(shape)}"
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise AdapterError(f"{path}: {key} holds NaN or infinity")
    return {key: value.float() for key, value in tensors.items()}
