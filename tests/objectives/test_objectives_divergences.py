"""Coefficients of the projections: METHODS 4.4 items 5-8, 10 and 12."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
    autodiff_coefficients,
    coefficients,
    groups,
    in_float64,
    log_probs,
    small,
    target_log_probs,
    value,
)

from lpo_jax import objectives as O

# A later method adds one scalar function; these check the form c = P (g - sum P g) beyond the two KLs.
BY_SCALAR = [
    O.Divergence(
        "brier",
        "1/2 sum (P - w)^2",
        lambda log_p, log_w, inside: 0.5 * jnp.square(jnp.exp(log_p) - jnp.exp(log_w)).sum(-1),
    ),
    O.Divergence(
        "js",
        "Jensen-Shannon",
        lambda log_p, log_w, inside: (
            jnp.exp(log_p) * (log_p - jnp.logaddexp(log_p, log_w))
            + jnp.exp(log_w) * (log_w - jnp.logaddexp(log_p, log_w))
        ).sum(-1),
    ),
    O.Divergence(
        "logit-var",
        "1/2 Var (log P - log w)",
        lambda log_p, log_w, inside: 0.5 * (log_p - log_w).var(-1, where=inside),
    ),
]
ON_SIMPLEX = [O.divergence(n) for n in ("forward-kl", "reverse-kl", "forward-onpolicy")] + BY_SCALAR
EVERY = [*ON_SIMPLEX, O.divergence("pointwise")]


def named(divergences):
    return pytest.mark.parametrize("divergence", divergences, ids=lambda d: d.name)


@functools.partial(jax.jit, static_argnums=0)
def gradient_in_scores(divergence, s, log_w, mask=None):
    return jax.grad(lambda s: divergence.value(O.listwise_log_probs(s, mask), log_w).sum())(s)


def logs(case, tau=0.5):
    R, s, s_t = case
    return log_probs(s), target_log_probs(R, tau, s_t)


class CoefficientsTest(chex.TestCase):
    """The closed forms, written out in numpy, in float32, jitted and not."""

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.s, self.R = rng.standard_normal((3, 5)).astype(np.float32), rng.random((3, 5)).astype(np.float32)
        self.log_p, self.log_w = log_probs(self.s), target_log_probs(self.R, 0.3)
        self.p, self.w = np.exp(self.log_p), np.exp(self.log_w)

    @chex.variants(with_jit=True, without_jit=True)
    def test_forward_kl(self):
        c = self.variant(O.divergence("forward-kl").coefficients)(self.log_p, self.log_w)
        chex.assert_trees_all_close(c, self.p - self.w, atol=1e-6)
        chex.assert_shape(c, (3, 5))

    @chex.variants(with_jit=True, without_jit=True)
    def test_reverse_kl(self):
        c = self.variant(O.divergence("reverse-kl").coefficients)(self.log_p, self.log_w)
        d = self.s - self.R / 0.3
        chex.assert_trees_all_close(c, self.p * (d - (self.p * d).sum(-1, keepdims=True)), atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_forward_onpolicy(self):
        c = self.variant(O.divergence("forward-onpolicy").coefficients)(self.log_p, self.log_w)
        chex.assert_trees_all_close(c, 1 / 5 - self.w, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_pointwise(self):
        c = self.variant(O.divergence("pointwise").coefficients)(self.log_p, self.log_w)
        chex.assert_trees_all_close(c, -self.w, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_item_5_sums_in_float32(self):
        for divergence in ON_SIMPLEX:
            c = self.variant(divergence.coefficients)(self.log_p, self.log_w)
            chex.assert_trees_all_close(c.sum(-1), jnp.zeros(3), atol=2e-6)
        c = self.variant(O.divergence("pointwise").coefficients)(self.log_p, self.log_w)
        chex.assert_trees_all_close(c.sum(-1), -jnp.ones(3), atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_values_against_numpy(self):
        p, w = np.float64(self.p), np.float64(self.w)
        for name, expected in {
            "forward-kl": (w * np.log(w / p)).sum(-1),
            "reverse-kl": (p * np.log(p / w)).sum(-1),
            "forward-onpolicy": ((1 / 5 - w) * np.log(p)).sum(-1),
            "pointwise": -(w * np.log(p)).sum(-1),
        }.items():
            got = self.variant(O.divergence(name).value)(self.log_p, self.log_w)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@hypothesis.given(groups())
@small
@in_float64
def test_item_5_coefficients_sum_to_zero(case):
    log_p, log_w = logs(case)
    for divergence in ON_SIMPLEX:
        np.testing.assert_allclose(coefficients(divergence, log_p, log_w).sum(-1), 0, atol=1e-9)
    np.testing.assert_allclose(coefficients(O.divergence("pointwise"), log_p, log_w).sum(-1), -1, atol=1e-12)


@hypothesis.given(groups(spread=20), st.floats(1e-3, 10))
@small
@in_float64
def test_item_6_forward_coefficients_are_bounded(case, tau):
    log_p, log_w = logs(case, tau)
    c = coefficients(O.divergence("forward-kl"), log_p, log_w)
    total_variation = 0.5 * np.abs(np.exp(log_p) - np.exp(log_w)).sum(-1)
    np.testing.assert_allclose(np.abs(c).sum(-1), 2 * total_variation, atol=1e-12)
    assert (np.abs(c) <= 1).all() and (np.abs(c).sum(-1) <= 2 + 1e-12).all()
    assert (np.abs(coefficients(BY_SCALAR[0], log_p, log_w)) <= 1).all()  # Brier


@hypothesis.given(groups())
@small
@in_float64
def test_item_7_self_correction_and_descent(case):
    log_p, log_w = logs(case)
    for name in ("forward-kl", "reverse-kl"):
        divergence = O.divergence(name)
        np.testing.assert_allclose(coefficients(divergence, log_w, log_w), 0, atol=1e-12)
        np.testing.assert_allclose(value(divergence, log_w, log_w), 0, atol=1e-12)
        assert (value(divergence, log_p, log_w) >= -1e-12).all()
        # Along -c the log-ratio to the target shrinks: <c, log(P / w*)> >= 0.
        c = coefficients(divergence, log_p, log_w)
        assert ((c * (log_p - log_w)).sum(-1) >= -1e-12).all()
    # Forward KL raises exactly the responses that the target has more of.
    c = coefficients(O.divergence("forward-kl"), log_p, log_w)
    np.testing.assert_array_equal(c < 0, np.exp(log_w) > np.exp(log_p))
    # The controls do not correct themselves: at P = w* they still push.
    for name in ("forward-onpolicy", "pointwise"):
        at_target = coefficients(O.divergence(name), log_w, log_w)
        np.testing.assert_allclose(at_target, coefficients(O.divergence(name), log_p, log_w), atol=1e-12)


@named(ON_SIMPLEX)
def test_item_7_a_small_step_lowers_the_loss(divergence):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        s, log_w = rng.standard_normal((3, 5)), target_log_probs(rng.random((3, 5)), 0.3)
        before = value(divergence, log_probs(s), log_w)
        step = 1e-2 * coefficients(divergence, log_probs(s), log_w)
        assert (value(divergence, log_probs(s - step), log_w) < before).all()


@hypothesis.given(groups())
@small
@in_float64
def test_item_8_closed_forms_equal_their_autodiff_twins(case):
    """jax.grad of D(w*, softmax(s)) in s, and the generic form P (g - sum P g), and the closed form."""
    log_p, log_w = logs(case)
    for divergence in EVERY:
        c = coefficients(divergence, log_p, log_w)
        np.testing.assert_allclose(autodiff_coefficients(divergence, log_p, log_w), c, atol=1e-10)
        if divergence.through_softmax:
            np.testing.assert_allclose(gradient_in_scores(divergence, case[1], log_w), c, atol=1e-10)


@named(ON_SIMPLEX)
def test_item_8_surrogate_has_the_gradient_of_the_divergence_in_the_parameters(divergence):
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        features, log_w = rng.standard_normal((3, 5, 7)), target_log_probs(rng.random((3, 5)), 0.4)

        def scores(theta):
            return jnp.tanh(features @ theta)  # [P,K] some model

        def direct(theta):
            return divergence.value(O.listwise_log_probs(scores(theta)), log_w).sum()

        def surrogate(theta):
            s = scores(theta)
            c = divergence.coefficients(O.listwise_log_probs(s), log_w)
            return (jax.lax.stop_gradient(c) * s).sum()

        theta = rng.standard_normal(7)
        np.testing.assert_allclose(
            jax.jit(jax.grad(surrogate))(theta), jax.jit(jax.grad(direct))(theta), atol=1e-12
        )


@named(EVERY)
def test_invalid_responses_change_nothing(divergence):
    rng = np.random.default_rng(3)
    s, R = rng.standard_normal((3, 5)).astype(np.float32), rng.random((3, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]] * 3)
    s_padded, R_padded = (np.concatenate([x, np.full((3, 2), np.nan)], 1).astype(np.float32) for x in (s, R))
    alone = log_probs(s), target_log_probs(R, 0.3)
    padded = log_probs(s_padded, mask), target_log_probs(R_padded, 0.3, None, mask)
    np.testing.assert_allclose(value(divergence, *padded), value(divergence, *alone), rtol=1e-5, atol=1e-7)
    c = coefficients(divergence, *padded)
    np.testing.assert_allclose(c[:, :5], coefficients(divergence, *alone), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(c[:, 5:], 0)
    # The gradient through both functions is clean too.
    gradient = gradient_in_scores(divergence, s_padded, padded[1], mask)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 5:], 0)


@named([O.divergence(n) for n in ("forward-kl", "reverse-kl", "forward-onpolicy", "pointwise")])
def test_item_4_empty_and_single_groups(divergence):
    mask = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    log_p = log_probs(np.ones((3, 5), np.float32), mask)
    np.testing.assert_array_equal(value(divergence, log_p, log_p), 0)
    expected = -mask if divergence.name == "pointwise" else np.zeros((3, 5))
    np.testing.assert_array_equal(coefficients(divergence, log_p, log_p), expected)


def test_a_target_without_mass_on_a_response_is_fine_for_forward_kl():
    log_p, log_w = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[1.0, 0.0]]))
    forward, reverse = O.divergence("forward-kl"), O.divergence("reverse-kl")
    np.testing.assert_allclose(value(forward, log_p, log_w), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(coefficients(forward, log_p, log_w), [[-0.5, 0.5]], rtol=1e-6)
    assert value(reverse, log_p, log_w) > 1e20  # infinite, kept finite
    assert np.isfinite(coefficients(reverse, log_p, log_w)).all()


@in_float64
def test_item_10_first_order_gap_between_policy_gradient_and_reverse_kl():
    """rho A / K + c_rev = its expansion in s up to a quadratic remainder (LPO, proposition 1)."""
    rng = np.random.default_rng(4)
    K = 5
    A = rng.standard_normal((3, K))
    A -= A.mean(-1, keepdims=True)
    direction = rng.standard_normal((3, K))

    def remainder(size):
        s = size * direction
        gap = np.exp(s) * A / K
        gap += coefficients(O.divergence("reverse-kl"), log_probs(s), target_log_probs(A, 1.0))
        mean = s.mean(-1, keepdims=True)
        first = (s - mean) / K + mean * A / K + (s * A).sum(-1, keepdims=True) / K**2
        return np.abs(gap - first).max(), np.abs(first).max()

    (coarse, first), (fine, _) = remainder(2e-3), remainder(1e-3)
    assert 3.5 < coarse / fine < 4.5
    assert coarse < 0.05 * first


@hypothesis.given(groups(), st.floats(0.2, 3))
@small
@in_float64
def test_item_12_log_barrier_and_pinsker(case, tau):
    log_p, log_w = logs(case, tau)
    p, w = np.exp(log_p), np.exp(log_w)
    forward = value(O.divergence("forward-kl"), log_p, log_w)
    reverse = value(O.divergence("reverse-kl"), log_p, log_w)
    total_variation = 0.5 * np.abs(p - w).sum(-1)
    assert (total_variation <= np.sqrt(0.5 * np.minimum(forward, reverse).clip(0)) + 1e-9).all()
    # Corollary 2, with a = w*_k and D = KL(w* || P):
    # P_k >= a exp(-D / a) (1 - a)^((1 - a) / a) >= a exp(-D / a - 1).
    log_barrier = np.log(w) - forward[:, None] / w + (1 - w) / w * np.log1p(-w)
    assert (log_p >= log_barrier - 1e-9).all()
    assert (log_barrier >= np.log(w) - forward[:, None] / w - 1 - 1e-9).all()


@in_float64
def test_two_responses_are_logistic_regression():
    """LPO C.5: P = sigmoid(s_1 - s_0) against the soft label sigmoid((R_1 - R_0) / tau)."""
    s, R = np.array([[0.3, -0.9]]), np.array([[0.0, 1.0]])
    c = coefficients(O.divergence("forward-kl"), log_probs(s), target_log_probs(R, 0.5))
    slope = 1 / (1 + np.exp(1.2)) - 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(c, [[-slope, slope]], rtol=1e-12)


def test_unknown_divergence():
    with pytest.raises(ValueError, match=r"unknown divergence 'foward-kl'; did you mean 'forward-kl'\?"):
        O.divergence("foward-kl")
