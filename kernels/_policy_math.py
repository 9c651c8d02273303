"""The per-token policy losses: value, derivative with respect to the log-probs, and metrics. No
logits here.

For one token with log-prob ``lp``, ratio r = exp(lp - old) (gspo: exp of the mean over the
sequence's counted tokens) and advantage A, after TRL:

- grpo, bnpo, dr_grpo, dapo, gspo:  -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
- cispo:  -min(r, epsilon_high) A lp, the first factor constant

times the importance-sampling weight, plus beta * KL, minus entropy_coef * entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
KL_ESTIMATORS = ("k1", "k2", "k3")
IS_MODES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class PolicyLossSpec:
    """Which loss. Names, meanings and defaults are TRL's where TRL has them.

    Raises ValueError for values that make no sense together.
    """

    loss_type: str = "dapo"
    """grpo, bnpo, dr_grpo, dapo differ only in their token weights (see ``token_weights``); gspo
    has one ratio per sequence (TRL's importance_sampling_level='sequence'); cispo clips the ratio's
    weight, not the objective."""
    epsilon: float = 0.2
    """Lower clip: the ratio's gradient stops below 1 - epsilon."""
    epsilon_high: float | None = None
    """Upper clip at 1 + epsilon_high; None = epsilon. For cispo the largest weight itself (e.g.
    5.0), required."""
    delta: float | None = None
    """Two-sided clipping: bound of the ratio for negative advantages (INTELLECT-2); should exceed 1
    + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL to the reference; 0 needs no reference log-probs."""
    kl_estimator: str = "k3"
    """With d = ref - lp. k1: -d. k2: d^2 / 2. k3: exp(d) - d - 1."""
    use_bias_correction_kl: bool = True
    """Multiply the KL by the (differentiable) ratio, which makes k3's gradient that of the reverse
    KL."""
    temperature: float = 1.0
    """Divides the logits; the sampling temperature of the rollouts."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (subtracted from the loss)."""
    importance_sampling_correction: str = "none"
    """Weight exp(old - rollout) for the gap between trainer and rollout engine. truncate clips it
    into [clip_min, clip_max], mask zeroes it outside; token_ takes each token's, sequence_ the
    sequence's summed gap."""
    importance_sampling_clip_max: float | None = 3.0
    importance_sampling_clip_min: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("loss_type", LOSS_TYPES),
            ("kl_estimator", KL_ESTIMATORS),
            ("importance_sampling_correction", IS_MODES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known: use {', '.join(known)}"
                )
        self._check_numbers()
        if not 0 <= self.epsilon < 1 or (self.epsilon_high is not None and self.epsilon_high < 0):
            raise ValueError(
                "epsilon must lie in [0, 1) and epsilon_high be at least 0, "
                f"got {self.epsilon} and {self.epsilon_high}"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type='cispo' needs epsilon_high, the largest weight (e.g. 5.0)")
        if self.delta is not None and self.delta <= 1:
            raise ValueError(
                f"delta must exceed 1 (and should exceed 1 + epsilon_high), got {self.delta}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"importance_sampling_clip_min ({low}) must be below "
                f"importance_sampling_clip_max ({high})"
            )
        if (
            self.importance_sampling_correction.endswith("truncate")
            and low is None
            and high is None
        ):
            raise ValueError("a truncate mode needs importance_sampling_clip_max or _clip_min")

    def _check_numbers(self) -> None:
        """NaN fails no comparison above or below, and then makes every loss NaN."""
        finite = ("epsilon", "epsilon_high", "delta", "beta", "temperature", "entropy_coef")
        bounds = ("importance_sampling_clip_max", "importance_sampling_clip_min")
        for name in (*finite, *bounds):
            x = getattr(self, name)
            if x is None or math.isfinite(x) or (name in bounds and not math.isnan(x)):
                continue
            raise ValueError(f"{name} must be a finite number, got {x}")

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def by_sequence(self) -> bool:
        """A token's gradient needs its whole sequence."""
        return self.loss_type == "gspo" or self.importance_sampling_correction.startswith(
            "sequence"
        )


@dataclass(frozen=True)
class Sequences:
    """Which of S sequences each of n tokens is in; the tokens of a sequence are adjacent."""

    index: Tensor  # [n] int64, 0..S-1
    offset: Tensor  # [n] int64, place within the sequence
    count: int
    longest: int

    @classmethod
    def of(cls, sequence_id: Tensor) -> tuple[Sequences, list[int]]:
        """And the lengths. Reading the boundaries waits for the device."""
        ids, lengths = torch.unique_consecutive(sequence_id, return_counts=True)
        if len(torch.unique(ids)) != len(ids):
            raise ValueError(
                "sequence_id: the tokens of a sequence must be adjacent, but an id comes back later"
            )
        host, n, device = lengths.tolist(), len(sequence_id), sequence_id.device
        order = torch.arange(len(ids), device=device)
        index = torch.repeat_interleave(order, lengths, output_size=n)
        begin = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths, output_size=n)
        offset = torch.arange(n, device=device) - begin
        return cls(index, offset, len(ids), max(host, default=0)), host

    def cut(self, rows: slice, first: int, count: int) -> Sequences:
        """The ``count`` sequences from ``first`` on, which are these rows."""
        return Sequences(self.index[rows] - first, self.offset[rows], count, self.longest)

    def sum(self, x: Tensor) -> Tensor:
        """[S] sums of x [n], in an order that does not change from run to run."""
        padded = x.new_zeros(self.count, self.longest)
        return padded.index_put_((self.index, self.offset), x).sum(1)


@dataclass(frozen=True)
class Tokens:
    """What is given for each of n tokens, all in the accumulation dtype, clean (finite) where
    ``live`` is False."""

    advantage: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None  # NaN = the engine has none for this token
    weight: Tensor
    entropy_weight: Tensor
    live: Tensor  # bool
    sequences: Sequences | None = None  # when the spec is by_sequence

    def cut(self, rows: slice, sequences: Sequences | None = None) -> Tokens:
        """Those of some rows, which are whole ``sequences``."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return Tokens(
            self.advantage[rows], part(self.old), part(self.ref), part(self.rollout),
            self.weight[rows], self.entropy_weight[rows], self.live[rows], sequences,
        )  # fmt: skip


@dataclass(frozen=True)
class TokenLoss:
    loss: Tensor  # scalar
    d_logprob: Tensor  # [n]
    d_entropy: Tensor | None  # [n], None if entropy_coef is 0
    metrics: dict[str, Tensor]


def _surrogate(ratio: Tensor, tokens: Tokens, logp: Tensor, spec: PolicyLossSpec):
    """Policy loss [n], its derivative by the token's own log-prob, and by the log of the ratio."""
    advantage = tokens.advantage
    if spec.loss_type == "cispo":
        direct = -ratio.clamp(max=spec.high) * advantage
        return direct * logp, direct, torch.zeros_like(direct)
    low, high = 1 - spec.epsilon, 1 + spec.high
    plain = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    a, b = plain * advantage, ratio.clamp(low, high) * advantage
    # where both are equal the two branches share the gradient, as torch.minimum does
    share = 0.5 + 0.5 * torch.sign(b - a)
    plain_slope = 1.0 if spec.delta is None else (ratio <= spec.delta).to(ratio.dtype)
    clip_slope = ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
    slope = -advantage * (share * plain_slope + (1 - share) * clip_slope)
    return -torch.minimum(a, b), torch.zeros_like(slope), slope * ratio


def _kl(logp: Tensor, ref: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    d = ref - logp
    if estimator == "k1":
        return -d, torch.ones_like(d)
    if estimator == "k2":
        return 0.5 * d.square(), -d
    return torch.expm1(d) - d, -torch.expm1(d)


def _engine_gap(old: Tensor, tokens: Tokens, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    """Importance weight of each token, and |old - rollout| with NaN where the engine gave
    nothing."""
    assert tokens.rollout is not None
    gap = old - tokens.rollout
    log_weight = torch.where(tokens.live, gap.nan_to_num(nan=0.0), 0.0)
    if spec.importance_sampling_correction.startswith("sequence"):
        assert tokens.sequences is not None
        log_weight = tokens.sequences.sum(log_weight)[tokens.sequences.index]
    weight = log_weight.exp()
    low, high = spec.importance_sampling_clip_min, spec.importance_sampling_clip_max
    if spec.importance_sampling_correction.endswith("truncate"):
        weight = weight.clamp(min=low, max=high)
    elif spec.importance_sampling_correction.endswith("mask"):
        outside = (weight < (-math.inf if low is None else low)) | (
            weight > (math.inf if high is None else high)
        )
        weight = weight.masked_fill(outside, 0.0)
    else:
        weight = torch.ones_like(weight)
    return weight, gap.abs()


def token_loss(logp: Tensor, entropy: Tensor, tokens: Tokens, spec: PolicyLossSpec) -> TokenLoss:
    """Sum of weight * loss over the tokens with its derivatives; tokens that are not live count for
    nothing."""
    live, weight = tokens.live, tokens.weight
    logp, entropy = torch.where(live, logp, 0.0), torch.where(live, entropy, 0.0)
    old = logp if tokens.old is None else tokens.old
    log_ratio = torch.where(live, logp - old, 0.0)
    length, sequences = None, tokens.sequences
    if spec.loss_type == "gspo":
        assert sequences is not None
        length = sequences.sum(live.to(logp.dtype)).clamp(min=1)
        log_ratio = (sequences.sum(log_ratio) / length)[sequences.index]
    ratio = log_ratio.exp()

    policy, direct, through = _surrogate(ratio, tokens, logp, spec)
    metrics = _clip_metrics(ratio, tokens, spec)
    if tokens.rollout is not None:
        correction, gap = _engine_gap(old, tokens, spec)
        policy, direct, through = policy * correction, direct * correction, through * correction
        metrics |= _gap_metrics(correction, gap, live)
    metrics["sum:policy_loss"] = (weight * policy).sum()
    value = policy
    if tokens.ref is not None:
        kl, slope = _kl(logp, tokens.ref, spec.kl_estimator)
        if spec.use_bias_correction_kl:
            kl, slope = kl * ratio, slope * ratio
        if spec.beta != 0:  # only measured otherwise: 0 * inf is NaN
            value, direct = value + spec.beta * kl, direct + spec.beta * slope
            if spec.use_bias_correction_kl:
                through = through + spec.beta * kl
        metrics["sum:kl"] = torch.where(live, kl, 0.0).sum()
    loss = (weight * value).sum()
    if length is None or sequences is None:
        d_logprob = weight * (direct + through)
    else:
        shared = sequences.sum(weight * through) / length
        d_logprob = weight * direct + shared[sequences.index]
    d_entropy = None
    if spec.entropy_coef != 0:
        loss = loss - spec.entropy_coef * (tokens.entropy_weight * entropy).sum()
        d_entropy = torch.where(live, -spec.entropy_coef * tokens.entropy_weight, 0.0)
    metrics |= {"sum:loss": loss, "sum:tokens": live.sum(), "sum:entropy": entropy.sum()}
    return TokenLoss(loss, torch.where(live, d_logprob, 0.0), d_entropy, metrics)


def metric_names(spec: PolicyLossSpec, ref: bool, rollout: bool) -> list[str]:
    """Keys of ``token_loss(...).metrics`` in their order, for tokens with these log-probs given."""
    extremes = ("sum", "min", "max")
    names = [f"{how}:ratio" for how in extremes]
    clips = (
        ("cispo_clip",) if spec.loss_type == "cispo" else ("clip_low", "clip_high", "clip_region")
    )
    names += [f"sum:{clip}" for clip in clips]
    if rollout:
        names += [f"{how}:importance" for how in extremes]
        names += ["sum:logp_difference", "max:logp_difference", "sum:logp_known"]
    names += ["sum:policy_loss", *(["sum:kl"] if ref else [])]
    return [*names, "sum:loss", "sum:tokens", "sum:entropy"]


def _extremes(name: str, x: Tensor, live: Tensor) -> dict[str, Tensor]:
    inf = torch.full_like(x, torch.inf)
    return {
        f"sum:{name}": torch.where(live, x, 0.0).sum(),
        f"min:{name}": torch.where(live, x, inf).amin(),
        f"max:{name}": torch.where(live, x, -inf).amax(),
    }


def _clip_metrics(ratio: Tensor, tokens: Tokens, spec: PolicyLossSpec) -> dict[str, Tensor]:
    live, advantage = tokens.live, tokens.advantage
    out = _extremes("ratio", ratio, live)
    if spec.loss_type == "cispo":
        out["sum:cispo_clip"] = (live & (ratio > spec.high) & (advantage > 0)).sum()
        return out
    low = live & (ratio < 1 - spec.epsilon) & (advantage < 0)
    high = live & (ratio > 1 + spec.high) & (advantage > 0)
    return out | {
        "sum:clip_low": low.sum(),
        "sum:clip_high": high.sum(),
        "sum:clip_region": (low | high).sum(),
    }


def _gap_metrics(correction: Tensor, gap: Tensor, live: Tensor) -> dict[str, Tensor]:
    known = live & ~gap.isnan()
    gap_metrics = _extremes("logp_difference", gap, known)
    del gap_metrics["min:logp_difference"]
    return _extremes("importance", correction, live) | gap_metrics | {"sum:logp_known": known.sum()}


Metrics = Mapping[str, Tensor | float]


def merge_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """Raw metrics of several micro-batches or ranks as those of all their tokens together (sums,
    minima, maxima)."""
    merged: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            x, how = float(value), key.partition(":")[0]
            if key not in merged or math.isnan(x):
                merged[key] = x
            elif math.isnan(merged[key]):
                continue  # min and max would drop it, or not, by its place
            elif how == "sum":
                merged[key] += x
            else:
                merged[key] = min(merged[key], x) if how == "min" else max(merged[key], x)
    return merged


# reported name -> (raw sum, raw count)
_MEANS = {
    "entropy": ("sum:entropy", "sum:tokens"),
    "kl": ("sum:kl", "sum:tokens"),
    "clip_ratio/low_mean": ("sum:clip_low", "sum:tokens"),
    "clip_ratio/high_mean": ("sum:clip_high", "sum:tokens"),
    "clip_ratio/region_mean": ("sum:clip_region", "sum:tokens"),
    "cispo_clip_ratio": ("sum:cispo_clip", "sum:tokens"),
    "ratio/mean": ("sum:ratio", "sum:tokens"),
    "sampling/importance_sampling_ratio/mean": ("sum:importance", "sum:tokens"),
    "sampling/sampling_logp_difference/mean": ("sum:logp_difference", "sum:logp_known"),
}
_PLAIN = {
    "loss": "sum:loss",
    "policy_loss": "sum:policy_loss",
    "tokens": "sum:tokens",
    "ratio/min": "min:ratio",
    "ratio/max": "max:ratio",
    "sampling/importance_sampling_ratio/min": "min:importance",
    "sampling/importance_sampling_ratio/max": "max:importance",
    "sampling/sampling_logp_difference/max": "max:logp_difference",
}


def reduce_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """What to log, under TRL's names, from the raw metrics of the micro-batches (and ranks) of one
    optimizer step.

    ``loss`` and ``policy_loss`` are sums, because the token weights carry the normaliser;
    everything called mean is over counted tokens. A mean, minimum or maximum over no token is NaN.
    Metrics that do not apply are left out.
    """
    raw = merge_metrics(parts)
    out: dict[str, float] = {}
    for name, (total, count) in _MEANS.items():
        if total in raw:
            out[name] = raw[total] / raw[count] if raw[count] else math.nan
    for name, key in _PLAIN.items():
        if key in raw:
            out[name] = math.nan if math.isinf(raw[key]) and not key.startswith("sum") else raw[key]
    return out
