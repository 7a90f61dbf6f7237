"""Trust-region gates (METHODS 4.4 items 15, 16 and 18, variants A, B and C of 1.5) and token weights."""

import copy
import dataclasses
import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import batch, full_batch, in_float64, put, run, small

from lpo_jax import objectives as O
from lpo_jax.objectives.sequence_gates import (
    BudgetClip,
    FiberClip,
    GeometricClip,
    HybridClip,
    PrefixWeightClip,
    SequenceClip,
    TaperedWeight,
)
from lpo_jax.objectives.trust import (
    ClipCov,
    ElasticClip,
    ImplicitNegative,
    KLCov,
    Ratio,
    RatioVariance,
    SoftGate,
    TargetRatio,
    WeightClip,
)

EPSILON = 0.2
GATES = {
    "none": O.Gate(),
    "hard": O.LogClip("hard", EPSILON),
    "ppo": O.LogClip("ppo", EPSILON),
    "joint": O.LogClip("joint", EPSILON),
    "ratio": O.RatioClip(EPSILON, EPSILON),
}
# Log-ratios far below, at, and far above the range [log 0.8, log 1.2], for both signs of c.
DELTA = np.array([-0.5, -0.1, 0.0, 0.1, 0.5], np.float32)
OPEN = {  # which of them pass the gradient
    ("none", -1): [1, 1, 1, 1, 1],
    ("none", +1): [1, 1, 1, 1, 1],
    ("hard", -1): [0, 1, 1, 1, 0],
    ("hard", +1): [0, 1, 1, 1, 0],
    ("joint", -1): [0, 1, 1, 1, 0],
    ("joint", +1): [0, 1, 1, 1, 0],
    ("ppo", -1): [1, 1, 1, 1, 0],  # c < 0 pushes up: shut above, open on the way back from below
    ("ppo", +1): [0, 1, 1, 1, 1],
    ("ratio", -1): [1, 1, 1, 1, 0],
    ("ratio", +1): [0, 1, 1, 1, 1],
}


@functools.partial(jax.jit, static_argnums=0)
def slope(gate, delta, c):
    """d phi / d delta of each token."""
    return jax.grad(lambda d: gate(d, c, None).sum())(delta)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("c", [-0.3, 0.7])
def test_item_15_gradient_passes_exactly_where_it_should(name, c):
    expected = c * np.array(OPEN[name, np.sign(c)])
    if name == "ratio":
        expected = expected * np.exp(DELTA)
    got = slope(GATES[name], DELTA[None, None], np.float32([[[c]]]))[0, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


class GateValuesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_against_numpy(self):
        low, high = np.log(1 - EPSILON), np.log(1 + EPSILON)
        for c in (-0.3, 0.7):
            clipped, ratio = np.clip(DELTA, low, high), np.exp(DELTA)
            clipped_ratio = np.clip(ratio, 1 - EPSILON, 1 + EPSILON)
            for name, expected in {
                "none": c * DELTA,
                "hard": c * clipped,
                "joint": c * clipped,
                "ppo": np.maximum(c * DELTA, c * clipped),
                "ratio": np.maximum(c * ratio, c * clipped_ratio),
            }.items():
                got = self.variant(GATES[name])(DELTA, np.float32(c), None)
                np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)


@hypothesis.given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=5, max_size=5))
@small
def test_item_15_at_no_movement_every_gate_passes_c(c):
    c = np.float32(c)[None, :, None]
    for name, gate in GATES.items():
        chex.assert_trees_all_close(
            slope(gate, np.zeros((1, 5, 3), np.float32), c), np.tile(c, 3), rtol=1e-6, atol=1e-30
        )
        assert (slope(gate, np.zeros((1, 5, 3), np.float32), np.zeros_like(c)) == 0).all(), name


def test_asymmetric_ratio_clip():
    gate = O.RatioClip(0.2, 0.28)
    delta = np.log(np.float32([1.25, 1.30, 0.81, 0.79]))[None, None]
    np.testing.assert_array_equal(slope(gate, delta, np.float32([[[-1.0]]]))[0, 0] != 0, [1, 0, 1, 1])
    np.testing.assert_array_equal(slope(gate, delta, np.float32([[[1.0]]]))[0, 0] != 0, [1, 1, 1, 0])


def test_a_broken_ratio_stays_finite():
    delta = np.float32([[[-1e4, 1e4]]])
    for c in (-1.0, 1.0):
        for gate in GATES.values():
            assert np.isfinite(gate(delta, np.float32([[[c]]]), None)).all()
            assert np.isfinite(slope(gate, delta, np.float32([[[c]]]))).all()


def test_dual_clip_caps_the_loss_of_a_failure_that_grew():
    """verl: where A < 0, min(-A c, max(-A rho, -A clip(rho)))."""
    gate = O.RatioClip(0.2, 0.28, dual_clip=3.0)
    rho = np.float32([0.5, 1.0, 2.0, 2.9, 3.1, 50.0])
    for c in (-0.5, 0.5):
        pg = np.maximum(c * rho, c * np.clip(rho, 0.8, 1.28))
        expected = np.minimum(pg, 3 * c) if c > 0 else pg
        args = np.log(rho)[None, None], np.float32([[[c]]])
        np.testing.assert_allclose(gate(*args, None)[0, 0], expected, rtol=1e-5)
        closed = [0, 0, 1, 1, 1, 1] if c < 0 else [1, 0, 0, 0, 1, 1]
        np.testing.assert_array_equal(slope(gate, *args)[0, 0] == 0, closed)
    # c = 0 is neither, and off is off.
    assert gate(np.zeros((1, 1, 3)), np.zeros((1, 1, 1)), None).sum() == 0
    assert O.RatioClip(0.2, 0.28)(np.log(np.float32([50.0])), 0.5, None) == pytest.approx(25, rel=1e-5)


class Case:
    """A minibatch for gates: log-ratios far out of every range, coefficients c = -A / K, and what twins look at."""

    def __init__(self, seed=0, off=0.5, dtype=np.float64):
        stats, scored = full_batch(seed, off=off, dtype=dtype)
        self.m = put(scored.mask, (0, 3), True)  # of full length
        self.A = (scored.rewards - scored.rewards.mean(-1, keepdims=True))[..., None] * 3
        self.c = (-self.A / 4).astype(dtype)
        self.delta = np.where(self.m, stats.logp - scored.behaviour_logp, 0)
        self.n = self.m.sum(-1, keepdims=True)
        self.mean = self.delta.sum(-1, keepdims=True) / self.n
        self.p = scored.passed.mean(-1)[:, None, None].clip(0.02, 0.98)
        self.scored = scored.replace(control=np.asarray(1.7, dtype))
        self.stats = stats
        self.rewards = scored.rewards

    @property
    def context(self):
        return O.Context(self.rewards, self.scored.valid, self.m, self.delta, self.stats, self.scored)

    def loss_and_slope(self, gate, W):
        """phi [P,K,T] at the tokens, and the gradient of sum W phi."""
        context = jax.tree.map(jnp.asarray, self.context)
        loss = lambda d: (W * jnp.where(self.m, gate(d, self.c, context), 0)).sum()  # noqa: E731
        phi = gate(jnp.asarray(self.delta), self.c, context)
        return np.where(self.m, phi, 0), np.asarray(jax.grad(loss)(self.delta))


def worse(c, x, y, slope_x, slope_y):
    """max(c x, c y) and its slope."""
    return np.maximum(c * x, c * y), c * np.where(c * x >= c * y, slope_x, slope_y)


def clip_twin(x, low, high, c, slope=None):
    """PPO's clip of x = 1, whose slope is x itself unless given."""
    slope = x if slope is None else slope
    y = np.clip(x, 1 - low, 1 + high)
    return worse(c, x, y, slope, slope * (x == y))


def nft_twin(k):
    rho, p = np.exp(k.delta), k.p
    left = np.maximum((1 - p * rho) / (1 - p), 1)
    fail = -k.c * np.log(left), k.c * p * rho / (1 - p) / left
    return tuple(np.where(k.c < 0, x, y) for x, y in zip((k.c * k.delta, k.c + 0 * rho), fail))


def gbpo_twin(k):
    x = (k.A - np.median(k.A, axis=1, keepdims=True)) / 0.8
    rho, target = np.exp(k.delta), 1 + 0.3 * np.tanh(x / 2)
    return abs(k.c) * abs(rho - target), abs(k.c) * rho * np.sign(rho - target)


def gmpo_twin(k):
    sign = np.sign(k.A)
    each = sign * np.minimum(sign * k.delta, sign * np.clip(k.delta, -0.3, 0.4)) * k.m
    value = k.c * np.exp(each.sum(-1, keepdims=True) / k.n)
    return value + 0 * each, value * ((each == k.delta) | (k.A == 0))


def dhpo_twin(k):
    a = np.where(k.m, k.stats.entropy, 0)
    a = a / a.max()
    rho, s = np.exp(k.delta), np.exp(k.mean)
    low, high = np.clip(rho, 0.8, 1.2), np.clip(s, 0.95, 1.1)
    flows = a * rho * (rho == low) + (1 - a) * s * (s == high)
    return worse(k.c, a * rho + (1 - a) * s, a * low + (1 - a) * high, a * rho + (1 - a) * s, flows)


def minpro_twin(k):
    weight = np.ones_like(k.delta)
    for t in range(k.delta.shape[-1]):
        before = np.exp(k.delta[..., :t]).min(-1) if t else 1
        weight[..., t] = np.clip(before * np.exp(k.delta[..., t]), 0.1, 1.28)
    return k.c * weight * k.delta, k.c * weight


def weight_twin(k, weight):
    return k.c * weight * k.delta, k.c * weight + 0 * k.delta


def sapo_twin(k):
    tau, rho = np.where(k.A > 0, 1.0, 2.0), np.exp(k.delta)
    gate = 1 / (1 + np.exp(-tau * (rho - 1)))
    return 4 * k.c / tau * gate, 4 * k.c * gate * (1 - gate) * rho


def r2vpo_twin(k):
    rho = np.exp(k.delta)
    return k.c * rho + 1.7 * (rho - 1) ** 2 / 4, rho * (k.c + 2 * 1.7 * (rho - 1) / 4)


def etr_twin(k):
    stretch = (1 + 0.5 * np.tanh(abs(k.A))) * (1 + 2 * k.rewards.var(-1)[:, None, None])
    return clip_twin(np.exp(k.delta), 0.1 * stretch, 0.15 * stretch, k.c)


def fiber_twin(k):
    return k.c * np.exp(np.clip(k.mean, -0.05, 0.05)) * np.exp(np.clip(k.delta - k.mean, -0.3, 0.3))


def apc_twin(k):
    moved = (np.exp(k.delta) - 1) * k.m
    budget = np.maximum(k.n * 0.4 - abs(moved).sum(-1, keepdims=True) + abs(moved), 0)
    return k.c * (1 + np.clip(moved, -budget, budget))


def covariance_twin(k):
    A, l = np.broadcast_to(k.A, k.m.shape)[k.m], k.stats.logp[k.m]
    cov = np.full(k.m.shape, -np.inf)
    cov[k.m] = (A - A.mean()) * (l - l.mean())
    return cov


def clip_cov_twin(k):
    value, slope = clip_twin(np.exp(k.delta), 0.2, 0.2, k.c)
    cov = covariance_twin(k)
    shut = k.c * np.clip(np.exp(k.delta), 0.8, 1.2) > k.c * np.exp(k.delta)
    kept = ~((cov > 0.1) & (cov < 2) & ~shut)  # with a fraction of 1 all candidates are drawn
    assert 3 < (k.m & ~kept).sum() < 20
    return value * kept, slope * kept


def kl_cov_twin(k):
    rho, cov = np.exp(k.delta), covariance_twin(k)
    held = cov >= np.sort(cov.ravel())[-int(0.3 * k.m.sum())]
    return k.c * rho + held * 0.6 * abs(k.delta) / 4, k.c * rho + held * 0.6 * np.sign(k.delta) / 4


# name -> gate, and its formula in numpy: phi [P,K,T] and d phi_t / d delta_t; phi alone where tokens are coupled.
GATE_TWINS = {
    "ratio": (Ratio(), lambda k: (k.c * np.exp(k.delta),) * 2),
    "ppo": (O.RatioClip(0.1, 0.3), lambda k: clip_twin(np.exp(k.delta), 0.1, 0.3, k.c)),
    "etr": (ElasticClip(0.1, 0.15), etr_twin),
    "cispo": (WeightClip(0.5, 0.28), lambda k: weight_twin(k, np.clip(np.exp(k.delta), 0.5, 1.28))),
    "minpro": (PrefixWeightClip(0.9, 0.28), minpro_twin),
    "topr": (
        TaperedWeight(),
        lambda k: weight_twin(k, np.where(k.c < 0, 1, np.exp(np.minimum(k.mean * k.n, 0)))),
    ),
    "sapo": (SoftGate(1.0, 2.0), sapo_twin),
    "r2vpo": (RatioVariance(), r2vpo_twin),
    "gbpo": (TargetRatio(target_temperature=0.8), gbpo_twin),
    "nft": (ImplicitNegative(), nft_twin),
    "gspo": (SequenceClip(0.05, 0.1), lambda k: clip_twin(np.exp(k.mean) + 0 * k.delta, 0.05, 0.1, k.c)),
    "gmpo": (GeometricClip(0.3, 0.4), gmpo_twin),
    "dhpo": (
        HybridClip(token_share="entropy", sequence_epsilon_low=0.05, sequence_epsilon_high=0.1),
        dhpo_twin,
    ),
    "fiber": (FiberClip(0.05, 0.3), fiber_twin),
    "apc": (BudgetClip(0.4), apc_twin),
    "clip-cov": (ClipCov(cov_low=0.1, cov_high=2.0, cov_fraction=1.0), clip_cov_twin),
    "kl-cov": (KLCov(0.3, 0.6), kl_cov_twin),
}
COUPLED = {"fiber", "apc"}


def finite_differences(twin, k, W, step=1e-6):
    """d (sum W phi) / d delta at the tokens, by moving one log-ratio after the other."""
    slope = np.zeros_like(k.delta)
    for where in zip(*np.nonzero(k.m)):
        ends = []
        for sign in (1, -1):
            moved = copy.copy(k)
            moved.delta = put(k.delta, where, k.delta[where] + sign * step)
            moved.mean = moved.delta.sum(-1, keepdims=True) / moved.n
            ends.append((W * k.m * twin(moved)).sum())
        slope[where] = (ends[0] - ends[1]) / (2 * step)
    return slope


@pytest.mark.parametrize("name", GATE_TWINS)
@in_float64
def test_gate_against_numpy(name):
    gate, twin = GATE_TWINS[name]
    k = Case()
    W = np.random.default_rng(1).random(k.m.shape)
    value, slope = twin(k) if name not in COUPLED else (twin(k), None)
    slope = finite_differences(twin, k, W) if slope is None else W * k.m * slope
    got, got_slope = k.loss_and_slope(gate, W)
    np.testing.assert_allclose(got, value * k.m, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got_slope, slope, rtol=1e-9, atol=1e-8 if name in COUPLED else 1e-12)
    assert got.dtype == np.float64
    # The case shows what the gate does: it is not the plain importance weight everywhere.
    if name != "ratio":
        assert np.abs(slope - W * k.m * k.c * np.exp(k.delta)).max() > 1e-2


class NewGatesTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_float32_agrees_with_float64(self):
        k = Case(dtype=np.float32)
        context = jax.tree.map(jnp.asarray, k.context)
        for name, (gate, twin) in GATE_TWINS.items():
            got = self.variant(gate)(jnp.asarray(k.delta), k.c, context)
            assert got.dtype == jnp.float32, name
            value = twin(Case()) if name in COUPLED else twin(Case())[0]
            np.testing.assert_allclose(np.where(k.m, got, 0), value * k.m, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", GATE_TWINS)
def test_a_broken_ratio_stays_finite_in_every_gate(name):
    k = Case(dtype=np.float32)
    k.delta[0, 3, :2] = -1e4, 1e4
    k.delta[0, 1, 0], k.delta[0, 0, 0] = 1e4, -1e4
    chex.assert_tree_all_finite(k.loss_and_slope(GATE_TWINS[name][0], np.ones(k.m.shape, np.float32)))


@pytest.mark.parametrize("name", GATE_TWINS)
def test_item_15_at_no_movement_the_slope_is_c_or_what_the_class_says(name):
    gate, k = GATE_TWINS[name][0], Case(off=0.0, dtype=np.float32)
    if name == "clip-cov":
        gate = dataclasses.replace(gate, cov_low=1e6, cov_high=2e6)  # no token is silenced
    slope = k.loss_and_slope(gate, np.ones(k.m.shape, np.float32))[1]
    expected = {
        "nft": np.where(k.c < 0, k.c, k.c * k.p / (1 - k.p)),
        "gbpo": -np.abs(k.c) * np.sign(k.A - np.median(k.A, axis=1, keepdims=True)),
    }.get(name, k.c)
    np.testing.assert_allclose(slope, expected * k.m, rtol=1e-5, atol=1e-7)
    assert (slope[2] == 0).all()  # equal rewards


def what_moves(gate, k, t):
    """[P,K,T] bool: the tokens that feel a change of the log-ratio at place t of group 0's last response."""
    W = np.ones(k.m.shape)
    before = k.loss_and_slope(gate, W)
    k.delta[0, 3, t] -= 0.4
    return np.abs(np.stack(k.loss_and_slope(gate, W)) - np.stack(before)).max(0) > 1e-9


@pytest.mark.parametrize("name", [n for n in GATE_TWINS if n not in ("clip-cov", "kl-cov")])
@in_float64
def test_item_16_what_a_token_can_move(name):
    """Token gates: itself. MinPRO: itself and those after it. Sequence gates: its response. None: another response."""
    gate, k = GATE_TWINS[name][0], Case(seed=2, off=0.05)
    moved = what_moves(gate, k, t=3)
    assert moved[0, 3, 3]
    assert not moved[1:].any() and not moved[0, :3].any()
    sequence = name in ("topr", "gspo", "gmpo", "dhpo", "fiber", "apc")
    if name == "minpro":
        assert not moved[0, 3, :3].any() and moved[0, 3, 4:].all()
    elif not sequence:
        assert moved.sum() == 1
    elif name in ("gspo", "gmpo"):
        assert moved[0, 3].all()


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
def test_joint_is_the_gradient_of_one_expression(divergence):
    """Variant C: jax.grad of D(w*, softmax(mean clip(delta))) through everything equals the objective's."""
    stats, scored = batch(seed=1, off=0.4)
    objective = O.get("lpo-" + divergence.removesuffix("-kl"), clip="joint")
    log_w = O.target_log_probs(scored.rewards, O.temperature(scored.rewards, "grpo"))

    def one_expression(logp):
        delta = jnp.clip(logp - scored.behaviour_logp, jnp.log(0.8), jnp.log(1.2))
        s = jnp.where(scored.mask, delta, 0).sum(-1) / scored.mask.sum(-1)
        return O.divergence(divergence).value(O.listwise_log_probs(s), log_w).mean()

    loss, metrics, gradient = run(objective, stats, scored)
    expected_loss, expected = jax.value_and_grad(one_expression)(stats.logp)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert metrics["actor/pg_clipfrac"] > 0.2  # the case has tokens out of range
    # And it is not variant A, whose coefficients come from unclipped scores.
    hard = run(O.get("lpo-" + divergence.removesuffix("-kl"), clip="hard"), stats, scored)[2]
    assert np.abs(hard - gradient).max() > 1e-4


def aggregate_by_hand(loss, tokens, how, max_tokens):
    """verl's agg_loss, of token losses that carry the advantage: c K = -A, groups of one size."""
    if how == "token-mean":
        return loss[tokens].mean()
    each = [row[m].sum() / {"seq-mean-token-mean": m.sum()}.get(how, 1) for row, m in zip(loss, tokens)]
    return np.mean(each) / (max_tokens if how == "seq-mean-token-sum-norm" else 1)


@pytest.mark.parametrize("how", O.AGGREGATIONS)
def test_aggregation_against_numpy(how):
    rng = np.random.default_rng(0)
    tokens = np.arange(6) < rng.integers(1, 7, (3, 4, 1))
    loss = rng.standard_normal((3, 4, 6))
    W = np.asarray(O.token_weights(jnp.asarray(tokens), how, max_tokens=11))
    expected = aggregate_by_hand(loss.reshape(12, 6), tokens.reshape(12, 6), how, 11)
    np.testing.assert_allclose((W * loss / 4).sum(), expected, rtol=1e-5)  # c = (token loss) / K


@pytest.mark.parametrize("how", O.AGGREGATIONS)
def test_aggregation_does_not_see_padding(how):
    """More padding changes no weight; a batch of padding has weight 0 and no NaN."""
    tokens = np.arange(6) < np.random.default_rng(0).integers(1, 7, (3, 4, 1))
    padded = np.pad(tokens, ((0, 1), (0, 2), (0, 3)))
    alone, inside = (
        np.asarray(O.token_weights(jnp.asarray(x), how, max_tokens=11)) for x in (tokens, padded)
    )
    np.testing.assert_allclose(inside[:3, :4, :6], alone, rtol=1e-6)
    np.testing.assert_allclose(inside.sum(), alone.sum(), rtol=1e-5)
    np.testing.assert_array_equal(O.token_weights(jnp.zeros((3, 4, 6), bool), how, max_tokens=11), 0)


def test_the_length_normaliser_is_a_constant():
    """PEERS bug class 6: the longest response of the batch must not rescale the others."""
    short = np.ones((3, 4, 6), bool)
    long = np.pad(short, ((0, 1), (0, 2), (0, 3)))
    long[0, 0] = True
    a, b = (O.token_weights(jnp.asarray(x), "seq-mean-token-sum-norm", max_tokens=9) for x in (short, long))
    np.testing.assert_allclose(a, 1 / 27, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(b)[:3, :4, :6], a)
