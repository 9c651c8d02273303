"""Which elements of a delta stay: the exact k-th magnitude, and random dropping that does not
depend on tiling.

Both work on row tiles of ``B @ A`` that are made, looked at and thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._lora_types import Experts, LoraFactors, MergeSpec

# Elements of all experts' tiles together.
TILE = 1 << 19
_MASK = 0xFFFFFFFF
# |x| as float32 bits is an integer below 2^31 that orders like |x|: 16 high bits, then 15 low bits.
_HIGH, _LOW = 1 << 16, 1 << 15


def row_tiles(out: int, width: int, tile: int | None) -> Iterator[slice]:
    """Row ranges of at most ``tile`` elements (default TILE), one row at least."""
    step = max(1, (TILE if tile is None else tile) // max(width, 1))
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def _histogram(
    units: Sequence[LoraFactors], spec: MergeSpec, tile: int | None, prefix: int | None
) -> Tensor:
    """Counts of the high bits of |delta|, or of the low bits of those whose high bits are
    ``prefix``."""
    bins = _HIGH if prefix is None else _LOW
    counts = torch.zeros(bins, dtype=torch.int64)
    for factors in units:
        out, width = factors.shape
        for rows in row_tiles(out, width, tile):
            delta = factors.delta(rows, spec.delta_dtype).float()
            bits = delta.abs().view(torch.int32).flatten()
            high = bits >> 15
            key = high if prefix is None else (bits & (_LOW - 1))[high == prefix]
            counts += torch.bincount(key, minlength=bins).cpu()
    return counts


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its place within the bin (from 1)."""
    above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(above, k))
    place = k - (int(above[at - 1]) if at else 0)
    return len(counts) - 1 - at, place


def kth_magnitude(
    units: Sequence[LoraFactors], k: int, spec: MergeSpec, tile: int | None
) -> tuple[float, int]:
    """The k-th largest |delta| over all the units' elements, and how many elements equal it beyond
    the k-th.

    Exact: two passes of counting over bit patterns. k = 0 gives infinity.
    """
    if k == 0:
        return torch.inf, 0
    high, place = _bin_of(_histogram(units, spec, tile, None), k)
    counts = _histogram(units, spec, tile, high)
    low, place = _bin_of(counts, place)
    bits = torch.tensor((high << 15) | low, dtype=torch.int32)
    value = float(bits.view(torch.float32))
    # every zero "equals" a zero threshold, but keeping it changes nothing
    return value, int(counts[low]) - place if value > 0 else 0


def tensor_thresholds(
    experts: Experts, spec: MergeSpec, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """([E] f64 threshold, [E] f64 tied) of one linear; threshold NaN where nothing is trimmed."""
    threshold = torch.full((len(experts),), torch.nan, dtype=torch.float64)
    tied = torch.zeros_like(threshold)
    if spec.trims:
        for e, factors in enumerate(experts):
            if factors is not None:
                out, width = factors.shape
                k = int(spec.density * (out * width))
                threshold[e], tied[e] = kth_magnitude([factors], k, spec, tile)
    return threshold, tied


def global_thresholds(
    linears: Sequence[Experts], spec: MergeSpec, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same with one threshold per expert over all of its linears."""
    experts = len(linears[0]) if linears else 0
    threshold = torch.full((experts,), torch.nan, dtype=torch.float64)
    tied = torch.zeros_like(threshold)
    if spec.trims:
        for e in range(experts):
            units = [unit for linear in linears if (unit := linear[e]) is not None]
            if units:
                size = sum(f.shape[0] * f.shape[1] for f in units)
                k = int(spec.density * size)
                threshold[e], tied[e] = kth_magnitude(units, k, spec, tile)
    return threshold, tied


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two rounds of xor-shift and multiply) on int64 tensors that hold 32-bit
    values."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_keep(
    rows: slice,
    width: int,
    density: float,
    seed: int,
    layer: str,
    expert: int,
    device: torch.device,
) -> Tensor:
    """[n, width] bool, True with probability ``density``: a function of seed, layer, expert and
    element only."""
    digest = hashlib.blake2b(f"{seed}\0{layer}\0{expert}".encode(), digest_size=8).digest()
    key, offset = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)
    index = row[:, None] * width + torch.arange(width, device=device, dtype=torch.int64)
    draw = _mix((index & _MASK) ^ key)
    draw = _mix((draw + offset + (index >> 32) * 0x9E3779B9) & _MASK)
    return draw < int(density * (1 << 32))


def trimmed_tile(
    experts: Experts, rows: slice, width: int, spec: MergeSpec, threshold: Tensor, layer: str
) -> tuple[Tensor, Tensor]:
    """[E, n, in] f32 deltas of the rows after trimming or dropping, and [E] f64 energies before;
    zeros for None."""
    device = next(f.A.device for f in experts if f is not None)
    stack = torch.zeros((len(experts), rows.stop - rows.start, width), device=device)
    energy = torch.zeros(len(experts), dtype=torch.float64)
    for e, factors in enumerate(experts):
        if factors is None:
            continue
        delta = factors.delta(rows, spec.delta_dtype).float()
        energy[e] = delta.double().square().sum().cpu()
        if spec.trims:
            delta = delta * (delta.abs() >= float(threshold[e]))
        elif spec.method.startswith("dare") and spec.density < 1:
            keep = random_keep(rows, width, spec.density, spec.seed, layer, e, device)
            delta = delta * keep / spec.density
        stack[e] = delta
    return stack, energy
