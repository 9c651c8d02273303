"""guideline_advantages against plain loops in float64, known estimators and TRL's own code."""

import ast
import importlib.metadata
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmedx_fast.kernels.advantage import guideline_advantages


def mean_sd(values: list[float], ddof: int) -> tuple[float, float]:
    if not values:
        return math.nan, 0.0
    mu = sum(values) / len(values)
    if len(values) <= ddof:
        return mu, 0.0
    return mu, math.sqrt(sum((v - mu) ** 2 for v in values) / (len(values) - ddof))


def reference(
    rewards,
    group,
    guideline,
    *,
    reward_weights=None,
    guideline_weights=None,
    combine="sum_then_normalize",
    scale="guideline",
    within=1.0,
    between=1.0,
    baseline="mean",
    eps=1e-4,
    ddof=1,
) -> list[float]:
    """The definition, one rollout at a time."""
    rows = [[float(x) for x in row] for row in rewards]
    group, guideline = group.tolist(), guideline.tolist()
    weights = [1.0] * len(rows[0]) if reward_weights is None else reward_weights.tolist()
    valid = [any(not math.isnan(x) for x in row) for row in rows]
    combined = []
    for i, row in enumerate(rows):
        total = 0.0
        for m, x in enumerate(row):
            if math.isnan(x):
                continue
            if combine == "normalize_then_sum":
                mates = [
                    rows[j][m]
                    for j in range(len(rows))
                    if group[j] == group[i] and not math.isnan(rows[j][m])
                ]
                mu, sd = mean_sd(mates, ddof)
                x = (x - mu) / (sd + eps)
            total += weights[m] * x
        combined.append(total)
    everyone = [combined[j] for j in range(len(rows)) if valid[j]]
    out = []
    for i in range(len(rows)):
        if not valid[i]:
            out.append(0.0)
            continue
        p = [j for j in range(len(rows)) if valid[j] and group[j] == group[i]]
        pk = [j for j in p if guideline[j] == guideline[i]]
        sd_p = mean_sd([combined[j] for j in p], ddof)[1]
        sd_pk = mean_sd([combined[j] for j in pk], ddof)[1]
        if baseline == "leave_one_out":
            p, pk = [j for j in p if j != i] or [i], [j for j in pk if j != i] or [i]
        mu_p = mean_sd([combined[j] for j in p], ddof)[0]
        mu_pk = mean_sd([combined[j] for j in pk], ddof)[0]
        inner, outer = combined[i] - mu_pk, mu_pk - mu_p
        if scale == "guideline":
            a = within * inner / (sd_pk + eps) + between * outer / (sd_p + eps)
        elif scale == "none":
            a = within * inner + between * outer
        else:
            sd = sd_p if scale == "group" else mean_sd(everyone, ddof)[1]
            a = (within * inner + between * outer) / (sd + eps)
        out.append(
            a * (1.0 if guideline_weights is None else float(guideline_weights[guideline[i]]))
        )
    return out


def ragged(seed=0, rewards=3, nan=0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Uneven questions with unsorted, arbitrary ids, guidelines of one rollout, and rollouts
    nothing applies to."""
    g = torch.Generator().manual_seed(seed)
    sizes = {-7: [4, 1, 3], 900: [2, 2], 3: [1], 41: [5, 0, 1, 2]}
    ids = [(p, k) for p, counts in sizes.items() for k, n in enumerate(counts) for _ in range(n)]
    order = torch.randperm(len(ids), generator=g).tolist()
    group = torch.tensor([ids[i][0] for i in order])
    guideline = torch.tensor([ids[i][1] for i in order])
    table = torch.rand(len(ids), rewards, generator=g)
    table[torch.rand(table.shape, generator=g) < nan] = torch.nan
    table[2] = torch.nan
    return table, group, guideline


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["guideline", "group", "batch", "none"])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_equals_the_definition(combine: str, scale: str, baseline: str) -> None:
    options: dict[str, Any] = {
        "combine": combine,
        "scale": scale,
        "baseline": baseline,
        "within": 0.7,
        "between": 1.3,
        "reward_weights": torch.tensor([1.0, 0.25, 2.0]),
        "guideline_weights": torch.tensor([1.0, 0.5, 2.0, 1.5]),
    }
    for seed in range(4):
        extras: list[dict[str, Any]] = [{}, {"ddof": 0, "eps": 1e-6}]
        for extra in extras:
            data = ragged(seed)
            chosen = options | extra
            got, _ = guideline_advantages(*data, **chosen)
            want = torch.tensor(reference(*data, **chosen))
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_stats_describe_the_batch() -> None:
    rewards, group, guideline = ragged(1)
    advantages, stats = guideline_advantages(rewards, group, guideline)
    assert stats.question.tolist() == sorted(set(group.tolist()))
    assert torch.equal(stats.question[stats.question_index], group)
    torch.testing.assert_close(stats.reward_mean, rewards.nanmean(0))
    assert torch.equal(stats.valid, ~rewards.isnan().all(1))
    assert (advantages[~stats.valid] == 0).all() and stats.reward[~stats.valid].isnan().all()
    for i, p in enumerate(stats.question.tolist()):
        mine = stats.reward[(group == p) & stats.valid].tolist()
        mu, sd = mean_sd(mine, 1)
        assert stats.count_p[i] == len(mine)
        assert stats.mu_p[i].item() == pytest.approx(mu, nan_ok=True)
        assert stats.sd_p[i].item() == pytest.approx(sd, abs=1e-6)
    pairs = {(int(p), int(k)) for p, k in zip(group, guideline, strict=True)}
    seen = [
        (int(stats.question[q]), int(k))
        for q, k in zip(stats.pk_question, stats.pk_guideline, strict=True)
    ]
    assert set(seen) == pairs and len(seen) == len(pairs)
    for j, (p, k) in enumerate(seen):
        mine = stats.reward[(group == p) & (guideline == k) & stats.valid].tolist()
        mu, sd = mean_sd(mine, 1)
        assert stats.mu_pk[j].item() == pytest.approx(mu, nan_ok=True)
        assert stats.sd_pk[j].item() == pytest.approx(sd, abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_unit_weights_are_grpo_whatever_the_guidelines(scale: str) -> None:
    rewards, group, guideline = ragged(2, nan=0.0)
    got, _ = guideline_advantages(rewards, group, guideline, scale=scale)
    one, _ = guideline_advantages(rewards, group, torch.zeros_like(guideline), scale=scale)
    torch.testing.assert_close(got, one, atol=1e-6, rtol=1e-5)
    single, _ = guideline_advantages(
        rewards, group, torch.zeros_like(guideline), within=1, between=5
    )
    if scale == "group":  # with one guideline there is nothing between guidelines
        torch.testing.assert_close(single, one, atol=1e-6, rtol=1e-5)


def test_leave_one_out_is_rloo() -> None:
    rewards, group, guideline = ragged(3, rewards=1, nan=0.0)
    got, _ = guideline_advantages(rewards, group, guideline, scale="none", baseline="leave_one_out")
    for i in range(len(group)):
        others = [
            j
            for j in range(len(group))
            if j != i and group[j] == group[i] and not rewards[j].isnan()
        ]
        want = (
            float(rewards[i]) - sum(float(rewards[j]) for j in others) / len(others)
            if others
            else 0
        )
        if not rewards[i].isnan():
            assert got[i].item() == pytest.approx(want, abs=1e-6)


def test_order_does_not_matter() -> None:
    data = ragged(4)
    base, base_stats = guideline_advantages(*data)
    for seed in range(3):
        perm = torch.randperm(len(base), generator=torch.Generator().manual_seed(seed))
        got, stats = guideline_advantages(*(x[perm] for x in data))
        torch.testing.assert_close(got, base[perm], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(stats.mu_pk, base_stats.mu_pk, equal_nan=True)


def test_shifting_a_question_changes_nothing_and_means_are_zero() -> None:
    rewards, group, guideline = ragged(5, nan=0.0)
    base, stats = guideline_advantages(rewards, group, guideline)
    moved, _ = guideline_advantages(rewards + group[:, None] / 100, group, guideline)
    torch.testing.assert_close(moved, base, atol=1e-3, rtol=1e-3)
    only, _ = guideline_advantages(rewards, group, guideline, between=0.0)
    for k in stats.pk_guideline.unique():
        for p in stats.question:
            here = (group == p) & (guideline == k)
            assert only[here].sum().abs() < 1e-4
            if here.sum() == 1:
                assert only[here] == 0


def test_zero_variance_is_flagged_and_gives_nothing() -> None:
    rewards = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages, stats = guideline_advantages(rewards, group, torch.tensor([0, 1, 1, 0, 0, 1]))
    assert stats.zero_variance.tolist() == [True, False]
    assert advantages[:3].abs().max() < 1e-3 and advantages[3:].abs().max() > 0.1
    nothing, stats = guideline_advantages(torch.full((2, 2), torch.nan), group[:2], group[:2])
    assert stats.zero_variance.tolist() == [True] and (nothing == 0).all()


def test_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.long)
    advantages, stats = guideline_advantages(torch.zeros(0, 2), none, none)
    assert advantages.shape == (0,) and len(stats.question) == 0 and stats.reward_mean.isnan().all()


def trl_advantages(rewards, weights, num_generations, aggregation, scale):
    """TRL's own advantage statements, cut out of its source so that nothing heavy is imported."""
    try:
        file = importlib.metadata.distribution("trl").locate_file("trl/trainer/grpo_trainer.py")
        utils = importlib.metadata.distribution("trl").locate_file("trl/trainer/utils.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("trl is not installed")
    nodes = list(ast.walk(ast.parse(Path(str(file)).read_text())))
    branch = [
        n
        for n in nodes
        if isinstance(n, ast.If)
        and ast.unparse(n.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    ][:1]
    nanstd = [
        n
        for n in ast.walk(ast.parse(Path(str(utils)).read_text()))
        if isinstance(n, ast.FunctionDef) and n.name == "nanstd"
    ]
    assert len(branch) == len(nanstd) == 1
    scope = {
        "torch": torch,
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            reward_weights=weights,
            scale_rewards=scale,
            reward_funcs=[None] * rewards.shape[1],
        ),
        "rewards_per_func": rewards,
        "unscorable_mask": rewards.isnan().all(1),
        "num_generations": num_generations,
        "device": "cpu",
    }
    exec(compile(ast.Module(nanstd + branch, []), "trl", "exec"), scope)
    return torch.nan_to_num(scope["advantages"], nan=0.0)


@pytest.mark.parametrize("nan", [0.0, 0.2])
@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "batch"),
    ],
)
def test_equals_trl_own_code(aggregation: str, scale: str, nan: float) -> None:
    g = torch.Generator().manual_seed(9)
    rewards = torch.rand(24, 3, generator=g)
    rewards[torch.rand(rewards.shape, generator=g) < nan] = torch.nan
    weights = torch.tensor([1.0, 0.5, 2.0])
    want = trl_advantages(rewards, weights, 6, aggregation, scale)
    got, _ = guideline_advantages(
        rewards,
        torch.arange(24) // 6,
        torch.arange(24) % 3,
        reward_weights=weights,
        combine=aggregation,
        scale=scale,
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "std"}, "scale='std'"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"baseline": "median"}, "baseline='median'"),
        ({"eps": 0.0}, "eps"),
        ({"rewards": torch.zeros(4)}, r"\[B, M\]"),
        ({"rewards": torch.zeros(4, 2, dtype=torch.long)}, "float"),
        (
            {"rewards": torch.tensor([[0.0], [math.inf], [0.0], [0.0]])},
            r"rewards\[1, 0\] is infinite",
        ),
        ({"group": torch.zeros(3, dtype=torch.long)}, "group must be"),
        ({"guideline": torch.zeros(4)}, "guideline must be"),
        ({"reward_weights": torch.ones(5)}, "reward_weights"),
        ({"guideline_weights": torch.ones(2)}, "0..K-1"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "rewards": torch.zeros(4, 2),
        "group": torch.tensor([0, 0, 1, 1]),
        "guideline": torch.tensor([0, 1, 2, 0]),
    }
    with pytest.raises(ValueError, match=message):
        guideline_advantages(**(arguments | change))
