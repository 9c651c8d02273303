"""guideline_advantages against plain loops in float64, known estimators and TRL's own code."""

import ast
import dataclasses
import importlib.metadata
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmedx_fast.kernels import _advantage_torch, _advantage_triton, _dispatch
from mmedx_fast.kernels.advantage import BASELINE, COMBINE, SCALE, guideline_advantages

IDS = (-(2**63), -7, -1, 0, 3, 900, 2**31, 2**53 + 1, 2**63 - 1)
PER_QUESTION = ("mu_p", "sd_p", "count_p", "zero_variance")
PER_PAIR = ("mu_pk", "sd_pk", "count_pk")


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


def big(count: int, rewards: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    table = torch.rand(count, rewards, generator=g)
    table[torch.rand(table.shape, generator=g) < 0.1] = torch.nan
    group, guideline = torch.arange(count) // 16, torch.arange(count) // 4 % 4
    if order == "shuffled":
        perm = torch.randperm(count, generator=g)
        group, guideline = group[perm], guideline[perm]
    return table, group, guideline


PER_ROLLOUT = (*PER_QUESTION, *PER_PAIR, "reward", "valid")


def fields(stats) -> dict[str, Tensor]:
    return {x: getattr(stats, x) for x in (*PER_ROLLOUT, "first_p", "first_pk", "reward_mean")}


def assert_same_bits(got, want) -> None:
    assert torch.equal(got[0], want[0])
    others = fields(want[1])
    for name, value in fields(got[1]).items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and blocks for a batch the interpreter can afford."""

    def blocks(rollouts: int, rewards: int, normalize: bool) -> tuple[dict[str, int], int]:
        mp = 1 << max(rewards - 1, 0).bit_length()
        return {"MP": mp, "BI": 4, "BJ": 8, "SCAN": 8, "SPAN": 8}, 4

    monkeypatch.setattr(_advantage_triton, "_blocks", blocks)


@pytest.mark.parametrize("baseline", BASELINE)
@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("combine", COMBINE)
def test_equals_the_definition(
    combine: str, scale: str, baseline: str, implementation: str
) -> None:
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


@st.composite
def batches(draw):
    """Rewards, ids and options of a batch of any grouping."""
    count, rewards = draw(st.integers(0, 14)), draw(st.integers(1, 3))
    ids = st.lists(st.sampled_from(IDS), min_size=count, max_size=count)
    # eighths, so that equal sums are equal and a spread is never a rounding error
    value = st.one_of(st.integers(-8, 8).map(lambda n: n / 8), st.just(math.nan))
    row = st.lists(value, min_size=rewards, max_size=rewards)
    table = draw(st.lists(row, min_size=count, max_size=count))
    options = {
        "combine": draw(st.sampled_from(COMBINE)),
        "scale": draw(st.sampled_from(SCALE)),
        "baseline": draw(st.sampled_from(BASELINE)),
        "within": draw(st.sampled_from((0.0, 0.7, 1.0))),
        "between": draw(st.sampled_from((0.0, 1.0, 1.3))),
        "ddof": draw(st.sampled_from((0, 1))),
    }
    return (
        torch.tensor(table, dtype=torch.float32).reshape(count, rewards),
        torch.tensor(draw(ids), dtype=torch.long),
        torch.tensor(draw(ids), dtype=torch.long),
    ), options


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches())
def test_any_grouping_equals_the_definition(implementation: str, small_tiles: None, batch) -> None:
    (rewards, group, guideline), options = batch
    advantages, stats = guideline_advantages(rewards, group, guideline, **options)
    want = reference(rewards, group, guideline, **options) if len(rewards) else []
    torch.testing.assert_close(advantages, torch.tensor(want), atol=2e-5, rtol=2e-5)
    ids = group.tolist()
    pairs = list(zip(ids, guideline.tolist(), strict=True))
    for names, keys in ((PER_QUESTION, ids), (PER_PAIR, pairs)):
        for name in names:  # every member of a group is told the same bits
            x = getattr(stats, name)
            mates = x[[keys.index(key) for key in keys]]
            torch.testing.assert_close(x, mates, rtol=0, atol=0, equal_nan=True, msg=name)
    assert stats.first_p.tolist() == [ids.index(p) == i for i, p in enumerate(ids)]
    assert stats.first_pk.tolist() == [pairs.index(pk) == i for i, pk in enumerate(pairs)]
    assert_same_bits(
        guideline_advantages(rewards, group, guideline, **options), (advantages, stats)
    )


@pytest.fixture
def large_batch_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiles of a large batch, whatever the size."""
    _advantage_triton._blocks.cache_clear()
    monkeypatch.setattr(_advantage_triton, "MANY_ROLLOUTS", 0)
    yield
    _advantage_triton._blocks.cache_clear()


@pytest.mark.parametrize("tiles", ["usual", "large_batch_tiles"])
@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
@pytest.mark.parametrize(("combine", "rewards"), [(COMBINE[0], 5), (COMBINE[1], 3)])
def test_production_tiles_equal_the_torch_path(
    combine: str,
    rewards: int,
    order: str,
    tiles: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if tiles != "usual":
        request.getfixturevalue(tiles)
    data = big(100, rewards, order)
    for scale in ("guideline", "batch"):
        found = []
        for mode in ("torch", "triton"):
            monkeypatch.setenv("MMEDX_KERNELS", mode)
            found.append(guideline_advantages(*data, combine=combine, scale=scale))
        (want, want_stats), (got, stats) = found
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        for name, value in fields(stats).items():
            expected = getattr(want_stats, name)
            torch.testing.assert_close(value, expected, equal_nan=True, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("combine", COMBINE)
def test_stats_describe_the_batch(implementation: str, combine: str) -> None:
    rewards, group, guideline = ragged(1)
    advantages, stats = guideline_advantages(rewards, group, guideline, combine=combine)
    torch.testing.assert_close(stats.reward_mean, rewards.nanmean(0))
    assert torch.equal(stats.valid, ~rewards.isnan().all(1))
    assert (advantages[~stats.valid] == 0).all() and stats.reward[~stats.valid].isnan().all()
    if combine == "sum_then_normalize":
        torch.testing.assert_close(stats.reward[stats.valid], rewards.nansum(1)[stats.valid])
    for i in range(len(group)):
        of_question = (group == group[i]) & stats.valid
        for mates, mean, sd, count in (
            (of_question, stats.mu_p, stats.sd_p, stats.count_p),
            (of_question & (guideline == guideline[i]), stats.mu_pk, stats.sd_pk, stats.count_pk),
        ):
            mine = stats.reward[mates].tolist()
            mu, spread = mean_sd(mine, 1)
            assert count[i] == len(mine)
            assert mean[i].item() == pytest.approx(mu, abs=1e-6, nan_ok=True)
            assert sd[i].item() == pytest.approx(spread, abs=1e-6)
        same = stats.reward[of_question]
        assert stats.zero_variance[i] == (
            len(same) == 0 or bool((same - same[0]).abs().max() < 1e-6)
        )


def test_tables_have_a_row_per_question_and_per_pair(implementation: str) -> None:
    rewards, group, guideline = ragged(1)
    _, stats = guideline_advantages(rewards, group, guideline)
    tables = stats.tables()
    assert tables.question.tolist() == sorted(set(group.tolist()))
    assert torch.equal(tables.question[tables.question_index], group)
    for name in PER_QUESTION:
        spread = getattr(tables, name)[tables.question_index]
        torch.testing.assert_close(spread, getattr(stats, name), equal_nan=True, rtol=0, atol=0)
    pairs = list(
        zip(tables.question[tables.pk_question].tolist(), tables.pk_guideline.tolist(), strict=True)
    )
    assert pairs == sorted(set(zip(group.tolist(), guideline.tolist(), strict=True)))
    at = [pairs.index(pair) for pair in zip(group.tolist(), guideline.tolist(), strict=True)]
    for name in PER_PAIR:
        spread = getattr(tables, name)[at]
        torch.testing.assert_close(spread, getattr(stats, name), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(stats.question_mean(stats.sd_p), tables.sd_p.mean())
    share = stats.question_mean(stats.zero_variance)
    torch.testing.assert_close(share, tables.zero_variance.float().mean())


@pytest.mark.parametrize("scale", ["group", "none"])
def test_unit_weights_are_grpo_whatever_the_guidelines(scale: str, implementation: str) -> None:
    rewards, group, guideline = ragged(2, nan=0.0)
    got, _ = guideline_advantages(rewards, group, guideline, scale=scale)
    one, _ = guideline_advantages(rewards, group, torch.zeros_like(guideline), scale=scale)
    torch.testing.assert_close(got, one, atol=1e-6, rtol=1e-5)
    single, _ = guideline_advantages(
        rewards, group, torch.zeros_like(guideline), within=1, between=5
    )
    if scale == "group":  # with one guideline there is nothing between guidelines
        torch.testing.assert_close(single, one, atol=1e-6, rtol=1e-5)


def test_leave_one_out_is_rloo(implementation: str) -> None:
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


@pytest.mark.parametrize("combine", COMBINE)
def test_order_does_not_matter(implementation: str, small_tiles: None, combine: str) -> None:
    data = ragged(4)
    base, base_stats = guideline_advantages(*data, combine=combine)
    for seed in range(3):
        perm = torch.randperm(len(base), generator=torch.Generator().manual_seed(seed))
        got, stats = guideline_advantages(*(x[perm] for x in data), combine=combine)
        torch.testing.assert_close(got, base[perm], atol=1e-6, rtol=1e-6)
        for name in PER_ROLLOUT:
            value, want = getattr(stats, name), getattr(base_stats, name)[perm]
            torch.testing.assert_close(value, want, equal_nan=True, msg=name)


def test_shifting_a_question_changes_nothing_and_means_are_zero(implementation: str) -> None:
    rewards, group, guideline = ragged(5, nan=0.0)
    base, stats = guideline_advantages(rewards, group, guideline)
    moved, _ = guideline_advantages(rewards + group[:, None] / 100, group, guideline)
    torch.testing.assert_close(moved, base, atol=1e-3, rtol=1e-3)
    only, _ = guideline_advantages(rewards, group, guideline, between=0.0)
    for k in guideline.unique():
        for p in group.unique():
            here = (group == p) & (guideline == k)
            assert only[here].sum().abs() < 1e-4
            if here.sum() == 1:
                assert only[here] == 0


@pytest.mark.parametrize("combine", COMBINE)
def test_a_large_common_offset_costs_no_digits(implementation: str, combine: str) -> None:
    # summed, a missing reward would miss the offset too
    nan = 0.3 if combine == "normalize_then_sum" else 0.0
    rewards, group, guideline = ragged(6, nan=nan)
    rewards = rewards.double()
    base, base_stats = guideline_advantages(rewards, group, guideline, combine=combine)
    moved, stats = guideline_advantages(rewards + 1e4, group, guideline, combine=combine)
    torch.testing.assert_close(moved, base, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stats.sd_p, base_stats.sd_p, atol=1e-6, rtol=1e-6)


def test_zero_variance_is_flagged_and_gives_nothing(implementation: str) -> None:
    rewards = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages, stats = guideline_advantages(rewards, group, torch.tensor([0, 1, 1, 0, 0, 1]))
    assert stats.zero_variance.tolist() == [True] * 3 + [False] * 3
    assert advantages[:3].abs().max() < 1e-3 and advantages[3:].abs().max() > 0.1
    nothing, stats = guideline_advantages(torch.full((2, 2), torch.nan), group[:2], group[:2])
    assert stats.zero_variance.tolist() == [True, True] and (nothing == 0).all()
    assert stats.mu_p.isnan().all() and (stats.sd_p == 0).all() and (stats.count_p == 0).all()


@pytest.mark.parametrize("combine", COMBINE)
def test_small_batches(implementation: str, combine: str) -> None:
    none = torch.zeros(0, dtype=torch.long)
    advantages, stats = guideline_advantages(torch.zeros(0, 2), none, none, combine=combine)
    assert advantages.shape == (0,) and stats.reward_mean.isnan().all()
    assert len(stats.tables().question) == 0 and stats.question_mean(stats.sd_p).isnan()
    one = torch.tensor([5])
    for scale in SCALE:
        advantages, stats = guideline_advantages(
            torch.tensor([[0.5, 0.25]]), one, one, combine=combine, scale=scale
        )
        assert advantages.tolist() == [0.0] and stats.zero_variance.tolist() == [True]
        assert stats.first_p.tolist() == stats.first_pk.tolist() == [True]
    advantages, stats = guideline_advantages(torch.zeros(3, 0), *[torch.tensor([1, 2, 1])] * 2)
    assert (advantages == 0).all() and not stats.valid.any() and stats.reward_mean.shape == (0,)


@pytest.mark.parametrize("combine", COMBINE)
def test_views_are_read_by_their_strides(implementation: str, combine: str) -> None:
    rewards, group, guideline = ragged(7)
    count, m = rewards.shape
    # what lies around the views would change every statistic: huge rewards of questions that exist
    table = torch.full((count + 4, m + 3), 1e30)
    table[2:-2, 1 : 1 + m] = rewards
    ids = torch.full((count + 4, 3), int(group[0]))
    ids[2:-2, 1] = group
    criteria = torch.full((2 * count + 1,), int(guideline[0]), dtype=torch.int32)
    criteria[1::2] = guideline.int()
    views = table[2:-2, 1 : 1 + m], ids[2:-2, 1], criteria[1::2]
    got = guideline_advantages(*views, combine=combine)
    want = guideline_advantages(rewards, group, guideline.int(), combine=combine)
    assert_same_bits(got, want)
    columns = rewards.t().contiguous().t()
    assert_same_bits(guideline_advantages(columns, group, guideline, combine=combine), want)


@pytest.mark.parametrize("scale", ["guideline", "batch"])
def test_nothing_is_written_around_the_outputs(
    triton_kernels: None, small_tiles: None, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = []
    new_empty = Tensor.new_empty

    def guarded(self, size, dtype=None, **others):
        if others:  # the interpreter's own
            return new_empty(self, size, dtype=dtype, **others)
        shape = torch.Size([size] if isinstance(size, int) else size)
        buffers.append(torch.full((shape.numel() + 16,), 77).to(dtype))
        return buffers[-1][8:-8].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    guideline_advantages(*ragged(8), combine="normalize_then_sum", scale=scale)
    assert len(buffers) == (5 if scale == "batch" else 4)
    for buffer in buffers:
        mark = torch.tensor(77).to(buffer.dtype)
        assert (buffer[:8] == mark).all() and (buffer[-8:] == mark).all()


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("combine", COMBINE)
def test_launches(
    triton_kernels: None, combine: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("_advantage_kernel", "_rescale_kernel"):
        kernel = getattr(_advantage_triton, name)
        monkeypatch.setattr(_advantage_triton, name, Counted(kernel))
    guideline_advantages(*ragged(0), combine=combine, scale=scale)
    assert len(launches) == (2 if (combine, scale) == ("normalize_then_sum", "batch") else 1)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("rewards", [1, 3, 4, 16, 17, 100, 256])
@pytest.mark.parametrize("rollouts", [1, 4096, 65_536])
def test_tiles_have_few_enough_elements(rollouts: int, rewards: int, combine: str) -> None:
    normalize = combine == "normalize_then_sum"
    blocks, warps = _advantage_triton._blocks(rollouts, rewards, normalize)
    assert all(size & (size - 1) == 0 and size > 0 for size in blocks.values())
    assert rewards <= blocks["MP"] and blocks["MP"] * blocks["SPAN"] <= _advantage_triton.TILE
    tile = blocks["BI"] * blocks["BJ"] * (blocks["MP"] if normalize else 1)
    assert max(tile, blocks["BJ"] * blocks["MP"]) <= _advantage_triton.TILE and warps in (4, 8)


def test_more_rewards_than_a_tile_holds_are_refused(triton_kernels: None) -> None:
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="=triton, but .*at most 256 rewards, got 257"):
        guideline_advantages(torch.zeros(2, 257), ids, ids)


def test_more_rewards_than_a_tile_holds_fall_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_dispatch, "_said", set())
    g = torch.Generator().manual_seed(0)
    rewards, ids = torch.randn(4, 257, generator=g), torch.zeros(4, dtype=torch.long)
    monkeypatch.setenv(_dispatch.ENV, "torch")
    want = guideline_advantages(rewards, ids, ids)
    monkeypatch.setenv(_dispatch.ENV, "auto")
    usable = dataclasses.replace(
        _dispatch._triton_ops["guideline_advantages"], refuse=lambda device: None
    )
    monkeypatch.setitem(_dispatch._triton_ops, "guideline_advantages", usable)
    with caplog.at_level(logging.INFO, logger="mmedx_fast.kernels"):
        for _ in range(2):
            assert_same_bits(guideline_advantages(rewards, ids, ids), want)
    assert [r.getMessage() for r in caplog.records] == [
        "guideline_advantages runs in plain torch: at most 256 rewards, got 257"
    ]
    path = {p.op: p for p in _dispatch.paths(rewards.device)}["guideline_advantages"]
    assert (path.implementation, path.limit) == ("triton", "up to 256 rewards")


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("combine", COMBINE)
def test_the_torch_path_never_waits_for_the_device(combine: str, scale: str) -> None:
    """No operator whose result or shape depends on values: these are what reads the device back."""
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            if func is torch.ops.aten.index.Tensor:  # tagged for the sake of boolean masks
                assert all(at is None or at.dtype == torch.long for at in args[1])
            else:
                assert not waits & set(func.tags), func
            return func(*args, **(kwargs or {}))

    weights = torch.ones(3), torch.ones(4)
    with Watch():
        _advantage_torch._guideline_advantages_torch(
            *ragged(0), *weights, combine, scale, 1.0, 1.0, "leave_one_out", 1e-4, 1
        )
    assert len(seen) > 20


@pytest.mark.parametrize("combine", COMBINE)
def test_passes_through_compile_in_one_graph(implementation: str, combine: str) -> None:
    data = ragged(1)
    options = {"combine": combine, "reward_weights": torch.tensor([1.0, 0.5, 2.0])}

    def step(rewards, group, guideline):
        advantages, stats = guideline_advantages(rewards, group, guideline, **options)
        return 2 * advantages, stats, stats.question_mean(stats.sd_p)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got, stats, mean), (want, want_stats, want_mean) = compiled(*data), step(*data)
    assert_same_bits((got, stats), (want, want_stats))
    assert torch.equal(mean, want_mean)
    torch.library.opcheck(
        torch.ops.mmedx_fast.guideline_advantages.default,
        (*data, None, None, combine, "guideline", 1.0, 1.0, "mean", 1e-4, 1),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rewards_that_require_grad_give_constants(implementation: str) -> None:
    rewards, group, guideline = ragged(1)
    advantages, stats = guideline_advantages(rewards.requires_grad_(), group, guideline)
    assert not advantages.requires_grad and not stats.mu_p.requires_grad


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
def test_equals_trl_own_code(aggregation: str, scale: str, nan: float, implementation: str) -> None:
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
        (
            {"guideline": torch.zeros(4)},
            r"guideline must be of an integer dtype: \[4\] ids.*got torch.float32",
        ),
        ({"group": torch.zeros(4, dtype=torch.complex64)}, "group must be .*got torch.complex64"),
        ({"guideline": torch.zeros(4, dtype=torch.complex128)}, "guideline must be"),
        ({"group": torch.zeros(4, dtype=torch.bool)}, "group must be .*got torch.bool"),
        ({"reward_weights": torch.ones(2, dtype=torch.complex64)}, "reward_weights must be real"),
        (
            {"guideline_weights": torch.ones(2, dtype=torch.cfloat)},
            "guideline_weights must be real",
        ),
        ({"reward_weights": torch.ones(5)}, "reward_weights"),
        ({"guideline_weights": torch.ones(2)}, "0..K-1"),
        ({"guideline_weights": torch.ones(0)}, "K > 0"),
        ({"group": torch.zeros(4, dtype=torch.long, device="meta")}, "group is on meta"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(("count", "rewards"), [(64, 4), (4096, 16), (65_536, 1), (65_536, 4)])
def test_large_batches_equal_the_cpu(count: int, rewards: int, combine: str, order: str) -> None:
    data = big(count, rewards, order)
    for scale in ("guideline", "batch"):
        options = {"combine": combine, "scale": scale}
        want, want_stats = guideline_advantages(*data, **options)
        got = guideline_advantages(*(x.cuda() for x in data), **options)
        torch.testing.assert_close(got[0].cpu(), want, atol=1e-6, rtol=1e-5)
        for name, value in fields(got[1]).items():
            value, expected = value.cpu(), getattr(want_stats, name)
            torch.testing.assert_close(value, expected, equal_nan=True, atol=1e-6, rtol=1e-5)
        again = guideline_advantages(*(x.cuda() for x in data), **options)
        assert_same_bits(again, got)


@pytest.mark.gpu
@pytest.mark.parametrize("combine", COMBINE)
def test_no_host_synchronisation(implementation: str, combine: str) -> None:
    data = [x.cuda() for x in big(256, 4, "shuffled")]
    guideline_advantages(*data, combine=combine, scale="batch")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, stats = guideline_advantages(*data, combine=combine, scale="batch")
        stats.question_mean(stats.zero_variance)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("combine", COMBINE)
def test_replays_in_a_cuda_graph(triton_kernels: None, combine: str) -> None:
    rewards, group, guideline = (x.cuda() for x in big(256, 4, "shuffled"))
    options = {"combine": combine, "scale": "batch"}
    guideline_advantages(rewards, group, guideline, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guideline_advantages(rewards, group, guideline, **options)
    rewards.copy_(rewards.flip(0))
    graph.replay()
    assert_same_bits(captured, guideline_advantages(rewards, group, guideline, **options))
