"""Tiles of logits: what the log-prob and policy-loss ops share on every device.

A tile is the logits of a few tokens over the whole vocabulary (or this rank's part of it)::

    z = softcap * tanh((h W^T + bias) / softcap) / temperature        banned ids: -inf

Everything is kept relative to the row's maximum, never to its log-sum-exp: under a large common
offset the difference of two large numbers would cost the digits that matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check_integers

# Elements of a logits tile on a CPU, and the fewest rows worth a GEMM there: a tile that stays in
# cache is 3x to 10x quicker than one that the allocator must map anew.
CPU_TILE, CPU_ROWS = 1 << 19, 128
# Bytes of a logits tile on CUDA: 1,152 float32 rows of 152,064 logits fit.
CUDA_TILE_BYTES = 750_000_000
# Output tile of the GEMMs that cuBLAS picks for these shapes.
TILE_M, TILE_N = 128, 256
# Bytes of a head's copy in another dtype: a larger one is cast in slabs of the vocabulary.
CAST_BYTES = 1 << 26
# Rows of a tile start at multiples of this many elements, for vector loads and cuBLAS.
ROW_ALIGNMENT = 32
# -inf logits become this, so that 0 * z is 0 and not NaN; exp of it is 0 in every dtype.
FLOOR = -1e30
# Rows of the statistics of a token, [5, N]; all but TOP are relative to it.
TOP, OTHERS, MOMENT, TARGET, OWNED = range(5)


@dataclass(frozen=True)
class Head:
    """How hidden states become logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    banned: Tensor | None  # [n] int64 global ids that cannot occur
    acc: torch.dtype
    """Of logits, statistics and outputs: float32, or float64 for float64 inputs."""
    round_to: torch.dtype | None = None
    """Logits are rounded to this first (as an inference engine in bf16 does)."""
    start: int = 0
    """Global id of the weight's first row."""
    sharded: bool = False
    """Other ranks own the rest of the vocabulary."""

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def raw_dtype(self) -> torch.dtype:
        """Of the logits as the GEMM leaves them."""
        return self.round_to or self.acc


def raw_width(vocab: int) -> int:
    """Elements from one row of a tile to the next: at least one more than the vocabulary has."""
    return (vocab // ROW_ALIGNMENT + 1) * ROW_ALIGNMENT


class Tiles:
    """The tiles of one call, one at a time in one reused buffer; raw logits come from a GEMM.

    ``kept`` [N, raw_width(V)] holds every raw logit instead, to be filled or, if ``filled``, only read.
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        head: Head,
        targets: Tensor,  # [N] int64 global ids
        chunk: int | None,
        *,
        kept: Tensor | None = None,
        filled: bool = False,
    ) -> None:
        self.hidden, self.head, self.targets = hidden, head, targets
        self.kept, self.filled = kept, filled
        n, h = hidden.shape
        self.spans = spans(n, head.vocab, h, hidden.device, chunk, head.raw_dtype.itemsize)
        self._buffer: Tensor | None = None
        self._operand: tuple[Tensor, ...] | None = None
        self._loaded: slice | None = None
        self._banned = banned_columns(head, hidden.device)

    def raw(self, rows: slice) -> Tensor:
        """[n, V] raw logits of these rows, -inf at banned ids; other rows overwrite them unless all are kept."""
        n, head = rows.stop - rows.start, self.head
        if self.kept is not None:
            z = self.kept[rows]
        else:
            if self._buffer is None or len(self._buffer) < n:
                most = max(n, *(s.stop - s.start for s in self.spans))
                self._buffer = self.hidden.new_empty(
                    (most, raw_width(head.vocab)), dtype=head.raw_dtype
                )
            z = self._buffer[:n]
        if not self.filled and self._loaded != rows:
            self._multiply(self.hidden[rows].detach(), z[:, : head.vocab])
            if self._banned is not None:
                z.index_fill_(1, self._banned, -torch.inf)
        self._loaded = rows
        return z[:, : head.vocab]

    def _multiply(self, hidden: Tensor, z: Tensor) -> None:
        """hidden @ W^T into z, with the accumulators kept in z's dtype."""
        weight = self.head.weight.detach()
        if hidden.is_cuda and hidden.dtype == weight.dtype and z.dtype == torch.float32:
            if weight.dtype != torch.float32:
                torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=z)
                return
        hidden = hidden.to(z.dtype)
        if weight.dtype == z.dtype:
            torch.mm(hidden, weight.t(), out=z)
            return
        # A copy of the head may be larger than all else together: whole, and then cast once a call, only if small.
        rows = max(1, CAST_BYTES // (weight.shape[1] * z.dtype.itemsize))
        if self._operand is None:
            whole = rows >= len(weight)
            self._operand = (weight.to(z.dtype),) if whole else weight.split(rows)
        for part, out in zip(self._operand, z.split(rows, 1), strict=True):
            torch.mm(hidden, part.to(z.dtype).t(), out=out)


class Grads:
    """Accumulates what the operands that want a gradient get from each tile of dlogits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> None:
        acc = accumulate_dtype(hidden, weight)
        self._dtypes = weight.dtype, None if bias is None else bias.dtype
        self._empty = hidden.new_empty(0)
        contiguous = torch.contiguous_format
        self.hidden = torch.empty_like(hidden, memory_format=contiguous) if wanted[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=acc) if wanted[1] else None
        self.bias = (
            bias.new_zeros(bias.shape, dtype=acc) if wanted[2] and bias is not None else None
        )

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(
        self, rows: slice, dz: Tensor, hidden: Tensor, weight: Tensor, live: Tensor | None
    ) -> None:
        """``dz`` [n, V] in the weight's dtype; rows that are not ``live`` [n] have zeros there."""
        weight = weight.detach()
        dz = _dense(dz)
        if self.hidden is not None:
            multiply_gradient(dz, weight, self.hidden[rows])
        if self.weight is not None:
            x = hidden[rows].detach()
            x = x if live is None else torch.where(live[:, None], x, 0.0)  # 0 * NaN is NaN
            self._add_weight(dz, x)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)

    def _add_weight(self, dz: Tensor, hidden: Tensor) -> None:
        total = self.weight
        assert total is not None
        if dz.is_cuda and dz.dtype == hidden.dtype and dz.dtype.itemsize == 2:
            torch.addmm(total, dz.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(dz.t().to(total.dtype), hidden.to(total.dtype))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the operands' dtypes, an empty tensor for each that is not wanted."""
        hidden = self._empty if self.hidden is None else self.hidden
        weight = self._empty.clone() if self.weight is None else self.weight.to(self._dtypes[0])
        bias = self._empty.clone() if self.bias is None else self.bias.to(self._dtypes[1])
        return hidden, weight, bias


def _dense(dz: Tensor) -> Tensor:
    """On a CPU without gaps between rows: oneDNN's 16-bit GEMM reads past their end, NaN if that is NaN."""
    return dz if dz.is_cuda else dz.contiguous()


def multiply_gradient(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """dz [n, V] @ weight [V, H] into ``out`` [n, H], in the accumulators' dtype where the platform can."""
    dz = _dense(dz)
    if out.dtype == dz.dtype:
        torch.mm(dz, weight, out=out)
    elif dz.is_cuda and out.dtype == torch.float32:
        torch.mm(dz, weight, out_dtype=torch.float32, out=out)
    else:
        out.copy_(dz @ weight)


def log_total(others: Tensor, target: Tensor) -> Tensor:
    """[n] log of the row's whole sum of exp(z)."""
    return torch.log1p(others + torch.expm1(target))


def outcome(stats: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-prob [N], entropy [N] or None) from the statistics [5, N] of the whole vocabulary."""
    total = log_total(stats[OTHERS], stats[TARGET])
    logprob = stats[TARGET] - total
    return logprob, total - stats[MOMENT] * (-total).exp() if entropy else None


def merge_shards(stats: Tensor, group: dist.ProcessGroup, start: int, vocab: int) -> Tensor:
    """[5, N] of this shard (top, others, moment, target, owned), which is ids ``start`` to ``start + vocab``,
    -> the same of the whole vocabulary.

    One all-reduce: every rank puts its rows, and where its shard lies, in its own slot of a zero buffer.
    """
    n = stats.shape[1]
    slots = stats.new_zeros((dist.get_world_size(group), 5, n + 1))
    mine = slots[dist.get_rank(group)]
    mine[:, :n] = stats
    mine[0, n], mine[1, n] = start, start + vocab  # exact in float32 up to 16 million ids
    dist.all_reduce(slots, group=group)
    return combine_shards(slots[..., :n], slots[:, :2, n])


def combine_shards(slots: Tensor, bounds: Tensor) -> Tensor:
    """[5, N] from those of every rank [R, 5, N], whose shards are the ids ``bounds`` [R, 2].

    The shards must be the whole vocabulary, each id once, and each target one of it: an error on a CPU,
    elsewhere NaN.
    """
    top, others, moment, target, owned = slots.unbind(1)
    mine = owned > 0
    whole_top = top.amax(0)
    shift = (top - whole_top).clamp(min=FLOOR)
    scale = shift.exp()
    total = others + torch.where(mine, target.exp(), 0.0)
    # sum of exp(z) * z, with z relative to the new maximum
    moment = ((moment + shift * total) * scale).sum(0)
    others = (others * scale).sum(0)
    target = torch.where(mine, target + shift, 0.0).sum(0)
    found = mine.sum(0) == 1
    in_order = bounds[bounds[:, 0].argsort()]
    fit = (in_order[0, 0] == 0) & (in_order[1:, 0] == in_order[:-1, 1]).all()
    if slots.device.type == "cpu":
        _check_shards(bounds, bool(fit), found)
    target = torch.where(found & fit, target, torch.nan)
    return torch.stack([whole_top, others, moment, target, found.to(slots.dtype)])


def _check_shards(bounds: Tensor, fit: bool, found: Tensor) -> None:
    if not fit:
        parts = ", ".join(f"{int(a)} to {int(b)}" for a, b in bounds.tolist())
        raise ValueError(
            f"the ranks' parts of the vocabulary overlap or leave a gap: they are the ids {parts}. "
            "Give every rank its own vocab_start (the default, rank * V, is for shards of one size)"
        )
    if not bool(found.all()):
        row = int((~found).nonzero()[0])
        raise ValueError(
            f"targets[{row}] is in no rank's part of the vocabulary: check vocab_start"
        )


def shard_start(vocab: int, group: dist.ProcessGroup | None, start: int | None) -> int:
    """Global id of this rank's first row of the head."""
    if group is None:
        return 0
    return dist.get_rank(group) * vocab if start is None else start


def gradient_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :meth:`Grads.result` returns, without values."""
    contiguous = torch.contiguous_format
    found = [
        hidden.new_empty(0) if x is None or not w else torch.empty_like(x, memory_format=contiguous)
        for x, w in zip((hidden, weight, bias), wanted, strict=True)
    ]
    return found[0], found[1], found[2]


def accumulate_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float64 if wide == torch.float64 else torch.float32


def spans(
    n: int, vocab: int, width: int, device: torch.device, chunk: int | None, itemsize: int = 4
) -> list[slice]:
    """Row ranges of at most ``chunk`` (default: as the device likes them), equal to within one row."""
    if n == 0:
        return []
    if chunk is not None:
        pieces = math.ceil(n / chunk)
    elif device.type == "cuda":
        pieces = cuda_pieces(n, vocab, width, itemsize, _multiprocessors(device))
    else:
        pieces = math.ceil(n / max(CPU_ROWS, CPU_TILE // max(vocab, 1)))
    return [slice(i * n // pieces, (i + 1) * n // pieces) for i in range(pieces)]


def cuda_pieces(
    n: int, vocab: int, width: int, itemsize: int, multiprocessors: int,
    budget: int = CUDA_TILE_BYTES,
) -> int:  # fmt: skip
    """How many equal tiles to cut n tokens into, for two GEMMs [n, width] x [width, vocab] and back.

    A GEMM runs in waves of one output tile per multiprocessor, and a last wave that is half empty
    costs a whole one; the gradient's GEMM has few and long tiles, so a bad row count costs up to half
    of it. Among the counts from the fewest that fit ``budget`` bytes a tile to twice that, this takes
    the one with the least time in waves, and the smaller of equals. Cutting into equal parts comes
    first, because a short last tile still streams the whole weight.
    """
    limit = max(TILE_M, budget // (raw_width(vocab) * itemsize))
    fewest = math.ceil(n / limit)

    def waves(pieces: int) -> int:
        blocks = math.ceil(math.ceil(n / pieces) / TILE_M)
        forward = math.ceil(blocks * math.ceil(vocab / TILE_N) / multiprocessors)
        backward = math.ceil(blocks * math.ceil(width / TILE_N) / multiprocessors)
        return pieces * (forward * width + backward * vocab)

    return min(range(fewest, 2 * fewest + 1), key=waves)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
    banned: Tensor | None,
) -> None:
    """Raise ValueError for operands that do not fit together."""
    check_gathered(weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden and weight must be float, got {hidden.dtype} and {weight.dtype}")
    check_integers("targets", targets, f"[{hidden.shape[0]}] token ids")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be [{hidden.shape[0]}] token ids, got {tuple(targets.shape)}"
        )
    if banned is not None:
        hint = "[n] token ids; of a mask over the vocabulary pass mask.nonzero().squeeze(1)"
        check_integers("banned", banned, hint)
        if banned.dim() != 1:
            raise ValueError(f"banned must be {hint}, got {tuple(banned.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")


def check_gathered(weight: Tensor) -> None:
    """Raise ValueError for a weight whose elements are on other ranks."""
    if getattr(weight, "ds_id", None) is not None and weight.numel() == 0:
        raise ValueError(
            "the head's weight is partitioned by ZeRO-3 (it has no elements on this rank): "
            "call the op inside deepspeed.zero.GatheredParameters([weight])"
        )


def check_kept(weight: Tensor, shape: torch.Size) -> None:
    """Raise ValueError for a weight that had another ``shape`` in forward."""
    if weight.shape != shape:
        raise ValueError(
            f"the head's weight was {tuple(shape)} in forward and is {tuple(weight.shape)} in backward, which "
            "needs it again: under ZeRO-3 keep GatheredParameters open until backward is done (or freeze the "
            "head, keep no logits (keep_bytes=0) and want no gradient of the entropy: then the weight may go)"
        )


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


def banned_columns(head: Head, device: torch.device) -> Tensor | None:
    """[n] columns of a tile to fill with -inf; ids of other shards become the unused column V, with no host sync."""
    banned = head.banned
    if banned is None or banned.numel() == 0:
        return None
    ids = banned.to(device=device, dtype=torch.long) - head.start
    return torch.where((ids >= 0) & (ids < head.vocab), ids, head.vocab)
