"""Learning-rate schedules, the weight-decay mask, and the guard against non-finite gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lpo_jax.config import OptimizerConfig
from lpo_jax.training.optimizer import applied_updates, make_optimizer, make_schedule, skipped_updates


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedules(schedule, end):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_updates=4, final_fraction=0.1)
    rate = make_schedule(config, 20)
    assert rate(0) == pytest.approx(0.25) and rate(4) == pytest.approx(1.0)
    assert rate(20) == pytest.approx(end)
    assert all(rate(i + 1) <= rate(i) + 1e-6 for i in range(4, 19))


def test_norms_and_biases_are_not_decayed(tiny_params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, tiny_params)
    params, _, _ = jax.jit(optimizer.apply)(zero, optimizer.init(tiny_params), tiny_params)
    chex.assert_trees_all_close(params["layers"]["wq"], 0.5 * tiny_params["layers"]["wq"])
    chex.assert_trees_all_close(params["embed"], 0.5 * tiny_params["embed"])
    chex.assert_trees_all_equal(params["final_norm"], tiny_params["final_norm"])
    for norm in ("attn_norm", "q_norm"):
        chex.assert_trees_all_equal(params["layers"][norm], tiny_params["layers"][norm])


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e3])
def test_clipped_updates_are_those_of_optax(tiny_params, clip_norm):
    """Three updates equal those of the optax chain; the norms of the first two gradients exceed 1."""
    config = OptimizerConfig(learning_rate=0.1, clip_norm=clip_norm, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    plain = optax.chain(clip, optimizer.rule)

    @jax.jit
    def plainly(gradient, state, params):
        updates, state = plain.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    got = want = tiny_params
    state, chained = optimizer.init(got), plain.init(want)
    for length in (20.0, 5.0, 0.1):
        gradient = jax.tree.map(lambda p: jnp.cos(100 * p), tiny_params)
        scale = length / optax.global_norm(gradient)
        gradient = jax.tree.map(lambda g, scale=scale: scale * g, gradient)
        got, state, norm = jax.jit(optimizer.apply)(gradient, state, got)
        want, chained = plainly(gradient, chained, want)
        assert norm == pytest.approx(length)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(state.inner_state, chained[1], rtol=1e-5, atol=1e-7)
    assert skipped_updates(state) == (0, 0)


def test_a_bad_gradient_changes_nothing_and_is_counted():
    params = {"w": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 10)
    good, bad = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, jnp.nan, 1.0])}
    params, state, _ = optimizer.apply(good, optimizer.init(params), params)
    for count, gradient in ((1, bad), (2, {"w": jnp.full(3, jnp.inf)})):
        same, after, norm = optimizer.apply(gradient, state, params)
        assert not jnp.isfinite(norm)
        chex.assert_trees_all_equal(same, params)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        state = after
        assert skipped_updates(state) == (count, count)
    moved, state, _ = optimizer.apply(good, state, params)
    assert skipped_updates(state) == (0, 2) and (moved["w"] != params["w"]).all()


def test_updates_are_never_in_memory():
    """The gradient is the only tree beside the donated ones; parameters and moments are updated in place."""
    optimizer, params = make_optimizer(OptimizerConfig(), 10), {"w": jnp.ones((256, 256))}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(held, x):
        params, state, _ = optimizer.apply(jax.tree.map(jnp.sin, x), *held[::-1])
        return params, state

    memory = step.lower((params, optimizer.init(params)), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * params["w"].nbytes


def test_the_rate_reported_is_the_rate_used():
    """With a constant gradient, Adam moves a parameter by the learning rate; a skipped update does not count."""
    settings = {
        "learning_rate": 1.0,
        "schedule": "linear",
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "eps": 1e-20,
    }
    optimizer = make_optimizer(OptimizerConfig(**settings), 4)
    params = {"wq": jnp.zeros(())}
    state, rates = optimizer.init(params), []
    assert optimizer.rate_used(state) == 1.0
    for gradient in (1.0, jnp.nan, 1.0, 1.0):
        before = params["wq"]
        params, state, _ = optimizer.apply({"wq": jnp.float32(gradient)}, state, params)
        rates.append(optimizer.rate_used(state))
        if jnp.isfinite(gradient):
            assert before - params["wq"] == pytest.approx(rates[-1], rel=1e-3)
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.5])
    assert applied_updates(state) == 3 and skipped_updates(state) == (0, 1)
