"""The commands under torchrun and deepspeed: two ranks end where one process ends."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmedx_fast.config import load_config
from mmedx_fast.metrics import read_metrics, without_times
from mmedx_fast.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "demo.yaml")
SMALL = [
    "phantom.train=40",
    "phantom.validation=20",
    "phantom.test=20",
    "dsa.specialties=[pediatrics]",
    "dsa.steps=2",
    "dsa.questions_per_step=2",
    "gba.steps=3",
    "gba.save_steps=1",
    "gba.questions_per_step=3",
    "gba.filter_zero_variance=false",
    "gba.guidelines=[bayesian, intuitive]",
    "rollout.num_generations=2",
    "rollout.temperature=2.0",
    "rollout.max_completion_length=24",
    "eval.max_completion_length=24",
    f"gba.rewards=[{{name: '{ROOT}/bench/kill.py:by_place'}}]",
    "deepspeed.zero_optimization.stage=2",
]


def environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)  # deepspeed's launcher starts python by name
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]),
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


def launcher(name: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = str(Path(sys.executable).parent / name)
    if name == "torchrun":
        return [program, "--nproc_per_node=2", f"--master_port={port}", "-m", "mmedx_fast.cli"]
    return [program, "--num_gpus=2", f"--master_port={port}", "--module", "mmedx_fast.cli"]


def command(start: list[str], verb: str, folder: Path, *more: str) -> list[str]:
    return [*start, verb, CONFIG, f"run_dir={folder}", *SMALL, *more]


def run(start: list[str], verb: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(start, verb, folder, *more),
        env=environment(),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


def kill_after_step(folder: Path, step: int) -> None:
    """Start GBA on two ranks and kill -9 all of it once that step is saved."""
    with open(folder.parent / "killed.log", "w") as log:
        process = subprocess.Popen(
            command(launcher("torchrun"), "gba", folder),
            env=environment(),
            cwd=folder.parent,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    saved = folder / "gba" / "checkpoints" / f"step-{step:06d}"
    limit = time.monotonic() + 500
    while not saved.exists():
        assert process.poll() is None, (folder.parent / "killed.log").read_text()[-3000:]
        assert time.monotonic() < limit, "the run never saved the step"
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    for pid in [process.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    single = [sys.executable, "-m", "mmedx_fast.cli"]
    done = run(single, "gba", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    done = run(single, "eval", folder, "--only=rl")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks, killed after its first step and gone on with."""
    folder = tmp_path_factory.mktemp("two") / "run"
    kill_after_step(folder, 1)
    done = run(launcher("torchrun"), "gba", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("reward ") == 1, "only rank 0 speaks"
    return folder


def metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    return without_times(read_metrics(folder / stage / "metrics.jsonl"))


def test_two_ranks_train_what_one_process_trains(one_process: Path, two_ranks: Path) -> None:
    for stage in ("dsa/pediatrics", "gba"):
        ours, theirs = metrics(two_ranks, stage), metrics(one_process, stage)
        assert any(row["grad_norm"] > 1e-3 for row in theirs)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            for key, value in other.items():
                # A row's bounds and the cache's hits differ with what a rank has to do.
                if key in ("tokens_saved", "prefix_cache_hit_rate") or math.isnan(value):
                    continue
                assert mine[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (stage, key)


def test_the_deepspeed_launcher_goes_on_with_it(one_process: Path, two_ranks: Path) -> None:
    done = run(launcher("deepspeed"), "eval", two_ranks, "--only=rl")
    assert done.returncode == 0, done.stderr[-4000:]

    def answers(folder: Path) -> list[tuple[str, str]]:
        lines = (folder / "eval" / "rl" / "predictions.jsonl").read_text().splitlines()
        return [(row["id"], row["completion"]) for row in map(json.loads, lines)]

    ours, theirs = answers(two_ranks), answers(one_process)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    # The adapters differ by rounding, which may turn a tie between two tokens.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.9 * len(ours)


def test_a_folder_in_use_stops_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder.open(load_config(CONFIG, [f"run_dir={folder}", *SMALL])):
        done = run(launcher("torchrun"), "dsa", folder)
    assert done.returncode != 0
    assert f"mmedx: {folder} is in use by process {os.getpid()}" in done.stderr
    assert "rank 1: rank 0 stopped" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
