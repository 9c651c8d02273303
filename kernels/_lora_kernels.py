"""Triton kernels of the merge, over tables of pointers (``_lora_plan``) to all linears of a model.

    sample   places every threshold's first interval, from blocks at random places
    count    the exact counts of ``_lora_search``: tiles of B @ A against an interval of bit patterns
    apply    tiles again: trim or drop, elect, merge, add to the base, count conflicts

A tile of B @ A has the same shape and the same order of sums wherever it is made, so |delta| >= threshold
means the same in count and apply. Counts are integer atomics; every other sum is one number per job (a
run of tiles, ``_lora_plan``), added up in the jobs' order: results repeat bit for bit. Products of 16-bit
factors are exact and summed in fp32; fp32 factors are multiplied in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of ``Plan.shapes`` and ``Plan.factors``, in order.
_SHAPE: tl.constexpr = tl.constexpr(5)
_FACTOR: tl.constexpr = tl.constexpr(5)


@triton.jit
def _mix(x):
    """The 32-bit finaliser of ``_lora_trim``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_bits(rows, columns, width, keys):
    """``_lora_trim.random_bits`` of a tile's elements, uint32."""
    index = rows.to(tl.int64)[:, None] * width + columns[None, :]
    first = tl.load(keys).to(tl.uint32)
    second = tl.load(keys + 1).to(tl.uint32)
    draw = _mix(index.to(tl.uint32) ^ first)
    return _mix(draw + (index >> 32).to(tl.uint32) * 0x9E3779B9 + second)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """x (f32) to the nearest in DTYPE; the interpreter truncates to bf16 where hardware rounds."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _delta(
    factors, scales, unit, rows, columns, out, width,
    R: tl.constexpr, STEP: tl.constexpr, FACTOR: tl.constexpr, DELTA: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, columns] f32 of one expert's scale * B @ A, rounded to DELTA; 0 beyond the matrix."""
    entry = factors + unit * _FACTOR
    a_at = tl.load(entry).to(tl.pointer_type(FACTOR))
    a_stride = tl.load(entry + 1)
    b_at = tl.load(entry + 2).to(tl.pointer_type(FACTOR))
    b_stride = tl.load(entry + 3)
    rank = tl.load(entry + 4).to(tl.int32)
    if ALIGNED:
        a_at = tl.multiple_of(a_at, 16)
        b_at = tl.multiple_of(b_at, 16)
        a_stride = tl.multiple_of(a_stride, 8)
        b_stride = tl.multiple_of(b_stride, 8)
        rank = tl.multiple_of(rank, 8)
    acc = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.static_range(0, R, STEP):
        if start < rank:
            k = start + tl.arange(0, STEP)
            b = tl.load(
                b_at + rows.to(tl.int64)[:, None] * b_stride + k[None, :],
                mask=(rows < out)[:, None] & (k < rank)[None, :], other=0.0,
            )  # fmt: skip
            a = tl.load(
                a_at + k.to(tl.int64)[:, None] * a_stride + columns[None, :],
                mask=(k < rank)[:, None] & (columns < width)[None, :], other=0.0,
            )  # fmt: skip
            if UPCAST:  # the interpreter's dot of bf16 is wrong
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(b, a, acc, input_precision="ieee")
    delta = acc * tl.load(scales + unit)
    if DELTA != tl.float32:
        delta = _rounded(delta, DELTA, UPCAST).to(tl.float32)
    return delta


@triton.jit
def _count_patterns(delta, valid, low, shift, counts, BINS: tl.constexpr):
    """Add the tile's elements inside the interval to ``counts``; how many lie above it."""
    pattern = tl.abs(delta).to(tl.int32, bitcast=True)
    last = tl.minimum(low + (BINS << shift) - 1, 0x7FFFFFFF).to(tl.int32)
    first = low.to(tl.int32)
    inside = valid & (pattern >= first) & (pattern <= last)
    place = (pattern - first) >> shift.to(tl.int32)
    tl.atomic_add(counts + place, 1, mask=inside, sem="relaxed")
    return tl.sum((valid & (pattern > last)).to(tl.int32)).to(tl.int64)


@triton.jit
def _lora_sample_kernel(
    shapes, factors, scales, units, targets, low, shift, counts, above, per_unit,
    EXPERTS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, SIDE: tl.constexpr,
    BINS: tl.constexpr, FACTOR: tl.constexpr, DELTA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Count SIDE x SIDE blocks at random rows and columns. units [U, 2]: linear * E + expert, blocks."""
    pid = tl.program_id(0)
    at = units + (pid // per_unit) * 2
    unit = tl.load(at)
    blocks = tl.load(at + 1)
    target = tl.load(targets + unit)
    shape = shapes + (unit // EXPERTS) * _SHAPE
    out = tl.load(shape).to(tl.int32)
    width = tl.load(shape + 1).to(tl.int32)
    base = tl.load(low + target)
    scale = tl.load(shift + target)
    lane = tl.arange(0, SIDE)
    everywhere = tl.full([SIDE, SIDE], 1, tl.int1)
    higher = tl.zeros([], tl.int64)
    block = (pid % per_unit).to(tl.int64)
    while block < blocks:
        draw = ((unit << 20) + block * SIDE + lane).to(tl.uint32)
        rows = ((_mix(draw * 2).to(tl.int64) * out) >> 32).to(tl.int32)
        columns = ((_mix(draw * 2 + 1).to(tl.int64) * width) >> 32).to(tl.int32)
        delta = _delta(
            factors, scales, unit, rows, columns, out, width, R, STEP, FACTOR, DELTA, False, UPCAST
        )
        higher += _count_patterns(delta, everywhere, base, scale, counts + target * BINS, BINS)
        block += per_unit
    tl.atomic_add(above + target, higher, sem="relaxed")


@triton.jit
def _lora_count_kernel(
    shapes, factors, scales, jobs, targets, low, shift, found, counts, above,
    EXPERTS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BINS: tl.constexpr, FACTOR: tl.constexpr, DELTA: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One pass of a search over the tiles of one job; targets [L, E] (-1: no expert) name its counts."""
    job = jobs + tl.program_id(0) * 3
    linear = tl.load(job)
    tile = tl.load(job + 1).to(tl.int32)
    last = tl.load(job + 2).to(tl.int32)
    out = tl.load(shapes + linear * _SHAPE).to(tl.int32)
    width = tl.load(shapes + linear * _SHAPE + 1).to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    down = tl.cdiv(out, ROWS)
    for e in range(EXPERTS):
        unit = linear * EXPERTS + e
        target = tl.load(targets + unit)
        if target >= 0:
            if tl.load(found + target) == 0:
                base = tl.load(low + target)
                scale = tl.load(shift + target)
                higher = tl.zeros([], tl.int64)
                at = tile
                while at < last:
                    rows = (at % down) * ROWS + tl.arange(0, ROWS)
                    columns = (at // down) * COLUMNS + tl.arange(0, COLUMNS)
                    delta = _delta(
                        factors, scales, unit, rows, columns, out, width, R, STEP, FACTOR, DELTA,
                        ALIGNED, UPCAST,
                    )  # fmt: skip
                    valid = (rows < out)[:, None] & (columns < width)[None, :]
                    higher += _count_patterns(
                        delta, valid, base, scale, counts + target * BINS, BINS
                    )
                    at += 1
                tl.atomic_add(above + target, higher, sem="relaxed")


@triton.jit
def _put(stats, at, value):
    """stats with ``value`` added at one place."""
    lane = tl.arange(0, stats.shape[0])
    return stats + tl.where(lane == at, value.to(tl.float64), 0.0)


@triton.jit
def _count_pairs(stats, signs, at, EXPERTS: tl.constexpr):
    """Elements that every expert changes, that two experts change, and that two change in opposite
    directions, for all pairs."""
    changed = (signs | (signs >> 1)) & 0x55555555
    pairs: tl.constexpr = EXPERTS * (EXPERTS - 1) // 2
    for i in range(EXPERTS):  # not unrolled, as the experts' loop
        stats = _put(stats, at + i, tl.sum((changed >> (2 * i)) & 1))
        for j in range(i):
            both = (changed >> (2 * i)) & (changed >> (2 * j)) & 1
            apart = both & ((signs >> (2 * i)) ^ (signs >> (2 * j)))
            # a tile has less than 2^16 elements: two counts fit one word
            count = tl.sum(both + (apart << 16))
            pair = at + EXPERTS + i * (i - 1) // 2 + j
            stats = _put(stats, pair, count & 0xFFFF)
            stats = _put(stats, pair + pairs, count >> 16)
    return stats


@triton.jit
def _stochastic(x, draw, BASE: tl.constexpr, UPCAST: tl.constexpr):
    """``_lora_trim.round_stochastic``."""
    near = _rounded(x, BASE, UPCAST)
    error = x - near.to(tl.float32)
    step = tl.where((error > 0) == (x > 0), 1, -1).to(tl.int16)
    other = (near.to(tl.int16, bitcast=True) + step).to(BASE, bitcast=True)
    gap = tl.abs(other.to(tl.float32) - near.to(tl.float32))
    chance = (draw >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.where(chance * gap < tl.abs(error), other, near)


@triton.jit
def _sign_bits(x):
    """1 where x > 0, 2 where x < 0."""
    return (x > 0).to(tl.int32) + ((x < 0).to(tl.int32) << 1)


@triton.jit
def _ones(x):
    """How many of the 16 even bits are set; the others must be 0."""
    x = (x & 0x11111111) + ((x >> 2) & 0x11111111)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _count_conflicts(stats, signs, total, magnitude, at):
    """Elements that several experts change, those they change in opposite directions, the magnitudes of
    both, the energies of the sum as it is and with all signs agreeing."""
    changed = (signs | (signs >> 1)) & 0x55555555
    several = (changed & (changed - 1)) != 0
    apart = ((signs & 0x55555555) != 0) & (((signs >> 1) & 0x55555555) != 0)
    # a tile has less than 2^16 elements: two counts fit one word
    count = tl.sum(several.to(tl.int32) + (apart.to(tl.int32) << 16))
    stats = _put(stats, at, count & 0xFFFF)
    stats = _put(stats, at + 1, count >> 16)
    stats = _put(stats, at + 2, tl.sum(tl.where(several, magnitude, 0.0)))
    stats = _put(stats, at + 3, tl.sum(tl.where(apart, magnitude, 0.0)))
    stats = _put(stats, at + 4, tl.sum(total * total))
    return _put(stats, at + 5, tl.sum(magnitude * magnitude))


@triton.jit
def _elected(
    voters, total, weighted, plus, minus, weights,
    EXPERTS: tl.constexpr, ELECT: tl.constexpr, BY_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The mean of the side that wins the election; zero votes elect plus."""
    up = voters & 0x55555555
    down = (voters >> 1) & 0x55555555
    if ELECT == "frequency":
        positive = _ones(up) >= _ones(down)
    elif ELECT == "weighted":
        positive = weighted >= 0
    else:
        positive = total >= 0
    side = tl.where(positive, up, down)
    if BY_WEIGHT:
        divisor = tl.zeros(total.shape, tl.float32)
        for e in tl.static_range(EXPERTS):
            divisor += tl.where(((side >> (2 * e)) & 1) != 0, tl.load(weights + e), 0.0)
        divisor = tl.where(tl.abs(divisor) < 1e-8, 1.0, divisor)
    else:
        divisor = tl.maximum(_ones(side), 1).to(tl.float32)
    return tl.div_rn(tl.where(positive, plus, minus), divisor)


@triton.jit
def _broken(old, new, BASE: tl.constexpr):
    """Elements that were finite and are no more."""
    if BASE != tl.float64:  # 16-bit comparisons are wrong in the interpreter
        old = old.to(tl.float32)
        new = new.to(tl.float32)
    limit = float("inf")
    return (tl.abs(old) < limit) & ~(tl.abs(new) < limit)


@triton.jit
def _write(
    stats, update, shape, rows, columns, out, width, stream, at,
    BASE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the update to the base, rounding once; its energy, the updates, those lost to rounding."""
    base = tl.load(shape + 2).to(tl.pointer_type(BASE))
    stride = tl.load(shape + 3)
    step = tl.load(shape + 4)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        stride = tl.multiple_of(stride, 8)
        step = 1
    at_base = base + rows.to(tl.int64)[:, None] * stride + columns[None, :] * step
    valid = (rows < out)[:, None] & (columns < width)[None, :]
    old = tl.load(at_base, mask=valid, other=0.0)
    if BASE == tl.float64:
        new = old + update.to(tl.float64)
    elif STOCHASTIC:
        draw = _random_bits(rows, columns, width, stream)
        new = _stochastic(old.to(tl.float32) + update, draw, BASE, UPCAST)
    else:
        new = _rounded(old.to(tl.float32) + update, BASE, UPCAST)
    moved = update != 0
    lost = moved & (new == old)
    count = tl.sum(moved.to(tl.int32) + (lost.to(tl.int32) << 16))
    tl.store(at_base, new, mask=valid)
    stats = _put(
        stats, at, tl.sum(tl.where(_broken(old, new, BASE), float("inf"), update * update))
    )
    stats = _put(stats, at + 1, count & 0xFFFF)
    return _put(stats, at + 2, count >> 16)


@triton.jit
def _lora_apply_kernel(
    shapes, factors, scales, keys, weights, jobs, threshold, stats_at, density, lam,
    EXPERTS: tl.constexpr, STATS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CUT: tl.constexpr, ELECT: tl.constexpr,
    BY_WEIGHT: tl.constexpr, WEIGHTED: tl.constexpr, BASE: tl.constexpr, WRITE: tl.constexpr,
    STOCHASTIC: tl.constexpr, FACTOR: tl.constexpr, DELTA: tl.constexpr, ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Merge one job's tiles into the base and sum up their conflicts.

    CUT: "" | "trim" | "drop"; ELECT: "" | "total" | "weighted" | "frequency"; stats_at [J, STATS] f64 has
    the places of ``read_stats``.
    """
    pid = tl.program_id(0).to(tl.int64)
    linear = tl.load(jobs + pid * 3)
    tile = tl.load(jobs + pid * 3 + 1).to(tl.int32)
    last = tl.load(jobs + pid * 3 + 2).to(tl.int32)
    out = tl.load(shapes + linear * _SHAPE).to(tl.int32)
    width = tl.load(shapes + linear * _SHAPE + 1).to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    down = tl.cdiv(out, ROWS)
    stats = tl.zeros([STATS], tl.float64)
    while tile < last:
        rows = (tile % down) * ROWS + tl.arange(0, ROWS)
        columns = (tile // down) * COLUMNS + tl.arange(0, COLUMNS)
        signs = tl.zeros([ROWS, COLUMNS], tl.int32)  # a plus and a minus bit per expert
        voters = tl.zeros([ROWS, COLUMNS], tl.int32)  # the same of the weighted deltas
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        weighted = tl.zeros([ROWS, COLUMNS], tl.float32)
        magnitude = tl.zeros([ROWS, COLUMNS], tl.float32)
        plus = tl.zeros([ROWS, COLUMNS], tl.float32)
        minus = tl.zeros([ROWS, COLUMNS], tl.float32)
        for e in range(EXPERTS):  # not unrolled: several experts' tiles at once do not fit
            unit = linear * EXPERTS + e
            delta = _delta(
                factors, scales, unit, rows, columns, out, width, R, STEP, FACTOR, DELTA, ALIGNED,
                UPCAST,
            )  # fmt: skip
            stats = _put(stats, e, tl.sum(delta * delta))
            if CUT == "trim":
                delta = tl.where(tl.abs(delta) >= tl.load(threshold + unit), delta, 0.0)
            elif CUT == "drop":
                stream = keys + (linear * (EXPERTS + 1) + e) * 3
                draw = _random_bits(rows, columns, width, stream)
                keep = draw < tl.load(stream + 2).to(tl.uint32)
                delta = tl.where(keep, tl.div_rn(delta, density), 0.0)
            if CUT != "":
                stats = _put(stats, EXPERTS + e, tl.sum(delta * delta))
            signs |= _sign_bits(delta) << (2 * e)
            total += delta
            if WEIGHTED or ELECT == "":
                magnitude += tl.abs(delta)
            voter = delta
            if WEIGHTED:
                delta = delta * tl.load(weights + e)
                weighted += delta
            if ELECT == "weighted":
                voter = delta
                voters |= _sign_bits(voter) << (2 * e)
            if ELECT != "":
                plus += tl.where(voter > 0, delta, 0.0)
                minus += tl.where(voter < 0, delta, 0.0)
        if not WEIGHTED and ELECT != "":
            magnitude = plus - minus
        if ELECT != "weighted":
            voters = signs
        stats = _count_conflicts(stats, signs, total, magnitude, EXPERTS * (EXPERTS + 2))
        if WRITE:
            update = weighted if WEIGHTED else total
            if ELECT != "":
                update = _elected(
                    voters, total, weighted, plus, minus, weights, EXPERTS, ELECT, BY_WEIGHT
                )
            stats = _write(
                stats, update * lam, shapes + linear * _SHAPE, rows, columns, out, width,
                keys + (linear * (EXPERTS + 1) + EXPERTS) * 3, EXPERTS * (EXPERTS + 2) + 6,
                BASE, STOCHASTIC, ALIGNED, UPCAST,
            )  # fmt: skip
        stats = _count_pairs(stats, signs, 2 * EXPERTS, EXPERTS)
        tile += 1
    tl.store(stats_at + pid * STATS + tl.arange(0, STATS), stats)
