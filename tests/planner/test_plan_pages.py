"""The decode step of Qwen3-8B with a KV cache in pages, compiled for TPU v6e and H100: what it reads and needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import h100

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params
from lpo_jax.models.placement import placed
from lpo_jax.parallel import sharding
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo
from lpo_jax.planner.topology import parse_topology, tpu_devices
from lpo_jax.sampling import Sampling
from lpo_jax.sampling import decode as device
from lpo_jax.sampling.page_pool import allocate_pool
from lpo_jax.sampling.pages import Pool

LAYERS = 36
K, S, T, MEAN = 8, 1024, 4096, 1024
TOKENS = 16  # of a call


def compiled(size, layers, devices, attention, kv_dtype):
    """Compiles `decode_pages` at a small depth, for devices that share every layer."""
    config = ModelConfig(
        *("qwen3", 151936, 4096, layers, 32, 8, 128, 12288, 40960), rope_theta=1e6, qk_norm=True
    )
    dtype = jnp.dtype(jnp.bfloat16)
    mesh = jax.sharding.Mesh(np.reshape(devices, (1, 1, -1)), sharding.AXES)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    with jax.set_mesh(mesh):
        layout = lambda params: device.decode_layout(config, params, dtype)  # noqa: E731
        weights = placed(config, jax.eval_shape(layout, abstract_params(config)))
        settings = device.DecodeSettings(config, (1,), Sampling(), dtype, attention, kv_dtype)

        def placed_page(x):
            where = sharding.spec(mesh, ("batch", None, "kv_heads", None, None), x.shape)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, where))

        allocate = functools.partial(allocate_pool, config, settings.stored, size.pages, size.page_size)
        pool = jax.tree.map(placed_page, jax.eval_shape(allocate))
        rows = device.DecodeState(
            *(ints(size.slots) for _ in range(4)),
            active=jax.ShapeDtypeStruct((size.slots,), bool),
            keys=jax.ShapeDtypeStruct((size.slots, 2), jnp.uint32),
            members=ints(size.prompts, K),
            member_index=ints(size.slots),
        )
        tables = ints(size.prompts, size.pages_of(S - 1)), ints(size.slots, size.pages_of(T))
        program = device.decode_pages.lower(
            settings, weights, rows, ints(size.prompts), *tables, pool, ints(), ints()
        ).compile()
    local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    held = lambda tree: sum(map(local, jax.tree.leaves(tree)))  # noqa: E731
    return program, held(pool[0]), held(weights["layers"][0])


def v6e():
    pytest.importorskip("libtpu")
    return tpu_devices(parse_topology("v6e:2x2"))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["compute", "int8", "fp8"])
@pytest.mark.parametrize(
    "open_devices, attention, tokens, prompts",
    [(v6e, "pallas", MEAN, 32), (lambda: h100(1), "cudnn", 2 * MEAN, 8)],
    ids=["v6e", "h100"],
)
def test_a_decode_step_reads_weights_and_live_pages(open_devices, attention, tokens, prompts, kv_dtype):
    """64 rows of as many tokens each in a pool of four times as many pages, which the program does not copy."""
    devices = open_devices()
    size = Pool(4 * 64 * tokens // 128, 128, 64, prompts)
    step, others = {}, {}
    for layers in (2, 4):
        program, pool, layer = compiled(size, layers, devices, attention, kv_dtype)
        cost = program_cost(parse_hlo(program.as_text(), TOKENS))
        # Two kernels in each layer have the pool as an operand; what they read of it is added below.
        step[layers] = cost.bytes / TOKENS - 2 * layers * pool
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= layers * pool  # the pool is updated in place
        others[layers] = memory.temp_size_in_bytes
    assert max(others.values()) < pool  # neither copied nor gathered
    head = 2 * 151936 * 4096 / len(devices)
    page = pool / size.pages
    live = (64 * size.pages_of(tokens) + 64 // K * size.pages_of(S)) * page
    measured = step[2] + (LAYERS - 2) / 2 * (step[4] - step[2]) + LAYERS * live
    # Pages of 8 bits are half as large, and what a GPU moves besides weights and pages is not.
    most = 1.25 if attention == "cudnn" and kv_dtype != "compute" else 1.15
    assert measured <= most * (head + LAYERS * (layer + live))
    print(f"{measured / (head + LAYERS * (layer + live)):.3f} of weights and live pages")
