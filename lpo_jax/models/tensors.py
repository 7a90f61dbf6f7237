"""Conversion between the parameter tree and the tensors of a file, derived from the declarations.

A file stores a matrix as `[out, in]`, with heads and head width folded into one axis, and one tensor per layer. In the
tree, axes are separate, input axes come first, and layers are stacked. The axis letters are those of
`lpo_jax.models.parameters`.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.parameters import Parameter, axis_sizes, declared, tree_of

Index = tuple[slice, ...]  # a part of an array: start and stop on each axis

READERS = 4  # layers of a parameter that are read at once; each needs the memory of one matrix
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def file_shape(config: ModelConfig, parameter: Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter's tensor in a file."""
    sizes = axis_sizes(config)
    return tuple(math.prod(sizes[a] for a in axes) for axes in parameter.file_axes.split(","))


def from_file(
    config: ModelConfig, parameter: Parameter, read: Callable[[tuple[slice, ...]], np.ndarray], index: Index
) -> np.ndarray:
    """Read a part of a tensor and convert it to the axes of the tree.

    Args:
      config: the model's config.
      parameter: the parameter.
      read: returns a part of the file's tensor. Only the rows and columns that are needed are requested.
      index: the part, in the axes of the tree without the leading L.
    """
    sizes, axes = axis_sizes(config), parameter.axes()
    of = dict(zip(axes, index, strict=True))
    rows: list[slice] = []
    shape: list[int] = []
    cut: dict[str, slice] = {}
    for first, *inner in map(list, parameter.file_axes.split(",")):
        stride = math.prod(sizes[a] for a in inner)
        rows.append(slice(of[first].start * stride, of[first].stop * stride))
        shape += [of[first].stop - of[first].start, *(sizes[a] for a in inner)]
        # Folded axes after the first are read completely.
        cut |= {first: slice(None)} | {a: of[a] for a in inner}
    stored = parameter.file_axes.replace(",", "")
    part = read(tuple(rows)).reshape(shape).transpose([stored.index(a) for a in axes])
    return part[tuple(cut[a] for a in axes)]


def to_file(config: ModelConfig, parameter: Parameter, x: np.ndarray) -> np.ndarray:
    """Convert a whole parameter of one layer to the tensor of a file, contiguous: the inverse of `from_file`."""
    axes = parameter.axes()
    moved = x.transpose([axes.index(a) for a in parameter.file_axes.replace(",", "")])
    return np.ascontiguousarray(moved).reshape(file_shape(config, parameter))


def file_names(config: ModelConfig, form: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that a file must contain; `form` is "hf" or "gguf"."""
    names = {}
    for parameter in declared(config):
        for layer in range(parameter.depth(config)):
            name = parameter.hf_name(config, layer) if form == "hf" else parameter.gguf.format(layer)
            names[name] = file_shape(config, parameter)
    return names


def check_names(where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compare the names and shapes of the tensors in a file with the expected ones.

    Args:
      where: the name of the file, for messages.
      expected: the shapes of the tensors that the file must contain, by name.
      found: those of the tensors that it contains.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape.
    """
    if missing := [name for name in expected if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: tensor {missing[0]}{more} is missing; is the download complete?")
    if extra := [name for name in found if name not in expected]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{where}: unexpected tensor {extra[0]}{more}; the model is not what its config says")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{where}: tensor {name} has shape {tuple(found[name])}, its config says {shape}")


def read_params(
    config: ModelConfig,
    read: Callable[[Parameter, int, Index], np.ndarray],
    dtype: str = "float32",
    shardings: Params | None = None,
) -> Params:
    """Build the parameter tree, one tensor of the file at a time.

    Host memory is needed for one parameter with all its layers, on a CPU besides the model. With shardings, a host
    reads only the parts that its own devices hold, each part once.

    Args:
      config: the model's config.
      read: returns a part of the tensor of `(parameter, layer, index)`, an array of any float dtype; `index` refers to
        the tensor's `file_shape`, and `layer` is 0 for parameters outside the layers.
      dtype: the dtype of the parameters, "float32" or "bfloat16".
      shardings: a tree of `jax.sharding.Sharding` shaped like the parameters; None: the default device.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(DTYPES)}")

    def leaf(parameter: Parameter) -> jax.Array:
        part = functools.partial(_read_part, config, parameter, read, DTYPES[dtype])
        where = shardings and parameter.of(shardings)
        return _to_device(part, parameter.shape(config), where)  # type: ignore[arg-type]

    return tree_of(config, leaf)


def _read_part(config: ModelConfig, parameter: Parameter, read, dtype: np.dtype, index: Index) -> np.ndarray:
    """Read a part of a parameter, with its leading axis if it is stacked."""
    part = _empty(tuple(s.stop - s.start for s in index), dtype)
    if parameter.stack:

        def read_layer(layer: int) -> None:
            rows = functools.partial(read, parameter, layer)
            part[layer - index[0].start] = from_file(config, parameter, rows, index[1:])

        with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
            list(readers.map(read_layer, range(index[0].start, index[0].stop)))  # raises what a reader raises
    else:
        part[...] = from_file(config, parameter, functools.partial(read, parameter, 0), index)
    return part


def file_tensors(config: ModelConfig, params: Params, dtype: np.dtype | None) -> Iterator:
    """Yield `(Hugging Face name, shape, dtype, fetch)` of every tensor; `fetch()` copies that tensor to the host."""
    for parameter in declared(config):
        leaf = parameter.of(params)
        if tuple(leaf.shape) != (expected := parameter.shape(config)):
            raise ValueError(f"parameter {parameter.name} has shape {tuple(leaf.shape)}, expected {expected}")
        target = dtype or np.dtype(leaf.dtype)
        for layer in range(parameter.depth(config)):

            def fetch(parameter=parameter, leaf=leaf, layer=layer, target=target):
                host = np.asarray(leaf[layer] if parameter.stack else leaf)
                return to_file(config, parameter, host.astype(target, copy=False))

            yield parameter.hf_name(config, layer), file_shape(config, parameter), target, fetch


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate uninitialised memory on a 64-byte boundary, of which JAX's CPU backend makes one copy instead of two."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _to_device(
    part: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        # A copy, because an update cannot write in place to memory of NumPy, which JAX's CPU backend takes over. It
        # ends before the next parameter is read, so that it takes the memory of one more parameter only. `jnp.array`
        # would compile a program for each shape.
        taken = jax.device_put(part(tuple(slice(0, n) for n in shape)))
        return jax.block_until_ready(jax.device_put(taken, may_alias=False))
    held: dict[tuple, np.ndarray] = {}  # devices with the same part share one read

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in held:
            held[bounds] = part(tuple(slice(*b) for b in bounds))
        return held[bounds]

    return jax.make_array_from_callback(shape, sharding, of_device)
