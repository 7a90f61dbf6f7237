"""One decoder for Llama, Qwen2/2.5, Qwen3, Mistral, Qwen2.5-VL and Qwen3-VL.

Flax NNX modules describe the parameters (declared in `lpo_jax.models.parameters`); jitted functions take a plain nested
dict of arrays. The graph definition is made once for each config, and is merged with the arrays at trace time only.

The parameters have two layouts:
  stacked    the arrays of all layers on one leading axis L; the layers run under `lax.scan` (training)
  unstacked  one dict for each layer (`sampling.decode.decode_layout`); the layers are unrolled (prefill and decode), so
             that no slice of a stacked weight is copied for each new token

Axes: P rows (prompts) · X tokens of a row · L D H G N F V.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lpo_jax.models import parameters
from lpo_jax.models.attend import KEPT, accumulator
from lpo_jax.models.attention import Causal, Context
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import VISION, Parameter
from lpo_jax.models.prompt_images import PromptImages, TowerRows
from lpo_jax.models.rotary import mrope_table, rope_table, rotate
from lpo_jax.models.vision import ImageTokens, tower_outputs
from lpo_jax.parallel.sharding import constrain, gathered, look_up
from lpo_jax.types import PyTree

Params = dict[str, PyTree]
# Keys and values: of all layers, stacked on L, or one tuple for each layer; None where a context has none.
KV = tuple[jax.Array, ...] | list[tuple[jax.Array, ...] | None] | None


class Block(nnx.Module):
    """Attention and SwiGLU feed-forward, with norms before both. If `stacked`, it describes all L layers at once.

    Its parameters are shapes; `forward` merges them with arrays.
    """

    def __init__(self, config: ModelConfig, stacked: bool):
        self.config = config
        for parameter in parameters.declared(config):
            if parameter.in_layers:
                setattr(self, parameter.name, _shape(config, parameter, stacked))

    def __call__(self, x, rope, context, kv=None):
        """Return the new residual stream `[P, X, D]`, and the keys and values that the context keeps."""
        with jax.named_scope("attention"):
            h = self._norm(x, "attn_norm")
            q = self._product("rd,dhn->rhn", h, "wq")
            k = self._product("rd,dgn->rgn", h, "wk")
            v = self._product("rd,dgn->rgn", h, "wv")
            if self.config.qkv_bias:
                q, k, v = (y + _value(self, b).astype(y.dtype) for y, b in ((q, "bq"), (k, "bk"), (v, "bv")))
            if self.config.qk_norm:
                q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
            out, kv = context(self.config, rotate(q, rope), rotate(k, rope), v, kv)
            x = constrain(x + self._product("rhn,hnd->rd", out, "wo"), "batch", None, None)
        with jax.named_scope("feed_forward"):
            h = self._norm(x, "mlp_norm")
            gate = self._product("rd,df->rf", h, "w_gate")
            up = self._product("rd,df->rf", h, "w_up")
            x = constrain(
                x + self._product("rf,fd->rd", jax.nn.silu(gate) * up, "w_down"), "batch", None, None
            )
        return x, kv

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return rms_norm(x, _value(self, name), self.config.norm_eps)

    def _product(self, axes: str, x: jax.Array, name: str) -> jax.Array:
        """Multiply `x [P, X, ...]` by the named matrix, in x's dtype. All matrices of a layer are applied here.

        `axes` is the einsum with one letter for all tokens: with two, the gradient of a weight would need a transposed
        copy of the activations, which on a CPU costs as much as the product.
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
    """From token ids to final hidden states. The head is in `lpo_jax.models.head`. Its parameters are shapes."""

    def __init__(self, config: ModelConfig, stacked: bool):
        self.config = config
        for parameter in parameters.declared(config):
            if not parameter.branch:
                setattr(self, parameter.name, _shape(config, parameter, stacked))
        layers = [Block(config, stacked) for _ in range(1 if stacked else config.num_layers)]
        self.layers = layers[0] if stacked else nnx.List(layers)

    def __call__(self, tokens, positions, context, kv=None, images=None, *, dtype=jnp.float32, remat=False):
        table = gathered(_value(self, "embed"), dtype, "vocab", "embed")
        x = constrain(look_up(table, tokens).astype(dtype), "batch", None, None)  # [P, X, D]
        x = x if images is None else images.embed(x)
        rope = positions if isinstance(positions, tuple) else rope_table(self.config, positions)
        if isinstance(self.layers, nnx.List):
            block_def, _ = nnx.split(self.layers[0])
            # With a jit of its own, the layer is traced once for all layers.
            layer = jax.jit(lambda weights, *inputs: nnx.merge(block_def, weights)(*inputs))
            kept = []
            for number, (block, layer_kv) in enumerate(zip(self.layers, kv)):
                x, layer_kept = layer(nnx.state(block), x, rope, context, layer_kv)
                x = x if images is None else images.deepen(x, number)
                kept.append(layer_kept)
        else:
            block_def, stacked = nnx.split(self.layers)

            def layer(x, xs):
                weights, layer_kv, *number = xs
                x, layer_kept = nnx.merge(block_def, weights)(x, rope, context, layer_kv)
                return images.deepen(x, *number) if number else x, layer_kept

            # Without `remat`, the outputs of matrix products and of attention are saved. Norms, rotations and
            # activation functions cost less to recompute than to write and read.
            policies = jax.checkpoint_policies
            products = policies.dots_with_no_batch_dims_saveable
            both = policies.save_from_both_policies(products, policies.save_only_these_names(KEPT))
            keep = None if remat else both
            numbers = () if images is None else (jnp.arange(self.config.num_layers),)
            layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
            x, kept = jax.lax.scan(layer, x, (stacked, kv, *numbers))
        return rms_norm(x, _value(self, "final_norm"), self.config.norm_eps), kept


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | tuple[jax.Array, jax.Array],
    context: Context,
    kv: KV = None,
    images: ImageTokens | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, KV]:
    """Run the forward pass, for training, prefill and decode.

    Args:
      config: the model's config.
      params: the parameters, stacked or unstacked.
      tokens: `[P, X]` ids.
      positions: `[P, X]` positions in the sequence, or their `rope_table` or `mrope_table`.
      context: one of `lpo_jax.models.attention`.
      kv: the KV cache of each layer, if the context needs one: stacked on L, or a list if the layers are unstacked.
      images: outputs of the vision tower, for tokens that are placeholders of images.
      dtype: the dtype of activations and products; weights are cast where they are used.
      remat: whether to recompute each layer in the backward pass, so that only L residual streams are saved. Else the
        outputs of its matrix products and of attention are saved too.

    Returns:
      Normed hidden states `[P, X, D]`, and the keys and values that the context kept for each layer.
    """
    stacked = 0 not in params["layers"]  # unstacked layers are keyed by their number
    # By default accelerators multiply float32 in lower precision, which would change log-probs visibly.
    with jax.default_matmul_precision("float32" if jnp.dtype(dtype) == jnp.float32 else "default"):
        own = {name: x for name, x in params.items() if (name,) != VISION}
        decoder = nnx.merge(_graph(config, stacked), nnx.State(own))
        return decoder(tokens, positions, context, kv, images, dtype=dtype, remat=remat)


def logits(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    images: PromptImages | None = None,
    *,
    dtype=jnp.float32,
):
    """Compute next-token logits `[B, T, V]` float32 of independent rows.

    Args:
      config: the model's config.
      params: the parameters, stacked.
      tokens: `[B, T]` ids.
      mask: `[B, T]`, true at real tokens; padding may be on either side. None: no padding.
      images: of the rows; None: there are none.
      dtype: the dtype of activations and products.
    """
    valid = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    context, seen, rope = Causal(valid, positions), None, rope_table(config, positions)
    if images is not None:
        rope = mrope_table(config, images.positions)
        seen = ImageTokens.of(image_outputs(config, params, images.rows, dtype), images.index)
    hidden, _ = forward(config, params, tokens, rope, context, images=seen, dtype=dtype)
    return project(hidden, unembedding(params))


def image_outputs(
    config: ModelConfig, params: Params, rows: TowerRows | None, dtype: DTypeLike = jnp.float32
) -> jax.Array | None:
    """Run the vision tower over the images of prompts (`vision.tower_outputs`); None if there are none."""
    return None if rows is None else tower_outputs(config, params["vision"], rows, dtype)


def unembedding(params: Params) -> jax.Array:
    """Return the output matrix `[V, D]`, which is the embedding in tied models."""
    return params.get("unembed", params["embed"])


def project(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    """Compute logits `[..., V]` from `hidden [..., D]` and `unembed [V, D]`, accumulated in float32."""
    precision = "float32" if hidden.dtype == jnp.float32 else "default"
    with jax.named_scope("unembed"), jax.default_matmul_precision(precision):
        unembed = unembed.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, unembed, preferred_element_type=accumulator(hidden.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x, weight, eps):
    y = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale * weight.astype(y.dtype)).astype(x.dtype), (x, weight, scale)


def _rms_norm_backward(eps, kept, g):
    # The same sums as autodiff's, written as einsums, because XLA's CPU compiler runs those 20 times faster.
    x, weight, scale = kept
    y, g = x.astype(scale.dtype) * scale, g.astype(scale.dtype)
    slope = g * weight.astype(scale.dtype)
    along = jnp.einsum("...d,...d->...", slope, y)[..., None] / y.shape[-1]
    d_weight = jnp.einsum("...d,...d->d", g, y)
    return (scale * (slope - y * along)).astype(x.dtype), d_weight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the parameter tree as `jax.ShapeDtypeStruct`s, layers stacked, without allocating memory."""
    return parameters.tree_of(config, lambda p: jax.ShapeDtypeStruct(p.shape(config), jnp.dtype(dtype)))


def init_params(
    config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32, shardings: Params | None = None
) -> Params:
    """Draw initial parameters (`Parameter.initial`), layers stacked, directly with the given shardings."""

    def make(key):
        next_key = nnx.Rngs(key).params
        return parameters.tree_of(config, lambda p: p.initial(config, next_key).astype(dtype))

    return jax.jit(make, out_shardings=shardings)(key)


def _shape(config: ModelConfig, parameter: Parameter, stacked: bool) -> nnx.Param:
    shape = jax.ShapeDtypeStruct(parameter.shape(config, stacked), jnp.float32)
    return nnx.Param(shape, axes=parameter.logical_axes(stacked))


def _value(module: nnx.Module, name: str) -> jax.Array:
    """The array of a declared parameter."""
    return getattr(module, name)[...]


@functools.cache
def _graph(config: ModelConfig, stacked: bool) -> nnx.GraphDef:
    """The decoder's structure."""
    return nnx.split(Decoder(config, stacked))[0]
