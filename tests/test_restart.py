"""A training run whose rollout engine, memory or gradients fail ends as the undisturbed one does."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kill
from mmedx_fast._paths import find_config
from mmedx_fast.checkpoint import load_latest
from mmedx_fast.config import Config, load_config
from mmedx_fast.metrics import read_metrics, without_times
from mmedx_fast.policy import Policy
from mmedx_fast.rollout import EngineError, RolloutError, Sampling
from mmedx_fast.rollout.vllm_engine import VllmEngine
from mmedx_fast.rollout.watchdog import EXIT_HUNG
from mmedx_fast.run_folder import RunFolder
from mmedx_fast.stages.context import Context, StageError
from mmedx_fast.stages.dsa import run_dsa
from mmedx_fast.stages.gba import _Trainer, run_gba
from mmedx_fast.stages.guard import out_of_memory

SMALL = [
    "phantom.train=20",
    "phantom.validation=20",
    "phantom.test=20",
    "dsa.specialties=[pediatrics]",
    "dsa.steps=2",
    "dsa.questions_per_step=2",
    "gba.start=base",
    "gba.guidelines=[bayesian, intuitive]",
    "gba.steps=3",
    "gba.save_steps=1",
    "gba.questions_per_step=2",
    "gba.loss.beta=0.01",
    "gba.num_iterations=2",
    "gba.filter_zero_variance=false",
    "gba.optimizer.lr_scheduler_type=linear",
    # Samples that differ, and rewards that do, so that every step has something to learn.
    f"gba.rewards=[{{name: '{kill.__file__}:by_place'}}]",
    "rollout.temperature=2.0",
    "rollout.num_generations=2",
    "rollout.max_completion_length=16",
    "deepspeed={zero_optimization: {stage: 2}}",
]


def settings(folder: Path, *more: str) -> list[str]:
    return [f"run_dir={folder}", *SMALL, *more]


def config(folder: Path, *more: str) -> Config:
    return load_config(find_config("demo.yaml"), settings(folder, *more))


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Any]]:
    """The engine that every run of this module takes over from the one before."""
    kept: list[Any] = []
    yield kept
    for engine in kept:
        engine.close()


def run_stage(engines: list[Any], folder: Path, *more: str) -> Path:
    """GBA alone, with the module's engine; returns the stage's folder."""
    cfg = config(folder, *more)
    with RunFolder.open(cfg) as opened:
        ctx = Context(cfg, opened)
        if engines:
            ctx._engine, ctx._weights = engines.pop(), ctx.model_path
            ctx._engine.stats()  # what came before is not this run's
        try:
            run_gba(ctx)
        finally:
            if ctx._engine is not None:
                engines.append(ctx._engine)
    return folder / "gba"


Run = Callable[..., Path]


@pytest.fixture
def train(engines: list[Any], tmp_path: Path) -> Run:
    """Runs GBA in ``tmp_path / "run"``, or goes on there."""
    return lambda *more: run_stage(engines, tmp_path / "run", *more)


@pytest.fixture(scope="module")
def unbroken(engines: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = run_stage(engines, tmp_path_factory.mktemp("unbroken") / "run")
    assert all(row["grad_norm"] > 0 for row in rows(stage))
    assert sum(tensor.abs().sum() for tensor in adapter(stage).values()) > 0
    return stage


def rows(stage: Path) -> list[dict[str, Any]]:
    return without_times(read_metrics(stage / "metrics.jsonl"))


def text(found: list[dict[str, Any]]) -> str:
    """To compare to the bit, NaN included."""
    return json.dumps(found, sort_keys=True)


def adapter(stage: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(stage / "adapter" / "adapter_model.safetensors")


def equal(ours: Path, theirs: Path) -> None:
    assert text(rows(ours)) == text(rows(theirs))
    found, wanted = adapter(ours), adapter(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int], error: Exception
) -> list[int]:
    """Raise in the given calls of ``owner.name`` (the first is 1); the list counts the calls."""
    real = getattr(owner, name)
    count = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] in calls:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return count


# -- the rollout engine ----------------------------------------------------------------------------


def test_a_broken_engine_is_started_anew_and_the_step_redone(
    train: Run, unbroken: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    error = RuntimeError("the device is gone")
    count = failing(monkeypatch, CPUModelRunner, "execute_model", {20, 31}, error)
    found = train()
    assert count[0] > 31
    assert caplog.text.count("the rollout engine is started anew") == 2
    assert "the device is gone" in caplog.text
    equal(found, unbroken)


@pytest.fixture
def asked(engines: list[Any], unbroken: Path) -> Callable[[], list[Any]]:
    """Asks the module's engine; the rollouts as mappings."""
    cfg = load_config(unbroken.parent / "config.yaml")
    with RunFolder.open(cfg, exclusive=False) as opened:
        questions = Context(cfg, opened).questions("train")[:2]
    sampling = Sampling(n=2, temperature=0.7, max_tokens=16, seed=5)
    engines[0].load_adapter(unbroken / "adapter", 7)
    return lambda: [
        vars(r) for r in engines[0].generate(questions, ["bayesian", "intuitive"], sampling)
    ]


def test_an_engine_that_makes_no_token_is_started_anew(
    engines: list[Any],
    asked: Callable[[], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = asked()
    hung = engines[0]._inner
    hung._timeout = 1.0
    step = VllmEngine._step

    def spin(self: VllmEngine) -> list[Any]:
        if self is not hung:
            return step(self)
        time.sleep(0.01)
        return []

    monkeypatch.setattr(VllmEngine, "_step", spin)
    assert asked() == wanted
    assert engines[0]._inner is not hung
    assert "made no token for 1 s (rollout.timeout = 1)" in caplog.text


def test_an_engine_that_keeps_failing_ends_the_run(
    engines: list[Any], asked: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engines[0], "_max_restarts", 1)
        error = EngineError("it is dead")
        count = failing(patch, VllmEngine, "_step", set(range(1, 99)), error)
        with pytest.raises(
            StageError, match=r"2 times in a row \(rollout.max_restarts = 1\).*dead"
        ):
            asked()
        assert count[0] == 2
    assert len(asked()) == 8  # the next question starts another


def test_errors_of_the_input_are_not_asked_again(
    engines: list[Any], asked: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked()
    before = engines[0]._inner
    count = failing(monkeypatch, VllmEngine, "_enqueue", {1}, RolloutError("refuses its prompt"))
    with pytest.raises(RolloutError, match="refuses its prompt"):
        asked()
    assert count[0] == 1 and engines[0]._inner is before


def test_the_watchdog_ends_a_process_that_does_not_come_back() -> None:
    code = (
        "import time\n"
        "from mmedx_fast.rollout.watchdog import Watchdog\n"
        "with Watchdog(0.5, 'vLLM') as dog:\n"
        "    for _ in range(10):\n"
        "        time.sleep(0.1)\n"
        "        dog.beat()\n"
        "with Watchdog(0.5, 'vLLM'):\n"
        "    print('beaten', flush=True)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_HUNG == 75
    assert done.stdout == "beaten\n"
    assert "vLLM has not returned for 0.5 s" in done.stderr and "most recent call" in done.stderr


# -- memory ----------------------------------------------------------------------------------------


def real_memory_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    return caught.value


class Memory:
    """How long a row may be before an allocation fails, and how long those were that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, self.shrinks_at, self.lengths = 10**6, 0, list[int]()
        backward = Policy._backward

        def limited(policy: Policy, row: Any, loss_of: Any) -> Any:
            self.lengths.append(row.n_tokens)
            if len(self.lengths) == self.shrinks_at:
                self.tokens = row.n_tokens - 1
            if row.n_tokens > self.tokens:
                raise real_memory_error()
            return backward(policy, row, loss_of)

        monkeypatch.setattr(Policy, "_backward", limited)


def close(ours: Path, theirs: Path) -> None:
    for found, wanted in zip(rows(ours), rows(theirs), strict=True):
        for key in ("reward", "grad_norm", "loss", "learning_rate", "skipped"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), key
    for key, value in adapter(theirs).items():
        torch.testing.assert_close(adapter(ours)[key], value, rtol=1e-3, atol=1e-5)


def test_rows_that_do_not_fit_are_cut_for_the_rest_of_the_run(
    train: Run,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = Memory(monkeypatch)
    memory.shrinks_at = 4  # one row a step, used twice: after the first update of the second step
    with monkeypatch.context() as patch:
        failing(patch, Policy, "step", {5}, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="^stop$"):
            train()
    longest, after = memory.lengths[3], memory.lengths[4:]
    assert caplog.text.count("out of memory on a row of") == 1
    assert len(after) > 2 and max(after) <= memory.tokens < longest
    saved = load_latest(tmp_path / "run" / "gba")
    assert saved is not None and max(after) <= saved[2]["extra"]["row_tokens"] < longest
    assert saved[2]["extra"]["data"]["count"] > 0
    assert saved[2]["meter"]["start"]["seconds"] > 0
    memory.shrinks_at = 0
    del memory.lengths[:]
    found = train()
    assert caplog.text.count("out of memory on a row of") == 1 and memory.lengths
    close(found, unbroken)
    phases = json.loads((found / "done.json").read_text())["result"]["phases"]
    assert phases["checkpoint"]["seconds"] > 0 and phases["start"]["calls"] == 2


def test_a_rollout_that_does_not_fit_alone_names_the_settings(
    train: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Memory(monkeypatch).tokens = 10
    with pytest.raises(StageError, match="one rollout only: lower rollout.max_completion_length"):
        train("gba.num_iterations=1")
    assert caplog.text.count("out of memory on a row of") >= 1


def test_sft_rows_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def experts(name: str) -> Path:
        cfg = config(tmp_path / name)
        with RunFolder.open(cfg) as opened:
            run_dsa(Context(cfg, opened))
        return cfg.folder / "dsa" / "pediatrics"

    wanted = experts("whole")
    memory = Memory(monkeypatch)
    memory.shrinks_at = 1
    found = experts("cut")
    assert len(memory.lengths) > 3
    for ours, theirs in zip(rows(found), rows(wanted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_other_errors_are_not_memory_errors() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not out_of_memory(ValueError("out of memory"))


# -- loss and gradient norm ------------------------------------------------------------------------


def test_a_step_with_nan_is_skipped_and_written_down(
    train: Run, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An advantage is NaN in the second step."""
    advantages, calls = _Trainer.advantages, [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        values, use, metrics = advantages(*args)
        if calls[0] == 2:
            values[3] = math.nan
        return values, use, metrics

    monkeypatch.setattr(_Trainer, "advantages", broken)
    stage = train()
    found, wanted = rows(stage), rows(unbroken)
    assert [row["skipped"] for row in found] == [0, 1, 0]
    assert text(found[:1]) == text(wanted[:1])
    rates = [row["learning_rate"] for row in wanted]
    assert rates[2] == found[2]["learning_rate"] < rates[1]
    folder = stage / "bad_steps" / "step-000002"
    step = json.loads((folder / "step.json").read_text())
    assert step["reason"] == "the loss is not finite" and step["rows"][0]["sum:loss"] == "nan"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 2
    assert records[3]["advantage"] == "nan" and isinstance(records[2]["advantage"], float)
    assert {"id", "guideline", "text", "token_ids", "rewards", "advantage"} < records[0].keys()
    assert [record["rewards"]["by_place"] for record in records] == [
        i * 7 % 5 / 4 for i in range(8)
    ]
    assert not (unbroken / "bad_steps").exists()


@pytest.mark.parametrize("section", ["dsa", "gba"])
def test_steps_that_keep_exploding_end_the_run(train: Run, tmp_path: Path, section: str) -> None:
    bound = [f"{section}.optimizer.max_step_grad_norm=1e-9", f"{section}.optimizer.max_bad_steps=2"]
    if section == "dsa":
        cfg = config(tmp_path / "run", *bound)
        with (
            RunFolder.open(cfg) as opened,
            pytest.raises(StageError, match="2 steps in a row") as caught,
        ):
            run_dsa(Context(cfg, opened))
    else:
        with pytest.raises(StageError, match="2 steps in a row") as caught:
            train(*bound)
    stage = tmp_path / "run" / ("gba" if section == "gba" else "dsa/pediatrics")
    assert str(stage / "bad_steps") in str(caught.value)
    assert f"exceeds {section}.optimizer.max_step_grad_norm = 1e-09" in str(caught.value)
    assert f"Lower {section}.optimizer.learning_rate" in str(caught.value)
    assert sorted(p.name for p in (stage / "bad_steps").iterdir()) == ["step-000001", "step-000002"]
    assert [(row["skipped"], row["grad_norm"] > 0) for row in rows(stage)] == [(1, True)]
    assert (stage / "bad_steps" / "step-000002" / "records.jsonl").read_text().count("\n") >= 4


# -- checkpoints and signals -----------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    train: Run, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, Policy, "step", {5}, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="^stop$"):
            train()
    checkpoints = tmp_path / "run" / "gba" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000001", "step-000002"]
    state = checkpoints / "step-000002" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-100] ^= 1
    state.write_bytes(data)
    steps = failing(monkeypatch, Policy, "step", set(), RuntimeError())
    with pytest.warns(UserWarning, match="step-000002.*going back to the checkpoint before it"):
        found = train()
    assert steps[0] == 4  # two steps of two updates
    equal(found, unbroken)


def test_sigterm_saves_and_the_same_command_goes_on(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stage, log = folder / "gba", tmp_path / "log"
    command = [sys.executable, "-m", "mmedx_fast.cli", "gba", str(find_config("demo.yaml"))]
    command += settings(folder)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))

    def start(reached: Callable[[], bool] | None = None) -> int:
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=out, stderr=out
            )
            limit = time.monotonic() + 300
            while reached is not None and not reached():
                assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
                time.sleep(0.02)
            if reached is not None:
                process.send_signal(signal.SIGTERM)
            return process.wait(300)

    assert start((stage / "stage.json").exists) in (-signal.SIGTERM, 130)
    assert start(lambda: len(read_metrics(stage / "metrics.jsonl")) > 0) == 130
    said = log.read_text()
    assert "it is saved" in said and "Go on with: mmedx gba" in said
    assert list((stage / "checkpoints").iterdir()) and not (stage / "done.json").exists()
    assert start() == 0, log.read_text()[-3000:]
    equal(stage, unbroken)
