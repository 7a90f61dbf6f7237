"""pass@k against enumeration, its intervals against simulation."""

import itertools
import json

import numpy as np
import pytest

from lpo_jax.evaluation import metrics as M


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        draws = list(itertools.combinations(samples, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert M.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_for_extreme_arguments():
    c = np.arange(5)
    np.testing.assert_allclose(M.pass_at_k(4, c, 1), c / 4)
    # For k = n pass@k is 1 if any sample passes. Drawing with replacement would give 0.684 for one of four.
    np.testing.assert_array_equal(M.pass_at_k(4, c, 4), [0.0, 1.0, 1.0, 1.0, 1.0])


def test_pass_at_k_is_vectorised_and_stable():
    n, c = np.array([[3, 10], [2000, 2]]), np.array([[1, 0], [1, 2]])
    np.testing.assert_allclose(M.pass_at_k(n, c, 3), [[1.0, 0.0], [3 / 2000, np.nan]], rtol=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_rejects_invalid_arguments(n, c, k):
    with pytest.raises(ValueError):
        M.pass_at_k(n, c, k)


def test_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.5, 1.5, (300, 60))  # true mean 0.25; half of the problems are almost never solved
    values = rng.binomial(4, difficulty) / 4
    intervals = [M.bootstrap_interval(row, n_boot=400, seed=index) for index, row in enumerate(values)]
    coverage = np.mean([low <= 0.25 <= high for low, high in intervals])
    assert 0.90 <= coverage <= 0.98
    widths = np.array([high - low for low, high in intervals])
    expected = 2 * 1.96 * values.std(axis=1) / np.sqrt(60)
    np.testing.assert_allclose(widths.mean(), expected.mean(), rtol=0.05)


def test_interval_of_equal_values_has_width():
    # Without a success on 24 problems the interval is the Clopper-Pearson bound, not [0, 0].
    assert M.bootstrap_interval(np.zeros(24)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 24)))
    assert M.bootstrap_interval(np.ones(24)) == (pytest.approx(0.025 ** (1 / 24)), 1.0)
    low, high = M.bootstrap_interval([0.5])
    assert low < 0.05 and high > 0.95  # one problem gives almost no information
    low, high = M.bootstrap_interval(np.zeros(24), low=-1.0)
    assert low == pytest.approx(-high) and 0.1 < high < 0.2


def test_interval_is_seeded_and_leaves_the_global_generator_alone():
    values = np.random.default_rng(1).random(30)
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    first, again, other = (M.bootstrap_interval(values, seed=seed) for seed in (3, 3, 4))
    M.summarise(values[:, None] > 0.5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert first == again != other


def test_interval_in_blocks_equals_one_block(monkeypatch):
    values = np.random.default_rng(2).random(50)
    whole = M.bootstrap_interval(values, n_boot=500)
    monkeypatch.setattr(M, "_BLOCK", 50 * 64)  # 500 resamples in blocks of 64; the last block is smaller
    assert M.bootstrap_interval(values, n_boot=500) == whole


def test_summarise_counts_every_problem_once():
    outcomes = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    summary = M.summarise(outcomes, ks=[4, 1])
    assert summary["ks"] == [1, 4]
    assert (summary["problems"], summary["samples"], summary["samples_per_problem"]) == (3, 12, 4)
    assert summary["mean"] == summary["pass@1"]["mean"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert summary["pass@4"]["mean"] == pytest.approx(2 / 3)
    for k in (1, 4):
        score = summary[f"pass@{k}"]
        assert score["ci_low"] < score["mean"] < score["ci_high"]
        assert score["problems"] == 3
    assert json.loads(json.dumps(summary)) == summary


def test_summarise_masks_samples_whose_verifier_failed():
    outcomes = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    valid = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    summary = M.summarise(outcomes, valid, ks=[1, 2, 4])
    assert (summary["samples"], summary["invalid_samples"]) == (6, 6)
    # A verifier failure is not a wrong answer: problem 2 counts 1 of 2 samples, problem 3 none.
    assert summary["pass@1"]["mean"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert [summary[f"pass@{k}"]["problems"] for k in (1, 2, 4)] == [2, 2, 1]
    nothing = M.summarise(outcomes, np.zeros_like(valid))
    assert np.isnan([nothing["mean"], nothing["pass@1"]["mean"], nothing["pass@1"]["ci_low"]]).all()
    assert nothing["pass@1"]["problems"] == 0


def test_summarise_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        M.summarise(np.zeros((2, 4)), ks=[8])
    with pytest.raises(ValueError, match="flags"):
        M.summarise(np.array([[0.1, 1.0]]))
    with pytest.raises(ValueError, match=r"\[P, N\]"):
        M.summarise(np.zeros((2, 4)), np.ones((2, 3)))


def test_paired_difference_cancels_the_difficulty_of_problems():
    rng = np.random.default_rng(0)
    easy = np.arange(40) < 20  # half of the problems are always solved, before and after
    before = np.tile(easy[:, None], (1, 4))
    after = before | (rng.random((40, 4)) < 0.15)
    change = M.paired_difference(before, after)["pass@1"]
    scores = [M.summarise(flags)["pass@1"] for flags in (before, after)]
    assert change["mean"] == pytest.approx(scores[1]["mean"] - scores[0]["mean"])
    assert (
        change["ci_low"] > 0
    )  # significant in pairs, although each score alone is uncertain by more than the change
    assert scores[1]["ci_low"] < scores[0]["ci_high"]


def test_paired_difference_uses_problems_valid_on_both_sides():
    before, after = np.array([[0, 0], [1, 1], [0, 1]]), np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    valid_after = np.array([[1, 1, 1], [0, 0, 0], [1, 1, 1]], bool)
    change = M.paired_difference(before, after, valid_after=valid_after, ks=[1, 2])
    assert change["pass@1"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert change["pass@2"]["mean"] == pytest.approx((1 + 0) / 2)
    assert change["pass@1"]["problems"] == 2
    same = M.paired_difference(before, before)["pass@1"]
    assert same["mean"] == 0 and same["ci_low"] == pytest.approx(-same["ci_high"]) and same["ci_high"] > 0.5
    with pytest.raises(ValueError, match="same problems"):
        M.paired_difference(before, after[:2])


def test_mean_score_of_passes_is_pass_at_1():
    rng = np.random.default_rng(3)
    passed, valid = rng.random((20, 4)) < 0.4, rng.random((20, 4)) < 0.9
    expected = M.summarise(passed, valid, ks=[1], seed=5)["pass@1"]
    found = M.mean_score(passed.astype(float), valid, seed=5)
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-12)


def test_mean_score_weighs_problems_equally_and_masks():
    scores = np.array([[4.0, 100.0], [1.0, 3.0], [9.0, 9.0]])
    valid = np.array([[True, False], [True, True], [False, False]])
    found = M.mean_score(scores, valid)
    assert found["mean"] == 3.0 and found["problems"] == 2 and found["ci_low"] <= 3.0 <= found["ci_high"]
    after = np.array([[5.0], [3.0], [9.0]])
    change = M.score_difference(scores, after, valid, np.ones((3, 1), bool))
    assert change["mean"] == 1.0 and change["problems"] == 2
