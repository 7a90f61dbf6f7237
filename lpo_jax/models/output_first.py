"""Matrices with the outputs first, for decoding in float32 on a CPU.

XLA's CPU compiler multiplies few rows of activations faster in this layout than in that of training: at 64 rows the
products take a few percent less processor time, at 8 rows up to half of it (`docs/performance.md`).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from lpo_jax.models.decoder import Params
from lpo_jax.models.lora import Adapted
from lpo_jax.models.parameters import named
from lpo_jax.parallel.sharding import current_mesh

# Up to this many rows the matrix is the left operand, which saves 20 to 50% of the processor time of a product. With
# more rows it saves less than the transpositions of the activations cost.
FEW_ROWS = 32


class OutputFirst(struct.PyTreeNode):
    """A matrix `[n, k]` from k inputs to n outputs, which replaces the array in the tree.

    Attributes:
      matrix: the array.
      outputs: the sizes of the output axes, whose product is n.
    """

    matrix: jax.Array
    outputs: tuple[int, ...] = struct.field(pytree_node=False)

    def product(self, axes: str, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Compute `jnp.einsum(axes, x, array)` in x's dtype; the result is in `dtype`, by default x's too.

        Args:
          axes: one letter for the rows of `x`, and the outputs last in the result, as the decoder writes it.
        """
        rows = x.reshape(len(x), -1)
        if len(x) > FEW_ROWS:
            out = jnp.einsum("rk,nk->rn", rows, self.matrix, preferred_element_type=dtype)
        else:
            # The barriers keep the compiler from folding the transpositions into the product, which would undo the
            # layout. Around the barriers they are fused with the operations before and after.
            columns = jax.lax.optimization_barrier(rows.T)
            out = jnp.einsum("nk,kr->nr", self.matrix, columns, preferred_element_type=dtype)
            out = jax.lax.optimization_barrier(out).T
        return out.reshape(len(x), *self.outputs)


def output_first_pays(dtype: DTypeLike) -> bool:
    """Return whether the current mesh and backend decode faster with this layout: one CPU device, in float32."""
    return jax.default_backend() == "cpu" and current_mesh() is None and jnp.dtype(dtype) == jnp.float32


def output_first_layer(layer: Params) -> Params:
    """Replace every matrix of a layer by an `OutputFirst`; the two factors of an adapter stay as they are."""

    def convert(name: str, x: jax.Array | Adapted) -> jax.Array | Adapted | OutputFirst:
        if isinstance(x, Adapted):
            return x.replace(weight=convert(name, x.weight))
        parameter = named(name)
        if parameter.kind != "matrix":
            return x
        outputs = x.shape[len(parameter.inputs) :]
        return OutputFirst(x.reshape(-1, math.prod(outputs)).T, outputs)

    return {name: convert(name, x) for name, x in layer.items()}
