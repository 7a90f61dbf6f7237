"""One decoder for Llama, Qwen2/2.5, Qwen3 and Mistral.

Flax NNX describes the parameters and their logical axes; what flows through jitted code is a plain nested
dict of arrays. The graph definition is made once per config (`functools.cache`), and merging it with the
arrays happens at trace time only.

Two layouts of the same parameters:
  stacked    every layer's arrays on one leading axis L; the layers run under `lax.scan` (training, prefill)
  unstacked  one dict per layer (`sampling.decode.decode_layout`); the layers are unrolled (decode: no slice of
             a stacked weight is copied for each new token)

Axes: P rows (prompts) · X tokens of a row · L D H G N F V.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lpo_jax.models.attend import KEPT, accumulator
from lpo_jax.models.attention import Causal
from lpo_jax.models.config import ModelConfig
from lpo_jax.parallel.sharding import constrain, gathered, look_up

Params = dict[str, Any]


class Block(nnx.Module):
    """Attention and SwiGLU feed-forward with pre-norms; all L layers at once when `stack` is L.

    Without `rngs` parameters are shapes.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stack: int | None = None):
        D, H, G, N, F = (
            config.width,
            config.num_heads,
            config.num_kv_heads,
            config.head_width,
            config.ffn_width,
        )
        self.config = config
        param = functools.partial(_param, rngs, stack)
        self.attn_norm = param((D,), ("embed",), fill=1.0)
        self.wq = param((D, H, N), ("embed", "heads", "head_width"))
        self.wk = param((D, G, N), ("embed", "kv_heads", "head_width"))
        self.wv = param((D, G, N), ("embed", "kv_heads", "head_width"))
        self.wo = param((H, N, D), ("heads", "head_width", "embed"))
        if config.qkv_bias:
            self.bq = param((H, N), ("heads", "head_width"), fill=0.0)
            self.bk = param((G, N), ("kv_heads", "head_width"), fill=0.0)
            self.bv = param((G, N), ("kv_heads", "head_width"), fill=0.0)
        if config.qk_norm:
            self.q_norm = param((N,), ("head_width",), fill=1.0)
            self.k_norm = param((N,), ("head_width",), fill=1.0)
        self.mlp_norm = param((D,), ("embed",), fill=1.0)
        self.w_gate = param((D, F), ("embed", "ffn"))
        self.w_up = param((D, F), ("embed", "ffn"))
        self.w_down = param((F, D), ("ffn", "embed"))

    def __call__(self, x, rope, context, kv=None):
        """`x [P, X, D]` -> `[P, X, D]` and what the context keeps of the keys and values."""
        eps = self.config.norm_eps
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attn_norm[...], eps)
            q = self._product("rd,dhn->rhn", h, "wq")
            k = self._product("rd,dgn->rgn", h, "wk")
            v = self._product("rd,dgn->rgn", h, "wv")
            if self.config.qkv_bias:
                q, k, v = (y + b[...].astype(y.dtype) for y, b in ((q, self.bq), (k, self.bk), (v, self.bv)))
            if self.config.qk_norm:
                q, k = rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)
            out, kv = context(rotate(q, rope), rotate(k, rope), v, kv)
            x = constrain(x + self._product("rhn,hnd->rd", out, "wo"), "batch", None, None)
        with jax.named_scope("feed_forward"):
            h = rms_norm(x, self.mlp_norm[...], eps)
            gate = self._product("rd,df->rf", h, "w_gate")
            up = self._product("rd,df->rf", h, "w_up")
            x = constrain(
                x + self._product("rf,fd->rd", jax.nn.silu(gate) * up, "w_down"), "batch", None, None
            )
        return x, kv

    def _product(self, axes: str, x: jax.Array, name: str) -> jax.Array:
        """`x [P, X, ...]` times the named weight, in x's dtype: where activations meet a layer's matrices.

        `axes` has one letter for all tokens: on two axes, the gradient of a weight would take a transposed copy of
        the activations, which on a CPU costs as much as the product.
        """
        param, rows = getattr(self, name), x.reshape(-1, *x.shape[2:])
        weight = param.get_value()
        if hasattr(
            weight, "product"
        ):  # in the place of an array: adapted (lora.py) or quantised (quantize.py)
            out = weight.product(axes, rows)
        else:
            weight = gathered(weight, x.dtype, *param.get_metadata()["axes"][-weight.ndim :])
            out = jnp.einsum(axes, rows, weight.astype(x.dtype))
        return out.reshape(*x.shape[:2], *out.shape[1:])


class Decoder(nnx.Module):
    """Token ids to final hidden states; the head is `lpo_jax.models.head`. Without `rngs` parameters are shapes."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, stacked: bool = True):
        self.config = config
        V, D, L = config.vocab_size, config.width, config.num_layers
        param = functools.partial(_param, rngs, None)
        self.embed = param((V, D), ("vocab", "embed"))
        if stacked:
            self.layers = Block(config, rngs=rngs, stack=L)
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(L)])
        self.final_norm = param((D,), ("embed",), fill=1.0)
        if not config.tie_embeddings:
            self.unembed = param((V, D), ("vocab", "embed"))

    def __call__(self, tokens, positions, context, kv=None, *, dtype=jnp.float32, remat=False):
        table = gathered(self.embed[...], dtype, "vocab", "embed")
        x = constrain(look_up(table, tokens).astype(dtype), "batch", None, None)  # [P, X, D]
        rope = positions if isinstance(positions, tuple) else rope_table(self.config, positions)
        if isinstance(self.layers, nnx.List):
            block_def, _ = nnx.split(self.layers[0])
            # Under jit of its own, a layer is traced once for all of them.
            layer = jax.jit(lambda weights, *inputs: nnx.merge(block_def, weights)(*inputs))
            kept = []
            for block, layer_kv in zip(self.layers, kv):
                x, layer_kept = layer(nnx.state(block), x, rope, context, layer_kv)
                kept.append(layer_kept)
        else:
            block_def, stacked = nnx.split(self.layers)

            def layer(x, xs):
                weights, layer_kv = xs
                return nnx.merge(block_def, weights)(x, rope, context, layer_kv)

            # Without recomputing layers, what is kept is the outputs of their matrices, and of attention where rows are
            # long: norms, rotations and activations cost less to compute again than to write and read.
            policies = jax.checkpoint_policies
            products = policies.dots_with_no_batch_dims_saveable
            both = policies.save_from_both_policies(products, policies.save_only_these_names(KEPT))
            keep = None if remat else both
            x, kept = jax.lax.scan(jax.checkpoint(layer, policy=keep, prevent_cse=False), x, (stacked, kv))
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), kept


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    context: Any,
    kv: Any = None,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, Any]:
    """The one forward pass behind training, prefill and decode.

    Args:
      tokens, positions: `[P, X]` ids and their positions in the sequence, or the `rope_table` of these.
      context: one of `lpo_jax.models.attention`.
      kv: what the context needs per layer: stacked on L, or a list when the layers are unstacked.
      dtype: of activations and of the products; weights are cast where they are used.
      remat: recompute each layer in the backward pass, so that only L residual streams are kept; else the outputs
        of its matrix products, and of attention over long rows, are kept too.

    Returns:
      Normed hidden states `[P, X, D]`, and what the context kept of each layer.
    """
    stacked = "wq" in params["layers"]
    # Accelerators multiply float32 in lower precision unless told not to, and log-probs would show it.
    with jax.default_matmul_precision("float32" if jnp.dtype(dtype) == jnp.float32 else "default"):
        decoder = nnx.merge(_abstract(config, stacked)[0], nnx.State(params))
        return decoder(tokens, positions, context, kv, dtype=dtype, remat=remat)


def logits(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    dtype=jnp.float32,
):
    """Next-token logits `[B, T, V]` float32 of independent rows.

    Args:
      tokens: `[B, T]` ids.
      mask: `[B, T]`, true at real tokens; padding may stand on either side. None: no padding.
    """
    valid = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    context = Causal(valid, positions, window=config.sliding_window)
    hidden, _ = forward(config, params, tokens, positions, context, dtype=dtype)
    return project(hidden, unembedding(params))


def unembedding(params: Params) -> jax.Array:
    """`[V, D]`: the output matrix, which is the embedding itself in tied models."""
    return params.get("unembed", params["embed"])


def project(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    """`[..., D] x [V, D] -> [..., V]` logits, accumulated in float32."""
    precision = "float32" if hidden.dtype == jnp.float32 else "default"
    with jax.named_scope("unembed"), jax.default_matmul_precision(precision):
        unembed = unembed.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, unembed, preferred_element_type=accumulator(hidden.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x, weight, eps):
    y = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale * weight.astype(y.dtype)).astype(x.dtype), (x, weight, scale)


def _rms_norm_backward(eps, kept, g):
    # Autodiff's sums of products, written as einsums: XLA's CPU compiler runs the former 20 times slower.
    x, weight, scale = kept
    y, g = x.astype(scale.dtype) * scale, g.astype(scale.dtype)
    slope = g * weight.astype(scale.dtype)
    along = jnp.einsum("...d,...d->...", slope, y)[..., None] / y.shape[-1]
    d_weight = jnp.einsum("...d,...d->d", g, y)
    return (scale * (slope - y * along)).astype(x.dtype), d_weight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[P, X, 1, N/2]` float32 for `positions [P, X]`, rescaled as the config says."""
    N = config.head_width
    frequency = config.rope_theta ** (-jnp.arange(0, N, 2, dtype=jnp.float32) / N)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        # Llama 3: long wavelengths are stretched by `factor`, short ones kept, the rest interpolated.
        wavelength = 2 * jnp.pi / frequency
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of `[P, X, heads, N]`, pairing element i with i + N/2 (the Hugging Face layout)."""
    cos, sin = rope
    a, b = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, layers stacked; allocates nothing."""
    tree = _as_dict(_abstract(config, stacked=True)[1])
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), tree)


def logical_axes(config: ModelConfig) -> Params:
    """The tree of logical axis names, one tuple per parameter, in the shape of `abstract_params`."""
    state = _abstract(config, stacked=True)[1]
    return _as_dict(state, lambda param: param.get_metadata()["axes"])


def init_params(
    config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, shardings: Any = None
) -> Params:
    """Fresh parameters: matrices normal with deviation 0.02, norms one, biases zero; made where they are to lie."""

    def make(key):
        params = nnx.as_pure(nnx.split(Decoder(config, rngs=nnx.Rngs(key)))[1]).to_pure_dict()
        return jax.tree.map(lambda p: p.astype(dtype), params)

    return jax.jit(make, out_shardings=shardings)(key)


def _param(rngs, stack, shape, axes, fill=None):
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    if rngs is None:
        value = jax.ShapeDtypeStruct(shape, jnp.float32)
    else:
        value = jnp.full(shape, fill) if fill is not None else 0.02 * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, axes=axes)


@functools.cache
def _abstract(config: ModelConfig, stacked: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure and its parameters' shapes."""
    return nnx.split(Decoder(config, rngs=None, stacked=stacked))


def _as_dict(state, read=lambda param: param.get_value()):
    if isinstance(state, nnx.Variable):
        return read(state)
    return {name: _as_dict(child, read) for name, child in state.items()}
