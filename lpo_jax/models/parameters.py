"""Every parameter of the decoder, declared once.

A declaration gives a parameter's kind, its axes, its names in files, and the models that have it. Everything else that
depends on these facts is derived from them: the decoder's modules and initial values, the parameters that weight
decay, LoRA and int8 quantisation apply to, the placement on a mesh, the tensors of a file, and the sizes that the
planner and the memory estimates work with.

Axes: L layers · V vocabulary · D model width · H query heads · G key/value heads · N head width · F feed-forward width.
Those of a vision tower are small letters: l layers · d width · q query, key and value · h heads · n head width ·
f feed-forward width · r colours · t frames · y, x rows and columns of pixels · m, w merged patches (input, hidden) ·
p learned positions · e DeepStack features.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.types import Json, PyTree

Kind = Literal["matrix", "norm", "bias", "embedding"]

# Logical name of each axis, by which `lpo_jax.parallel.sharding.RULES` places it on a mesh.
LOGICAL_AXES = dict(
    L="layers", V="vocab", D="embed", H="heads", G="kv_heads", N="head_width", F="ffn",
    l="layers", d="embed", q="qkv", h="heads", n="head_width", f="ffn", r="colour", t="frame", y="pixel", x="pixel",
    m="merged", w="ffn", p="positions", e="layers",
)  # fmt: skip

# By the beginning of a tensor's name: where the parameter is in the tree, and the axis that it is stacked on.
LAYERS, VISION = ("layers",), ("vision",)
_BRANCHES = {
    "model.layers.{}": (LAYERS, "L"),
    "visual.blocks.{}": ((*VISION, "layers"), "l"),
    "visual.deepstack_merger_list.{}": ((*VISION, "deepstack"), "e"),
    "visual.": (VISION, ""),
    "": ((), ""),
}


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
      folded: whether a file folds the axes of a matrix into two.
    """

    name: str
    kind: Kind
    dims: str
    hf: str
    gguf: str
    present: Callable[[ModelConfig], bool] = lambda config: True
    rotated: bool = False
    folded: bool = True

    @property
    def branch(self) -> tuple[str, ...]:
        """The keys in front of its name in the parameter tree."""
        return next(found for begin, (found, _) in _BRANCHES.items() if self.hf.startswith(begin))

    @property
    def in_layers(self) -> bool:
        """Whether every layer of the decoder has one."""
        return self.branch == LAYERS

    @property
    def stack(self) -> str:
        """The leading axis of a parameter that several layers have; empty for others."""
        return next(axis for begin, (_, axis) in _BRANCHES.items() if self.hf.startswith(begin))

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
            return f"{self.outputs},{self.inputs}" if self.folded else ",".join(self.outputs + self.inputs)
        return ",".join(self.outputs) if self.kind == "embedding" else self.outputs

    def axes(self, stacked: bool = False) -> str:
        """The axes in the parameter tree; `stacked`: with the leading axis of a parameter that is stacked."""
        return self.stack * stacked + self.inputs + self.outputs

    def depth(self, config: ModelConfig) -> int:
        """The number of its tensors in a file: one for each layer, or 1."""
        return axis_sizes(config)[self.stack] if self.stack else 1

    def of(self, tree: PyTree) -> PyTree:
        """Its value in a tree that is shaped like the parameters."""
        for key in (*self.branch, self.name):
            tree = tree[key]
        return tree

    def hf_name(self, config: ModelConfig, layer: int) -> str:
        """The name of its tensor, of one layer, in a Hugging Face file of this family."""
        name = self.hf.format(layer)
        for old, new in _RENAMED.get(config.family, {}).items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

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


# Beginnings of names in the files of a family, where they differ from the declarations.
_RENAMED: dict[str, dict[str, str]] = {
    "qwen2_5_vl": {
        "visual.merger.norm.": "visual.merger.ln_q.",
        "visual.merger.linear_fc1.": "visual.merger.mlp.0.",
        "visual.merger.linear_fc2.": "visual.merger.mlp.2.",
    },
    "qwen3_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
}


def _sees(config: ModelConfig) -> bool:
    return config.vision is not None


def _sees_2_5(config: ModelConfig) -> bool:
    return config.family == "qwen2_5_vl"


def _sees_3(config: ModelConfig) -> bool:
    return config.family == "qwen3_vl"


def _deepens(config: ModelConfig) -> bool:
    return config.vision is not None and bool(config.vision.deepstack)


def _vision(
    name: str, kind: Kind, dims: str, hf: str, bias: Callable | None = None, **more: Json
) -> list[Parameter]:
    """A parameter of the tower and, where `bias` holds, the bias of the same name."""
    more = {"present": _sees, "gguf": "", **more}
    found = [Parameter(f"v_{name}", kind, dims, hf=f"visual.{hf}.weight", **more)]
    if bias is not None:
        both = lambda config, one=more["present"]: one(config) and bias(config)  # noqa: E731
        more |= {"present": both, "folded": True}
        found.append(
            Parameter(f"v_{name}_bias", "bias", dims.rpartition("->")[2], hf=f"visual.{hf}.bias", **more)
        )
    return found


def _block(name: str, kind: Kind, dims: str, hf: str, **more: Json) -> list[Parameter]:
    return _vision(name, kind, dims, f"blocks.{{}}.{hf}", **more)


def _merger(name: str, kind: Kind, dims: str, hf: str, **more: Json) -> list[Parameter]:
    return _vision(name, kind, dims, f"deepstack_merger_list.{{}}.{hf}", present=_deepens, **more)


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
    *_vision("patch", "matrix", "rtyx->d", "patch_embed.proj", bias=_sees_3, folded=False),
    *_vision("positions", "embedding", "pd", "pos_embed", present=_sees_3),
    *_block("norm1", "norm", "d", "norm1", bias=_sees_3),
    *_block("qkv", "matrix", "d->qhn", "attn.qkv", bias=_sees),
    *_block("out", "matrix", "hn->d", "attn.proj", bias=_sees),
    *_block("norm2", "norm", "d", "norm2", bias=_sees_3),
    *_block("gate", "matrix", "d->f", "mlp.gate_proj", bias=_sees, present=_sees_2_5),
    *_block("up", "matrix", "d->f", "mlp.up_proj", bias=_sees, present=_sees_2_5),
    *_block("down", "matrix", "f->d", "mlp.down_proj", bias=_sees, present=_sees_2_5),
    *_block("fc1", "matrix", "d->f", "mlp.linear_fc1", bias=_sees, present=_sees_3),
    *_block("fc2", "matrix", "f->d", "mlp.linear_fc2", bias=_sees, present=_sees_3),
    *_vision("merge_norm", "norm", "d", "merger.norm", bias=_sees_3),
    *_vision("merge1", "matrix", "m->w", "merger.linear_fc1", bias=_sees),
    *_vision("merge2", "matrix", "w->D", "merger.linear_fc2", bias=_sees),
    *_merger("deep_norm", "norm", "m", "norm", bias=_sees),
    *_merger("deep1", "matrix", "m->w", "linear_fc1", bias=_sees),
    *_merger("deep2", "matrix", "w->D", "linear_fc2", bias=_sees),
)  # fmt: skip


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis."""
    tower = {} if config.vision is None else _vision_sizes(config.vision)
    return tower | {
        "L": config.num_layers,
        "V": config.vocab_size,
        "D": config.width,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "N": config.head_width,
        "F": config.ffn_width,
    }


def _vision_sizes(vision: VisionConfig) -> dict[str, int]:
    patch = vision.processor
    merged = vision.width * patch.merge_size**2
    return {
        "l": vision.depth,
        "d": vision.width,
        "q": 3,
        "h": vision.num_heads,
        "n": vision.head_width,
        "f": vision.ffn_width,
        "r": 3,
        "t": patch.temporal_patch_size,
        "y": patch.patch_size,
        "x": patch.patch_size,
        "m": merged,
        "w": merged,
        "p": vision.num_positions,
        "e": len(vision.deepstack),
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
    """The names of all matrices of a layer of the decoder."""
    return tuple(p.name for p in DECLARATIONS if p.kind == "matrix" and p.in_layers)


def tower_matrix_names() -> tuple[str, ...]:
    """The names of all matrices of a layer of a vision tower, of any family."""
    return tuple(p.name for p in DECLARATIONS if p.kind == "matrix" and p.branch == (*VISION, "layers"))


def tree_of(config: ModelConfig, leaf: Callable[[Parameter], PyTree]) -> dict[str, PyTree]:
    """A tree shaped like the parameters with layers stacked, made leaf by leaf in the order of the declarations."""
    tree: dict[str, PyTree] = {"layers": {}}
    for parameter in declared(config):
        at = tree
        for key in parameter.branch:
            at = at.setdefault(key, {})
        at[parameter.name] = leaf(parameter)
    return tree


def num_params(config: ModelConfig, *kinds: Kind) -> int:
    """The number of parameters of these kinds, by default of all."""
    chosen = (p for p in declared(config) if not kinds or p.kind in kinds)
    return sum(math.prod(parameter.shape(config)) for parameter in chosen)
