"""Where each parameter of the tree lives in a file: one table, read both ways.

A file stores matrices `[out, in]` with the heads folded into one axis, one tensor per layer. The tree keeps
the axes apart, contracts from the left, and stacks the layers. Axes: L D H G N F V, as everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig

Index = tuple[slice, ...]  # of a part of an array: start and stop of each axis, no steps

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# tree          axes   Hugging Face name                                     axes    GGUF name
_TABLE = """
embed           VD     model.embed_tokens.weight                             V,D     token_embd.weight
attn_norm       D      model.layers.{}.input_layernorm.weight                D       blk.{}.attn_norm.weight
wq              DHN    model.layers.{}.self_attn.q_proj.weight               HN,D    blk.{}.attn_q.weight
wk              DGN    model.layers.{}.self_attn.k_proj.weight               GN,D    blk.{}.attn_k.weight
wv              DGN    model.layers.{}.self_attn.v_proj.weight               GN,D    blk.{}.attn_v.weight
wo              HND    model.layers.{}.self_attn.o_proj.weight               D,HN    blk.{}.attn_output.weight
bq              HN     model.layers.{}.self_attn.q_proj.bias                 HN      blk.{}.attn_q.bias
bk              GN     model.layers.{}.self_attn.k_proj.bias                 GN      blk.{}.attn_k.bias
bv              GN     model.layers.{}.self_attn.v_proj.bias                 GN      blk.{}.attn_v.bias
q_norm          N      model.layers.{}.self_attn.q_norm.weight               N       blk.{}.attn_q_norm.weight
k_norm          N      model.layers.{}.self_attn.k_norm.weight               N       blk.{}.attn_k_norm.weight
mlp_norm        D      model.layers.{}.post_attention_layernorm.weight       D       blk.{}.ffn_norm.weight
w_gate          DF     model.layers.{}.mlp.gate_proj.weight                  F,D     blk.{}.ffn_gate.weight
w_up            DF     model.layers.{}.mlp.up_proj.weight                    F,D     blk.{}.ffn_up.weight
w_down          FD     model.layers.{}.mlp.down_proj.weight                  D,F     blk.{}.ffn_down.weight
final_norm      D      model.norm.weight                                     D       output_norm.weight
unembed         VD     lm_head.weight                                        V,D     output.weight
"""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter of the tree and its one (or, in layers, L) tensors in a file."""

    name: str  # in the tree
    axes: str  # in the tree, one letter each, without the leading L
    hf: str  # "{}" stands for the layer
    file_axes: str  # in a file; letters without a comma between them are folded into one axis
    gguf: str
    sizes: dict[str, int] = dataclasses.field(repr=False)  # axis letter -> size

    @property
    def in_layers(self) -> bool:
        return "{}" in self.hf

    @property
    def shape(self) -> tuple[int, ...]:
        """In the tree, without the leading L."""
        return tuple(self.sizes[a] for a in self.axes)

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(int(np.prod([self.sizes[a] for a in axes])) for axes in self.file_axes.split(","))

    def from_file(self, read: Callable[[tuple[slice, ...]], np.ndarray], index: Index) -> np.ndarray:
        """A part of the tensor, with the axes of the tree.

        Args:
          read: gives a part of the file's tensor; it is asked for no more rows and columns than the part needs.
          index: of the part, in the tree, without the leading L.
        """
        of = dict(zip(self.axes, index, strict=True))
        rows, shape, cut = [], [], {}
        for first, *inner in self.file_axes.split(","):
            stride = math.prod(self.sizes[a] for a in inner)
            rows.append(slice(of[first].start * stride, of[first].stop * stride))
            shape += [of[first].stop - of[first].start, *(self.sizes[a] for a in inner)]
            cut |= {first: slice(None)} | {a: of[a] for a in inner}  # folded axes behind the first come whole
        stored = self.file_axes.replace(",", "")
        part = read(tuple(rows)).reshape(shape).transpose([stored.index(a) for a in self.axes])
        return part[tuple(cut[a] for a in self.axes)]

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `from_file` for a whole tensor, contiguous."""
        stored = self.file_axes.replace(",", "")
        return np.ascontiguousarray(x.transpose([self.axes.index(a) for a in stored])).reshape(
            self.file_shape
        )


def tensors(config: ModelConfig) -> list[Tensor]:
    """The parameters that a model of this config has, in the order of the table."""
    c = config
    sizes = {"D": c.width, "H": c.num_heads, "G": c.num_kv_heads, "N": c.head_width, "F": c.ffn_width}
    sizes["V"] = c.vocab_size
    absent = set() if c.qkv_bias else {"bq", "bk", "bv"}
    absent |= set() if c.qk_norm else {"q_norm", "k_norm"}
    absent |= {"unembed"} if c.tie_embeddings else set()
    rows = [line.split() for line in _TABLE.strip().splitlines()]
    return [Tensor(*row, sizes) for row in rows if row[0] not in absent]


def file_names(config: ModelConfig, form: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file must hold; `form` is "hf" or "gguf"."""
    names = {}
    for tensor in tensors(config):
        for layer in range(config.num_layers if tensor.in_layers else 1):
            names[getattr(tensor, form).format(layer)] = tensor.file_shape
    return names


def check_names(where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compares the names and shapes a file must hold with those it holds.

    Raises:
      UserError: for the first tensor that is missing, unexpected or of another shape.
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
    read: Callable[[Tensor, int, Index], np.ndarray],
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Builds the parameter tree, one tensor of the file at a time.

    On a CPU the host memory this needs is the model plus one tensor of the file; on an accelerator, one
    parameter with all its layers. With shardings, a host reads and holds only what its own devices get, each
    part once.

    Args:
      read: `(tensor, layer, index)` to that part of the file's array of shape `tensor.file_shape`, any float
        dtype; layer is 0 outside layers.
      dtype: of the parameters, "float32" or "bfloat16".
      shardings: a tree of `jax.sharding.Sharding` shaped like the parameters; None: the default device.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(DTYPES)}")
    params: dict[str, Any] = {"layers": {}}
    for tensor in tensors(config):
        part = functools.partial(_read_part, tensor, read, DTYPES[dtype])
        shape = (config.num_layers, *tensor.shape) if tensor.in_layers else tensor.shape
        place = (lambda tree: tree["layers"]) if tensor.in_layers else (lambda tree: tree)
        place(params)[tensor.name] = _to_device(part, shape, shardings and place(shardings)[tensor.name])
    return params


def _read_part(tensor: Tensor, read, dtype: np.dtype, index: Index) -> np.ndarray:
    """A part of a parameter, layers first where it has them."""
    part = _empty(tuple(s.stop - s.start for s in index), dtype)
    if tensor.in_layers:
        for layer in range(index[0].start, index[0].stop):
            rows = functools.partial(read, tensor, layer)
            part[layer - index[0].start] = tensor.from_file(rows, index[1:])
    else:
        part[...] = tensor.from_file(functools.partial(read, tensor, 0), index)
    return part


def file_tensors(config: ModelConfig, params: dict[str, Any], dtype: np.dtype | None) -> Iterator:
    """Yields `(Hugging Face name, shape, dtype, fetch)`; `fetch()` brings that one tensor to the host."""
    for tensor in tensors(config):
        leaf = params["layers"][tensor.name] if tensor.in_layers else params[tensor.name]
        expected = (config.num_layers, *tensor.shape) if tensor.in_layers else tensor.shape
        if tuple(leaf.shape) != expected:
            raise ValueError(f"parameter {tensor.name} has shape {tuple(leaf.shape)}, expected {expected}")
        target = dtype or np.dtype(leaf.dtype)
        for layer in range(config.num_layers if tensor.in_layers else 1):

            def fetch(tensor=tensor, leaf=leaf, layer=layer, target=target):
                host = np.asarray(leaf[layer] if tensor.in_layers else leaf)
                return tensor.to_file(host.astype(target, copy=False))

            yield tensor.hf.format(layer), tensor.file_shape, target, fetch


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary, which jax's CPU backend takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _to_device(
    part: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        return jax.device_put(part(tuple(slice(0, n) for n in shape)))
    held: dict[tuple, np.ndarray] = {}  # devices that get the same part share one reading of it

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in held:
            held[bounds] = part(tuple(slice(*b) for b in bounds))
        return held[bounds]

    return jax.make_array_from_callback(shape, sharding, of_device)
