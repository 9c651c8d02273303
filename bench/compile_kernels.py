"""Compile every Triton kernel for chips that are not here, and read what the binary says.

    python bench/compile_kernels.py [--arch 80 90 100] [--only NAME] [--first | --heaviest]
        [--json FILE] [--markdown FILE]

Needs no GPU: Triton's own compiler, ptxas and cuobjdump make and read the binary. Each row gives
registers a thread, bytes of stack a thread (a spill), spill instructions, shared memory, matrix
instructions. Exit status 1 if a kernel spills, exceeds the chip's shared memory, or lacks the matrix
instructions it is meant to have.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmedx_fast.kernels._triton import CompileCase, launch_options  # noqa: E402

MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("_*_triton.py"))
# Shared memory a block may take, bytes (CUDA programming guide, technical specifications).
SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
RECORDED = ROOT / "bench/results/compiled-triton-3.9.json"
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|IGMMA|QGMMA|DMMA|IMMA)\b")
SPILL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Row:
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    problem: str


def cases() -> list[CompileCase]:
    """Every module's production configurations."""
    found: list[CompileCase] = []
    for name in MODULES:
        found.extend(importlib.import_module(f"mmedx_fast.kernels.{name}").COMPILE_CASES)
    return found


def first_of_each(found: list[CompileCase]) -> list[CompileCase]:
    """The first configuration of every kernel."""
    by_kernel: dict[str, CompileCase] = {}
    for case in found:
        by_kernel.setdefault(case.kernel.__name__, case)
    return list(by_kernel.values())


def heaviest_of_each(found: list[CompileCase]) -> list[CompileCase]:
    """The configuration of every kernel that took the most registers when ``RECORDED`` was made."""
    registers: dict[str, int] = {}
    for row in json.loads(RECORDED.read_text()):
        registers[row["kernel"]] = max(row["registers"], registers.get(row["kernel"], 0))
    ordered = sorted(found, key=lambda case: -registers.get(case.name, 0))
    return first_of_each(ordered)


def compile_case(case: CompileCase, arch: int) -> Any:
    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    constants = {(names.index(n),): value for n, value in case.constexprs.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, signature, constants, attrs)
    options = launch_options(case.num_warps, case.num_stages) | dict(case.options)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(case: CompileCase, arch: int) -> Row:
    compiled = compile_case(case, arch)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools / "cuobjdump", "-res-usage", file.name])
        code = _output([tools / "nvdisasm", "-c", file.name])
    registers = max(int(x) for x in re.findall(r"REG:(\d+)", usage))
    stack = max(int(x) for x in re.findall(r"STACK:(\d+)", usage))
    spills, matrix = len(SPILL.findall(code)), len(MATRIX.findall(code))
    shared = int(compiled.metadata.shared)
    problems = []
    if stack or spills:
        problems.append(f"spills {stack} B of stack, {spills} instructions")
    if shared > SHARED[arch]:
        problems.append(f"{shared} B of shared memory, the chip has {SHARED[arch]}")
    if case.matrix and not matrix:
        problems.append("no matrix instruction")
    return Row(
        case.name, arch, case.num_warps, case.num_stages, registers, stack, spills, shared, matrix,
        "; ".join(problems),
    )  # fmt: skip


def _output(command: list[Any]) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def markdown(rows: list[Row]) -> str:
    lines = [
        f"Compiled with Triton {triton.__version__}: registers a thread, stack and shared memory in bytes.",
        "",
        "| kernel | chip | warps | stages | registers | stack | spills | shared | matrix instr. |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.kernel} | sm_{r.arch} | {r.warps} | {r.stages} | {r.registers} | {r.stack} | "
        f"{r.spills} | {r.shared} | {r.matrix} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--first", action="store_true", help="one configuration a kernel")
    some.add_argument(
        "--heaviest", action="store_true", help="of every kernel the one with the most registers"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    found = cases()
    if options.first or options.heaviest:
        found = (first_of_each if options.first else heaviest_of_each)(found)
    chosen = [case for case in found if options.only in case.name]
    rows = [measure(case, arch) for case in chosen for arch in options.arch]
    if not rows:
        print(f"no kernel's name contains {options.only!r}", file=sys.stderr)
        return 2
    table = markdown(rows)
    print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table)
    failed = [row for row in rows if row.problem]
    for row in failed:
        print(f"{row.kernel} on sm_{row.arch}: {row.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
