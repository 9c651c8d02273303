"""guideline_advantages: B rewards in, B advantages out. All of it is launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.ours import plain_torch
from bench.registry import FLOOR, OURS, Bound, Call, Case, Op, Outputs, Provider, Shape, Sizes
from mmedx_fast.ops import guideline_advantages

EPS = 1e-4


@dataclass(frozen=True)
class RewardInputs:
    """Questions of K guidelines with n rollouts each, in order; a tenth of the rewards do not apply."""

    rewards: Tensor  # [B, M] f32, NaN = does not apply
    group: Tensor  # [B] int64
    guideline: Tensor  # [B] int64
    guidelines: int
    rollouts: int


def _inputs(case: Case) -> RewardInputs:
    b, m, k, n = (case.sizes[name] for name in ("B", "M", "K", "n"))
    random = torch.Generator(case.device).manual_seed(case.seed)
    rewards = torch.randn(b, m, generator=random, device=case.device)
    absent = torch.rand(b, m, generator=random, device=case.device) < 0.1
    index = torch.arange(b, device=case.device)
    return RewardInputs(
        rewards=rewards.masked_fill(absent, torch.nan),
        group=index // (k * n),
        guideline=index // n % k,
        guidelines=k,
        rollouts=n,
    )


def _reference(x: RewardInputs) -> Outputs:
    """The formula of ``kernels/advantage.py``, one question and one guideline at a time."""
    rewards = x.rewards.double().cpu()
    valid = ~rewards.isnan().all(1)
    reward = rewards.nansum(1)
    out = torch.zeros(len(reward), dtype=torch.float64)
    width = x.guidelines * x.rollouts
    for start in range(0, len(reward), width):
        question = torch.arange(start, start + width)
        alive = question[valid[question]]
        mu, sd = _moments(reward[alive])
        for pair in question.split(x.rollouts):
            mine = pair[valid[pair]]
            if len(mine) == 0:
                continue
            mu_k, sd_k = _moments(reward[mine])
            inner = (reward[mine] - mu_k) / (sd_k + EPS)
            out[mine] = inner + (mu_k - mu) / (sd + EPS)
    return {"advantages": out.to(x.rewards.device)}


def _gdpo_reference(x: RewardInputs) -> Outputs:
    """Each reward normalised over the question, their sum over the batch; one question and one reward at
    a time."""
    rewards = x.rewards.double().cpu()
    valid = ~rewards.isnan().all(1)
    reward = torch.zeros(len(rewards), dtype=torch.float64)
    for question in torch.arange(len(rewards)).split(x.guidelines * x.rollouts):
        for m in range(rewards.shape[1]):
            mine = question[~rewards[question, m].isnan()]
            if len(mine) == 0:
                continue
            mu, sd = _moments(rewards[mine, m])
            reward[mine] += (rewards[mine, m] - mu) / (sd + EPS)
    mu, sd = _moments(reward[valid])
    out = torch.where(valid, (reward - mu) / (sd + EPS), 0.0)
    return {"advantages": out.to(x.rewards.device)}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(), x.std() if len(x) > 1 else x.new_zeros(())


def _ours(x: RewardInputs) -> Call:
    return lambda: {"advantages": guideline_advantages(x.rewards, x.group, x.guideline)[0]}


def _gdpo(x: RewardInputs) -> Call:
    return lambda: {
        "advantages": guideline_advantages(
            x.rewards, x.group, x.guideline, combine="normalize_then_sum", scale="batch"
        )[0]
    }


def _dense(rewards: Tensor, guidelines: int, rollouts: int) -> Tensor:
    """The same result where all groups are full and in order: NaN-aware means over a [P, K, n] view."""
    valid = ~rewards.isnan().all(1)
    reward = torch.where(valid, rewards.nansum(1), torch.nan).view(-1, guidelines, rollouts)
    mu_pk = reward.nanmean(2, keepdim=True)
    mu_p = reward.nanmean((1, 2), keepdim=True)
    inner = (reward - mu_pk) / (_nanstd(reward, mu_pk, (2,)) + EPS)
    outer = (mu_pk - mu_p) / (_nanstd(reward, mu_p, (1, 2)) + EPS)
    return (inner + outer).view(-1).nan_to_num(0.0)


def _nanstd(x: Tensor, mean: Tensor, dims: tuple[int, ...]) -> Tensor:
    square = (x - mean).square()
    count = (~x.isnan()).sum(dims, keepdim=True)
    return (square.nansum(dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _by_layout(function: Callable[[Tensor, int, int], Tensor], x: RewardInputs) -> Call:
    return lambda: {"advantages": function(x.rewards, x.guidelines, x.rollouts)}


def _eager(x: RewardInputs) -> Call:
    return _by_layout(_dense, x)


def _compiled(x: RewardInputs) -> Call:
    torch._dynamo.reset()  # as in bench.head.compiled
    return _by_layout(torch.compile(_dense, dynamic=False), x)


def _graphed(make: Callable[[RewardInputs], Call], x: RewardInputs) -> Call:
    """The same call captured in a CUDA graph: what is left when the host costs nothing."""
    call = make(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Outputs:
        graph.replay()
        return out

    return replay


def _trl(x: RewardInputs) -> Call:
    """TRL 1.16, ``GRPOTrainer``, sum_then_normalize: one mean and one deviation a question."""
    from trl.trainer.utils import nanstd

    width = x.guidelines * x.rollouts
    weights = x.rewards.new_ones(x.rewards.shape[1])

    def call() -> Outputs:
        unscorable = x.rewards.isnan().all(dim=1)
        rewards = (x.rewards * weights.unsqueeze(0)).nansum(dim=1)
        rewards = torch.where(unscorable, torch.nan, rewards)
        mean = rewards.view(-1, width).nanmean(dim=1).repeat_interleave(width, dim=0)
        std = nanstd(rewards.view(-1, width), dim=1).repeat_interleave(width, dim=0)
        return {"advantages": torch.nan_to_num((rewards - mean) / (std + EPS), nan=0.0)}

    return call


def _trl_gdpo(x: RewardInputs) -> Call:
    """TRL 1.16, ``GRPOTrainer``, normalize_then_sum."""
    from trl.trainer.utils import nanstd

    width = x.guidelines * x.rollouts
    weights = x.rewards.new_ones(x.rewards.shape[1])

    def call() -> Outputs:
        unscorable = x.rewards.isnan().all(dim=1)
        grouped = x.rewards.view(-1, width, len(weights))
        mean = torch.nanmean(grouped, dim=1, keepdim=True)
        each = (grouped - mean) / (nanstd(grouped, dim=1, keepdim=True) + EPS)
        rewards = (each.view(-1, len(weights)) * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable] = torch.nan
        advantages = (rewards - torch.nanmean(rewards)) / (nanstd(rewards) + EPS)
        return {"advantages": torch.nan_to_num(advantages, nan=0.0)}

    return call


def _copy(x: RewardInputs) -> Call:
    target = torch.empty_like(x.rewards)

    def call() -> Outputs:
        target.copy_(x.rewards)
        return {}

    return call


def _bytes(s: Sizes, itemsize: int) -> float:
    """Rewards (float32 always) and two int64 ids read, the advantages written."""
    return float(s["B"] * (4 * s["M"] + 2 * 8 + 4))


def _shapes(
    batches: tuple[int, ...], n: int = 4, guidelines: int = 4, rewards: tuple[int, ...] = (3, 8)
) -> tuple[Shape, ...]:
    return tuple(
        Shape(f"B={b} M={m} K={guidelines}", {"B": b, "M": m, "K": guidelines, "n": n}, b)
        for b in batches
        for m in rewards
    )


# 65,536 rewards: the most that is promised to be one launch's
MOST = _shapes((8192,), rewards=(8,))
GDPO = _shapes((512, 64, 4096), 8, 1) + _shapes((8192,), 8, 1, rewards=(8,))

OPS = (
    Op(
        name="guideline_advantages",
        title="guideline-relative advantages",
        inputs=_inputs,
        reference=_reference,
        bounds={"advantages": Bound("absolute", 1e-4)},
        # a sum over M rewards, two sums and two sums of squares, the two terms
        flops=lambda s: float(s["B"] * (s["M"] + 16)),
        bytes=_bytes,
        shapes={
            "tiny": _shapes((64, 256)),
            "qwen2_5_vl_7b": _shapes((512, 64, 4096)) + MOST,
            "qwen2_vl_2b": _shapes((512, 64, 4096)) + MOST,
        },
        providers=(
            Provider("ours", _ours, OURS),
            plain_torch(_ours, "guideline_advantages"),
            Provider("copy", _copy, FLOOR, note="one launch that reads the rewards", computes=False),
            Provider("ours, CUDA graph", partial(_graphed, _ours), cuda=True),
            Provider("eager torch", _eager, note="full groups in order only"),
            Provider(
                "eager torch, CUDA graph", partial(_graphed, _eager), cuda=True,
                note="full groups in order only",
            ),
            Provider(
                "torch.compile", _compiled, cuda=True, note="full groups in order only", last=True
            ),
            Provider(
                "TRL formula", _trl, needs=("trl",), limits=None,
                note="GRPO: no guideline term, full groups in order only",
            ),
        ),
        dispatch="guideline_advantages",
        axis="rollouts",
    ),
    Op(
        name="gdpo_advantages",
        title="GDPO's advantages (each reward normalised, then summed)",
        inputs=_inputs,
        reference=_gdpo_reference,
        bounds={"advantages": Bound("absolute", 1e-4)},
        # of each reward two sums, a normalisation and a sum; two sums and a normalisation of these
        flops=lambda s: float(s["B"] * (6 * s["M"] + 6)),
        bytes=_bytes,
        shapes={"tiny": _shapes((64, 256), 8, 1), "qwen2_5_vl_7b": GDPO, "qwen2_vl_2b": GDPO},
        providers=(
            Provider("ours", _gdpo, OURS),
            plain_torch(_gdpo, "guideline_advantages"),
            Provider("copy", _copy, FLOOR, note="one launch that reads the rewards", computes=False),
            Provider("ours, CUDA graph", partial(_graphed, _gdpo), cuda=True),
            Provider(
                "TRL formula", _trl_gdpo, needs=("trl",), note="full groups in order only"
            ),
        ),
        dispatch="guideline_advantages",
        axis="rollouts",
    ),
)  # fmt: skip
