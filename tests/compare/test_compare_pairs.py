"""Intervals of paired differences: closed forms, and coverage of a known truth."""

import numpy as np
import pytest
import scipy

from lpo_jax.compare.table import estimate_mean, solved, variance_of_mean
from lpo_jax.evaluation.metrics import pass_at_k


def effects(rng, S, P, of_seeds, of_problems, of_both):
    """`[S, P]`: random effects of seeds, of problems, and of their interaction."""
    return (
        of_seeds * rng.normal(size=(S, 1))
        + of_problems * rng.normal(size=P)
        + of_both * rng.normal(size=(S, P))
    )


def test_the_variance_of_additive_effects_is_the_sum_of_both_parts():
    """a_s + b_p: var(a) / S + var(b) / P, exactly."""
    values = effects(np.random.default_rng(0), 5, 60, of_seeds=1.0, of_problems=3.0, of_both=0.0)
    a, b = values.mean(axis=1), values.mean(axis=0)
    variance, _ = variance_of_mean(values)
    assert variance == pytest.approx(a.var(ddof=1) / 5 + b.var(ddof=1) / 60)


@pytest.mark.parametrize(
    "parts,slack", [((1, 1, 1), 0.97), ((0, 0, 1), 1.0), ((0.3, 0.5, 1), 0.98), ((0, 1, 1), 0.985)]
)
def test_simulated_experiments_have_the_right_variance_and_coverage(parts, slack):
    rng, S, P = np.random.default_rng(1), 5, 100
    exact = parts[0] ** 2 / S + parts[1] ** 2 / P + parts[2] ** 2 / (S * P)
    experiments = [effects(rng, S, P, *parts) for _ in range(1000)]
    assert 0.9 <= np.mean([variance_of_mean(x)[0] for x in experiments]) / exact <= 1.45
    held = np.mean([of.low <= 0 <= of.high for of in map(estimate_mean, experiments)])
    assert 0.92 <= held <= slack


def test_with_one_problem_the_interval_is_students_over_seeds():
    x = np.array([0.3, 0.1, 0.25, 0.4, 0.2])
    of = estimate_mean(x[:, None])
    np.testing.assert_allclose(
        (of.low, of.high), scipy.stats.t.interval(0.95, 4, loc=x.mean(), scale=scipy.stats.sem(x))
    )
    assert of.mean == pytest.approx(0.25) and (of.wins, of.pairs) == (5, 5)


def test_with_equal_seeds_the_interval_is_students_over_problems():
    """All seeds agree, so only the problems vary."""
    x = np.random.default_rng(2).normal(1.0, 1.0, size=80)
    of = estimate_mean(np.stack([x, x, x]))
    np.testing.assert_allclose(
        (of.low, of.high), scipy.stats.t.interval(0.95, 79, loc=x.mean(), scale=scipy.stats.sem(x))
    )


def test_constant_values_have_an_interval_of_zero_width():
    of = estimate_mean(np.full((3, 4), 0.5))
    assert of.low == of.high == 0.5


def test_one_seed_has_no_interval():
    of = estimate_mean(np.array([[0.0, 1.0, 0.5]]))
    assert of.mean == 0.5 and np.isnan(of.low) and np.isnan(of.high)


def test_problems_with_nan_are_excluded():
    values = effects(np.random.default_rng(3), 3, 10, 0.1, 1.0, 0.1)
    values[1, 4] = np.nan
    assert estimate_mean(values) == estimate_mean(np.delete(values, 4, axis=1))
    assert np.isnan(estimate_mean(np.full((3, 2), np.nan)).mean)


def test_wins_counts_seeds_with_a_positive_mean():
    assert estimate_mean(np.array([[1.0, -3.0], [1.0, 1.0], [0.0, 0.0]])).wins == 1


def test_solved_is_pass_at_k_of_each_problem():
    passed, valid = np.array([[0, 1, 4], [2, 2, 1]]), np.array([[4, 4, 4], [4, 4, 1]])
    np.testing.assert_allclose(solved(passed, valid, 2), pass_at_k(valid, passed, 2))
    assert solved(passed, valid, 1)[0, 1] == 0.25 and np.isnan(solved(passed, valid, 2)[1, 2])
