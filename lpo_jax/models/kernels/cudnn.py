"""Attention to one source by cuDNN on NVIDIA GPUs, for `lpo_jax.models.kernels.union`.

`jax.nn.dot_product_attention(implementation="cudnn")` returns the log-sum-exp rounded to the dtype of the output, and
its gradient takes the output and the log-sum-exp of its own forward pass. So this file calls the functions behind it,
which are private to JAX; pyproject.toml bounds the version of JAX, and a test compiles them.

Scores are never stored in main memory. cuDNN counts keys from the start of a row, so the form has no sliding window,
and rows begin with their first token.
"""

import importlib.util

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lpo_jax.models.kernels.union import Kernel, KeySource

WIDEST = 128  # heads that the backward pass takes on every GPU since Ampere
_SEED, _DROPOUT, _WITHOUT_BIAS, _WITHOUT_WINDOW = 42, 0.0, (False, False), None


def refuses(dtype: DTypeLike, head_width: int, window: int | None) -> str:
    """Return why cuDNN cannot compute attention of this form; empty if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it has no attention in {jnp.dtype(dtype).name}"
    if head_width % 8 or head_width > WIDEST:
        return f"it takes heads of a multiple of 8 up to {WIDEST}, not of {head_width}"
    if window is not None:
        return "it has no sliding window for responses that share a prompt"
    if importlib.util.find_spec("jax._src.cudnn") is None:
        return "this version of jax has no interface to it"
    return ""


def _form(source: KeySource, X: int):
    """The mask of cuDNN, and the numbers of queries and keys of each row where it needs them."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    if source.causal:
        return MaskType.CAUSAL, None, None
    B = len(source.k)
    # cuDNN's result for a row without keys is not finite; no response has a prompt of length 0.
    return MaskType.PADDING, jnp.full(B, X, jnp.int32), jnp.maximum(source.stop[:, 0], 1)


def _forward(q: jax.Array, source: KeySource) -> tuple[jax.Array, jax.Array]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask, queries, keys = _form(source, q.shape[1])
    out, lse = cudnn.dot_product_attention(
        q,
        source.k,
        source.v,
        q_seqlen=queries,
        kv_seqlen=keys,
        scale=q.shape[-1] ** -0.5,
        mask_type=mask,
        return_residual=True,
    )
    return out, jnp.swapaxes(lse, 1, 2)


def _backward(q: jax.Array, source: KeySource, out: jax.Array, lse: jax.Array, d_out: jax.Array):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask, *lengths = _form(source, q.shape[1])
    none = jnp.zeros(0, q.dtype)
    lengths = [none if x is None else x for x in lengths]
    # bias, lengths, offsets of packed rows, tables of pages, and what the forward pass has returned
    kept = q, source.k, source.v, none, *lengths, none, none, none, none, jnp.swapaxes(lse, 1, 2), out
    options = q.shape[-1] ** -0.5, _SEED, _DROPOUT, _WITHOUT_BIAS, mask, cudnn.AttentionLayout.BTNH.value
    version, return_residual = cudnn.check_cudnn_version(), False
    grads = cudnn._dot_product_attention_bwd_rule(
        *options, _WITHOUT_WINDOW, version, return_residual, kept, d_out.astype(q.dtype)
    )
    return grads[:3]


KERNEL = Kernel(_forward, _backward)
