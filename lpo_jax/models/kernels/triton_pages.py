"""Attention of a few queries to a KV cache in pages, on NVIDIA GPUs, by a Pallas kernel for the Triton compiler.

The plain twin is `attend_pages` in `lpo_jax.models.attention`, the counterpart for TPUs is `pages`. A program of the
grid has one row of the table, one key/value head, and one of several splits of the row's keys, so that few rows also
keep all multiprocessors busy. It reads only the pages between the row's first and last key in its split, each once for
all queries that share it; the splits are merged by their log-sum-exps. The kernel that comes with JAX
(`pallas.ops.gpu.paged_attention`) returns no log-sum-exp, splits the table and not the row's keys, and has no window.

Axes: B rows of the table · C queries of each, I for each key/value head · G key/value heads · N head width · Z pages of
X tokens · M pages of the longest row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lpo_jax.models.eight_bits import Quantised
from lpo_jax.models.kernels.pages import on_each_shard_of_pages
from lpo_jax.models.kernels.triton import add_block, empty_softmax, finish, power_of_two, scores_of
from lpo_jax.models.kernels.union import merge

# Rows with fewer programs than these are split: two programs for each multiprocessor of a data-centre GPU, which has
# 108 to 148 of them. Each split writes an output of its own, which is read again by the merge.
PROGRAMS = 256
MOST_SPLITS = 16
QUERIES = 64  # of a program: more of one prompt are divided, and read its keys several times, mostly from the L2 cache
BLOCK_BYTES = (
    1 << 15
)  # keys of a step, and as many values; two steps are in shared memory at a time, 163 KiB on Ampere


@functools.partial(jax.jit, static_argnames="interpret")  # traced once for all layers
def attend_pages(q, pool, table, start, stop, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attend from query c of row b to the keys `start[b, c] <= y < stop[b]`; arguments as in `pages.attend_pages`."""
    return on_each_shard_of_pages(
        functools.partial(_attend_pages, interpret=interpret), q, pool, table, start, stop
    )


def number_of_splits(programs: int, M: int) -> int:
    """Return the number of splits of a row's keys, for a table of M pages a row and so many rows times heads."""
    return max(1, min(PROGRAMS // programs, MOST_SPLITS, M))


def _attend_pages(q, pool, table, start, stop, *, interpret):
    B, G, C, I, N = q.shape
    parts = [pool.numbers, pool.scale] if isinstance(pool, Quantised) else [pool]
    (Z, *_, X), M = parts[0].shape, table.shape[1]
    queries, width = min(QUERIES, power_of_two(C * I)), power_of_two(N)
    blocks = pl.cdiv(C * I, queries)
    splits = number_of_splits(B * G * blocks, M)
    tokens = min(X, BLOCK_BYTES // (width * q.dtype.itemsize))
    # The first axis of the grid has the blocks of queries of each split, the fastest one.
    split, block = lambda at: jax.lax.div(at, blocks), lambda at: jax.lax.rem(at, blocks)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, splits=splits, queries=C * I, N=N, tokens=tokens),
        grid=(splits * blocks, G, B),
        in_specs=[
            pl.BlockSpec((None, None, queries, width), lambda at, g, b: (b, g, block(at), 0)),
            *(
                pl.BlockSpec((Z, 2, None, size, X), lambda at, g, b: (0, 0, g, 0, 0))
                for size in (width, 1)[: len(parts)]
            ),
            pl.BlockSpec((None, M), lambda at, g, b: (b, 0)),
            pl.BlockSpec((None, queries), lambda at, g, b: (b, block(at))),
            pl.BlockSpec((None,), lambda at, g, b: (b,)),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, queries, width), lambda at, g, b: (split(at), b, g, block(at), 0)
            ),
            pl.BlockSpec((None, None, None, queries), lambda at, g, b: (split(at), b, g, block(at))),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, G, C * I, N), q.dtype),
            jax.ShapeDtypeStruct((splits, B, G, C * I), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_pages",
    )(
        q.reshape(B, G, C * I, N),
        *parts,
        jnp.clip(table, 0, Z - 1),
        jnp.repeat(start, I, axis=1).astype(jnp.int32),
        stop.astype(jnp.int32),
    )
    out, lse = (out[0], lse[0]) if splits == 1 else merge(list(zip(out, lse)))
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _kernel(q_ref, pool_ref, *refs, splits, queries, N, tokens):
    """Blocks have powers of two; `queries` and N are what is in the arrays, beyond which nothing is accessed.

    A step reads `tokens` keys and values, a page or a part of one. Numbers of 8 bits have scales, the first of `refs`.
    """
    *scale_refs, table_ref, first_ref, stop_ref, out_ref, lse_ref = refs
    (rows, width), X = q_ref.shape, pool_ref.shape[-1]
    blocks = pl.cdiv(queries, rows)
    split, block = jax.lax.div(pl.program_id(0), blocks), jax.lax.rem(pl.program_id(0), blocks)
    row, column = block * rows + jnp.arange(rows) < queries, jnp.arange(width) < N
    both = row[:, None] & column[None, :]
    q, stop = plgpu.load(q_ref, mask=both, other=0.0), stop_ref[...]
    first = plgpu.load(first_ref, mask=row, other=jnp.iinfo(jnp.int32).max)
    in_page = jnp.broadcast_to(column[:, None], (width, tokens))
    begin = jax.lax.div(jnp.maximum(jnp.min(first), 0), jnp.int32(tokens))
    end = jax.lax.div(stop + (tokens - 1), jnp.int32(tokens))
    share = jax.lax.div(jnp.maximum(end - begin, 0) + (splits - 1), jnp.int32(splits))
    low = begin + split * share
    stops = jnp.broadcast_to(stop, first.shape)

    zero = 0.0 if jnp.issubdtype(pool_ref.dtype, jnp.floating) else 0

    def loaded(page, i, at):
        """Keys or values `[N, tokens]` of a page in q's dtype."""
        x = plgpu.load(pool_ref.at[page, i, :, at], mask=in_page, other=zero)
        for scale_ref in scale_refs:
            x = x.astype(jnp.float32) * scale_ref[page, i, :, at]
        return x.astype(q.dtype)

    def step(j, softmax):
        page = table_ref[jax.lax.div(j, jnp.int32(X // tokens))]
        at = pl.ds(jax.lax.rem(j, jnp.int32(X // tokens)) * tokens, tokens)
        k, v = (loaded(page, jnp.int32(i), at) for i in (0, 1))
        return add_block(softmax, *scores_of(q, k, first, stops, j * tokens, N**-0.5), v.T)

    softmax = jax.lax.fori_loop(low, jnp.minimum(low + share, end), step, empty_softmax(rows, width))
    out, lse = finish(softmax)
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=both)
    plgpu.store(lse_ref, lse, mask=row)
