"""Gradients and updates compiled for H100: FLOPs, attention, and memory."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from gpus import h100

from lpo_jax.config import OptimizerConfig
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params
from lpo_jax.models.parameters import num_params
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import TokenStats
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo
from lpo_jax.runs.state import TrainState
from lpo_jax.training.optimizer import make_optimizer
from lpo_jax.training.step import update

P, K, S, T = 4, 8, 512, 448


@pytest.mark.slow
def test_the_gradient_computes_no_more_than_the_model():
    """Without recomputed layers: cuDNN's attention in every layer, each forward pass once, and each product once."""
    config = ModelConfig(*("qwen3", 151936, 2048, 28, 16, 8, 128, 6144, 40960), rope_theta=1e6, qk_norm=True)
    place = jax.sharding.SingleDeviceSharding(h100(1)[0])
    on_gpu = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    runner = ModelRunner(
        config, token_budget=S + K * T, dtype=jnp.dtype(jnp.bfloat16), attention="cudnn", remat=False
    )
    groups = Groups(ints(P, S), ints(P), ints(P, K, T))
    cotangent = TokenStats(jax.ShapeDtypeStruct((P, K, T), jnp.float32))
    arguments = map(on_gpu, (abstract_params(config), groups, cotangent))
    program = parse_hlo(jax.jit(runner.pull_back).lower(*arguments).compile().as_text())

    calls = collections.Counter()
    for instruction, _, times in program.walk():
        if target := re.search(r'custom_call_target="__cudnn\$(\w+)"', instruction.rest):
            calls[target[1]] += times
    # Of each layer and microbatch, there are three: prompts, responses to prompts, responses to themselves.
    each = 3 * config.num_layers * P
    assert calls == {"fmhaSoftmax": each, "fmhaSoftmaxBackward": each}

    # The text does not contain the products inside cuDNN: two forward, and five backward with the scores.
    pair = 2.0 * config.num_layers * config.num_heads * config.head_width
    product = pair * P * (S * S / 2 + K * T * (S + T / 2))
    of_layers = num_params(config, "matrix") * P * (S + K * T)
    model = 6 * (of_layers + config.vocab_size * config.width * P * K * T) + 6 * product
    computed = program_cost(program).flops + 7 * product
    print(f"{computed / model:.3f} of the FLOPs of the model")
    assert computed <= 1.1 * model


@pytest.mark.slow
def test_an_update_is_in_place():
    """Parameters and moments are not copied: the temporaries of a short batch are little more than the gradient."""
    config = ModelConfig(*("qwen3", 2048, 2048, 8, 16, 8, 128, 6144, 4096), rope_theta=1e6, qk_norm=True)
    place = jax.sharding.SingleDeviceSharding(h100(1)[0])
    on_gpu = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    optimizer, params = make_optimizer(OptimizerConfig(), 1), abstract_params(config)
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    runner = ModelRunner(config, token_budget=512, dtype=jnp.dtype(jnp.bfloat16), attention="cudnn")
    batch = (
        Groups(ints(2, 64), ints(2), ints(2, 2, 64)),
        TokenStats(jax.ShapeDtypeStruct((2, 2, 64), jnp.float32)),
    )
    arguments = jax.tree.map(on_gpu, (state, *batch))
    memory = update.lower(runner, optimizer, *arguments).compile().memory_analysis()
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory.alias_size_in_bytes >= 3 * size and memory.temp_size_in_bytes <= 1.3 * size
