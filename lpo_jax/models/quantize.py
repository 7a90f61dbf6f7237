"""Weights of 8 bits for sampling (extra `[quant]`): half the bytes that a decoded token reads, or a quarter.

Each output channel of a layer's matrix has one scale, set by its largest weight; embeddings, norms and biases
stay as they are, and activations too. What is sampled is thereby another model than the one that is trained: its
log-probs differ, by `lpo/logp_gap_*`, so the trainer scores the samples once more (`lpo_jax.training.behaviour`).
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lpo_jax.errors import UserError
from lpo_jax.models.decoder import Params
from lpo_jax.models.lora import Adapted
from lpo_jax.models.parameters import named


@struct.dataclass
class Int8:
    """A matrix in the place of its array: int8 values and a scale for each output channel, by qwix."""

    array: "qwix.QArray"  # noqa: F821

    def product(self, axes: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        """`jnp.einsum(axes, x, matrix)` in x's dtype; given out in `dtype`, by default x's too."""
        import qwix

        return qwix.einsum(axes, x, self.array.astype(x.dtype), preferred_element_type=dtype)


def require_qwix() -> None:
    """Raises `UserError` where the extra is missing."""
    if importlib.util.find_spec("qwix") is None:
        raise UserError("sampling.weights = int8 needs qwix: pip install 'lpo_jax[quant]'")


def quantise_layer(layer: Params) -> Params:
    """A layer's parameters with every matrix as `Int8`; adapters stay beside it as they are."""
    import qwix

    def quantise(name: str, x: Any) -> Any:
        if isinstance(x, Adapted):
            return x.replace(weight=quantise(name, x.weight))
        parameter = named(name)
        if parameter.kind != "matrix":
            return x
        outputs = tuple(range(len(parameter.inputs), x.ndim))  # input axes come first
        return Int8(qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=outputs))

    return {name: quantise(name, x) for name, x in layer.items()}
