"""State that a method keeps from update to update: RiskPO's quantiles and POISE's probe."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import full_batch, padded, put

from lpo_jax import objectives as O
from lpo_jax.objectives.probe import Probe, folded
from lpo_jax.objectives.risk import Quantiles, RiskAdvantage


def context_of(rewards, valid=None, **fields):
    """The context of a minibatch of one-token responses."""
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = np.ones(rewards.shape, bool) if valid is None else np.asarray(valid)
    zero = np.zeros((*rewards.shape, 1), np.float32)
    scored = O.Scored(zero, rewards, valid[..., None], valid=valid, **fields)
    return O.Context(jnp.where(valid, rewards, 0), valid, valid[..., None], zero, O.TokenStats(zero), scored)


# --- RiskPO


def public_code(R, low, high, a=0.2, b=0.8, w=1.5):
    """The advantages [P,K] of RTkenny/RiskPO with tracked quantiles, bundles of 5 and credit by deviation."""
    A = np.zeros_like(R)
    for first in range(0, len(R), 5):
        papers = R[first : first + 5].sum(0)
        for k, S in enumerate(papers):
            rvar = (max(S - low, 0) - max(S - high, 0) + low - high) / (b - a)
            paper = (w * -max(low - S, 0) / a + rvar) / (w + 1) / papers.std(ddof=1)
            for q in range(first, first + 5):
                std = R[q].std(ddof=1)
                A[q, k] = paper / (std if std > 1e-3 else 1)
    return A


def test_riskpo_against_the_public_code():
    rng = np.random.default_rng(0)
    R = (rng.random((10, 4)) < rng.random((10, 1))) * 1.0
    state = {"quantiles": jnp.array([1.7, 3.1]), "started": jnp.array(True)}
    u, tau = jax.jit(RiskAdvantage())(context_of(R, control=state))
    np.testing.assert_allclose(u, public_code(R, 1.7, 3.1), rtol=1e-4, atol=1e-5)
    assert tau.shape == (10, 1) and u.min() < -1 and u.max() <= 0


def test_the_first_minibatch_is_its_own_yardstick():
    rng = np.random.default_rng(1)
    R = rng.random((10, 4))
    part = Quantiles()
    context = context_of(R, control=part.init())
    state = jax.jit(part.update)(part.init(), context, None)
    expected = np.quantile(R.reshape(2, 5, 4).sum(1), [0.2, 0.8])
    np.testing.assert_allclose(state["quantiles"], expected, rtol=1e-5)
    advantage = jax.jit(RiskAdvantage())
    before, after = (advantage(context_of(R, control=s))[0] for s in (part.init(), state))
    np.testing.assert_allclose(before, after, rtol=1e-5)


def test_a_step_is_stochastic_gradient_descent_on_the_pinball_loss():
    part = Quantiles(quantile_rate=0.3)
    state = {"quantiles": jnp.array([2.0, 3.0]), "started": jnp.array(True)}
    R = np.random.default_rng(2).random((10, 4))
    scores = R.reshape(2, 5, 4).sum(1).ravel()

    def pinball(q):
        x = scores[None] - q[:, None]
        level = jnp.array([0.2, 0.8])[:, None]
        return jnp.maximum(level * x, (level - 1) * x).mean(-1).sum()

    moved = jax.jit(part.update)(state, context_of(R), None)["quantiles"]
    slope = jax.jit(jax.grad(pinball))(state["quantiles"])
    np.testing.assert_allclose(moved, state["quantiles"] - 0.3 * slope, rtol=1e-5)


def test_quantiles_converge():
    """On scores of a known law, sums of 5 uniform rewards, to its quantiles; NaN rewards do not disturb them."""
    part = Quantiles(quantile_rate=0.01)
    rng = np.random.default_rng(3)
    R = rng.random((1500, 10, 4)).astype(np.float32)
    valid = np.ones((10, 4), bool)
    valid[8:] = False

    def step(state, rewards):
        return part.update(state, context_of(jnp.where(valid, rewards, jnp.nan), valid), None), None

    start = {"quantiles": jnp.array([1.5, 3.5]), "started": jnp.array(True)}
    q = jax.jit(lambda s, r: jax.lax.scan(step, s, r)[0])(start, R)["quantiles"]
    # The second bundle has 3 of 5 prompts, scaled up, so its scores spread wider.
    scores = np.concatenate([R[:, :5].sum(1).ravel(), R[:, 5:8].sum(1).ravel() * 5 / 3])
    np.testing.assert_allclose(q, np.quantile(scores, [0.2, 0.8]), atol=0.06)


def test_partial_bundles_and_invalid_responses():
    """Three prompts stand for five, and a paper that lacks a response is scored by the others."""
    valid = put(np.ones((3, 4), bool), np.s_[0, 1], False)
    valid[:, 3] = False
    R = np.random.default_rng(4).random((3, 4))
    scores, there = Quantiles().scores(context_of(np.where(valid, R, np.nan), valid))
    np.testing.assert_allclose(
        scores[0, :3], [R[:, 0].mean() * 5, R[1:, 1].mean() * 5, R[:, 2].mean() * 5], rtol=1e-5
    )
    np.testing.assert_array_equal(there, [[True, True, True, False]])


@pytest.mark.parametrize("name", ["riskpo", "poise"])
def test_item_4_state_without_a_valid_response(name):
    objective = O.get(name)
    stats, scored = full_batch(objective=objective)
    learn = jax.jit(objective.next_control)
    for before in (scored.control, learn(stats, scored)):
        nobody = scored.replace(valid=np.zeros((3, 4), bool), control=before)
        after = learn(stats, nobody)
        chex.assert_tree_all_finite(after)
        assert jax.tree.structure(after) == jax.tree.structure(objective.init_control())
        if name == "riskpo":
            chex.assert_trees_all_equal(after, before)


@pytest.mark.slow
def test_item_1_padding_does_not_reach_the_state():
    objective = O.get("riskpo")
    stats, scored = full_batch(objective=objective)
    chex.assert_trees_all_close(
        objective.next_control(*padded(stats, scored)), objective.next_control(stats, scored), rtol=1e-6
    )
    objective = O.get("poise", probe_buffer=24)  # as many rows as the padded minibatch has
    stats, scored = full_batch(objective=objective)
    state, wide = (objective.next_control(*case) for case in ((stats, scored), padded(stats, scored)))
    assert state["filled"].sum() == wide["filled"].sum() == 12
    for name in ("mean", "slope", "level"):
        np.testing.assert_allclose(wide[name], state[name], rtol=1e-4, atol=1e-6)


# --- POISE


def prompts_of_known_worth(rng, P, K=3, F=6):
    """(rewards, features): a pass rate for each prompt, which the features show through noise."""
    worth = rng.random((P, 1))
    rewards = (rng.random((P, K)) < worth).astype(np.float32)
    phi = rng.normal(size=(P, K, F))
    phi[..., 0] = 3 * worth + 0.1 * phi[..., 0]
    return rewards, phi.astype(np.float32) * [1, 100, 1, 1, 1, 0] + [5, 0, 0, -3, 0, 7]


def test_the_probe_beats_no_baseline_and_the_other_response():
    rng = np.random.default_rng(0)
    objective = O.get("poise", probe_buffer=400, probe_width=6, probe_ridge=0.01)
    state = objective.init_control()
    update = jax.jit(
        lambda state, *data: objective.control.update(state, context_of(data[0], features=data[1]), None)
    )
    for _ in range(10):
        state = update(state, *prompts_of_known_worth(rng, 32, K=2))
    rewards, phi = prompts_of_known_worth(rng, 512, K=2)
    u = {"none": rewards, "loo": rewards - rewards[:, ::-1]}
    advantage = jax.jit(objective.advantage)
    u["probe"] = np.asarray(advantage(context_of(rewards, features=phi, control=state))[0])
    spread = {name: np.square(x).mean() for name, x in u.items()}
    assert spread["probe"] < 0.75 * spread["loo"] and spread["probe"] < 0.45 * spread["none"]
    # The least that any baseline can leave is the mean of p (1 - p) = 1/6.
    np.testing.assert_allclose(spread["probe"], 1 / 6, atol=0.04)
    # What a response is compared to does not move with its own states.
    moved = put(phi, np.s_[0, 0], 9.0)
    other = np.asarray(advantage(context_of(rewards, features=moved, control=state))[0])
    assert other[0, 0] == u["probe"][0, 0] and other[0, 1] != u["probe"][0, 1]


def test_the_fit_is_ridge_regression():
    rng = np.random.default_rng(1)
    rewards, phi = prompts_of_known_worth(rng, 8)
    valid = rng.random((8, 3)) < 0.8
    part = Probe(probe_buffer=24, probe_width=8, probe_ridge=0.5)
    state = jax.jit(part.update)(
        part.init(), context_of(rewards, valid, features=np.where(valid[..., None], phi, np.nan)), None
    )
    rows, targets = [], []
    for p, k in np.argwhere(valid & (valid.sum(-1, keepdims=True) > 1)):
        others = valid[p] & (np.arange(3) != k)
        rows.append(phi[p, k])
        targets.append(rewards[p, others].mean())
    X, y = np.array(rows), np.array(targets)
    scale = np.where(X.std(0) > 0, X.std(0), 1)
    Z = (X - X.mean(0)) / scale
    slope = np.linalg.solve(Z.T @ Z / len(y) + 0.5 * np.eye(6), Z.T @ (y - y.mean()) / len(y)) / scale
    np.testing.assert_allclose(state["slope"][:6], slope, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(state["slope"][6:], 0)  # places without a feature
    np.testing.assert_allclose(state["level"], y.mean(), rtol=1e-5)
    assert state["filled"].sum() == len(y)


def test_the_buffer_forgets():
    """Two minibatches through a buffer of one leave what the second alone does."""
    rng = np.random.default_rng(2)
    part = Probe(probe_buffer=24, probe_width=8)
    first, second = (context_of(r, features=f) for r, f in (prompts_of_known_worth(rng, 8) for _ in range(2)))
    update = jax.jit(part.update)
    state = update(update(part.init(), first, None), second, None)
    chex.assert_trees_all_close(state, update(part.init(), second, None), rtol=1e-6)
    assert state["features"].shape == (24, 8)


def test_before_it_is_fitted_the_other_responses_stand_in():
    stats, scored = full_batch(objective=O.get("poise"))
    poise, rloo = (jax.jit(O.get(n).listwise)(stats, scored).utilities for n in ("poise", "rloo"))
    np.testing.assert_array_equal(poise, rloo)


def test_more_features_are_folded():
    """No fold where they fit; beyond that linear, and products are kept in the mean."""
    rng = np.random.default_rng(5)
    phi = rng.normal(size=(40, 4, 60)).astype(np.float32)
    context = context_of(np.zeros((40, 4)), features=phi)
    fold = jax.jit(folded, static_argnums=1)
    np.testing.assert_array_equal(fold(context, 60), phi)
    np.testing.assert_array_equal(fold(context, 64), np.pad(phi, ((0, 0), (0, 0), (0, 4))))
    narrow = np.asarray(fold(context, 50))
    np.testing.assert_array_equal(narrow[..., 10:], phi[..., 10:50])
    np.testing.assert_allclose(
        abs(narrow - phi[..., :50])[..., :10], abs(phi[..., 50:]), rtol=1e-4, atol=1e-5
    )
    a, b = (np.asarray(fold(context_of(np.zeros((40, 4)), features=x), 7)) for x in (phi, 2 * phi))
    np.testing.assert_allclose(b, 2 * a, rtol=1e-5, atol=1e-5)
