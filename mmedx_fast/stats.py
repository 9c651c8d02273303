"""Intervals and paired tests for accuracies; deterministic, numpy only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_PICKS = 1 << 20
"""Resampled values that are in memory at a time."""

Values = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.bool_]


class Estimate(NamedTuple):
    """A point estimate with its interval, in the unit of the values."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """``only_first`` / ``only_second``: questions only that model answered rightly; two-sided p.

    ``p_value`` is exact, hence conservative; ``mid_p`` counts the observed split by half.
    """

    only_first: int
    only_second: int
    p_value: float
    mid_p: float


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")


def _checked(values: Values, what: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{what} has shape {array.shape}; give a non-empty one-dimensional sequence"
        )
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"{what}[{row}] is {array[row]}; drop or repair it before computing statistics"
        )
    return array


def wilson_interval(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson (1927) score interval of a proportion, within [0, 1]; (0, 1) if ``total`` is 0."""
    _check_confidence(confidence)
    if total < 0 or not 0 <= hits <= total:
        raise ValueError(f"{hits} hits of {total}: hits must lie between 0 and the total")
    if total == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    # At 0 and total the bound is 0 and 1 exactly; rounding must not move it.
    return (
        0.0 if hits == 0 else max(0.0, centre - half),
        1.0 if hits == total else min(1.0, centre + half),
    )


def bootstrap_interval(
    values: Values,
    statistic: Callable[[npt.NDArray[np.float64]], float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval of ``statistic`` (default: the mean) of ``values`` [n]."""
    _check_confidence(confidence)
    array = _checked(values, "values")
    generator = np.random.default_rng(seed)
    measure = statistic if statistic is not None else _mean
    draws = np.array(
        [
            measure(array[generator.integers(0, array.size, array.size)])
            for _ in range(_check_resamples(resamples))
        ]
    )
    low, high = _percentiles(draws, confidence)
    return Estimate(float(measure(array)), low, high)


def _check_resamples(resamples: int) -> int:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; give at least 1")
    return resamples


def _mean(array: npt.NDArray[np.float64]) -> float:
    return float(array.mean())


def _percentiles(draws: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)


def macro_average(
    groups: Mapping[str, Values],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean over groups of each group's mean, with a bootstrap interval stratified by group.

    ``groups`` maps a name to its values [n_g] (for an accuracy, 0 or 1 per question). Every group
    weighs the same, whatever its size; the order of the groups does not matter.
    """
    _check_confidence(confidence)
    if not groups:
        raise ValueError("macro_average needs at least one group, got none")
    arrays = [_checked(groups[name], f"group {name!r}") for name in sorted(groups)]
    generator = np.random.default_rng(seed)
    means = np.zeros(_check_resamples(resamples))
    for array in arrays:
        # In blocks of rows: all picks of a large group at once would take gigabytes.
        block = max(1, _PICKS // array.size)
        for first in range(0, resamples, block):
            rows = min(block, resamples - first)
            picks = generator.integers(0, array.size, (rows, array.size))
            means[first : first + rows] += array[picks].mean(axis=1)
    low, high = _percentiles(means / len(arrays), confidence)
    return Estimate(float(np.mean([array.mean() for array in arrays])), low, high)


def accuracy_interval(
    hits: int, total: int, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Percentile bootstrap interval of an accuracy, from its counts alone.

    A resample of ``total`` zeros and ones holds a binomial number of ones, so that drawing that
    number is the bootstrap itself, whatever ``total``. The interval shrinks to a point where all or
    none are hits: use :func:`wilson_interval` there.
    """
    return macro_accuracy(
        {"": (hits, total)}, confidence=confidence, resamples=resamples, seed=seed
    )


def macro_accuracy(
    counts: Mapping[str, tuple[int, int]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """:func:`macro_average` of accuracies given as (hits, total) by group, resampled within each."""
    _check_confidence(confidence)
    if not counts:
        raise ValueError("macro_accuracy needs at least one group, got none")
    generator = np.random.default_rng(seed)
    means, value = np.zeros(_check_resamples(resamples)), 0.0
    for name in sorted(counts):
        hits, total = counts[name]
        if not 0 <= hits <= total or total == 0:
            raise ValueError(
                f"group {name!r} has {hits} hits of {total}: give a positive total and hits within it"
            )
        means += generator.binomial(total, hits / total, resamples) / total
        value += hits / total
    low, high = _percentiles(means / len(counts), confidence)
    return Estimate(value / len(counts), low, high)


def mcnemar_exact(first: Values, second: Values) -> McNemar:
    """Exact two-sided McNemar test of two models on the same questions, in the same order.

    ``first`` and ``second`` [n] hold 0 or 1 per question. Under the null hypothesis the discordant
    questions fall to either model with probability 1/2 (McNemar 1947, exact binomial form).
    """
    one, two = _checked(first, "first"), _checked(second, "second")
    if one.size != two.size:
        raise ValueError(
            f"first has {one.size} questions and second {two.size}; pair them one to one"
        )
    for name, array in (("first", one), ("second", two)):
        odd = np.flatnonzero((array != 0) & (array != 1))
        if odd.size:
            raise ValueError(f"{name}[{odd[0]}] is {array[odd[0]]}; a McNemar test needs 0 or 1")
    return mcnemar_counts(
        int(((one == 1) & (two == 0)).sum()), int(((one == 0) & (two == 1)).sum())
    )


def mcnemar_counts(only_first: int, only_second: int) -> McNemar:
    """:func:`mcnemar_exact` from the discordant counts."""
    if min(only_first, only_second) < 0:
        raise ValueError(f"discordant counts {only_first} and {only_second}: none may be negative")
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    if discordant == 0:
        return McNemar(0, 0, 1.0, 1.0)
    term = tail = 1  # C(discordant, k) and its sum over k = 0..fewer
    for k in range(fewer):
        term = term * (discordant - k) // (k + 1)
        tail += term
    # Integers until the last step: 2**discordant overflows a float from 1,024 pairs on.
    whole = 1 << discordant
    return McNemar(
        only_first, only_second, min(1.0, (2 * tail) / whole), min(1.0, (2 * tail - term) / whole)
    )


def paired_interval(
    only_first: int,
    only_second: int,
    total: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Second's accuracy minus first's on ``total`` shared questions, with its paired bootstrap
    interval.

    Questions are resampled with both their outcomes: a resample holds a multinomial number of each
    of the two discordant kinds, which is drawn directly.
    """
    _check_confidence(confidence)
    if min(only_first, only_second) < 0 or only_first + only_second > total or total == 0:
        raise ValueError(
            f"{only_first} and {only_second} discordant of {total} questions: give counts within a "
            "positive total"
        )
    shares = np.array([only_first, only_second, total - only_first - only_second]) / total
    drawn = np.random.default_rng(seed).multinomial(total, shares, _check_resamples(resamples))
    low, high = _percentiles((drawn[:, 1] - drawn[:, 0]) / total, confidence)
    return Estimate((only_second - only_first) / total, low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given.

    Rejecting those at or under a level keeps the chance of any false rejection under that level.
    """
    for row, p in enumerate(p_values):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p_values[{row}] is {p}; a p-value lies between 0 and 1")
    adjusted, reached = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = reached
    return adjusted


def correlation(first: Values, second: Values) -> float:
    """Pearson's correlation of two columns [n], rows with a NaN left out; NaN if either is constant."""
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != two.shape or one.ndim != 1:
        raise ValueError(f"shapes {one.shape} and {two.shape}; give two columns of one length")
    both = np.isfinite(one) & np.isfinite(two)
    one, two = one[both], two[both]
    if one.size < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return math.nan
    return float(np.corrcoef(one, two)[0, 1])
