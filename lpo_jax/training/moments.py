"""Where AdamW keeps its two moments between updates, and in which type (`optimizer.state`).

float32   in float32, in the memory of the device
bfloat16  in bfloat16; the arithmetic of an update is in float32. The first moment is rounded to nearest. The second one
          is rounded stochastically: with b2 = 0.999 an update changes it by a thousandth, which is less than half the
          distance between two bfloat16 numbers, so that rounding to nearest would never change it
host      in float32, in the host's memory while responses are sampled and scored. They are on the device while a step's
          updates run, which therefore need as much memory as with float32
"""

import jax
import jax.numpy as jnp
import optax

from lpo_jax.errors import UserError
from lpo_jax.types import PyTree

HOST_MEMORY = "pinned_host"
LOW_BITS = 16  # of a float32, which bfloat16 does not have


def in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the moments of `optax.scale_by_adam` in bfloat16, and compute with them in float32.

    Rounding depends on the number of updates and the place of an element in its array alone, so that it is the same on
    every mesh and after a resume.
    """

    def cast(tree: PyTree, dtype: jnp.dtype) -> PyTree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params):
        state = rule.init(params)
        return state._replace(mu=cast(state.mu, jnp.bfloat16), nu=cast(state.nu, jnp.bfloat16))

    def update(gradient, state, params=None):
        wide = state._replace(mu=cast(state.mu, jnp.float32), nu=cast(state.nu, jnp.float32))
        updates, new = rule.update(gradient, wide, params)
        leaves, structure = jax.tree.flatten(new.nu)
        rounded = [round_stochastically(x, new.count * len(leaves) + i) for i, x in enumerate(leaves)]
        nu = jax.tree.unflatten(structure, rounded)
        return updates, new._replace(mu=cast(new.mu, jnp.bfloat16), nu=nu)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, seed: jax.Array | int) -> jax.Array:
    """Round float32 numbers to one of the two nearest bfloat16 numbers, so that the mean is the number.

    The random bits are a hash of the seed and the element's index, by the finaliser of MurmurHash3. `jax.random` takes
    ten times the operations, and its bits have to be stored.

    Args:
      x: finite, below the largest bfloat16 number.
      seed: selects the random bits.
    """
    bits = jnp.zeros(x.shape, jnp.uint32)  # the index of each element
    for axis, size in enumerate(x.shape):
        bits = bits * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits += jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits ^= bits >> 16
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> LOW_BITS)
    kept = (raised >> LOW_BITS) << LOW_BITS
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)


def moments_to_host(state: PyTree) -> PyTree:
    """Move the moments of an optimizer's state to the memory of the host; counts stay."""
    return _moved(state, HOST_MEMORY)


def moments_to_device(state: PyTree) -> PyTree:
    """Move the moments of an optimizer's state to the memory of the devices."""
    return _moved(state, jax.local_devices()[0].default_memory().kind)


def _moved(state: PyTree, kind: str) -> PyTree:
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)) if x.ndim else x, state
    )


def check_host_memory() -> None:
    """Raise `UserError` if the devices cannot keep arrays in the memory of the host."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"optimizer.state = host: {device.device_kind} has no {HOST_MEMORY} memory (it has {', '.join(kinds)}); "
            "use bfloat16 or float32"
        )
