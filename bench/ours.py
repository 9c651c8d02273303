"""Our own second provider: the plain torch path, where the first one takes Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from bench.registry import Call, Outputs, Provider, Sizes
from mmedx_fast.kernels import _dispatch


def path_of(op: str, device: torch.device) -> str:
    """``triton`` or ``torch``: what the op takes on the device now; ``interpreted`` is Triton on a CPU."""
    path = next((p.implementation for p in _dispatch.paths(device) if p.op == op), "torch")
    return "interpreted" if path == "triton" and device.type == "cpu" else path


def plain_torch(
    make: Callable[[Any], Call], op: str, unsuited: Callable[[Sizes], str | None] = lambda s: None
) -> Provider:
    """The provider "ours (torch)": the same call under MMEDX_KERNELS=torch."""

    def lacking(sizes: Sizes) -> str | None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        same = path_of(op, device) == "torch"
        return "ours is the plain torch path here" if same else unsuited(sizes)

    def made(inputs: Any) -> Call:
        inner = make(inputs)

        def call() -> Outputs:
            before = os.environ.get(_dispatch.ENV)
            os.environ[_dispatch.ENV] = "torch"
            try:
                return inner()
            finally:
                if before is None:
                    del os.environ[_dispatch.ENV]
                else:
                    os.environ[_dispatch.ENV] = before

        return call

    return Provider("ours (torch)", made, lacking=lacking)
