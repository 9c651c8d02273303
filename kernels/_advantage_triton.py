"""Triton kernels of :mod:`advantage`: every rollout finds its own siblings.

A program owns a few rollouts. It looks once over all question ids for the stretch of the batch where
its questions occur, then walks that stretch in blocks and merges each block into running moments (Chan
et al., 1979, in float64), with a mask for "same question" and one for "same guideline too". No sort, no
segment table, no atomics; contiguous questions cost O(B) id comparisons a program, any other order up
to O(B^2) in all. Blocks start at multiples of their size, and merging a block without siblings changes
no bit, so the members of a group get the same statistics whichever program they are in.

The first M programs take the mean of a reward each instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import CompileCase, launch_options
from .advantage import MAX_REWARDS

# Elements of the largest register tile, which has one axis over the rewards.
TILE = 4096
MANY_ROLLOUTS = 8192
RESCALE_ROWS = 256


@triton.jit
def _load_rewards(rewards, j, inside, stride_b, stride_m, M, MP: tl.constexpr):
    """[BJ, MP] float64, NaN outside the matrix."""
    m = tl.arange(0, MP)[None, :]
    at = j.to(tl.int64)[:, None] * stride_b + m.to(tl.int64) * stride_m
    mask = inside[:, None] & (m < M)
    return tl.load(rewards + at, mask=mask, other=float("nan")).to(tl.float64)


@triton.jit
def _load_weights(weights, M, MP: tl.constexpr):
    """[1, MP] float64."""
    m = tl.arange(0, MP)[None, :]
    loaded = tl.full((1, MP), 1.0, tl.float64)
    if weights is not None:
        loaded = tl.load(weights + m, mask=m < M, other=0.0).to(tl.float64)
    return loaded


@triton.jit
def _merge(n, mean, m2, x, use, AXIS: tl.constexpr):
    """Running count, mean and sum of squared deviations, with the chosen entries of x along AXIS added."""
    n_new = tl.sum(use.to(tl.float64), AXIS)
    mean_new = tl.sum(tl.where(use, x, 0.0), AXIS) / tl.maximum(n_new, 1.0)
    deviation = tl.where(use, x - tl.expand_dims(mean_new, AXIS), 0.0)
    m2_new = tl.sum(deviation * deviation, AXIS)
    total = n + n_new
    delta = mean_new - mean
    share = n_new / tl.maximum(total, 1.0)
    return total, mean + delta * share, m2 + m2_new + delta * delta * n * share


@triton.jit
def _sd(n, m2, DDOF: tl.constexpr):
    variance = m2 / tl.maximum(n - DDOF, 1.0)
    return tl.sqrt(tl.where(n > DDOF, variance, 0.0))


@triton.jit
def _store_reward_mean(rewards, reward_mean, m, B, stride_b, stride_m, SPAN: tl.constexpr):
    """Mean of reward m over the rollouts it applies to."""
    n = tl.zeros((SPAN,), tl.float64)
    total = tl.zeros((SPAN,), tl.float64)
    column = rewards + m.to(tl.int64) * stride_m
    for base in range(0, B, SPAN):
        j = base + tl.arange(0, SPAN)
        x = tl.load(column + j.to(tl.int64) * stride_b, mask=j < B, other=float("nan"))
        x = x.to(tl.float64)
        n += (x == x).to(tl.float64)
        total += tl.where(x == x, x, 0.0)
    count = tl.sum(n, 0)
    mean = tl.where(count > 0, tl.sum(total, 0) / tl.maximum(count, 1.0), float("nan"))
    tl.store(reward_mean + m, mean.to(tl.float32))


@triton.jit
def _stretch(group, low, high, B, stride_g, SCAN: tl.constexpr):
    """First and one past the last rollout whose question id lies in low..high."""
    start = tl.full((SCAN,), B, tl.int32)
    stop = tl.zeros((SCAN,), tl.int32)
    for base in range(0, B, SCAN):
        j = base + tl.arange(0, SCAN)
        ids = tl.load(group + j.to(tl.int64) * stride_g, mask=j < B, other=0).to(tl.int64)
        near = (j < B) & (ids >= low) & (ids <= high)
        start = tl.minimum(start, tl.where(near, j, B))
        stop = tl.maximum(stop, tl.where(near, j + 1, 0))
    return tl.min(start, 0), tl.max(stop, 0)


@triton.jit
def _batch_sd(
    rewards, weights, B, M, stride_b, stride_m,
    DDOF: tl.constexpr, MP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """[1] standard deviation of the weighted sums of all valid rollouts."""
    n = tl.zeros((1,), tl.float64)
    mean = tl.zeros((1,), tl.float64)
    m2 = tl.zeros((1,), tl.float64)
    for base in range(0, B, SPAN):
        j = base + tl.arange(0, SPAN)
        x = _load_rewards(rewards, j, j < B, stride_b, stride_m, M, MP)
        applies = x == x
        valid = tl.max(applies.to(tl.int32), 1) > 0
        reward = tl.sum(tl.where(applies, x * weights, 0.0), 1)
        n, mean, m2 = _merge(n, mean, m2, reward[None, :], valid[None, :], 1)
    return _sd(n, m2, DDOF)


@triton.jit
def _store_rows(
    rewards, group, guideline, reward_weights, guideline_weights,
    floats, counts, flags, handoff,
    block, B, M, K, stride_b, stride_m, stride_g, stride_k, within, between, eps,
    NORMALIZE: tl.constexpr, SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, DDOF: tl.constexpr,
    MP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SCAN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Advantage and statistics of rollouts block * BI .. block * BI + BI - 1."""
    i = block * BI + tl.arange(0, BI)
    mine = i < B
    # rows past the end repeat the last rollout, so that they widen nothing
    at = tl.minimum(i, B - 1).to(tl.int64)
    question = tl.load(group + at * stride_g).to(tl.int64)
    criterion = tl.load(guideline + at * stride_k).to(tl.int64)
    low = tl.min(question, 0)
    high = tl.max(question, 0)
    start, stop = _stretch(group, low, high, B, stride_g, SCAN)
    start = start // BJ * BJ
    weights = _load_weights(reward_weights, M, MP)

    if NORMALIZE:  # moments of each reward over the rollout's question
        n_m = tl.zeros((BI, MP), tl.float64)
        mean_m = tl.zeros((BI, MP), tl.float64)
        m2_m = tl.zeros((BI, MP), tl.float64)
        for base in range(start, stop, BJ):
            j = base + tl.arange(0, BJ)
            ids = tl.load(group + j.to(tl.int64) * stride_g, mask=j < B, other=0).to(tl.int64)
            if (tl.max(ids, 0) >= low) & (tl.min(ids, 0) <= high):
                x = _load_rewards(rewards, j, j < B, stride_b, stride_m, M, MP)[None, :, :]
                same = ((question[:, None] == ids[None, :]) & (j < B)[None, :])[:, :, None]
                n_m, mean_m, m2_m = _merge(n_m, mean_m, m2_m, x, same & (x == x), 1)
        weights_m = weights / (_sd(n_m, m2_m, DDOF) + eps)

    n_p = tl.zeros((BI,), tl.float64)
    mean_p = tl.zeros((BI,), tl.float64)
    m2_p = tl.zeros((BI,), tl.float64)
    n_pk = tl.zeros((BI,), tl.float64)
    mean_pk = tl.zeros((BI,), tl.float64)
    m2_pk = tl.zeros((BI,), tl.float64)
    least = tl.full((BI,), float("inf"), tl.float64)
    most = tl.full((BI,), float("-inf"), tl.float64)
    reward = tl.zeros((BI,), tl.float64)
    valid = tl.zeros((BI,), tl.int32)
    first_p = tl.zeros((BI,), tl.int32) + B
    first_pk = tl.zeros((BI,), tl.int32) + B
    for base in range(start, stop, BJ):
        j = base + tl.arange(0, BJ)
        inside = j < B
        ids = tl.load(group + j.to(tl.int64) * stride_g, mask=inside, other=0).to(tl.int64)
        if (tl.max(ids, 0) >= low) & (tl.min(ids, 0) <= high):
            ks = tl.load(guideline + j.to(tl.int64) * stride_k, mask=inside, other=0).to(tl.int64)
            x = _load_rewards(rewards, j, inside, stride_b, stride_m, M, MP)
            applies = x == x
            valid_j = tl.max(applies.to(tl.int32), 1)[None, :]
            if NORMALIZE:  # with the row's moments, which are column j's too where it counts
                z = (x[None, :, :] - mean_m[:, None, :]) * weights_m[:, None, :]
                value = tl.sum(tl.where(applies[None, :, :], z, 0.0), 2)
            else:
                value = tl.sum(tl.where(applies, x * weights, 0.0), 1)[None, :]
            same = (question[:, None] == ids[None, :]) & inside[None, :]
            pair = same & (criterion[:, None] == ks[None, :])
            itself = i[:, None] == j[None, :]
            use = same & (valid_j > 0)
            n_p, mean_p, m2_p = _merge(n_p, mean_p, m2_p, value, use, 1)
            n_pk, mean_pk, m2_pk = _merge(n_pk, mean_pk, m2_pk, value, use & pair, 1)
            least = tl.minimum(least, tl.min(tl.where(use, value, float("inf")), 1))
            most = tl.maximum(most, tl.max(tl.where(use, value, float("-inf")), 1))
            reward += tl.sum(tl.where(itself, value, 0.0), 1)
            valid += tl.sum(tl.where(itself, valid_j, 0), 1)
            column = tl.where(same, j[None, :], B)
            first_p = tl.minimum(first_p, tl.min(column, 1))
            column = tl.where(pair, j[None, :], B)
            first_pk = tl.minimum(first_pk, tl.min(column, 1))
    sd_p = _sd(n_p, m2_p, DDOF)
    sd_pk = _sd(n_pk, m2_pk, DDOF)

    mu_p = mean_p
    mu_pk = mean_pk
    if LEAVE_ONE_OUT:  # mean of the others; the only one of its kind stands for itself
        mu_p = tl.where(n_p > 1, mu_p - (reward - mu_p) / tl.maximum(n_p - 1, 1.0), reward)
        mu_pk = tl.where(n_pk > 1, mu_pk - (reward - mu_pk) / tl.maximum(n_pk - 1, 1.0), reward)
    inner = tl.where(n_pk > 1, reward - mu_pk, 0.0)
    outer = mu_pk - mu_p
    if SCALE == "guideline":
        inner = inner / (sd_pk + eps)
        outer = outer / (sd_p + eps)
    elif SCALE == "group":
        inner = inner / (sd_p + eps)
        outer = outer / (sd_p + eps)
    elif SCALE == "batch":
        sd = _batch_sd(rewards, weights, B, M, stride_b, stride_m, DDOF, MP, SPAN)
        inner = inner / (sd + eps)
        outer = outer / (sd + eps)
    advantage = within * inner + between * outer
    if guideline_weights is not None:
        known = (criterion >= 0) & (criterion < K)
        factor = tl.load(guideline_weights + criterion, mask=known, other=float("nan"))
        advantage = advantage * factor.to(tl.float64)
    is_valid = valid > 0
    advantage = tl.where(is_valid, advantage, 0.0)
    flat = most - least <= 1e-8 + 1e-6 * tl.maximum(tl.abs(most), tl.abs(least))
    nan = float("nan")
    own = tl.where(is_valid, reward, nan)

    if handoff is not None:
        tl.store(handoff + i, advantage, mask=mine)
        tl.store(handoff + B + i, own, mask=mine)
    tl.store(floats + i, advantage.to(tl.float32), mask=mine)
    tl.store(floats + B + i, own.to(tl.float32), mask=mine)
    tl.store(floats + 2 * B + i, tl.where(n_p > 0, mean_p, nan).to(tl.float32), mask=mine)
    tl.store(floats + 3 * B + i, sd_p.to(tl.float32), mask=mine)
    tl.store(floats + 4 * B + i, tl.where(n_pk > 0, mean_pk, nan).to(tl.float32), mask=mine)
    tl.store(floats + 5 * B + i, sd_pk.to(tl.float32), mask=mine)
    tl.store(counts + i, n_p.to(tl.int64), mask=mine)
    tl.store(counts + B + i, n_pk.to(tl.int64), mask=mine)
    tl.store(flags + i, is_valid, mask=mine)
    tl.store(flags + B + i, flat | (n_p == 0), mask=mine)
    tl.store(flags + 2 * B + i, first_p == i, mask=mine)
    tl.store(flags + 3 * B + i, first_pk == i, mask=mine)


@triton.jit(do_not_specialize=["B", "M", "K", "stride_b"])
def _advantage_kernel(
    rewards, group, guideline, reward_weights, guideline_weights,
    floats, counts, flags, reward_mean, handoff,
    B, M, K, stride_b, stride_m, stride_g, stride_k,
    within: tl.float64, between: tl.float64, eps: tl.float64,
    NORMALIZE: tl.constexpr, SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, DDOF: tl.constexpr,
    MP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SCAN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < M:
        _store_reward_mean(rewards, reward_mean, program, B, stride_b, stride_m, SCAN)
    else:
        _store_rows(
            rewards, group, guideline, reward_weights, guideline_weights,
            floats, counts, flags, handoff,
            program - M, B, M, K, stride_b, stride_m, stride_g, stride_k, within, between, eps,
            NORMALIZE, SCALE, LEAVE_ONE_OUT, DDOF, MP, BI, BJ, SCAN, SPAN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B"])
def _rescale_kernel(
    floats, handoff, B, eps: tl.float64,
    DDOF: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Divide the advantages of a block by the standard deviation of all valid combined rewards."""
    n = tl.zeros((1,), tl.float64)
    mean = tl.zeros((1,), tl.float64)
    m2 = tl.zeros((1,), tl.float64)
    for base in range(0, B, SPAN):
        j = base + tl.arange(0, SPAN)
        reward = tl.load(handoff + B + j, mask=j < B, other=float("nan"))
        n, mean, m2 = _merge(n, mean, m2, reward[None, :], (reward == reward)[None, :], 1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    advantage = tl.load(handoff + i, mask=i < B) / (_sd(n, m2, DDOF) + eps)
    tl.store(floats + i, advantage.to(tl.float32), mask=i < B)


def _options(warps: int) -> dict[str, Any]:
    """Left alone, ptxas aims at as many blocks a multiprocessor as just do not fit, and spills for it."""
    return launch_options(warps, 1) | {"maxnreg": 255}


@functools.cache
def _blocks(rollouts: int, rewards: int, normalize: bool) -> tuple[dict[str, int], int]:
    """Tile sizes and warps. Small tiles while a launch is short of programs, fewer and larger ones when
    every program's look over all ids is what costs."""
    mp = triton.next_power_of_2(max(rewards, 1))
    many = rollouts > MANY_ROLLOUTS
    if normalize:
        j = 64 if mp <= 4 else 32 if mp <= 64 else 16
        i = max(1, min(16, TILE // (j * mp)))
    else:
        j = max(16, min(32 if many else 64, TILE // mp))
        i = 64 if many else 16
    blocks = {"MP": mp, "BI": i, "BJ": j, "SCAN": 4096 if many else 2048, "SPAN": TILE // mp}
    return blocks, 8 if many else 4


def guideline_advantages_triton(
    rewards: Tensor,
    group: Tensor,
    guideline: Tensor,
    reward_weights: Tensor | None,
    guideline_weights: Tensor | None,
    combine: str,
    scale: str,
    within: float,
    between: float,
    baseline: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton path, with the packed tensors of ``AdvantageStats`` and reward_mean as its result."""
    b, m = rewards.shape
    floats = rewards.new_empty((6, b), dtype=torch.float32)
    counts = rewards.new_empty((2, b), dtype=torch.int64)
    flags = rewards.new_empty((4, b), dtype=torch.bool)
    reward_mean = rewards.new_empty(m, dtype=torch.float32)
    normalize = combine == "normalize_then_sum"
    # the batch's spread of sums of normalised rewards needs every program's result
    second = normalize and scale == "batch"
    handoff = rewards.new_empty((2, b), dtype=torch.float64) if second else None
    blocks, warps = _blocks(b, m, normalize)
    options = _options(warps)
    with torch.cuda.device_of(rewards):
        _advantage_kernel[(m + triton.cdiv(b, blocks["BI"]),)](
            rewards, group, guideline,
            None if reward_weights is None else reward_weights.contiguous(),
            None if guideline_weights is None else guideline_weights.contiguous(),
            floats, counts, flags, reward_mean, handoff,
            b, m, 0 if guideline_weights is None else len(guideline_weights),
            rewards.stride(0), rewards.stride(1), group.stride(0), guideline.stride(0),
            float(within), float(between), float(eps),
            NORMALIZE=normalize, SCALE="none" if second else scale,
            LEAVE_ONE_OUT=baseline == "leave_one_out", DDOF=ddof, **blocks, **options,
        )  # fmt: skip
        if second and b:
            _rescale_kernel[(triton.cdiv(b, RESCALE_ROWS),)](
                floats, handoff, b, float(eps),
                DDOF=ddof, ROWS=RESCALE_ROWS, SPAN=1024, **launch_options(4, 1),
            )  # fmt: skip
    return floats, counts, flags, reward_mean


def _compile_case(
    rollouts: int, rewards: int, combine: str, scale: str, baseline: str, weighted: bool
) -> CompileCase:
    normalize = combine == "normalize_then_sum"
    second = normalize and scale == "batch"
    blocks, warps = _blocks(rollouts, rewards, normalize)
    signature = dict.fromkeys(("rewards", "reward_weights", "guideline_weights"), "*fp32")
    signature |= dict.fromkeys(("group", "guideline", "counts"), "*i64")
    signature |= {"floats": "*fp32", "flags": "*i1", "reward_mean": "*fp32", "handoff": "*fp64"}
    pointers = tuple(signature)
    signature |= dict.fromkeys(("B", "M", "K", "stride_b"), "i32")
    signature |= dict.fromkeys(("within", "between", "eps"), "fp64")
    constexprs: dict[str, Any] = {"stride_m": 1, "stride_g": 1, "stride_k": 1}
    constexprs |= {"NORMALIZE": normalize, "SCALE": "none" if second else scale}
    constexprs |= {"LEAVE_ONE_OUT": baseline == "leave_one_out", "DDOF": 1, **blocks}
    if not weighted:
        constexprs |= {"reward_weights": None, "guideline_weights": None}
    if not second:
        constexprs |= {"handoff": None}
    return CompileCase(
        name=f"advantage B{rollouts} M{rewards} {combine} {scale} {baseline}",
        kernel=_advantage_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=1,
        aligned=tuple(p for p in pointers if p not in constexprs),
        options=_options(warps),
    )


COMPILE_CASES = [
    _compile_case(*case)
    for case in (
        (4096, 1, "sum_then_normalize", "group", "mean", False),
        (4096, 4, "sum_then_normalize", "guideline", "mean", True),
        (4096, 16, "sum_then_normalize", "guideline", "leave_one_out", True),
        (4096, 32, "sum_then_normalize", "batch", "mean", True),
        (65_536, 1, "sum_then_normalize", "guideline", "mean", True),
        (65_536, 16, "sum_then_normalize", "batch", "leave_one_out", True),
        (4096, 4, "normalize_then_sum", "batch", "mean", True),
        (4096, 16, "normalize_then_sum", "guideline", "leave_one_out", True),
        (4096, 32, "normalize_then_sum", "group", "mean", True),
        (65_536, 4, "normalize_then_sum", "batch", "mean", True),
        # the most rewards, at both block sizes
        (4096, MAX_REWARDS, "sum_then_normalize", "batch", "leave_one_out", True),
        (65_536, MAX_REWARDS, "sum_then_normalize", "batch", "leave_one_out", True),
        (4096, MAX_REWARDS, "normalize_then_sum", "guideline", "leave_one_out", True),
        (65_536, MAX_REWARDS, "normalize_then_sum", "guideline", "leave_one_out", True),
    )
] + [
    CompileCase(
        name="advantage rescale",
        kernel=_rescale_kernel,
        signature={"floats": "*fp32", "handoff": "*fp64", "B": "i32", "eps": "fp64"},
        constexprs={"DDOF": 1, "ROWS": RESCALE_ROWS, "SPAN": 1024},
        num_warps=4,
        num_stages=1,
        aligned=("floats", "handoff"),
    )
]
