"""Targets with exact zeros: METHODS 4.4 items 1, 2, 4, 7 and 11 for entmax, sparsemax and one-hot."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import K, batch, groups, in_float64, log_probs, on_host, run, small

from lpo_jax import objectives as O
from lpo_jax.objectives.targets import TARGETS, entmax_log_probs

ALPHAS = (1.2, 1.5, 2, 3)

# Every target with its name; entmax at several alphas.
EVERY = {**TARGETS, **{f"entmax({a})": lambda u, s, m, a=a: entmax_log_probs(u, s, m, a) for a in ALPHAS}}
every_target = on_host(lambda u, s_t, mask: {name: target(u, s_t, mask) for name, target in EVERY.items()})


def look(u, s_t=None, mask=None):
    """w* [P,K] by target."""
    u = np.asarray(u)
    s_t = np.zeros_like(u) if s_t is None else s_t
    mask = np.ones(u.shape, bool) if mask is None else mask
    return {name: np.exp(log_w) for name, log_w in every_target(u, s_t, mask).items()}


def projected(z):
    """The nearest point of the simplex, by sorting (Held, Wolfe and Crowder, 1974)."""
    ordered = -np.sort(-z, -1)
    excess = (np.cumsum(ordered, -1) - 1) / np.arange(1, z.shape[-1] + 1)
    size = (ordered > excess).sum(-1, keepdims=True)
    return np.maximum(z - np.take_along_axis(excess, size - 1, -1), 0)


def entmax15(z):
    """1.5-entmax of scores z, by sorting (Peters et al., 2019, appendix)."""
    z = z / 2
    ordered, k = -np.sort(-z, -1), np.arange(1, z.shape[-1] + 1)
    mean, square = np.cumsum(ordered, -1) / k, np.cumsum(ordered**2, -1) / k
    theta = mean - np.sqrt(np.maximum((1 - k * (square - mean**2)) / k, 0))
    size = (theta <= ordered).sum(-1, keepdims=True)
    return np.maximum(z - np.take_along_axis(theta, size - 1, -1), 0) ** 2


class TargetsTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_against_sorting(self):
        rng = np.random.default_rng(0)
        u, s_t = (rng.standard_normal((64, 5)).astype(np.float32) for _ in range(2))
        mask = np.ones((64, 5), bool)
        p_t = np.exp(log_probs(s_t))
        sparse = self.variant(TARGETS["sparsemax"])(u, s_t, mask)
        np.testing.assert_allclose(np.exp(sparse), projected(p_t + u / 5), atol=2e-6)
        on_policy = self.variant(TARGETS["entmax"])(u, None, mask)
        np.testing.assert_allclose(np.exp(on_policy), entmax15(u / np.sqrt(5)), atol=2e-6)
        assert (np.exp(sparse) == 0).any(-1).mean() > 0.2  # the case is one where zeros matter

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_hot(self):
        u = jnp.array([[0.5, 1.0, 1.0, 0.0], [2.0, 1.0, 3.0, 9.0]])
        s_t = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2], [0.4, 0.1, 0.3, 0.2]]))
        mask = jnp.array([[True] * 4, [True, True, True, False]])
        w = jnp.exp(self.variant(TARGETS["one-hot"])(u, s_t, mask))
        chex.assert_trees_all_close(w, jnp.array([[0, 0.25, 0.75, 0], [0, 0, 1, 0]]), atol=1e-6)


@hypothesis.given(groups(), st.floats(0.05, 5), st.floats(-5, 5), st.permutations(range(K)))
@small
@in_float64
def test_item_1_distributions_that_ignore_shifts_and_order(case, tau, shift, order):
    R, _, s_t = case
    found, order = look(R / tau, s_t), np.array(order)
    shifted, permuted = look(R / tau + shift, s_t + shift), look(R[:, order] / tau, s_t[:, order])
    for name, w in found.items():
        assert (w >= 0).all()
        np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-9, err_msg=name)
        if name != "one-hot":  # which sees a rounding error of the shift
            np.testing.assert_allclose(shifted[name], w, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(permuted[name], w[:, order], atol=1e-9, err_msg=name)


def test_item_1_padding_with_invalid_responses():
    rng = np.random.default_rng(1)
    u, s_t = rng.standard_normal((2, 3, 5)).astype(np.float32)
    mask = np.arange(7) < np.array([[5], [3], [0]])
    garbage = np.where(mask, np.pad(u, ((0, 0), (0, 2))), np.float32(np.nan))
    anchor = np.where(mask, np.pad(s_t, ((0, 0), (0, 2))), np.float32(np.inf))
    padded, whole = look(garbage, anchor, mask), look(u, s_t, mask[:, :5])
    for name, w in padded.items():
        np.testing.assert_allclose(w[:, :5], whole[name], atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(w[~mask], 0)
        np.testing.assert_allclose(w.sum(-1), [1, 1, 0], atol=1e-6, err_msg=name)


@hypothesis.given(groups(spread=1))
@small
@in_float64
def test_item_2_limits_of_the_temperature_and_order(case):
    R, _, s_t = case
    R = np.round(R, 1)
    p_t = np.exp(log_probs(s_t))
    best = np.where(R == R.max(-1, keepdims=True), p_t, 0)
    cold, hot, warm = look(R / 1e-9, s_t), look(R / 1e9, s_t), look(R / 0.5)
    for name in EVERY:
        if name == "one-hot":
            np.testing.assert_allclose(warm[name], (best > 0) / (best > 0).sum(-1, keepdims=True), atol=1e-12)
            continue
        np.testing.assert_allclose(hot[name], p_t, atol=1e-7, err_msg=name)
        # Each breaks ties in its own way; on ties of equal P_t all agree.
        np.testing.assert_array_equal(cold[name] > 1e-9, (best > 0) & (cold[name] > 1e-9), err_msg=name)
        above = R[:, :, None] > R[:, None, :]
        gap = warm[name][:, :, None] - warm[name][:, None, :]
        assert (gap[above] >= 0).all(), name
        assert (gap[above & (warm[name][:, :, None] > 0)] > 0).all(), name
        np.testing.assert_allclose(gap[R[:, :, None] == R[:, None, :]], 0, atol=1e-12, err_msg=name)


@in_float64
def test_item_2_a_high_temperature_means_the_same_to_all():
    """w* = (1 + u - mean u) / K to first order, so a temperature carries over from one target to another."""
    u = 1e-3 * np.random.default_rng(2).standard_normal((3, 5))
    for name, w in look(u).items():
        if name != "one-hot":
            np.testing.assert_allclose(5 * w - 1, u - u.mean(-1, keepdims=True), atol=1e-5, err_msg=name)


def test_item_4_groups_without_signal_and_without_scale():
    u = np.array([[3, 3, 3, 3, 3], [0, 1e30, -1e30, 1e30, 0], [-1e30, -1e30, 0, 0, -1e30]], np.float32)
    s_t = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    log_p = log_probs(s_t)
    for name, log_w in every_target(u, s_t, np.ones((3, 5), bool)).items():
        assert not np.isnan(log_w).any(), name
        np.testing.assert_array_equal(log_w[0], log_p[0], err_msg=name)  # exactly P_t
        np.testing.assert_allclose(np.exp(log_w).sum(-1), 1, rtol=1e-5)
        assert (np.exp(log_w[1:])[u[1:] < u[1:].max(-1, keepdims=True)] == 0).all(), name
    one = look(u, s_t, np.eye(3, 5, dtype=bool))
    for name, w in one.items():
        np.testing.assert_array_equal(w, np.eye(3, 5), err_msg=name)


@hypothesis.given(groups(spread=2), st.floats(0.05, 3), st.sampled_from(ALPHAS))
@small
@in_float64
def test_item_11_the_target_maximises_reward_within_its_distance(case, tau, alpha):
    """The optimality conditions of <w, u> - K^(a-1) D(w || P_t): one multiplier for all that get something."""
    R, _, s_t = case
    u, p_t, w = R / tau, np.exp(log_probs(s_t)), look(R / tau, s_t)[f"entmax({alpha})"]
    slope = u - K ** (alpha - 1) * (w ** (alpha - 1) - p_t ** (alpha - 1)) / (alpha - 1)
    top = slope.max(-1, keepdims=True)
    scale = 1 + np.abs(u).max()
    np.testing.assert_allclose(np.where(w > 1e-9, slope, top) / scale, top / scale + 0 * w, atol=1e-6)


@in_float64
def test_entmax_goes_from_softmax_to_sparsemax():
    rng = np.random.default_rng(4)
    u, s_t, mask = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), np.ones((3, 5), bool)
    found = look(u, s_t)
    np.testing.assert_array_equal(found["entmax"], found["entmax(1.5)"])
    np.testing.assert_array_equal(found["sparsemax"], found["entmax(2)"])
    near_one = np.exp(entmax_log_probs(u, s_t, mask, 1.001))
    np.testing.assert_allclose(near_one, found["softmax"], atol=2e-3)
    zeros = [(found[f"entmax({a})"] == 0).sum() for a in ALPHAS]
    assert zeros == sorted(zeros) and zeros[-1] > 0


@pytest.mark.parametrize("target", ["entmax", "sparsemax", "one-hot"])
def test_item_7_a_sparse_target_is_reached_and_then_left_alone(target):
    """Forward KL to it is finite, and its coefficient is P - w*."""
    stats, scored = batch(seed=3, off=0.1)
    objective = O.get("lpo-forward", target=target, temperature=0.1)
    view = jax.device_get(objective.listwise(stats, scored))
    assert (view.target == 0).any() and np.isfinite(run(objective, stats, scored)[0])
    np.testing.assert_allclose(view.coefficients, view.policy - view.target, atol=1e-6)
    at_target = O.divergence("forward-kl").coefficients(view.log_target, view.log_target)
    np.testing.assert_allclose(at_target, 0, atol=1e-6)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"target": "sparsmax"}, "did you mean 'sparsemax'?"),
        (
            {"target": "sparsemax", "divergence": "reverse-kl"},
            "'reverse-kl' is infinite where the target is 0",
        ),
        ({"target": "one-hot", "divergence": "jeffreys"}, "take target='softmax', or a divergence such as"),
        (
            {"target": "entmax", "divergence": "alpha", "alpha": -0.5},
            "'alpha' is infinite where the target is 0",
        ),
        ({"target_alpha": 2}, "target_alpha is for target='entmax' alone, got target='softmax'"),
        ({"alpha": 0.3}, "alpha is for divergence='alpha' alone, got divergence='forward-kl'"),
        ({"target": "entmax", "target_alpha": 1}, "target_alpha must be a number, 1.01 to 4, got 1"),
        ({"divergence": "alpha", "alpha": 3}, "alpha must be a number, -1 to 2, got 3"),
        ({"divergence": "foward-kl"}, "did you mean 'forward-kl'?"),
    ],
)
def test_options_that_cannot_be_or_would_change_nothing_are_refused(options, says):
    with pytest.raises(ValueError) as error:
        O.get("lpo-forward", **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_alphas_change_the_update():
    stats, scored = batch(seed=3, off=0.1)

    def gradient(**options):
        return run(O.get("lpo-forward", clip="none", **options), stats, scored)[2]

    for options, other in (
        ({"divergence": "alpha"}, {"alpha": 0.2}),
        ({"target": "entmax"}, {"target_alpha": 1.2}),
    ):
        assert np.abs(gradient(**options) - gradient(**options, **other)).max() > 1e-4
