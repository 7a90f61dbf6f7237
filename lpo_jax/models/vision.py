"""The vision towers of Qwen2.5-VL and Qwen3-VL: from patches to the outputs that replace placeholders in prompts.

Pure functions of the branch `vision` of the parameters. Both towers are transformers without a causal order, with
rotary embeddings of row and column, whose outputs are merged 2 x 2. Qwen2.5-VL attends within windows in most layers,
with RMS norms and SwiGLU; Qwen3-VL has layer norms, a learned table of positions, and returns, besides its last layer,
merged outputs of earlier layers, which are added to the residual stream after the first layers of the decoder
(DeepStack, arXiv 2406.04334).

Axes: M microbatches · B rows · C patches of a row · X outputs of the batch · D decoder width; others as in
`lpo_jax.models.parameters`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from lpo_jax.models.attend import accumulator, attend
from lpo_jax.models.attention import rearrange
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.packing import NOWHERE
from lpo_jax.models.parameters import named
from lpo_jax.models.prompt_images import Sequences, TowerRows
from lpo_jax.models.rotary import rotate
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.parallel.sharding import constrain, gathered, whole
from lpo_jax.types import PyTree

EPS = 1e-6
ROPE_THETA = 10000.0


class ImageTokens(struct.PyTreeNode):
    """Outputs of a tower, and the tokens of a batch that they replace.

    Attributes:
      outputs: `[1 + e, X, D]`: those that replace the embeddings, then the DeepStack features of each decoder layer.
      index: `[P, T]` the output of each token; `NOWHERE` at text.
    """

    outputs: jax.Array
    index: jax.Array

    @classmethod
    def of(cls, outputs: jax.Array | None, index: jax.Array | None) -> "ImageTokens | None":
        """Return the tokens; None if the tower had nothing to read."""
        return None if outputs is None else cls(outputs, index)

    def embed(self, x: jax.Array) -> jax.Array:
        """Replace the embeddings `[P, T, D]` of placeholders."""
        seen = self.index != NOWHERE
        return jnp.where(seen[..., None], self._take(self.outputs[0]).astype(x.dtype), x)

    def deepen(self, x: jax.Array, layer: int | jax.Array) -> jax.Array:
        """Add the DeepStack features of a decoder layer to its result `[P, T, D]`."""
        depth = len(self.outputs) - 1
        if not depth:
            return x
        if isinstance(layer, int):
            return x + self._take(self.outputs[1 + layer]).astype(x.dtype) if layer < depth else x
        add = lambda x: x + self._take(self.outputs[jnp.minimum(1 + layer, depth)]).astype(x.dtype)  # noqa: E731
        return jax.lax.cond(layer < depth, add, lambda x: x, x)

    def _take(self, outputs: jax.Array) -> jax.Array:
        return outputs.at[self.index].get(mode="fill", fill_value=0)


def tower_outputs(
    config: ModelConfig, params: PyTree, rows: TowerRows, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Run the tower over all images of a batch.

    Args:
      config: of the model.
      params: the branch `vision` of the parameters.
      rows: the packed images. One microbatch of them runs after another.
      dtype: of activations and products.

    Returns:
      `[1 + e, X, D]`, X = M B C / 4: the outputs, and those for DeepStack; on a mesh replicated on every device.
    """
    run = jax.checkpoint(functools.partial(_run, config.vision, jnp.dtype(dtype)), prevent_cse=False)
    with (
        jax.named_scope("vision"),
        jax.default_matmul_precision("float32" if jnp.dtype(dtype) == jnp.float32 else "default"),
    ):
        found = jax.lax.map(lambda rows: run(params, rows), rows)  # [M, 1 + e, B, C / 4, D]
    return whole(jnp.moveaxis(found, 1, 0).reshape(found.shape[1], -1, config.width))


def _run(config: VisionConfig, dtype: jnp.dtype, params: PyTree, rows: TowerRows) -> jax.Array:
    """Run one microbatch: `[1 + e, B, C / merge**2, D]`."""
    x = _embed(config, dtype, params, rows)
    rope = _rope(config, rows.place)
    full = np.isin(np.arange(config.depth), config.full_layers)
    outputs, start = [], 0
    for i, stop in enumerate([*(layer + 1 for layer in config.deepstack), config.depth]):
        layers = jax.tree.map(lambda w, a=start, b=stop: w[a:b], params["layers"])
        block = functools.partial(_block, config, rope, rows)
        x, _ = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), x, (layers, full[start:stop]))
        if i < len(config.deepstack):
            merger = jax.tree.map(lambda w, i=i: w[i], params["deepstack"])
            outputs.append(_merge(config, merger, "deep", x, norm_first=False))
        start = stop
    return jnp.stack([_merge(config, params, "merge", x, norm_first=True), *outputs])


def _embed(config: VisionConfig, dtype: jnp.dtype, params: PyTree, rows: TowerRows) -> jax.Array:
    """Normalise the pixels, and embed patches: `[B, C, d]`."""
    mean, std = (
        jnp.array(x, jnp.float32)[:, None, None] for x in (config.processor.mean, config.processor.std)
    )
    pixels = ((rows.levels.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std).astype(dtype)
    weight = params["v_patch"].sum(1).astype(dtype)  # an image is the same in all frames of a patch
    x = jnp.einsum("bcryx,ryxd->bcd", pixels, weight)
    if config.num_positions:
        x += params["v_patch_bias"].astype(dtype)
        found = params["v_positions"][rows.taps] * rows.weights[..., None]
        x += found.sum(-2).astype(dtype)
    return constrain(x, "batch", None, None)


def _rope(config: VisionConfig, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, C, 1, n / 2]`: the first half turns with the row, the second with the column."""
    quarter = config.head_width // 4
    frequency = ROPE_THETA ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angle = (place[..., None].astype(jnp.float32) * frequency).reshape(*place.shape[:2], 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def _block(config: VisionConfig, rope, rows: TowerRows, x: jax.Array, layer) -> tuple[jax.Array, None]:
    weights, full = layer
    h = _norm(weights, "v_norm1", x)
    q, k, v = jnp.moveaxis(_product("xd,dqhn->xqhn", weights, "v_qkv", h), 2, 0)
    q, k = rotate(q, rope), rotate(k, rope)
    if rows.windows is None:
        out = _attend(rows.images, q, k, v)
    else:
        within = (functools.partial(_attend, sequences) for sequences in (rows.images, rows.windows))
        out = jax.lax.cond(full, *within, q, k, v)
    x = constrain(x + _product("xhn,hnd->xd", weights, "v_out", out), "batch", None, None)
    h = _norm(weights, "v_norm2", x)
    if "v_gate" in weights:
        gate, up = (_product("xd,df->xf", weights, name, h) for name in ("v_gate", "v_up"))
        h = _product("xf,fd->xd", weights, "v_down", jax.nn.silu(gate) * up)
    else:
        h = jax.nn.gelu(_product("xd,df->xf", weights, "v_fc1", h), approximate=True)
        h = _product("xf,fd->xd", weights, "v_fc2", h)
    return constrain(x + h, "batch", None, None), None


def _attend(sequences: Sequences, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention within each sequence of patches: `[B, C, h, n]`."""
    B, size, heads = len(q), sequences.size, q.shape[2:]
    q, k, v = (rearrange(x, sequences.unpack, sequences.pack).reshape(-1, size, *heads) for x in (q, k, v))
    real = (sequences.unpack != NOWHERE).reshape(-1, 1, size)
    out, _ = attend(q, k, v, jnp.broadcast_to(real, (len(q), size, size)))
    return rearrange(out.reshape(B, -1, *heads), sequences.pack, sequences.unpack)


def _merge(config: VisionConfig, weights: PyTree, name: str, x: jax.Array, norm_first: bool) -> jax.Array:
    """Merge the patches of each token: `[B, C, d]` -> `[B, C / merge**2, D]`."""
    merged = lambda x: x.reshape(len(x), -1, x.shape[-1] * config.processor.merge_size**2)  # noqa: E731
    norm = functools.partial(_norm, weights, f"v_{name}_norm")
    x = merged(norm(x)) if norm_first else norm(merged(x))
    h = jax.nn.gelu(_product("xm,mw->xw", weights, f"v_{name}1", x), approximate=False)
    return _product("xw,wD->xD", weights, f"v_{name}2", h)


def _product(axes: str, weights: PyTree, name: str, x: jax.Array) -> jax.Array:
    """Multiply `x [B, C, ...]` by a matrix, which may have an adapter, and add its bias."""
    weight, rows = weights[name], x.reshape(-1, *x.shape[2:])
    if hasattr(weight, "product"):
        out = weight.product(axes, rows)
    else:
        weight = gathered(weight, x.dtype, *named(name).logical_axes(stacked=False))
        out = jnp.einsum(axes, rows, weight.astype(x.dtype))
    out += weights[f"{name}_bias"].astype(x.dtype)
    return out.reshape(*x.shape[:2], *out.shape[1:])


def _norm(weights: PyTree, name: str, x: jax.Array) -> jax.Array:
    """RMS norm, or layer norm where there is a bias, in float32."""
    y = x.astype(accumulator(x.dtype))
    bias = weights.get(f"{name}_bias")
    if bias is not None:
        y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPS)
    y = y * weights[name].astype(y.dtype) + (0 if bias is None else bias.astype(y.dtype))
    return y.astype(x.dtype)
