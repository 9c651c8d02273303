"""Checks of operands that several ops make."""

from __future__ import annotations

import torch
from torch import Tensor


def check_integers(name: str, x: Tensor, what: str) -> None:
    """Raise ValueError unless ``x`` is of an integer dtype: a bool is a mask, and its 0 and 1 are no ids;
    floats would be cut, and of complex numbers the real part taken."""
    if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} must be of an integer dtype: {what}; got {x.dtype}")
