"""Learning-rate schedules, the weight-decay mask, and the guard against non-finite gradients."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import norm
from tiny import CONFIG

from lpo_jax.config import OptimizerConfig
from lpo_jax.errors import UserError
from lpo_jax.models.placement import param_shardings
from lpo_jax.parallel import sharding
from lpo_jax.training import moments
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
    tiny_params = jax.device_get(tiny_params)
    zero = jax.tree.map(np.zeros_like, tiny_params)
    params, _, _ = jax.jit(optimizer.apply)(zero, jax.jit(optimizer.init)(tiny_params), tiny_params)
    chex.assert_trees_all_close(params["layers"]["wq"], 0.5 * tiny_params["layers"]["wq"])
    chex.assert_trees_all_close(params["embed"], 0.5 * tiny_params["embed"])
    chex.assert_trees_all_equal(params["final_norm"], tiny_params["final_norm"])
    for name in ("attn_norm", "q_norm"):
        chex.assert_trees_all_equal(params["layers"][name], tiny_params["layers"][name])


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

    scaled = lambda x, tree: jax.tree.map(lambda leaf: np.float32(x) * leaf, tree)  # noqa: E731
    got = want = tiny_params
    state, chained = jax.jit(optimizer.init)(got), jax.jit(plain.init)(want)
    direction = jax.tree.map(lambda p: np.cos(100 * p), jax.device_get(tiny_params))
    size = norm(direction)
    apply = jax.jit(optimizer.apply)
    for length in (20.0, 5.0, 0.1):
        gradient = scaled(length / size, direction)
        got, state, found = apply(gradient, state, got)
        want, chained = plainly(gradient, chained, want)
        assert found == pytest.approx(length)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(state.inner_state, chained[1], rtol=1e-5, atol=1e-7)
    assert skipped_updates(state) == (0, 0)


def test_a_bad_gradient_changes_nothing_and_is_counted():
    params = {"w": np.ones(3, np.float32)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 10)
    good, bad = {"w": np.ones(3, np.float32)}, {"w": np.float32([1.0, np.nan, 1.0])}
    apply = jax.jit(optimizer.apply)
    params, state, _ = apply(good, optimizer.init(params), params)
    for count, gradient in ((1, bad), (2, {"w": np.full(3, np.inf, np.float32)})):
        same, after, size = apply(gradient, state, params)
        assert not np.isfinite(size)
        chex.assert_trees_all_equal(same, params)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        state = after
        assert skipped_updates(state) == (count, count)
    moved, state, _ = apply(good, state, params)
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


def test_the_chain_is_that_of_adamw(tiny_params):
    """Checkpoints hold the states of `optax.adamw`."""
    plain = optax.adamw(lambda count: 1e-3, mask=jax.tree.map(lambda _: True, tiny_params))
    structure = jax.tree.structure(make_optimizer(OptimizerConfig(), 10).rule.init(tiny_params))
    assert structure == jax.tree.structure(plain.init(tiny_params))


def test_stochastic_rounding_keeps_the_mean():
    """Numbers become one of their two neighbours, and their mean over seeds is within five standard deviations."""
    x = jnp.exp(jnp.linspace(-20.0, 20.0, 999)).reshape(27, 37)
    seeds = 4096
    rounded = jax.jit(jax.vmap(lambda seed: moments.round_stochastically(x, seed)))(jnp.arange(seeds))
    assert rounded.dtype == jnp.bfloat16
    below = jax.lax.bitcast_convert_type((x.view(jnp.uint32) >> 16) << 16, jnp.float32)
    space = jax.lax.bitcast_convert_type(((x.view(jnp.uint32) >> 16) + 1) << 16, jnp.float32) - below
    up = (np.asarray(rounded, np.float32) - below) / space
    assert set(np.unique(up)) == {0.0, 1.0}
    share = np.asarray((x - below) / space)
    deviation = np.sqrt(share * (1 - share) / seeds)
    assert (np.abs(up.mean(0) - share) <= 5 * deviation + 1e-3).all()
    # Neighbours are rounded independently of each other.
    centred = (up - share) / np.maximum(np.sqrt(share * (1 - share)), 1e-6)
    busy = (share > 0.1) & (share < 0.9)
    pairs = (centred[:, :, 1:] * centred[:, :, :-1])[:, busy[:, 1:] & busy[:, :-1]]
    assert abs(pairs.mean()) < 0.01


def test_moments_in_bfloat16_follow_those_in_float32():
    """Small changes of the second moment are not lost, as they would be by rounding to nearest."""
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=0.0)
    params = {"wq": np.ones((64, 64), np.float32)}
    ends = {}
    for state in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(config, state=state), 1000)
        apply = jax.jit(optimizer.apply)
        new, held = params, optimizer.init(params)
        for step in range(300):
            gradient = {"wq": np.float32((1 + step / 100) * np.cos(np.arange(4096) + step)).reshape(64, 64)}
            new, held, _ = apply(gradient, held, new)
        ends[state] = jax.device_get((new, held.inner_state[0]))
    (wide, of_wide), (narrow, of_narrow) = ends["float32"], ends["bfloat16"]
    assert of_narrow.mu["wq"].dtype == of_narrow.nu["wq"].dtype == jnp.bfloat16
    ratio = of_narrow.nu["wq"].astype(np.float32) / of_wide.nu["wq"]
    assert abs(ratio.mean() - 1) < 2e-3 and ratio.std() < 0.05
    moved = lambda new: new["wq"] - params["wq"]  # noqa: E731
    assert np.abs(moved(narrow) - moved(wide)).max() < 0.15 * np.abs(moved(wide)).max()


@pytest.mark.parametrize("many", [False, True])
def test_moments_wait_in_the_memory_of_the_host(many, tiny_params):
    """Updates are those of float32, bit for bit, on one device and on a mesh."""
    mesh = None
    if many:
        auto = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh((1, 4, 2), sharding.AXES, devices=jax.devices()[:8], axis_types=auto)
        where = param_shardings(CONFIG, mesh)
        tiny_params = jax.tree.map(jax.device_put, tiny_params, where)
    ends, slopes = [], jax.jit(lambda params: jax.tree.map(lambda p: jnp.cos(100 * p), params))
    with sharding.using(mesh):
        for state in ("float32", "host"):
            optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, state=state), 10)
            params, held = tiny_params, optimizer.at_rest(jax.jit(optimizer.init)(tiny_params))
            apply = jax.jit(optimizer.apply)
            for _ in range(2):
                params, held, _ = apply(slopes(params), optimizer.at_work(held), params)
                held = optimizer.at_rest(held)
            ends.append((params, held))
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(held) if x.ndim} for _, held in ends]
    assert kinds == [{"device"}, {"pinned_host"}]
    chex.assert_trees_all_equal(*ends)


def test_a_device_without_host_memory_is_refused(monkeypatch):
    class Device:
        device_kind = "Abacus"

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="beads")]

    monkeypatch.setattr(moments.jax, "local_devices", lambda: [Device()])
    with pytest.raises(
        UserError, match=r"^optimizer.state = host: Abacus has no pinned_host memory \(it has beads\)"
    ):
        moments.check_host_memory()


@pytest.mark.parametrize("scale", [1.0, float("nan")])
def test_the_update_for_gpus_is_that_of_other_platforms(monkeypatch, scale):
    """What is compiled for a GPU selects element by element; run here, it gives the same numbers."""
    optimizer = make_optimizer(OptimizerConfig(), 3)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(3)}
    gradient = jax.tree.map(lambda x: scale * jnp.cos(x), params)
    state = optimizer.init(params)
    expected = jax.jit(optimizer.apply)(gradient, state, params)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))
    found = jax.jit(lambda *arguments: optimizer.apply(*arguments))(gradient, state, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert bool((found[0]["w"] == params["w"]).all()) == (scale != 1)
