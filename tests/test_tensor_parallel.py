"""Two workers that share one model in process give the tokens of one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import ModelConfig, RolloutConfig
from mmedx_fast.rollout import RolloutError, Sampling, create_engine

pytest.importorskip("vllm")


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shared = _helper("test_rollout")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return shared.make_world(tmp_path_factory.mktemp("world"))


def engine(world, tensor_parallel_size: int):
    rollout = RolloutConfig(
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=32,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        max_lora_rank=16,
    )
    model = ModelConfig(path=str(world.folder), dtype="float32")
    return create_engine(model, rollout, world.builder, max_model_len=480, max_images=2)


def answers(world, tensor_parallel_size: int):
    """Rollouts of the base, of an adapter, and after a full reload of the weights."""
    made, rollouts = engine(world, tensor_parallel_size), []
    sampling = Sampling(n=2, max_tokens=16, seed=3, temperature=0.9)
    try:
        for adapter in (None, "a"):
            made.load_adapter(world.adapters.get(adapter), 1)
            rollouts += made.generate(world.questions, ["bayesian", None], sampling)
        made.load_weights(world.folder)
        rollouts += made.generate(world.questions, ["bayesian", None], sampling)
    finally:
        made.close()
    return rollouts


def test_two_workers_give_the_tokens_of_one(world):
    two, one = answers(world, 2), answers(world, 1)
    assert [r.token_ids for r in two] == [r.token_ids for r in one]
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0
        )
    base, adapted, again = ([r.token_ids for r in one[i : i + 16]] for i in (0, 16, 32))
    assert base == again != adapted


def test_one_engine_a_rank_and_tensor_parallel_exclude_each_other(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RolloutError, match="tensor_parallel_size=1, or rollout.engine=server"):
        engine(world, 2)
