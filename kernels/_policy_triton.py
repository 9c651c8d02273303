"""Triton kernel of the token-level policy losses: logits of a row in, gradient of the logits out.

One sweep a row: statistics, log-prob, the loss's derivative in registers, and dlogits over the logits. The
value and the metrics come later from ``_policy_math.token_loss`` on the [N] vectors; the derivative here
is that function's, which the tests compare.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._logits_triton import (
    BLOCK,
    BLOCK_CAPPED,
    WARPS,
    TritonTiles,
    _fill_zero,
    _log1p,
    _row_gradient,
    _row_stats,
    shares_bytes,
)
from ._policy_math import PolicyLossSpec, Tokens
from ._triton import CompileCase, launch_options

# Rows of the result, [3, N].
LOGPROB, ENTROPY, D_LOGPROB = range(3)


@triton.jit
def _expm1(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.25, near, tl.exp(x) - 1)


@triton.jit
def _surrogate_slope(ratio, advantage, low, high, delta, CISPO: tl.constexpr):
    """d policy loss / d log-prob of the token, as ``_policy_math._surrogate``."""
    if CISPO:
        slope = -tl.minimum(ratio, high) * advantage
    else:
        plain = ratio
        plain_slope = 1.0
        if delta is not None:
            plain = tl.minimum(ratio, delta)
            plain_slope = tl.where(ratio <= delta, 1.0, 0.0)
        a = plain * advantage
        b = tl.minimum(tl.maximum(ratio, low), high) * advantage
        share = tl.where(b > a, 1.0, tl.where(b < a, 0.0, 0.5))
        clip_slope = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        slope = -advantage * (share * plain_slope + (1 - share) * clip_slope) * ratio
    return slope


@triton.jit
def _engine_weight(old, rollout, least, most, MASK: tl.constexpr):
    """Importance weight of the gap to the rollout engine; NaN there counts as no gap."""
    gap = old - rollout
    weight = tl.exp(tl.where(gap == gap, gap, 0.0))
    if MASK:
        weight = tl.where((weight < least) | (weight > most), 0.0, weight)
    else:
        weight = tl.minimum(tl.maximum(weight, least), most)
    return weight


@triton.jit
def _kl_slope(logp, ref, ratio, KL: tl.constexpr, BIAS_CORRECTION: tl.constexpr):
    """d KL / d log-prob by the estimator k1, k2 or k3, with its ratio weight where asked for."""
    d = ref - logp
    if KL == 1:
        kl = -d
        slope = d * 0 + 1
    elif KL == 2:
        kl = 0.5 * d * d
        slope = -d
    else:
        kl = _expm1(d) - d
        slope = -_expm1(d)
    if BIAS_CORRECTION:
        slope = (slope + kl) * ratio
    return slope


@triton.jit(do_not_specialize=["first", "rows", "begin"])
def _row_policy_kernel(
    z, z_stride, out, out_stride, targets, live, advantage, weight, entropy_weight, old, ref, rollout,
    result, bias, first, rows, begin, vocab, scale, softcap,
    low, high, delta, beta, entropy_coef, least, most,
    CISPO: tl.constexpr, KL: tl.constexpr, BIAS_CORRECTION: tl.constexpr, MASK: tl.constexpr,
    BARRIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``first + i`` from row i of the tile: dlogits, and (log-prob, entropy, d_logprob) into result."""
    i = tl.program_id(0).to(tl.int64)
    row = first + i
    z += i * z_stride
    out += i * out_stride
    result += row
    wide = tl.cast(rows, tl.int64)
    if tl.load(live + row) == 0:
        tl.store(result, 0.0)
        tl.store(result + wide, 0.0)
        tl.store(result + 2 * wide, 0.0)
        _fill_zero(out, vocab, BLOCK)
    else:
        column = tl.load(targets + row) - begin
        owned = (column >= 0) & (column < vocab)
        top, others, target, moment = _row_stats(
            z, bias, column, owned, vocab, scale, softcap, True, BLOCK
        )
        at = tl.exp(target)
        total = tl.where(others + at > 0, _log1p(others + (at - 1)), float("nan"))
        logp = target - total
        before = logp
        if old is not None:
            before = tl.load(old + row)
        ratio = tl.exp(logp - before)
        slope = _surrogate_slope(ratio, tl.load(advantage + row), low, high, delta, CISPO)
        if rollout is not None:
            slope *= _engine_weight(before, tl.load(rollout + row), least, most, MASK)
        if ref is not None:
            slope += beta * _kl_slope(logp, tl.load(ref + row), ratio, KL, BIAS_CORRECTION)
        slope *= tl.load(weight + row)
        tl.store(result, logp)
        tl.store(result + wide, total - moment / (others + at))
        tl.store(result + 2 * wide, slope)
        ge = 0.0
        if entropy_coef is not None:
            ge = -entropy_coef * tl.load(entropy_weight + row) * scale
        _row_gradient(
            z, out, bias, column, owned, vocab, scale, softcap,
            top, others, target, moment, slope * scale, ge,
            BARRIER, entropy_coef is not None, BLOCK,
        )  # fmt: skip


class TritonPolicyTiles(TritonTiles):
    """Row kernels, with the token-level losses in one sweep."""

    def policy(self, rows: slice, tokens: Tokens, spec: PolicyLossSpec, result: Tensor) -> Tensor:
        """[n, V] dlogits of the loss of these rows; fills columns of ``result`` [3, N] float32.

        ``tokens`` are all N of the call. Rows of result: log-prob, entropy, d loss / d log-prob, zeros
        where a token is not live. Not for a spec by sequence, nor for a sharded vocabulary.
        """
        head, z = self._rows, self.raw(rows)
        out = self.gradient_of(z)
        corrected = spec.importance_sampling_correction != "none"
        least, most = spec.importance_sampling_clip_min, spec.importance_sampling_clip_max
        cispo = spec.loss_type == "cispo"
        _row_policy_kernel[(len(z),)](
            z, z.stride(0), out, out.stride(0), self.targets, tokens.live, tokens.advantage,
            tokens.weight, tokens.entropy_weight if spec.entropy_coef else None, tokens.old,
            tokens.ref if spec.beta else None, tokens.rollout if corrected else None,
            result, head.bias, rows.start, result.shape[1], head.begin,
            head.vocab, head.scale, head.softcap,
            1 - spec.epsilon, spec.high if cispo else 1 + spec.high, spec.delta, spec.beta,
            spec.entropy_coef or None, -math.inf if least is None else least,
            math.inf if most is None else most,
            CISPO=cispo, KL=int(spec.kl_estimator[1]), BIAS_CORRECTION=spec.use_bias_correction_kl,
            MASK=spec.importance_sampling_correction == "token_mask",
            BARRIER=shares_bytes(z, out), BLOCK=head.block, **launch_options(WARPS, 1),
        )  # fmt: skip
        return out


_POINTERS = {
    "z": "*fp32", "out": "*bf16", "targets": "*i64", "live": "*i1", "advantage": "*fp32",
    "weight": "*fp32", "entropy_weight": "*fp32", "old": "*fp32", "ref": "*fp32",
    "rollout": "*fp32", "result": "*fp32", "bias": "*fp32",
}  # fmt: skip
_NUMBERS = {name: "i32" for name in ("z_stride", "out_stride", "first", "rows", "begin", "vocab")}
_NUMBERS |= {
    name: "fp32"
    for name in (
        "scale",
        "softcap",
        "low",
        "high",
        "delta",
        "beta",
        "entropy_coef",
        "least",
        "most",
    )
}


def _case(name: str, absent: tuple[str, ...], **flags: Any) -> CompileCase:
    constants = dict.fromkeys(absent) | {
        "CISPO": False, "KL": 3, "BIAS_CORRECTION": True, "MASK": False, "BARRIER": True,
        "BLOCK": BLOCK,
    } | flags  # fmt: skip
    types = _POINTERS | _NUMBERS
    signature = {n: types[n] for n in _row_policy_kernel.arg_names if n not in constants}
    aligned = (*_POINTERS, "z_stride", "out_stride", "vocab")
    return CompileCase(
        f"row_policy {name}", _row_policy_kernel, signature, constants, WARPS, 1,
        tuple(n for n in aligned if n in signature),
    )  # fmt: skip


_PLAIN = ("bias", "softcap", "delta")
_NO_ENTROPY = ("entropy_weight", "entropy_coef")
COMPILE_CASES = [
    _case("on policy", (*_PLAIN, *_NO_ENTROPY, "old", "ref", "rollout")),
    _case("grpo", (*_PLAIN, *_NO_ENTROPY, "ref", "rollout")),
    _case("k3", (*_PLAIN, *_NO_ENTROPY, "rollout")),
    _case("k2 truncate", (*_PLAIN, *_NO_ENTROPY), KL=2, BIAS_CORRECTION=False),
    _case("entropy delta mask", ("bias", "softcap"), KL=1, MASK=True),
    _case("cispo entropy", _PLAIN, CISPO=True),
    _case("all", (), BLOCK=BLOCK_CAPPED),
    _case("float32 weight", (*_PLAIN, *_NO_ENTROPY, "ref", "rollout"), BARRIER=False),
]
