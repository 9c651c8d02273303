"""mmedx-fast: a performance-focused trainer for MMedExpert-R1 and the fused ops it is built from."""

from mmedx_fast._env import prepare_environment

__version__ = "0.1.0"
__all__ = ["__version__", "prepare_environment"]
