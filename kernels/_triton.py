"""What the Triton files share: the import, the interpreter, and a kernel described for a compile without a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton

# Fixed when Triton is imported: its own library functions are decorated then.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETING:
    # Asked again where a kernel is decorated or runs; by then the variable may be gone.
    triton.knobs.runtime.interpret = True
# Contracting a * b + c into one rounding is Triton's default until 3.9 and off from 3.10 on; said
# explicitly, so that the bits do not change with the version.
FP_FUSION = True


@dataclass(frozen=True)
class CompileCase:
    """One production configuration of a kernel, enough to compile it for a chip that is not here.

    ``bench/compile_kernels.py`` compiles every module's ``COMPILE_CASES`` and reads registers,
    spills, shared memory and matrix instructions from the binary.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Triton types of the run-time arguments by name, e.g. ``{"z": "*fp32", "n": "i32"}``."""
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    """Run-time arguments that are multiples of 16 in production (pointers, strides)."""
    matrix: bool = False
    """The kernel must use matrix instructions."""
    options: Mapping[str, Any] = field(default_factory=dict)


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Keyword arguments of a launch that :class:`CompileCase` compiles alike."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": FP_FUSION}
