"""Parts of the stages that need no engine: order of the data, adapters as factors, merge candidates, scores."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmedx_fast import ranks
from mmedx_fast.atomic import DiskFullError, clean
from mmedx_fast.checkpoint import rng_state, save_checkpoint
from mmedx_fast.config import CaciConfig, ConfigError, LoraConfig
from mmedx_fast.policy_adapter import AdapterError, write_adapter
from mmedx_fast.rollout import Interrupted
from mmedx_fast.run_folder import Stage
from mmedx_fast.stages import common
from mmedx_fast.stages.adapters import base_notes, by_linear, load_factors, write_mean_adapter
from mmedx_fast.stages.common import StopSignal, data_note, load_progress
from mmedx_fast.stages.context import batches
from mmedx_fast.tree import Tree

TARGETS = r".*(first|second)"


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 10, bias=False)
        self.second = nn.Linear(10, 14, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def make_adapter(
    folder: Path, seed: int, fingerprint: str = "f0", durable: bool = True, **options: object
) -> nn.Module:
    """A PEFT adapter with random factors, on disk; returns the PEFT model for comparison."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)
    model = peft.get_peft_model(Base(), config)
    tensors = {}
    for name, param in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param)
            tensors[name.replace(".default", "")] = param.detach().clone()
    write_adapter(folder, tensors, config, "some/base", fingerprint, durable=durable)
    return model


def delta(model: nn.Module, linear: str) -> torch.Tensor:
    return getattr(model.base_model.model, linear).get_delta_weight("default").double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"r": 3, "rank_pattern": {"first": 5}, "alpha_pattern": {"second": 11}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_factors_give_peft_s_delta(tmp_path: Path, options: dict[str, object]) -> None:
    model = make_adapter(tmp_path / "a", 1, **options)
    factors = load_factors(tmp_path / "a")
    assert sorted(factors) == ["first", "second"]
    for linear, found in factors.items():
        torch.testing.assert_close(
            found.delta(dtype=torch.float32).double(), delta(model, linear), rtol=1e-5, atol=1e-5
        )


def test_mean_adapter_is_the_truncated_svd_of_the_mean(tmp_path: Path) -> None:
    models = {name: make_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")}
    sources = {name: tmp_path / name for name in models}
    share = write_mean_adapter(tmp_path / "mean", sources, LoraConfig(r=5, lora_alpha=10))
    found = load_factors(tmp_path / "mean")
    kept = whole = 0.0
    for linear in ("first", "second"):
        mean = torch.stack([delta(model, linear) for model in models.values()]).mean(0)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        best = u[:, :5] * s[:5] @ v[:5]
        torch.testing.assert_close(found[linear].delta().double(), best, rtol=1e-4, atol=1e-4)
        kept, whole = kept + float((s[:5] ** 2).sum()), whole + float((s**2).sum())
    assert share == pytest.approx(kept / whole, rel=1e-4)
    assert json.loads((tmp_path / "mean" / "mean.json").read_text())["experts"] == list("abc")


def test_adapters_of_two_bases_are_refused_by_name(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", 1, "f0")
    make_adapter(tmp_path / "b", 2, "f1")
    with pytest.raises(AdapterError, match=r"b .*f1.*a on .*f0"):
        base_notes({"a": tmp_path / "a", "b": tmp_path / "b"})


def test_a_full_disk_leaves_the_adapter_before_and_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    make_adapter(tmp_path / "adapter", 1)
    before = load_factors(tmp_path / "adapter")["first"].delta()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DiskFullError, match=r"adapter \(736 bytes\).*free some space"):
        make_adapter(tmp_path / "adapter", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(load_factors(tmp_path / "adapter")["first"].delta(), before)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("renamed", [False, True], ids=["before", "after"])
def test_a_kill_between_the_renames_leaves_one_whole_adapter(
    tmp_path: Path, nth: int, renamed: bool
) -> None:
    make_adapter(tmp_path / "adapter", 1)
    before = load_factors(tmp_path / "adapter")["first"].delta()
    pid = os.fork()
    if pid == 0:
        real, calls = os.rename, iter(range(1, 9))

        def dying(*args: str) -> None:
            last = next(calls) == nth
            if not last or renamed:
                real(*args)
            if last:
                os._exit(9)

        setattr(os, "rename", dying)  # noqa: B010
        try:
            make_adapter(tmp_path / "adapter", 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    found = load_factors(tmp_path / "adapter")["first"].delta()
    assert torch.equal(found, before) == ((nth, renamed) != (2, True))


def test_weights_are_on_the_disk_before_the_adapter_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    make_adapter(tmp_path / "adapter", 1)
    assert done.index("adapter_model.safetensors") < done.index("-> adapter")
    assert done[-1] == tmp_path.name
    done.clear()
    make_adapter(tmp_path / "quick", 1, durable=False)
    assert done == ["-> quick"]


def test_a_folder_that_was_replaced_in_one_being_filled_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / ".mmedx-old.12-ab..mmedx-tmp.12-cd.start").mkdir()
    clean(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_linear_only_one_adapter_touches(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", 1)
    make_adapter(tmp_path / "b", 2, target_modules=r".*second")
    joined = by_linear({name: load_factors(tmp_path / name) for name in "ab"})
    assert joined["first"][1] is None and joined["second"][1] is not None


def test_batches_are_epochs_and_depend_on_nothing_but_their_arguments() -> None:
    made = list(batches(10, 4, 15, ("seed", 1)))
    assert made == list(batches(10, 4, 15, ("seed", 1))) != list(batches(10, 4, 15, ("seed", 2)))
    assert made[:7] == list(batches(10, 4, 7, ("seed", 1)))
    flat = [index for batch in made for index in batch]
    for epoch in range(6):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert all(len(batch) == 25 for batch in batches(10, 25, 3, 0))


@pytest.mark.parametrize(("count", "size"), [(5, 4), (7, 5), (10, 4), (3, 3), (9, 1), (11, 10)])
def test_no_question_comes_twice_in_a_step(count: int, size: int) -> None:
    borders = 0
    for seed in range(20):
        made = list(batches(count, size, 3 * count, seed))
        assert all(len(set(batch)) == size for batch in made)
        flat = [index for batch in made for index in batch]
        for start in range(0, 3 * count * size, count):  # and each once an epoch
            assert sorted(flat[start : start + count]) == list(range(count))
        shuffled = random.Random(f"{seed}")
        plain = [i for _ in range(3 * size) for i in shuffled.sample(range(count), count)]
        borders += flat != plain
        # Where nothing repeats the order is the shuffled one.
        assert flat == plain or any(
            len(set(plain[at : at + size])) < size for at in range(0, len(plain), size)
        )
    assert bool(borders) == (count % size > 0)


def _questions(*rows: tuple[str, str]) -> Any:
    return [
        SimpleNamespace(id=id, record=SimpleNamespace(question=text, answer="yes"))
        for id, text in rows
    ]


TRAINED_ON = (("1", "Is it?"), ("2", "Was it?"))


@pytest.mark.parametrize(
    "now",
    [
        (*TRAINED_ON, ("3", "Will it?")),
        TRAINED_ON[:1],
        TRAINED_ON[::-1],
        (("1", "Is it?"), ("2", "Another row of that number?")),
    ],
    ids=["extended", "shortened", "reordered", "replaced"],
)
def test_a_run_does_not_go_on_with_other_questions(tmp_path: Path, now: Any) -> None:
    stage = Stage("gba", tmp_path, "f")
    tensors, rng = rng_state()
    loaded = []
    policy: Any = SimpleNamespace(load_state=lambda *_: loaded.append(1))

    def saved(step: int, **extra: Any) -> None:
        meta = {"policy": {}, "rng": rng, "meter": {}, "extra": extra}
        save_checkpoint(tmp_path, step, tensors, meta)

    saved(3)  # as before checkpoints said what they were trained on
    assert load_progress(stage, policy, _questions(*now), "rows.jsonl")[0] == 3
    saved(4, data=data_note(_questions(*TRAINED_ON)))
    assert load_progress(stage, policy, _questions(*TRAINED_ON), "rows.jsonl")[0] == 4
    assert len(loaded) == 2
    counts = f"after step 4.* 2 questions .now {len(now)}"
    with pytest.raises(ConfigError, match=rf"data.train = rows.jsonl.*{counts}.*delete {tmp_path}"):
        load_progress(stage, policy, _questions(*now), "rows.jsonl")
    assert len(loaded) == 2


def test_ranks_that_find_different_checkpoints_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that share no run folder would train on from different weights."""
    stage = SimpleNamespace(dir=tmp_path, name="gba")
    monkeypatch.setattr(ranks, "all_gather", lambda step: [4, step])
    with pytest.raises(ConfigError, match=rf"{tmp_path} \(rank 0 step 4, rank 1 step 0\).*share"):
        load_progress(stage, SimpleNamespace(), _questions(*TRAINED_ON), "rows.jsonl")


def test_candidates_span_the_lists_and_weigh_the_rl_model_last() -> None:
    from mmedx_fast.stages.caci import candidates

    specs = candidates(CaciConfig(density=(0.2, 0.5), scale=(1.0,), rl_weight=(1.0, 3.0)), 5)
    assert [(s.density, s.lam, s.weights) for s in specs] == [
        (d, 1.0, (1.0, 1.0, 1.0, 1.0, w)) for d in (0.2, 0.5) for w in (1.0, 3.0)
    ]


def test_summary_is_the_mean_over_specialties_not_over_questions() -> None:
    from mmedx_fast.stages.evaluate import summarise

    def row(specialty: str, correct: bool, guideline: str, adherence: float) -> dict[str, object]:
        return {
            "specialty": specialty,
            "guideline": guideline,
            "correct": correct,
            "correct_medevalkit": correct,
            "format_ok": True,
            "predicted": "A" if correct else None,
            "finish_reason": "stop",
            "adherence": adherence,
            "tokens": 3,
        }

    rows = [row("pediatrics", True, "bayesian", 1.0)] * 3 + [
        row("pediatrics", False, "analytic", 0.0)
    ]
    rows += [row("brain_senses", False, "analytic", 0.5)]
    found = summarise(rows)
    assert found["accuracy"] == {"pediatrics": 0.75, "brain_senses": 0.0}
    assert found["macro_accuracy"] == 0.375 and found["micro_accuracy"] == 0.6
    assert found["adherence"] == {"bayesian": 1.0, "analytic": 0.25}
    assert found["unparsed_rate"] == 0.4 and found["tokens"] == 15
    low, high = found["macro_interval"]
    assert low < 0.375 < high


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0.01)


def test_the_first_signal_is_kept_and_a_later_ctrl_c_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGINT,
        ):  # what a launcher makes of one
            send(number)
        assert stop.requested and stop.agreed()
        monkeypatch.setattr(common, "ONE_STOP_SECONDS", 0.05)
        for number in (signal.SIGTERM, signal.SIGTERM):
            time.sleep(0.1)
            send(number)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(0.1)
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_cuts_short_only_what_may_be() -> None:
    cuts: list[str] = []
    with StopSignal() as stop:
        with stop.cutting(lambda: cuts.append("early")):
            stop.heed(1, 2)
        assert not cuts
        with pytest.raises(Interrupted), stop.cutting(lambda: cuts.append("cut")):
            send(signal.SIGINT)
            send(signal.SIGTERM)
            assert cuts == ["cut"]
            stop.heed(1, 2)
        stop.heed(1, 2)  # outside the block
        with pytest.raises(Interrupted), stop.cutting(lambda: cuts.append("late")):
            pytest.fail("was begun")
    assert cuts == ["cut"]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_token_weights_of_a_steps_rows_add_up_to_one_mean(loss_type: str) -> None:
    """Two rows, three rollouts of unequal length: the weights are those of the step, not of a row. A
    row without work weighs nothing."""
    from mmedx_fast.stages.gba_update import Learner

    rollouts = [SimpleNamespace(token_ids=[7] * n) for n in (2, 3, 5)]
    rows = [
        SimpleNamespace(branch_index=torch.tensor([0, 0, 1, 1, 1])),
        SimpleNamespace(branch_index=torch.tensor([0] * 5)),
        SimpleNamespace(branch_index=torch.tensor([0])),
    ]
    plans = [SimpleNamespace(branches=branches) for branches in ((0, 1), (2,), ())]
    learner = SimpleNamespace(cfg=SimpleNamespace(rollout=SimpleNamespace(max_completion_length=5)))
    weights = Learner._weights(learner, plans, rows, rollouts, [0, 1, 2], loss_type)
    expected = {
        "grpo": [1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9] + [1 / 15] * 5,
        "bnpo": [0.1] * 10,
        "dapo": [0.1] * 10,
        "dr_grpo": [1 / 15] * 10,
    }[loss_type]
    torch.testing.assert_close(torch.cat(weights), torch.tensor([*expected, 0.0]))


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [
        # (images, prompts) of each question; which one is checked
        ([(0, 4), (1, 1), (1, 2), (2, 4)], 2),
        ([(0, 1), (0, 2), (1, 1)], 2),
        ([(0, 1), (0, 3)], 1),
        ([(0, 1), (0, 1)], 0),
    ],
)
def test_the_self_check_takes_a_question_that_shows_image_and_sharing(kinds, chosen) -> None:
    from types import SimpleNamespace

    from mmedx_fast.stages.common import check_tree

    questions = [
        SimpleNamespace(
            id=str(number),
            images=("image",) * images,
            guidelines=[f"guideline {k}" for k in range(prompts)],
            builder=SimpleNamespace(response_ids=lambda text: list(text.encode())),
            prompt_ids=lambda name: list(name.encode()),
            pixel_values=None,
            image_grid_thw=None,
        )
        for number, (images, prompts) in enumerate(kinds)
    ]
    seen: list[Tree] = []
    policy: Any = SimpleNamespace(verify_tree=seen.append)
    prompts = {question.id: question.guidelines for question in questions}
    check_tree(policy, questions, lambda question: prompts[question.id])  # type: ignore[arg-type]
    (tree,) = seen
    assert tree.name == str(chosen)
    pairs = {(tuple(b.prompt_ids), tuple(b.response_ids)) for b in tree.branches}
    assert len(pairs) == len(tree.branches) == kinds[chosen][1] + 1
    assert len({prompt for prompt, _ in pairs}) == kinds[chosen][1]


@pytest.mark.parametrize(("free", "device"), [(2.1, "cuda"), (1.9, "cpu")])
def test_the_merge_runs_on_the_gpu_where_it_fits(free, device, monkeypatch, caplog) -> None:
    from mmedx_fast.stages.caci import merge_device

    assert merge_device(1) == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1.1 * 2**30), 80 * 2**30))
    assert merge_device(2 * 2**30) == torch.device(device)
    assert ("1.9" in caplog.text or "2.1 GiB" in caplog.text) == (device == "cpu")


def test_a_split_s_format_and_options_reach_its_loader(tmp_path: Path) -> None:
    from mmedx_fast.config import load_config
    from mmedx_fast.stages.context import Context

    row = {"img_id": 1, "img_name": "x/source.jpg", "answer": "Yes", "location": "Abdomen",
           "modality": "CT", "answer_type": "CLOSED", "base_type": "vqa", "content_type": "Organ",
           "triple": ["vhead", "_", "_"]}  # fmt: skip
    rows = [
        row | {"qid": 1, "question": "Is the liver visible?", "q_lang": "en"},
        row | {"qid": 2, "question": "图中有肝脏吗?", "answer": "有", "q_lang": "zh"},
    ]
    (tmp_path / "imgs" / "x").mkdir(parents=True)
    (tmp_path / "imgs" / "x" / "source.jpg").write_bytes(b"not opened")
    (tmp_path / "test.json").write_text(json.dumps(rows))

    def loaded(*overrides: str) -> list[str]:
        cfg = load_config(None, ["data.format={test: slake}", *overrides])
        ctx = SimpleNamespace(cfg=cfg, _note_rejected=lambda *_: None)
        return [r.question for r in Context._load(ctx, str(tmp_path), "test")]

    assert loaded() == ["Is the liver visible?"]
    assert len(loaded("data.options={test: {language: both}}")) == 2
