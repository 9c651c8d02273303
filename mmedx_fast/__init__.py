"""mmedx-fast: a performance-focused trainer for MMedExpert-R1 and the fused ops it is built from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedx_fast._env import prepare_environment

__version__ = "0.1.0"
__all__ = ["__version__", "prepare_environment"]


def __getattr__(name: str) -> Any:
    """``prepare_environment`` is imported when it is asked for: the ops need nothing of it."""
    if name != "prepare_environment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmedx_fast._env import prepare_environment

    return prepare_environment
