"""Float64 for exactness, and how far float32 may be from it.

An identity is tested in float64, to 1e-10: a mistake is far larger, rounding far smaller. Float32 is compared with the
float64 result, within a bound that follows from its rounding: a dot product of n terms is off by at most n / 2 eps of
the sum of their sizes, and to first order the errors of products in a chain add up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import CONFIG

EXACT = 1e-10
EPS = float(np.finfo(np.float32).eps)

# The tiny model in float32: 7 products in each layer and the head, of about as many terms as the model is wide. A
# gradient goes back through the same products.
FORWARD_ROUNDING = (7 * CONFIG.num_layers + 1) * CONFIG.width / 2 * EPS  # 2.9e-5
GRADIENT_ROUNDING = 2 * FORWARD_ROUNDING


def in_float64(test):
    """Run a test with 64-bit floats; its argument `tiny_params` in float64."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            if "tiny_params" in kwargs:
                kwargs["tiny_params"] = astype(kwargs["tiny_params"], np.float64)
            return test(*args, **kwargs)

    return wrapped


def astype(tree, dtype):
    """`tree` with its floats in `dtype`, on the host."""
    return jax.tree.map(
        lambda x: np.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, jax.device_get(tree)
    )
