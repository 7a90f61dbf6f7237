"""Attention of a few queries to a KV cache in pages, on TPUs.

The plain twin is `attend_pages` in `lpo_jax.models.attention`. Decoding is limited by the bytes of keys and values, so
the kernel reads only the pages between a row's first and last key, each once for all the queries that share it, and
wherever they are in the pool. One call attends to the prompts and another to the rows' own tokens; `merge` combines the
two. The kernels that come with JAX (`paged_attention`, `ragged_paged_attention`) return no log-sum-exp to merge by, and
take heads of 128 only.

A grid step reads several pages, because a page of few heads is too small to hide the overhead of a step (a third of a
microsecond). The grid has as many steps as the rows have blocks of pages, however long the longest possible row is.

Axes: B rows of the table · C queries of each, I for each key/value head · G key/value heads · N head width · Z pages of
X tokens · M pages of the longest row.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from lpo_jax.models.eight_bits import Quantised
from lpo_jax.parallel.sharding import current_mesh, spec

# Bytes of keys and values that a grid step reads. Two blocks are in VMEM at a time, which is 16 MiB on every chip.
BLOCK_BYTES = 1 << 21
MOST_PAGES = 16  # of a block: each is an operand of its own
LANES = 128
LOWEST = jnp.finfo(jnp.float32).min


@functools.partial(jax.jit, static_argnames="interpret")  # traced once for all layers
def attend_pages(q, pool, table, start, stop, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attend from query c of row b to the keys `start[b, c] <= y < stop[b]`.

    Args:
      q: `[B, G, C, I, N]`.
      pool: `[Z, 2, G, N, X]`, keys and values of each page, floats or 8-bit numbers with scales `[Z, 2, G, 1, X]`.
      table: `[B, M]` int32, the pages of each row; key y is in the page `table[b, y // X]`. On a mesh, pages are
        counted within the shard. What is listed behind a row's last page is not read.
      start: `[B, C]` int32.
      stop: `[B]` int32. A query without keys gets zeros, and a normaliser that gives them no weight in `merge`.
      interpret: run in the interpreter, on any device but slowly.

    Returns:
      `[B, G, C, I, N]` in q's dtype and the log-sum-exp of the scaled scores, `[B, G, C, I]` float32.
    """
    return on_each_shard_of_pages(
        functools.partial(_attend_pages, interpret=interpret), q, pool, table, start, stop
    )


def on_each_shard_of_pages(attention: Callable, q, pool, table, start, stop) -> tuple[jax.Array, jax.Array]:
    """Run `attention` on each device's rows and heads, because the compiler cannot partition a kernel."""
    mesh = current_mesh()
    if mesh is None:
        return attention(q, pool, table, start, stop)
    rows, heads = spec(mesh, ("batch", "kv_heads"), q.shape[:2])
    split, by_row = PartitionSpec(rows, heads), PartitionSpec(rows)
    specs = (split, PartitionSpec(rows, None, heads), by_row, by_row, by_row)
    return jax.shard_map(attention, in_specs=specs, out_specs=split, check_vma=False)(
        q, pool, table, start, stop
    )


def pages_per_block(page: tuple[int, ...], itemsize: int, M: int) -> int:
    """Return the number of pages that a grid step reads.

    Args:
      page: the shape `(2, G, N, X)` on one device.
      itemsize: bytes of a number.
      M: pages of the longest row.
    """
    _, G, N, X = page
    sublanes = 32 // itemsize
    page_bytes = 2 * G * math.ceil(N / sublanes) * sublanes * math.ceil(X / LANES) * LANES * itemsize
    return max(1, min(BLOCK_BYTES // page_bytes, MOST_PAGES, M))


def _blocks(table, start, stop, n: int, X: int, pages: int):
    """The steps of the grid: the blocks of n pages that hold keys of some query, at least one for each row.

    Where a block has a page without keys, the last page with keys that was read at its place in a block is listed
    again, so that nothing is read. Everything is comparisons and sums of small arrays, which take the compiler less
    time than scans.

    Returns:
      The number of steps; row and block of each, `[steps]`; the first and the last block of each row, `[B]`; and the
      pages to read, `[steps, n]`.
    """
    B, M = table.shape
    begin = jnp.maximum(start.min(axis=1), 0)
    lowest = jax.lax.div(begin, X)  # the first page with keys, and the one behind the last
    end = jnp.maximum(jax.lax.div(stop + X - 1, X), lowest)
    first = jax.lax.div(lowest, n)
    last = jnp.maximum(jax.lax.div(end - 1, n), first)
    by_row = jnp.arange(B)
    ends = jnp.where(by_row[:, None] >= by_row, last - first + 1, 0).sum(1)  # steps up to each row's last
    step = jnp.arange(B * pl.cdiv(M, n))
    row = jnp.minimum((step[:, None] >= ends).sum(1), B - 1)
    block = last[row] - (ends[row] - 1 - step)
    # The last page with keys at each place in a block, `[B, n]`, and the row that reads it: this one or one before it.
    place = jnp.arange(n)
    newest = end[:, None] - 1 - (end[:, None] - 1 - place) % n
    some = newest >= lowest[:, None]
    before = jnp.where((by_row[:, None] > by_row)[..., None] & some, by_row[:, None], -1).max(1)  # [B, n]
    at = block[:, None] * n + place
    live = (at < end[row][:, None]) & (at >= lowest[row][:, None])
    behind = (at >= end[row][:, None]) & some[row]
    source = jnp.where(live | behind, row[:, None], before[row])
    # Before any page was read at this place, there is none to list again: the first page of the first row then.
    at = jnp.where(live, at, jnp.where(source < 0, lowest[0], newest[source, place]))
    source = jnp.maximum(source, 0)
    page = table[source, jnp.clip(at, 0, M - 1)]
    return ends[-1], row, block, first, last, jnp.clip(page, 0, pages - 1)


def _attend_pages(q, pool, table, start, stop, *, interpret):
    B, G, C, I, N = q.shape
    parts = [pool.numbers, pool.scale] if isinstance(pool, Quantised) else [pool]
    Z, X = parts[0].shape[0], parts[0].shape[-1]
    n = pages_per_block(parts[0].shape[1:], parts[0].dtype.itemsize, table.shape[1])
    steps, row, block, first, last, page = _blocks(table, start, stop, n, X, Z)

    def rows(*shape):
        return pl.BlockSpec((None, *shape), lambda s, row, *_: (row[s],) + (0,) * len(shape))

    def nth_page(i, part):
        return pl.BlockSpec((None, *part.shape[1:]), lambda s, *scalars: (scalars[-1][s * n + i], 0, 0, 0, 0))

    out, lse = pl.pallas_call(
        functools.partial(_kernel, n=n, X=X),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(steps,),
            in_specs=[rows(C * I, 1), rows(G, C * I, N), *(nth_page(i, x) for x in parts for i in range(n))],
            out_specs=[rows(G, C * I, N), rows(G, C * I, 1)],
            scratch_shapes=[pltpu.VMEM((G, C * I, size), jnp.float32) for size in (1, 1, N)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, G, C * I, N), q.dtype),
            jax.ShapeDtypeStruct((B, G, C * I, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="attend_pages",
    )(
        row,
        block,
        first,
        last,
        stop,
        page.reshape(-1),
        jnp.repeat(start, I, axis=1)[..., None],
        (q * N**-0.5).reshape(B, G, C * I, N),
        *(x for x in parts for _ in range(n)),
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _kernel(row, block, first, last, stop, _, start, q, *refs, n, X):
    pages, scales, (out, lse, peak, total, weighted) = refs[:n], refs[n:-5], refs[-5:]
    s = pl.program_id(0)
    b, j = row[s], block[s]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def product(x, y, axis):
        dimensions = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def scaled(x, i, part, g):
        """Scales columns `[C I, X]` of keys (part 0) or values (1), one for each token of page i."""
        return x * scales[i][part, g] if scales else x

    def score(i, g):
        return scaled(product(q[g], pages[i][0, g].astype(q.dtype), 0), i, 0, g)

    def value(i, g, weights):
        weights = scaled(weights[:, i * X : (i + 1) * X], i, 1, g)
        return product(weights.astype(q.dtype), pages[i][1, g].astype(q.dtype), 1)

    @pl.when(j == first[b])
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    key = j * (n * X) + jax.lax.broadcasted_iota(jnp.int32, (q.shape[1], n * X), 1)
    seen = (key >= start[...]) & (key < stop[b])
    for g in range(q.shape[0]):
        scores = jnp.concatenate([score(i, g) for i in range(n)], axis=-1)  # [C I, n X]
        scores = jnp.where(seen, scores, LOWEST)
        new_peak = jnp.maximum(peak[g], scores.max(-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_peak), 0.0)
        shrink = jnp.exp(peak[g] - new_peak)
        total[g] = shrink * total[g] + weights.sum(-1, keepdims=True)
        parts = (value(i, g, weights) for i in range(n))
        weighted[g] = shrink * weighted[g] + functools.reduce(jnp.add, parts)
        peak[g] = new_peak

    @pl.when(j == last[b])
    def _():
        safe = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (weighted[...] / safe).astype(out.dtype)
        lse[...] = peak[...] + jnp.log(safe)
