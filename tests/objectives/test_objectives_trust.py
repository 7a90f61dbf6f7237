"""Trust-region gates (METHODS 4.4 item 15, variants A, B and C of 1.5) and token weights."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import batch, run, small

from lpo_jax import objectives as O

EPSILON = 0.2
GATES = {
    "none": O.Gate(),
    "hard": O.HardLogClip(EPSILON),
    "ppo": O.PessimisticLogClip(EPSILON),
    "joint": O.JointLogClip(EPSILON),
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
    return jax.grad(lambda d: gate(d, c).sum())(delta)


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
                got = self.variant(GATES[name])(DELTA, np.float32(c))
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
            assert np.isfinite(gate(delta, np.float32([[[c]]]))).all()
            assert np.isfinite(slope(gate, delta, np.float32([[[c]]]))).all()


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
