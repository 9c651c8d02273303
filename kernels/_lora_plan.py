"""What the grouped Triton merge reads: tables of pointers, shapes and work for all linears of a model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._lora_trim import stream_key
from ._lora_types import Linear, LoraFactors, MergeSpec

MAX_EXPERTS = 16  # two bits each in a 32-bit word
# Pieces of work of about equal size, each a run of tiles of one linear: enough to fill any chip several
# times over, and the same on every chip, so that the order of sums is.
_JOBS = 2048
_FACTOR_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """Tables on the device for linears of one base dtype and one factor dtype; L linears, E experts."""

    linears: list[Linear]
    shapes: Tensor  # [L, 5] i64: out, in, base's address (0: none), its two strides
    factors: Tensor  # [L, E, 5] i64: A's address and row stride, B's, rank (0: no expert)
    scales: Tensor  # [L, E] f32
    keys: Tensor  # [L, E + 1, 3] i64: two keys and the bound of every expert's draws; of the rounding's
    weights: Tensor  # [E] f32
    jobs: Tensor  # [J, 3] i64: linear, first tile, last + 1
    job_linear: list[int]
    rank: int  # all ranks padded: 16 or more, a power of two
    factor_dtype: torch.dtype
    base_dtype: torch.dtype | None
    aligned: bool  # addresses and strides of 16 bytes, unit inner strides, ranks and widths of 8
    kept: list[Tensor]  # owners of the addresses

    @property
    def experts(self) -> int:
        return self.factors.shape[1]

    def jobs_of(self, first: int, last: int) -> Tensor:
        """The jobs of the linears first..last - 1."""
        at = bisect_left(self.job_linear, first), bisect_left(self.job_linear, last)
        return self.jobs[at[0] : at[1]]


def make_plans(linears: Sequence[Linear], spec: MergeSpec, tile: tuple[int, int]) -> list[Plan]:
    """One plan per combination of dtypes, the linears in their order. All must have an expert."""
    groups: dict[tuple[torch.dtype | None, torch.dtype], list[Linear]] = {}
    for linear in linears:
        base = None if linear.base is None else linear.base.dtype
        groups.setdefault((base, _factor_dtype(linear)), []).append(linear)
    return [_plan(group, dtypes[0], dtypes[1], spec, tile) for dtypes, group in groups.items()]


def _factor_dtype(linear: Linear) -> torch.dtype:
    """The factors' dtype where all have one of 16 bits, else float32."""
    dtypes = {x.dtype for f in linear.experts if f is not None for x in (f.A, f.B)}
    only = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return only if only in _FACTOR_DTYPES else torch.float32


def _plan(
    linears: list[Linear],
    base_dtype: torch.dtype | None,
    factor_dtype: torch.dtype,
    spec: MergeSpec,
    tile: tuple[int, int],
) -> Plan:
    experts = len(linears[0].experts)
    kept: list[Tensor] = []
    shapes = [_shape_row(linear) for linear in linears]
    factors = [[_factor_row(f, factor_dtype, kept) for f in x.experts] for x in linears]
    jobs = _jobs(linears, tile)
    device = next(f.A.device for f in linears[0].experts if f is not None)
    flat = [row for linear in factors for row in linear]
    return Plan(
        linears=linears,
        shapes=torch.tensor(shapes, device=device),
        factors=torch.tensor(factors, device=device),
        scales=torch.tensor(
            [[0.0 if f is None else f.scale for f in x.experts] for x in linears],
            dtype=torch.float32,
            device=device,
        ),
        keys=torch.tensor([_keys(linear, spec) for linear in linears], device=device),
        weights=torch.tensor(spec.expert_weights(experts), dtype=torch.float32, device=device),
        jobs=torch.tensor(jobs, device=device),
        job_linear=[job[0] for job in jobs],
        rank=max(16, 1 << (max(row[4] for row in flat) - 1).bit_length()),
        factor_dtype=factor_dtype,
        base_dtype=base_dtype,
        aligned=_aligned(shapes, flat, base_dtype, factor_dtype),
        kept=kept,
    )


def _shape_row(linear: Linear) -> list[int]:
    base = linear.base
    where = [0, 0, 1] if base is None else [base.data_ptr(), base.stride(0), base.stride(1)]
    return [*linear.shape, *where]


def _factor_row(f: LoraFactors | None, dtype: torch.dtype, kept: list[Tensor]) -> list[int]:
    if f is None:
        return [0, 0, 0, 0, 0]
    row = []
    for x in (f.A.detach(), f.B.detach()):
        x = x.to(dtype)
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        kept.append(x)
        row += [x.data_ptr(), x.stride(0)]
    return [*row, f.rank]


def _keys(linear: Linear, spec: MergeSpec) -> list[list[int]]:
    bound = int(spec.density * (1 << 32))
    streams: list[int | str] = [*range(len(linear.experts)), "rounding"]
    return [[*stream_key(spec.seed, linear.name, stream), bound] for stream in streams]


def _jobs(linears: Sequence[Linear], tile: tuple[int, int]) -> list[list[int]]:
    """Runs of tiles, counted down the columns strip by strip, so that a run's A stays in the cache."""
    tiles = [-(-x.shape[0] // tile[0]) * -(-x.shape[1] // tile[1]) for x in linears]
    run = -(-sum(tiles) // _JOBS)
    return [
        [i, start, min(start + run, count)]
        for i, count in enumerate(tiles)
        for start in range(0, count, run)
    ]


def _aligned(
    shapes: Sequence[Sequence[int]],
    factors: Sequence[Sequence[int]],
    base_dtype: torch.dtype | None,
    factor_dtype: torch.dtype,
) -> bool:
    size = factor_dtype.itemsize
    bytes_ = [x for a, da, b, db, _ in factors for x in (a, da * size, b, db * size)]
    if base_dtype is not None:
        bytes_ += [x for _, _, at, stride, _ in shapes for x in (at, stride * base_dtype.itemsize)]
    eights = [row[4] for row in factors] + [row[1] for row in shapes]
    unit = all(row[4] == 1 for row in shapes)
    return unit and all(x % 16 == 0 for x in bytes_) and all(x % 8 == 0 for x in eights)
