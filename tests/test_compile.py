"""Every kernel compiles for chips that are not here, within their registers and shared memory."""

import json
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench/compile_kernels.py"
KERNELS = {
    "advantage": False,
    "row_stats": False,
    "row_dlogits": False,
    "row_policy": False,
    "lora_sample": True,
    "lora_count": True,
    "lora_apply": True,
}  # name -> uses matrix instructions


REGISTERS = itemgetter("registers")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMEDX_KERNELS")
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_production_configuration_of_every_kernel_compiles_for_three_chips(
    tmp_path: Path,
) -> None:
    """All of them, some ten minutes: ``python bench/compile_kernels.py``. The table is kept in .benchmarks."""
    table = ROOT / ".benchmarks" / "compiled.md"
    table.parent.mkdir(exist_ok=True)
    done = run("--first", "--json", str(tmp_path / "rows.json"), "--markdown", str(table))
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    for kernel, matrix in KERNELS.items():
        mine = [row for row in rows if row["kernel"].startswith(kernel)]
        assert {row["arch"] for row in mine} == {80, 90, 100}, kernel
        for row in mine:
            assert row["stack"] == row["spills"] == 0 and 0 < row["registers"] <= 255, row
            assert bool(row["matrix"]) == (matrix and "fp32" not in row["kernel"]), row
    assert "sm_90" in table.read_text()


@pytest.mark.slow
def test_the_heaviest_configuration_of_every_kernel_does_not_spill(tmp_path: Path) -> None:
    done = run("--heaviest", "--arch", "80", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    recorded = json.loads((ROOT / "bench/results/compiled-triton-3.9.json").read_text())
    for kernel in KERNELS:
        most = max((r for r in recorded if r["kernel"].startswith(kernel)), key=REGISTERS)
        assert most["kernel"] in {row["kernel"] for row in rows}, kernel


def test_a_name_that_no_kernel_has_is_an_error() -> None:
    done = run("--only", "no such kernel")
    assert done.returncode == 2 and "no such kernel" in done.stderr
