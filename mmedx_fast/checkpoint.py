"""Checkpoints: safetensors and JSON, written whole or not at all, checked before they are believed.

``<stage>/checkpoints/step-000010/`` holds ``state.safetensors`` (or several shards of it) and
``meta.json``; the latter has the SHA-256 of each of the former and of itself. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedx_fast.atomic import write_folder, write_text
from mmedx_fast.model_files import ShardWriter

_STEP = re.compile(r"step-(\d{6,})")
_MAX_STEP = 10**12


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


class _DamagedError(CheckpointError):
    """Incomplete or altered on disk: no later try will read it."""


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, on the CPU; one is read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._where: dict[str, tuple[Any, str]] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self._where |= {key: (opened, key) for key in opened.keys()}

    def __getitem__(self, name: str) -> Tensor:
        opened, key = self._where[name]
        tensor: Tensor = opened.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> torch.Size:
        """Without reading the tensor."""
        opened, key = self._where[name]
        return torch.Size(opened.get_slice(key).get_shape())

    def under(self, prefix: str) -> SavedTensors:
        """Those whose names start with `prefix`, which is cut off."""
        part = SavedTensors(())
        part._where = {
            name.removeprefix(prefix): where
            for name, where in self._where.items()
            if name.startswith(prefix)
        }
        return part


def save_checkpoint(
    stage_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    meta: dict[str, Any],
    keep: int = 2,
    max_shard_size: int | None = None,
) -> Path:
    """Write ``checkpoints/step-<step>`` atomically and delete all but the ``keep`` newest up to
    ``step``.

    ``tensors``: any shape, dtype and device; views of one storage are stored apart. An iterator of
    (name, tensor) is written as it comes, ``max_shard_size`` bytes in memory at a time. ``meta``: what
    JSON can hold (string keys; tuples come back as lists; NaN and infinities survive). Returns the
    checkpoint's folder. Raises ValueError for bad arguments and ``DiskFullError``; then the earlier
    checkpoints are as they were.
    """
    if not 0 <= step < _MAX_STEP or keep < 1:
        raise ValueError(f"step = {step} must be in [0, 1e12) and keep = {keep} at least 1")
    try:
        text = json.dumps(_checked_keys(meta, "meta"), sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"meta of the checkpoint at step {step} cannot be written as JSON: {error}"
        ) from None
    nbytes: int | None = None
    pairs: Iterable[tuple[str, Tensor]]
    if isinstance(tensors, Mapping):
        pairs = tensors.items()
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values()) + len(text)
    else:
        pairs = tensors
    target = Path(stage_dir) / "checkpoints" / f"step-{step:06d}"
    with write_folder(target, nbytes) as folder:
        writer = ShardWriter(folder, "state", max_shard_size)
        for name, tensor in pairs:
            writer.add(name, tensor)
        files = sorted(set(writer.finish().values()) or {"state.safetensors"})
        body = {
            "format": 2,
            "step": step,
            "files": {name: _file_record(folder / name) for name in files},
            "meta": json.loads(text),
        }
        body["checksum"] = _checksum(body)
        write_text(folder / "meta.json", json.dumps(body, indent=1) + "\n")
    older = [folder for found, folder in _steps(Path(stage_dir)) if found <= step]
    for folder in older[keep:]:
        shutil.rmtree(folder)
    return target


def load_latest(stage_dir: Path) -> tuple[int, SavedTensors, dict[str, Any]] | None:
    """The newest checkpoint that is whole: (step, tensors on the CPU, read when asked for, meta), or
    None when none was ever written.

    A damaged one (file missing, truncated, wrong checksum) is passed over for the one before it,
    with a warning that names the file.

    Raises :class:`CheckpointError` when all are damaged: to begin anew would write over what the stage
    has logged. Also when the system refuses to read one (permissions, a stale mount, too many open
    files): it may be whole, and one that is passed over today could be jumped to tomorrow.
    """
    root = Path(stage_dir) / "checkpoints"
    damage: list[str] = []
    try:
        for step, folder in _steps(Path(stage_dir)):
            try:
                tensors, meta = _read(folder, step)
            except _DamagedError as error:
                damage.append(str(error))
                continue
            for message in damage:
                warnings.warn(f"{message}; going back to the checkpoint before it", stacklevel=2)
            return step, tensors, meta
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {root} cannot be read now ({error}), which does not mean that they are "
            f"damaged: mend that and start the same command again, or delete the folder it names to go "
            f"on without it"
        ) from error
    if damage:
        found = "".join(f"\n  {message}" for message in damage)
        raise CheckpointError(
            f"none of the {len(damage)} checkpoints in {root} can be used:{found}\n"
            f"put a good copy there, or delete {root} to begin this stage anew"
        )
    return None


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of python's, numpy's and torch's (CPU, every CUDA device) generators.

    Returns tensors (names start with ``rng/``) and a JSON part, both for :func:`set_rng_state`.
    """
    import numpy as np

    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": torch.tensor(internal, dtype=torch.int64),
        "rng/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{index}"] = state
    info = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "algorithm": str(algorithm),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    return tensors, info


def set_rng_state(tensors: Mapping[str, Tensor], info: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; names that do not start with ``rng/`` are ignored.

    Raises :class:`CheckpointError` when a part is missing. With another number of CUDA devices the
    common ones are set and a warning says that the numbers will differ.
    """
    import numpy as np

    missing = [n for n in ("rng/torch", "rng/python", "rng/numpy") if n not in tensors]
    missing += [n for n in ("python", "numpy") if n not in info]
    if missing:
        raise CheckpointError(f"the checkpoint lacks the generator state {missing}")
    python, numpy = info["python"], info["numpy"]
    random.setstate((python["version"], tuple(tensors["rng/python"].tolist()), python["gauss"]))
    keys = tensors["rng/numpy"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["algorithm"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(tensors["rng/torch"])
    saved = sum(name.startswith("rng/cuda/") for name in tensors)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(min(saved, present)):
        torch.cuda.set_rng_state(tensors[f"rng/cuda/{index}"], index)
    if saved != present:
        warnings.warn(
            f"the checkpoint has generator states of {saved} CUDA devices and {present} are here: "
            f"sampling on them will not repeat the unbroken run's",
            stacklevel=2,
        )


def _steps(stage_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest first."""
    root = stage_dir / "checkpoints"
    if not root.is_dir():
        return []
    matches = [(_STEP.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir()]
    return sorted(((int(m[1]), p) for m, p in matches if m), reverse=True)


def _read(folder: Path, step: int) -> tuple[SavedTensors, dict[str, Any]]:
    from safetensors import SafetensorError

    path = folder / "meta.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        files = body["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"checkpoint file {path} is damaged or missing ({error})") from None
    if checksum != _checksum(body) or body["step"] != step:
        raise _DamagedError(f"checkpoint file {path} does not match its checksum")
    for name, expected in files.items():
        _check_file(folder / name, expected)
    try:
        return SavedTensors(folder / name for name in files), body["meta"]
    except SafetensorError as error:
        raise _DamagedError(f"checkpoint files of {folder} cannot be read ({error})") from None


def _file_record(path: Path) -> dict[str, Any]:
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _DamagedError(f"checkpoint file {path} is missing") from None
    if size != expected["bytes"]:
        raise _DamagedError(
            f"checkpoint file {path} has {size:,} bytes instead of {expected['bytes']:,}"
        )
    if _sha256(path) != expected["sha256"]:
        raise _DamagedError(f"checkpoint file {path} does not match its checksum")


def _checked_keys(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(
                    f"{where}: key {key!r} must be a string, or it would come back as one"
                )
        return {key: _checked_keys(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked_keys(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
