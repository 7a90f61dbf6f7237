"""What a response is worth: baselines, temperatures, shaped rewards, selections, biases and prompt weights, against
numpy (METHODS 4.4 items 1, 3, 4, 18, 20).

One shape and mostly one precision: unjitted operations are compiled once for each.
"""

import itertools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from objective_cases import (
    full_batch,
    in_float64,
    on_host,
    put,
    small,
)

from lpo_jax import objectives as O
from lpo_jax.objectives import advantage, shaping, weights
from lpo_jax.objectives.simplex import masked_median
from lpo_jax.objectives.targets import SCALES

RULES = [rule for rule in SCALES if rule != "grpo"]
ALL = np.ones((3, 4), bool)
temperature = on_host(O.temperature, static_argnames=("rule", "ddof", "floor"))


def context_of(stats, scored):
    """What the parts of a method get to see, of a batch whose valid rewards are finite."""
    scored = jax.tree.map(jnp.asarray, scored)
    tokens = scored.mask & scored.valid[..., None]
    delta = jnp.where(tokens, stats.logp - scored.behaviour_logp, 0)
    return O.Context(jnp.where(scored.valid, scored.rewards, 0), scored.valid, tokens, delta, stats, scored)


def ragged(seed=0, **changes):
    """The context of a full batch in which one response of the second group is invalid, its reward not a number."""
    stats, scored = full_batch(seed, off=0.3)
    valid = put(ALL, np.s_[1, 1], False)
    scored = scored.replace(valid=valid, rewards=np.where(valid, scored.rewards, np.float32(np.nan)))
    return context_of(stats, scored.replace(**changes))


def in_numpy(context):
    """(rewards, valid, lengths, passed)."""
    return jax.device_get((context.rewards, context.valid, context.lengths, context.passed))


# --- what a reward is compared to

CENTRE_TWINS = {
    "mean": lambda R: R - R.mean(),
    "none": lambda R: R,
    "loo": lambda R: np.array([R[k] - np.delete(R, k).mean() for k in range(len(R))]),
    "median": lambda R: R - np.median(R),
    "runner-up": lambda R: np.where(R.argmax() == np.arange(len(R)), R.max() - np.sort(R)[-2], 0),
}


@pytest.mark.parametrize("centre", CENTRE_TWINS)
def test_centres_against_numpy(centre):
    context = ragged()
    u, tau = advantage.Advantage(temperature=0.5, centre=centre)(context)
    R, valid, *_ = in_numpy(context)
    for r, v, got in zip(R, valid, np.asarray(u)):
        np.testing.assert_allclose(got[v], CENTRE_TWINS[centre](r[v]) / 0.5, atol=1e-6)
        np.testing.assert_array_equal(got[~v], 0)
    np.testing.assert_array_equal(tau, 0.5)


def test_centres_that_look_beyond_the_rewards():
    context = ragged()
    R, v, T, _ = in_numpy(context)
    for centre, b in (
        ("length", ((T * R).sum(-1) / np.where(v, T, 0).sum(-1))[:, None]),
        ("batch", R[v].mean()),
        ("baseline", np.asarray(context.scored.baseline)),
    ):
        u, _ = advantage.Advantage(temperature=1.0, centre=centre)(context)
        np.testing.assert_allclose(u, np.where(v, R - b, 0), atol=1e-6, err_msg=centre)


def test_a_baseline_of_each_response_and_one_that_is_missing():
    b = put(np.random.default_rng(0).random((3, 4), np.float32), np.s_[0, 2], np.nan)
    context = ragged(baseline=b)
    u, _ = advantage.Advantage(temperature=1.0, centre="baseline")(context)
    assert u[0, 2] == 0 and u[0, 1] == context.rewards[0, 1] - b[0, 1]
    assert O.get("grpo").needs == set() and O.get("grpo", centre="baseline").needs == {"baseline"}


@pytest.mark.parametrize("centre", sorted(set(advantage.CENTRES) - {"none", "batch", "baseline"}))
def test_item_4_equal_rewards_and_lone_responses_get_exactly_0(centre):
    context = ragged(valid=put(ALL, np.s_[1, 1:], False))
    context = context.replace(rewards=jnp.where(context.valid, jnp.array([[0.1], [7.3], [1e30]]), 0))
    u, _ = advantage.Advantage(temperature="grpo", centre=centre)(context)
    np.testing.assert_array_equal(u, 0)


@in_float64
def test_item_18_rloo_and_dgpo():
    """RLOO's advantage is K / (K - 1) (R - mu); DGPO's sum to K in absolute value."""
    context = ragged(rewards=np.random.default_rng(0).random((3, 4)))
    rloo, mean, dgpo = (
        O.get(n, **o).advantage for n, o in (("rloo", {}), ("rloo", {"centre": "mean"}), ("dgpo", {}))
    )
    size = np.array([[4], [3], [4]])
    np.testing.assert_allclose(rloo(context)[0], mean(context)[0] * size / (size - 1), rtol=1e-9)
    np.testing.assert_allclose(jnp.abs(dgpo(context)[0]).sum(-1), size[:, 0], rtol=1e-9)


def test_masked_median_against_numpy():
    rng = np.random.default_rng(0)
    for K in (1, 4, 7):
        x, mask = rng.normal(size=(20, K)), rng.random((20, K)) < 0.7
        got = np.asarray(jax.jit(masked_median)(np.where(mask, x, np.nan), mask))
        for row, m, median in zip(x, mask, got[:, 0]):
            np.testing.assert_allclose(median, np.median(row[m]) if m.any() else 0, atol=1e-6)


# --- temperatures


def beta_twin(p, m, v):
    """The public BNPO code, of the group means of a batch."""
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    return scipy.stats.beta(max(1, 1 + a / 3), max(1, 1 + b / 3)).pdf(p)


@in_float64
def test_temperatures_against_numpy():
    rng = np.random.default_rng(0)
    for binary in (True, False):
        R = (rng.random((6, 7)) < rng.random((6, 1))) * 1.0 if binary else rng.random((6, 7))
        mask = rng.random((6, 7)) < 0.8
        tau = {rule: temperature(np.where(mask, R, np.nan), rule, mask)[:, 0] for rule in RULES}
        centred = [r[m] - r[m].mean() for r, m in zip(R, mask)]
        p = np.array([r[m].mean() for r, m in zip(R, mask)])
        np.testing.assert_allclose(tau["batch"], np.concatenate(centred).std(), rtol=1e-9)
        np.testing.assert_allclose(tau["mean-abs"], [max(abs(x).mean(), 1e-6) for x in centred], rtol=1e-9)
        for k, (r, m) in enumerate(zip(R, mask)):
            deviation = abs(r[m] - np.median(r[m]))
            np.testing.assert_allclose(
                tau["mad"][k], (np.median(deviation) or deviation.mean()) + 1e-3, rtol=1e-9
            )
        density = beta_twin(p, p.mean(), p.var(ddof=1))
        np.testing.assert_allclose(tau["beta"], np.maximum(density, 1e-6), rtol=1e-6)


def test_bnpo_limits():
    """A uniform Beta is R - p, and alpha = beta = 3/2 is GRPO up to one constant."""
    nothing_to_fit = np.float32([[0, 1, 1, 0]] * 3)
    as_wide_as_can_be = np.float32([[0] * 4, [1] * 4, [0] * 4])
    for R in (nothing_to_fit, as_wide_as_can_be):
        np.testing.assert_allclose(temperature(R, "beta"), 1, rtol=1e-5)
    # Pass rates m +- d, here about 1/2, fit a = b = 3/2 when m (1 - m) / v = 4.
    p = 0.5 + np.array([[-1], [0], [1]]) / 4
    R = (p + 0.1 * np.array([1, -1, 1, -1])).astype(np.float32)
    np.testing.assert_allclose(temperature(R, "beta"), 8 / np.pi * np.sqrt(p * (1 - p)), rtol=1e-4)


@small
@hypothesis.given(
    hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, 0.25, 1.0, 0.75])),
    st.sampled_from([0.5, 4.0]),
    st.sampled_from([0.0, -3.0]),
)
def test_item_3_affine_rewards(R, a, b):
    """The scales grow with the rewards and do not see a shift, so that advantages do not change."""
    for rule, constant in (("batch", 0), ("mean-abs", 0), ("mad", 1e-3)):
        tau = temperature(R, rule) - constant
        np.testing.assert_allclose(temperature(a * R + b, rule) - constant, a * tau, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K", [1, 4])
def test_item_4_temperatures_are_finite_and_positive(rule, K):
    for R in (0.0, 1.0, 0.1, 1e30, -1e30):
        tau = temperature(np.full((3, K), R, np.float32), rule, np.ones((3, K), bool))
        chex.assert_shape(tau, (3, 1))
        assert (np.isfinite(tau) & (tau > 0)).all()
    mixed = np.float32([[1e30, -1e30, 3, 0], [0, 1, 0, 1], [0.2, 0.2, 1, 0.2]])[:, :K]
    for mask in (np.zeros((3, K), bool), np.ones((3, K), bool), np.arange(K) < np.array([[1], [3], [0]])):
        tau = temperature(np.where(mask, mixed, np.float32(np.nan)), rule, mask)
        assert tau.dtype == np.float32 and (np.isfinite(tau) & (tau > 0)).all()
        assert np.isfinite(O.advantages(np.where(mask, mixed, np.inf), tau, mask)).all()


@pytest.mark.parametrize("rule", RULES)
@in_float64
def test_item_1_invalid_responses_and_order(rule):
    R = np.random.default_rng(1).random((3, 4))
    tau = temperature(R, rule, ALL)
    np.testing.assert_allclose(temperature(R[:, [2, 3, 0, 1]], rule, ALL), tau, rtol=1e-10)
    more, mask = (
        np.pad(x, ((0, 1), (0, 2)), constant_values=fill) for x, fill in ((R, np.inf), (ALL, False))
    )
    np.testing.assert_allclose(temperature(more, rule, mask)[:3], tau, rtol=1e-10)


# --- shaped rewards


def test_shapes_against_numpy():
    context = ragged()
    R, v, n, passed = in_numpy(context)
    np.testing.assert_array_equal(shaping.Sign()(context), np.where(passed, 1, -1))
    flawed = passed & context.scored.flawed
    assert flawed.any()
    np.testing.assert_allclose(shaping.FlawPenalty(0.6)(context), R - 0.6 * flawed, rtol=1e-6)
    # DAPO, equation 13, with a limit of 5 tokens of which the last 3 are the buffer.
    assert n[v].min() <= 2 and 6 in n[v] and {3, 4} & set(n[v])
    penalty = np.where(n <= 2, 0, np.where(n <= 5, (2 - n) / 3, -1))
    np.testing.assert_allclose(shaping.Overlong(0.6, 5)(context), R + penalty, rtol=1e-5, atol=1e-6)
    tiers = passed + 0.5 * np.floor(R * 4) / 4
    np.testing.assert_allclose(shaping.RewardTiers(4, 0.5)(context), tiers, rtol=1e-6)


def test_tiers_keep_the_order():
    stats, scored = full_batch()
    rewards = np.sort(np.random.default_rng(2).random((3, 4)).astype(np.float32))
    context = context_of(stats, scored.replace(rewards=rewards, passed=rewards > 0.6))
    tiers = np.asarray(shaping.RewardTiers(5, 0.9)(context))
    assert (np.diff(tiers) >= 0).all() and tiers[rewards > 0.6].min() > tiers[rewards <= 0.6].max()
    assert len(np.unique(tiers)) > 3


def test_agreement_of_answers():
    context = ragged(clusters=np.int32([[3, 3, 7, -1], [0, 0, 0, 0], [1, 2, -1, -1]]))
    share, entropy = shaping.agreement(context)
    np.testing.assert_allclose(share, [[0.5, 0.5, 0.25, 0.25], [1] * 4, [0.25] * 4], rtol=1e-6)
    np.testing.assert_allclose(entropy[:, 0], [1.5 * np.log(2), 0, np.log(4)], rtol=1e-5, atol=1e-6)
    R = shaping.ClusterFrequency(entropy_threshold=1.2)(context)
    np.testing.assert_allclose(R, [[0.5, 0.5, 0.25, 0], [1] * 4, [0] * 4], rtol=1e-6)
    np.testing.assert_array_equal(shaping.ClusterFrequency(1.0)(context)[0], 0)


# --- who is learnt from


def test_item_20_max_variance_against_every_subset():
    keep = on_host(shaping.MaxVariance(0.5, 1.0))
    for seed in range(4):
        context = ragged(seed, progress=np.float32(0.25))
        valid = np.asarray(context.valid)
        u = np.float32(np.where(valid, np.random.default_rng(seed).normal(size=(3, 4)) ** 3, 0))
        best = max(
            np.var(u[valid][list(some)]) for some in itertools.combinations(range(11), 7)
        )  # 0.625 x 11
        kept = keep(context, u) & valid
        assert kept.sum() == 7
        np.testing.assert_allclose(np.var(u[kept]), best, rtol=1e-5)
    assert keep(ragged(progress=np.float32(1)), u).all()


def test_item_4_max_variance_of_nothing():
    for valid, kept in ((~ALL, 0), (put(~ALL, np.s_[1, 2], True), 1)):
        context = ragged(valid=valid)
        got = shaping.MaxVariance()(context, jnp.zeros((3, 4))) & context.valid
        assert got.sum() == kept


def test_item_20_mixed_groups_are_kept_whole():
    stats, scored = full_batch()
    scored = scored.replace(passed=np.array([[1, 0, 0, 0], [1] * 4, [0] * 4], bool))
    view = O.Objective("x", select=shaping.MixedGroups()).listwise(stats, scored)
    np.testing.assert_array_equal(view.active, [True, False, False])
    np.testing.assert_array_equal(view.valid, [[True] * 4, [False] * 4, [False] * 4])
    np.testing.assert_array_equal(view.coefficients[1:], 0)


def test_item_20_mc_grpo_keeps_k_of_k_plus_1():
    """Three responses a group, of four places: the one at the median goes, the others are scaled for it."""
    stats, scored = full_batch()
    valid = put(ALL, np.s_[:, 1], False)
    view = jax.device_get(O.get("mc-grpo").listwise(stats, scored.replace(valid=valid)))
    np.testing.assert_array_equal(view.valid.sum(-1), 2)
    for R, v, kept, c, u in zip(scored.rewards, valid, view.valid, view.coefficients, view.utilities):
        median = np.median(R[v])
        assert R[v & ~kept] == median
        deviation = abs(R[v] - median)
        A = (R - median) / ((np.median(deviation) or deviation.mean()) + 1e-3)
        A = A * 3 / max((A[v] != 0).sum(), 1)
        np.testing.assert_allclose(u, np.where(kept, A, 0), rtol=1e-5)
        np.testing.assert_allclose(c, -u / 2, rtol=1e-5)
    even = O.get("mc-grpo").listwise(stats, scored)
    np.testing.assert_array_equal(even.valid.sum(-1), [4, 4, 3])  # no response halfway between two


def test_a_selection_does_not_change_what_the_others_were_compared_to():
    stats, scored = full_batch()
    scored = scored.replace(valid=put(ALL, np.s_[:, 1], False))
    whole, rest = (O.Objective("x", select=s).listwise(stats, scored) for s in (None, shaping.DropMedian()))
    np.testing.assert_array_equal(rest.utilities, np.where(rest.valid, whole.utilities, 0))
    assert rest.valid.sum() == 6 and whole.valid.sum() == 9


def test_perplexity_mask():
    stats, scored = full_batch()
    ref = np.log(np.float32([[1 / 2, 1 / 3, 0.99, 0.9]] * 3))[..., None] * np.ones(6, np.float32)
    stats = stats.replace(ref_logp=np.where(scored.mask, ref, np.nan))
    context = context_of(stats, scored.replace(passed=np.array([[1, 1, 0, 0]] * 3, bool)))
    np.testing.assert_array_equal(shaping.PerplexityMask()(context, None), [[True, False, False, True]] * 3)


# --- biases and prompt weights


def test_confidence_gap_against_numpy():
    context = ragged(passed=np.array([[1, 0, 0, 0], [0, 1, 1, 1], [0] * 4], bool))
    got = on_host(shaping.ConfidenceGap(0.7, 0.4))(context, np.ones((3, 4), np.float32))
    for p, k in np.argwhere(np.asarray(context.valid)):
        logp = np.sort(context.scored.behaviour_logp[p, k][context.tokens[p, k]])
        confidence = np.exp(logp[: int(np.ceil(0.4 * len(logp)))].mean())
        gap = 0.7 * (context.scored.prompt_confidence[p] - confidence) if p < 2 else 0
        np.testing.assert_allclose(got[p, k], 1 + gap, rtol=1e-5)


def test_global_mix_against_numpy():
    """Groups that agree learn from the other prompts, even where all their rewards are equal."""
    stats, scored = full_batch()
    scored = scored.replace(clusters=np.int32([[0, 1, 2, 3], [0, 1, 0, 1], [5] * 4]))
    view = O.get("copo", mix_slope=2.0, mix_entropy=0.5).listwise(stats, scored)
    mu = scored.rewards.mean(-1)
    w = 1 / (1 + np.exp(-2 * (np.array([np.log(4), np.log(2), 0]) - 0.5)))[:, None]
    local = O.get("grpo").listwise(stats, scored).utilities
    expected = w * local + (1 - w) * ((mu - mu.mean()) / mu.std())[:, None]
    np.testing.assert_allclose(view.utilities, expected, rtol=1e-4)
    assert abs(view.coefficients[2]).min() > 0.1


def test_prompt_weights_against_numpy():
    passes = np.array([[0, 1, 0, 1], [0] * 4, [1] * 4], bool)
    context = ragged(passed=passes)
    _, v, n, passed = in_numpy(context)
    np.testing.assert_allclose(weights.SignalShare()(context), [[1.5]] * 3)
    # Rewards differ in the first two groups; the second has no pass, and counts as one that always passes.
    e = np.exp(-np.array([0.5, 1.0]) / 2)
    np.testing.assert_allclose(weights.Difficulty()(context)[:, 0], [*(2 * e / e.sum()), 1], rtol=1e-6)
    p = np.array([0.5, 0.02, 0.98])[:, None]
    np.testing.assert_allclose(weights.NftWeight()(context), 1 - p, rtol=1e-5)
    np.testing.assert_allclose(weights.NftWeight("grpo")(context), np.sqrt((1 - p) / p), rtol=1e-5)
    seen = set()
    for seed, cut in itertools.product(range(6), (None, ~ALL, put(~ALL, np.s_[0, 0], True), ~passes)):
        context = ragged(seed, passed=passes, truncated=cut)
        _, v, n, _ = in_numpy(context)
        ended = v & ~passes & (True if cut is None else ~cut)
        longer = n[0][passes[0]].max() > (n[0][ended[0]].mean() if ended[0].any() else 0)
        got = weights.LongerSuccess()(context)
        np.testing.assert_allclose(got[:, 0], [1 if longer else 0.1, 0.1, 1], rtol=1e-6)
        seen.add(bool(longer))
    assert seen == {True, False}


def test_a_weight_without_a_mixed_group():
    context = ragged(rewards=np.ones((3, 4), np.float32))
    for weight in (weights.SignalShare(), weights.Difficulty()):
        got = np.asarray(weight(context))
        assert got.shape == (3, 1) and np.isfinite(got).all()


def test_a_prompt_weight_inside_or_outside_the_target():
    """One and the same for a policy gradient; not for LPO, where inside is a lower temperature."""
    stats, scored = full_batch()
    scored = scored.replace(anchor_logp=None)
    weight = weights.Difficulty()

    def both(**parts):
        objectives = (
            O.Objective("x", prompt_weight=weight, prompt_weight_inside=i, **parts) for i in (True, False)
        )
        return [o.listwise(stats, scored) for o in objectives]

    inside, outside = both()
    np.testing.assert_allclose(inside.coefficients, outside.coefficients, rtol=1e-6)
    assert "prompt_weight_inside" not in O.names()["dgpo"]["options"]
    inside, outside = (
        O.get("lpo-dgpo", prompt_weight_inside=i).listwise(stats, scored) for i in (True, False)
    )
    lam = np.asarray(weight(context_of(stats, scored)))
    target = O.target_log_probs(scored.rewards, np.asarray(inside.temperature) / lam)
    np.testing.assert_allclose(inside.log_target, target, rtol=1e-5)
    plain = O.get("lpo-forward", temperature="mean-abs").listwise(stats, scored)
    np.testing.assert_allclose(outside.coefficients, lam * plain.coefficients, rtol=1e-5)
    assert abs(inside.coefficients - outside.coefficients).max() > 1e-3
