"""Int8 weights while sampling: how much they change the model, and that a run accounts for it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.models import quantize
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest

qwix = pytest.importorskip("qwix")


@pytest.mark.parametrize(
    "name, shape, axes", [("wq", (6, 4, 5), "pxd,dhn->pxhn"), ("wo", (4, 5, 6), "pxhn,hnd->pxd")]
)
def test_matrices_have_a_scale_for_each_output_channel(name, shape, axes):
    """No weight is off by more than 1/127 of the largest of its own channel; products are of those weights."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    weight[..., 0] *= 100  # which must not coarsen the other channels
    layer = quantize.quantise_layer({name: jnp.asarray(weight), "q_norm": jnp.ones(5)})
    assert layer[name].array.qvalue.dtype == jnp.int8 and layer["q_norm"].dtype == jnp.float32
    inputs = (0, 1) if name == "wo" else (0,)
    near = np.asarray(qwix.dequantize(layer[name].array))
    assert (np.abs(near - weight) <= np.abs(weight).max(inputs, keepdims=True) / 127 * 1.001).all()
    x = rng.normal(size=(2, 3, *(shape[i] for i in inputs))).astype(np.float32)
    chex.assert_trees_all_close(layer[name].product(axes, x), np.einsum(axes, x, near), rtol=1e-4, atol=1e-4)
    assert layer[name].product(axes, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_sampler_of_8_bits_is_near_and_says_so(tiny_config, tiny_params):
    """Log-probs are those of the quantised model: near those of the float model, but different."""
    prompts, lengths = np.array([[5, 6, 7, 8], [9, 4, 0, 0]], np.int32), np.array([4, 2])
    sampler = Sampler(tiny_config, eos_ids=(1,))
    weights = sampler.prepare(tiny_params, int8=True)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree["layers"]))  # noqa: E731
    assert bytes_of(weights) < 0.4 * bytes_of(sampler.prepare(tiny_params))
    got = sampler(weights, PromptBatch(prompts, lengths, np.arange(2)), SampleRequest(3, max_tokens=6))

    exact = score(ModelRunner(tiny_config), tiny_params, Groups(prompts, lengths, got.tokens)).logp
    gap = np.where(got.mask, np.abs(exact - got.log_probs), 0).max()
    assert gap > 1e-3
    np.testing.assert_array_less(gap, 0.3)
