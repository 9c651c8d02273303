"""Process environment that torch, vLLM, DeepSpeed and transformers read when they are imported.

Standard library only: torch must not be imported before this has run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmedx_fast._torchvision_shim import mmedx_torch_companions

logger = logging.getLogger(__name__)

SHIM_DIR = Path(mmedx_torch_companions.__file__).resolve().parent

_ALWAYS = {
    # The engine lives in this process: 20-30 s less start-up, and its errors are ours.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Our own progress bars say what is going on; a bar for every load of a model only hides them.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_CPU = {
    "DS_ACCELERATOR": "cpu",
    # vLLM compiles its log-prob ranking even with enforce_eager: a stall of 14-37 s on a CPU.
    "TORCHDYNAMO_DISABLE": "1",
    # Workers of their own (tensor parallel, a server) would each want a NUMA node to bind to.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Environment:
    """What `prepare_environment` found and did."""

    device: str
    """`cuda` or `cpu`."""
    changed: dict[str, str | None]
    """Variables this call set, with their values; None for one it removed."""


@cache
def torch_cuda_version() -> str | None:
    """CUDA version the installed torch was built for, None for a CPU build; torch is not imported.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torch is not installed: pip install mmedx-fast")
    path = Path(spec.submodule_search_locations[0]) / "version.py"
    version_spec = importlib.util.spec_from_file_location("_mmedx_torch_version", path)
    assert version_spec is not None and version_spec.loader is not None
    module = importlib.util.module_from_spec(version_spec)
    version_spec.loader.exec_module(module)
    return getattr(module, "cuda", None)


def cuda_device_present() -> bool:
    """Whether the machine shows an NVIDIA device that CUDA_VISIBLE_DEVICES does not hide."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    # /dev/dxg is the device under WSL.
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def default_device() -> str:
    """`cuda` where torch is a CUDA build and a device is visible, else `cpu`; imports no torch."""
    return "cuda" if torch_cuda_version() is not None and cuda_device_present() else "cpu"


def threads_per_rank() -> int:
    """Cores this process may use, shared out over the ranks a launcher started on this machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # torchrun's name for it, or the deepspeed launcher's
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return max(1, min(cores, _container_cores()) // max(1, ranks))


def _container_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Whole cores of a container's CPU quota (cgroup v2: `<quota us | max> <period us>`)."""
    try:
        quota, period = cpu_max.read_text().split()
    except OSError:
        return sys.maxsize
    return sys.maxsize if quota == "max" else max(1, int(quota) // int(period))


def prepare_environment(*, offline: bool = False, kv_cache_in_bytes: bool = True) -> Environment:
    """Set the environment of this process and its children; call before torch is imported.

    A variable that is set already keeps its value, so the caller's shell has the last word. Calling
    it again changes nothing more, except to add `offline`.

    Args:
        offline: also forbid model and data hubs (a run whose files are all local).
        kv_cache_in_bytes: the engine will be given `kv_cache_memory_bytes`. vLLM ignores that where
            VLLM_CPU_KVCACHE_SPACE is set, so the variable is removed, with a warning.

    Returns:
        The device to use and what was changed.
    """
    device = default_device()
    changed: dict[str, str | None] = {}
    wanted = dict(_ALWAYS)
    wanted["OMP_NUM_THREADS"] = str(threads_per_rank())
    wanted |= _CPU if device == "cpu" else {}
    wanted |= _OFFLINE if offline else {}
    for name, value in wanted.items():
        if name not in os.environ:
            os.environ[name] = value
            changed[name] = value
    if kv_cache_in_bytes and "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        value = os.environ.pop("VLLM_CPU_KVCACHE_SPACE")
        changed["VLLM_CPU_KVCACHE_SPACE"] = None
        logger.warning(
            "VLLM_CPU_KVCACHE_SPACE=%s is ignored: it would override the run's own KV cache size "
            "(kv_cache_memory_bytes)",
            value,
        )
    _find_ninja(changed)
    if device == "cpu":
        _keep_freed_memory()
    if torch_cuda_version() is None:
        mmedx_torch_companions.install()
        _prepend("PYTHONPATH", str(SHIM_DIR), changed)
    return Environment(device, changed)


def _keep_freed_memory() -> None:
    """Let glibc keep what torch frees instead of giving it back to the kernel.

    A training step on a CPU frees and asks again for the same large tensors; each time the kernel maps and
    clears new pages, which took up to half of a step's time (measured: 4.0 s -> 1.1 s for a batch of 7,500
    tokens of the tiny model). Variables of the caller (MALLOC_*) have the last word.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)


def _find_ninja(changed: dict[str, str | None]) -> None:
    """DeepSpeed builds an op at first use and raises without ninja, which pip put beside python."""
    folder = Path(sys.executable).parent
    if shutil.which("ninja") is None and (folder / "ninja").exists():
        entries = [entry for entry in (os.environ.get("PATH"), str(folder)) if entry]
        os.environ["PATH"] = changed["PATH"] = os.pathsep.join(entries)


def _prepend(name: str, entry: str, changed: dict[str, str | None]) -> None:
    old = os.environ.get(name, "")
    if entry not in old.split(os.pathsep):
        os.environ[name] = changed[name] = f"{entry}{os.pathsep}{old}" if old else entry
