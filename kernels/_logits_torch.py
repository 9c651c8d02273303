"""Row statistics and gradients of a tile of logits in plain torch, for every device and float dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import register_torch
from ._logits import CPU_TILE, FLOOR, MOMENT, OTHERS, OWNED, TARGET, TOP, Head, Tiles

# Columns of a product that is summed at once.
SLAB = 1 << 13


@dataclass
class Tile:
    """One tile of the plain torch ops; ``z`` is relative to the row maximum.

    The target's own exp is left out of the sum: if the target is the maximum, ``others`` is (1 - p)
    / p with all its digits, which a sum that starts from 1 has lost.
    """

    z: Tensor  # [n, V]
    e: Tensor  # [n, V] exp(z), 0 at an owned target
    top: Tensor  # [n] what z is relative to


@register_torch("linear_logprob")
@register_torch("linear_policy_loss")
class TorchTiles(Tiles):
    """Statistics and gradients of tiles in plain torch, for every device and float dtype."""

    def __init__(
        self, hidden: Tensor, head: Head, targets: Tensor, chunk: int | None, **kw
    ) -> None:
        super().__init__(hidden, head, targets, chunk, **kw)
        local = targets - head.start
        inside = (local >= 0) & (local < head.vocab)
        self._inside = inside
        self._column = torch.where(inside, local, 0)
        self._resident: tuple[slice, Tile] | None = None
        self._exp: Tensor | None = None

    def stats(self, rows: slice, stats: Tensor, moment: bool) -> None:
        """Fill these columns of ``stats`` [5, N]; row MOMENT only if asked for."""
        z = self._final(rows)
        e = self._exp_buffer(z)
        out = stats[:, rows]
        for part in _blocks(z):
            self._block_stats(z[part], e[part], rows.start + part.start, out[:, part], moment)
        top = out[TOP].clone()
        self._resident = (rows, Tile(z, e, top))

    def _block_stats(self, z: Tensor, e: Tensor, first: int, stats: Tensor, moment: bool) -> None:
        """Statistics [5, n] of the rows from ``first`` on; makes ``z`` relative and fills ``e``."""
        rows = slice(first, first + len(z))
        top = z.amax(1).clamp_(min=FLOOR)  # of a shard without a possible id -inf: NaN, subtracted
        z.sub_(top[:, None])
        at, inside = self._column[rows][:, None], self._inside[rows]
        target = torch.where(inside, z.gather(1, at).squeeze(1), torch.nan)
        torch.exp(z.clamp_(min=FLOOR), out=e)
        stats[TOP], stats[TARGET], stats[OWNED] = top, target, inside.to(z.dtype)
        if moment:
            stats[MOMENT] = _row_dots(e, z)
        self._drop_target(e, rows)
        stats[OTHERS] = e.sum(1)

    def dlogits(
        self,
        rows: slice,
        stats: Tensor,  # [5, N] of the whole vocabulary
        d_logprob: Tensor,  # [N]
        d_entropy: Tensor | None,  # [N]
    ) -> Tensor:
        """[n, V] gradient of the raw logits in the weight's dtype; overwrites the tile.

        d logprob / d z_j = [j = y] - p_j;  d entropy / d z_j = -p_j (z_j - E z).
        A row without upstream gradient gets zeros, whatever it holds.
        """
        tile = self._tile(rows, stats[TOP, rows])
        others, target = stats[OTHERS, rows], stats[TARGET, rows]
        g = d_logprob[rows] / self.head.temperature
        dead = g == 0
        cap = self._cap_slope(tile)
        total = others + target.exp()
        # 1 - p is others / total with all its digits, also as p nears 1
        at_target = torch.where(target == -torch.inf, 0.0, g * (others / total))
        if d_entropy is None:
            grad = tile.e.mul_((-g / total)[:, None])
        else:
            ge = d_entropy[rows] / self.head.temperature
            dead &= ge == 0
            mean = stats[MOMENT, rows] / total
            slope = tile.z.sub_(mean[:, None]).mul_(ge[:, None]).add_(g[:, None])
            grad = tile.e.mul_(slope).div_(-total[:, None])
            p = target.exp() / total
            at_target = at_target - ge * p * (target.clamp(min=FLOOR) - mean)
        at, inside = self._column[rows][:, None], self._inside[rows]
        grad.scatter_(1, at, torch.where(inside, at_target, grad.gather(1, at).squeeze(1))[:, None])
        if cap is not None:
            grad.mul_(cap)
        if dead.is_cuda:
            grad.masked_fill_(dead[:, None], 0.0)
        else:  # the fewer rows the better, and nothing waits for this device
            grad.index_fill_(0, dead.nonzero().squeeze(1), 0.0)
        return grad.to(self.head.weight.dtype)

    def _final(self, rows: slice) -> Tensor:
        """[n, V] logits as the distribution sees them."""
        head, z = self.head, self.raw(rows)
        if self.kept is None:
            self._loaded = None  # what follows overwrites it
        else:
            z = z.clone()
        z = z if head.bias is None else z.add_(head.bias.detach())
        z = z.to(head.acc)
        if head.softcap is not None:
            some = self._banned is not None or head.bias is not None
            impossible = z == -torch.inf if some else None
            z.div_(head.softcap).tanh_().mul_(head.softcap)
            z = z if impossible is None else z.masked_fill_(impossible, -torch.inf)
        if head.temperature != 1.0:
            z.div_(head.temperature)
        return z

    def _tile(self, rows: slice, top: Tensor) -> Tile:
        """The tile relative to ``top``: the one that :meth:`stats` left, or made again."""
        resident, self._resident = self._resident, None
        if resident is not None and resident[0] == rows:
            tile = resident[1]
            if self.head.sharded:
                shift = (tile.top - top).clamp(min=FLOOR)[:, None]
                tile.z.add_(shift).clamp_(min=FLOOR)
                tile.e.mul_(shift.exp())
                tile.top = top
            return tile
        z = self._final(rows).sub_(top[:, None]).clamp_(min=FLOOR)
        e = torch.exp(z, out=self._exp_buffer(z))
        self._drop_target(e, rows)
        return Tile(z, e, top)

    def _exp_buffer(self, z: Tensor) -> Tensor:
        if self._exp is None or len(self._exp) < len(z):
            self._exp = torch.empty_like(z)
        return self._exp[: len(z)]

    def _drop_target(self, e: Tensor, rows: slice) -> None:
        at = self._column[rows][:, None]
        e.scatter_(1, at, torch.where(self._inside[rows][:, None], 0.0, e.gather(1, at)))

    def _cap_slope(self, tile: Tile) -> Tensor | None:
        """d tanh = 1 - tanh^2, and tanh is the capped logit over the cap."""
        if self.head.softcap is None:
            return None
        cap = (tile.z + tile.top[:, None]).mul_(self.head.temperature / self.head.softcap)
        return cap.clamp_(-1, 1).square_().neg_().add_(1)


def _blocks(z: Tensor) -> list[slice]:
    """The rows of a tile, on a CPU so few at a time that they stay in its cache from one op to the next."""
    n, vocab = z.shape
    step = n if z.is_cuda else max(1, CPU_TILE // max(vocab, 1))
    return [slice(at, min(n, at + step)) for at in range(0, n, max(step, 1))]


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """[n] sums of a * b [n, V] by slabs: no product as large as the tile, and the digits of a pairwise sum."""
    total = a.new_zeros(len(a))
    for left, right in zip(a.split(SLAB, 1), b.split(SLAB, 1), strict=True):
        total += (left * right).sum(1)
    return total
