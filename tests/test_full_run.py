"""A whole run whose RL trains every weight: engine and trainer agree, killed and gone on, merged, evaluated."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from mmedx_fast.metrics import read_metrics

_file = Path(__file__).with_name("test_pipeline.py")
_spec = importlib.util.spec_from_file_location("helper_test_pipeline", _file)
assert _spec is not None and _spec.loader is not None
pipeline = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pipeline)

pytestmark = pytest.mark.slow
FULL = [
    "gba.finetuning_type=full",
    "gba.loss.beta=0",
    "rollout.temperature=2.0",
    "rollout.max_completion_length=24",
    "eval.max_completion_length=24",
    "gba.start=pediatrics",
    "gba.steps=3",
    "gba.questions_per_step=2",
    "gba.optimizer.learning_rate=0.001",
    "gba.max_shard_size=2000000",
    "dsa.specialties=[pediatrics, brain_senses]",
    "dsa.steps=2",
    "dsa.optimizer.learning_rate=0.0001",
    "caci.density=[0.7]",
    "caci.scale=[1.0]",
    "caci.rl_weight=[1.0, 2.0]",
    "caci.selection_limit=8",
    "eval.models=[rl_start, rl, merged]",
    "phantom.train=24",
    "phantom.test=20",
]


@pytest.fixture(scope="module", autouse=True)
def small_run(tmp_path_factory: pytest.TempPathFactory):
    """The pipeline's helpers start this run, with a reward that differs between any two answers."""
    rewards = tmp_path_factory.mktemp("rewards") / "mine.py"
    rewards.write_text(
        "import hashlib\n\n\ndef drawn(completions, **kwargs):\n"
        "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [hashlib.sha256(t.encode()).digest()[0] / 255 for t in texts]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        reward = f"gba.rewards=[{{name: '{rewards}:drawn'}}]"
        patch.setattr(pipeline, "SMALL", [*pipeline.SMALL, *FULL, reward])
        yield


@pytest.fixture(scope="module")
def unbroken(small_run: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = pipeline.run("run", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_engine_and_trainer_agree_after_every_update(unbroken: Path) -> None:
    rows = read_metrics(unbroken / "gba" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["grad_norm"] > 0.1 and row["tokens_saved"] > 1.3


def test_the_run_leaves_whole_models(unbroken: Path) -> None:
    from safetensors import safe_open

    from mmedx_fast.model_files import tensor_files
    from mmedx_fast.tiny import assets_folder

    model = unbroken / "gba" / "model"
    assert not (unbroken / "gba" / "adapter").exists() and not (unbroken / "gba" / "sync").exists()
    files = tensor_files(model)
    assert files.keys() == tensor_files(assets_folder()).keys() and len(set(files.values())) > 2
    for name in ("config.json", "tokenizer.json", "processor_config.json", "base_model.json"):
        assert (model / name).is_file()

    def tensor(folder: Path, name: str):
        with safe_open(tensor_files(folder)[name], "pt") as opened:
            return opened.get_tensor(name)

    for name in ("lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.q_proj.bias"):
        base, rl = tensor(assets_folder(), name).float(), tensor(model, name)
        merged = tensor(unbroken / "caci" / "merged", name)
        assert 1e-5 < float((rl - base).abs().max()) < 0.1
        assert 1e-5 < float((merged - base).abs().max()) < 0.1
    conflicts = json.loads((unbroken / "caci" / "conflicts.json").read_text())
    assert conflicts["experts"] == ["pediatrics", "brain_senses", "rl"]
    summary = json.loads((unbroken / "summary.json").read_text())
    assert list(summary["macro_accuracy"]) == ["rl_start", "rl", "merged"]
    said = {
        name: [
            json.loads(line)["completion"]
            for line in (unbroken / "eval" / name / "predictions.jsonl").open()
        ]
        for name in ("rl_start", "rl", "merged")
    }
    assert said["rl"] != said["rl_start"] and said["rl"] != said["merged"]


def test_killed_and_gone_on_gives_the_same_numbers(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pipeline.kill_when(folder, lambda: pipeline.lines(folder / "gba" / "metrics.jsonl") >= 2)
    assert not (folder / "gba" / "done.json").exists()
    saved = folder / "gba" / "checkpoints" / "step-000001"
    assert len(list(saved.glob("state-*-of-*.safetensors"))) > 5
    pipeline.kill_when(folder, lambda: (folder / "caci" / "candidates" / "000.json").exists())
    assert not (folder / "caci" / "done.json").exists()
    done = pipeline.run("run", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert pipeline.results(folder) == pipeline.results(unbroken)
    for name in ("model.safetensors.index.json", "config.json"):
        ours, theirs = (f / "gba" / "model" / name for f in (folder, unbroken))
        assert ours.read_bytes() == theirs.read_bytes()
    shards = sorted((folder / "gba" / "model").glob("*.safetensors"))
    assert all(s.read_bytes() == (unbroken / "gba" / "model" / s.name).read_bytes() for s in shards)


def test_a_reference_pass_is_refused_at_once(tmp_path: Path) -> None:
    done: subprocess.CompletedProcess[str] = pipeline.run(
        "gba", tmp_path / "run", "gba.loss.beta=0.1"
    )
    assert done.returncode == 2
    assert "gba.loss.beta = 0.1" in done.stderr and "Traceback" not in done.stderr


def test_a_run_of_another_kind_is_not_reused(unbroken: Path, tmp_path: Path) -> None:
    more = ["gba.finetuning_type=lora", f"gba.reuse={unbroken}", "gba.start=base"]
    done = pipeline.run("gba", tmp_path / "run", *more)
    assert done.returncode == 2
    assert "holds no adapter" in done.stderr and "gba.finetuning_type" in done.stderr
