"""Run tests in float64, and bounds on the rounding error of float32.

Identities are tested in float64 to 1e-10: a mistake gives a far larger error, rounding a far smaller one. Float32
results are compared with float64 results, within a bound on the rounding error: that of a dot product of n terms is at
most n / 2 eps times the sum of their absolute values, and to first order the errors of consecutive products add up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import CONFIG

EXACT = 1e-10
EPS = float(np.finfo(np.float32).eps)

# The tiny model in float32: 7 matrix products in each layer and one in the head, each of about CONFIG.width terms. The
# backward pass goes through the same products again.
FORWARD_ROUNDING = (7 * CONFIG.num_layers + 1) * CONFIG.width / 2 * EPS  # 2.9e-5
GRADIENT_ROUNDING = 2 * FORWARD_ROUNDING


def in_float64(test):
    """Run a test with 64-bit floats enabled, and with its argument `tiny_params` cast to float64."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            if "tiny_params" in kwargs:
                kwargs["tiny_params"] = astype(kwargs["tiny_params"], np.float64)
            return test(*args, **kwargs)

    return wrapped


def norm(tree):
    """Compute the norm of all leaves together, in numpy: nothing is compiled for their shapes."""
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(tree))))


def astype(tree, dtype):
    """Copy `tree` to the host, with its floating-point arrays cast to `dtype`."""
    return jax.tree.map(
        lambda x: np.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, jax.device_get(tree)
    )
