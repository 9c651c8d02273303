"""Intervals and tests against closed forms, brute force and simulated coverage."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from mmedx_fast.stats import (
    accuracy_interval,
    bootstrap_interval,
    correlation,
    holm,
    macro_accuracy,
    macro_average,
    mcnemar_counts,
    mcnemar_exact,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "total"), [(1, 10), (5, 10), (9, 10), (83, 100), (400, 1000)])
def test_wilson_bounds_solve_the_score_equation(hits: int, total: int) -> None:
    z = 1.959963984540054
    for bound in wilson_interval(hits, total):
        assert abs(hits / total - bound) == pytest.approx(
            z * math.sqrt(bound * (1 - bound) / total)
        )


def test_wilson_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)
    assert low == 0.0 and 0.1 < high < 0.2
    low, high = wilson_interval(20, 20)
    assert high == 1.0 and 0.8 < low < 0.9


@pytest.mark.parametrize(("hits", "total"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(hits, total)


def test_wilson_covers_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(1)
    draws = rng.binomial(60, 0.3, 4000)
    bounds = {int(k): wilson_interval(int(k), 60) for k in np.unique(draws)}
    covered = np.mean([bounds[int(k)][0] <= 0.3 <= bounds[int(k)][1] for k in draws])
    assert 0.92 < covered < 0.98


def test_bootstrap_is_deterministic_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    first, again = bootstrap_interval(values), bootstrap_interval(values)
    assert first == again
    half = 1.96 * values.std(ddof=1) / 20
    assert first.value == pytest.approx(values.mean())
    assert first.low == pytest.approx(values.mean() - half, abs=0.03)
    assert first.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval(values, seed=1) != first
    median = bootstrap_interval(values, lambda a: float(np.median(a)), resamples=200)
    assert median.low < np.median(values) < median.high


def test_macro_average_weighs_groups_alike_and_ignores_their_order() -> None:
    groups = {"a": [1.0] * 9 + [0.0], "b": [0.0, 1.0] * 50}
    estimate = macro_average(groups)
    assert estimate.value == pytest.approx(0.7)
    assert estimate == macro_average(dict(reversed(groups.items())))
    spread = math.sqrt(0.9 * 0.1 / 10 + 0.5 * 0.5 / 100) / 2
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_macro_average_names_the_bad_group() -> None:
    with pytest.raises(ValueError, match="'empty'"):
        macro_average({"fine": [1.0], "empty": []})
    with pytest.raises(ValueError, match=r"'bad'\[1\] is nan"):
        macro_average({"bad": [1.0, math.nan]})


@pytest.mark.parametrize(("n_first", "n_second"), [(0, 5), (3, 3), (2, 7), (6, 1)])
def test_mcnemar_equals_the_enumeration_of_all_coin_flips(n_first: int, n_second: int) -> None:
    first = [1] * n_first + [0] * n_second + [1, 0, 1]
    second = [0] * n_first + [1] * n_second + [1, 0, 1]
    n = n_first + n_second
    seen = abs(n_first - n / 2)
    flips = itertools.product((0, 1), repeat=n)
    brute = np.mean([abs(sum(flip) - n / 2) >= seen for flip in flips])
    result = mcnemar_exact(first, second)
    assert result[:2] == (n_first, n_second)
    assert result.p_value == pytest.approx(float(brute))
    assert mcnemar_exact(second, first).p_value == result.p_value


def test_mcnemar_limits() -> None:
    assert mcnemar_exact([1, 0], [1, 0]).p_value == 1.0
    huge = mcnemar_exact(np.ones(3000), np.zeros(3000))
    assert huge.p_value == 0.0
    near = mcnemar_exact([1] * 1500 + [0] * 1400, [0] * 1500 + [1] * 1400)
    assert 0.04 < near.p_value < 0.1
    with pytest.raises(ValueError, match="pair them"):
        mcnemar_exact([1], [1, 0])
    with pytest.raises(ValueError, match=r"second\[0\] is 0.5"):
        mcnemar_exact([1], [0.5])


@pytest.mark.parametrize("only", [(0, 0), (0, 1), (3, 3), (4, 9), (12, 5), (40, 61), (700, 610)])
def test_mcnemar_and_mid_p_are_the_binomial_sums(only: tuple[int, int]) -> None:
    n, k = sum(only), min(only)
    below = sum(Fraction(math.comb(n, i), 2**n) for i in range(k))
    at = Fraction(math.comb(n, k), 2**n)
    found = mcnemar_counts(*only)
    assert found.p_value == pytest.approx(float(min(Fraction(1), 2 * (below + at))), rel=1e-12)
    assert found.mid_p == pytest.approx(float(2 * below + at), rel=1e-12)
    assert found.mid_p <= found.p_value and found == mcnemar_exact(
        [1] * only[0] + [0] * only[1] + [1], [0] * only[0] + [1] * only[1] + [1]
    )


def test_mcnemar_agrees_with_scipy_s_binomial_test() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for only in ((1, 0), (8, 21), (130, 97)):
        expected = scipy.binomtest(min(only), sum(only), 0.5).pvalue
        assert mcnemar_counts(*only).p_value == pytest.approx(expected, rel=1e-9)


def test_counts_give_the_bootstrap_of_the_values() -> None:
    values = [1.0] * 70 + [0.0] * 30
    counted, resampled = accuracy_interval(70, 100), bootstrap_interval(values, resamples=10_000)
    assert counted.value == resampled.value
    assert counted.low == pytest.approx(resampled.low, abs=0.011)  # a step of the 100
    assert counted.high == pytest.approx(resampled.high, abs=0.011)
    assert counted == accuracy_interval(70, 100)
    assert accuracy_interval(7001, 10007) != accuracy_interval(7001, 10007, seed=1)
    groups = {"a": [1.0] * 9 + [0.0], "b": [0.0, 1.0] * 50}
    macro = macro_accuracy({name: (int(sum(v)), len(v)) for name, v in groups.items()})
    for ours, theirs in zip(macro, macro_average(groups, resamples=10_000), strict=True):
        assert ours == pytest.approx(theirs, abs=0.01)
    with pytest.raises(ValueError, match="'empty' has 0 hits of 0"):
        macro_accuracy({"fine": (1, 2), "empty": (0, 0)})


def test_paired_interval_is_the_bootstrap_of_the_differences() -> None:
    differences = [1.0] * 30 + [-1.0] * 12 + [0.0] * 158
    paired = paired_interval(12, 30, 200)
    resampled = bootstrap_interval(differences, resamples=10_000)
    assert paired.value == pytest.approx(0.09) == resampled.value
    assert paired.low == pytest.approx(resampled.low, abs=0.006)
    assert paired.high == pytest.approx(resampled.high, abs=0.006)
    turned = paired_interval(30, 12, 200)
    assert turned.value == -paired.value and turned.high == pytest.approx(-paired.low, abs=0.006)
    assert paired_interval(0, 0, 5) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="9 and 3 discordant of 10"):
        paired_interval(9, 3, 10)


def test_holm_by_hand_and_by_its_closed_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]
    values = np.random.default_rng(4).uniform(size=12).round(2).tolist()
    for level in (0.01, 0.05, 0.2, 0.6):  # what the step-down procedure itself rejects
        rejected, left = set(), sorted(range(12), key=lambda i: values[i])
        while left and values[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected
    with pytest.raises(ValueError, match=r"p_values\[1\] is 1.5"):
        holm([0.1, 1.5])


def test_correlation_leaves_out_what_does_not_apply() -> None:
    first, second = [0.1, 0.9, math.nan, 0.4, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0]
    rows = [0, 1, 3, 4]
    expected = np.corrcoef(np.take(first, rows), np.take(second, rows))[0, 1]
    assert correlation(first, second) == pytest.approx(expected)
    assert math.isnan(correlation([0.5, 0.5], [0.0, 1.0])) and math.isnan(correlation([], []))
    with pytest.raises(ValueError, match="one length"):
        correlation([1.0], [1.0, 2.0])
