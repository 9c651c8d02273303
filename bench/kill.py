"""Kill a run at random moments and go on: ``python bench/kill.py --kills 20 --seed 0``.

The small pipeline (tiny model, phantom clinic) runs once unbroken. Then it runs again and again, each start
ended by SIGKILL after a random share of the unbroken run's seconds, until the run is through; as many runs
as it takes for all kills. Every run must end with the metrics, predictions and summary of the unbroken
one, clock readings aside. Prints where each kill struck; exits 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedx_fast.meter import render_table
from mmedx_fast.metrics import read_metrics, without_times

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "phantom.train=48",
    "phantom.validation=20",
    "phantom.test=24",
    "dsa.steps=4",
    "dsa.save_steps=2",
    "dsa.questions_per_step=2",
    "gba.steps=6",
    "gba.save_steps=2",
    "gba.questions_per_step=2",
    "gba.loss.beta=0.01",
    "gba.filter_zero_variance=false",
    "rollout.num_generations=2",
    "rollout.temperature=2.0",
    "rollout.max_completion_length=24",
    "eval.max_completion_length=24",
    f"gba.rewards=[{{name: '{Path(__file__).resolve()}:by_place'}}]",
)
_CLOCKS = ("seconds", "phases", "tokens")
"""Keys of the summary that count what a killed run did twice."""


def by_place(completions: list[str], **columns: Any) -> list[float]:
    """The run's reward: different for a question's answers, whatever they say. Answers of a few tokens would
    all earn nothing, and a run without gradients could lose its optimizer unseen."""
    return [place * 7 % 5 / 4 for place, _ in enumerate(completions)]


@dataclass(frozen=True)
class Start:
    """One start of a run and how it ended."""

    run: int
    seconds: float
    killed: bool
    place: str


def results(folder: Path) -> dict[str, Any]:
    """Everything a finished run computed, less clock readings and places on disk."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): without_times(read_metrics(path))
        for path in sorted(folder.glob("**/metrics.jsonl"))
    }
    for path in sorted(folder.glob("eval/*/predictions.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.pop("images", None)
        found[str(path.relative_to(folder))] = rows
    for path in folder.glob("caci/conflicts.json"):
        found["caci/conflicts.json"] = json.loads(path.read_text())
    summary = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = {k: v for k, v in summary.items() if k not in _CLOCKS}
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the files whose content differs, missing ones included; NaN equals NaN."""
    return [
        name
        for name in sorted({*found, *wanted})
        if json.dumps(found.get(name), sort_keys=True)
        != json.dumps(wanted.get(name), sort_keys=True)
    ]


def place(folder: Path) -> str:
    """How far a run has come, from what lies in its folder."""
    if not (folder / "config.yaml").exists():
        return "before the first file"
    for path in sorted(folder.rglob(".mmedx-tmp.*")):
        return f"writing {path.name.split('.', 3)[3]}"
    stages = sorted(folder.rglob("stage.json"), key=lambda path: path.stat().st_mtime)
    if not stages:
        return "before the first stage"
    stage = stages[-1].parent
    name = stage.relative_to(folder)
    if (stage / "done.json").exists():
        return f"after {name}"
    rows = stage / "metrics.jsonl"
    return f"{name}, {rows.read_bytes().count(10) if rows.exists() else 0} lines of metrics"


def start(
    folder: Path, options: argparse.Namespace, kill_after: float | None = None
) -> tuple[bool, float]:
    """Start (or go on with) the run; returns whether it was killed, and its seconds.

    Raises RuntimeError with the end of its output when it fails by itself.
    """
    command = [sys.executable, "-m", "mmedx_fast.cli", "run", options.config]
    command += [f"run_dir={folder}", *SMALL, *options.overrides]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = folder.with_suffix(".log")
    began = time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": path}
        )
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        end = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"the run in {folder} ended with code {code}:\n{end}")
    return code != 0, time.monotonic() - began


def broken_run(
    number: int,
    folder: Path,
    options: argparse.Namespace,
    rng: random.Random,
    kills: int,
    length: float,
) -> list[Start]:
    """Run to the end through at most ``kills`` kills, each within ``length`` seconds of a start."""
    starts: list[Start] = []
    while True:
        moment = rng.uniform(0, length) if kills > len(starts) else None
        killed, seconds = start(folder, options, moment)
        starts.append(Start(number, seconds, killed, place(folder) if killed else "the end"))
        print(f"run {number}: {seconds:6.1f} s, {starts[-1].place}", flush=True)
        if not killed:
            return starts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one unless given")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mmedx-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    _, length = start(folder / "unbroken", options)
    wanted = results(folder / "unbroken")
    norms = [row["grad_norm"] for row in wanted["gba/metrics.jsonl"]]
    if not all(norm > 1e-3 for norm in norms):
        print(f"the unbroken run learns nothing: gradient norms {norms}")
        return 1
    print(f"unbroken: {length:.1f} s, {len(wanted)} files compared ({folder})", flush=True)
    starts: list[Start] = []
    failed: dict[int, list[str]] = {}
    while (left := options.kills - sum(s.killed for s in starts)) > 0:
        number = 1 + (starts[-1].run if starts else 0)
        broken = folder / f"run-{number}"
        starts += broken_run(number, broken, options, rng, left, length)
        failed[number] = differences(results(broken), wanted)
        print(f"run {number} differs in {', '.join(failed[number]) or 'nothing'}", flush=True)
    print(
        render_table(
            ["run", "kills", "killed at", "differs from the unbroken run in"],
            [
                [
                    n,
                    sum(s.killed for s in starts if s.run == n),
                    "; ".join(s.place for s in starts if s.run == n and s.killed),
                    ", ".join(names) or "nothing",
                ]
                for n, names in failed.items()
            ],
        )
    )
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
