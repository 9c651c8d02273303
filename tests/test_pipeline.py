"""The whole program as a user starts it: unbroken, killed at three places and gone on, and misused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.kill import results
from mmedx_fast.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "phantom.train=48",
    "phantom.validation=20",
    "phantom.test=24",
    "dsa.steps=4",
    "dsa.save_steps=2",
    "dsa.questions_per_step=2",
    "gba.steps=4",
    "gba.save_steps=1",
    "gba.questions_per_step=2",
    "gba.loss.beta=0.01",
    "gba.filter_zero_variance=false",
    "rollout.num_generations=2",
    "rollout.temperature=2.0",
    "rollout.max_completion_length=24",
    "eval.max_completion_length=24",
    f"gba.rewards=[{{name: '{ROOT}/bench/kill.py:by_place'}}]",
]


def command(verb: str, folder: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "demo.yaml")
    program = [sys.executable, "-m", "mmedx_fast.cli", verb, config]
    return [*program, f"run_dir={folder}", *SMALL, *more]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    }


def run(verb: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(verb, folder, *more),
        env=environment(),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


def kill_when(folder: Path, reached: Callable[[], bool], sent: int = signal.SIGKILL) -> int:
    """Start the run, end it as soon as ``reached`` is true; returns its exit code."""
    with open(folder.parent / "killed.log", "a") as log:
        process = subprocess.Popen(
            command("run", folder), env=environment(), cwd=folder.parent, stdout=log, stderr=log
        )
        limit = time.monotonic() + 600
        while not reached():
            assert process.poll() is None, (folder.parent / "killed.log").read_text()[-3000:]
            assert time.monotonic() < limit, "the run never came to the place to kill it at"
            time.sleep(0.02)
        process.send_signal(sent)
        return process.wait(timeout=120)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = run("run", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "macro" in done.stdout and "report.html" in done.stdout
    return folder


def test_run_leaves_what_it_promises(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    models = ["base", "adult_medicine", "pediatrics", "brain_senses", "oncology_surgery"]
    models += ["rl_start", "rl", "merged"]
    assert list(summary["macro_accuracy"]) == models
    assert all(len(by) == 4 for by in summary["accuracy"].values())
    assert set(summary["seconds"]) == {"dsa", "gba", "caci", "eval"}
    assert summary["seed"] == 0 and "torch" in summary["versions"]
    assert 0 < summary["start_energy_kept"] <= 1
    for name in ("config.yaml", "report.html", "caci/conflicts.png", "gba/adapter", "caci/merged"):
        assert (unbroken / name).exists(), name
    assert list((unbroken / "tb").rglob("events.out.tfevents.*"))


def test_the_small_run_learns_something(unbroken: Path) -> None:
    """Else a run that goes on could not be told from one that has lost its optimizer."""
    for stage in ("dsa/pediatrics", "gba"):
        rows = read_metrics(unbroken / stage / "metrics.jsonl")
        assert sum(row["grad_norm"] > 1e-3 for row in rows) >= 3, stage


def test_engine_and_trainer_agree(unbroken: Path) -> None:
    for row in read_metrics(unbroken / "gba" / "metrics.jsonl"):
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["tokens_saved"] > 1.3


def test_run_again_does_nothing_and_says_the_same(unbroken: Path) -> None:
    before = results(unbroken)
    stamp = (unbroken / "gba" / "done.json").stat().st_mtime_ns
    assert run("run", unbroken).returncode == 0
    assert results(unbroken) == before
    assert (unbroken / "gba" / "done.json").stat().st_mtime_ns == stamp


def test_killed_in_every_stage_gives_the_same_numbers(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    expert = folder / "dsa" / "pediatrics"
    kill_when(folder, lambda: lines(expert / "metrics.jsonl") >= 3)
    assert not (expert / "done.json").exists()
    kill_when(folder, lambda: lines(folder / "gba" / "metrics.jsonl") >= 2)
    assert not (folder / "gba" / "done.json").exists()
    kill_when(folder, lambda: (folder / "caci" / "candidates").exists())
    assert not (folder / "caci" / "done.json").exists()
    done = run("run", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results(folder) == results(unbroken)


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    expert = folder / "dsa" / "adult_medicine"
    code = kill_when(folder, lambda: lines(expert / "metrics.jsonl") >= 1, signal.SIGINT)
    assert code == 130
    said = (tmp_path / "killed.log").read_text()
    assert "Go on with: mmedx run" in said and "it is saved" in said
    assert list((expert / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gba.stepz=3", "gba.stepz: unknown key; did you mean 'steps'?"),
        ("gba.steps=many", "gba.steps:"),
        ("gba.guidelines=[hunch]", "hunch"),
        ("data.train=nowhere", "nowhere"),
        ("model.path=no/such/model", "no/such/model"),
        ("lora.r=999", "max_lora_rank"),
    ],
)
def test_bad_settings_end_with_a_message_and_no_traceback(
    tmp_path: Path, override: str, message: str
) -> None:
    done = run("dsa", tmp_path / "run", override)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_two_runs_in_one_folder(unbroken: Path) -> None:
    from mmedx_fast.config import load_config
    from mmedx_fast.run_folder import RunFolder

    cfg = load_config(unbroken / "config.yaml")
    with RunFolder.open(cfg):
        done = run("report", unbroken)
    assert done.returncode == 2 and str(os.getpid()) in done.stderr


def test_reward_that_raises_names_itself(tmp_path: Path, unbroken: Path) -> None:
    rewards = tmp_path / "mine.py"
    rewards.write_text("def broken(completions, **kwargs):\n    raise KeyError('no such column')\n")
    spec = f"gba.rewards=[{{name: '{rewards}:broken'}}]"
    done = run("gba", tmp_path / "run", spec, f"dsa.reuse={unbroken}")
    assert done.returncode == 2
    assert "broken" in done.stderr and "no such column" in done.stderr


def test_prompts_longer_than_allowed_are_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("dsa", folder, "data.max_prompt_length=100")
    assert done.returncode == 2 and "rejected-train.jsonl" in done.stderr
    rejected = [json.loads(x) for x in (folder / "data" / "rejected-train.jsonl").open()]
    assert len(rejected) == 48 and "max_prompt_length" in rejected[0]["reason"]


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    began = time.monotonic()
    probe = (
        "import sys, mmedx_fast.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic', 'vllm'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", probe], env=environment(), check=True, capture_output=True
    )
    assert time.monotonic() - began < 10  # what it loads is the assertion; a loaded machine is slow


def medxpertqa_folder(folder: Path) -> Path:
    """Four questions exactly as MedXpertQA-MM has them on disk: options repeated in the stem, several
    images of several kinds (one of them DICOM), no specialty, no trace."""
    import shutil

    from PIL import Image
    from pydicom.data import get_testdata_file

    images = folder / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (90, 130), "gray").save(images / "MM-1-a.jpeg")
    Image.new("L", (64, 64), 80).save(images / "MM-1-b.png")
    shutil.copyfile(str(get_testdata_file("CT_small.dcm")), images / "MM-2-a.dcm")
    options = {"A": "pneumonia", "B": "stroke", "C": "scurvy", "D": "melanoma", "E": "rickets"}
    told = "\nAnswer Choices: " + " ".join(f"({k}) {v}" for k, v in options.items())
    rows = []
    for number, names in enumerate([["MM-1-a.jpeg", "MM-1-b.png"], ["MM-2-a.dcm"]] * 2):
        rows.append(
            {
                "id": f"MM-{number}",
                "question": f"A {30 + number}-year-old man has a cough. What is it?{told}",
                "options": options,
                "label": "ABCD"[number],
                "images": names,
                "medical_task": "Diagnosis",
                "body_system": "Respiratory",
                "question_type": "Reasoning",
            }
        )
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_real_formats_go_through_the_same_pipeline(tmp_path: Path) -> None:
    from mmedx_fast.data.phantom import write_phantom

    train = write_phantom(tmp_path / "mine", train=24, validation=20, test=20, seed=5)
    test = medxpertqa_folder(tmp_path / "MM")
    folder = tmp_path / "run"
    data = [f"data.train={train}", f"data.test={test}", "data.max_prompt_length=512"]
    done = run("eval", folder, *data, "data.answer_format=letter", "--only", "base")
    assert done.returncode == 0, done.stderr[-3000:]
    path = folder / "eval" / "base" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(row["images"]) for row in rows] == [2, 1, 2, 1]
    assert {row["specialty"] for row in rows} == {"adult_medicine"}
    assert not any("Answer Choices" in row["question"] for row in rows)
