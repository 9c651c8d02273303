"""Every example is short, and runs here as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What an example needs beside torch; one whose package is missing cannot run.
NEEDS = {"trl_guidelines": "trl", "verl_gba": "verl", "merge_adapters": "peft"}


def test_there_is_one_for_each_way_in() -> None:
    assert {path.stem for path in EXAMPLES} == {
        *("op_alone", "grpo_loop", "merge_adapters"),
        *("trl_guidelines", "verl_gba"),
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    if needed := NEEDS.get(path.stem):
        pytest.importorskip(needed)
    done = subprocess.run(
        [sys.executable, "-P", str(path)],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")]
            ),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_start_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name}" in text.split('"""')[1]
