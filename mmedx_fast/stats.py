"""Intervals and paired tests for accuracies; deterministic, numpy only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.bool_]


class Estimate(NamedTuple):
    """A point estimate with its interval, in the unit of the values."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """``only_first`` / ``only_second``: questions only that model answered rightly; two-sided p."""

    only_first: int
    only_second: int
    p_value: float


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
        picks = generator.integers(0, array.size, (resamples, array.size))
        means += array[picks].mean(axis=1)
    low, high = _percentiles(means / len(arrays), confidence)
    return Estimate(float(np.mean([array.mean() for array in arrays])), low, high)


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
    only_first = int(((one == 1) & (two == 0)).sum())
    only_second = int(((one == 0) & (two == 1)).sum())
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    # Integers until the last step: 2**discordant overflows a float from 1,024 pairs on.
    p_value = min(1.0, (2 * tail) / (1 << discordant)) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)
