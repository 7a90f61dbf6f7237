"""Adapters against the model they are merged into."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import EXACT, astype, in_float64

from lpo_jax.errors import UserError
from lpo_jax.models import decoder, lora
from lpo_jax.models.lora import Adapted, Frozen, Lora
from lpo_jax.models.parameters import matrix_names
from lpo_jax.sampling.decode import decode_layer

LORA = Lora(rank=3, alpha=6.0)
init = jax.jit(lora.init, static_argnums=(0, 1))
merge = jax.jit(lora.merge_adapters)


@pytest.fixture(scope="module")
def adapters(tiny_config):
    """As after some training: B is no longer zero."""
    fresh, rng = init(tiny_config, LORA, jax.random.key(1)), np.random.default_rng(1)
    return jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), jax.device_get(fresh))


@pytest.fixture(scope="module")
def rows(tiny_config):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, tiny_config.vocab_size, (3, 9)).astype(np.int32)
    return tokens, np.arange(9) < np.array([[9], [4], [1]])


@functools.partial(jax.jit, static_argnums=0)
def log_probs(config, params, rows):
    tokens, mask = rows
    logits = decoder.logits(config, params, tokens, mask, dtype=params["embed"].dtype)
    return jnp.where(mask[..., None], jax.nn.log_softmax(logits), 0.0)


def test_untrained_adapters_change_nothing(tiny_config, tiny_params, rows):
    fresh = init(tiny_config, LORA, jax.random.key(0))
    joined = lora.with_adapters(Frozen(tiny_params, LORA.scale), fresh)
    got, want = log_probs(tiny_config, joined, rows), log_probs(tiny_config, tiny_params, rows)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    chex.assert_trees_all_equal(merge(joined), tiny_params)
    assert lora.with_adapters(None, tiny_params) is tiny_params


@pytest.mark.parametrize("targets", [matrix_names(), ("wo",), ("wq", "w_down")])
@in_float64
def test_adapted_and_merged_models_agree(tiny_config, tiny_params, adapters, rows, targets):
    some = astype({"layers": {name: adapters["layers"][name] for name in targets}}, np.float64)
    joined = lora.with_adapters(Frozen(tiny_params, LORA.scale), some)
    adapted = log_probs(tiny_config, joined, rows)
    assert np.abs(adapted - np.asarray(log_probs(tiny_config, tiny_params, rows))).max() > 0.1
    chex.assert_trees_all_close(adapted, log_probs(tiny_config, merge(joined), rows), rtol=0, atol=EXACT)


def test_merging_one_layer_is_merging_all(tiny_config, tiny_params, adapters):
    joined = lora.with_adapters(Frozen(tiny_params, LORA.scale), adapters)
    one = merge(jax.tree.map(lambda x: np.asarray(x)[1], joined["layers"]))
    want = jax.tree.map(lambda x: np.asarray(x)[1], merge(joined)["layers"])
    chex.assert_trees_all_close(one, want, atol=1e-6)


@in_float64
def test_gradient_equals_that_of_the_merged_model(tiny_config, tiny_params, adapters, rows):
    """Chain rule through the dense matrices, with A B written out here in one einsum a shape."""
    adapters = astype(adapters, np.float64)
    frozen = Frozen(tiny_params, LORA.scale)
    written = {"wo": "lhnr,lrd->lhnd", "wq": "ldr,lrhn->ldhn", "wk": "ldr,lrgn->ldgn", "wv": "ldr,lrgn->ldgn"}

    def dense(adapters):
        layers = dict(tiny_params["layers"])
        for name, ab in adapters["layers"].items():
            change = jnp.einsum(written.get(name, "lir,lrj->lij"), ab["a"], ab["b"])
            layers[name] = layers[name] + 2.0 * change  # alpha / r
        return {**tiny_params, "layers": layers}

    weight = np.random.default_rng(1).normal(size=(3, 9, tiny_config.vocab_size))
    loss = lambda tree: (weight * log_probs(tiny_config, tree, rows)).sum()  # noqa: E731
    got = jax.jit(jax.grad(lambda x: loss(lora.with_adapters(frozen, x))))(adapters)
    want = jax.jit(jax.grad(lambda x: loss(dense(x))))(adapters)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(jax.device_get(want)))
    chex.assert_trees_all_close(got, want, rtol=EXACT, atol=EXACT)


def test_backward_makes_no_gradient_of_the_base(tiny_config, tiny_params, adapters, rows):
    """No product in the whole program has the shape of a matrix of the base."""
    frozen = Frozen(tiny_params, LORA.scale)
    sizes = lambda shape: tuple(sorted(shape))  # noqa: E731  # a gradient may come out transposed
    shapes = {sizes(x.shape[1:]) for name, x in tiny_params["layers"].items() if name in matrix_names()}
    shapes.add(sizes(tiny_params["embed"].shape))

    def products(trained, join):
        program = jax.make_jaxpr(jax.grad(lambda x: log_probs(tiny_config, join(x), rows).sum()))(trained)
        return {sizes(shape) for shape in _product_shapes(program.jaxpr)} & shapes

    assert products(tiny_params, lambda x: x) == shapes
    assert not products(adapters, lambda x: lora.with_adapters(frozen, x))


def _product_shapes(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _product_shapes(inner)


def test_abstract_adapters_describe_fresh_ones(tiny_config):
    some = dataclasses.replace(LORA, targets=("wo", "w_up"))
    abstract = lora.abstract_params(tiny_config, some)
    shapes = {name: (ab["a"].shape, ab["b"].shape) for name, ab in abstract["layers"].items()}
    assert shapes == {"wo": ((2, 4, 8, 3), (2, 3, 32)), "w_up": ((2, 32, 3), (2, 3, 48))}
    fresh = init(tiny_config, some, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, abstract)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"targets": ("w_gat",)}, "did you mean 'w_gate'"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 16}, "smaller side of wk, 16"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(tiny_config, bad, message):
    with pytest.raises(UserError, match=message) as error:
        dataclasses.replace(LORA, **bad).check(tiny_config)
    assert "\n" not in str(error.value)


def test_early_updates_are_sampled_in_bfloat16(tiny_config):
    """Twenty updates of 1e-6 in B: the sampler's layer adds the whole change, where merged weights lose most of it.

    Of outputs rounded to bfloat16, the share is their change along the true one. Here it is 0.96 to 0.99; added up in
    bfloat16, or merged, it is 0.06.
    """
    rng, scale = np.random.default_rng(0), 2.0
    weight = jnp.asarray(rng.normal(size=(256, 256)) / 16, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16)
    a, b = np.float32(rng.normal(size=(256, 8)) / 16), np.float32(20e-6 * rng.choice([-1, 1], (8, 256)))
    true = scale * np.float64(x) @ a @ b
    share = lambda changed, base: (np.float64(changed - base) * true).sum() / np.square(true).sum()  # noqa: E731

    def sampled(b):
        stacked = {"w_gate": Adapted(weight[None], a[None], b[None], scale)}
        layer = decode_layer(tiny_config, stacked, 0, jnp.dtype(jnp.bfloat16))["w_gate"]
        return np.float64(jax.jit(layer.product, static_argnums=0)("rd,df->rf", x))

    assert share(sampled(b), sampled(0 * b)) == pytest.approx(1, abs=0.15)
    merged = Adapted(weight, a, b, scale).merged().astype(jnp.bfloat16)
    assert share(np.float64(x) @ np.float64(merged), np.float64(x) @ np.float64(weight)) < 0.2
