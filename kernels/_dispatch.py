"""The one place that chooses between the plain torch and the Triton implementation of an op.

An op's module registers its torch implementation; a Triton one may be registered beside it under
the same name and with the same signature. ``MMEDX_KERNELS`` picks:

- ``auto`` (default): Triton where one is registered, usable on the tensors' device and made for
  their sizes, torch otherwise. Each reason for falling to torch is logged once per op (logger
  ``mmedx_fast.kernels``).
- ``torch``: always torch.
- ``triton``: Triton or an error that names the op and what is missing.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

logger = logging.getLogger("mmedx_fast.kernels")

ENV = "MMEDX_KERNELS"
MODES = ("auto", "torch", "triton")

Op = Callable[..., Any]
F = TypeVar("F", bound=Op)


@dataclass(frozen=True)
class _Triton:
    """A registered Triton implementation; ``refuse(device)`` returns why it cannot run there, or
    None."""

    fn: Op
    refuse: Callable[[torch.device], str | None]
    limit: str


_torch_ops: dict[str, Op] = {}
_triton_ops: dict[str, _Triton] = {}
_said: set[tuple[str, str]] = set()


def register_torch(op: str) -> Callable[[F], F]:
    """Decorator: make the function the plain torch implementation of ``op``."""

    def keep(fn: F) -> F:
        _torch_ops[op] = fn
        return fn

    return keep


def triton_is_installed() -> bool:
    """Whether ``triton`` can be found, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook may refuse it
        return False


def needs_cuda(device: torch.device) -> str | None:
    """The usual condition of a Triton op: a CUDA tensor and an importable ``triton``.

    CPU tensors are taken under Triton's interpreter (``TRITON_INTERPRET=1``) when
    ``MMEDX_KERNELS=triton`` asks for it: that is how the kernels are tested without a GPU.
    """
    if not triton_is_installed():
        return "the triton package is not installed"
    interpreted = device.type == "cpu" and interpreting() and mode() == "triton"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, Triton needs cuda"
    return None


def interpreting() -> bool:
    """Triton was imported under ``TRITON_INTERPRET=1`` (what the variable says later changes nothing)."""
    module = sys.modules.get(f"{__package__}._triton")
    if module is not None:
        return bool(module.INTERPRETING)
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def register_triton(
    op: str, refuse: Callable[[torch.device], str | None] = needs_cuda, limit: str = ""
) -> Callable[[F], F]:
    """Decorator: make the function the Triton implementation of ``op``, with the torch one's
    signature. ``limit`` says which calls it cannot take (``resolve``'s ``beyond``)."""

    def keep(fn: F) -> F:
        _triton_ops[op] = _Triton(fn, refuse, limit)
        return fn

    return keep


def mode() -> str:
    """The value of ``MMEDX_KERNELS`` (read at every call, so that a test or a user may change it).

    Raises ValueError for anything but auto, torch or triton.
    """
    value = os.environ.get(ENV, "auto").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"{ENV}={value!r} is not known: set it to one of {', '.join(MODES)}")
    return value


def _why_not_triton(op: str, device: torch.device) -> str | None:
    entry = _triton_ops.get(op)
    if entry is None:
        return "no Triton implementation is registered for it"
    return entry.refuse(device)


def resolve(op: str, device: torch.device, beyond: str | None = None) -> Op:
    """The implementation of ``op`` for tensors on ``device``. ``beyond`` says why its Triton kernels
    cannot take this call, if they cannot.

    Raises KeyError for an op nobody registered, RuntimeError if ``MMEDX_KERNELS=triton`` cannot be
    honoured.
    """
    wanted = mode()
    if wanted == "torch":
        return _torch_ops[op]
    reason = _why_not_triton(op, device) or beyond
    if reason is None:
        return _triton_ops[op].fn
    if wanted == "triton":
        raise RuntimeError(
            f"{ENV}=triton, but {op} cannot use Triton: {reason}. Set {ENV}=auto or {ENV}=torch."
        )
    if (op, reason) not in _said:
        _said.add((op, reason))
        logger.info("%s runs in plain torch: %s", op, reason)
    return _torch_ops[op]


@dataclass(frozen=True)
class Path:
    """Which implementation an op takes, and why not the other."""

    op: str
    implementation: str  # "triton" or "torch"
    reason: str  # empty where Triton is taken
    limit: str = ""  # what Triton can take, where it is taken: calls beyond it run in torch


def paths(device: torch.device) -> list[Path]:
    """The path of every registered op for tensors on ``device`` (``mmedx doctor`` prints it)."""
    found = []
    for op in sorted(_torch_ops):
        reason = f"{ENV}=torch" if mode() == "torch" else _why_not_triton(op, device)
        if reason:
            found.append(Path(op, "torch", reason))
        else:
            found.append(Path(op, "triton", "", _triton_ops[op].limit))
    return found
