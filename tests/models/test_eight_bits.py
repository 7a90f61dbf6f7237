"""Keys and values in 8 bits: how far they are off, and that attention reads what is stored."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.models.attention import Causal, attend_cached
from lpo_jax.models.eight_bits import load, split, store, stored_dtype, zeros

EIGHT_BITS = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
rng = np.random.default_rng(0)


@EIGHT_BITS
def test_every_token_has_its_own_scale(kv_dtype):
    """Rounding errors are relative to the largest number of the token and head; zeros stay zeros."""
    x = rng.normal(size=(3, 2, 5, 16)).astype(np.float32)
    x[0] *= 1e3
    x[1, 0, 2] = 0
    dtype = stored_dtype(kv_dtype, np.float32)
    stored = store(jnp.asarray(x), dtype)
    assert stored.numbers.dtype == dtype and stored.scale.shape == (3, 2, 5, 1)
    off = np.abs(np.asarray(load(stored, np.float32)) - x)
    largest = np.abs(x).max(-1, keepdims=True)
    bound = largest / 254 if kv_dtype == "int8" else np.maximum(np.abs(x) / 16, largest / 448 * 2**-10)
    assert (off <= bound * (1 + 1e-5)).all() and off.max() > 0
    assert (off[1, 0, 2] == 0).all()
    chex.assert_trees_all_equal(
        store(x, dtype), store(load(stored, np.float32), dtype).replace(scale=stored.scale)
    )


def test_floats_are_stored_as_they_are():
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    assert store(x, np.dtype(np.float32)) is x or (store(x, np.dtype(np.float32)) == x).all()
    assert split(x, x.dtype)[1] is None and zeros((2, 3), np.dtype(np.float32), 1).shape == (2, 3)


@EIGHT_BITS
def test_decode_attention_reads_what_is_stored(kv_dtype):
    """Scales applied to scores and weights are those of the keys and values."""
    B, G, C, I, N, Y = 2, 2, 3, 2, 16, 9
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, G, C, I, N), (B, G, N, Y), (B, G, Y, N)))
    dtype = stored_dtype(kv_dtype, np.float32)
    k, v = store(k * np.exp(rng.normal(size=Y)).astype(np.float32), dtype, 2), store(v, dtype, 3)
    start, stop = np.int32([[0, 2, 8], [1, 0, 3]]), np.int32([9, 4])
    attend = jax.jit(attend_cached)
    got, want = attend(q, k, v, start, stop), attend(q, load(k, q.dtype), load(v, q.dtype), start, stop)
    chex.assert_trees_all_close(got, want, atol=1e-5)


@EIGHT_BITS
def test_a_prefill_attends_to_what_it_stores(kv_dtype, tiny_config):
    q, k, v = (rng.normal(size=(2, 6, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    valid, positions = np.ones((2, 6), bool), np.tile(np.arange(6, dtype=np.int32), (2, 1))
    keeping = Causal(valid, positions, keep=stored_dtype(kv_dtype, np.float32))
    out, kept = jax.jit(lambda *qkv: keeping(tiny_config, *qkv))(q, k, v)
    plain = jax.jit(lambda *qkv: Causal(valid, positions)(tiny_config, *qkv)[0])
    chex.assert_trees_all_close(out, plain(q, *(load(x, np.float32) for x in kept)))
    assert np.abs(out - plain(q, k, v)).max() > 1e-3
