"""Collectives of a compiled update: weights layer by layer, gradients once, never activations or logits."""

import dataclasses

import jax
import numpy as np
import pytest

from lpo_jax.config import OptimizerConfig
from lpo_jax.models import decoder
from lpo_jax.models.placement import param_shardings, placed
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import TokenStats
from lpo_jax.parallel.mesh import MeshSizes, build_mesh
from lpo_jax.planner.hlo import collectives, parse_hlo
from lpo_jax.runs.state import TrainState
from lpo_jax.training.optimizer import make_optimizer
from lpo_jax.training.step import update

P, K, S, T = 16, 4, 16, 16


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 2, 2), pytest.param(4, 2, 1, marks=pytest.mark.slow)])
def test_weights_by_layer_and_gradients_once(tiny_config, data, fsdp, tensor):
    config = dataclasses.replace(tiny_config, vocab_size=64)  # divides over `tensor`
    runner = ModelRunner(config, token_budget=S + K * T)
    optimizer = make_optimizer(OptimizerConfig(), 1)
    mesh = build_mesh(MeshSizes(data, fsdp, tensor))
    groups = Groups(np.ones((P, S), np.int32), np.full(P, S, np.int32), np.ones((P, K, T), np.int32))
    cotangent = TokenStats(np.ones((P, K, T), np.float32))
    params = decoder.abstract_params(config)
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    with jax.set_mesh(mesh):
        compiled = update.lower(runner, optimizer, placed(config, state), groups, cotangent).compile()
    found = collectives(parse_hlo(compiled.as_text()))

    largest = max(leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in jax.tree.leaves(params))
    assert (
        largest < (S + K * T) * config.width
    )  # a row's activations; so the next line tells one from the other
    assert max(c.bytes for c in found if c.kind == "all-gather") <= 4 * largest
    assert any(c.in_loop == 2 and c.kind == "all-gather" for c in found)  # a layer's weights, in its turn

    local = jax.tree.map(lambda s, x: np.prod(s.shard_shape(x.shape)), param_shardings(config, mesh), params)
    gradient = 4 * sum(jax.tree.leaves(local))
    assert gradient in [c.bytes for c in found if c.kind == "all-reduce" and not c.in_loop]
    if data > max(fsdp, tensor):  # then groups along `data` are known by their size
        assert not [c for c in found if c.in_loop and c.devices >= data]
