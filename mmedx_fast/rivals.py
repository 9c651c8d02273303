"""Who has replaced functions of transformers in this process.

Liger, unsloth and trainers assign their own functions to transformers' classes and modules at import or on
demand. Which of them are there decides what a measured speed or a difference in results means.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

RIVALS = (
    *(
        "liger_kernel",
        "unsloth",
        "unsloth_zoo",
        "unsloth_compiled_module",
        "unsloth_compiled_cache",
    ),
    *("verl", "swift", "axolotl", "cut_cross_entropy", "llamafactory"),
)
OURS = "mmedx_fast"


@dataclass(frozen=True)
class Patch:
    """A name of transformers that belongs to somebody else."""

    where: str
    by: str
    """The module that the function in place comes from."""

    @property
    def ours(self) -> bool:
        """Put there by this project (``model.use_liger_kernel``)."""
        return self.by.partition(".")[0] == OURS


def active_patches(model: Any = None) -> list[Patch]:
    """Patches on the modules of transformers that this process has loaded, and on `model`'s own modules
    (a ``torch.nn.Module``). Imports nothing."""
    found = [
        patch
        for name, module in sorted(sys.modules.items())
        if name.startswith("transformers.") and isinstance(module, ModuleType)
        for patch in _of_module(name, module)
    ]
    for name, part in model.named_modules() if model is not None else ():
        by = _owner(vars(part).get("forward"))
        if by is not None:
            found.append(Patch(f"{name}.forward", by))
    return found


def _of_module(name: str, module: ModuleType) -> Iterator[Patch]:
    for key, value in list(vars(module).items()):
        by = _owner(value)
        if by is not None:
            yield Patch(f"{name}.{key}", by)
        elif isinstance(value, type) and value.__module__ == name:
            for attribute, member in list(vars(value).items()):
                by = _owner(member)
                if by is not None:
                    yield Patch(f"{name}.{key}.{attribute}", by)


def _owner(value: Any) -> str | None:
    """The rival's (or our) module that a function or class comes from, None for anybody else's."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    if not callable(value):
        return None
    module = getattr(value, "__module__", None)
    if not isinstance(module, str):
        return None
    top = module.partition(".")[0]
    return module if top == OURS or top.startswith(RIVALS) else None
