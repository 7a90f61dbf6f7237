"""TPU kernels against their plain twins in the Pallas interpreter, and compiled for TPUs that need not be present."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import compile_for, normal, rng, values_and_gradients

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models import attention
from lpo_jax.models.attention import Causal, attend_pages, shared_prefix_attention
from lpo_jax.models.eight_bits import Quantised, store, stored_dtype
from lpo_jax.models.kernels import pages, splash
from lpo_jax.models.kernels.choice import uses_kernels
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.parallel import sharding
from lpo_jax.planner.topology import parse_topology, tpu_devices
from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest
from lpo_jax.training.session import open_session

INTERPRETED = ("interpret", "interpret_triton")  # the kernels for TPUs and for GPUs


@pytest.fixture
def small_blocks(monkeypatch):
    """Small blocks, so that short rows have several; cached programs of other block sizes are dropped."""
    monkeypatch.setattr(splash, "QUERIES", 128)
    monkeypatch.setattr(splash, "KEYS", 128)


# The interpreter's programs take seconds to compile: one of each kind, the other combinations when there is time.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("heads, window", [((4, 2), 9), slow((4, 2), None), slow((3, 3), 9)])
def test_causal(small_blocks, tiny_config, heads, window):
    """Padding on either side, a row without any token, rows longer than a block."""
    (H, G), X = heads, 140
    q, k, v = normal(4, X, H, 16), normal(4, X, G, 16), normal(4, X, G, 16)
    index = jnp.arange(X)
    first, last = jnp.array([[0], [0], [131], [0]]), jnp.array([[X], [5], [X], [0]])
    valid = (first <= index) & (index < last)
    rows = Causal(valid, jnp.maximum(index - first, 0))
    config = dataclasses.replace(tiny_config, sliding_window=window)
    run = lambda choice: values_and_gradients(  # noqa: E731
        lambda *qkv: rows.replace(attention=choice)(config, *qkv)[0], valid[..., None, None], q, k, v
    )
    chex.assert_trees_all_close(run("interpret"), run("plain"), atol=1e-5)


@pytest.mark.parametrize(
    "sizes, window",
    [
        ((3, 7, 140), 9),
        *(slow(sizes, None) for sizes in ((2, 20, 17), (3, 7, 140), (1, 150, 6))),
        *(slow(sizes, 9) for sizes in ((2, 20, 17), (1, 150, 6))),
    ],
)
def test_shared_prefix(small_blocks, sizes, window):
    """Ragged prompts, several K, parts of a row within a block and beyond one."""
    K, S, T = sizes
    P, X = 3, S + K * T
    q, k, v = normal(P, X, 4, 16), normal(P, X, 2, 16), normal(P, X, 2, 16)
    lengths = jnp.array([S, 1, S // 2])
    real = jnp.concatenate([jnp.arange(S) < lengths[:, None], jnp.ones((P, K * T), bool)], axis=1)[
        ..., None, None
    ]

    def run(choice):
        function = lambda *qkv: shared_prefix_attention(*qkv, lengths, S, K, window, choice)  # noqa: E731
        return values_and_gradients(function, real, q, k, v)

    kernel, plain = run("interpret"), run("plain")
    chex.assert_trees_all_close(kernel, plain, atol=1e-5)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(kernel))


def test_the_backward_pass_is_as_precise_as_the_forward_one():
    """By default, a float32 product is a bfloat16 one on a TPU; both passes have to set the precision."""
    q = jax.ShapeDtypeStruct((1, 128, 2, 16), jnp.float32)
    valid = jnp.ones((1, 128), bool)
    loss = lambda q: splash.causal(q, q, q, valid, interpret=True).sum()  # noqa: E731
    runner = str(jax.make_jaxpr(jax.grad(loss))(q))
    precise = runner.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert precise == runner.count("dot_general[") >= 2 + 3 + 4  # forward, dq, dk and dv


Z, X, M = 40, 8, 7  # pages, tokens of a page, pages of the longest row


def page_table(rows):
    """Pages of all rows in any order; behind the last page of some rows are numbers that stand for none."""
    table = rng.permutation(Z)[: rows * M].reshape(rows, M)
    table[1, 5:], table[2, 3:], table[-1] = Z, -7, 10**6
    return jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize(
    "block, stored", [(1, None), (3, "int8"), slow(3, None), slow(16, None), slow(16, "fp8")]
)
def test_keys_in_pages(monkeypatch, block, stored):
    """Pages in any order and a pool without a free page; bounds within a page and at its end; a row without keys.

    Starts are those of sliding windows: each query's own, before the first key, behind several blocks.
    """
    monkeypatch.setattr(pages, "MOST_PAGES", block)
    pages.attend_pages.clear_cache()
    B, G, C, I, N = 5, 2, 3, 2, 16
    q, pool, table = normal(B, G, C, I, N), normal(Z, 2, G, N, X), page_table(B)
    if stored:
        pool = store(pool, stored_dtype(stored, pool.dtype), 3)
    stop = jnp.array([M * X, 40, 17, 1, 0])
    start = jnp.array([[0, 49, 50], [3, 39, 11], [5, 5, 6], [-7, 0, 0], [0, 0, 0]])
    kernel = jax.jit(lambda *x: attend_pages(*x, "interpret"))(q, pool, table, start, stop)
    plain = jax.jit(lambda *x: attend_pages(*x, "plain"))(q, pool, table, start, stop)
    some = lambda tree: jax.tree.map(lambda x: x[:-1], tree)  # noqa: E731
    chex.assert_trees_all_close(some(kernel), some(plain), atol=1e-5)
    nothing = jax.tree.map(lambda x: x[-1], kernel)
    chex.assert_trees_all_close(nothing[0], jnp.zeros_like(nothing[0]))
    assert (nothing[1] == plain[1][-1]).all()


def test_the_twin_is_attention_to_keys_in_order():
    B, G, C, I, N = 2, 2, 1, 2, 16
    k, v, q = normal(B, G, N, M * X), normal(B, G, M * X, N), normal(B, G, C, I, N)
    pool = np.zeros((Z, 2, G, N, X), np.float32)
    table = rng.permutation(Z)[: B * M].reshape(B, M).astype(np.int32)
    keys, values = np.asarray(k), np.asarray(v)
    for b, m in np.ndindex(B, M):
        at = slice(m * X, (m + 1) * X)
        pool[table[b, m]] = keys[b, :, :, at], values[b, :, at].swapaxes(1, 2)
    start, stop = np.array([[0], [9]], np.int32), np.array([M * X, 30], np.int32)
    plain = jax.jit(lambda *x: attend_pages(*x, "plain"))
    chex.assert_trees_all_close(
        plain(q, pool, table, start, stop), jax.jit(attention.attend_cached)(q, k, v, start, stop)
    )


def test_only_pages_with_keys_are_read(monkeypatch):
    """Pages before a row's first and behind its last key, and those of other rows, may contain anything."""
    monkeypatch.setattr(pages, "MOST_PAGES", 2)
    pages.attend_pages.clear_cache()
    q, pool = normal(3, 1, 1, 1, 16), normal(Z, 2, 1, 16, X)
    table = jnp.asarray(rng.permutation(Z)[: 3 * M].reshape(3, M))
    start, stop = jnp.array([[26], [0], [0]]), jnp.array([44, 0, 9])
    needed = jnp.concatenate([table[0, 3:6], table[2, :2]])
    pool = jnp.where(jnp.isin(jnp.arange(Z), needed)[:, None, None, None, None], pool, jnp.nan)
    out, lse = attend_pages(q, pool, table, start, stop, "interpret")
    assert jnp.isfinite(out).all() and jnp.isfinite(lse).all()


def test_each_page_is_read_once():
    """The steps of the grid list every page with keys once; where a block has no such page, nothing new is listed."""
    n, B = 3, 6
    stop = jnp.array([0, 5 * X, 1, M * X, 2 * X + 1, 0])
    start = jnp.array([0, 2 * X + 3, 0, 0, X, 0])[:, None]
    table = jnp.arange(B * M).reshape(B, M)
    blocks = jax.jit(pages._blocks, static_argnums=(3, 4, 5))
    steps, row, block, first, last, page = blocks(table, start, stop, n, X, B * M)
    expected = [page for b in range(B) for page in table[b, start[b, 0] // X : -(-stop[b] // X)].tolist()]
    listed = np.asarray(page)[:steps]
    read = [p for place in listed.T for p, before in zip(place, [None, *place]) if p != before]
    assert (
        sorted({*read} - {0}) == sorted(expected) and len(read) <= len(expected) + n
    )  # 0: before any was read
    blocks = [(b, j) for b in range(B) for j in range(int(first[b]), int(last[b]) + 1)]
    assert list(zip(np.asarray(row)[:steps], np.asarray(block)[:steps])) == blocks
    assert len(blocks) == 1 + 2 + 1 + 3 + 1 + 1


@pytest.mark.parametrize("G", [2, slow(1)])
def test_on_a_mesh(G):
    """Each device runs the kernel on its rows and heads, with its pages; an axis that does not divide stays whole."""
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 1, 2), sharding.AXES, devices=jax.devices()[:4], axis_types=auto)
    P, K, H = 4, 2, 4
    q, pool = normal(P, G, K, H // G, 16), normal(Z, 2, G, 16, X)
    start, stop = jnp.zeros((P, K), jnp.int32), jnp.array([9, 3, 1, 40])
    table = jnp.asarray(np.stack([rng.permutation(Z // 2)[:M] for _ in range(P)]), jnp.int32)
    step = jax.jit(lambda *arrays: attend_pages(*arrays, start, stop, "interpret"))
    alone = step(q, pool, table + jnp.array([0, 0, Z // 2, Z // 2])[:, None])
    with jax.set_mesh(mesh):
        together = step(q, pool, table)
        chex.assert_trees_all_close(together, alone, atol=1e-6)
        heads = ("tensor",) if G == 2 else None
        assert together[0].sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", heads)), 5
        )


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["interpret", "interpret_triton"])
def test_the_gradient_on_a_mesh(choice):
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=auto)
    P, S, K, T = 4, 5, 2, 6
    lengths = jnp.array([5, 1, 3, 4])
    row = normal(P, S + K * T, 4, 16), normal(P, S + K * T, 2, 16), normal(P, S + K * T, 2, 16)
    run = lambda: values_and_gradients(  # noqa: E731
        lambda *qkv: shared_prefix_attention(*qkv, lengths, S, K, attention=choice), True, *row
    )
    alone = run()
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(run(), alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", INTERPRETED)
def test_the_model_with_kernels_is_the_model(tiny_config, tiny_params, kernels):
    """Sampling and scoring with the kernels give the same tokens and log-probs as without."""
    prompts, lengths = np.array([[5, 6, 7, 8], [9, 3, 0, 0]]), np.array([4, 2])

    def run(choice):
        sampler = Sampler(tiny_config, (1,), attention=choice)
        batch = PromptBatch(prompts, lengths, np.arange(2))
        drawn = sampler(sampler.prepare(tiny_params), batch, SampleRequest(2, max_tokens=5))
        groups = Groups(jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(drawn.tokens))
        stats = score(ModelRunner(tiny_config, attention=choice), tiny_params, groups)
        return drawn, np.where(drawn.mask, stats.logp, 0.0)

    (drawn, scored), (plain, plain_scored) = run(kernels), run("plain")
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    np.testing.assert_allclose(scored, plain_scored, atol=1e-4)
    np.testing.assert_allclose(drawn.log_probs, scored, atol=1e-4)


def test_kernels_where_there_are_tpus(monkeypatch):
    assert not uses_kernels("auto") and not uses_kernels("plain")
    assert uses_kernels("pallas") and uses_kernels("interpret")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert uses_kernels("auto") and not uses_kernels("plain")


def test_kernels_where_there_is_no_tpu(run_config):
    values = run_config()
    values["model"] = {**values["model"], "attention": "pallas"}
    session = open_session(parse_config(values))
    with pytest.raises(UserError, match=r"model\.attention=pallas: there is no TPU here"), session:
        pass


@pytest.mark.parametrize(
    ("kernels", "kv_tokens", "says"),
    [
        (False, 4096, "with kernels only, and attention is plain here; set it to 0"),
        (True, 200, r"1 pages of 128 tokens .* needs 2; raise it"),
    ],
)
def test_a_cache_in_pages_is_checked_before_the_run(run_config, monkeypatch, kernels, kv_tokens, says):
    monkeypatch.setattr("lpo_jax.training.session.uses_kernels", lambda attention: kernels)
    values = run_config(sampling={"kv_tokens": kv_tokens})
    session = open_session(parse_config(values))
    with pytest.raises(UserError, match=rf"^sampling\.kv_tokens: .*{says}") as error, session:
        pass
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "qwen3"])
@pytest.mark.parametrize(
    "name, num_devices", [("v5e:2x2", 1), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("v5e:2x2", 4)]
)
def test_compiles_for_tpus(name, num_devices, model):
    """Heads of 64 and of 128, float32 and bfloat16, blocks of full size: forward, backward and decode are kernels."""
    H, G, N, dtype = {"smollm2": (8, 4, 64, jnp.float32), "qwen3": (16, 8, 128, jnp.bfloat16)}[model]
    pytest.importorskip("libtpu")
    devices = tpu_devices(parse_topology(name))[:num_devices]
    P, S, K, T = 2, 512, 2, 1024
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731

    def update(q, k, v, lengths):
        loss = lambda *qkv: shared_prefix_attention(*qkv, lengths, S, K, attention="pallas").sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    row = [shape(P, S + K * T, heads, N) for heads in (H, G, G)]
    compiled = compile_for(devices, update, *row, shape(P, dtype=jnp.int32)).as_text()
    assert compiled.count("tpu_custom_call") >= 6  # forward, dq, dk and dv of prompts and of responses

    q, table = shape(P, G, K, H // G, N), shape(P, T // 128, dtype=jnp.int32)
    bounds = shape(P, K, dtype=jnp.int32), shape(P, dtype=jnp.int32)
    step = functools.partial(attend_pages, attention="pallas")
    for kv_dtype in ("compute", "int8", "fp8"):
        numbers = shape(16, 2, G, N, 128, dtype=stored_dtype(kv_dtype, dtype))
        scale = shape(16, 2, G, 1, 128, dtype=jnp.float32)
        pool = numbers if kv_dtype == "compute" else Quantised(numbers, scale)
        assert "tpu_custom_call" in compile_for(devices, step, q, pool, table, *bounds).as_text()
