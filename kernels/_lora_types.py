"""What the merge ops take and report: LoRA factors, the merge's options, the conflict report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

METHODS = ("ties", "dare_ties", "dare_linear", "linear")
SCOPES = ("tensor", "global")
ELECTIONS = ("total", "weighted", "frequency")
DIVISORS = ("count", "weight")
DELTA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DARE_MODES = ("sample", "expectation")
ROUNDINGS = ("nearest", "stochastic")


class MergeOverflowError(ValueError):
    """Deltas or merged weights did not stay finite. The base may have been written."""


@dataclass(frozen=True)
class LoraFactors:
    """One expert's change of one linear: delta [out, in] = scale * B @ A.

    Raises ValueError if the factors do not fit together, have rank 0 or are not finite.
    """

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                "LoRA factors must be A [r, in] and B [out, r], "
                f"got A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
            )
        if self.rank == 0:
            raise ValueError("LoRA factors of rank 0 change nothing: leave the expert out (None)")
        if not math.isfinite(self.scale):
            raise ValueError(f"LoRA scale must be finite, got {self.scale}")
        for name, factor in (("A", self.A), ("B", self.B)):
            if not bool(factor.isfinite().all()):
                raise ValueError(f"LoRA factor {name} holds NaN or infinity")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta."""
        return self.B.shape[0], self.A.shape[1]

    def delta(
        self, rows: slice | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:  # [out, in] or [len(rows), in]
        """Rows of the delta, rounded once to ``dtype`` from a float64 product.

        A float32 product would depend in its last bit on how many rows are asked for, and with it
        which elements pass a threshold.
        """
        b = self.B.detach() if rows is None else self.B.detach()[rows]
        product = (b.double() @ self.A.detach().double()).mul_(self.scale)
        return product.to(dtype)

    def rescaled(self, scale: float) -> LoraFactors:
        """Factors of the same delta whose ``scale`` is the given one (as an adapter's alpha / r
        fixes it)."""
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number other than 0, got {scale}")
        return LoraFactors(self.A, self.B * (self.scale / scale), scale)


Experts = Sequence[LoraFactors | None]


@dataclass(frozen=True)
class Linear:
    """One linear of a model as the merge ops take it; without a base its conflicts are counted only."""

    name: str
    base: Tensor | None  # [out, in], written in place
    experts: Experts

    @property
    def touched(self) -> bool:
        return any(f is not None for f in self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the experts' deltas."""
        return next(f.shape for f in self.experts if f is not None)


@dataclass(frozen=True)
class MergeSpec:
    """How deltas become one delta. With trim_scope tensor, divisor count and election total or
    frequency, ties is ``peft.utils.merge_utils.ties`` on the deltas, element for element.

    Raises ValueError for values outside their range.
    """

    method: str = "ties"
    """linear: weighted sum. ties: trim, elect a sign, mean of those who agree. dare_: drop at
    random and rescale by 1 / density, then sum (dare_linear) or elect (dare_ties)."""
    density: float = 0.3
    """Share of each delta that is kept, 0..1; linear ignores it."""
    trim_scope: str = "tensor"
    """tensor: int(density * elements) of the largest of every matrix (peft, mergekit). global: of
    all an expert's matrices together (the TIES paper). Elements equal to the threshold are all
    kept, and counted in the report."""
    election: str = "total"
    """Sign of: total: the sum of the trimmed deltas; weighted: their weighted sum (mergekit);
    frequency: the sum of their signs. Zero elects plus."""
    divisor: str = "count"
    """count: the agreeing experts' number (peft); weight: the sum of their weights (mergekit)."""
    lam: float = 1.0
    """Factor on the merged delta (the paper's lambda)."""
    weights: tuple[float, ...] | None = None
    """One per expert, default ones."""
    seed: int = 0
    """Of the random dropping and rounding; with layer, expert and element it fixes every draw,
    whatever the tiling."""
    delta_dtype: torch.dtype = torch.float32
    """Deltas are rounded to this before anything else."""
    dare_mode: str = "sample"
    """sample: drop at random. expectation: what dare_linear is on average over the draws, exactly:
    the weighted sum. The average of dare_ties has no such form."""
    rounding: str = "nearest"
    """Of the sum of base and update to the base's dtype. stochastic: a 16-bit base takes either
    neighbour with the probability that makes the sum right on average, so that small updates are
    not lost; wider bases round to nearest."""

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("trim_scope", SCOPES),
            ("election", ELECTIONS),
            ("divisor", DIVISORS),
            ("delta_dtype", DELTA_DTYPES),
            ("dare_mode", DARE_MODES),
            ("rounding", ROUNDINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {known}")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must lie in 0..1, got {self.density}")
        if self.method.startswith("dare") and self.density == 0:
            raise ValueError("dare divides by density: it must be above 0")
        if self.method == "dare_ties" and self.dare_mode == "expectation":
            raise ValueError("dare_mode='expectation' is exact for dare_linear only, not dare_ties")
        if not all(math.isfinite(x) for x in (self.lam, *(self.weights or ()))):
            raise ValueError(f"lam and weights must be finite, got {self.lam} and {self.weights}")

    @property
    def trims(self) -> bool:
        """Keeps the largest elements only."""
        return self.method == "ties" and self.density < 1

    @property
    def drops(self) -> bool:
        """Drops elements at random."""
        return self.method.startswith("dare") and self.density < 1 and self.dare_mode == "sample"

    @property
    def elects(self) -> bool:
        """Elects a sign and averages those who agree."""
        return self.method in ("ties", "dare_ties")

    def expert_weights(self, experts: int) -> tuple[float, ...]:
        if self.weights is None:
            return (1.0,) * experts
        if len(self.weights) != experts:
            raise ValueError(f"the spec has {len(self.weights)} weights for {experts} experts")
        return self.weights


@dataclass
class ConflictReport:
    """How much the experts of one linear (or of several, summed) agree. E experts.

    The fields are sums, so that reports add up; the rates are properties. Counts and magnitudes of
    conflict are of the deltas after trimming or dropping, ``dot`` and the subspace overlaps of the
    whole deltas.
    """

    name: str
    linears: int
    elements: int
    threshold: (
        Tensor  # [E] f64, smallest kept magnitude; NaN in a sum and where nothing was trimmed
    )
    size: Tensor  # [E] f64, elements of each expert's delta (0 where it does not touch the linear)
    kept: Tensor  # [E] f64, non-zero elements after trimming
    tied: Tensor  # [E] f64, elements kept beyond the asked number because they equal the threshold
    energy: Tensor  # [E] f64, squared norm of the delta
    kept_energy: Tensor  # [E] f64, of the trimmed delta
    overlap: Tensor  # scalar f64, elements that at least two experts change
    conflicts: Tensor  # scalar f64, of these with opposing signs
    overlap_magnitude: Tensor  # scalar f64, sum of |delta| over the overlap
    conflict_magnitude: Tensor  # scalar f64, over the conflicts
    sum_energy: Tensor  # scalar f64, squared norm of the sum of the trimmed deltas
    aligned_energy: Tensor  # scalar f64, the same if all signs agreed
    pair_overlap: Tensor  # [E, E] f64
    pair_conflicts: Tensor  # [E, E] f64
    dot: Tensor  # [E, E] f64
    pair_linears: Tensor  # [E, E] f64, linears that both experts touch
    output_overlap: Tensor  # [E, E] f64, sum over linears; see ``subspace_overlap``
    input_overlap: Tensor  # [E, E] f64
    update_energy: (
        Tensor  # scalar f64, squared norm of what was added to the base; 0 if nothing was written, infinite
        # where an element of the base did not stay finite
    )
    updates: Tensor  # scalar f64, elements with an update
    lost_updates: Tensor  # scalar f64, of these too small to change the base in its dtype

    @classmethod
    def empty(cls, name: str, experts: int) -> ConflictReport:
        """Zeros: nothing was looked at."""
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(
                ("threshold", "size", "kept", "tied", "energy", "kept_energy"), (experts,)
            ),
            **dict.fromkeys(
                (
                    "pair_overlap",
                    "pair_conflicts",
                    "dot",
                    "pair_linears",
                    "output_overlap",
                    "input_overlap",
                ),
                (experts, experts),
            ),
        }
        tensors = {
            f.name: torch.zeros(shapes.get(f.name, ()), dtype=torch.float64)
            for f in fields(cls)
            if f.name not in ("name", "linears", "elements")
        }
        tensors["threshold"].fill_(torch.nan)
        return cls(name=name, linears=0, elements=0, **tensors)

    @property
    def experts(self) -> int:
        return len(self.size)

    @property
    def sign_conflict_rate(self) -> float:
        """Share of the elements changed by two or more experts on which they pull apart."""
        return _ratio(self.conflicts, self.overlap)

    @property
    def weighted_sign_conflict_rate(self) -> float:
        """The same with every element counted by its magnitude."""
        return _ratio(self.conflict_magnitude, self.overlap_magnitude)

    @property
    def cancelled_energy(self) -> float:
        """1 - |sum of deltas|^2 / |sum of their magnitudes|^2: what a plain sum loses to opposing
        signs."""
        return 1.0 - _ratio(self.sum_energy, self.aligned_energy) if self.aligned_energy else 0.0

    @property
    def kept_fraction(self) -> Tensor:  # [E]
        return _divide(self.kept, self.size)

    @property
    def norm(self) -> Tensor:  # [E]
        return self.energy.sqrt()

    @property
    def cosine(self) -> Tensor:  # [E, E]
        return _divide(self.dot, self.norm[:, None] * self.norm)

    @property
    def pair_conflict_rate(self) -> Tensor:  # [E, E]
        return _divide(self.pair_conflicts, self.pair_overlap)

    def subspace_overlap(self, side: str = "output") -> Tensor:  # [E, E]
        """Mean over linears of |Ui^T Uj|_F^2 / min(rank), U the deltas' column (output) or row
        (input) space; singular values below 1e-6 of a delta's largest count as 0."""
        total = {"output": self.output_overlap, "input": self.input_overlap}[side]
        return _divide(total, self.pair_linears)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON; a value that does not exist is None."""
        return {
            "name": self.name,
            "linears": self.linears,
            "elements": self.elements,
            "threshold": [x if math.isfinite(x) else None for x in self.threshold.tolist()],
            "kept_fraction": self.kept_fraction.tolist(),
            "kept_energy_fraction": _divide(self.kept_energy, self.energy).tolist(),
            "tied": [int(x) for x in self.tied.tolist()],
            "norm": self.norm.tolist(),
            "overlap": int(self.overlap),
            "conflicts": int(self.conflicts),
            "sign_conflict_rate": self.sign_conflict_rate,
            "weighted_sign_conflict_rate": self.weighted_sign_conflict_rate,
            "cancelled_energy": self.cancelled_energy,
            "pair_sign_conflict_rate": self.pair_conflict_rate.tolist(),
            "dot": self.dot.tolist(),
            "cosine": self.cosine.tolist(),
            "output_subspace_overlap": self.subspace_overlap("output").tolist(),
            "input_subspace_overlap": self.subspace_overlap("input").tolist(),
            "update_norm": math.sqrt(float(self.update_energy)),
            "lost_update_fraction": _ratio(self.lost_updates, self.updates),
        }


def sum_reports(reports: Iterable[ConflictReport], name: str = "total") -> ConflictReport:
    """One report over several linears. Raises ValueError for no report or different numbers of
    experts."""
    parts = list(reports)
    if len({part.experts for part in parts}) != 1:
        raise ValueError(
            f"cannot sum {len(parts)} reports over {sorted({p.experts for p in parts})} experts"
        )
    total = ConflictReport.empty(name, parts[0].experts)
    for part in parts:
        for f in fields(ConflictReport):
            if f.name not in ("name", "threshold"):
                setattr(total, f.name, getattr(total, f.name) + getattr(part, f.name))
    if len(parts) == 1:
        total.threshold = parts[0].threshold.clone()
    return total


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if b else 0.0


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
