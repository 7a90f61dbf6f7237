"""What the tests of kernels share: arrays, gradients, and a plain twin with the interface of the kernels for GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.models.attend import accumulator
from lpo_jax.models.kernels.union import Kernel, KeySource
from lpo_jax.parallel import sharding

rng = np.random.default_rng(0)
LOWEST = jnp.finfo(jnp.float32).min


def normal(*shape):
    return jax.device_put(rng.normal(size=shape).astype(np.float32))  # compiles nothing


def values_and_gradients(function, real, *qkv):
    """A function's values at real tokens, and their gradients with respect to its arguments."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
    def both(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: jnp.where(real, function(*qkv), 0.0), *qkv)
        return out, pull_back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return both(*qkv)


def _scores(q: jax.Array, source: KeySource) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, X, G, I, N]`, scores `[B, G, I, X, Y]` and which of them count."""
    (B, X, H, N), (Y, G) = q.shape, source.k.shape[1:3]
    q = q.reshape(B, X, G, H // G, N).astype(accumulator(q.dtype))
    key = jnp.arange(Y)
    seen = (source.first[..., None] <= key) & (key < source.stop[..., None])
    scores = jnp.einsum("bxgin,bygn->bgixy", q, source.k.astype(q.dtype)) * N**-0.5
    seen = jnp.broadcast_to(seen[:, None, None], scores.shape)
    return q, jnp.where(seen, scores, LOWEST), seen


def _forward(q, source):
    _, scores, seen = _scores(q, source)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bgixy,bygn->bxgin", weights / total, source.v.astype(scores.dtype))
    lse = (peak + jnp.log(total))[..., 0]
    return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, -1, 1).reshape(q.shape[:-1])


def _backward(q, source, out, lse, d_out):
    rows, scores, seen = _scores(q, source)
    k, v = (x.astype(rows.dtype) for x in (source.k, source.v))
    of_scores = lambda x: jnp.moveaxis(x.reshape(rows.shape[:-1]), 1, -1)[..., None]  # noqa: E731
    d_rows = d_out.reshape(rows.shape).astype(rows.dtype)
    mean = jnp.sum(out.astype(rows.dtype) * d_out.astype(rows.dtype), axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - of_scores(lse)), 0.0)
    d_weights = jnp.einsum("bxgin,bygn->bgixy", d_rows, v)
    d_scores = weights * (d_weights - of_scores(mean)) * q.shape[-1] ** -0.5
    d_q = jnp.einsum("bgixy,bygn->bxgin", d_scores, k).reshape(q.shape)
    d_k = jnp.einsum("bgixy,bxgin->bygn", d_scores, rows)
    d_v = jnp.einsum("bgixy,bxgin->bygn", weights, d_rows)
    return d_q.astype(q.dtype), d_k.astype(source.k.dtype), d_v.astype(source.v.dtype)


PLAIN = Kernel(_forward, _backward)  # with whole matrices of scores


def compile_for(devices, function, *shapes):
    """Compiles for one device of a slice, or for a (2, 1, 2) mesh of four."""
    make = lambda place: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), shapes
    )
    if len(devices) == 1:
        where = jax.sharding.SingleDeviceSharding(devices[0])
        return jax.jit(function).lower(*make(lambda _: where)).compile()
    mesh = jax.sharding.Mesh(np.reshape(devices, (2, 1, 2)), sharding.AXES)
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*make(lambda _: batch)).compile()
