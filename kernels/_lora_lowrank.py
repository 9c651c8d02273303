"""Low-rank algebra on LoRA factors: common bases, cores, truncation. Nothing of size [out, in] is
made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._lora_types import Experts, LoraFactors


def _rank_of(s: Tensor, rows: int, columns: int) -> int:
    """Numerical rank from singular values, as torch.linalg.matrix_rank decides it."""
    if s.numel() == 0 or float(s[0]) == 0:
        return 0
    return int((s > s[0] * max(rows, columns) * torch.finfo(s.dtype).eps).sum())


def truncated(
    left: Tensor, core: Tensor, right: Tensor, rank: int, dtype: torch.dtype
) -> tuple[LoraFactors, float]:
    """Best rank-``rank`` factors of left @ core @ right^T (orthonormal columns) and the share of
    its energy they keep.

    The singular values are split evenly between A and B; both are zero-padded to ``rank``.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    k = min(rank, len(s))
    root = s[:k].sqrt()
    a = torch.zeros((rank, right.shape[0]), dtype=torch.float64, device=core.device)
    b = torch.zeros((left.shape[0], rank), dtype=torch.float64, device=core.device)
    a[:k] = (vh[:k] * root[:, None]) @ right.t()
    b[:, :k] = left @ (u[:, :k] * root)
    energy = float(s.square().sum())
    kept = float(s[:k].square().sum()) / energy if energy > 0 else 1.0
    return LoraFactors(a.to(dtype), b.to(dtype)), kept


def lora_mean(
    experts: Experts, weights: Sequence[float] | None = None, rank: int | None = None
) -> tuple[LoraFactors, float]:
    """The weighted mean of the experts' deltas as a LoRA: truncated SVD through QR of the stacked
    factors.

    Args:
        experts: one entry per expert, None = a zero delta; ranks may differ.
        weights: one per expert, used as they are; None = 1 / E each.
        rank: of the result; None = the largest of the experts'.

    Returns:
        factors of exactly ``rank`` (zero-padded if the mean has less) with scale 1, in the dtype of
        the experts' A, and the share of the mean's energy (squared norm) they keep.

    Raises ValueError for no expert, other shapes or another number of weights.
    """
    given = [f for f in experts if f is not None]
    _same_shape(given)
    if weights is None:
        weights = [1.0 / len(experts)] * len(experts)
    if len(weights) != len(experts):
        raise ValueError(f"{len(weights)} weights for {len(experts)} experts")
    scaled = [
        w * f.scale * f.B.double() for w, f in zip(weights, experts, strict=True) if f is not None
    ]
    qb, rb = torch.linalg.qr(torch.cat(scaled, 1))
    qa, ra = torch.linalg.qr(torch.cat([f.A.double() for f in given]).t())
    rank = max(f.rank for f in given) if rank is None else rank
    return truncated(qb, rb @ ra.t(), qa, rank, given[0].A.dtype)


def core_factors(experts: Experts) -> tuple[Tensor, Tensor, list[LoraFactors | None]]:
    """Common bases Ub [out, p], Ua [in, q] (f64) and each expert's core Ub^T delta Ua as factors of
    a [p, q] matrix."""
    given = [f for f in experts if f is not None]
    _same_shape(given)
    left = _column_space(torch.cat([f.scale * f.B.double() for f in given], 1))
    right = _column_space(torch.cat([f.A.double() for f in given]).t())
    cores = [
        None if f is None else LoraFactors(f.A.double() @ right, left.t() @ f.B.double(), f.scale)
        for f in experts
    ]
    return left, right, cores


def _column_space(x: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, : max(1, _rank_of(s, *x.shape))]


def _same_shape(given: Sequence[LoraFactors]) -> None:
    shapes = {f.shape for f in given}
    if len(shapes) != 1:
        raise ValueError(
            f"the experts must change matrices of one shape, got {sorted(shapes) or 'no expert'}"
        )
