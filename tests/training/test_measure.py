"""Metrics of rollouts that are computed on the host."""

import numpy as np

from lpo_jax.training.measure import repeated_share


def by_counting(tokens, n=4):
    """Share of the n-token sequences of one response that occurred before in it."""
    seen = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return (len(seen) - len(set(seen))) / len(seen)


def test_repeated_share_equals_counting():
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 2, (3, 4, 24)), rng.integers(4, 25, (3, 4))
    expected = np.mean([by_counting(tokens[p, k, : lengths[p, k]]) for p, k in np.ndindex(3, 4)])
    np.testing.assert_allclose(repeated_share(tokens, lengths), expected, rtol=1e-12)
    assert 0.1 < expected < 0.9


def test_short_responses_do_not_count():
    tokens = np.zeros((1, 2, 8), int)
    assert repeated_share(tokens, np.array([[3, 8]])) == 0.8
    assert (
        repeated_share(tokens, np.array([[3, 2]]))
        == 0.0
        == repeated_share(tokens[..., :3], np.array([[3, 3]]))
    )
