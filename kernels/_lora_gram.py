"""How deltas lie to each other, from Gram matrices of their factors: inner products and subspace overlaps.

With D_e = s_e B_e A_e, <D_i, D_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T)). The left singular vectors of D_e
are B_e M_e and the right ones A_e^T N_e with small M_e, N_e that follow from the diagonal blocks, so that
|U_i^T U_j|_F = |M_i^T (B_i^T B_j) M_j|_F. Nothing of size [out, r] is made but one block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._lora_types import Experts, LoraFactors

# A Gram matrix in f64 resolves singular values down to about 1e-8 of the largest.
_RESOLVED = 1e-6
_BLOCK = 1 << 18  # bytes of the block of converted factors
# Beyond this rank (a whole delta as factors) experts are not padded to one rank: their Gram matrices would
# be mostly zeros, and eigenvectors of all of them take minutes.
_PADDED = 1024


def interference(experts: Experts) -> Tensor:
    """[3, E, E] f64 on the factors' device: inner products of the deltas, overlaps of their output and of
    their input spaces.

    The overlap is |U_i^T U_j|_F^2 / min(rank), with U the singular vectors of singular values above 1e-6
    of the largest; 0 for None and for a zero delta. At least one expert must not be None.
    """
    given = [e for e, f in enumerate(experts) if f is not None]
    factors = [f for f in experts if f is not None]
    device, dtype = factors[0].A.device, torch.float64
    rank = max(f.rank for f in factors)
    found = _pairwise(factors) if rank > _PADDED else _padded(factors, rank)
    whole = torch.zeros((3, len(experts), len(experts)), dtype=dtype, device=device)
    at = torch.tensor(given, device=device)
    whole[:, at[:, None], at] = found
    return whole


def _padded(factors: Sequence[LoraFactors], rank: int) -> Tensor:
    """[3, F, F] f64 of ``interference``, all factors padded to one rank: few and large products."""
    device, dtype = factors[0].A.device, torch.float64
    outputs = _gram([f.B for f in factors], rank)
    inputs = _gram([f.A.t() for f in factors], rank)
    scale = torch.tensor([f.scale for f in factors], dtype=dtype, device=device)
    left, right, ranks = _bases(_diagonal(outputs), _diagonal(inputs), scale)
    found = torch.zeros((3, len(factors), len(factors)), dtype=dtype, device=device)
    for i in range(len(factors)):
        found[0, i, : i + 1] = (outputs[i] * inputs[i]).sum((1, 2)) * scale[i] * scale[: i + 1]
        least = torch.minimum(ranks[i], ranks[: i + 1]).clamp(min=1)
        found[1, i, : i + 1] = _overlap(outputs[i], left, i) / least
        found[2, i, : i + 1] = _overlap(inputs[i], right, i) / least
    found += found.tril(-1).transpose(1, 2)
    return found


def _pairwise(factors: Sequence[LoraFactors]) -> Tensor:
    """[3, F, F] f64 of ``interference``, pair by pair, every factor at its own rank."""
    count = len(factors)
    found = torch.zeros((3, count, count), dtype=torch.float64, device=factors[0].A.device)
    bases = [_basis(_cross(f.B, f.B), _cross(f.A.t(), f.A.t()), f.scale) for f in factors]
    for i, f in enumerate(factors):
        for j, g in enumerate(factors[: i + 1]):
            output, input = _cross(g.B, f.B), _cross(g.A.t(), f.A.t())
            found[0, i, j] = (output * input).sum() * f.scale * g.scale
            least = max(1, min(bases[i][2], bases[j][2]))
            found[1, i, j] = (bases[j][0].t() @ (output @ bases[i][0])).square().sum() / least
            found[2, i, j] = (bases[j][1].t() @ (input @ bases[i][1])).square().sum() / least
    found += found.tril(-1).transpose(1, 2)
    return found


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """[r, s] f64 product X^T Y of X [n, r], Y [n, s], block by block."""
    rows = max(1, (_BLOCK << 8) // (8 * (x.shape[1] + y.shape[1])))
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], rows):
        of = slice(start, start + rows)
        total.addmm_(x.detach()[of].double().t(), y.detach()[of].double())
    return total


def _basis(b: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor, int]:
    """``_bases`` of one expert: M, N [r, rank] and the delta's rank. Of an identity the eigenvectors are
    known."""
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    values, vectors = (a.diagonal(), identity) if torch.equal(a, identity) else torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()
    if torch.equal(b, identity):
        squares, turn = values.clamp(min=0), identity
    else:
        squares, turn = torch.linalg.eigh(root.t() @ b @ root)
    real = (squares > squares[-1].clamp(min=0) * _RESOLVED**2) & (scale != 0)
    inverse = squares[real].rsqrt()
    left = (root @ turn)[:, real] * inverse
    return left, b @ left * inverse, int(real.sum())


def _gram(matrices: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Row i: [i + 1, rank, rank] f64 products X_j^T X_i for j <= i, of X [n, r] zero-padded to ``rank``."""
    count, length, device = len(matrices), matrices[0].shape[0], matrices[0].device
    rows = max(1, _BLOCK // (8 * count * rank))
    block = torch.zeros((min(rows, length), count, rank), dtype=torch.float64, device=device)
    grams = [
        torch.zeros(((i + 1) * rank, rank), dtype=torch.float64, device=device)
        for i in range(count)
    ]
    for start in range(0, length, rows):
        part = block[: min(rows, length - start)]
        for e, x in enumerate(matrices):
            part[:, e, : x.shape[1]] = x.detach()[start : start + len(part)]
        flat = part.flatten(1)
        for i, gram in enumerate(grams):
            gram.addmm_(flat[:, : (i + 1) * rank].t(), part[:, i])
    return [gram.view(-1, rank, rank) for gram in grams]


def _diagonal(grams: Sequence[Tensor]) -> Tensor:
    """[E, rank, rank]"""
    return torch.stack([row[-1] for row in grams])


def _bases(b: Tensor, a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M, N [E, rank, rank] with orthonormal B M and A^T N, zero in columns beyond the deltas' ranks [E]."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()[:, None]  # a = root root^T
    squares, turn = torch.linalg.eigh(root.transpose(1, 2) @ b @ root)
    least = squares[:, -1:].clamp(min=0) * _RESOLVED**2
    real = (squares > least) & (scale != 0)[:, None]
    inverse = torch.where(real, squares, 1.0).rsqrt() * real
    left = root @ turn * inverse[:, None]
    return left, b @ left * inverse[:, None], real.sum(1)


def _overlap(row: Tensor, basis: Tensor, i: int) -> Tensor:
    """[i + 1] squared norms of basis_j^T row_j basis_i."""
    inner = basis[: i + 1].transpose(1, 2) @ (row @ basis[i])
    return inner.square().sum((1, 2))
