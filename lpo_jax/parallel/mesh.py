"""Which mesh a run gets: chosen from its sizes or given in the config, and checked before anything is loaded.

The rule, in the order in which an axis costs communication:
  data    every minibatch is split over as many devices as divide its prompts; gradients are summed once an update
  fsdp    as much of that split as the parameters with their optimizer need, so that each device holds a part:
          layers are gathered as they run
  tensor  what no prompt is left for, where it divides the heads: devices that compute a layer together
One device has no mesh, and runs the program that it would without this file.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lpo_jax.config import Config, MeshSection
from lpo_jax.errors import UserError
from lpo_jax.parallel.sharding import AXES

# float32 parameter, gradient and the two moments of Adam.
STATE_BYTES = 16
# Shares of a device's memory that the state, and the weights that decode, may take; the rest is for activations,
# keys and values.
STATE_SHARE, WEIGHTS_SHARE = 0.5, 0.4


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that the choice of a mesh depends on."""

    num_heads: int
    num_kv_heads: int
    num_params: int

    @property
    def common_heads(self) -> int:
        """The greatest common divisor of the numbers of heads, which the tensor axis has to divide."""
        return math.gcd(self.num_heads, self.num_kv_heads)


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """How many devices lie along each axis; `decode_tensor` is the tensor axis while sampling."""

    data: int
    fsdp: int
    tensor: int
    decode_tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


def choose(
    given: MeshSection,
    devices: int,
    model: ModelSizes,
    prompts: int,
    memory: float | None,
    weight_bytes: int = 4,
) -> MeshSizes:
    """The mesh of a run.

    Args:
      given: the config's section; axes that are 0 are derived.
      devices: how many there are. Where nothing is given, what no mesh can use is left idle.
      prompts: of a minibatch.
      memory: bytes of one device; None: unknown, and taken to be enough.
      weight_bytes: of one parameter while sampling.

    Raises:
      UserError: the given axes do not multiply to the devices, or do not divide heads or prompts.
    """
    asked = (given.data, given.fsdp, given.tensor)
    if any(asked):
        sizes = _complete(asked, devices, model, prompts, memory)
        _check(sizes, devices, model, prompts)
    else:
        sizes = next(s for n in range(devices, 0, -1) if (s := _derive(n, model, prompts, memory)))
    return dataclasses.replace(sizes, decode_tensor=_decode_tensor(sizes, model, memory, weight_bytes))


def build(sizes: MeshSizes, devices: list | None = None) -> Mesh:
    """The mesh of these sizes, over the first devices."""
    devices = (jax.devices() if devices is None else devices)[: sizes.devices]
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: MeshSizes, devices: list) -> np.ndarray:
    """The devices `[data, fsdp, tensor]`: neighbours along `tensor` are neighbours in the machine.

    Of several slices, which only a slow network connects, each holds parts of `data` of its own.

    Raises:
      UserError: `data` does not divide into the slices.
    """
    shape = (sizes.data, sizes.fsdp, sizes.tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # jax.make_mesh refuses axes that are no product of whole axes of the torus, such as 8 x 8 on 4 x 4 x 4.
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes.data % slices:
        raise UserError(
            f"mesh.data = {sizes.data}: does not divide into the {slices} slices; set it to a multiple of {slices}"
        )
    of_slice = (sizes.data // slices, sizes.fsdp, sizes.tensor)
    return mesh_utils.create_hybrid_device_mesh(
        of_slice, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def open_mesh(config: Config, model: ModelSizes) -> tuple[MeshSizes, Mesh | None]:
    """The mesh of a run on this machine's devices, or pod's; None where it has a single one.

    Raises:
      UserError: as `choose`; or several hosts whose devices cannot all be used.
    """
    there = jax.device_count()
    if config.mesh.devices > there:
        raise UserError(f"mesh.devices = {config.mesh.devices}: there are {there}; 0 uses all of them")
    devices = config.mesh.devices or there
    prompts = config.training.prompts_per_step // config.training.updates_per_step
    stats = jax.local_devices()[0].memory_stats() or {}
    itemsize = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize
    sizes = choose(config.mesh, devices, model, prompts, stats.get("bytes_limit"), itemsize)
    if jax.process_count() > 1 and sizes.devices < there:
        raise UserError(
            f"mesh: {sizes.devices} of {there} devices would work, and those of some hosts not at all; "
            f"choose training.prompts_per_step / training.updates_per_step ({prompts}) to be a multiple of {there}"
        )
    return sizes, build(sizes) if sizes.devices > 1 else None


def _complete(asked, devices: int, model: ModelSizes, prompts: int, memory) -> MeshSizes:
    """The axes that were given, and for the others what the devices leave: tensor 1, fsdp as memory asks."""
    data, fsdp, tensor = asked
    tensor = tensor or (devices // (data * fsdp) if data and fsdp else 1) or 1
    left = max(devices // (tensor * (data or 1) * (fsdp or 1)), 1)
    if not data and not fsdp:
        fsdp = _fsdp(left, tensor, model, memory)
        data = left // fsdp
    return MeshSizes(data or left, fsdp or left, tensor)


def _check(sizes: MeshSizes, devices: int, model: ModelSizes, prompts: int) -> None:
    if sizes.devices != devices:
        product = f"{sizes.data} x {sizes.fsdp} x {sizes.tensor} = {sizes.devices}"
        raise UserError(
            f"mesh: data x fsdp x tensor = {product}, but there are {devices} devices; set one of them to 0 to have "
            "it derived, or mesh.devices to use fewer"
        )
    for what, heads in (("query", model.num_heads), ("key/value", model.num_kv_heads)):
        if heads % sizes.tensor:
            raise UserError(
                f"mesh.tensor = {sizes.tensor}: does not divide the model's {heads} {what} heads; "
                f"use {_largest_divisor(model.common_heads, sizes.tensor)} or less, and "
                "more fsdp"
            )
    if prompts % (shards := sizes.data * sizes.fsdp):
        raise UserError(
            f"mesh: data x fsdp = {shards} does not divide the {prompts} prompts of a minibatch "
            "(training.prompts_per_step / training.updates_per_step); change one of them, or use mesh.tensor"
        )


def _derive(devices: int, model: ModelSizes, prompts: int, memory: float | None) -> MeshSizes | None:
    """The mesh of exactly this many devices by the rule above; None where there is none."""
    for tensor in range(1, devices + 1):
        shards = devices // tensor
        if devices % tensor == 0 and model.common_heads % tensor == 0 and prompts % shards == 0:
            fsdp = _fsdp(shards, tensor, model, memory)
            return MeshSizes(shards // fsdp, fsdp, tensor)
    return None


def _fsdp(shards: int, tensor: int, model: ModelSizes, memory: float | None) -> int:
    """The fewest parts, of `shards`, whose share of parameters and optimizer fits; all where none does."""
    state = STATE_BYTES * model.num_params / tensor
    fits = lambda n: memory is None or state / n <= STATE_SHARE * memory  # noqa: E731
    return next((n for n in range(1, shards + 1) if shards % n == 0 and fits(n)), shards)


def _decode_tensor(sizes: MeshSizes, model: ModelSizes, memory: float | None, weight_bytes: int) -> int:
    """The fewest devices whose shares of the sampler's weights fit, dividing the heads; 1: whole weights."""
    allowed = [
        n for n in range(1, sizes.devices + 1) if sizes.devices % n == 0 and model.common_heads % n == 0
    ]
    weights = weight_bytes * model.num_params
    fits = lambda n: memory is None or weights / n <= WEIGHTS_SHARE * memory  # noqa: E731
    return next((n for n in allowed if fits(n)), allowed[-1])


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
