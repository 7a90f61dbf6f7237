"""The layout of matrices for decoding on a CPU: the same products, in float32 on one device only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.models.output_first import FEW_ROWS, OutputFirst, output_first_layer
from lpo_jax.sampling.decode import decode_layout


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(
    "name, shape, axes", [("wq", (24, 4, 5), "rd,dhn->rhn"), ("wo", (4, 5, 24), "rhn,hnd->rd")]
)
def test_products_equal_those_of_the_array(name, shape, axes, rows):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(rows, *(shape[:2] if name == "wo" else shape[:1]))).astype(np.float32)
    layer = output_first_layer({name: jnp.asarray(weight), "q_norm": jnp.ones(5)})
    assert isinstance(layer["q_norm"], jax.Array)
    got = jax.jit(layer[name].product, static_argnums=0)(axes, x)
    np.testing.assert_allclose(got, np.einsum(axes, x, weight), rtol=0, atol=1e-5)


def test_the_sampler_uses_it_in_float32_on_one_device(tiny_config, tiny_params):
    def matrix(dtype):
        return decode_layout(tiny_config, tiny_params, jnp.dtype(dtype))["layers"][0]["w_up"]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        assert isinstance(matrix("float32"), jax.Array)
    assert isinstance(matrix("bfloat16"), jax.Array)
    made, plain = matrix("float32"), tiny_params["layers"]["w_up"][0]
    assert isinstance(made, OutputFirst)
    np.testing.assert_array_equal(made.matrix, plain.T)
