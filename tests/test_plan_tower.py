"""What ``mmedx plan`` says a vision tower holds, against the bytes of real update steps."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench.saved import saved_for_backward
from mmedx_fast.config import Config
from mmedx_fast.cost import Assumptions, plan, plan_text
from mmedx_fast.cost_activations import RowMemory, Training, row_memory
from mmedx_fast.cost_memory import TOWER, images_at_once
from mmedx_fast.cost_tower import Images, feature_bytes, tower_memory
from mmedx_fast.flops import ModelShape
from mmedx_fast.gpus import GPUS
from mmedx_fast.policy_images import LeafFeatures, SharedFeatures, over_rows
from mmedx_fast.tree import PackedRow, RopeIndex, Tree, pack_row


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"tower_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measured = _load(Path(__file__).parent / "test_plan_measured.py")
memory, tiny_vl, WITHIN = measured.memory, measured.tiny_vl, measured.WITHIN


def _config(kind: str, text: tuple[int, ...]) -> dict[str, Any]:
    """The towers have the ratio of the published ones' MLP, and heads of 32."""
    config = measured._sizes(*text)
    vision = tiny_vl.VISION | {"depth": 4, "num_heads": 3}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 96, "hidden_size": text[0], "mlp_ratio": 4}
    else:
        vision |= {
            "hidden_size": 96,
            "intermediate_size": 256,
            "out_hidden_size": text[0],
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        }
    return config | {"model_type": kind, "vision_config": vision}


# (hidden, MLP, layers, heads, vocabulary) of the language model, (height, width) of the image in patches:
# in the first the language block's backward is the dearer one, in the second the tower's.
SIZES = {
    "language": ((192, 896, 3, 12, 320), (24, 28)),
    "tower": ((64, 160, 2, 4, 320), (32, 36)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    import transformers

    classes = {
        "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (
            transformers.Qwen2_5_VLConfig,
            transformers.Qwen2_5_VLForConditionalGeneration,
        ),
    }
    made = {}
    for kind, (sizes, model) in classes.items():
        for name, (text, _) in SIZES.items():
            torch.manual_seed(0)
            folder = made[kind, name] = tmp_path_factory.mktemp("model")
            model(sizes(**_config(kind, text))).save_pretrained(folder)
    return made


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model's stand-in for a kernel holds scores that a kernel does not. Beside the many keys of
    an image they would hide the tower; its own attention is torch's kernel, which holds none."""
    dense = measured._Varlen.forward, measured._Varlen.backward

    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        saved: list[torch.Tensor] = []
        hidden = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
        with _disable_current_modes():
            dense[0](hidden, *args)
        query, key, value, out, total, *ends = saved
        out = out.clone()
        ctx.save_for_backward(query, key, value, out, total.clone(), *ends)
        ctx.scale = hidden.scale
        return out

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once, and in sight: a checkpoint may compute its block again here.
        saved = SimpleNamespace(saved_tensors=ctx.saved_tensors, scale=ctx.scale)
        with _disable_current_modes():
            found = dense[1](saved, grad)
        return tuple(None if x is None else x.clone() for x in found)

    monkeypatch.setattr(measured._Varlen, "forward", staticmethod(forward))
    monkeypatch.setattr(measured._Varlen, "backward", staticmethod(backward))


class Case:
    """A model that is trained with its tower, and questions of one image each for it."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        dearer: str,
        dtype: str = "float32",
        checkpointing: bool = False,
    ) -> None:
        text, self.grid = SIZES[dearer]
        self.step = measured.full_step(folder, dtype, checkpointing, tower=True)
        self.model = ModelShape.from_config(_config(kind, text))
        size = 4 if dtype == "float32" else 2
        self.how = Training(size=size, checkpointing=checkpointing, full=True)
        self.rope = RopeIndex.of(self.step.module.base.config)
        self.image = self.grid[0] * self.grid[1] // 4

    def trees(self, count: int) -> list[Tree]:
        generator = torch.Generator().manual_seed(0)
        about: Any = (generator, 2, 2, ((1, *self.grid),), 40, 8)
        return [tiny_vl.make_tree(*about, response=60, name=f"q{i}") for i in range(count)]

    def split(self, count: int) -> list[PackedRow]:
        """Each question in two rows, the second ones behind the first ones of all."""
        trees = self.trees(count)
        halves = [
            [replace(tree, branches=tree.branches[half]) for tree in trees]
            for half in (slice(2), slice(2, 4))
        ]
        return [pack_row([tree], self.rope) for half in halves for tree in half]

    def tower(self, row: PackedRow) -> torch.Tensor:
        return self.step.module(_moved(row), None)

    def text(self, row: PackedRow) -> tuple[RowMemory, int]:
        """The language model's part, and the logits tile of a CPU as in test_plan_measured.py."""
        size, targets = self.how.size, len(row.targets)
        keys = sum(measured.Step(row, [], self.step.run).keys)
        used = row_memory(self.model, self.how, tokens=row.n_tokens, keys=keys, targets=targets)
        tile = 3 * 4 * targets * (self.model.vocab + 32)
        return used, tile + (4 * self.model.vocab * self.model.hidden if size == 2 else 0)


def _moved(row: PackedRow) -> PackedRow:
    """The row as a move to a GPU leaves it: with pixels of its own."""
    return replace(row, pixel_values=None if row.pixel_values is None else row.pixel_values.clone())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dearer", SIZES)
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_trained_towers_activations_are_the_measured_ones(
    kind, dearer, dtype, checkpointing, folders
) -> None:
    case = Case(folders[kind, dearer], kind, dearer, dtype, checkpointing)
    row = pack_row(case.trees(1), case.rope)
    with saved_for_backward(case.step.present) as kept:
        case.step.run(_moved(row))
    with memory.PeakMemory(*case.step.present) as live:
        case.step.run(_moved(row))
    used, tile = case.text(row)
    images = Images(row=case.image, row_images=1, held=case.image)
    tower = tower_memory(case.model, case.how, images)
    features = feature_bytes(case.model, case.how, images, trained=True)
    # At the loss, as in test_plan_measured.py.
    size, model = case.how.size, case.model
    last = (4 + size) * row.n_tokens * model.hidden
    last += size * model.hidden * (len(row.targets) + model.vocab)
    assert used.kept + last + tower.saved == pytest.approx(kept.peak, rel=WITHIN)
    ahead = used.kept + max(used.layer, used.head + tile)
    peak = features + tower.kept + max(ahead, tower.layer)
    assert peak == pytest.approx(live.peak, rel=WITHIN)
    # The tower is a large part of it, and in turn its backward and the language model's are the dearer.
    assert tower.kept > 0.25 * live.peak and features < WITHIN * peak
    if checkpointing:
        assert (tower.layer > ahead) == (dearer == "tower")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_questions_hold_the_graphs_of_all_their_images(dtype, checkpointing, folders) -> None:
    case = Case(folders["qwen2_5_vl", "tower"], "qwen2_5_vl", "tower", dtype, checkpointing)
    rows = case.split(3)
    merge = case.rope.spatial_merge_size

    def step() -> None:
        leaves = LeafFeatures(case.tower, merge, lambda loss: loss.backward(), rows)
        over_rows(rows, lambda _, row: case.step.run(row), leaves)

    step()
    with memory.PeakMemory(*case.step.present) as live:
        step()
    images = Images(row=case.image, row_images=1, held=3 * case.image, waits=True)
    tower = tower_memory(case.model, case.how, images)
    used, tile = case.text(rows[0])
    peak = feature_bytes(case.model, case.how, images, trained=True) + tower.kept
    peak += max(used.kept + max(used.layer, used.head + tile), tower.layer)
    assert peak == pytest.approx(live.peak, rel=WITHIN)
    assert tower.kept > 0.6 * peak


@pytest.mark.parametrize("how", ["split", "together", "several passes"])
def test_a_frozen_towers_features_are_the_measured_ones(how, folders) -> None:
    case = Case(folders["qwen2_5_vl", "language"], "qwen2_5_vl", "language")
    rows = [pack_row(case.trees(3), case.rope)] if how == "together" else case.split(3)
    shared = SharedFeatures(torch.no_grad()(case.tower), case.rope.spatial_merge_size, False)
    found = []
    with memory.PeakMemory(*case.step.present) as live:
        if how == "several passes":
            rows = [shared.give(row) for row in rows]
        over_rows(rows, lambda *_: found.append(live.live), shared)
    together = how == "together"
    count = 3 if together else 1
    images = Images(row=count * case.image, row_images=count, held=3 * case.image)
    planned = feature_bytes(case.model, case.how, images, trained=False)
    assert planned == pytest.approx(max(found), rel=WITHIN)


FULL = {"finetuning_type": "full", "freeze_vision_tower": False, "loss": {"beta": 0.0}}


def test_the_plan_counts_the_trained_tower() -> None:
    cfg = Config.model_validate(
        {
            "model": {"path": "qwen2.5-vl-7b-instruct"},
            "gba": FULL | {"questions_per_step": 1, "max_row_tokens": 60_000},
        }
    )
    found = plan(cfg, Assumptions(image_tokens=500), gpu=GPUS["h200"])
    parts = {part["name"]: part for part in found["memory"]}
    tower = parts[f"{TOWER} of 500 image tokens"]
    # inputs of 32 checkpointed blocks, the merger, pixels in bfloat16 and float32, cosines and sines
    each = 32 * 1280 * 2 + 1280 * (4 + 4 * 2) + 1176 * (2 + 4) + 2 * 4 * 80
    assert (tower["bytes"], tower["phase"]) == (2000 * each, "update")
    assert parts["image features"]["bytes"] == 500 * 3584 * 2
    assert TOWER in plan_text(found)
    frozen = cfg.model_copy(
        update={"gba": cfg.gba.model_copy(update={"freeze_vision_tower": True})}
    )
    less = plan(frozen, Assumptions(image_tokens=500), gpu=GPUS["h200"])
    assert not [part for part in less["memory"] if "vision" in part["name"]]
    # The tower's weights are trained as well: what is left is its activations.
    sums = [
        sum(x["bytes"] for x in p["memory"] if x["phase"] not in ("always", "rollout"))
        for p in (found, less)
    ]
    assert sums[0] - sums[1] >= 2000 * each


def test_a_towers_backward_counts_where_it_takes_more_than_the_row() -> None:
    """A small language model on a large image, which does not fit for the tower's sake alone."""
    short = {"max_completion_length": 8, "num_generations": 2}
    cfg = Config.model_validate(
        {
            "model": {"path": "qwen2-vl-2b-instruct"},
            "rollout": short | {"kv_cache_memory_bytes": 10**8},
            "gba": FULL | {"questions_per_step": 1, "max_row_tokens": 300_000},
        }
    )
    found = plan(cfg, Assumptions(image_tokens=160_000), gpu=GPUS["h200"])
    held = {
        p: sum(x["bytes"] for x in found["memory"] if x["phase"] == p)
        for p in ("always", "update", "layer", "head", "tower")
    }
    assert held["tower"] > max(held["layer"], held["head"])
    assert found["machine"]["peak"] == held["always"] + held["update"] + held["tower"]
    assert not found["machine"]["fits"]
    assert "gba.freeze_vision_tower=true" in found["machine"]["problems"][0]


# Prompt 700, a guideline 60: a part of a question has at least 761 tokens, a whole one 4,000 and more.
AT_ONCE = [
    ({}, 1, (10, 10, False)),  # 8,192 tokens
    ({"max_images": 3}, 1, (3, 3, False)),
    ({"questions_per_step": 6}, 1, (6, 6, False)),
    ({"questions_per_step": 6}, 4, (2, 2, False)),
    ({"max_row_tokens": 2000}, 1, (2, 16, True)),
    ({"max_row_tokens": 2000}, 4, (2, 4, True)),
    ({"max_response_tokens": 600}, 1, (10, 16, True)),
    ({"max_row_tokens": 300}, 1, (1, 16, True)),
]


@pytest.mark.parametrize(("gba", "gpus", "expected"), AT_ONCE)
def test_images_at_once_follow_rows_and_splits(gba, gpus, expected) -> None:
    row, held, split = expected
    settings = {"questions_per_step": 16} | gba

    def images(more: dict[str, Any], **rest: Any) -> Images:
        cfg = Config.model_validate(
            {"gba": settings | more, "rollout": {"num_generations": 4}, **rest}
        )
        return images_at_once(cfg, 500, 700, 60, 200, gpus)

    at_once = images(FULL)
    assert at_once == Images(row=500 * row, row_images=row, held=500 * held, waits=split)
    # Frozen features wait for the other rows of a question, and for the other passes.
    frozen = images({"loss": {"beta": 0.0}})
    assert frozen == replace(at_once, waits=False)
    questions = -(-settings["questions_per_step"] // gpus)
    for several in ({"num_iterations": 2, "loss": {"beta": 0.0}}, {"loss": {"beta": 0.1}}):
        assert images(several).held == 500 * questions
    # Where gradients meet within a backward, no graph waits.
    zero = {"zero_optimization": {"stage": 2}}
    alone = gpus > 1 and split
    assert images(FULL, deepspeed=zero).waits == (split and not alone)
    assert images(FULL, deepspeed=zero).held == 500 * (row if alone else held)
