"""Int8 weights for sampling (extra `[quant]`): a decoded token reads half or a quarter of the bytes.

Each output channel of a matrix has one scale, set by its largest weight. Embeddings, norms, biases and activations are
not quantised. The sampled model therefore differs from the trained one; `lpo/logp_gap_*` measure by how much. The
trainer recomputes the log-probs of the samples (`lpo_jax.training.behaviour`).
"""

import importlib.util

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from lpo_jax.errors import UserError
from lpo_jax.models.decoder import Params
from lpo_jax.models.lora import Adapted
from lpo_jax.models.parameters import named


class Int8(struct.PyTreeNode):
    """A quantised matrix, which replaces the array in the tree: int8 values and a scale per output channel."""

    array: "qwix.QArray"  # type: ignore[name-defined]  # noqa: F821

    def product(self, axes: str, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Compute `jnp.einsum(axes, x, matrix)` in x's dtype; the result is in `dtype`, by default x's too."""
        import qwix

        return qwix.einsum(axes, x, self.array.astype(x.dtype), preferred_element_type=dtype)


def require_qwix() -> None:
    """Raise `UserError` if qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise UserError("sampling.weights = int8 needs qwix: pip install 'lpo_jax[quant]'")


def quantise_layer(layer: Params) -> Params:
    """Replace every matrix of a layer by an `Int8`; adapters are not quantised."""
    import qwix

    def quantise(name: str, x: jax.Array | Adapted) -> jax.Array | Adapted | Int8:
        if isinstance(x, Adapted):
            return x.replace(weight=quantise(name, x.weight))
        parameter = named(name)
        if parameter.kind != "matrix":
            return x
        outputs = tuple(range(len(parameter.inputs), x.ndim))  # input axes come first
        return Int8(qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=outputs))

    return {name: quantise(name, x) for name, x in layer.items()}
