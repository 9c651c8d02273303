"""Triton row kernels over a tile of raw logits (hidden @ W^T, written by a GEMM).

One program owns one row, whatever the vocabulary. ``row_stats`` reads a row once; ``row_dlogits`` turns
it into the gradient of the logits, in place where the caller wants that.

In place, row r's 16-bit gradient takes the first half of row r's own float32 bytes: block b writes
bytes that block b or an earlier one has read, so a barrier between a block's loads and its stores is all
that is needed, and no second buffer exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._logits import FLOOR, Head, Tiles, raw_width
from ._triton import INTERPRETING, CompileCase, launch_options

# Logits a program holds at once; fewer where tanh needs registers (4096 spill on sm_80).
BLOCK, BLOCK_CAPPED = 4096, 2048
WARPS = 8
LOWEST = tl.constexpr(FLOOR)
EMULATE = tl.constexpr(INTERPRETING)


@triton.jit
def _tanh(x):
    """The series where 1 - 2 / (exp(2x) + 1) has lost the digits of a small x."""
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0; near 0 as 2 atanh(x / (2 + x)), where log(1 + x) has lost x's digits."""
    s = x / (2 + x)
    q = s * s
    near = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(x < 0.25, near, tl.log(1 + x))


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even: the interpreter's own cast to bf16 cuts digits off."""
    if EMULATE and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _final(raw, bias, cols, mask, scale, softcap, impossible):
    """What the softmax sees of raw logits; ``impossible`` for -inf, capped or not. NaN stays NaN."""
    x = raw.to(tl.float32)
    if bias is not None:
        x += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
        x = _narrow(x, raw.dtype).to(tl.float32)
    y = x
    if softcap is not None:
        y = softcap * _tanh(x / softcap)
    return tl.where(x < LOWEST, impossible, y * scale)


@triton.jit
def _load_logits(z, bias, cols, mask, scale, softcap):
    """A block of logits, with FLOOR for -inf and off the mask."""
    raw = tl.load(z + cols, mask=mask, other=float("-inf"))
    return _final(raw, bias, cols, mask, scale, softcap, LOWEST)


@triton.jit
def _row_stats(
    z, bias, column, owned, vocab, scale, softcap,
    MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(top, others, target, moment) of one row, as ``_logits.Tile`` defines them.

    Each lane keeps its own running maximum and sums, so that the loop has no exchange between warps.
    The target stays out of the lanes: it joins at the end.
    """
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + lanes
        x = _load_logits(z, bias, cols, cols < vocab, scale, softcap)
        x = tl.where(owned & (cols == column), LOWEST, x)
        rise = x - top
        # of exp(top - new top) and exp(x - new top), one is 1 and the other this
        e = tl.exp(-tl.abs(rise))
        if MOMENT:
            moment = tl.where(rise > 0, (moment - rise * total) * e, moment + rise * e)
        total = tl.where(rise > 0, total * e + 1, total + e)
        top = tl.maximum(top, x)
    at = tl.where(owned, column, 0)
    target = _final(tl.load(z + at), bias, at, owned, scale, softcap, float("-inf"))
    highest = tl.max(top, 0)
    highest = tl.where(owned, tl.maximum(highest, target), highest)
    target = tl.where(owned, target - highest, float("nan"))
    shift = top - highest
    weight = tl.exp(shift)
    others = tl.sum(total * weight, 0)
    others = tl.where(
        highest <= LOWEST, 0.0, others
    )  # nothing is possible: no exp(0) for each FLOOR
    if MOMENT:
        first = tl.sum((moment + shift * total) * weight, 0)
        own = tl.exp(target) * tl.where(target < LOWEST, LOWEST, target)
        first += tl.where(owned, own, 0.0)
    else:
        first = others
    return highest, others, target, first


@triton.jit
def _row_gradient(
    z, out, bias, column, owned, vocab, scale, softcap,
    top, others, target, moment, g, ge,
    BARRIER: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one row of dlogits: g ([j = y] - p_j) - ge p_j (z_j - E z), in float32 until the one rounding.

    At the target 1 - p is others / total: all its digits, however near p is to 1.
    """
    at = tl.exp(target)
    total = others + at
    inverse = tl.where(total > 0, 1 / total, float("nan"))  # 0: nothing is possible
    mean = moment * inverse
    at_target = tl.where(target == float("-inf"), 0.0, g * others * inverse)
    if ENTROPY:
        at_target -= ge * at * inverse * (tl.where(target < LOWEST, LOWEST, target) - mean)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        cols = start + lanes
        mask = cols < vocab
        x = _load_logits(z, bias, cols, mask, scale, softcap)
        slope = g
        if ENTROPY:
            slope = g + ge * (tl.where(x > LOWEST, x - top, LOWEST) - mean)
        d = -tl.exp(x - top) * inverse * slope
        d = tl.where(owned & (cols == column), at_target, d)
        if softcap is not None:
            cap = x / (scale * softcap)
            d *= 1 - tl.minimum(cap * cap, 1.0)
        if BARRIER:
            tl.debug_barrier()
        tl.store(out + cols, _narrow(d, out.dtype.element_ty), mask=mask)


@triton.jit
def _fill_zero(out, vocab, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        cols = start + lanes
        tl.store(out + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < vocab)


@triton.jit(do_not_specialize=["first", "rows", "begin"])
def _row_stats_kernel(
    z, z_stride, targets, stats, bias, first, rows, begin, vocab, scale, softcap,
    MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """stats [5, rows]: top, others, moment, target, owned. Row ``first + i`` is row i of the tile."""
    i = tl.program_id(0).to(tl.int64)
    row = first + i
    column = tl.load(targets + row) - begin
    owned = (column >= 0) & (column < vocab)
    top, others, target, moment = _row_stats(
        z + i * z_stride, bias, column, owned, vocab, scale, softcap, MOMENT, BLOCK
    )
    stats += row
    wide = tl.cast(rows, tl.int64)
    tl.store(stats, top)
    tl.store(stats + wide, others)
    if MOMENT:
        tl.store(stats + 2 * wide, moment)
    tl.store(stats + 3 * wide, target)
    tl.store(stats + 4 * wide, owned.to(tl.float32))


@triton.jit(do_not_specialize=["first", "rows", "begin"])
def _row_dlogits_kernel(
    z, z_stride, out, out_stride, targets, stats, d_logprob, d_entropy, bias,
    first, rows, begin, vocab, scale, softcap,
    BARRIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits of row ``first + i`` from row i of the tile. A row without upstream gradient gets zeros."""
    i = tl.program_id(0).to(tl.int64)
    row = first + i
    z += i * z_stride
    out += i * out_stride
    g = tl.load(d_logprob + row) * scale
    ge = 0.0
    if d_entropy is not None:
        ge = tl.load(d_entropy + row) * scale
    if (g == 0) & (ge == 0):
        _fill_zero(out, vocab, BLOCK)
    else:
        column = tl.load(targets + row) - begin
        owned = (column >= 0) & (column < vocab)
        stats += row
        wide = tl.cast(rows, tl.int64)
        top = tl.load(stats)
        others = tl.load(stats + wide)
        moment = tl.load(stats + 2 * wide)
        target = tl.load(stats + 3 * wide)
        _row_gradient(
            z, out, bias, column, owned, vocab, scale, softcap,
            top, others, target, moment, g, ge, BARRIER, d_entropy is not None, BLOCK,
        )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What the row kernels need to know of a head, made once per call."""

    vocab: int
    begin: int  # global id of column 0
    bias: Tensor | None  # [V]
    scale: float  # 1 / temperature
    softcap: float | None

    @property
    def block(self) -> int:
        return BLOCK if self.softcap is None else BLOCK_CAPPED

    @classmethod
    def of(cls, head: Head) -> Rows:
        vocab = head.weight.shape[0]
        bias = None if head.bias is None else head.bias.detach().contiguous()
        return cls(vocab, head.start, bias, 1 / head.temperature, head.softcap)


def row_stats(
    rows: Rows, z: Tensor, targets: Tensor, stats: Tensor, first: int, moment: bool
) -> None:
    """Fill columns first..first+n of ``stats`` [5, N] float32 from the raw logits ``z`` [n, V].

    ``targets`` [N] int64 are global ids. Rows of stats: maximum, sum of exp without the target, sum of
    exp(z) z (if ``moment``), target, 1 where the target is one of these columns; all but the first relative
    to the maximum. A target outside has a NaN there.
    """
    _row_stats_kernel[(len(z),)](
        z, z.stride(0), targets, stats, rows.bias, first, stats.shape[1], rows.begin,
        rows.vocab, rows.scale, rows.softcap, MOMENT=moment, BLOCK=rows.block, **launch_options(WARPS, 1),
    )  # fmt: skip


def row_dlogits(
    rows: Rows,
    z: Tensor,  # [n, V]
    out: Tensor,  # [n, V]
    targets: Tensor,  # [N]
    stats: Tensor,  # [5, N]
    d_logprob: Tensor,  # [N]
    d_entropy: Tensor | None,  # [N]
    first: int,
) -> None:
    """Gradient of the raw logits into ``out``, which may be :func:`in_place` of ``z``.

    ``stats`` are those of the whole vocabulary, the moment among them if there is a ``d_entropy``.
    """
    _row_dlogits_kernel[(len(z),)](
        z, z.stride(0), out, out.stride(0), targets, stats, d_logprob, d_entropy, rows.bias,
        first, stats.shape[1], rows.begin, rows.vocab, rows.scale, rows.softcap,
        BARRIER=shares_bytes(z, out), BLOCK=rows.block, **launch_options(WARPS, 1),
    )  # fmt: skip


def in_place(z: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] view of ``dtype`` (no wider than ``z``) in which row r begins where row r of z does."""
    if z.dtype == dtype:
        return z
    whole = z.as_strided((len(z), z.stride(0)), z.stride())
    return whole.view(dtype)[:, : z.shape[1]]


def shares_bytes(z: Tensor, out: Tensor) -> bool:
    """``out`` lies over ``z`` with narrower elements: threads overwrite what others have read."""
    return z.data_ptr() == out.data_ptr() and z.element_size() != out.element_size()


class TritonTiles(Tiles):
    """Statistics and gradients of tiles by the row kernels; the same methods as ``TorchTiles``."""

    def __init__(
        self, hidden: Tensor, head: Head, targets: Tensor, chunk: int | None, **kw
    ) -> None:
        super().__init__(hidden, head, targets.contiguous(), chunk, **kw)
        self._rows = Rows.of(head)
        self._gradient: Tensor | None = None

    def stats(self, rows: slice, stats: Tensor, moment: bool) -> None:
        row_stats(self._rows, self.raw(rows), self.targets, stats, rows.start, moment)

    def dlogits(
        self, rows: slice, stats: Tensor, d_logprob: Tensor, d_entropy: Tensor | None
    ) -> Tensor:
        z = self.raw(rows)
        out = self.gradient_of(z)
        row_dlogits(self._rows, z, out, self.targets, stats, d_logprob, d_entropy, rows.start)
        return out

    def gradient_of(self, z: Tensor) -> Tensor:
        """[n, V] memory for the gradient, over ``z`` itself unless z is kept or narrower."""
        dtype = self.head.weight.dtype
        if self.kept is None and dtype.itemsize <= z.element_size():
            self._loaded = None
            return in_place(z, dtype)
        if self._gradient is None or len(self._gradient) < len(z):
            most = max(s.stop - s.start for s in self.spans)
            shape = (max(most, len(z)), raw_width(self.head.vocab))
            self._gradient = z.new_empty(shape, dtype=dtype)
        return self._gradient[: len(z), : z.shape[1]]


def _cases() -> list[CompileCase]:
    i32s = ("z_stride", "out_stride", "first", "rows", "vocab")
    base = {name: "i32" for name in i32s} | {
        "begin": "i32", "scale": "fp32", "softcap": "fp32", "targets": "*i64", "stats": "*fp32",
        "bias": "*fp32", "d_logprob": "*fp32", "d_entropy": "*fp32",
    }  # fmt: skip
    aligned = ("z", "out", "z_stride", "out_stride", "targets", "stats", "bias",
               "d_logprob", "d_entropy", "vocab")  # fmt: skip
    heads: dict[str, dict[str, Any]] = {
        "plain": {"bias": None, "softcap": None},
        "biased": {"softcap": None},
        "capped": {"bias": None},
        "bias and cap": {},
    }
    found = []
    for name, absent in heads.items():
        block = BLOCK if "softcap" in absent else BLOCK_CAPPED
        for z in ("fp32", "bf16"):
            types = base | {"z": f"*{z}", "out": "*bf16"}
            for moment in (True, False):
                consts = absent | {"MOMENT": moment, "BLOCK": block}
                label = f"row_stats {z} {name}{' moment' if moment else ''}"
                case = _case(label, _row_stats_kernel, types, consts, aligned)
                found.append(case)
            for entropy in (True, False):
                consts = absent | {"BARRIER": z == "fp32", "BLOCK": block}
                consts |= {} if entropy else {"d_entropy": None}
                label = f"row_dlogits {z} {name}{' entropy' if entropy else ''}"
                found.append(_case(label, _row_dlogits_kernel, types, consts, aligned))
    return found


def _case(name: str, kernel: Any, types: dict, consts: dict, aligned: tuple) -> CompileCase:
    signature = {n: types[n] for n in kernel.arg_names if n not in consts}
    return CompileCase(
        name, kernel, signature, consts, WARPS, 1, tuple(n for n in aligned if n in signature)
    )


COMPILE_CASES = _cases()
