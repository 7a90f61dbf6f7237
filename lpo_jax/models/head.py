"""The head: from hidden states to log-probs of given tokens, without storing logits of all tokens at once.

Logits are computed for one chunk of tokens after another, and only one chunk of them exists at a time. Chunks divide
the tokens of each row and never combine rows, so that rows can be on different devices. Operations along the vocabulary
are only comparisons and sums, so that it can be split over devices too.

`token_log_probs` returns the statistics alone. In training, the cotangent of every statistic is known before the pass,
so `weighted_log_probs` computes the gradient in the same pass. The logits are then computed once; autodiff with
recomputed chunks would compute them twice.

Axes: B rows · X tokens of a row · D width · V vocabulary · J top-k tokens · C tokens of a chunk (this file only).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lpo_jax.models.attend import accumulator
from lpo_jax.models.decoder import project
from lpo_jax.objectives.batch import Field
from lpo_jax.parallel.sharding import RULES, constrain, gathered, summed

# Logits in a chunk of one row: 2^25 float32 values are 128 MiB. A chunk has at least FEWEST_TOKENS tokens, even if that
# is more logits: every chunk reads the unembedding twice and its gradient once, and with fewer than about 500 tokens an
# accelerator is limited by memory bandwidth.
CHUNK_ELEMENTS = 1 << 25
FEWEST_TOKENS = 512


def chunk_size(vocab_size: int) -> int:
    """Return the number of tokens in a chunk of a row, a power of two."""
    return max(FEWEST_TOKENS, 1 << ((CHUNK_ELEMENTS // vocab_size).bit_length() - 1))


def token_log_probs(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    *,
    top_ids: jax.Array | None = None,
    extra: tuple[Field, ...] = (),
    never: tuple[int, ...] = (),
) -> dict[str, jax.Array]:
    """Compute statistics of softmax(logits / temperature) for each target. Not meant to be differentiated.

    Args:
      hidden: `[B, X, D]` normed states; each predicts the target at the same index.
      unembed: `[V, D]` output matrix.
      targets: `[B, X]` token ids.
      temperature: the sampler's temperature, so that log-probs are those of the sampling distribution.
      top_ids: `[B, X, J]` further ids to compute log-probs of.
      extra: which statistics of `Source.POLICY_EXTRA` to compute.
      never: ids without probability, which are not sampled either (`ModelConfig.never_sampled`).

    Returns:
      Float32 arrays: "logp" `[B, X]`, "entropy" `[B, X]` in nats, and on request "top_logp" `[B, X, J]`, "collision"
      `[B, X]` (the sum of squared probabilities) and "hidden_norm" `[B, X]` (the Euclidean norm of the state).
    """

    def chunk(_, xs):
        h, target, top = xs
        return None, _statistics(_logits(h, unembed, temperature, never), h, target, top, extra)[0]

    unembed = gathered(unembed, hidden.dtype, "vocab", "embed")
    with jax.named_scope("token_log_probs"):
        return _by_chunks(chunk, None, unembed.shape[0], hidden, targets, top_ids)[1]


def weighted_log_probs(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    cotangent: Mapping[str, jax.Array],
    temperature: float = 1.0,
    *,
    top_ids: jax.Array | None = None,
    extra: tuple[Field, ...] = (),
    never: tuple[int, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the sum of cotangent times statistic, for `jax.grad` with respect to `hidden` and `unembed`.

    Args:
      cotangent: constant arrays by the names of `token_log_probs`. Statistics without a cotangent do not contribute.
      others: as in `token_log_probs`.

    Returns:
      A float32 scalar, and the statistics themselves, which carry no gradient.
    """
    return _weighted((temperature, extra, never), hidden, unembed, (targets, dict(cotangent), top_ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(options, hidden, unembed, given):
    temperature, extra, never = options
    targets, cotangent, top_ids = given
    stats = token_log_probs(hidden, unembed, targets, temperature, top_ids=top_ids, extra=extra, never=never)
    return sum(jnp.vdot(stats[name], weight) for name, weight in cotangent.items()), stats


def _weighted_forward(options, hidden, unembed, given):
    temperature, extra, never = options

    def chunk(unembed, d_unembed, xs):
        h, target, cotangent, top = xs
        logits = _logits(h, unembed, temperature, never)
        stats, probabilities = _statistics(logits, h, target, top, extra)
        slope = _slope(logits, probabilities, stats, target, top, cotangent) / temperature
        slope = constrain(slope.astype(h.dtype), "batch", None, "vocab")
        product = functools.partial(jnp.einsum, preferred_element_type=accumulator(h.dtype))
        with jax.default_matmul_precision("float32" if h.dtype == jnp.float32 else "default"):
            d_h = product("bcv,vd->bcd", slope, unembed.astype(h.dtype))
            # The tokens are on one axis: with two, XLA for CPUs would first make a transposed copy of the slopes.
            d_unembed += product("rv,rd->vd", slope.reshape(-1, slope.shape[-1]), h.reshape(-1, h.shape[-1]))
        if "hidden_norm" in cotangent:
            weight = cotangent["hidden_norm"] / jnp.maximum(stats["hidden_norm"], 1e-30)
            d_h += weight[..., None] * h.astype(d_h.dtype)
        return d_unembed, (stats, d_h.astype(h.dtype))

    def rows(unembed, arrays):
        zero = constrain(jnp.zeros(unembed.shape, accumulator(unembed.dtype)), "vocab", None)
        return _by_chunks(functools.partial(chunk, unembed), zero, unembed.shape[0], *arrays)

    targets, cotangent, top_ids = given
    with jax.named_scope("token_log_probs"):
        d_unembed, (stats, d_hidden) = summed(rows, RULES["batch"], dim=0)(
            gathered(unembed, hidden.dtype, "vocab", "embed"), (hidden, targets, cotangent, top_ids)
        )
        d_unembed = constrain(d_unembed, "vocab", "embed")
    total = sum(jnp.vdot(stats[name], weight) for name, weight in cotangent.items())
    return (total, stats), (d_hidden, d_unembed.astype(unembed.dtype))


def _weighted_backward(options, gradients, cotangent):
    d_hidden, d_unembed = gradients
    scale = cotangent[0]
    return (scale * d_hidden).astype(d_hidden.dtype), (scale * d_unembed).astype(d_unembed.dtype), None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def top_tokens(
    hidden: jax.Array, unembed: jax.Array, count: int, temperature: float = 1.0, never: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
    """Compute the top-k next tokens: "ids" `[B, X, J]` int32, their "logp", and the "entropy" `[B, X]` of all."""

    def chunk(_, xs):
        logits = _logits(xs[0], unembed, temperature, never)
        lse = jax.nn.logsumexp(logits, axis=-1)
        top, ids = jax.lax.top_k(logits, count)
        entropy = lse - jnp.einsum("bcv,bcv->bc", jnp.exp(logits - lse[..., None]), logits)
        return None, {"ids": ids, "logp": top - lse[..., None], "entropy": entropy}

    unembed = gathered(unembed, hidden.dtype, "vocab", "embed")
    with jax.named_scope("top_tokens"):
        return _by_chunks(chunk, None, unembed.shape[0], hidden)[1]


def _logits(h, unembed, temperature, never):
    """`[B, C, V]` float32; those of ids without probability are the lowest number, which is finite."""
    logits = project(h, unembed) / temperature
    if never:
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(jnp.isin(ids, jnp.array(never)), jnp.finfo(logits.dtype).min, logits)
    return constrain(logits, "batch", None, "vocab")


def _statistics(logits, h, target, top, extra):
    """The requested statistics of a chunk, and its probabilities `[B, C, V]`."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - lse[..., None])
    chosen = jnp.where(_is(target, logits), logits, 0).sum(-1)
    # An einsum, because XLA's CPU compiler runs the sum of a product along the last axis 20 times slower.
    out = {"logp": chosen - lse, "entropy": lse - jnp.einsum("bcv,bcv->bc", p, logits)}
    if top is not None:
        out["top_logp"] = jnp.take_along_axis(logits, top, axis=-1) - lse[..., None]
    if Field.COLLISION in extra:
        out["collision"] = jnp.square(p).sum(-1)
    if Field.HIDDEN_NORM in extra:
        out["hidden_norm"] = jnp.linalg.norm(h.astype(logits.dtype), axis=-1)
    return out, p


def _slope(logits, p, stats, target, top, cotangent):
    """d (cotangent times statistics) / d logits `[B, C, V]`, for logits that are already divided by the temperature.

    d logp / d z_j = [j is the target] - p_j; d entropy / d z_j = -p_j (log p_j + entropy);
    d collision / d z_j = 2 p_j (p_j - collision).
    """
    weight = {name: x[..., None] for name, x in cotangent.items()}
    logp = weight.get("logp", 0.0)
    factor = -logp
    if "top_logp" in cotangent:
        factor -= cotangent["top_logp"].sum(-1, keepdims=True)
    if "entropy" in cotangent:
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        factor -= weight["entropy"] * (log_p + stats["entropy"][..., None])
    if "collision" in cotangent:
        factor += 2 * weight["collision"] * (p - stats["collision"][..., None])
    slope = p * factor + jnp.where(_is(target, logits), logp, 0.0)
    if "top_logp" in cotangent:
        b, c = jnp.indices(target.shape)
        slope = slope.at[b[..., None], c[..., None], top].add(cotangent["top_logp"])
    return slope


def _is(target, logits):
    """One-hot `[B, C, V]`. It is never stored, because it is fused into a sum or a `where`."""
    return target[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _by_chunks(function, carry, vocab_size: int, *arrays):
    """Scan `function` over chunks of arrays `[B, X, ...]`; its outputs are concatenated and cut back to X."""
    B, X = arrays[0].shape[:2]
    C = min(chunk_size(vocab_size), X)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -X % C)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    carry, out = jax.lax.scan(function, carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :X], out)
