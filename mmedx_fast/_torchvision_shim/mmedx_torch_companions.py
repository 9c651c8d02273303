"""Import hook that lets torchvision, torchaudio and torchcodec fail to load in a way others expect.

Standard library only, and torch is not imported here: `install` adds a finder that waits for the
modules in question. Where their compiled parts load, and beside a CUDA torch, it changes nothing.
Using an operator that is missing still fails, with that package's own error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# The operators that torchvision/_meta_registrations.py registers on without asking.
TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a library's declarations go when it is collected


class TorchCompanionFinder(MetaPathFinder):
    """Acts on the modules named below and leaves finding them to the usual path."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        # torchvision.extension, which loads the compiled operators, has run by now.
        if fullname == "torchvision._meta_registrations":
            declare_missing_ops()
        execute = _EXECUTE.get(fullname)
        if execute is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappedLoader(spec.loader, execute)
        return spec


class _WrappedLoader(Loader):
    """The usual loader with another way to execute the module."""

    def __init__(self, loader: Loader, execute: Callable[[Loader, ModuleType], None]) -> None:
        self.loader = loader
        self.execute = execute

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.execute(self.loader, module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader, ...
        return getattr(self.loader, name)


def _execute_torchaudio_utils(loader: Loader, module: ModuleType) -> None:
    """Let `_load_lib` answer False, as in a build without compiled parts, where it would raise."""
    loader.exec_module(module)
    load: Callable[[str], bool] = module.__dict__["_load_lib"]

    def load_if_possible(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            if not _torch_is_cpu_build():
                raise
            return False

    module.__dict__["_load_lib"] = load_if_possible


def _execute_torchcodec(loader: Loader, module: ModuleType) -> None:
    """Raise ImportError, which its users expect from an optional package, in place of OSError."""
    try:
        loader.exec_module(module)
    except OSError as error:
        if not _torch_is_cpu_build():
            raise
        message = f"torchcodec does not work beside this CPU build of torch: {error}"
        raise ImportError(message, name="torchcodec") from error


_EXECUTE = {
    "torchaudio._extension.utils": _execute_torchaudio_utils,
    "torchcodec": _execute_torchcodec,
}


def _torch_is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None


def declare_missing_ops() -> list[str]:
    """Declare the torchvision operators that torch does not know; a no-op beside a CUDA torch.

    Returns:
        The names declared by this call, empty when there was nothing to do.
    """
    import torch

    if not _torch_is_cpu_build():
        return []
    missing = [name for name in TORCHVISION_SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        # FRAGMENT, since another shim in this process may own the library: a second DEF raises.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(TORCHVISION_SCHEMAS[name])
        _libraries.append(library)
    return missing


def install() -> None:
    """Add the finder to this interpreter, once, however often and under whichever name called."""
    # By name: a child process has this module as a top-level one and as part of mmedx_fast.
    if not any(type(finder).__name__ == TorchCompanionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchCompanionFinder())
