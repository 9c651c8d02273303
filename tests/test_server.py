"""Rollouts through a real vLLM server against the engine in this process: the same tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import DataConfig, ModelConfig, RolloutConfig
from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.prompts import PromptBuilder, PromptTooLong
from mmedx_fast.rollout import (
    BASE_VERSION,
    Interrupted,
    Rollout,
    RolloutError,
    Sampling,
    create_engine,
)
from mmedx_fast.rollout.prefix import PrefixSharing, shared_tokens

pytest.importorskip("vllm")
ROOT = Path(__file__).resolve().parents[1]


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shared = _helper("test_rollout")
adapted, record, tokens = shared.adapted, shared.record, shared.tokens
GUARD = ROOT / "mmedx_fast" / "rollout" / "_server_guard.py"
SETTINGS = {
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "max_lora_rank": 16,
}
GREEDY = Sampling(greedy=True, max_tokens=8)


def start(world, log: Path | None = None, **changes: object):
    rollout = RolloutConfig(**SETTINGS | changes)
    model = ModelConfig(path=str(world.folder), dtype="float32")
    return create_engine(model, rollout, world.builder, max_model_len=480, max_images=2, log=log)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return shared.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def server(world, log: Path) -> Iterator[object]:
    made = start(world, log, engine="server", server_args=["--max-log-len=10"], server_timeout=900)
    yield made
    made.close()


@pytest.fixture(scope="module")
def inside(world) -> Iterator[object]:
    made = start(world, engine="vllm")
    yield made
    made.close()


@pytest.fixture(scope="module")
def both(server, inside, world) -> Iterator[object]:
    """The server under two addresses: its requests are spread as over two servers."""
    port = server._servers[0].url.rpartition(":")[2]
    urls = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
    made = start(world, engine="server", server_urls=urls, server_timeout=60)
    yield made
    made.close()


def assert_same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        # Only the log-probs may differ, by rounding.
        assert dataclasses.replace(a, logprobs=b.logprobs) == b
        torch.testing.assert_close(
            torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0
        )


def idle(server) -> bool:
    """No request runs or waits in the server: its prefix cache can be reset."""
    return server._servers[0]._call("POST", "/reset_prefix_cache").json()["success"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapter", [None, "a", "b"])
def test_tokens_and_logprobs_are_those_of_the_engine_in_process(
    world, server, inside, adapter, temperature
):
    sampling = Sampling(n=3, temperature=temperature, max_tokens=24, seed=11)
    guidelines = ["bayesian", "analytic", None]
    made = []
    for engine in (server, inside):
        with adapted(engine, world.adapters.get(adapter), 4):
            assert engine.version == (BASE_VERSION if adapter is None else 4)
            made.append(engine.generate(world.questions, guidelines, sampling))
    assert_same(*made)
    # No, one and two images; answers that end and that are cut; a model that minds its prompt.
    assert {r.finish_reason for r in made[0]} == {"stop", "length"}
    assert len({tuple(ids) for ids in tokens(made[0])}) > 30 and len(made[0]) == 36


def test_an_adapter_changes_the_answers_and_greedy_ones_agree(world, server, inside):
    seen = set()
    for name in (None, "a", "b"):
        made = []
        for engine in (server, inside):
            with adapted(engine, world.adapters.get(name), 1):
                made.append(engine.generate(world.questions, ["intuitive"], GREEDY))
        assert_same(*made)
        seen.add(str(tokens(made[0])))
    assert len(seen) == 3


def test_banned_tokens_are_never_sampled(world, server):
    sampling = Sampling(n=8, temperature=2.0, max_tokens=32, seed=5)
    rollouts = server.generate(world.questions[:2], ["differential", "intuitive"], sampling)
    banned = set(world.builder.banned_token_ids)
    assert len(rollouts) == 32 and not any(banned & set(ids) for ids in tokens(rollouts))


def test_order_progress_and_empty_calls(world, server):
    calls = []
    rollouts = server.generate(
        world.questions[:2],
        ["bayesian", None],
        Sampling(n=2, max_tokens=4, seed=1),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [(r.question, r.guideline, r.sample) for r in rollouts] == [
        (q, g, s) for q in range(2) for g in ("bayesian", None) for s in range(2)
    ]
    assert calls[-1] == (8, 8) and calls == sorted(calls)
    assert server.generate([], ["analytic"], Sampling()) == []


def test_two_addresses_share_the_questions_and_the_adapter(world, both, inside):
    questions, guidelines = world.questions, ["bayesian", "analytic"]
    requests = [(q, g) for q in questions for g in guidelines]
    # A question's prompts share a prefix, so they meet in one server.
    assert both._owners(requests) == [0, 0, 1, 1, 0, 0, 1, 1]
    sampling = Sampling(n=2, max_tokens=12, seed=3)
    made = []
    for engine in (both, inside):
        with adapted(engine, world.adapters["a"], 2):
            made.append(engine.generate(questions, guidelines, sampling))
    assert_same(*made)


def test_same_folder_with_new_content_is_really_reloaded(world, server, tmp_path):
    ask, latest, got = [(world.questions[0], "bayesian")], tmp_path / "latest", {}
    for version, name in enumerate(["a", "b"]):
        shutil.rmtree(latest, ignore_errors=True)
        shutil.copytree(world.adapters[name], latest)
        server.load_adapter(latest, version)
        got[name] = tokens(server.generate_requests(ask, GREEDY))
    with adapted(server, world.adapters["b"], 9):
        assert got["b"] == tokens(server.generate_requests(ask, GREEDY)) != got["a"]


def test_bad_adapters_are_refused_and_the_old_one_stays(world, server, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(world.adapters["b"], tmp_path / "wrong")
    weights = load_file(wrong / "adapter_model.safetensors")
    weights = {k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in weights.items()}
    save_file(weights, wrong / "adapter_model.safetensors", metadata={"format": "pt"})
    ask = [(world.questions[0], None)]
    with adapted(server, world.adapters["a"], 3):
        want = tokens(server.generate_requests(ask, GREEDY))
        for folder, message in (
            (tmp_path / "nowhere", "adapter_config.json"),
            (wrong, "cannot load this adapter"),
        ):
            with pytest.raises(RolloutError, match=message) as caught:
                server.load_adapter(folder, 4)
            assert str(folder) in str(caught.value) and server.version == 3
            assert tokens(server.generate_requests(ask, GREEDY)) == want


def test_an_adapter_the_server_cannot_see_names_the_shared_file_system(server, tmp_path):
    # What a server on another machine finds at the path: nothing.
    with pytest.raises(RolloutError, match="shared file system") as caught:
        server._servers[0].load_adapter("x", tmp_path)
    assert str(tmp_path) in str(caught.value) and server._servers[0].url in str(caught.value)


def test_full_weights_and_back(world, server, inside, tmp_path):
    merged = shared.load_hf(world.folder)
    shared.peaky(merged, world.builder, seed=99)
    folder = shared.save_weights(merged, world.folder, tmp_path / "merged")
    sampling = Sampling(n=1, max_tokens=12, seed=2)
    before = server.generate(world.questions, ["analytic"], sampling)
    made = []
    try:
        for engine in (server, inside):
            engine.load_weights(folder)
            made.append(engine.generate(world.questions, ["analytic"], sampling))
    finally:
        for engine in (server, inside):
            engine.load_weights(world.folder)
    assert_same(*made)
    assert all(a != b for a, b in zip(tokens(before), tokens(made[0]), strict=True))
    assert tokens(server.generate(world.questions, ["analytic"], sampling)) == tokens(before)


def test_prompts_that_do_not_fit_and_refusals_name_the_question(world, server):
    good = (world.questions[0], None)
    want = tokens(server.generate_requests([good], GREEDY))
    tight = PromptBuilder(world.builder.processor, DataConfig(max_prompt_length=50))
    with pytest.raises(PromptTooLong, match="'long'"):
        server.generate_requests([good, (tight.question(record("long")), None)], GREEDY)
    odd = dataclasses.replace(world.builder.question(record("odd")), _ids={None: [10**6, 5]})
    with pytest.raises(RolloutError, match="question 'odd'"):
        server.generate_requests([good, good, (odd, None)], GREEDY)
    assert tokens(server.generate_requests([good], GREEDY)) == want


@pytest.mark.parametrize("how", ["error", "thread", "silence"])
def test_what_ends_a_call_leaves_no_request_in_the_server(world, server, monkeypatch, how):
    ask = [(question, None) for question in world.questions]
    long = Sampling(n=4, max_tokens=150, seed=1)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    if how == "error":
        with pytest.raises(KeyboardInterrupt):
            server.generate_requests([*ask, (ask[0][0], "bayesian")], long, progress=stop)
    elif how == "thread":
        timer = threading.Timer(0.3, server.interrupt)
        timer.start()
        with pytest.raises(Interrupted):
            server.generate_requests(ask, long)
        timer.join()
        with monkeypatch.context() as patch:  # before the first request is out
            patch.setattr(server, "_owners", lambda asked: server.interrupt() or [0] * len(asked))
            with pytest.raises(Interrupted):
                server.generate_requests(ask, long)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(server._asker, "timeout", 0.05)
            with pytest.raises(RolloutError, match=r"no answer from http.*rollout\.server_timeout"):
                server.generate_requests(ask, long)
    until = time.monotonic() + 20
    while not idle(server):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(server.generate_requests(ask, GREEDY)) == 4


def test_sleep_wake_and_random_state(world, server):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    want = tokens(server.generate_requests([(world.questions[0], None)], GREEDY))
    server.sleep()
    server.wake()
    assert tokens(server.generate_requests([(world.questions[0], None)], GREEDY)) == want
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["server", "inside"])
def test_hit_rate_is_what_the_prompts_share(world, request, kind):
    engine = request.getfixturevalue(kind)
    engine.reset_caches()
    engine.stats()
    n, requests = 2, [(q, g) for q in world.questions for g in GUIDELINE_NAMES]
    rollouts = engine.generate_requests(requests, Sampling(n=n, max_tokens=4, seed=1))
    stats = engine.stats()
    found, asked = shared_tokens(requests, [q.prompt_ids(g) for q, g in requests], n, 32)
    assert stats.prefix_cache_hit_rate == pytest.approx(found / asked, abs=0.02)
    assert 0.5 < stats.prefix_cache_hit_rate < 1
    assert (stats.requests, stats.sequences) == (16, 32)
    assert stats.generated_tokens == sum(map(len, tokens(rollouts)))
    assert engine.stats().prefix_cache_hit_rate is None


def test_shared_tokens_against_plain_prefix_comparison(world):
    """Another way to count: the longest common prefix with any earlier prompt, cut to blocks."""
    requests = [(q, g) for q in world.questions for g in (*GUIDELINE_NAMES, None)]
    prompts = [q.prompt_ids(g) for q, g in requests]
    for block, n in ((16, 1), (32, 3)):
        expected = 0
        for i, ids in enumerate(prompts):
            most = (len(ids) - 1) // block
            best = 0
            for (other, _), before in zip(requests[:i], prompts[:i], strict=True):
                same = 0
                for a, b in zip(before, ids, strict=False):
                    # Placeholders of another question's images are other tokens.
                    if a != b or (
                        a == world.builder.image_token_id and other is not requests[i][0]
                    ):
                        break
                    same += 1
                best = max(best, same // block)
            expected += (min(best, most) + (n - 1) * most) * block
        assert shared_tokens(requests, prompts, n, block) == (expected, n * sum(map(len, prompts)))
        assert expected > 0


def test_a_low_hit_rate_is_warned_about_once(world, caplog):
    requests = [(world.questions[0], g) for g in GUIDELINE_NAMES]
    prompts = [q.prompt_ids(g) for q, g in requests]
    found, asked = shared_tokens(requests, prompts, 4, 32)
    sharing = PrefixSharing(32)
    for measured in (None, 0.51 * found / asked):
        sharing.add(requests, prompts, 4)
        sharing.check(measured)
    assert not caplog.messages
    for _ in range(2):
        sharing.add(requests, prompts, 4)
        sharing.check(0.49 * found / asked)
    sharing.check(0.0)  # nothing was asked
    assert len(caplog.messages) == 1
    assert re.search("rollout.kv_cache_memory_bytes.*gpu_memory_utilization", caplog.messages[0])


def test_servers_that_cannot_serve_are_named_with_the_command_to_start_one(world, server):
    url = server._servers[0].url
    with pytest.raises(RolloutError) as caught:
        start(world, engine="server", server_urls=["http://127.0.0.1:9"], server_timeout=1)
    said = str(caught.value)
    assert "http://127.0.0.1:9 does not answer" in said
    assert "VLLM_SERVER_DEV_MODE=1" in said and f"vllm serve {world.folder}" in said
    assert "--logprobs-mode processed_logprobs" in said and "--enable-scale-out" in said
    with pytest.raises(RolloutError, match="--max-lora-rank 16, needed 32") as caught:
        start(world, engine="server", server_urls=[url], max_lora_rank=32)
    assert url in str(caught.value) and "vllm serve" in str(caught.value)
    model = ModelConfig(path=str(world.folder), dtype="float32")
    settings = RolloutConfig(engine="server", server_urls=[url], **SETTINGS)
    with pytest.raises(RolloutError, match=r"--max-model-len 480, needed 999.*needed 3 images"):
        create_engine(model, settings, world.builder, max_model_len=999, max_images=3)


def test_vision_adapters_are_refused(world, server, tmp_path):
    vision = shared.make_adapter(
        world.folder, tmp_path / "vision", 1, target_modules=r".*visual.*qkv"
    )
    with pytest.raises(RolloutError, match="adapts the vision tower"):
        server.load_adapter(vision, 1)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_server_dies_with_a_trainer_that_is_killed(tmp_path):
    """Also when it ignores SIGTERM and has children of its own."""
    pids = tmp_path / "pids"
    stubborn = (
        f"trap '' TERM; sleep 600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait; wait"
    )
    trainer = (
        "import os, subprocess, sys, time\n"
        f"guard = [sys.executable, '-I', '-S', {str(GUARD)!r}, str(os.getpid())]\n"
        f"subprocess.Popen([*guard, 'bash', '-c', {stubborn!r}], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", trainer])
    until = time.monotonic() + 30
    while not pids.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, started))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 40
    while any(map(alive, started)):
        assert time.monotonic() < until, "the server outlived its trainer"
        time.sleep(0.1)


def test_flags_of_the_command():
    from mmedx_fast.rollout.vllm_options import command_line

    assert command_line({"max_model_len": 5, "enable_lora": True, "a_b": False, "m": {"x": 1}}) == [
        *("--max-model-len", "5", "--enable-lora", "--no-a-b", "--m", json.dumps({"x": 1}))
    ]


def test_a_server_that_dies_is_reported_with_its_log_and_close_ends_all(world, server, log):
    """The last test: it ends the server."""
    processes = [
        p for p in os.listdir("/proc") if p.isdigit() and _group(p) == server._process._process.pid
    ]
    assert len(processes) >= 3  # guard, HTTP server, engine
    for pid in processes:
        if (
            b"api_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and b"_guard" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ):
            os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(RolloutError) as caught:
        for _ in range(20):
            server.generate_requests([(world.questions[0], None)], GREEDY)
    assert str(log) in str(caught.value) and server._servers[0].url in str(caught.value)
    server.close()
    server.close()
    until = time.monotonic() + 30
    while any(alive(int(pid)) for pid in processes):
        assert time.monotonic() < until, "close left processes behind"
        time.sleep(0.1)
    assert "api_server" in log.read_text().splitlines()[0]
    with pytest.raises(RolloutError, match="closed"):
        server.generate_requests([(world.questions[0], None)], GREEDY)


def _group(pid: str) -> int:
    try:
        return os.getpgid(int(pid))
    except ProcessLookupError:
        return 0
