"""TRL's trainer under guidelines: what is asked, the advantages against TRL's own, and whole short trainings."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset

from mmedx_fast.guidelines import GUIDELINES
from mmedx_fast.integrations import _trl_rows as rows
from mmedx_fast.integrations import trl as integration
from mmedx_fast.integrations._trl_head import attached
from tests import _trl

NAMES = list(GUIDELINES)
TWO = ["analytic", "bayesian"]


def canned(prompts: list[Any], made: Any) -> dict[str, Any]:
    """Rollouts that depend on nothing but their place."""
    tokenizer = _trl.processor().tokenizer
    ids = [tokenizer(str(prompt)[-40:])["input_ids"] for prompt in prompts]
    return {
        "prompt_ids": ids,
        "completion_ids": [[20 + i, 40, 60 + i % 3] for i in range(len(prompts))],
        "logprobs": [[-1.0, -0.5, -2.0] for _ in prompts],
    }


def table_reward(name: str, values: list[float | None]) -> Any:
    """A reward with one value per row of the batch."""

    def reward(completions: Any, **_: Any) -> list[float | None]:
        return values[: len(completions)]

    reward.__name__ = name
    return reward


FIRST: list[float | None] = [1.0, 0.0, None, 0.5, 0.5, 0.5, 0.25, None, 0.0, 1.0, 1.0, 1.0]
SECOND: list[float | None] = [None, 2.0, None, -1.0, 0.1, 0.2, 0.3, 0.4, None, None, 5.0, 5.5]


def make(folder: Any, cls: Any = None, options: Any = None, **given: Any) -> Any:
    config = {
        "num_generations": 6,
        "per_device_train_batch_size": 12,
        "reward_weights": [1.0, 0.5],
    }
    given.setdefault("reward_funcs", [table_reward("first", FIRST), table_reward("second", SECOND)])
    given.setdefault("rollout_func", canned)
    args = _trl.config(folder, **{**config, **(options or {})})
    cls = cls or integration.GuidelineGRPOTrainer
    made = _trl.trainer(_trl.text_model(), args, cls, **given)
    made._metrics["train"].clear()
    return made


def scored(made: Any, prompts: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scored batch of one question per prompt, and what was logged."""
    made.model.train()
    made._metrics["train"].clear()
    batch = [{"prompt": p} for p in prompts for _ in range(made.num_generations)]
    return made._generate_and_score_completions(batch), dict(made._metrics["train"])


AGGREGATIONS = [
    ("sum_then_normalize", "group"),
    ("sum_then_normalize", "batch"),
    ("sum_then_normalize", "none"),
    ("normalize_then_sum", "group"),
]


@pytest.mark.parametrize(("aggregation", "scale"), AGGREGATIONS)
def test_with_both_weights_one_the_advantages_are_those_of_trl(
    tmp_path: Any, aggregation: str, scale: str
) -> None:
    options = {"multi_objective_aggregation": aggregation, "scale_rewards": scale}
    stock = make(tmp_path, _trl.GRPOTrainer, options)
    mine = "group" if scale == "group" and aggregation == "sum_then_normalize" else None
    ours = make(
        tmp_path, options=options, guidelines=["analytic", "bayesian", "intuitive"], scale=mine
    )
    want, logged = scored(stock, ["fever", "cough"])
    got, also_logged = scored(ours, ["fever", "cough"])
    torch.testing.assert_close(got["advantages"], want["advantages"], rtol=0, atol=1e-6)
    assert want["advantages"].abs().max() > 0.3
    assert list(ours._logs["advantages"]) == pytest.approx(
        list(stock._logs["advantages"]), abs=1e-6
    )
    extra = {name for name in also_logged if name.startswith("guideline/")}
    lengths = {"num_tokens"}  # the instructions make prompts longer
    assert also_logged.keys() - extra == logged.keys()
    for name in logged.keys() - lengths:
        assert also_logged[name] == pytest.approx(logged[name], nan_ok=True), name
    assert len(extra) == 3 * (1 + 2)


def combined(row: int) -> float:
    parts = [w * r for w, r in ((1.0, FIRST[row]), (0.5, SECOND[row])) if r is not None]
    return sum(parts) if parts else math.nan


def test_the_default_compares_within_and_between_guidelines(tmp_path: Any) -> None:
    weights = {"analytic": 1.0, "bayesian": 2.0}
    made = make(tmp_path, guidelines=TWO, within=0.5, between=2.0, guideline_weights=weights)
    got, logged = scored(made, ["fever", "cough"])
    reward = torch.tensor([combined(i) for i in range(12)], dtype=torch.float64)
    want, means = [], defaultdict(list)
    for i in range(12):
        question, guideline = reward[i // 6 * 6 :][:6], reward[i // 3 * 3 :][:3]
        question, guideline = question[~question.isnan()], guideline[~guideline.isnan()]
        within = (reward[i] - guideline.mean()) / (guideline.std() + 1e-4)
        between = (guideline.mean() - question.mean()) / (question.std() + 1e-4)
        advantage = (0.5 * within + 2.0 * between) * (2.0 if i // 3 % 2 else 1.0)
        want.append(0.0 if reward[i].isnan() else advantage.item())
        means[TWO[i // 3 % 2]].append(reward[i])
    assert got["advantages"].tolist() == pytest.approx(want, abs=1e-5)
    for name in TWO:
        mean = torch.stack(means[name]).nanmean().item()
        assert logged[f"guideline/{name}/reward"] == [pytest.approx(mean)]
    seconds = [x for x in SECOND[:3] + SECOND[6:9] if x is not None]
    want_mean = pytest.approx(sum(seconds) / len(seconds))
    assert logged["guideline/analytic/rewards/second"] == [want_mean]


def test_every_question_is_asked_under_each_guideline_in_turn(tmp_path: Any) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, guideline: Any, **_: Any) -> list[float]:
        seen.extend(zip(prompts, guideline, strict=True))
        return [0.0] * len(prompts)

    made = make(
        tmp_path,
        options={"num_generations": 8, "per_device_train_batch_size": 16, "reward_weights": None},
        reward_funcs=reward,
    )
    given = [[{"role": "user", "content": "fever"}], [{"role": "user", "content": "cough"}]]
    scored(made, given)
    want = [
        (f"{question}\n\n{GUIDELINES[name].instruction}", name)
        for question in ("fever", "cough")
        for name in NAMES
        for _ in range(2)
    ]
    assert [(p[-1]["content"], name) for p, name in seen] == want
    assert given[0][0]["content"] == "fever", "the dataset's rows are left alone"
    assert list(made._logs["extra"]["guideline"]) == [name for _, name in want]


def test_the_question_reads_as_our_own_prompts() -> None:
    from mmedx_fast.config import DataConfig
    from mmedx_fast.data.records import Record
    from mmedx_fast.prompts import PromptBuilder

    builder = PromptBuilder(_trl.processor(), DataConfig())
    record = Record(
        id="1",
        dataset="d",
        split="s",
        images=[],
        question="Which?",
        options={"A": "x", "B": "y"},
        answer="x",
        answer_label="A",
    )
    plain = {"prompt": builder.messages(record)}
    for name in NAMES:
        asked = rows.ask(plain, name, GUIDELINES[name].instruction)
        assert asked == {"prompt": builder.messages(record, name), "guideline": name}


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("fever", "fever\n\nBe brief."),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "a\n\nBe brief."}, {"role": "assistant", "content": "b"}],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image"},
                        {"type": "text", "text": "\n\nBe brief."},
                    ],
                }
            ],
        ),
    ],
    ids=["string", "last user message", "image last"],
)
def test_where_the_instruction_stands(prompt: Any, want: Any) -> None:
    assert rows.ask({"prompt": prompt, "x": 1}, "mine", "Be brief.") == {
        "prompt": want,
        "x": 1,
        "guideline": "mine",
    }


def test_an_engine_that_makes_n_rollouts_of_a_prompt_gets_a_guidelines_share(tmp_path: Any) -> None:
    made = make(tmp_path, guidelines=TWO, rollout_func=None)
    asked: list[list[int]] = []

    class Engine:
        """vLLM's server as TRL asks it: n rollouts for every n-th prompt."""

        def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any) -> Any:
            asked.extend(prompts)
            each = [p for p in prompts[::num_generations] for _ in range(num_generations)]
            answers = [[len(p) % 50 + 20, *p[-2:]] for p in each]
            return None, answers, [[[-1.0]] * 3 for _ in answers], None

        def sync_weights(self) -> None: ...

    made.use_vllm, made.vllm_importance_sampling_correction = True, False
    made.vllm_generation, made._last_loaded_step = Engine(), -1
    output, _ = scored(made, ["fever", "cough"])
    assert len({tuple(p) for p in asked}) == 4
    answers = [
        a[m.bool()].tolist()
        for a, m in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    assert answers == [[len(p) % 50 + 20, *p[-2:]] for p in asked]


def blocks(guidelines: list[Any], **columns: Any) -> Dataset:
    prompts = [f"p{i}" for i in range(len(guidelines))]
    return Dataset.from_dict({"prompt": prompts, "guideline": guidelines, **columns})


def test_a_dataset_with_its_own_guidelines_keeps_questions_together(tmp_path: Any) -> None:
    order = ["x", "y", "y", "x", "x", "y", "x", "y"]
    dataset = blocks(order, question_id=[0, 0, 1, 1, 2, 2, 3, 3])
    made = make(tmp_path, train_dataset=dataset)
    drawn = list(made._get_train_sampler())
    assert len(drawn) == len(made._get_train_sampler()) == 4 * 6
    groups = [drawn[i : i + 6] for i in range(0, 24, 6)]
    assert sorted(groups) == [[2 * q] * 3 + [2 * q + 1] * 3 for q in range(4)]
    assert groups != sorted(groups), "shuffled"
    made.model.train()
    batch = [dict(dataset[row]) for row in groups[0] + groups[1]]
    output = made._generate_and_score_completions(batch)
    ids = torch.tensor([["x", "y"].index(row["guideline"]) for row in batch])
    rewards = torch.tensor([[math.nan if x is None else x for x in c] for c in (FIRST, SECOND)]).T
    torch.testing.assert_close(output["advantages"], made._advantages_of(rewards, ids, 6))


GOOD = blocks(["x", "y"])
PLAIN = Dataset.from_dict({"prompt": ["x"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": blocks(["x", "y", "x", "x"])}, r"rows 2 to 3 .* 'y' is missing"),
        ({"train_dataset": blocks(["x", "y", "x"])}, r"rows 2 to 2 .* 'y' is missing"),
        ({"train_dataset": blocks(["x", None])}, r"row 1 has guideline=None"),
        (
            {"train_dataset": blocks(["x", "y", "x", "y"], question_id=[1, 1, 2, 3])},
            r"rows 2 to 3 .*question_id are \[2, 3\]",
        ),
        ({"train_dataset": GOOD.to_iterable_dataset()}, "is a stream"),
        ({"train_dataset": GOOD, "guidelines": TWO}, "remove one"),
        ({"train_dataset": GOOD, "eval_dataset": blocks(["x", "z"])}, "evaluate under those"),
        (
            {"train_dataset": GOOD, "eval_dataset": {"a": GOOD, "b": GOOD.remove_columns("guideline")}},
            r"train_dataset has a column 'guideline' and eval_dataset\['b'\] has none",
        ),
        ({"guidelines": ["analytic", "guess"]}, "'guess' is not one of differential"),
        ({"guidelines": "analytic"}, "give a list of names"),
        ({"guidelines": ["analytic", "analytic"]}, "names one twice"),
        ({"guidelines": {"mine": " "}}, r"guidelines\['mine'\]"),
        ({}, "num_generations=6 cannot be split equally among 4 guidelines"),
        (
            {"guidelines": TWO, "options": {"num_generations_eval": 3}, "eval_dataset": PLAIN},
            "num_generations_eval=3",
        ),
        ({"guidelines": TWO, "guideline_weights": {"analytic": 1.0}}, "one weight for each"),
        ({"guidelines": TWO, "scale": "questions"}, "scale='questions' is not known"),
        ({"guidelines": TWO, "baseline": "median"}, "baseline='median' is not known"),
        ({"guidelines": TWO, "options": {"scale_rewards": "rank"}}, "scale_rewards='rank'"),
        ({"guidelines": TWO, "environment_factory": object}, "environment_factory is set"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_at_construction(
    tmp_path: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_a_prompt_without_a_user_is_refused() -> None:
    with pytest.raises(ValueError, match=r"roles \['system'\] and no 'user'"):
        rows.ask({"prompt": [{"role": "system", "content": "x"}]}, "mine", "Be brief.")


def test_own_instructions_and_the_head_that_can_be_left_out(tmp_path: Any) -> None:
    made = make(tmp_path, guidelines={"short": "Be brief.", "long": "Be long."}, fused_head=False)
    assert attached(made.model) is None
    assert attached(make(tmp_path, guidelines=TWO).model) is not None
    scored(made, ["fever", "cough"])
    assert list(made._logs["prompt"])[2:4] == ["fever\n\nBe brief.", "fever\n\nBe long."]


def test_unused_columns_leave_the_guidelines(tmp_path: Any) -> None:
    dataset = blocks(["x", "y"] * 2, other=[0] * 4)
    made = make(tmp_path, options={"remove_unused_columns": True}, train_dataset=dataset)
    loaded = next(iter(made.get_train_dataloader()))
    assert set(loaded[0]) == {"prompt", "guideline"} and loaded[0]["guideline"] in ("x", "y")


def test_a_training_with_images_under_guidelines(tmp_path: Any) -> None:
    """Two steps of the tiny VLM: what it logs, and that the prompts really were asked."""
    asked: list[str] = []

    def reward(prompts: Any, completions: Any, guideline: Any, **_: Any) -> list[float | None]:
        asked.extend(prompt[-1]["content"][-1]["text"] for prompt in prompts)
        lengths = _trl.length_reward(completions)
        return [None if i == 0 else x for i, x in enumerate(lengths)]

    picture = _trl.pictures()[0]
    message = [{"role": "user", "content": "What is seen?"}]
    dataset = Dataset.from_dict({"prompt": [message] * 4, "image": [picture] * 4})
    args = _trl.config(tmp_path, max_steps=2, max_completion_length=4, warmup_steps=0)
    made = _trl.trainer(
        _trl.with_lora(_trl.vlm_model()),
        args,
        integration.GuidelineGRPOTrainer,
        guidelines=TWO,
        train_dataset=dataset,
        reward_funcs=reward,
        processing_class=_trl.processor(),
    )
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    made.train()
    moved = [n for n, p in made.model.named_parameters() if n in before and not p.equal(before[n])]
    assert len(moved) == len(before)
    want = [f"What is seen?\n\n{GUIDELINES[name].instruction}" for name in TWO for _ in range(2)]
    assert asked == 2 * want
    log = made.state.log_history[0]
    assert {"loss", "entropy", "clip_ratio/low_min", "guideline/analytic/reward"} <= log.keys()
    mean = (log["guideline/analytic/reward"] + 2 * log["guideline/bayesian/reward"]) / 3
    assert log["reward"] == pytest.approx(mean), "three of four rollouts got a reward"
