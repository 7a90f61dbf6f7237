"""Softmax over the group, temperature and target: METHODS 4.4 items 1-4, 11, 13, 14."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import groups, in_float64, log_probs, small, target_log_probs, temperature, value

from lpo_jax import objectives as O

RULES = ["grpo", "dr-grpo", "maxrl", 0.3]


def kl(a, b):
    return (a * (np.log(a) - np.log(b))).sum(-1)


class ListwiseLogProbsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_equals_numpy_over_the_valid(self):
        scores = np.array([[0.3, np.nan, -1.2, 2.0], [5.0, 1.0, np.inf, -np.inf]], np.float32)
        mask = np.array([[1, 0, 1, 1], [1, 1, 0, 0]])
        got = np.exp(self.variant(O.listwise_log_probs)(scores, mask))
        for row, s, m in zip(got, scores, mask.astype(bool)):
            e = np.exp(s[m])
            np.testing.assert_allclose(row[m], e / e.sum(), rtol=1e-6)
            np.testing.assert_array_equal(row[~m], 0)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_is_finite_and_zero_where_invalid(self):
        scores = jnp.array([[0.3, jnp.nan, -1.2], [jnp.nan, jnp.inf, 0.0]])
        mask = jnp.array([[True, False, True], [False, False, False]])

        def first(s):
            return jnp.where(mask, O.listwise_log_probs(s, mask), 0)[:, 0].sum()

        gradient = self.variant(jax.grad(first))(scores)
        p = jnp.exp(log_probs(scores, mask))[0]
        chex.assert_trees_all_close(gradient, jnp.array([[1 - p[0], 0, -p[2]], [0, 0, 0]]), atol=1e-6)

    def test_a_group_without_valid_responses_has_no_mass(self):
        log_p = log_probs(jnp.zeros((2, 3)), jnp.zeros((2, 3), bool))
        np.testing.assert_array_equal(np.exp(log_p), 0)

    def test_dtypes(self):
        assert log_probs(jnp.zeros((1, 2), jnp.bfloat16)).dtype == jnp.float32
        assert target_log_probs(jnp.array([[0, 1]]), 1).dtype == jnp.float32
        with jax.enable_x64(True):
            assert log_probs(np.zeros((1, 2))).dtype == jnp.float64
            assert temperature(np.ones((1, 2)), "grpo").dtype == jnp.float64


@hypothesis.given(groups(), st.sampled_from(RULES), st.floats(-5, 5))
@small
@in_float64
def test_item_1_distributions_that_ignore_shifts(case, rule, shift):
    R, s, s_t = case
    tau = temperature(R, rule)
    p, w = np.exp(log_probs(s)), np.exp(target_log_probs(R, tau, s_t))
    for x in (p, w):
        assert (x >= 0).all()
        np.testing.assert_allclose(x.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_probs(s + shift)), p, atol=1e-12)
    np.testing.assert_allclose(np.exp(target_log_probs(R + shift, tau, s_t)), w, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.exp(target_log_probs(R, tau, s_t + shift)), w, rtol=1e-9, atol=1e-12)


@hypothesis.given(groups(), st.sampled_from(RULES), st.randoms(use_true_random=False))
@small
@in_float64
def test_item_1_permutation_of_the_responses(case, rule, random):
    R, s, s_t = case
    order = random.sample(range(R.shape[1]), R.shape[1])
    tau, tau_permuted = temperature(R, rule), temperature(R[:, order], rule)
    np.testing.assert_allclose(tau_permuted, tau, rtol=1e-12)
    log_w = target_log_probs(R, tau, s_t)
    permuted = target_log_probs(R[:, order], tau_permuted, s_t[:, order])
    np.testing.assert_allclose(permuted, log_w[:, np.array(order)], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(
        log_probs(s[:, order]), log_probs(s)[:, np.array(order)], rtol=1e-9, atol=1e-12
    )


@hypothesis.given(
    groups(), st.sampled_from(RULES), st.sampled_from([0, 1]), st.sampled_from([np.nan, np.inf, -7.0])
)
@small
@in_float64
def test_item_1_padding_with_invalid_responses(case, rule, ddof, garbage):
    R, s, s_t = case
    padding = np.full((len(R), 2), garbage)
    mask = np.concatenate([np.ones_like(R), np.zeros_like(padding)], 1)

    def padded(x):
        return np.concatenate([x, padding], 1)

    tau = temperature(R, rule, ddof=ddof)
    tau_padded = temperature(padded(R), rule, mask, ddof=ddof)
    np.testing.assert_allclose(tau_padded, tau, rtol=1e-12)
    for got, alone in (
        (log_probs(padded(s), mask), log_probs(s)),
        (target_log_probs(padded(R), tau_padded, padded(s_t), mask), target_log_probs(R, tau, s_t)),
    ):
        np.testing.assert_allclose(got[:, : R.shape[1]], alone, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(np.exp(got[:, R.shape[1] :]), 0)


@hypothesis.given(groups())
@small
@in_float64
def test_item_2_limits_of_the_temperature_and_order(case):
    R, _, s_t = case
    p_t = np.exp(log_probs(s_t))
    np.testing.assert_allclose(np.exp(target_log_probs(R, 1e9, s_t)), p_t, atol=1e-8)
    # tau -> 0: P_t restricted to the best responses. Rewards are rounded so that a gap is at least 0.1.
    rounded = np.round(R, 1)
    best = np.where(rounded == rounded.max(-1, keepdims=True), p_t, 0)
    cold = np.exp(target_log_probs(rounded, 1e-6, s_t))
    np.testing.assert_allclose(cold, best / best.sum(-1, keepdims=True), atol=1e-9)
    # R_i > R_j with equal anchors: w_i > w_j. Equal rewards: equal w / P_t.
    w = np.exp(target_log_probs(rounded, 0.5))
    above = rounded[:, :, None] > rounded[:, None, :]
    assert (w[:, :, None] > w[:, None, :])[above].all()
    odds = np.exp(target_log_probs(rounded, 0.5, s_t)) / p_t
    ties = rounded[:, :, None] == rounded[:, None, :]
    np.testing.assert_allclose((odds[:, :, None] / odds[:, None, :])[ties], 1, rtol=1e-9)


@hypothesis.given(groups(), st.floats(0.1, 10), st.floats(-3, 3))
@small
@in_float64
def test_item_3_what_each_temperature_is_blind_to(case, a, b):
    R, _, s_t = case
    R = np.round(R, 2)  # a spread far above the floor, or none

    def target(rewards, rule):
        return np.exp(target_log_probs(rewards, temperature(rewards, rule), s_t))

    np.testing.assert_allclose(target(a * R + b, "grpo"), target(R, "grpo"), atol=1e-7)
    np.testing.assert_allclose(target(a * R, "maxrl"), target(R, "maxrl"), atol=1e-9)
    np.testing.assert_allclose(target(R + b, "dr-grpo"), target(R, "dr-grpo"), atol=1e-9)


def test_item_3_what_each_temperature_is_not_blind_to():
    R = np.array([[0.0, 0.0, 1.0, 0.5]])

    def target(rewards, rule):
        return np.exp(target_log_probs(rewards, temperature(rewards, rule)))

    assert np.abs(target(3 * R, "dr-grpo") - target(R, "dr-grpo")).max() > 0.05
    assert np.abs(target(R + 1, "maxrl") - target(R, "maxrl")).max() > 0.05


@pytest.mark.parametrize("ddof", [0, 1])
def test_temperature_against_numpy(ddof):
    R = np.array([[0.0, 0.0, 1.0, 0.5], [0.1, 1.0, 0.1, 0.0]])
    np.testing.assert_allclose(temperature(R, "grpo", ddof=ddof)[:, 0], R.std(-1, ddof=ddof), rtol=1e-6)
    np.testing.assert_allclose(temperature(R, "maxrl")[:, 0], R.mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(temperature(R, "dr-grpo"), np.ones((2, 1)))
    np.testing.assert_array_equal(temperature(R, 0.25), np.full((2, 1), 0.25))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_item_4_equal_rewards_leave_the_policy_where_it_is(rule, ddof):
    constants = np.array([0.0, 1.0, 0.1, -0.7, 1e30], np.float32)
    for R in (np.repeat(constants[:, None], 5, 1), constants[:, None]):  # groups of five, and of one
        s_t = np.linspace(-1, 1, R.size, dtype=np.float32).reshape(R.shape)
        tau = temperature(R, rule, ddof=ddof)
        assert np.isfinite(tau).all() and (tau > 0).all()
        np.testing.assert_array_equal(target_log_probs(R, tau, s_t), log_probs(s_t))
        np.testing.assert_array_equal(O.advantages(R, tau), 0)


@pytest.mark.parametrize("rule", RULES)
def test_item_4_extreme_rewards(rule):
    mixed, tiny, negative = [-1, 1, 0], [1e-30, 0, 0], [-3, -1, -2]
    R = np.array([[0, 1e30, 5], [-1e30, 1e30, 0], mixed, tiny, negative], np.float32)
    tau = temperature(R, rule)
    assert np.isfinite(tau).all() and (tau > 0).all()
    assert np.isfinite(O.advantages(R, tau)).all()
    w = np.exp(target_log_probs(R, tau))
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(w.argmax(-1), R.argmax(-1))


def test_item_4_sigma_of_huge_rewards_is_right():
    np.testing.assert_allclose(temperature(np.array([[0.0, 1e30]], np.float32), "grpo"), [[5e29]], rtol=1e-6)


def test_item_4_nothing_valid_and_temperature_zero():
    nothing = np.zeros((2, 3), bool)
    for rule in RULES:
        tau = temperature(np.full((2, 3), np.nan), rule, nothing)
        assert np.isfinite(tau).all() and (tau > 0).all()
        np.testing.assert_array_equal(
            np.exp(target_log_probs(np.full((2, 3), np.nan), tau, None, nothing)), 0
        )
    np.testing.assert_allclose(np.exp(target_log_probs(np.array([[0.0, 1.0, 1.0]]), 0.0)), [[0, 0.5, 0.5]])


@hypothesis.given(groups(), st.floats(0.1, 5))
@small
@in_float64
def test_item_11_jeffreys_identity_and_proposition_3(case, tau):
    R, s, s_t = case
    log_w, log_p, log_pt = target_log_probs(R, tau, s_t), log_probs(s), log_probs(s_t)
    w, p, p_t = np.exp(log_w), np.exp(log_p), np.exp(log_pt)
    gain = (w * R).sum(-1) - (p_t * R).sum(-1)
    np.testing.assert_allclose(gain, tau * (kl(w, p_t) + kl(p_t, w)), atol=1e-9)
    np.testing.assert_array_less(-gain, 1e-12)
    # Proposition 3: J(P) = -tau KL(P || w*) + tau log Z, so w* is the maximiser.
    J = (p * R).sum(-1) - tau * kl(p, p_t)
    log_Z = np.log((p_t * np.exp(R / tau)).sum(-1))
    np.testing.assert_allclose(
        J, -tau * value(O.divergence("reverse-kl"), log_p, log_w) + tau * log_Z, atol=1e-9
    )


@hypothesis.given(groups(), st.floats(0.1, 5))
@small
@in_float64
def test_item_11_theorem_2_bound(case, tau):
    R, s, s_t = case
    w, p, p_t = (np.exp(x) for x in (target_log_probs(R, tau, s_t), log_probs(s), log_probs(s_t)))
    tv = 0.5 * np.abs(p - w).sum(-1)
    bound = (p_t * R).sum(-1) + tau * (kl(w, p_t) + kl(p_t, w)) - 2 * np.abs(R).max(-1) * tv
    np.testing.assert_array_less(bound - (p * R).sum(-1), 1e-9)


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl"])
@in_float64
def test_item_13_exact_projection_converges_to_the_best_response(name):
    """pi_t ~ pi_0 exp(t R / tau); each projection is many descent steps along the coefficients."""
    R, tau = np.array([[0.0, 0.3, 1.0]]), 2.0
    log_pi0 = log_probs(np.array([[1.0, 0.2, -1.0]]))
    divergence = O.divergence(name)

    @jax.jit
    def project(s, log_w):
        step = lambda _, s: s - 2.0 * divergence.coefficients(O.listwise_log_probs(s), log_w)  # noqa: E731
        return jax.lax.fori_loop(0, 400, step, s)

    s, expected_reward = log_pi0, []
    for t in range(1, 7):
        s = project(s, target_log_probs(R, tau, s))
        np.testing.assert_allclose(log_probs(s), log_probs(log_pi0 + t * R / tau), atol=1e-6)
        expected_reward.append(float((np.exp(log_probs(s)) * R).sum()))
    assert (np.diff(expected_reward) > 0).all()


@hypothesis.given(groups(), st.floats(0.2, 3), st.floats(0.0, 3))
@small
@in_float64
def test_item_14_an_entropy_bonus_is_a_temperature(case, tau, gamma):
    """argmax <w,R> - tau KL(w || U) + gamma H(w) is softmax(R / (tau + gamma))."""
    R, s, _ = case
    K = R.shape[1]

    def J(w):
        log_w = np.log(w)
        return (w * R).sum(-1) - tau * (w * (log_w + np.log(K))).sum(-1) - gamma * (w * log_w).sum(-1)

    best = np.exp(target_log_probs(R, tau + gamma))
    other = np.exp(log_probs(s))
    for step in (1e-3, 1.0):
        mixed = (1 - step) * best + step * other
        lower = J(best) - J(mixed)
        np.testing.assert_allclose(lower, (tau + gamma) * kl(mixed, best), atol=1e-9)
        np.testing.assert_array_less(-lower, 1e-12)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"must be 'grpo', .* got 'grop'; did you mean 'grpo'\?"):
        temperature(np.ones((1, 2)), "grop")
    for bad in (0.0, -1.0, np.nan, np.inf, True):
        with pytest.raises(ValueError, match="a positive number, got"):
            temperature(np.ones((1, 2)), bad)
    with pytest.raises(ValueError, match=r"expected a number or \[P,1\]"):
        target_log_probs(np.ones((2, 2)), np.ones(2))
