"""Coefficients of the projections: METHODS 4.4 items 5-10 and 12, for every divergence."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
    batch,
    coefficients,
    groups,
    in_float64,
    log_probs,
    run,
    small,
    target_log_probs,
    value,
)

from lpo_jax import objectives as O
from lpo_jax.objectives.divergences import alpha_divergence, bregman, f_divergence

# What a user may add: a function of the ratio, one of a probability, and one of both log-probs.
TRIANGLE = f_divergence("triangle", "sum (P - w)^2 / (P + w)", lambda t: (t - 1) ** 2 / (t + 1))
TSALLIS = bregman("tsallis", "of sum p^1.5", lambda p: p**1.5)
QUARTIC = O.Divergence(
    "quartic", "sum (P - w)^4", lambda p, w, inside: ((jnp.exp(p) - jnp.exp(w)) ** 4).sum(-1)
)

KNOWN = [d for n, d in O.DIVERGENCES.items() if n not in ("forward-onpolicy", "pointwise")]
F_DIVERGENCES = [O.divergence(n) for n in ("forward-kl", "reverse-kl", "jeffreys", "js", "hellinger", "chi2")]
F_DIVERGENCES += [alpha_divergence(a) for a in (-1.0, 1.7)] + [TRIANGLE]
BREGMAN = [O.divergence("brier"), O.divergence("itakura-saito"), TSALLIS]
# Divergences proper: 0 at the target and positive elsewhere.
PROPER = list(dict.fromkeys([*KNOWN, *F_DIVERGENCES, *BREGMAN, QUARTIC]))
ON_SIMPLEX = [*PROPER, O.divergence("forward-onpolicy")]
EVERY = [*ON_SIMPLEX, O.divergence("pointwise")]


@jax.jit
def every_divergence(s, log_w, mask=None):
    """(value, coefficients, autodiff, gradient in the scores) of each of `EVERY`: one program for all."""

    def look(divergence):
        def of_scores(s):
            return divergence.value(O.listwise_log_probs(s, mask), log_w).sum()

        log_p = O.listwise_log_probs(s, mask)
        return (
            divergence.value(log_p, log_w),
            divergence.coefficients(log_p, log_w),
            divergence.autodiff_coefficients(log_p, log_w),
            jax.grad(of_scores)(s),
        )

    return [look(divergence) for divergence in EVERY]


def look(case, tau=0.5):
    """`every_divergence` in numpy, by divergence, at the scores and rewards of a case."""
    R, s, s_t = case
    return dict(zip(EVERY, jax.device_get(every_divergence(s, target_log_probs(R, tau, s_t)))))


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

    @chex.variants(with_jit=True)
    def test_item_5_sums_in_float32(self):
        for name in ("forward-kl", "reverse-kl", "js", "brier", "logit-var", "forward-onpolicy"):
            c = self.variant(O.divergence(name).coefficients)(self.log_p, self.log_w)
            chex.assert_trees_all_close(c.sum(-1), jnp.zeros(3), atol=2e-6)
        c = self.variant(O.divergence("pointwise").coefficients)(self.log_p, self.log_w)
        chex.assert_trees_all_close(c.sum(-1), -jnp.ones(3), atol=1e-6)


@in_float64
def test_values_against_numpy():
    rng = np.random.default_rng(0)
    case = rng.random((3, 5)), rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
    p, w = (np.exp(x) for x in logs(case))
    m, d = (p + w) / 2, np.log(p / w)
    forward, reverse = w * np.log(w / p), p * np.log(p / w)
    expected = {
        "forward-kl": forward,
        "reverse-kl": reverse,
        "jeffreys": (forward + reverse) / 2,
        "js": 2 * (w * np.log(w / m) + p * np.log(p / m)),
        "alpha": 2 * (np.sqrt(p) - np.sqrt(w)) ** 2,
        "hellinger": 2 * (np.sqrt(p) - np.sqrt(w)) ** 2,
        "chi2": 0.5 * (p - w) ** 2 / p,
        "brier": 5 / 2 * (p - w) ** 2,
        "itakura-saito": (w / p - np.log(w / p) - 1) / 5,
        "logit-var": 0.5 * (d - d.mean(-1, keepdims=True)) ** 2 / 5,
        "forward-onpolicy": (1 / 5 - w) * np.log(p),
        "pointwise": -w * np.log(p),
        "triangle": (p - w) ** 2 / (p + w),
        "quartic": (p - w) ** 4,
    }
    of = look(case)
    mine = {divergence.name: divergence for divergence in (TRIANGLE, QUARTIC)}
    assert expected.keys() == O.DIVERGENCES.keys() | mine.keys()
    for name, terms in expected.items():
        got = of[(O.DIVERGENCES | mine)[name]][0]
        np.testing.assert_allclose(got, terms.sum(-1), rtol=1e-9, atol=1e-12, err_msg=name)


@hypothesis.given(groups())
@small
@in_float64
def test_item_5_coefficients_sum_to_zero(case):
    for divergence, (_, c, _, _) in look(case).items():
        total = -1 if divergence.name == "pointwise" else 0
        scale = np.maximum(1, np.abs(c).max())
        np.testing.assert_allclose(c.sum(-1) / scale, total, atol=1e-9, err_msg=divergence.name)


@hypothesis.given(groups(spread=20), st.floats(1e-3, 10))
@small
@in_float64
def test_item_6_coefficients_are_bounded(case, tau):
    log_p, log_w = logs(case, tau)
    c = coefficients(O.divergence("forward-kl"), log_p, log_w)
    total_variation = 0.5 * np.abs(np.exp(log_p) - np.exp(log_w)).sum(-1)
    np.testing.assert_allclose(np.abs(c).sum(-1), 2 * total_variation, atol=1e-12)
    assert (np.abs(c) <= 1).all()
    np.testing.assert_array_less(np.abs(c).sum(-1) - 2, 1e-12)
    # Brier is scaled by K to start like the others.
    assert (np.abs(coefficients(O.divergence("brier"), log_p, log_w)) <= c.shape[-1]).all()
    # P log(P / m) is at most log 2 from above, and no less than -1 / e from below: so of twice it, centred.
    assert (np.abs(coefficients(O.divergence("js"), log_p, log_w)) <= 2 * np.log(2) + 2 / np.e).all()


@hypothesis.given(groups())
@small
@in_float64
def test_item_7_self_correction_and_descent(case):
    R, s, s_t = case
    log_p, log_w = logs(case)
    at_target = dict(zip(EVERY, jax.device_get(every_divergence(np.array(log_w), log_w))))
    for divergence, (d, c, _, _) in look(case).items():
        d_target, c_target, _, _ = at_target[divergence]
        if divergence in PROPER:
            np.testing.assert_allclose(c_target, 0, atol=1e-12, err_msg=divergence.name)
            np.testing.assert_allclose(d_target, 0, atol=1e-12, err_msg=divergence.name)
            np.testing.assert_array_less(-d, 1e-12, err_msg=divergence.name)
        else:  # the controls do not correct themselves: at P = w* they still push
            np.testing.assert_allclose(c_target, c, atol=1e-12)
        if divergence in F_DIVERGENCES or divergence.name == "logit-var":
            # Along -c the log-ratio to the target shrinks: <c, log(P / w*)> >= 0.
            np.testing.assert_array_less(-(c * (log_p - log_w)).sum(-1), 1e-12, err_msg=divergence.name)
    # Forward KL raises exactly the responses that the target has more of.
    c = coefficients(O.divergence("forward-kl"), log_p, log_w)
    np.testing.assert_array_equal(c < 0, np.exp(log_w) > np.exp(log_p))


@in_float64
def test_item_7_a_small_step_lowers_the_loss():
    rng = np.random.default_rng(1)
    R, s, zeros = rng.random((3, 5)), rng.standard_normal((3, 5)), np.zeros((3, 5))
    before = look((R, s, zeros), 0.3)
    for divergence in ON_SIMPLEX:
        d, c, _, _ = before[divergence]
        after = value(divergence, log_probs(s - 1e-3 * c), target_log_probs(R, 0.3))
        assert (after < d).all(), divergence.name


@hypothesis.given(groups())
@small
@in_float64
def test_item_8_closed_forms_equal_their_autodiff_twins(case):
    """jax.grad of D(w*, softmax(s)) in s, and the generic form P (g - sum P g), and the closed form."""
    for divergence, (_, c, autodiff, gradient) in look(case).items():
        scale = np.maximum(1, np.abs(c).max())
        np.testing.assert_allclose(autodiff / scale, c / scale, atol=1e-10, err_msg=divergence.name)
        if divergence.through_softmax:
            np.testing.assert_allclose(gradient / scale, c / scale, atol=1e-10, err_msg=divergence.name)


@in_float64
def test_item_8_surrogate_has_the_gradient_of_the_divergence_in_the_parameters():
    rng = np.random.default_rng(2)
    features, log_w = rng.standard_normal((3, 5, 7)), target_log_probs(rng.random((3, 5)), 0.4)

    def both(theta, divergence):
        def scores(theta):
            return jnp.tanh(features @ theta)  # [P,K] some model

        def direct(theta):
            return divergence.value(O.listwise_log_probs(scores(theta)), log_w).sum()

        def surrogate(theta):
            s = scores(theta)
            c = divergence.coefficients(O.listwise_log_probs(s), log_w)
            return (jax.lax.stop_gradient(c) * s).sum()

        return jax.grad(direct)(theta), jax.grad(surrogate)(theta)

    theta = rng.standard_normal(7)
    for divergence, (direct, surrogate) in zip(
        ON_SIMPLEX, jax.jit(lambda theta: [both(theta, d) for d in ON_SIMPLEX])(theta)
    ):
        np.testing.assert_allclose(surrogate, direct, rtol=1e-9, atol=1e-12, err_msg=divergence.name)


def test_invalid_responses_change_nothing():
    rng = np.random.default_rng(3)
    s, R = rng.standard_normal((3, 5)).astype(np.float32), rng.random((3, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]] * 3)
    s_padded, R_padded = (np.concatenate([x, np.full((3, 2), np.nan)], 1).astype(np.float32) for x in (s, R))
    alone = every_divergence(s, target_log_probs(R, 0.3))
    padded = every_divergence(s_padded, target_log_probs(R_padded, 0.3, None, mask), mask)
    for divergence, (d, c, _, gradient), (d2, c2, _, gradient2) in zip(
        EVERY, *jax.device_get((alone, padded))
    ):
        np.testing.assert_allclose(d2, d, rtol=1e-5, atol=1e-6, err_msg=divergence.name)
        for x, x2 in ((c, c2), (gradient, gradient2)):
            np.testing.assert_allclose(x2[:, :5], x, rtol=1e-4, atol=1e-6, err_msg=divergence.name)
            np.testing.assert_array_equal(x2[:, 5:], 0)  # and clean: no NaN came through


def test_item_4_empty_and_single_groups():
    mask = np.eye(3, 7, dtype=int)[[0, 2, 2]]
    mask[0] = 0
    ones = np.ones((3, 7), np.float32)
    for divergence, (d, c, _, _) in zip(
        EVERY, jax.device_get(every_divergence(ones, log_probs(ones, mask), mask))
    ):
        np.testing.assert_allclose(d, 0, atol=1e-6, err_msg=divergence.name)
        expected = -mask if divergence.name == "pointwise" else 0 * mask
        np.testing.assert_array_equal(c, expected, err_msg=divergence.name)


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


@in_float64
def test_item_9_on_policy_every_divergence_starts_as_the_policy_gradient():
    """c = -A / K for a high temperature, so that a learning rate carries over. QUARTIC is flat there, not scaled."""
    rng = np.random.default_rng(5)
    R, zeros, tau = rng.random((3, 5)), np.zeros((3, 5)), 1e3
    A = (R - R.mean(-1, keepdims=True)) / tau
    for divergence, (_, c, _, _) in look((R, zeros, zeros), tau).items():
        if divergence.through_softmax and divergence is not QUARTIC:
            np.testing.assert_allclose(c, -A / 5, atol=2e-3 * np.abs(A / 5).max(), err_msg=divergence.name)
    # At any temperature, a Bregman divergence starts as forward KL, and two others as reverse KL.
    of = {divergence.name: c for divergence, (_, c, _, _) in look((R, zeros, zeros), 0.2).items()}
    for divergence in BREGMAN:
        np.testing.assert_allclose(of[divergence.name], of["forward-kl"], atol=1e-12)
    np.testing.assert_allclose(of["logit-var"], -A * tau / 0.2 / 5, atol=1e-12)
    np.testing.assert_allclose(of["reverse-kl"], of["logit-var"], atol=1e-12)


@hypothesis.given(groups())
@small
@in_float64
def test_item_9_copg_pairs_are_k_squared_logit_variances(case):
    R, s, s_t = case
    d = s - R / 0.5 - s_t
    pairs = 0.5 * (d[:, :, None] - d[:, None, :]) ** 2  # each pair in both orders
    got = look(case)[O.divergence("logit-var")][0]
    np.testing.assert_allclose(pairs.sum((1, 2)) / 2, 5**2 * got, rtol=1e-9, atol=1e-9)


@in_float64
def test_the_alpha_family_joins_the_others():
    rng = np.random.default_rng(6)
    log_p, log_w = log_probs(rng.standard_normal((3, 5))), log_probs(rng.standard_normal((3, 5)))

    def same(a, b, atol=1e-9):
        np.testing.assert_allclose(value(a, log_p, log_w), value(b, log_p, log_w), atol=atol)
        np.testing.assert_allclose(coefficients(a, log_p, log_w), coefficients(b, log_p, log_w), atol=atol)

    same(alpha_divergence(2), O.divergence("chi2"))
    same(alpha_divergence(0.5), O.divergence("hellinger"))
    assert alpha_divergence(0) is O.divergence("reverse-kl") and alpha_divergence(1) is O.divergence(
        "forward-kl"
    )
    same(alpha_divergence(1e-5), O.divergence("reverse-kl"), atol=1e-4)
    same(alpha_divergence(1 - 1e-5), O.divergence("forward-kl"), atol=1e-4)
    # D_a(w || P) = D_(1-a)(P || w)
    np.testing.assert_allclose(
        value(alpha_divergence(-1), log_p, log_w), value(alpha_divergence(2), log_w, log_p), rtol=1e-9
    )


@in_float64
def test_entropy_generates_forward_kl_in_both_families():
    rng = np.random.default_rng(7)
    log_p, log_w = log_probs(rng.standard_normal((3, 5))), log_probs(rng.standard_normal((3, 5)))
    for mine in (
        f_divergence("mine", "", lambda t: 3 * t * jnp.log(t) + 5 * (t - 1) + 2),
        bregman("mine", "", lambda p: 3 * p * jnp.log(p) + 5 * p),
    ):
        np.testing.assert_allclose(value(mine, log_p, log_w), value(O.divergence("forward-kl"), log_p, log_w))
        np.testing.assert_allclose(
            coefficients(mine, log_p, log_w), np.exp(log_p) - np.exp(log_w), atol=1e-12
        )


def test_item_4_far_from_the_target_everything_stays_finite():
    """float32; P leaves a response by 300 nats, and the target is one response, or nearly, or all."""
    s = np.array([[0, -300, 300, 0, 1], [0, 0, 0, 0, -80], [0, 5, -50, 90, 0]], np.float32)
    best = np.eye(5, dtype=np.float32)[[0, 4, 1]]
    one_hot, gibbs = log_probs(np.zeros_like(s), best), target_log_probs(best, 1e-30)
    for name, log_w in {"one-hot": one_hot, "cold": gibbs, "uniform": log_probs(np.zeros_like(s))}.items():
        for divergence, found in zip(EVERY, jax.device_get(every_divergence(s, log_w))):
            if divergence.full_support and name == "one-hot":
                continue
            d, c, _, _ = found
            assert np.isfinite(d).all() and np.isfinite(c).all(), (divergence.name, name)
            if name == "uniform" and divergence.name in ("forward-kl", "chi2", "itakura-saito"):
                assert c[0, 1] < 0, divergence.name  # called back, however far it went


@pytest.mark.parametrize("mine", [TRIANGLE, TSALLIS, QUARTIC], ids=lambda d: d.name)
def test_a_divergence_of_ones_own_is_an_option(mine):
    stats, scored = batch(seed=3, off=0.1)
    objective = O.get("lpo-forward", divergence=mine, clip="none")
    assert (
        objective == O.get("lpo-forward", divergence=mine, clip="none") != O.get("lpo-forward", clip="none")
    )
    loss, _, gradient = run(objective, stats, scored)
    view = objective.listwise(stats, scored)
    np.testing.assert_allclose(loss, value(mine, view.log_policy, view.log_target).mean(), rtol=1e-5)
    c = coefficients(mine, view.log_policy, view.log_target)[..., None]
    np.testing.assert_allclose(gradient, objective.token_weights(scored.mask) * c, rtol=1e-4, atol=1e-8)
    assert np.abs(gradient).max() > 1e-6


def test_unknown_divergence():
    with pytest.raises(ValueError, match=r"unknown divergence 'foward-kl'; did you mean 'forward-kl'\?"):
        O.divergence("foward-kl")
