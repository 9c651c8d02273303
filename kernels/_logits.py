"""Tiles of logits: what the plain torch log-prob and policy-loss ops share.

A tile is the logits of a few tokens over the whole vocabulary (or this rank's part of it)::

    z = softcap * tanh((h W^T + bias) / softcap) / temperature        banned ids: -inf

Everything is kept relative to the row's maximum, never to its log-sum-exp: under a large common
offset the difference of two large numbers would cost the digits that matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a logits tile, and the fewest rows worth a GEMM. On a CPU a tile that stays in cache
# is 3x to 10x quicker than one that the allocator must map anew; on CUDA a tile must be tall (about
# 1.8k rows at V = 152k).
CPU_TILE, CPU_ROWS = 1 << 19, 64
CUDA_TILE, CUDA_ROWS = 1 << 28, 128
# -inf logits become this, so that 0 * z is 0 and not NaN; exp of it is 0 in every dtype.
FLOOR = -1e30


@dataclass(frozen=True)
class Head:
    """How hidden states become logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    banned: Tensor | None  # [n] int64 ids within this weight
    acc: (
        torch.dtype
    )  # dtype of logits, statistics and outputs: float32, or float64 for float64 inputs
    round_to: (
        torch.dtype | None
    )  # logits are rounded to this first (as an inference engine in bf16 does)

    def prepared(self) -> Head:
        """A copy whose weight and bias are already in the dtype the CPU GEMM runs in, to cast once
        per call."""
        if self.weight.is_cuda:
            return self
        bias = None if self.bias is None else self.bias.detach().to(self.acc)
        return Head(
            self.weight.detach().to(self.acc),
            bias,
            self.temperature,
            self.softcap,
            self.banned,
            self.acc,
            self.round_to,
        )


@dataclass
class Tile:
    """One tile and its row statistics; ``z`` is relative to the row maximum.

    The target's own exp is left out of the sum: if the target is the maximum, ``others`` is (1 - p)
    / p with all its digits, which a sum that starts from 1 has lost.
    """

    z: Tensor  # [n, V]
    e: Tensor  # [n, V] exp(z), 0 at an owned target
    top: Tensor  # [n] row maximum of the logits
    others: Tensor  # [n] sum of exp(z) without the target
    target: Tensor  # [n] z of the target
    moment: Tensor | None  # [n] sum of exp(z) * z

    def rebase(self, top: Tensor, others: Tensor, target: Tensor) -> None:
        """Make everything relative to the maximum of a row of which this tile is only a part."""
        shift = (self.top - top).clamp(min=FLOOR)[:, None]
        self.z.add_(shift).clamp_(min=FLOOR)
        self.e.mul_(shift.exp())
        self.top, self.others, self.target = top, others, target


def log_total(others: Tensor, target: Tensor) -> Tensor:
    """[n] log of the row's whole sum of exp(z)."""
    return torch.log1p(others + torch.expm1(target))


def accumulate_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float64 if wide == torch.float64 else torch.float32


def spans(n: int, vocab: int, device: torch.device, chunk: int | None) -> Iterator[slice]:
    """Row ranges of at most ``chunk`` (default: by the tile budget), equal to within one row."""
    if n == 0:
        return
    if chunk is None:
        cuda = device.type == "cuda"
        budget, least = (CUDA_TILE, CUDA_ROWS) if cuda else (CPU_TILE, CPU_ROWS)
        chunk = max(least, budget // max(vocab, 1))
    pieces = math.ceil(n / chunk)
    for i in range(pieces):
        yield slice(i * n // pieces, (i + 1) * n // pieces)


def matmul_into(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with the accumulators kept in ``dtype``, not rounded to the inputs' first."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def raw_logits(hidden: Tensor, head: Head) -> Tensor:
    """[n, V] logits as the distribution sees them: biased, capped, divided by the temperature,
    banned."""
    if head.round_to is None:
        z = matmul_into(hidden, head.weight.t(), head.acc)
        z = z if head.bias is None else z.add_(head.bias)
    else:
        z = hidden.to(head.round_to) @ head.weight.to(head.round_to).t()
        z = (z if head.bias is None else z.add_(head.bias)).to(head.acc)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        z.div_(head.temperature)
    if head.banned is not None:
        z.index_fill_(1, head.banned, -torch.inf)
    return z


def make_tile(
    hidden: Tensor, head: Head, target: Tensor, owned: Tensor | None = None, moment: bool = False
) -> Tile:
    """Logits and row statistics. ``target`` [n] indexes this weight's rows, where ``owned`` [n]
    says it is one of them."""
    z = raw_logits(hidden, head)
    top = z.amax(1)
    z.sub_(top[:, None])
    at = target[:, None]
    z_target = z.gather(1, at).squeeze(1)
    z.clamp_(min=FLOOR)
    e = z.exp()
    first_moment = torch.linalg.vecdot(e, z) if moment else None
    if owned is None:
        e.scatter_(1, at, 0.0)
    else:
        e.scatter_(1, at, torch.where(owned[:, None], 0.0, e.gather(1, at)))
    return Tile(z, e, top, e.sum(1), z_target, first_moment)


def dlogits(
    tile: Tile,
    head: Head,
    target: Tensor,  # [n] column of the target
    owned: Tensor | None,  # [n] bool, the target is one of this tile's columns; None = always
    d_logprob: Tensor,  # [n]
    d_entropy: Tensor | None,  # [n]
    entropy: Tensor | None,  # [n]
) -> Tensor:
    """Gradient with respect to the logits before temperature and cap, [n, V]; overwrites the tile.

    d logprob / d z_j = [j = y] - p_j;  d entropy / d z_j = -p_j (log p_j + entropy).
    """
    cap = None
    if head.softcap is not None:  # d tanh = 1 - tanh^2, and tanh is the capped logit over the cap
        cap = (tile.z + tile.top[:, None]).mul_(head.temperature / head.softcap)
        cap = cap.clamp_(-1, 1).square_().neg_().add_(1)
    g = d_logprob / head.temperature
    total = log_total(tile.others, tile.target)
    log_p = tile.target - total
    # 1 - p loses its digits as p nears 1, -expm1(log p) does not
    at_target = g * -torch.expm1(log_p)
    inverse = (-total).exp()
    if d_entropy is None:
        grad = tile.e.mul_((-g * inverse)[:, None])
    else:
        assert entropy is not None
        ge = d_entropy / head.temperature
        slope = tile.z.add_((entropy - total)[:, None]).mul_(ge[:, None]).add_(g[:, None])
        grad = tile.e.mul_(slope).mul_(-inverse[:, None])
        p = log_p.exp()
        at_target = at_target - ge * p * torch.where(p > 0, log_p + entropy, 0.0)
    at = target[:, None]
    if owned is not None:
        at_target = torch.where(owned, at_target, grad.gather(1, at).squeeze(1))
    grad.scatter_(1, at, at_target[:, None])
    if cap is not None:
        grad.mul_(cap)
    if head.banned is not None:
        grad.index_fill_(1, head.banned, 0.0)
    return grad


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
) -> None:
    """Raise ValueError for operands that do not fit together."""
    if getattr(weight, "ds_id", None) is not None and weight.numel() == 0:
        raise ValueError(
            "the head's weight is partitioned by ZeRO-3 (it has no elements on this rank): "
            "call the op inside deepspeed.zero.GatheredParameters([weight])"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden and weight must be float, got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be an integer [{hidden.shape[0]}] tensor, "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")


def check_targets(targets: Tensor, vocab: int) -> None:
    """Raise ValueError if a target lies outside 0..vocab-1. CPU only: on CUDA it would wait for the
    device."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    wrong = ((targets < 0) | (targets >= vocab)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"targets[{row}] = {int(targets[row])} is not a token id: the vocabulary has "
            f"{vocab} entries (give masked positions any valid id)"
        )


def local_banned(
    banned: Tensor | None, start: int, vocab: int, device: torch.device
) -> Tensor | None:
    """The banned ids that fall in rows start..start+vocab of the head, relative to start."""
    if banned is None or banned.numel() == 0:
        return None
    if banned.dim() != 1 or banned.is_floating_point():
        raise ValueError(f"banned must be [n] token ids, got {banned.dtype} {tuple(banned.shape)}")
    ids = banned.to(device=device, dtype=torch.long) - start
    if device.type == "cpu":
        ids = ids[(ids >= 0) & (ids < vocab)]
        return ids if len(ids) else None
    return ids if start == 0 else ids[(ids >= 0) & (ids < vocab)]
