"""Schedule, decay mask, and the guard against gradients that are not finite."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lpo_jax.config import OptimizerConfig
from lpo_jax.training.optimizer import learning_rate, make_optimizer, skipped_updates


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedules(schedule, end):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_updates=4, final_fraction=0.1)
    rate = lambda i: learning_rate(config, 20, i)  # noqa: E731
    assert rate(0) == pytest.approx(0.25) and rate(4) == pytest.approx(1.0)
    assert rate(20) == pytest.approx(end)
    assert all(rate(i + 1) <= rate(i) + 1e-6 for i in range(4, 19))


def test_norms_and_biases_are_not_decayed(tiny_params):
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, tiny_params)
    step = jax.jit(lambda p: optimizer.update(zero, optimizer.init(p), p))
    updates, _ = step(tiny_params)
    chex.assert_trees_all_close(updates["layers"]["wq"], -0.5 * tiny_params["layers"]["wq"])
    chex.assert_trees_all_close(updates["embed"], -0.5 * tiny_params["embed"])
    for norm in (updates["final_norm"], updates["layers"]["attn_norm"], updates["layers"]["q_norm"]):
        assert not norm.any()


def test_gradient_is_clipped_by_its_global_norm():
    params = {"w": jnp.zeros(4), "v": jnp.zeros(4)}
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(lambda p: p + 100.0, params), optimizer.init(params), params)
    clipped = 1 / jnp.sqrt(8)  # each element of a gradient of norm 1
    chex.assert_trees_all_close(updates["w"], jnp.full(4, -clipped / (clipped + 1.0)), rtol=1e-5)


def test_a_bad_gradient_changes_nothing_and_is_counted():
    params = {"w": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 10)
    good, bad = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, jnp.nan, 1.0])}
    _, state = optimizer.update(good, optimizer.init(params), params)
    for count, gradient in ((1, bad), (2, {"w": jnp.full(3, jnp.inf)})):
        updates, after = optimizer.update(gradient, state, params)
        chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        state = after
        assert skipped_updates(state) == (count, count)
    updates, state = optimizer.update(good, state, params)
    assert skipped_updates(state) == (0, 2) and updates["w"].all()
