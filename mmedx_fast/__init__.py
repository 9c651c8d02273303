"""mmedx-fast: a performance-focused trainer for MMedExpert-R1 and the fused ops it is built from."""

__version__ = "0.1.0"
