"""The device mesh of a run: derived from sizes or given in the config, and checked before anything is loaded.

The axes, in increasing order of communication cost, and how they are derived:
  data    splits the prompts of a minibatch over devices that hold whole parameters; gradients are summed once per
          update
  fsdp    splits prompts too, and the parameters and optimizer state; layers are gathered as they run. It takes as few
          devices of the data axis as are needed for the state to fit into memory
  tensor  splits the heads, so that several devices compute a layer together. It takes the devices that are left when
          there are more devices than prompts
A single device has no mesh, and its program is the same as without this module.
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

# Bytes per parameter of an update, by `optimizer.state`: float32 parameter and gradient, and the two moments of Adam.
STATE_BYTES = {"float32": 16, "bfloat16": 12, "host": 16}
# Largest shares of a device's memory for the training state and for the sampler's weights. The rest is for activations
# and the KV cache.
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
    """The number of devices along each axis; `decode_tensor` is the tensor axis while sampling."""

    data: int
    fsdp: int
    tensor: int
    decode_tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


def choose_mesh(
    given: MeshSection,
    devices: int,
    model: ModelSizes,
    prompts: int,
    memory: float | None,
    weight_bytes: int = 4,
    state_bytes: int = STATE_BYTES["float32"],
) -> MeshSizes:
    """Choose the sizes of a run's mesh.

    Args:
      given: the config's section. Axes that are 0 are derived.
      devices: the number of devices. If no axis is given, devices that no mesh can use stay idle.
      model: the sizes of the model.
      prompts: prompts in a minibatch.
      memory: bytes of memory of one device. None: unknown, and assumed to be enough.
      weight_bytes: bytes of one parameter while sampling.
      state_bytes: bytes of one parameter in an update, from `STATE_BYTES`.

    Raises:
      UserError: the product of the given axes is not the number of devices, or they do not divide heads or prompts,
        or the decode tensor axis does not divide devices and heads.
    """
    asked = (given.data, given.fsdp, given.tensor)
    state = state_bytes * model.num_params
    if any(asked):
        sizes = _complete(asked, devices, state, memory)
        _check(sizes, devices, model, prompts)
    else:
        sizes = next(s for n in range(devices, 0, -1) if (s := _derive(n, model, prompts, state, memory)))
    decode_tensor = given.decode_tensor or _decode_tensor(sizes, model, memory, weight_bytes)
    if decode_tensor not in (allowed := decode_sizes(sizes, model)):
        raise UserError(
            f"mesh.decode_tensor = {decode_tensor}: must divide the {sizes.devices} devices and the model's heads "
            f"({model.num_heads} query, {model.num_kv_heads} key/value): one of {', '.join(map(str, allowed))}"
        )
    return dataclasses.replace(sizes, decode_tensor=decode_tensor)


def build_mesh(sizes: MeshSizes, devices: list | None = None) -> Mesh:
    """Build a mesh of these sizes from the first devices."""
    devices = (jax.devices() if devices is None else devices)[: sizes.devices]
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: MeshSizes, devices: list) -> np.ndarray:
    """Arrange devices as `[data, fsdp, tensor]`, so that neighbours along `tensor` are neighbours in the machine.

    If there are several slices, which only a slow network connects, only the data axis crosses slices.

    Raises:
      UserError: the data axis is not a multiple of the number of slices.
    """
    shape = (sizes.data, sizes.fsdp, sizes.tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # `jax.make_mesh` refuses axes that are not products of whole torus axes, such as 8 x 8 on 4 x 4 x 4.
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
    """Choose and build the mesh of a run on the available devices. The mesh is None if it has a single device.

    Raises:
      UserError: as in `choose_mesh`, or there are several hosts and not all of their devices can be used.
    """
    there = jax.device_count()
    if config.mesh.devices > there:
        raise UserError(f"mesh.devices = {config.mesh.devices}: there are {there}; 0 uses all of them")
    devices = config.mesh.devices or there
    prompts = config.training.prompts_per_step // config.training.updates_per_step
    stats = jax.local_devices()[0].memory_stats() or {}
    itemsize = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize
    state = STATE_BYTES[config.optimizer.state]
    sizes = choose_mesh(config.mesh, devices, model, prompts, stats.get("bytes_limit"), itemsize, state)
    if jax.process_count() > 1 and sizes.devices < there:
        raise UserError(
            f"mesh: only {sizes.devices} of {there} devices would be used, which leaves hosts without work; "
            f"choose training.prompts_per_step / training.updates_per_step ({prompts}) to be a multiple of {there}"
        )
    return sizes, build_mesh(sizes) if sizes.devices > 1 else None


def _complete(asked, devices: int, state: int, memory: float | None) -> MeshSizes:
    """Derive the axes that are not given: tensor is 1 unless the others leave devices over, fsdp depends on memory."""
    data, fsdp, tensor = asked
    tensor = tensor or (devices // (data * fsdp) if data and fsdp else 1) or 1
    left = max(devices // (tensor * (data or 1) * (fsdp or 1)), 1)
    if not data and not fsdp:
        fsdp = _fsdp(left, tensor, state, memory)
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
                f"use {max(d for d in divisors(model.common_heads) if d <= sizes.tensor)} or less, and "
                "more fsdp"
            )
    if prompts % (shards := sizes.data * sizes.fsdp):
        raise UserError(
            f"mesh: data x fsdp = {shards} does not divide the {prompts} prompts of a minibatch "
            "(training.prompts_per_step / training.updates_per_step); change one of them, or use mesh.tensor"
        )


def _derive(
    devices: int, model: ModelSizes, prompts: int, state: int, memory: float | None
) -> MeshSizes | None:
    """Derive a mesh of exactly this many devices by the rules above; None if there is none."""
    for tensor in range(1, devices + 1):
        shards = devices // tensor
        if devices % tensor == 0 and model.common_heads % tensor == 0 and prompts % shards == 0:
            fsdp = _fsdp(shards, tensor, state, memory)
            return MeshSizes(shards // fsdp, fsdp, tensor)
    return None


def _fsdp(shards: int, tensor: int, state: int, memory: float | None) -> int:
    """The smallest divisor of `shards` for which parameters and optimizer state fit; `shards` if none does."""
    fits = lambda n: memory is None or state / tensor / n <= STATE_SHARE * memory  # noqa: E731
    return next((n for n in divisors(shards) if fits(n)), shards)


def _decode_tensor(sizes: MeshSizes, model: ModelSizes, memory: float | None, weight_bytes: int) -> int:
    """The smallest number of devices, a divisor of the heads, over which the sampler's weights fit."""
    allowed = decode_sizes(sizes, model)
    weights = weight_bytes * model.num_params
    fits = lambda n: memory is None or weights / n <= WEIGHTS_SHARE * memory  # noqa: E731
    return next((n for n in allowed if fits(n)), allowed[-1])


def decode_sizes(sizes: MeshSizes, model: ModelSizes) -> list[int]:
    """Return the possible numbers of devices that the sampler's weights are split over, from 1 up."""
    return [n for n in divisors(sizes.devices) if model.common_heads % n == 0]


def divisors(n: int) -> list[int]:
    """Return the divisors of n, from 1 up."""
    return [d for d in range(1, n + 1) if n % d == 0]
