"""Every parameter of the decoder, declared once.

A declaration gives a parameter's kind, its axes, its names in files, and the models that have it. Everything else that
depends on these facts is derived from them: the decoder's modules and initial values, the parameters that weight
decay, LoRA and int8 quantisation apply to, the placement on a mesh, the tensors of a file, and the sizes that the
planner and the memory estimates work with.

Axes: L layers · V vocabulary · D model width · H query heads · G key/value heads · N head width · F feed-forward width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax

from lpo_jax.models.config import ModelConfig
from lpo_jax.types import Json, PyTree

Kind = Literal["matrix", "norm", "bias", "embedding"]

# Logical name of each axis, by which `lpo_jax.parallel.sharding.RULES` places it on a mesh.
LOGICAL_AXES = dict(L="layers", V="vocab", D="embed", H="heads", G="kv_heads", N="head_width", F="ffn")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The declaration of one parameter.

    Attributes:
      name: its key in the parameter tree.
      kind: matrices are adapted by LoRA and quantised to int8; matrices and embeddings are drawn at random and have
        weight decay; norms start at one and biases at zero.
      dims: a letter for each axis, of a matrix as "inputs->outputs". The leading L of layers is left out.
      hf, gguf: the name of its tensor in a Hugging Face and in a GGUF file. A parameter of each layer has "{}" for the
        number of the layer.
      present: whether a model of this config has the parameter.
      rotated: whether rotary embeddings are applied to the output. llama.cpp stores the rows of such a matrix in
        another order.
    """

    name: str
    kind: Kind
    dims: str
    hf: str
    gguf: str
    present: Callable[[ModelConfig], bool] = lambda config: True
    rotated: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.hf

    @property
    def inputs(self) -> str:
        """The axes that a product with activations sums over; only matrices have any."""
        return self.dims.partition("->")[0] if self.kind == "matrix" else ""

    @property
    def outputs(self) -> str:
        """The axes that are not inputs."""
        return self.dims.rpartition("->")[2]

    @property
    def file_axes(self) -> str:
        """The axes in a file, where letters without a comma between them are folded into one axis."""
        if self.kind == "matrix":
            return f"{self.outputs},{self.inputs}"
        return ",".join(self.outputs) if self.kind == "embedding" else self.outputs

    def axes(self, stacked: bool = False) -> str:
        """The axes in the parameter tree; `stacked`: with the leading L of a parameter in layers."""
        return "L" * (stacked and self.in_layers) + self.inputs + self.outputs

    def shape(self, config: ModelConfig, stacked: bool = True) -> tuple[int, ...]:
        """The sizes of `axes`."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes(stacked))

    def logical_axes(self, stacked: bool = True) -> tuple[str, ...]:
        """The logical names of `axes`."""
        return tuple(LOGICAL_AXES[axis] for axis in self.axes(stacked))

    def initial(self, config: ModelConfig, next_key: Callable[[], jax.Array]) -> jax.Array:
        """The initial value, float32 and stacked: ones for a norm, zeros for a bias, else normal, deviation 0.02."""
        shape = self.shape(config)
        if self.kind in ("norm", "bias"):
            return jax.numpy.full(shape, float(self.kind == "norm"))
        return 0.02 * jax.random.normal(next_key(), shape)


def _layer(name: str, kind: Kind, dims: str, hf: str, gguf: str, **more: Json) -> Parameter:
    return Parameter(name, kind, dims, f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", **more)


# The order is that of the tensors in a saved file and of the random draws of initial values.
DECLARATIONS: tuple[Parameter, ...] = (
    Parameter("embed", "embedding", "VD", "model.embed_tokens.weight", "token_embd.weight"),
    _layer("attn_norm", "norm", "D", "input_layernorm.weight", "attn_norm.weight"),
    _layer("wq", "matrix", "D->HN", "self_attn.q_proj.weight", "attn_q.weight", rotated=True),
    _layer("wk", "matrix", "D->GN", "self_attn.k_proj.weight", "attn_k.weight", rotated=True),
    _layer("wv", "matrix", "D->GN", "self_attn.v_proj.weight", "attn_v.weight"),
    _layer("wo", "matrix", "HN->D", "self_attn.o_proj.weight", "attn_output.weight"),
    _layer("bq", "bias", "HN", "self_attn.q_proj.bias", "attn_q.bias", present=lambda c: c.qkv_bias),
    _layer("bk", "bias", "GN", "self_attn.k_proj.bias", "attn_k.bias", present=lambda c: c.qkv_bias),
    _layer("bv", "bias", "GN", "self_attn.v_proj.bias", "attn_v.bias", present=lambda c: c.qkv_bias),
    _layer("q_norm", "norm", "N", "self_attn.q_norm.weight", "attn_q_norm.weight", present=lambda c: c.qk_norm),
    _layer("k_norm", "norm", "N", "self_attn.k_norm.weight", "attn_k_norm.weight", present=lambda c: c.qk_norm),
    _layer("mlp_norm", "norm", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _layer("w_gate", "matrix", "D->F", "mlp.gate_proj.weight", "ffn_gate.weight"),
    _layer("w_up", "matrix", "D->F", "mlp.up_proj.weight", "ffn_up.weight"),
    _layer("w_down", "matrix", "F->D", "mlp.down_proj.weight", "ffn_down.weight"),
    Parameter("final_norm", "norm", "D", "model.norm.weight", "output_norm.weight"),
    Parameter(
        "unembed", "embedding", "VD", "lm_head.weight", "output.weight", present=lambda c: not c.tie_embeddings
    ),
)  # fmt: skip


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis."""
    return {
        "L": config.num_layers,
        "V": config.vocab_size,
        "D": config.width,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "N": config.head_width,
        "F": config.ffn_width,
    }


def declared(config: ModelConfig) -> list[Parameter]:
    """The parameters that a model of this config has."""
    return [parameter for parameter in DECLARATIONS if parameter.present(config)]


def named(name: str) -> Parameter:
    """The declaration of this name. Raises `KeyError` if there is none."""
    return {parameter.name: parameter for parameter in DECLARATIONS}[name]


def of_path(path: tuple[PyTree, ...]) -> Parameter | None:
    """The parameter that the path of a leaf names, in any tree that holds parameters: gradients, optimizer moments,
    adapters. None for other leaves, such as counters."""
    names = {parameter.name: parameter for parameter in DECLARATIONS}
    keys = (entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
    return next((names[key] for key in keys if key in names), None)


def matrix_names() -> tuple[str, ...]:
    """The names of all matrices of a layer."""
    return tuple(p.name for p in DECLARATIONS if p.kind == "matrix" and p.in_layers)


def tree_of(config: ModelConfig, leaf: Callable[[Parameter], PyTree]) -> dict[str, PyTree]:
    """A tree shaped like the parameters with layers stacked, made leaf by leaf in the order of the declarations."""
    tree: dict[str, PyTree] = {"layers": {}}
    for parameter in declared(config):
        (tree["layers"] if parameter.in_layers else tree)[parameter.name] = leaf(parameter)
    return tree


def num_params(config: ModelConfig, *kinds: Kind) -> int:
    """The number of parameters of these kinds, by default of all."""
    chosen = (p for p in declared(config) if not kinds or p.kind in kinds)
    return sum(math.prod(parameter.shape(config)) for parameter in chosen)
