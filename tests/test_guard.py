"""Steps that cannot be taken change nothing, and are redone, dumped or counted."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig
from mmedx_fast.policy import Policy
from mmedx_fast.tree import pack_row

STAGES = [0, 1, 2, 3]


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vl.save(tmp_path_factory.mktemp("model") / "tiny-vl")


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"zero{stage}")
def policy(request, base):
    made = load(base, request.param)
    yield made
    made.close()


def load(base, stage, **options):
    """A policy whose rate differs from step to step."""
    return Policy.load(
        base,
        model=ModelConfig(dtype="float32", gradient_checkpointing=False),
        lora=LoraConfig(r=4, lora_alpha=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.01, **options),
        total_steps=20,
        deepspeed={"zero_optimization": {"stage": stage}},
        seed=3,
    )


def rows(policy, seed):
    """Rows with image and text."""
    generator = torch.Generator().manual_seed(seed)
    made = [tiny_vl.make_tree(generator, grids=g, name=str(g)) for g in (((1, 4, 6),), ())]
    return [pack_row([tree], policy.rope_index) for tree in made]


def learn(policy, seed, **options):
    for row in rows(policy, seed):
        policy.sft_backward(row, torch.full(row.targets.shape, 0.01))
    return policy.step(**options)


def same(ours, theirs):
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for key, value in theirs[0].items():
        assert torch.equal(ours[0][key], value), key


# -- updates that are not made ---------------------------------------------------------------------


def bad_loss(policy):
    first, second = rows(policy, 1)
    policy.sft_backward(first, torch.full(first.targets.shape, torch.inf))
    policy.sft_backward(second, torch.ones(len(second.targets)))
    return policy.step()


def large_norm(policy):
    limit = policy._engine._verdict.limit
    policy._engine._verdict.limit = 1e-3
    try:
        return learn(policy, 2)
    finally:
        policy._engine._verdict.limit = limit


def refused(policy):
    return learn(policy, 3, refuse=True)


@pytest.mark.parametrize("bad", [bad_loss, large_norm, refused], ids=lambda bad: bad.__name__)
def test_a_skipped_update_leaves_all_but_the_schedule(policy, bad):
    learn(policy, 0)
    tensors, meta = policy.state()
    report = bad(policy)
    assert report["skipped"] == 1.0
    assert (report["grad_norm"] > 1e-3) == (bad is large_norm)
    counted = meta | {"scheduler_step": meta["scheduler_step"] + 1}
    same(policy.state(), (tensors, counted))
    assert learn(policy, 4)["skipped"] == 0.0
    after = policy.state()
    # Nothing of the skipped gradients is in the next update.
    policy.load_state(tensors, counted)
    learn(policy, 4)
    same(policy.state(), after)
    assert not torch.equal(after[0][next(iter(tensors))], tensors[next(iter(tensors))])


def test_the_limit_comes_from_the_configuration(base):
    policy = load(base, 0, max_step_grad_norm=1e-3)
    before = policy.state()[0]
    report = learn(policy, 0)
    assert report["skipped"] == 1.0 and report["grad_norm"] > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in policy.state()[0].items())
    policy.close()


# -- backward passes that are cut short ------------------------------------------------------------


def cut_short(policy, row, layer, direction):
    """Run a row's forward and backward until a layer is reached, and run out of memory there."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    module = policy.module.base.model.language_model.layers[layer].mlp.down_proj
    if direction == "forward":
        handle = module.register_forward_hook(fail)
    else:
        handle = module.register_full_backward_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            policy.sft_backward(row, torch.full(row.targets.shape, 0.5))
    finally:
        handle.remove()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("before", [0, 1], ids=["first row", "second row"])
def test_a_row_cut_short_leaves_nothing_behind(policy, direction, before):
    learn(policy, 0)
    state = policy.state()
    report = learn(policy, 5)
    wanted = policy.state()
    policy.load_state(*state)
    made = rows(policy, 1)
    for row in made[:before]:
        policy.sft_backward(row, torch.full(row.targets.shape, 0.7))
    cut_short(policy, made[before], before, direction)
    policy.discard()
    same(policy.state(), state)
    assert learn(policy, 5) == report
    same(policy.state(), wanted)
