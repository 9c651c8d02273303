"""Which elements of a delta stay, in plain torch: the exact k-th magnitude, and random dropping that does
not depend on tiling.

Both work on blocks of ``B @ A`` that are made, looked at and thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._lora_search import Search
from ._lora_types import Experts, LoraFactors, MergeSpec

_MASK = 0xFFFFFFFF
COLUMNS = 256
BINS = 1 << 12
# The sample that places a search's first interval: blocks of SIDE x SIDE elements at random rows and
# columns. Smaller deltas are searched without one.
SAMPLE, SIDE, SAMPLED_FROM = 1 << 16, 16, 1 << 20


def default_tile(elements: int, experts: int) -> int:
    """Elements of a block, so that a merge's workspace stays within 5 % of the bytes of a 16-bit matrix of
    ``elements`` (from some ten million on; below that a block has the least size that is not slow)."""
    workspace = elements // 12  # bytes; 5 % would be elements / 10
    return min(max(workspace // (14 * experts + 32), 1 << 13), 1 << 17)


def blocks(
    experts: Experts, tile: int | None
) -> Iterator[tuple[slice, slice, list[Tensor | None]]]:
    """Rows, columns, and the experts' A of these columns in f64, for blocks of ``tile`` elements (one row
    of COLUMNS at least). The blocks of a linear depend on ``tile`` and its shape only."""
    out, width = next(f.shape for f in experts if f is not None)
    columns = min(width, COLUMNS)
    if tile is None:
        tile = default_tile(out * width, len(experts))
    height = max(1, tile // columns)
    for left in range(0, width, columns):
        of = slice(left, min(left + columns, width))
        right = [None if f is None else f.A.detach()[:, of].double() for f in experts]
        for top in range(0, out, height):
            yield slice(top, min(top + height, out)), of, right


def delta_block(factors: LoraFactors, rows: slice, right: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, m] f32: ``LoraFactors.delta`` of the rows and of ``right``'s columns."""
    product = factors.B.detach()[rows].double() @ right
    return product.mul_(factors.scale).to(dtype).float()


def _sample(units: Sequence[LoraFactors], spec: MergeSpec) -> Tensor:
    """Magnitudes at random places of the units' deltas, in proportion to their sizes."""
    sizes = torch.tensor([f.shape[0] * f.shape[1] for f in units])
    # rounded sums, not sums of rounded shares: the sample stays in proportion to the sizes
    upto = (sizes.cumsum(0) * (SAMPLE // SIDE**2) / sizes.sum()).round().long()
    found = []
    for factors, left in zip(units, upto.diff(prepend=upto[:1] * 0).tolist(), strict=True):
        out, width = factors.shape
        draw = torch.Generator().manual_seed(out * width + left)
        while left > 0:
            n = min(left, 32)
            rows = torch.randint(out, (n, SIDE), generator=draw).to(factors.B.device)
            columns = torch.randint(width, (n, SIDE), generator=draw).to(factors.A.device)
            b = factors.B.detach()[rows].double()
            a = factors.A.detach().t()[columns].double()
            delta = torch.bmm(b, a.transpose(1, 2)).mul_(factors.scale)
            found.append(delta.to(spec.delta_dtype).float().abs_().flatten())
            left -= n
    return torch.cat(found)


def _count(magnitudes: Tensor, low: int, shift: int) -> Tensor:
    """[BINS + 2] elements below the interval, in its bins, above it. Overwrites ``magnitudes``."""
    key = magnitudes.view(torch.int32).sub_(low)
    key.bitwise_right_shift_(shift).clamp_(-1, BINS).add_(1)
    return torch.bincount(key.flatten(), minlength=BINS + 2)


def kth_magnitude(
    units: Sequence[LoraFactors], k: int, spec: MergeSpec, tile: int | None
) -> tuple[float, int]:
    """The k-th largest |delta| over all the units' elements, and how many elements equal it beyond the
    k-th. Exact (see ``_lora_search``). k = 0 gives infinity."""
    search = Search(torch.tensor([k]), BINS)
    elements = sum(f.shape[0] * f.shape[1] for f in units)
    if elements >= SAMPLED_FROM and not search.found.all():
        sample = _sample(units, spec)
        for _ in range(2):
            seen = _count(sample.clone(), int(search.low), int(search.shift)).cpu()
            search.aim(seen[None, 1:-1], seen[-1:], len(sample), torch.tensor([elements]))
        del sample
    while not search.found.all():
        low, shift = int(search.low), int(search.shift)
        counts = torch.zeros(BINS + 2, dtype=torch.int64)
        for factors in units:
            for rows, _, (right,) in blocks([factors], tile):
                assert right is not None
                delta = delta_block(factors, rows, right, spec.delta_dtype)
                counts += _count(delta.abs_(), low, shift).cpu()
        search.narrow(counts[None, 1:-1], counts[-1:])
    return float(search.threshold), int(search.tied)


def thresholds(
    linears: Sequence[Experts], spec: MergeSpec, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """([E] f64 threshold, [E] f64 tied), one per expert over all of its linears; threshold NaN where
    nothing is trimmed."""
    experts = len(linears[0]) if linears else 0
    threshold = torch.full((experts,), torch.nan, dtype=torch.float64)
    tied = torch.zeros_like(threshold)
    for e in range(experts if spec.trims else 0):
        units = [unit for linear in linears if (unit := linear[e]) is not None]
        if units:
            k = int(spec.density * sum(f.shape[0] * f.shape[1] for f in units))
            threshold[e], tied[e] = kth_magnitude(units, k, spec, tile)
    return threshold, tied


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two rounds of xor-shift and multiply), in place on int64 that holds 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x *= factor
        x &= _MASK
    x ^= x >> 16
    return x


def stream_key(seed: int, layer: str, stream: int | str) -> tuple[int, int]:
    """Two 32-bit keys of a linear's random stream: an expert's number, or the name of another use."""
    digest = hashlib.blake2b(f"{seed}\0{layer}\0{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_bits(
    rows: slice, columns: slice, width: int, keys: tuple[int, int], device: torch.device
) -> Tensor:
    """[n, m] int64 draws of 32 bits: a function of the keys and the element's place in its matrix."""
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)
    index = row[:, None] * width + torch.arange(columns.start, columns.stop, device=device)
    high = index >> 32
    draw = index.bitwise_and_(_MASK).bitwise_xor_(keys[0])
    draw = _mix(draw).add_(high.mul_(0x9E3779B9).add_(keys[1])).bitwise_and_(_MASK)
    return _mix(draw)


def random_keep(
    rows: slice,
    width: int,
    density: float,
    seed: int,
    layer: str,
    expert: int,
    device: torch.device,
    columns: slice | None = None,
) -> Tensor:
    """[n, m] bool, True with probability ``density``: a function of seed, layer, expert and element
    only."""
    columns = slice(0, width) if columns is None else columns
    keys = stream_key(seed, layer, expert)
    return random_bits(rows, columns, width, keys, device) < int(density * (1 << 32))


def round_stochastic(x: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """x (f32) to one of its two neighbours in a 16-bit dtype, each with the probability that makes the
    mean x; ``draw`` are 32 random bits per element."""
    near = x.to(dtype)
    error = x - near.float()
    step = torch.where((error > 0) == (x > 0), 1, -1).to(torch.int16)
    other = (near.view(torch.int16) + step).view(dtype)
    gap = (other.float() - near.float()).abs_()
    chance = (draw >> 8).float().mul_(2.0**-24)
    return torch.where(chance.mul_(gap) < error.abs_(), other, near)
