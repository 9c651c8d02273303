"""The vision tower runs once for a question of a step, also where its rollouts take several rows."""

import gc
import importlib.util
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmedx_fast._paths import find_config
from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig, load_config
from mmedx_fast.cost import PhaseMeter
from mmedx_fast.planner import plan_rows
from mmedx_fast.policy import Policy
from mmedx_fast.rollout import Rollout
from mmedx_fast.stages import dsa, gba_update, guard
from mmedx_fast.stages.common import step_rates
from mmedx_fast.tree import count_tokens, pack_row


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")
ONE, TWO = ((1, 4, 4),), ((1, 4, 6), (1, 6, 4))
TOWER_LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(qkv|q_proj|down_proj)")
FULL = {"finetuning_type": "full", "freeze_vision_tower": False}
KINDS = {"frozen": {}, "lora": {"lora": TOWER_LORA}, "full": FULL}
"""What is trained; in all but the first the vision tower too."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vl.save(tmp_path_factory.mktemp("model") / "tiny-vl")


@pytest.fixture
def policies(base):
    made = []

    def make(kind, stage=0, checkpointing=False, dtype="float32", **options):
        model = ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing)
        policy = Policy.load(
            base,
            model=model,
            optimizer=OptimizerConfig(learning_rate=1e-2),
            total_steps=8,
            deepspeed={"zero_optimization": {"stage": stage}},
            **{"lora": LoraConfig(r=4, lora_alpha=8)} | KINDS[kind] | options,
        )
        assert policy.tower_frozen == (kind == "frozen")
        made.append(policy)
        if kind != "full":
            generator = torch.Generator().manual_seed(11)
            for param in policy._trained().values():
                param.data.normal_(0.0, 0.1, generator=generator)
        return policy

    yield make
    for policy in made:
        policy.close()


def count(policy):
    """The patches of every run of the vision tower from here on."""
    patches = []
    policy.module.base.model.visual.register_forward_pre_hook(
        lambda _, args: patches.append(len(args[0]))
    )
    return patches


def question(seed, grids, guidelines=4):
    return tiny_vl.make_tree(
        torch.Generator().manual_seed(seed), guidelines=guidelines, generations=1, grids=grids
    )


def bound(tree):
    """The most tokens that a rollout of the question takes: a row holds one of them."""
    return max(count_tokens(replace(tree, branches=(branch,))) for branch in tree.branches)


def parts(tree):
    return [plan.trees[0] for plan in plan_rows([tree], bound(tree))]


def split(policy, tree):
    """A question as rows of one guideline each."""
    assert len(parts(tree)) == 4
    return [pack_row([part], policy.rope_index) for part in parts(tree)]


def mixed(policy):
    """Rows in which parts of two questions alternate, share a row, and stand beside others; the same
    questions unsplit; their patches."""
    first, second, alone, text = trees = [
        question(seed, grids) for seed, grids in enumerate([ONE, TWO, ONE, ()])
    ]
    a, b = parts(first), parts(second)
    rows = [[a[0]], [b[0], alone], [a[1], b[1]], [text], [b[2]], [a[2]], [a[3]], [b[3]]]
    apart = [pack_row(row, policy.rope_index) for row in rows]
    return apart, [pack_row([tree], policy.rope_index) for tree in trees], 16 + 48 + 16


def sft(policy, rows):
    """The loss, every target of equal weight."""
    total = sum(len(row.targets) for row in rows)

    def work(_, row):
        weight = torch.full(row.targets.shape, 1 / total)
        return policy.sft_backward(row, weight)["sum:loss"]

    return sum(policy.over_rows(rows, work))


def gradients(policy):
    """Those since the last call; every trained parameter has one."""
    found = {name: param.grad.clone() for name, param in policy._trained().items()}
    policy.discard()
    return found


def assert_close(ours, theirs, bound=1e-5):
    assert ours.keys() == theirs.keys()
    norm = max(float(value.norm()) for value in theirs.values())
    for name, value in theirs.items():
        # Of a shift of all keys, which softmax ignores, the gradient is rounding alone.
        size = norm if name.endswith(("k_proj.bias", "qkv.bias")) else float(value.norm())
        assert float((ours[name] - value).norm()) <= bound * size, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_question_is_seen_once_and_its_gradient_is_that_of_one_row(
    policies, kind, checkpointing
):
    policy = policies(kind, checkpointing=checkpointing)
    tree = question(3, ONE)
    patches = count(policy)
    loss = sft(policy, [pack_row([tree], policy.rope_index)])
    whole = gradients(policy)
    assert sft(policy, split(policy, tree)) == pytest.approx(loss, abs=1e-5)
    assert_close(gradients(policy), whole)
    assert patches == [16, 16]  # the row, and its four parts


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_hold_parts_of_several_questions(policies, kind):
    policy = policies(kind)
    apart, together, images = mixed(policy)
    loss = sft(policy, together)
    whole = gradients(policy)
    patches = count(policy)
    assert sft(policy, apart) == pytest.approx(loss, abs=1e-5)
    assert_close(gradients(policy), whole)
    assert sum(patches) == images


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_takes_a_tower_whose_backward_waits(policies, stage):
    found = []
    for pick in (0, 1):
        policy = policies("full", stage=stage, checkpointing=True)
        patches = count(policy)
        rows = mixed(policy)
        losses = [sft(policy, rows[pick])]
        policy.step()
        tensors, _ = policy.state()  # the first moments are a tenth of the clipped gradient
        moments = {key: value for key, value in tensors.items() if key.startswith("exp_avg/")}
        losses.append(sft(policy, rows[pick]))
        policy.step()
        assert sum(patches) == 2 * rows[2]
        found.append((losses, moments))
    (losses, moments), (wanted, whole) = found
    assert losses == pytest.approx(wanted, abs=1e-4)
    assert_close(moments, whole)


def test_passes_without_gradient_share_a_trained_tower_too(policies):
    policy = policies("lora")
    apart, together, images = mixed(policy)
    patches = count(policy)

    def work(_, row):
        assert row.pixel_values is None
        return policy.logprobs(row, temperature=1.0, use="base")[0].sum()

    ours = sum(policy.over_rows(apart, work, use="base"))
    assert sum(patches) == images
    theirs = sum(policy.logprobs(row, temperature=1.0, use="base")[0].sum() for row in together)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert float(ours) != float(sum(policy.logprobs(r, temperature=1.0)[0].sum() for r in together))


def test_features_go_with_the_last_row_that_shows_the_image(policies):
    policy = policies("frozen")
    seen = []

    def work(index, row):
        gc.collect()
        alive = {number for number, features in enumerate(seen) if features() is not None}
        seen.append(weakref.ref(row.image_features))
        return alive

    # Of the first question three parts, of the second one.
    first, second, third = (parts(question(seed, ONE)) for seed in range(3))
    order = [first[0], first[1], second[0], first[2], third[0]]
    rows = [pack_row([part], policy.rope_index) for part in order]
    patches = count(policy)
    assert policy.over_rows(rows, work) == [set(), {0}, {0, 1}, {0, 1}, set()]
    assert patches == [16, 16, 16]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_of_gba_runs_a_frozen_tower_once_a_question(policies, passes):
    whole, cut = (_gba_step(policies("frozen"), passes, tokens) for tokens in (4096, 64))
    assert sum(whole[0]) == sum(cut[0]) == 16 + 48
    assert cut[1]["grad_norm"] == pytest.approx(whole[1]["grad_norm"], rel=1e-4)
    assert cut[2] > 3  # rows: more than questions


def _gba_step(policy, passes, tokens):
    """(patches of each run of the tower, metrics, rows)."""
    settings = [
        f"gba.max_row_tokens={tokens}",
        f"gba.num_iterations={passes}",
        f"gba.loss.beta={0.01 if passes > 1 else 0.0}",
        "gba.max_rollout_mismatch=99.0",
    ]
    cfg = load_config(find_config("demo.yaml"), settings)
    trees = [question(seed, grids, 8) for seed, grids in enumerate([ONE, TWO, ()])]
    rollouts = [
        Rollout(
            question=number,
            guideline=None,
            sample=sample,
            prompt_ids=list(branch.prompt_ids),
            token_ids=list(branch.response_ids),
            logprobs=[-5.0] * len(branch.response_ids),
            finish_reason="stop",
            text="",
        )
        for number, tree in enumerate(trees)
        for sample, branch in enumerate(tree.branches)
    ]
    asked = [
        SimpleNamespace(pixel_values=t.pixel_values, image_grid_thw=t.image_grid_thw, id=t.name)
        for t in trees
    ]
    limit = guard.RowBound(cfg.gba)
    learner = gba_update.Learner(cfg, policy, PhaseMeter({}), step_rates(policy, cfg), limit)
    patches = count(policy)
    every = torch.arange(len(rollouts))
    metrics, raw = learner.update(asked, rollouts, torch.cos(every.float()), every >= 0)
    return patches, metrics, len(raw)


def test_a_step_of_dsa_runs_the_tower_once_a_question(policies, monkeypatch):
    def tree_of(tree, *_):
        return tree, [len(branch.response_ids) for branch in tree.branches]

    monkeypatch.setattr(dsa, "sft_tree", tree_of)
    trees = [question(seed, grids, 8) for seed, grids in enumerate([ONE, TWO, ()])]
    found = []
    for kind, tokens in [("frozen", 4096), ("frozen", 64), ("lora", 4096), ("lora", 64)]:
        policy = policies(kind)
        cfg = load_config(find_config("demo.yaml"), [f"gba.max_row_tokens={tokens}"])
        patches, ctx, meter = count(policy), SimpleNamespace(cfg=cfg), PhaseMeter({})
        rates, limit = step_rates(policy, cfg), guard.RowBound(cfg.gba)
        metrics, raw = dsa._update(policy, trees, 1, meter, rates, ctx, limit)
        assert sum(patches) == 16 + 48
        found.append((metrics, len(raw)))
    for (whole, _), (cut, rows) in (found[:2], found[2:]):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert rows > 3  # more than questions
