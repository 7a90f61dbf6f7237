"""Chunked log-probs and blocked, merged attention against their plain twins."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import EPS, EXACT, astype, in_float64

from lpo_jax.models import attend, attention, decoder, head

rng = np.random.default_rng(0)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


STATS = ("logp", "entropy", "top_logp", "collision", "hidden_norm")


TEMPERATURE, V, D = 0.7, 50, 8


def head_case(tokens, weighted, dtype):
    """States, output matrix, targets, ids of the top 5 tokens, and cotangents by the names of `weighted`."""
    hidden, unembed = rng.normal(size=(2, tokens, D)), rng.normal(size=(V, D))
    targets = jnp.asarray(rng.integers(0, V, (2, tokens)))
    top_ids = jnp.asarray(np.argsort(hidden @ unembed.T, axis=-1)[..., ::-1][..., :5])
    cotangent = {n: rng.normal(size=top_ids.shape if n == "top_logp" else targets.shape) for n in weighted}
    return *astype((hidden, unembed), dtype), targets, top_ids, astype(cotangent, dtype)


def by_chunks(hidden, unembed, targets, top_ids, cotangent):
    options = {"top_ids": top_ids, "extra": ("collision", "hidden_norm")}
    value, stats = head.weighted_log_probs(hidden, unembed, targets, cotangent, TEMPERATURE, **options)
    return 3 * value, stats


def plain(hidden, unembed, targets, top_ids, cotangent):
    logp = jax.nn.log_softmax(hidden @ unembed.T / TEMPERATURE)
    p = jnp.exp(logp)
    stats = {
        "logp": jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0],
        "entropy": -(p * logp).sum(-1),
        "top_logp": jnp.take_along_axis(logp, top_ids, axis=-1),
        "collision": (p**2).sum(-1),
        "hidden_norm": jnp.linalg.norm(hidden, axis=-1),
    }
    return 3 * sum((stats[name] * weight).sum() for name, weight in cotangent.items()), stats


def with_gradient(loss):
    """One program for the values and the gradient by the states and the output matrix."""
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * V)  # 16 tokens a chunk
    monkeypatch.setattr(head, "FEWEST_TOKENS", 1)


@pytest.mark.parametrize(
    "tokens, weighted",
    [
        (7, STATS),
        (37, STATS),
        (37, ("logp",)),
        *(slow(n, STATS) for n in (1, 16)),
        *(slow(37, some) for some in (("logp", "entropy"), STATS[1:])),
    ],
)
@in_float64
def test_chunked_log_probs_equal_plain_ones(small_chunks, tokens, weighted):
    """More tokens than a chunk, ragged last chunk; values, and gradients through any of the statistics."""
    case = head_case(tokens, weighted, np.float64)
    hidden, unembed, _, top_ids, _ = case
    (value, stats), gradient = with_gradient(by_chunks)(*case)
    (want_value, want), want_gradient = with_gradient(plain)(*case)
    assert {x.dtype for x in jax.tree.leaves((stats, gradient))} == {np.dtype(np.float64)}
    chex.assert_trees_all_close(stats, want, rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(gradient, want_gradient, rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(value, want_value, rtol=EXACT, atol=EXACT)
    top = head.top_tokens(hidden, unembed, 5, TEMPERATURE)
    chex.assert_trees_all_close(
        (top["logp"], top["entropy"]), (want["top_logp"], want["entropy"]), atol=EXACT
    )
    chex.assert_trees_all_equal(top["ids"], top_ids)


def test_chunked_log_probs_in_float32_differ_by_rounding(small_chunks):
    """The relative rounding error of a logit grows with D, and that of a statistic and of the slopes with V."""
    with jax.enable_x64(True):
        case = head_case(37, STATS, np.float64)
        (_, want), want_gradient = with_gradient(by_chunks)(*case)
    rounding = (D + V) / 2 * EPS * np.abs(case[0] @ case[1].T / TEMPERATURE).max()
    (_, stats), gradient = with_gradient(by_chunks)(*astype(case, np.float32))
    assert {x.dtype for x in jax.tree.leaves((stats, gradient))} == {np.dtype(np.float32)}
    chex.assert_trees_all_close(astype(stats, np.float64), astype(want, np.float64), rtol=0, atol=rounding)
    for got, exact in zip(astype(gradient, np.float64), astype(want_gradient, np.float64)):
        np.testing.assert_array_less(np.abs(got - exact).max(), rounding * np.abs(exact).max())


def test_no_array_of_all_tokens_by_vocabulary():
    """At V = 152k and 16k tokens the gradient's largest buffer is one chunk, and its logits are computed once."""
    X, D, V = 16384, 64, 152_064
    shapes = (jax.ShapeDtypeStruct((1, X, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32))
    targets, cotangent = jnp.zeros((1, X), jnp.int32), {"logp": jnp.ones((1, X))}
    loss = lambda h, u: head.weighted_log_probs(h, u, targets, cotangent)[0]  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < 16 * head.FEWEST_TOKENS * V  # four chunks of float32; tokens x V would be 10 GB
    assert f"{X},{V}" not in compiled.as_text()


@pytest.mark.parametrize("differentiated", [0, 1])
def test_gradient_of_one_side_costs_two_products(differentiated):
    """A frozen output matrix costs no gradient: the chunks' flops show what is computed."""
    X, D, V = 64, 32, 512
    h, u, targets, weight = (
        jnp.ones((1, X, D)),
        jnp.ones((V, D)),
        jnp.zeros((1, X), jnp.int32),
        jnp.ones((1, X)),
    )
    loss = lambda h, u: head.weighted_log_probs(h, u, targets, {"logp": weight})[0]  # noqa: E731
    text = jax.jit(jax.grad(loss, differentiated)).lower(h, u).compile().as_text()
    assert sum(" dot(" in line for line in text.splitlines()) == 2


def plain_attention(q, k, v, mask):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bxhn,byhn->bhxy", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("bhxy,byhn->bxhn", weights, v)


def with_normaliser(q, k, v, mask):
    """The same results as `attend`, by autodiff."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bxhn,byhn->bxhy", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bxhy,byhn->bxhn", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize(
    "ordered, Y, block",  # block: 512 for whole rows, 4 for blocks, 2 for strips of several blocks
    [
        (False, 7, 512),
        (False, 23, 2),
        (True, 23, 4),
        (True, 23, 2),
        *(slow(False, 23, block) for block in (512, 4)),
        *(slow(False, 7, block) for block in (4, 2)),
        slow(True, 23, 512),
    ],
)
def test_attention_and_its_gradient_equal_autodiff(monkeypatch, ordered, Y, block):
    for name, value in {"BLOCK_SCORES": 0, "FEWEST_QUERIES": block}.items():
        monkeypatch.setattr(attend, name, value)
    B, X, H, G, N = 2, 23, 4, 2, 8
    q, k, v = normal(B, X, H, N), normal(B, Y, G, N), normal(B, Y, G, N)
    mask = jnp.asarray(rng.random((B, X, Y)) < 0.6).at[0, 3].set(False)
    mask = mask & jnp.tri(X, dtype=bool) if ordered else mask
    seen = mask.any(-1)
    cotangents = normal(B, X, H, N) * seen[..., None, None], normal(B, X, H) * seen[..., None]
    (out, lse), gradient = pulled_back(functools.partial(_attend, ordered), mask, cotangents, q, k, v)
    (want, want_lse), want_gradient = pulled_back(with_normaliser, mask, cotangents, q, k, v)
    out, lse, want, want_lse, seen = jax.device_get((out, lse, want, want_lse, seen))
    chex.assert_trees_all_close((out[seen], lse[seen]), (want[seen], want_lse[seen]), atol=1e-5)
    assert np.isfinite(out).all() and (lse[~seen] < -1e37).all()
    chex.assert_trees_all_close(gradient, want_gradient, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(attend, mask, cotangents, *qkv):
    results, pull_back = jax.vjp(lambda *qkv: attend(*qkv, mask), *qkv)
    return results, pull_back(cotangents)


def _attend(ordered, q, k, v, mask):
    return attention.attend(q, k, v, mask, ordered)


def test_merged_sources_equal_one_source():
    q, k, v = normal(2, 5, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8)
    mask = jnp.asarray(rng.random((2, 5, 9)) < 0.6).at[:, :, 8].set(True)

    @jax.jit
    def merged(q, k, v, mask):
        parts = [attention.attend(q, k[:, a:b], v[:, a:b], mask[..., a:b]) for a, b in ((0, 4), (4, 9))]
        return attention.merge(parts)[0]

    chex.assert_trees_all_close(merged(q, k, v, mask), jax.jit(plain_attention)(q, k, v, mask), atol=1e-5)


def test_source_without_a_key_has_no_weight():
    q, k, v = normal(1, 2, 2, 4), normal(1, 3, 2, 4), normal(1, 3, 2, 4)

    @jax.jit
    def merged(q, k, v):
        nothing = attention.attend(q, 1e3 * k, 1e3 * v, jnp.zeros((1, 2, 3), bool))
        something = attention.attend(q, k, v, jnp.ones((1, 2, 3), bool))
        return attention.merge([nothing, something])[0], something[0]

    chex.assert_trees_all_close(*merged(q, k, v))


def test_attention_runs_forward_once_where_its_results_are_kept(monkeypatch, tiny_config, tiny_params):
    tokens = jnp.ones((2, 16), jnp.int32)

    def flops(kept):
        monkeypatch.setattr(decoder, "KEPT", kept)
        loss = lambda params: decoder.logits(tiny_config, params, tokens).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(tiny_params).compile().cost_analysis()["flops"]

    assert flops(attend.KEPT) < flops("nothing of that name")
