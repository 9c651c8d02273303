"""The exact k-th largest magnitude by counting: an interval of bit patterns that shrinks until one is left.

The bits of |x| as float32, read as an integer below 2^31, order like |x|. A pass over the elements counts
those above an interval of patterns and bins those inside it; the counts say which bin holds the k-th
largest, and that bin is the next interval. A sample of the elements places the first interval, so that
two passes do; a sample that misses costs passes, never exactness.

Everything is integers on the tensors' device without a host sync. T targets are searched at once, one
threshold each.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 1 << 31
_INFINITY = 0x7F800000
# Half-width of the sampled interval in standard deviations of the sample's quantile, of which there are
# as many independent draws as 1 / _CLUSTER of the sample: it is taken in small blocks that share factors.
_SIGMAS, _CLUSTER = 5.0, 4


class Search:
    """The ranks-th largest magnitudes of T targets, found by calls of :meth:`narrow`.

    A pass must count, per target, the patterns in bins ``(pattern - low) >> shift`` below ``bins``, and
    those at or above ``low + (bins << shift)``. Rank 0 has infinity as its threshold, found at once.
    """

    def __init__(
        self,
        ranks: Tensor,  # [T] i64, from 1
        bins: int,  # a power of two
        dtype: torch.dtype = torch.int64,  # of the counts
    ) -> None:
        self.ranks, self.bins, self.dtype = ranks, bins, dtype
        self.low = torch.zeros_like(ranks)
        self.shift = torch.full_like(ranks, (TOP // bins).bit_length() - 1)
        self.found = ranks == 0
        self.pattern = torch.where(self.found, _INFINITY, 0)
        self.tied = torch.zeros_like(ranks)

    @property
    def threshold(self) -> Tensor:
        """[T] f64, the magnitudes found."""
        return self.pattern.to(torch.int32).view(torch.float32).double()

    def empty_counts(self) -> tuple[Tensor, Tensor]:
        """Zeros for a pass to add to."""
        counts = torch.zeros(
            (len(self.ranks), self.bins), dtype=self.dtype, device=self.ranks.device
        )
        return counts, torch.zeros_like(self.ranks)

    def aim(self, counts: Tensor, above: Tensor, sampled: Tensor | int, elements: Tensor) -> None:
        """Narrow to where a sample ([T, bins] and [T] counts of ``sampled`` of the target's ``elements``
        [T]) puts the ranks-th largest, five standard deviations to either side."""
        share = self.ranks.double() / elements.clamp(min=1)
        spread = _SIGMAS * (_CLUSTER * sampled * share * (1 - share)).sqrt() + _CLUSTER
        first = (share * sampled - spread).floor().long()[:, None]
        last = (share * sampled + spread).ceil().long()[:, None]
        tail = _at_or_above(counts, above)[:, :-1]
        lower, upper = (tail >= last).sum(1) - 1, (tail >= first).sum(1)
        bottom = torch.where(lower < 0, 0, self.low + (lower.clamp(min=0) << self.shift))
        top = torch.where(above >= first[:, 0], TOP, self.low + (upper << self.shift))
        self._cover(bottom, top)

    def narrow(self, counts: Tensor, above: Tensor) -> None:
        """Take the counts of a pass over all elements: [T, bins] and [T] integers."""
        tail = _at_or_above(counts, above)
        over = above >= self.ranks  # the target lies above the interval
        at = (tail[:, :-1] >= self.ranks[:, None]).sum(1) - 1  # its bin; -1 below the interval
        inside = ~over & (at >= 0)
        bin_ = at.clamp(min=0)
        bottom, top = self.low + (bin_ << self.shift), self.low + (self.bins << self.shift)
        hit = inside & (self.shift == 0) & ~self.found
        rows = torch.arange(len(bin_), device=bin_.device)
        # every zero "equals" a zero threshold, but keeping it changes nothing
        tied = torch.where(bottom > 0, tail[rows, bin_] - self.ranks, 0)
        self.pattern = torch.where(hit, bottom, self.pattern)
        self.tied = torch.where(hit, tied, self.tied)
        self.found = self.found | hit
        self._cover(
            torch.where(inside, bottom, torch.where(over, top, 0)),
            torch.where(inside, bottom + (1 << self.shift), torch.where(over, TOP, self.low)),
        )

    def _cover(self, bottom: Tensor, top: Tensor) -> None:
        """The finest bins that span [bottom, top); found targets stay where they are."""
        scales = torch.arange((TOP // self.bins).bit_length() - 1, device=top.device)
        spans = self.bins << scales
        shift = (spans < (top - bottom)[:, None]).sum(1)
        self.low = torch.where(self.found, self.low, bottom)
        self.shift = torch.where(self.found, self.shift, shift)


def _at_or_above(counts: Tensor, above: Tensor) -> Tensor:
    """[T, bins + 1] elements in this bin or higher; the last column is ``above``."""
    tail = counts.flip(1).cumsum(1).flip(1).add_(above[:, None])
    return torch.cat([tail, above[:, None]], 1)
