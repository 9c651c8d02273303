"""A training run whose rollout engine, memory or gradients fail ends as the undisturbed one does."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import kill
from mmedx_fast import ranks
from mmedx_fast._paths import find_config
from mmedx_fast.checkpoint import load_latest
from mmedx_fast.config import Config, load_config
from mmedx_fast.metrics import read_metrics, without_times
from mmedx_fast.policy import Policy
from mmedx_fast.rollout import EngineError, RolloutError, Sampling
from mmedx_fast.rollout.restart import RestartingEngine
from mmedx_fast.rollout.transformers_engine import TransformersEngine
from mmedx_fast.rollout.vllm_engine import VllmEngine
from mmedx_fast.rollout.watchdog import EXIT_HUNG
from mmedx_fast.run_folder import RunFolder
from mmedx_fast.stages import guard
from mmedx_fast.stages.common import Stopped, StopSignal
from mmedx_fast.stages.context import Context, StageError
from mmedx_fast.stages.dsa import run_dsa
from mmedx_fast.stages.gba import _Trainer, run_gba
from mmedx_fast.stages.guard import RowBound, StepRows, out_of_memory
from mmedx_fast.tree import Branch, Tree

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


def test_vllm_that_breaks_between_questions_is_started_anew(
    engines: list[Any], asked: Callable[[], list[Any]], unbroken: Path
) -> None:
    wanted, broken = asked(), engines[0]._inner

    def gone() -> None:
        raise RuntimeError("the device is gone")

    broken._llm.reset_prefix_cache = gone
    engines[0].load_adapter(unbroken / "adapter", 8)
    assert engines[0]._inner is not broken and engines[0].version == 8
    assert asked() == wanted


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


def _canned() -> Any:
    path = Path(__file__).with_name("_canned.py")
    spec = importlib.util.spec_from_file_location("canned_for_restart", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Canned:
    """Canned engines in a row; the one after another is the next that is started."""

    def __init__(self, *dies_in: str | None) -> None:
        self.made: list[Any] = []
        self._waiting = [*dies_in]
        self.kind = _canned().CannedEngine

    def __call__(self) -> Any:
        self.made.append(self.kind(dies_in=self._waiting.pop(0)))
        return self.made[-1]


WANTED = [("load_weights", "w", 3), ("load_adapter", "a", 4)]
TENSORS = [("x", 1)]
CALLS: dict[str, tuple[tuple[Any, ...], list[tuple[Any, ...]], int]] = {
    # Arguments, what the new engine is told, the version served afterwards.
    "load_adapter": (("b", 5), [WANTED[0], ("load_adapter", "b", 5)], 5),
    "load_weights": (("v", 6), [("load_weights", "v", 6)], 6),
    "update_weights": ((TENSORS, 7), [("update_weights", TENSORS, 7)], 7),
    "sleep": ((), [*WANTED, ("sleep",)], 4),
    "wake": ((), WANTED, 4),
    "reset_caches": ((), WANTED, 4),
    "stats": ((), [*WANTED, ("stats",)], 4),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_engine_that_dies_in_any_call_is_started_anew_with_what_is_wanted(call: str) -> None:
    canned = Canned(None, None)
    engine = RestartingEngine(canned, 1)
    engine.load_weights("w", 3)
    engine.load_adapter("a", 4)
    canned.made[0].dies_in = call
    given, told, version = CALLS[call]
    getattr(engine, call)(*given)
    assert [e.told[-1] for e in canned.made] == [("close",), told[-1]]
    assert canned.made[1].told == told
    assert engine.version == canned.made[1].version == version
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        getattr(engine, call)(*given)
    assert len(canned.made) == 2


def test_what_cannot_be_loaded_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    canned = Canned(None, None)
    engine = RestartingEngine(canned, 1)
    engine.load_adapter("a", 4)
    with monkeypatch.context() as patch:
        failing(patch, canned.kind, "load_adapter", {1}, RolloutError("no adapter"))
        with pytest.raises(RolloutError, match="no adapter"):
            engine.load_adapter("bad", 5)
    assert engine.version == 4 and len(canned.made) == 1
    canned.made[0].dies_in = "sleep"
    engine.sleep()
    assert canned.made[1].told == [("load_adapter", "a", 4), ("sleep",)] and engine.version == 4


@pytest.mark.parametrize("error", [EngineError("dead"), RolloutError("refuses"), ValueError("odd")])
def test_a_new_engine_that_cannot_load_is_closed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    canned = Canned(None, None, None)
    engine = RestartingEngine(canned, 1)
    engine.load_adapter("a", 4)
    canned.made[0].dies_in = "sleep"
    with monkeypatch.context() as patch:
        failing(patch, canned.kind, "load_adapter", {1}, error)
        with pytest.raises(ValueError if isinstance(error, ValueError) else RolloutError):
            engine.sleep()
    assert [e.told[-1] for e in canned.made] == [("close",)] * 2
    engine.wake()
    assert canned.made[2].told == [("load_adapter", "a", 4)]


@pytest.mark.parametrize("call", ["load_adapter", "reset_caches", "sleep", "stats", "load_weights"])
def test_a_server_that_is_gone_is_an_engine_that_broke(call: str, tmp_path: Path) -> None:
    """Nobody listens at the address; the engine is made without meeting it."""
    from mmedx_fast.rollout import server_engine
    from mmedx_fast.rollout.server_client import ServerClient, ServerError

    engine: Any = object.__new__(server_engine.ServerEngine)
    engine._servers = [ServerClient("http://127.0.0.1:9", 5)]
    engine._sleeps, engine._lora, engine._adapter = True, True, None
    engine._mark, engine._loads, engine._model_path = "m", 0, "unused"
    given = {"load_adapter": (tmp_path, 1), "load_weights": (tmp_path, 1)}.get(call, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_engine, "check_adapter", lambda *_: {})
        patch.setattr(server_engine, "check_weights", lambda *_: [tmp_path / "model.safetensors"])
        engine.max_lora_rank = 8
        with pytest.raises(EngineError, match="does not answer") as caught:
            getattr(engine, call)(*given)
    assert isinstance(caught.value, ServerError) and caught.value.status == 0


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
    assert saved is not None
    bound = saved[2]["extra"]["row_bound"]
    assert bound["setting"] == 8192 and max(after) <= bound["tokens"] < longest
    assert saved[2]["extra"]["data"]["count"] > 0
    assert saved[2]["meter"]["start"]["seconds"] > 0
    memory.shrinks_at = 0
    del memory.lengths[:]
    found = train()
    assert caplog.text.count("out of memory on a row of") == 1 and memory.lengths
    close(found, unbroken)
    phases = json.loads((found / "done.json").read_text())["result"]["phases"]
    assert phases["checkpoint"]["seconds"] > 0 and phases["start"]["calls"] == 2


def test_a_raised_bound_counts_in_a_run_that_goes_on() -> None:
    setting = config(Path("unused")).gba
    bound = RowBound(setting)
    assert bound.state is None and bound.tokens == setting.max_row_tokens == 8192
    plans: list[Any] = [SimpleNamespace(n_tokens=tokens) for tokens in (60, 4000)]
    bound.lower([Tree((Branch(range(20), range(10)),) * 3)], plans, "full")
    saved = json.loads(json.dumps(bound.state))
    assert bound.tokens == 2000 and RowBound(setting, saved).tokens == 2000
    for tokens in (4096, 16384):
        again = RowBound(setting.model_copy(update={"max_row_tokens": tokens}), saved)
        assert again.tokens == tokens and again.state is None


def test_ranks_that_run_out_leave_the_lower_bound_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three ranks at once; a third start has another setting."""
    setting = config(tmp_path).gba
    tree = Tree((Branch(range(20), range(10)),) * 3)
    policy: Any = None
    noted: list[int] = []

    def starve(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bounds = [RowBound(setting, None, tmp_path) for _ in range(2)]
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    for rank, tokens in ((1, 3000), (2, 4000)):
        plans: list[Any] = [SimpleNamespace(n_tokens=tokens)]
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(guard, "own_rows", lambda *_, plans=plans: plans)
        rows = StepRows(policy, [tree], bounds[rank - 1], lambda plans: plans)
        with pytest.raises(StageError, match=f"rank {rank} .* same command .* up to {tokens // 2}"):
            rows.run(starve)
        noted.append(tokens // 2)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    assert RowBound(setting, None, tmp_path).tokens == min(noted)
    assert RowBound(setting, {"tokens": 70, "setting": 8192}, tmp_path).tokens == 70
    raised = setting.model_copy(update={"max_row_tokens": 16384})
    assert RowBound(raised, None, tmp_path).tokens == 16384
    assert len(list((tmp_path / "row_bounds").iterdir())) == 2


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


def stop_now() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_process(folder: Path, reward: Path) -> Path:
    """GBA with an engine of its own, saving nothing of itself."""
    engines: list[Any] = []
    more = (
        "rollout.engine=transformers",
        "gba.save_steps=100",
        f"gba.rewards=[{{name: '{reward}:r'}}]",
    )
    try:
        return run_stage(engines, folder, *more)
    finally:
        for engine in engines:
            engine.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reward that draws from the generator that a checkpoint holds, and the unbroken run with it."""
    folder = tmp_path_factory.mktemp("drawn")
    reward = folder / "mine.py"
    reward.write_text(
        "import random\n\ndef r(completions, **_):\n    return [random.random() for _ in completions]\n"
    )
    return reward, in_process(folder / "run", reward)


@pytest.mark.parametrize("when", ["before", "rollouts", "reward", "elsewhere"])
def test_a_step_that_is_stopped_before_its_update_is_redone(
    drawn: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """SIGTERM before or during the second step's rollouts or rewards, or on another rank."""
    reward, whole = drawn
    take, sample, scores = _Trainer.take, TransformersEngine._sample, _Trainer.scores
    step, sampled = [0], [0]

    def taken(self: _Trainer, number: int) -> Any:
        step[0] = number
        if (when, number) == ("before", 2):
            stop_now()
        return take(self, number)

    def drawn_token(self: TransformersEngine, *given: Any) -> Any:
        if step[0] == 2:
            sampled[0] += 1
            if (when, sampled[0]) == ("rollouts", 3):
                stop_now()
        return sample(self, *given)

    def scored(self: _Trainer, columns: Any) -> Any:
        found = scores(self, columns)
        if (when, step[0]) == ("reward", 2):
            stop_now()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "take", taken)
        patch.setattr(TransformersEngine, "_sample", drawn_token)
        patch.setattr(_Trainer, "scores", scored)
        if when == "elsewhere":
            patch.setattr(StopSignal, "agreed", lambda self: step[0] == 2)
        with pytest.raises(Stopped, match="before the update of step 2; step 1 is saved"):
            in_process(tmp_path / "run", reward)
    if when in ("before", "rollouts"):
        assert sampled[0] == {"before": 0, "rollouts": 3}[when]
    stage = tmp_path / "run" / "gba"
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["step-000001"]
    assert len(rows(stage)) == 1
    equal(in_process(tmp_path / "run", reward), whole)


def test_a_run_that_is_stopped_in_its_first_step_has_nothing_to_save(
    drawn: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = _Trainer.scores

    def scored(self: _Trainer, columns: Any) -> Any:
        stop_now()
        return scores(self, columns)

    monkeypatch.setattr(_Trainer, "scores", scored)
    with pytest.raises(Stopped, match="step 1; there is nothing to save yet"):
        in_process(tmp_path / "run", drawn[0])
    assert not (tmp_path / "run" / "gba" / "checkpoints").exists()


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
    assert "is saved" in said and "Go on with: mmedx gba" in said
    assert list((stage / "checkpoints").iterdir()) and not (stage / "done.json").exists()
    assert start() == 0, log.read_text()[-3000:]
    equal(stage, unbroken)
