"""One-step-ahead rollouts: order and errors of the thread, and a GBA run on a real server that is killed
and goes on to the numbers of the unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmedx_fast.config import ConfigError, load_config
from mmedx_fast.metrics import read_metrics, without_times
from mmedx_fast.rollout import Rollout
from mmedx_fast.stages.ahead import Ahead, Batch
from mmedx_fast.stages.context import StageError

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs" / "demo.yaml")
SERVER = "rollout.engine=server"
SMALL = [
    "phantom.train=24",
    "phantom.validation=20",
    "phantom.test=20",
    "gba.start=base",
    "gba.steps=5",
    "gba.save_steps=1",
    "gba.questions_per_step=2",
    "gba.filter_zero_variance=false",
    "rollout.num_generations=1",
    "rollout.max_completion_length=16",
    "rollout.temperature=2.0",
    "eval.max_completion_length=16",
]


class FakeQuestion:
    def __init__(self, name: str) -> None:
        self.name = name

    def prompt_ids(self, guideline: str | None) -> list[int]:
        return [*self.name.encode(), len(guideline or "")]


QUESTIONS: list[Any] = [FakeQuestion("q0"), FakeQuestion("q1")]


def batch(step: int) -> Batch:
    rollouts = [
        Rollout(
            question=question,
            guideline=guideline,
            sample=sample,
            prompt_ids=FakeQuestion(f"q{question}").prompt_ids(guideline),
            token_ids=[step, sample],
            logprobs=[-0.1 / 3 * step, -1e-9],
            finish_reason="stop",
            text="é </answer>",
        )
        for question in range(2)
        for guideline in ("bayesian", None)
        for sample in range(2)
    ]
    return Batch(rollouts, version=max(0, step - 2), hit_rate=1 / 3)


def test_the_next_steps_rollouts_are_made_while_this_one_trains() -> None:
    gate, made = threading.Event(), []

    def make(step: int) -> Batch:
        if step > 1:
            assert gate.wait(30)
        made.append((step, threading.current_thread() is threading.main_thread()))
        return batch(step)

    ahead = Ahead(make)
    assert ahead.take(1) == batch(1)
    ahead.start(2)
    assert made == [(1, True)]  # step 2 is under way and step 1 can train
    gate.set()
    ahead.wait()
    assert made == [(1, True), (2, False)]
    # A step that is done again finds its rollouts, and those of the next are not made twice.
    assert ahead.take(1) == batch(1)
    ahead.start(2)
    assert ahead.take(2) == batch(2) and len(made) == 2


def test_state_comes_back_to_the_bit_through_json() -> None:
    ahead = Ahead(batch)
    assert ahead.state(4) is None
    ahead.start(4)
    state = json.loads(json.dumps(ahead.state(4)))
    again = Ahead(lambda step: pytest.fail("made again"))
    again.restore(state, 4, QUESTIONS)
    assert again.take(4) == batch(4)
    for wrong in (None, state | {"step": 5}):
        with pytest.raises(StageError, match="step 4 needs.*delete this checkpoint"):
            Ahead(batch).restore(wrong, 4, [])


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for() -> None:
    failed: list[int] = []

    def make(step: int) -> Batch:
        if not failed:
            failed.append(step)
            raise RuntimeError("server gone")
        return batch(step)

    ahead = Ahead(make)
    ahead.start(2)
    with pytest.raises(RuntimeError, match="server gone"):
        ahead.wait()
    assert ahead.take(2) == batch(2)


def test_close_gives_up_what_is_under_way() -> None:
    cancelled = threading.Event()

    def make(step: int) -> Batch:
        assert cancelled.wait(30)
        raise RuntimeError("interrupted")

    ahead = Ahead(make, cancelled.set)
    ahead._batches[1] = batch(1)
    ahead.start(2)
    began = time.monotonic()
    ahead.drop()
    assert ahead.take(1) == batch(1) and ahead.state(2) is None
    ahead.close()
    ahead.close()
    assert cancelled.is_set() and time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["rollout.async_steps=1"], "async_steps = 1 needs engine: server: vllm shares"),
        (["rollout.async_steps=2", SERVER], "rollout.async_steps"),
        (
            ["rollout.async_steps=1", SERVER, "gba.loss.importance_sampling_correction=none"],
            "gba.loss.importance_sampling_correction must correct.*token_truncate",
        ),
        (["rollout.server_args=[--x]"], "server_args belongs to engine: server, not to vllm"),
        ([SERVER, "rollout.server_urls=[gpu1:8000]"], r"http://host:port.*gpu1:8000"),
        ([SERVER, "rollout.server_urls=[http://a, http://a]"], "different addresses"),
        (
            [SERVER, "rollout.server_urls=[http://a]", "rollout.server_gpus='1'"],
            "for a server that the trainer starts",
        ),
        ([SERVER, "rollout.max_num_seqs=3"], "num_generations = 4 exceeds max_num_seqs = 3"),
        (
            ["rollout.engine=transformers", "rollout.tensor_parallel_size=2"],
            "tensor_parallel_size needs engine: vllm or server",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(override: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, override)


def test_settings_that_do() -> None:
    cfg = load_config(DEMO, [SERVER, "rollout.async_steps=1", "rollout.server_urls=[http://a:1/]"])
    assert cfg.rollout.server_urls == ("http://a:1",)


def test_with_a_server_rank_0_asks_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmedx_fast import ranks
    from mmedx_fast.rollout import RolloutError, Sampling
    from mmedx_fast.rollout.server_follower import ServerFollower
    from mmedx_fast.stages.rollouts import own_share

    follower = ServerFollower()
    alone = SimpleNamespace(shared=False)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 3)
        shares.append((list(own_share(follower, 5)), list(own_share(alone, 5))))
    assert shares == [([0, 1, 2, 3, 4], [0, 3]), ([], [1, 4]), ([], [2])]
    follower.load_adapter("anywhere", 7)
    assert follower.version == 7 and follower.generate([], ["bayesian"], Sampling()) == []
    with pytest.raises(RolloutError, match="rank 0"):
        follower.generate(QUESTIONS, [None], Sampling())


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_goes_on_with_rollouts_that_waited(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Rank 0 with those of the checkpoint, the others with none; all of them made by the version before
    the one that the engine serves now."""
    from mmedx_fast import ranks
    from mmedx_fast.rollout.server_follower import ServerFollower
    from mmedx_fast.stages.gba import _Trainer

    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    before = Ahead(batch)
    before.start(4)
    extra = json.loads(json.dumps({"ahead": before.state(4)}))
    trainer: Any = object.__new__(_Trainer)
    trainer.cfg = load_config(DEMO, [*SMALL, SERVER, "rollout.async_steps=1"])
    trainer.gba, trainer.async_steps = trainer.cfg.gba, 1
    trainer.questions, trainer.order = QUESTIONS, [[0, 1]] * 5
    engine = ServerFollower()
    trainer.ctx = SimpleNamespace(engine=engine)
    trainer.ahead = Ahead(trainer.make)
    trainer.restore_ahead(3, extra)
    engine.load_adapter("the adapter of step 3", 3)
    assert trainer.ahead.take(4) == (batch(4) if rank == 0 else Batch([], 2, 1 / 3))
    if rank == 1:
        trainer.ahead.start(5)
        trainer.ahead.wait()
        assert trainer.ahead.take(5) == Batch([], 3, None)
    with pytest.raises(StageError, match="delete this checkpoint"):
        trainer.restore_ahead(3, {})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose numbers depend on no batch: one sequence at a time, nothing from a cache."""
    pytest.importorskip("vllm")
    from mmedx_fast.rollout.server_client import ServerClient
    from mmedx_fast.rollout.server_process import ServerProcess
    from mmedx_fast.rollout.vllm_options import engine_options
    from mmedx_fast.stages.context import resolve_model

    cfg = load_config(DEMO, SMALL)
    options = engine_options(
        cfg.model.model_copy(update={"path": str(resolve_model(cfg))}),
        cfg.rollout,
        device="cpu",
        max_model_len=cfg.data.max_prompt_length + 16,
        max_images=1,
        lora=True,
        seed=0,
        own_workers=True,
    )
    options |= {"max_num_seqs": 1, "enable_prefix_caching": False}
    process = ServerProcess(options, log=tmp_path_factory.mktemp("server") / "server.log")
    client, until = ServerClient(process.url, 60), time.monotonic() + 900
    while not client.healthy():
        process.check()
        assert time.monotonic() < until, process.last_words()
        time.sleep(0.2)
    yield process.url
    client.close()
    process.stop()


def settings(folder: Path, url: str) -> list[str]:
    more = [SERVER, f"rollout.server_urls=[{url}]", "rollout.async_steps=1"]
    # An untrained model earns nothing; this reward tells its answers apart, so that it learns.
    reward = folder.parents[1] / "mine.py"
    reward.write_text(
        "def e(completions, **_):\n    return [float(c.count('e')) for c in completions]\n"
    )
    more.append(f"gba.rewards=[{{name: '{reward}:e'}}]")
    return [f"run_dir={folder}", *SMALL, *more]


def train(folder: Path, url: str) -> list[dict[str, Any]]:
    """A GBA run in this process, from where the folder is; its metrics without times."""
    from mmedx_fast.run_folder import RunFolder
    from mmedx_fast.stages.context import Context
    from mmedx_fast.stages.gba import run_gba

    cfg = load_config(DEMO, settings(folder, url))
    with RunFolder.open(cfg) as run, Context(cfg, run) as ctx:
        run_gba(ctx)
    return without_times(read_metrics(folder / "gba" / "metrics.jsonl"))


def kill_at_step(folder: Path, url: str, step: int) -> None:
    """Start the run in a process of its own and kill it when ``step`` is in its checkpoints."""
    command = [sys.executable, "-m", "mmedx_fast.cli", "gba", DEMO, *settings(folder, url)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    }
    mark = folder / "gba" / "checkpoints" / f"step-{step:06d}"
    with open(folder.parent / "killed.log", "w") as log:
        process = subprocess.Popen(command, env=env, cwd=folder.parent, stdout=log, stderr=log)
        until = time.monotonic() + 900
        while not mark.exists():
            said = (folder.parent / "killed.log").read_text()[-3000:]
            assert process.poll() is None and time.monotonic() < until, said
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


def test_a_killed_run_goes_on_to_the_unbroken_runs_numbers(server: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole" / "run", server)
    assert [row["rollout/version_lag"] for row in whole] == [0, 1, 1, 1, 1]
    # From step 2 on the trainer has taken a step that the rollouts have not seen.
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in whole]
    assert gaps[0] < 1e-5 < 1e-4 < min(gaps[1:])
    broken = tmp_path / "broken" / "run"
    broken.parent.mkdir()
    kill_at_step(broken, server, 2)
    meta = json.loads((broken / "gba" / "checkpoints" / "step-000002" / "meta.json").read_text())
    held = meta["meta"]["extra"]["ahead"]
    assert (held["step"], held["version"], len(held["rollouts"])) == (3, 1, 8)
    assert train(broken, server) == whole
