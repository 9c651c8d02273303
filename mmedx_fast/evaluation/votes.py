"""What several answers to one question say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Vote(NamedTuple):
    """``predicted``: the answer most given, None if none could be read; ``votes``: how often each was given;
    ``tie``: whether others were given as often; ``chosen``: the number of the answer that stands for the vote."""

    predicted: str | None
    votes: dict[str, int]
    tie: bool
    chosen: int


def majority_vote(predicted: Sequence[str | None], confidence: Sequence[float]) -> Vote:
    """The answer that most samples give; a sample without a readable answer abstains.

    ``confidence``: of each sample, its mean log-prob per token. Of answers given equally often the one whose
    samples are the more confident in the mean wins (a sum would favour short answers), then the one that was
    given first. The vote is represented by its most confident sample; by the first sample if none could be read.

    Raises ValueError for no samples, or lists of different lengths.
    """
    if not predicted or len(predicted) != len(confidence):
        raise ValueError(
            f"{len(predicted)} answers and {len(confidence)} confidences: give as many of both, at least one"
        )
    members: dict[str, list[int]] = {}
    for index, answer in enumerate(predicted):
        if answer is not None:
            members.setdefault(answer, []).append(index)
    if not members:
        return Vote(None, {}, False, 0)

    def rank(answer: str) -> tuple[int, float]:
        own = members[answer]
        return len(own), math.fsum(confidence[i] for i in own) / len(own)

    best = max(members, key=rank)  # the first of equals
    votes = {answer: len(own) for answer, own in members.items()}
    tie = sum(count == votes[best] for count in votes.values()) > 1
    return Vote(best, votes, tie, max(members[best], key=lambda i: confidence[i]))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, estimated without bias from ``n`` samples of
    which ``correct`` are: 1 - C(n - correct, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374)."""
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {correct} right among {n}: needs 0 <= right <= n and 1 <= k <= n"
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """The k for which pass@k of ``n`` samples is told: powers of two, and ``n``."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def of_row(row: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers of a prediction row: its samples, or the row itself where there is one answer."""
    samples: list[dict[str, Any]] = row.get("samples") or [row]
    return samples
