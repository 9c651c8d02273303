"""Builtin rewards against TRL and the scorers; the runner against functions that misbehave."""

import asyncio
import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmedx_fast.rewards import (
    RewardError,
    RewardRunner,
    accuracy_reward,
    completion_text,
    format_reward,
    get_soft_overlong_reward,
    guideline_reward,
    load_reward,
    reward_name,
    soft_overlong_reward,
)
from mmedx_fast.scoring import medevalkit_score

OPTIONS = {"A": "Asthma", "B": "Pulmonary embolism", "C": "Pneumonia"}
STEM = "A man has pleuritic chest pain, dyspnoea and a swollen calf. What is the diagnosis?"
THINK = (
    "Pleuritic pain with dyspnoea and a swollen calf is classic for pulmonary embolism. "
    "So the answer is pulmonary embolism."
)
GOOD = f"<think>{THINK}</think><answer>B</answer>"


def batch(*completions: str, **columns: list[Any]) -> dict[str, Any]:
    n = len(completions)
    return {
        "id": [f"toy:{i}" for i in range(n)],
        "prompts": ["p"] * n,
        "completions": list(completions),
        "question": [STEM] * n,
        "options": [OPTIONS] * n,
        "answer_label": ["B"] * n,
        "answer": [OPTIONS["B"]] * n,
        "guideline": ["intuitive"] * n,
    } | columns


def test_accuracy_is_strict_and_reads_conversations() -> None:
    texts = [
        "<answer>B</answer>",
        "<answer>C</answer>",
        "pulmonary embolism",
        "<answer>b.</answer>",
    ]
    plain = accuracy_reward(["p"] * 4, texts, options=[OPTIONS] * 4, answer_label=["B"] * 4)
    assert plain == [1.0, 0.0, 0.0, 1.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(["p"] * 4, chats, None, options=[OPTIONS] * 4, answer=["B"] * 4) == plain
    assert accuracy_reward(["p"], ["<answer>Yes.</answer>"], answer=["yes"], options=[None]) == [
        1.0
    ]


def test_no_reward_ever_guesses_by_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [
        "",
        "pulmonary embolsm",
        "<answer>pulmonary embolsm</answer>",
        "B. Pulmonary",
        f"<think>{THINK}",
    ]
    assert [medevalkit_score(text, OPTIONS, "B") for text in noise[1:]] == [1.0] * 4

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a reward asked for the most similar option")

    monkeypatch.setattr("difflib.SequenceMatcher.ratio", refuse)
    monkeypatch.setattr("mmedx_fast.scoring.medevalkit_score", refuse)
    runner = RewardRunner([(name, 1.0, {}) for name in ("accuracy", "format", "guideline")])
    rewards = runner.score(batch(*noise))
    np.testing.assert_array_equal(rewards, 0.0)
    assert runner.score(batch(GOOD))[0].tolist() == [1.0, 1.0, 1.0]


def test_accuracy_needs_a_gold_answer() -> None:
    with pytest.raises(ValueError, match="row 0 has no gold answer.*'answer_label'"):
        accuracy_reward(["p"], ["x"], options=[OPTIONS])


def test_format() -> None:
    assert format_reward(["p"] * 3, [GOOD, "<answer>B</answer>", ""]) == [1.0, 0.0, 0.0]


def test_completion_text_of_parts_and_of_nonsense() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    assert completion_text(parts) == "ab"
    with pytest.raises(ValueError, match="neither a string nor messages"):
        completion_text([{"role": "user", "content": "x"}])


def test_guideline_reward_follows_format_correctness_and_guideline() -> None:
    wrong = GOOD.replace("pulmonary embolism", "asthma").replace(">B<", ">A<")
    data = batch(GOOD, wrong, THINK + "<answer>B</answer>", GOOD, GOOD)
    data["guideline"] = ["intuitive", "intuitive", "intuitive", None, "bayesian"]
    full, scaled, malformed, absent, other = guideline_reward(**data)
    assert (full, scaled, malformed, absent) == (1.0, 0.25, 0.0, None) and other < 0.35
    assert guideline_reward(**data, on_wrong=0.0)[1] == 0.0
    assert guideline_reward(**data, on_wrong=1.0)[1] == 1.0
    for gate, left in (("weighted", 0.25), ("correct", 0.0), ("none", 1.0)):
        assert guideline_reward(**data, gate=gate)[:2] == [1.0, left]
    with pytest.raises(ValueError, match="gate is 'right'; choose one of correct, weighted, none"):
        guideline_reward(**data, gate="right")
    assert guideline_reward(**data, require_format=False)[2] == 1.0
    with pytest.raises(ValueError, match="on_wrong is 2"):
        guideline_reward(**data, on_wrong=2.0)
    with pytest.raises(ValueError, match="needs the column 'question'"):
        guideline_reward(["p"], ["x"], guideline=["bayesian"])


def test_guideline_reward_takes_findings() -> None:
    data = batch(GOOD, question=["What is shown?"])
    assert guideline_reward(**data) == [None]
    found = [("pleuritic pain", "dyspnoea", "swollen calf")]
    assert guideline_reward(**data, findings=found) == [1.0]


def test_guideline_reward_does_not_apply_to_a_stem_without_findings() -> None:
    text = "<think>{} Therefore the answer is pulmonary embolism.</think><answer>B</answer>"
    chain = "Fluid leads to pressure. Pressure leads to collapse. Collapse leads to hypoxia. "
    texts = [GOOD, text.format(f"{chain}Hypoxia leads to abnormality with chest."), "no tags"]
    data = batch(*texts, question=["What abnormality is seen in this chest X-ray?"] * 3)
    for name in ("differential", "intuitive", "analytic", "bayesian"):
        data["guideline"] = [name] * 3
        assert guideline_reward(**data) == [None] * 3  # nor to the malformed one beside them


def test_soft_overlong_equals_trl() -> None:
    trl = pytest.importorskip("trl.rewards")
    ids = [[0] * n for n in (0, 1, 60, 79, 80, 81, 90, 99, 100, 101, 500)]
    ours = get_soft_overlong_reward(100, 20)
    reference = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert ours([], [""] * 11, ids) == pytest.approx(reference(completion_ids=ids))
    assert soft_overlong_reward([], [], ids, max_len=100, cache=20) == ours([], [], ids)
    assert reward_name(ours) == "soft_overlong_reward"
    with pytest.raises(ValueError, match="cache is 200"):
        get_soft_overlong_reward(100, 200)
    with pytest.raises(ValueError, match="needs completion_ids"):
        ours(["p"], ["x"])


def test_load_by_name_path_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_reward("accuracy") is load_reward("accuracy_reward") is accuracy_reward
    assert load_reward("mmedx_fast.rewards.format_reward") is format_reward
    for folder, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"def mine(completions, **kw):\n    return [{value}] * len(completions)\nx = 1\n"
        )
    one, two = (load_reward(f"{tmp_path / f / 'mine.py'}:mine") for f in ("one", "two"))
    assert one(completions=["a"]) == [1.0] and two(completions=["a"]) == [2.0]
    monkeypatch.syspath_prepend(str(tmp_path / "one"))
    assert load_reward("mine.mine")(completions=["a"]) == [1.0]


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\nraise RuntimeError('boom')\n")
    (tmp_path / "fine.py").write_text("x = 1\n")
    for spec, message in (
        ("acuracy", "unknown reward 'acuracy'.*accuracy, format"),
        ("no.such.module.f", "importing 'no.such.module' failed with ModuleNotFoundError"),
        ("mmedx_fast.rewards.nothing", "'nothing' in mmedx_fast.rewards does not exist"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        (f"{tmp_path}/bad.py:f", "bad.py failed with RuntimeError: boom"),
        (f"{tmp_path}/fine.py:x", "'x' in .*fine.py is not a function"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward(spec)


def test_runner_returns_weights_names_and_nan_for_none() -> None:
    runner = RewardRunner(
        [("accuracy", 1.0, {}), ("format", 0.2, {}), ("guideline", 0.3, {"on_wrong": 0.0})]
    )
    data = batch(GOOD, "nothing", guideline=["intuitive", None])
    rewards = runner.score(data)
    assert rewards.shape == (2, 3) and rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, np.float32([[1, 1, 1], [0, 0, np.nan]]))
    assert runner.names == ["accuracy_reward", "format_reward", "guideline_reward"]
    np.testing.assert_allclose(runner.weights, [1.0, 0.2, 0.3], rtol=1e-6)


def test_runner_takes_async_functions_also_inside_a_running_loop() -> None:
    order = []

    async def slow(completions, **kwargs):
        await asyncio.sleep(0.02)
        order.append("slow")
        return [1.0] * len(completions)

    async def quick(completions, **kwargs):
        order.append("quick")
        return np.arange(len(completions))

    def plain(completions, **kwargs):
        return np.ones(len(completions), bool)

    runner = RewardRunner([(slow, 1.0, {}), (plain, 1.0, {}), (quick, 1.0, {})])
    expected = np.float32([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(runner.score(batch("a", "b")), expected)
    assert order == ["quick", "slow"]

    async def notebook():
        return runner.score(batch("a", "b"))

    np.testing.assert_array_equal(asyncio.run(notebook()), expected)

    async def broken(**kwargs):
        raise KeyError("missing")

    with pytest.raises(RewardError, match="'broken' raised KeyError on the batch as a whole"):
        RewardRunner([(broken, 1.0, {})]).score(batch("a"))


def returning(values):
    def custom(completions, **kwargs):
        return values

    return RewardRunner([(custom, 1.0, {})])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'custom' returned 1 values for 2 completions"),
        (1.0, "'custom' returned float; return a list of 2"),
        (None, "'custom' returned NoneType"),
        ([1.0, "0.5"], r"'custom' returned '0.5' on row 1 \(id 'toy:1'\)"),
        ([1.0, [2.0, 3.0]], r"returned \[2.0, 3.0\] on row 1"),
        ([math.inf, 0.0], r"'custom' returned inf on row 0 \(id 'toy:0'\); return a finite number"),
        ([math.nan, math.nan], r"NaN for 2 of 2 completions and no number at all, first on row 0"),
        ([math.nan, None], r"NaN for 1 of 2 completions and no number at all"),
    ],
)
def test_runner_refuses_what_is_no_reward(values, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        returning(values).score(batch("a", "b"))


def test_runner_takes_none_for_a_whole_batch() -> None:
    assert np.isnan(returning([None, None]).score(batch("a", "b"))).all()


def test_runner_warns_once_of_nan(caplog: pytest.LogCaptureFixture) -> None:
    runner = returning([0.5, math.nan])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            rewards = runner.score(batch("a", "b"))
    np.testing.assert_array_equal(rewards, np.float32([[0.5], [np.nan]]))
    assert len(caplog.records) == 1
    assert (
        "'custom' returned NaN for 1 of 2 completions, first on row 1 (id 'toy:1')" in caplog.text
    )


def test_runner_names_the_row_that_raises() -> None:
    def fragile(completions, **kwargs):
        return [1.0 / len(text) for text in completions]

    runner = RewardRunner([("accuracy", 1.0, {}), (fragile, 1.0, {})])
    message = r"'fragile' raised ZeroDivisionError on row 2 \(id 'toy:2'\)"
    with pytest.raises(RewardError, match=message) as caught:
        runner.score(batch("a", "b", "", "c"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    bad = batch("<answer>A</answer>", "<answer>A</answer>", answer_label=["B", "Z"])
    with pytest.raises(RewardError, match=r"'accuracy_reward' raised ValueError on row 1.*'Z'"):
        runner.score(bad)


def test_runner_checks_the_batch_and_its_own_arguments() -> None:
    runner = RewardRunner([("format", 1.0, {})])
    with pytest.raises(RewardError, match="no column 'completions'"):
        runner.score({"prompts": []})
    with pytest.raises(RewardError, match="column 'answer' of the batch is not a list of 2"):
        runner.score(batch("a", "b", answer=["x"]))
    with pytest.raises(RewardError, match="'format_reward' is given twice"):
        RewardRunner([("format", 1.0, {}), ("format", 2.0, {})])
    with pytest.raises(RewardError, match="weight nan"):
        RewardRunner([("format", math.nan, {})])
    with pytest.raises(RewardError, match="no reward is configured"):
        RewardRunner([])


def test_extras_and_partials() -> None:
    def scaled(completions, factor, trainer_state=None, **kwargs):
        return [factor * trainer_state] * len(completions)

    runner = RewardRunner([(functools.partial(scaled, factor=2.0), 1.0, {})])
    assert runner.names == ["scaled"]
    assert runner.score(batch("a"), trainer_state=3.0)[0, 0] == 6.0


def test_the_correlation_of_adherence_and_accuracy_undoes_the_weighting() -> None:
    from mmedx_fast.config import GbaConfig, RewardConfig
    from mmedx_fast.stages.gba_update import adherence_metrics

    names = ["accuracy_reward", "guideline_reward"]
    right = np.float32([1, 1, 0, 0])

    def found(adherences: list[float], **kwargs: Any) -> float | None:
        share = {"none": 1.0, "correct": 0.0}.get(
            kwargs.get("gate", ""), kwargs.get("on_wrong", 0.25)
        )
        paid = np.where(right == 1, adherences, np.float32(adherences) * share)
        rewards = [RewardConfig(name=n, kwargs=kwargs if n == names[1] else {}) for n in names]
        metrics = adherence_metrics(
            GbaConfig(rewards=rewards), names, np.stack([right, paid], axis=1).astype(np.float32)
        )
        return metrics.get("adherence_accuracy_correlation")

    for kwargs in ({}, {"on_wrong": 0.5}, {"gate": "none"}):
        assert found([1.0, 0.5, 1.0, 0.5], **kwargs) == pytest.approx(0.0, abs=1e-6)
        assert found([1.0, 1.0, 0.2, 0.2], **kwargs) == pytest.approx(1.0)
    assert found([1.0, 1.0, 0.2, 0.2], gate="correct") is None
    assert adherence_metrics(GbaConfig(), ["format_reward"], right[:, None]) == {}
