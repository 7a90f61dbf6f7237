"""The gradient of prompts with images: plain autodiff, microbatches, adapters and meshes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import EXACT, astype, in_float64

from lpo_jax import load_model
from lpo_jax.models import decoder, lora
from lpo_jax.models.lora import Frozen
from lpo_jax.models.prompt_images import expand, lay_out
from lpo_jax.models.runner import Groups, ModelRunner, picture_array, score
from lpo_jax.objectives import TokenStats
from lpo_jax.parallel.mesh import MeshSizes, build_mesh
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
# Each family compiles large programs: the fast tests compute one gradient of one of them.
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
SIZES = [[(60, 90)], [(30, 150), (99, 61)], [], [(120, 100)]]
P, K, T = 4, 3, 5
init_adapters = jax.jit(lora.init, static_argnums=(0, 1))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A model, groups of ragged prompts with no, one and two images, their mask, and coefficients."""
    model = load_model(GOLDEN / request.param)
    rng, vision = np.random.default_rng(1), model.config.vision
    cut, rows = [], []
    for sizes in SIZES:
        cut.append([vision.processor.patches(rng.integers(0, 256, (*s, 3), np.uint8)) for s in sizes])
        ids = [*rng.integers(3, 60, 3), *[60, vision.image_token, 61] * len(sizes), *rng.integers(3, 60, 2)]
        rows.append(expand(vision, ids, [image.grid for image in cut[-1]]))
    lengths = np.array([len(row) for row in rows], np.int32)
    prompts = np.zeros((P, lengths.max()), np.int32)
    for prompt, row in zip(prompts, rows):
        prompt[: len(row)] = row
    responses = rng.integers(3, 60, (P, K, T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(2, T + 1, (P, K, 1))
    sign = np.where(np.arange(K) == 0, -1, 1)[:, None]
    weight = np.where(mask, sign * rng.uniform(0.5, 2, (P, K, T)), 0).astype(np.float32)
    groups = Groups(prompts, lengths, responses, pictures=picture_array(cut))
    return model, groups, mask, weight


def pull_back(runner, params, packed, weight, frozen=None):
    """The gradient and the statistics, by a program of which the batch is a constant."""
    return jax.jit(lambda params: runner.pull_back(params, packed, TokenStats(weight), frozen))(params)


def plain_log_probs(config, params, groups, dtype=jnp.float32):
    """Log-probs `[P, K, T]` of every response in a row of its own, without anything shared or packed."""
    S, vision = groups.prompts.shape[1], config.vision
    tokens = np.zeros((P * K, S + T), np.int32)
    mask = np.zeros((P * K, S + T), bool)
    for row in range(P * K):
        p, k = divmod(row, K)
        length = groups.lengths[p]
        tokens[row, : length + T] = [*groups.prompts[p, :length], *groups.responses[p, k]]
        mask[row, : length + T] = True
    images = lay_out(config, tokens, mask, [groups.pictures[row // K] for row in range(P * K)])
    logits = decoder.logits(config, params, tokens, mask, images, dtype=dtype)
    never = jnp.isin(jnp.arange(config.vocab_size), jnp.array([vision.image_token, vision.video_token]))
    logp = jax.nn.log_softmax(jnp.where(never, -1e30, logits))
    at = np.repeat(groups.lengths, K)[:, None] - 1 + np.arange(T)
    logp = jnp.take_along_axis(logp, at[..., None], axis=1)
    return jnp.take_along_axis(logp, groups.responses.reshape(P * K, T, 1), axis=-1).reshape(P, K, T)


@pytest.fixture(scope="module")
def exact_case(case):
    """The case in float64, where rounding is far below any mistake; config and parameters instead of a model.

    In float32, the gradients of the two families differ from autodiff's by up to 5e-6 of their norms.
    """
    model, groups, mask, weight = case
    with jax.enable_x64(True):
        return (
            model.config,
            jax.device_put(astype(model.params, np.float64)),
            groups,
            mask,
            np.float64(weight),
        )


@pytest.fixture(scope="module")
def plain(exact_case):
    """The log-probs and the gradient of plain autodiff."""
    config, params, groups, _, weight = exact_case

    def loss(params):
        logp = plain_log_probs(config, params, groups, jnp.float64)
        return (logp * weight).sum(), logp

    with jax.enable_x64(True):
        gradient, logp = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    return logp, gradient


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
        scale = max(float(np.linalg.norm(y)), 1e-2)
        np.testing.assert_array_less(
            np.linalg.norm(np.asarray(x) - np.asarray(y)) / scale, EXACT, err_msg=str(path)
        )


# Whole groups in one row, as in the tests of adapters below, and groups split into single responses.
@pytest.mark.parametrize(
    ("case", "budget"),
    [
        pytest.param("qwen3_vl", 60, id="qwen3_vl-split"),
        pytest.param("qwen3_vl", 1000, id="qwen3_vl-whole", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 60, id="qwen2_5_vl-split", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 1000, id="qwen2_5_vl-whole", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
@in_float64
def test_gradient_by_parts_equals_autodiff(exact_case, plain, budget):
    config, params, groups, mask, weight = exact_case
    logp, gradient = plain
    runner = ModelRunner(config, token_budget=budget, dtype=jnp.float64)
    packed = runner.pack(groups, mask)
    assert (len(packed.layout.token) > 1) == (budget == 60)
    scored = score(runner, params, packed).logp
    np.testing.assert_allclose(np.where(mask, scored, 0), np.where(mask, logp, 0), atol=EXACT)
    trained, stats = pull_back(runner, params, packed, weight)
    assert {x.dtype for x in jax.tree.leaves((trained, gradient))} == {np.dtype(np.float64)}
    assert max(np.abs(x).max() for x in jax.tree.leaves(jax.device_get(trained["vision"]))) > 0.1
    assert_close(trained, gradient)
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, logp, 0), atol=EXACT)


@pytest.mark.slow
@in_float64
def test_gradient_with_a_frozen_tower_equals_autodiff(exact_case, plain):
    config, params, groups, mask, weight = exact_case
    own = {name: x for name, x in params.items() if name != "vision"}
    runner = ModelRunner(config, token_budget=60, dtype=jnp.float64)
    frozen = Frozen({"vision": params["vision"]}, None)
    alone, stats = pull_back(runner, own, runner.pack(groups, mask), weight, frozen)
    assert_close(alone, {name: x for name, x in plain[1].items() if name != "vision"})
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, plain[0], 0), atol=EXACT)


@pytest.mark.slow
def test_the_tower_runs_once_for_a_group(case):
    """In the compiled update: its products do not become more with more responses, splits or microbatches."""
    model, groups, mask, weight = case
    fixed = Frozen({"vision": model.params["vision"]}, None)
    own = {name: x for name, x in model.params.items() if name != "vision"}

    def program(num_responses, budget):
        K = num_responses
        some = dataclasses.replace(groups, responses=groups.responses[:, :K])
        runner = ModelRunner(model.config, token_budget=budget)
        packed = runner.pack(some, mask[:, :K])

        def compiled(packed):
            run = jax.jit(
                lambda params, tower: runner.pull_back(params, packed, TokenStats(weight[:, :K]), tower)
            )
            return run.lower(own, fixed).compile().as_text()

        text = compiled(packed)
        products = [line for line in text.splitlines() if " dot(" in line and "vision" in line]
        without = compiled(packed.replace(images=packed.images.replace(rows=None)))
        flops = program_cost(parse_hlo(text)).flops - program_cost(parse_hlo(without)).flops
        return len(packed.layout.token), len(products), flops

    (one, products, flops), (many, again, same) = program(1, 1000), program(3, 60)
    assert one == 1 < many
    assert products == again > 10
    assert flops == same > 0


@pytest.mark.slow
def test_kernels_see_the_same_images(case):
    """Prompts and responses through the kernels for TPUs, in their interpreter."""
    model, groups, mask, _ = case
    found = [
        np.where(mask, score(runner, model.params, runner.pack(groups, mask)).logp, 0)
        for runner in (ModelRunner(model.config, attention=name) for name in ("interpret", "plain"))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.slow
def test_a_batch_without_images_leaves_the_tower(case):
    model, groups, mask, weight = case
    runner = ModelRunner(model.config, token_budget=200)
    text = dataclasses.replace(groups, pictures=None, prompts=np.minimum(groups.prompts, 59))
    gradient, _ = pull_back(runner, model.params, runner.pack(text, mask), weight)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient["vision"]))


@pytest.mark.slow
def test_adapters_of_the_decoder_see_images(case):
    model, groups, mask, weight = case
    adapters = lora.Lora(2, 4.0)
    trained = init_adapters(model.config, adapters, jax.random.key(0))
    runner = ModelRunner(model.config, token_budget=200)
    packed = runner.pack(groups, mask)
    frozen = Frozen(model.params, adapters.scale)
    gradient, stats = pull_back(runner, trained, packed, weight, frozen)
    assert gradient.keys() == {"layers"} and np.abs(np.asarray(gradient["layers"]["wq"]["b"])).max() > 1e-3
    expected = score(runner, model.params, packed).logp
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, expected, 0), atol=3e-5)


@pytest.mark.slow
@in_float64
def test_gradient_of_adapters_of_the_tower_is_autodiffs(exact_case):
    config, params, groups, mask, weight = exact_case
    inner = "v_down" if config.family == "qwen2_5_vl" else "v_fc2"
    adapters = lora.Lora(2, 4.0, ("wq", "v_qkv", "v_out", inner))
    adapters.check(config)
    rng, fresh = np.random.default_rng(0), init_adapters(config, adapters, jax.random.key(0))
    drawn = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), jax.device_get(fresh))
    trained = jax.device_put(astype(drawn, np.float64))
    assert trained["vision"]["layers"].keys() == {"v_qkv", "v_out", inner}
    frozen = Frozen(params, adapters.scale)
    runner = ModelRunner(config, token_budget=200, dtype=jnp.float64)
    packed = runner.pack(groups, mask)
    gradient, stats = pull_back(runner, trained, packed, weight, frozen)

    def loss(adapters):
        merged = lora.merge_adapters(lora.with_adapters(frozen, adapters))
        logp = plain_log_probs(config, merged, groups, jnp.float64)
        return (logp * weight).sum(), logp

    expected, logp = jax.jit(jax.grad(loss, has_aux=True))(trained)
    assert {x.dtype for x in jax.tree.leaves((gradient, expected))} == {np.dtype(np.float64)}
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(jax.device_get(expected)))
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, logp, 0), atol=EXACT)
    assert_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
@in_float64
def test_meshes_compute_the_same_gradient(exact_case, shape):
    config, params, groups, mask, weight = exact_case
    runner = ModelRunner(config, token_budget=60, dtype=jnp.float64)
    run = lambda: jax.jit(runner.pull_back)(params, runner.pack(groups, mask), TokenStats(weight))  # noqa: E731
    gradient, stats = jax.device_get(run())
    with jax.set_mesh(build_mesh(MeshSizes(*shape))):
        found, others = jax.device_get(run())
    np.testing.assert_allclose(np.where(mask, others.logp, 0), np.where(mask, stats.logp, 0), atol=EXACT)
    assert_close(found, gradient)
