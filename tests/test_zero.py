"""Two processes on the CPU train as one does, for every ZeRO stage."""

import importlib.util
import math
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmedx_fast import ranks
from mmedx_fast._paths import find_config
from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig, load_config
from mmedx_fast.cost import PhaseMeter
from mmedx_fast.ops import PolicyLossSpec, merge_metrics
from mmedx_fast.planner import plan_ranks
from mmedx_fast.policy import Policy
from mmedx_fast.rollout import Rollout
from mmedx_fast.stages import dsa, gba_update, guard
from mmedx_fast.stages.common import step_rates

CASES = [("frozen", 1), ("trained", 2), ("frozen", 3), ("trained", 3)]
"""The vision tower, and the ZeRO stage."""
TARGETS = {"frozen": LoraConfig().target_modules, "trained": r".*\.(qkv|q_proj|down_proj)"}
FULL = [("trained", 0), ("trained", 1), ("frozen", 2), ("trained", 3)]
"""The same where all weights train."""
KEY_BIAS = ("k_proj.bias", "qkv.bias")
"""Softmax ignores a shift of all keys: its gradient is rounding alone, and so is Adam's direction."""
STEPS = 3
BOUND = 120
WORLD = 2
SECONDS = 400
"""A deadlock ends here."""


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")


def questions(step):
    """Image questions, text and both, the last of the first step longer than two rows; the last step has less
    work than ranks."""
    generator = torch.Generator().manual_seed(step)
    one, none, two = ((1, 4, 6),), (), ((1, 4, 4), (1, 6, 4))
    grids = [(one, none, two), (none, one), ()][step]
    trees = [
        tiny_vl.make_tree(generator, grids=g, name=str(i), guidelines=9 if g == two else 3)
        for i, g in enumerate(grids)
    ]
    return trees or [tiny_vl.make_tree(generator, guidelines=1, generations=1, grids=one)]


def update(policy, step):
    """One update on this rank's share of the step's rows, by SFT and RL in turn."""
    trees = questions(step)
    total = sum(len(branch.response_ids) for tree in trees for branch in tree.branches)
    plans = plan_ranks(trees, ranks.world_size(), BOUND)[ranks.rank()]

    def learn(index, row):
        plan = plans[index]
        weight = torch.full(row.targets.shape, 1 / total if plan.branches else 0.0)
        if step % 2:
            return policy.sft_backward(row, weight)
        branches = torch.tensor(plan.branches or (0,))[row.branch_index]
        given = {
            "advantages": torch.cos(branches.float()),
            "old_logprob": policy.logprobs(row, temperature=1.0)[0],
        }
        return policy.backward(row, token_weight=weight, spec=PolicyLossSpec(), **given)

    raw = policy.over_rows([plan.pack(policy.rope_index) for plan in plans], learn)
    merged = merge_metrics(part for own in ranks.all_gather(raw) for part in own)
    return {
        "loss": merged["sum:loss"],
        "tokens": merged["sum:tokens"],
        "grad_norm": policy.step()["grad_norm"],
    }


def train(base, stage, tower, adapter=None):
    """The curve, the final adapter and optimizer state, and the base's checksums around them."""
    policy = Policy.load(
        base,
        model=ModelConfig(dtype="float32", gradient_checkpointing=False),
        lora=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[tower]),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.01),
        total_steps=8,
        deepspeed={"zero_optimization": {"stage": stage}},
        seed=3,
    )
    assert policy.tower_frozen == (tower == "frozen")
    before = policy.base_checksum()
    verified = policy.verify_tree(questions(0)[0])["max"]
    curve = [update(policy, step) for step in range(STEPS)]
    state = policy.state()
    if adapter is not None:
        policy.save_adapter(adapter)
    result = {
        "curve": curve,
        "verified": verified,
        "adapter": policy.adapter_tensors(),
        "state": state[0],
        "base_unchanged": policy.base_checksum() == before,
    }
    policy.close()
    return result


def train_full(base, stage, tower, dtype="float32", folder=None):
    """As :func:`train`, with all weights trained; also what a loaded state and the written model hold."""
    policy = Policy.load(
        base,
        model=ModelConfig(dtype=dtype, gradient_checkpointing=stage == 3),
        lora=LoraConfig(),
        finetuning_type="full",
        freeze_vision_tower=tower == "frozen",
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.01),
        total_steps=8,
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    before = policy.base_checksum()
    curve = [update(policy, step) for step in range(STEPS)]
    state, meta = policy.state()
    policy.load_state({name: value + 1.0 for name, value in state.items()}, meta)
    moved, _ = policy.state()
    policy.load_state(state, meta)
    again, _ = policy.state()
    if folder is not None:
        policy.save_model(folder, max_shard_size=100_000)
    result = {
        "curve": curve,
        "state": state,
        "weights": dict(policy.weights()),
        "loaded": all(torch.equal(again[name], value) for name, value in state.items())
        and all(torch.equal(moved[name], value + 1.0) for name, value in state.items()),
        "frozen_unchanged": policy.base_checksum() == before,
    }
    policy.close()
    return result


def stage_steps(base, zero):
    """What an update of GBA and one of DSA report, on rows of the same questions."""
    overrides = ["gba.max_row_tokens=120", "gba.loss.beta=0.01", "gba.max_rollout_mismatch=99.0"]
    cfg = load_config(find_config("demo.yaml"), overrides)
    policy = Policy.load(
        base,
        model=ModelConfig(dtype="float32", gradient_checkpointing=False),
        lora=LoraConfig(r=4, lora_alpha=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        total_steps=8,
        deepspeed={"zero_optimization": {"stage": zero}},
        seed=3,
    )
    meter, trees = PhaseMeter({}), questions(0)
    rollouts = [
        rollout_of(number, sample, branch)
        for number, tree in enumerate(trees)
        for sample, branch in enumerate(tree.branches)
    ]
    asked = [
        SimpleNamespace(pixel_values=t.pixel_values, image_grid_thw=t.image_grid_thw, id=t.name)
        for t in trees
    ]
    bound, rates = guard.RowBound(cfg.gba), step_rates(policy, cfg)
    learner = gba_update.Learner(cfg, policy, meter, rates, bound)
    advantages = torch.cos(torch.arange(len(rollouts)).float())
    first, _ = learner.update(asked, rollouts, advantages, torch.arange(len(rollouts)) != 4)
    nan = torch.where(torch.arange(len(rollouts)) == 0, math.nan, advantages)
    before = policy.state()
    skipped, _ = learner.update(asked, rollouts, nan, torch.arange(len(rollouts)) >= 0)
    after = policy.state()
    untouched = all(torch.equal(after[0][key], value) for key, value in before[0].items())
    found = [
        first,
        _sft_step(policy, trees, meter, cfg),
        {
            "adapter": policy.adapter_tensors(),
            "skipped": skipped["skipped"] == 1.0 and untouched,
            "counted": after[1]["scheduler_step"] - before[1]["scheduler_step"],
        },
    ]
    policy.close()
    return found


def rollout_of(question, sample, branch):
    return Rollout(
        question=question,
        guideline=None,
        sample=sample,
        prompt_ids=list(branch.prompt_ids),
        token_ids=list(branch.response_ids),
        logprobs=[-5.0] * len(branch.response_ids),
        finish_reason="stop",
        text="",
    )


def _sft_step(policy, trees, meter, cfg):
    def tree_of(tree, *_):
        return tree, [len(branch.response_ids) for branch in tree.branches]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsa, "sft_tree", tree_of)
        bound = guard.RowBound(cfg.gba)
        rates, ctx = step_rates(policy, cfg), SimpleNamespace(cfg=cfg)
        return dsa._update(policy, trees, 1, meter, rates, ctx, bound)[0]


def _worker(rank, port, base, folder):
    warnings.simplefilter("ignore")  # FutureWarnings of torch.distributed, one per collective
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        for tower, stage in CASES:
            name = f"{tower}-{stage}"
            result = train(base, stage, tower, folder / f"adapter-{name}")
            torch.save(result, folder / f"{name}-{rank}.pt")
        for tower, stage in FULL:
            name = f"full-{tower}-{stage}"
            torch.save(
                train_full(base, stage, tower, folder=folder / name), folder / f"{name}-{rank}.pt"
            )
        found = train_full(base, 3, "trained", "bfloat16")
        torch.save(found, folder / f"full-bfloat16-{rank}.pt")
        torch.save(stage_steps(base, 2), folder / f"stages-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # the other rank must not wait for this one's exit handlers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vl.save(tmp_path_factory.mktemp("model") / "tiny-vl")


@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory):
    """The folder with what both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(rank, port, base, folder)) for rank in range(WORLD)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    stuck = [worker for worker in workers if worker.is_alive()]
    for worker in stuck:
        worker.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
    assert not errors, errors
    assert all(worker.exitcode == 0 for worker in workers if worker not in stuck)
    assert not stuck, (
        f"{len(stuck)} ranks hang; done: {sorted(p.name for p in folder.glob('*.pt'))}"
    )
    return folder


@pytest.fixture(scope="module")
def one_process(base):
    return {tower: train(base, 0, tower) for tower in TARGETS}


@pytest.fixture(scope="module")
def one_process_full(base):
    found = {tower: train_full(base, 0, tower) for tower in TARGETS}
    return found | {"bfloat16": train_full(base, 0, "trained", "bfloat16")}


def test_the_steps_hold_what_makes_ranks_differ():
    plans = [
        [row for rank in plan_ranks(questions(s), WORLD, BOUND) for row in rank]
        for s in range(STEPS)
    ]
    assert any(row.blank_image for step in plans for row in step)
    assert any(not row.branches for row in plans[-1])
    assert max(map(len, plans)) > WORLD


@pytest.mark.parametrize(("tower", "stage"), CASES)
def test_two_ranks_learn_what_one_process_learns(two_processes, one_process, tower, stage):
    wanted = one_process[tower]
    found = [
        torch.load(two_processes / f"{tower}-{stage}-{rank}.pt", weights_only=True)
        for rank in range(WORLD)
    ]
    for result in found:
        assert result["base_unchanged"] and result["verified"] < 1e-4
        assert len(result["curve"]) == STEPS
        for ours, theirs in zip(result["curve"], wanted["curve"], strict=True):
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        for key, value in wanted["adapter"].items():
            torch.testing.assert_close(result["adapter"][key], value, rtol=1e-3, atol=1e-4)
        assert result["state"].keys() == wanted["state"].keys()
    for part in ("adapter", "state"):
        for key, value in found[0][part].items():
            assert torch.equal(value, found[1][part][key]), key
    assert found[0]["curve"] == found[1]["curve"]


def both_ranks(folder, name):
    return [torch.load(folder / f"{name}-{r}.pt", weights_only=True) for r in range(WORLD)]


@pytest.mark.parametrize(("tower", "stage"), FULL)
def test_two_ranks_train_all_weights_as_one_process_does(
    two_processes, one_process_full, tower, stage
):
    from mmedx_fast.model_files import read_tensors, tensor_files

    wanted = one_process_full[tower]
    found = both_ranks(two_processes, f"full-{tower}-{stage}")
    for result in found:
        assert result["frozen_unchanged"] and result["loaded"]
        for ours, theirs in zip(result["curve"], wanted["curve"], strict=True):
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
        assert result["state"].keys() == wanted["state"].keys()
        for key, value in wanted["state"].items():
            if not key.endswith(KEY_BIAS):
                # Adam turns rounding of the smallest gradients into steps of up to the rate.
                bound = 0.02 * float(value.norm()) + 1e-6
                assert float((result["state"][key] - value).norm()) < bound, key
        for key, value in result["weights"].items():
            assert torch.equal(value, result["state"].get(f"param/{key}", value)), key
    for part in ("weights", "state"):
        assert all(torch.equal(value, found[1][part][key]) for key, value in found[0][part].items())
    assert found[0]["curve"] == found[1]["curve"]
    written = dict(read_tensors(tensor_files(two_processes / f"full-{tower}-{stage}")))
    assert written.keys() == found[0]["weights"].keys()
    assert all(torch.equal(value, written[key]) for key, value in found[0]["weights"].items())


def test_two_ranks_train_a_bfloat16_model_within_its_rounding(two_processes, one_process_full):
    wanted = one_process_full["bfloat16"]
    for result in both_ranks(two_processes, "full-bfloat16"):
        assert result["frozen_unchanged"] and result["loaded"]
        for ours, theirs in zip(result["curve"], wanted["curve"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=0.02)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
        for key, value in result["weights"].items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, result["state"][f"param/{key}"].bfloat16()), key


def test_the_stages_updates_are_those_of_one_process(two_processes, base):
    wanted = stage_steps(base, 0)
    for rank in range(WORLD):
        found = torch.load(two_processes / f"stages-{rank}.pt", weights_only=True)
        for ours, theirs in zip(found[:2], wanted[:2], strict=True):
            # Other rows may save another share of tokens.
            assert ours.pop("tokens_saved") > 1
            assert ours == pytest.approx(
                {k: v for k, v in theirs.items() if k in ours}, rel=1e-4, abs=1e-5, nan_ok=True
            )
            assert ours.keys() == theirs.keys() - {"tokens_saved"}
            assert ours["grad_norm"] > 0
        # A NaN in one rank's row: no rank takes the step, and the schedule counts it.
        assert found[2]["skipped"] and found[2]["counted"] == 1
        for key, value in wanted[2]["adapter"].items():
            torch.testing.assert_close(found[2]["adapter"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tower", "stage"), CASES)
def test_an_adapter_of_two_ranks_loads_in_one_process(two_processes, base, tower, stage):
    folder = two_processes / f"adapter-{tower}-{stage}"
    policy = Policy.load(
        base, model=ModelConfig(dtype="float32"), lora=LoraConfig(), adapter=folder
    )
    saved = torch.load(two_processes / f"{tower}-{stage}-0.pt", weights_only=True)["adapter"]
    loaded = policy.adapter_tensors()
    policy.close()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    assert any(value.abs().max() > 0 for key, value in saved.items() if "lora_B" in key)
