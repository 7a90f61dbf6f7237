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

from lpo_jax.models.kernels.pages import on_each_shard_of_pages
from lpo_jax.models.kernels.triton import add_block, empty_softmax, finish, pad, power_of_two, scores_of
from lpo_jax.models.kernels.union import merge

# Programs of a call, at least: four for each multiprocessor of a data-centre GPU, which has 108 to 148 of them.
PROGRAMS = 512
MOST_SPLITS = 16


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
    (Z, *_, X), M = pool.shape, table.shape[1]
    queries, width, splits = power_of_two(C * I), power_of_two(N), number_of_splits(B * G, M)
    # Queries of padding attend to the keys of the last one, so that they do not extend what is read.
    first = jnp.pad(jnp.repeat(start, I, axis=1), ((0, 0), (0, queries - C * I)), mode="edge")
    of_row = pl.BlockSpec((None, None, queries, width), lambda s, g, b: (b, g, 0, 0))
    result = pl.BlockSpec((None, None, None, queries, width), lambda s, g, b: (s, b, g, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, splits=splits, N=N, scale=N**-0.5),
        grid=(splits, G, B),
        in_specs=[
            of_row,
            pl.BlockSpec((Z, 2, None, width, X), lambda s, g, b: (0, 0, g, 0, 0)),
            pl.BlockSpec((None, M), lambda s, g, b: (b, 0)),
            pl.BlockSpec((None, queries), lambda s, g, b: (b, 0)),
            pl.BlockSpec((None,), lambda s, g, b: (b,)),
        ],
        out_specs=[result, pl.BlockSpec((None, None, None, queries), lambda s, g, b: (s, b, g, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, G, queries, width), q.dtype),
            jax.ShapeDtypeStruct((splits, B, G, queries), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_pages",
    )(
        pad(q.reshape(B, G, C * I, N), {2: queries, 3: width}),
        pool,
        jnp.clip(table, 0, Z - 1),
        first.astype(jnp.int32),
        stop.astype(jnp.int32),
    )
    out, lse = (out[0], lse[0]) if splits == 1 else merge(list(zip(out, lse)))
    return out[:, :, : C * I, :N].reshape(q.shape), lse[:, :, : C * I].reshape(q.shape[:-1])


def _kernel(q_ref, pool_ref, table_ref, first_ref, stop_ref, out_ref, lse_ref, *, splits, N, scale):
    q, first, stop = q_ref[...], first_ref[...], stop_ref[...]
    X, width = pool_ref.shape[-1], q.shape[1]
    real = jnp.broadcast_to((jnp.arange(width) < N)[:, None], (width, X))
    begin = jax.lax.div(jnp.maximum(jnp.min(first), 0), jnp.int32(X))
    end = jax.lax.div(stop + (X - 1), jnp.int32(X))
    share = jax.lax.div(jnp.maximum(end - begin, 0) + (splits - 1), jnp.int32(splits))
    low = begin + pl.program_id(0) * share
    stops = jnp.broadcast_to(stop, first.shape)

    def page(m, softmax):
        number = table_ref[m]
        # [N, X]: if N is no power of two, the rows of padding are not read
        k, v = (
            pool_ref[number, i]
            if width == N
            else plgpu.load(pool_ref.at[number, jnp.int32(i)], mask=real, other=0.0)
            for i in (0, 1)
        )
        return add_block(softmax, *scores_of(q, k, first, stops, m * X, scale), v.T)

    softmax = jax.lax.fori_loop(low, jnp.minimum(low + share, end), page, empty_softmax(*q.shape))
    out, lse_ref[...] = finish(softmax)
    out_ref[...] = out.astype(out_ref.dtype)
