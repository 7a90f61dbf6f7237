"""Low-rank adapters: y = x W + (x A) B alpha / r, where W is frozen and only A and B are trained.

Adapters are a tree of their own, `{"layers": {name: {"a": [L, in, r], "b": [L, r, out]}}}`, which the optimizer
moves and checkpoints hold. `join` puts them into the frozen base; the forward pass takes the joined tree as it
takes any other, and its backward pass makes no gradient of W. `merge` adds them to the weights, for sampling
and export. B starts at zero, so an untrained adapter changes nothing. On a mesh the base is split as ever, and
the adapters, about a hundredth of it, are whole on every device.

Axes: L layers · R rank; in and out are one or two of D H G N F. Source: LoRA, arXiv 2106.09685.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lpo_jax.errors import UserError, nearest
from lpo_jax.models import decoder, layout
from lpo_jax.models.config import ModelConfig

LINEAR = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which layers are adapted, and how: the settings of `model.lora`.

    Attributes:
      rank: r; the adapter of a layer has r (in + out) parameters.
      alpha: its output is multiplied by alpha / r.
      targets: names of `LINEAR`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEAR

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def check(self, config: ModelConfig) -> None:
        """Refuses what cannot be adapted. Raises `UserError`, one line."""
        for name in self.targets:
            if name not in LINEAR:
                raise UserError(
                    f"model.lora.targets: no linear layer {name!r}{nearest(name, LINEAR)} (have {', '.join(LINEAR)})"
                )
        if not self.targets:
            raise UserError(
                "model.lora.targets is empty; name layers, or set model.lora.rank=0 to train all weights"
            )
        sides = {name: min(map(math.prod, _sides(config, name))) for name in self.targets}
        name = min(sides, key=sides.get)
        if self.rank >= sides[name]:
            raise UserError(
                f"model.lora.rank = {self.rank} is no less than the smaller side of {name}, {sides[name]}; "
                "take a smaller rank"
            )


@struct.dataclass
class Frozen:
    """The base: weights that are never trained.

    Attributes:
      scale: alpha / r of the adapters that `join` puts in.
    """

    params: decoder.Params
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Adapted:
    """A layer's matrix with its adapter, in the place of the matrix.

    Attributes:
      weight: [(L,) in, out]; a: [(L,) in, R]; b: [(L,) R, out].
    """

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)

    def product(self, axes: str, x: jax.Array) -> jax.Array:
        """`jnp.einsum(axes, x, merged)` in x's dtype, without ever forming the merged matrix."""
        of_x, of_weight, of_y = axes.replace("->", ",").split(",")
        into = "".join(i for i in of_weight if i in of_x)
        out = "".join(i for i in of_weight if i not in of_x)
        rows = "".join(i for i in of_x if i not in into)
        low = jnp.einsum(f"{of_x},{into}R->{rows}R", x, self.a.astype(x.dtype))
        adapter = jnp.einsum(f"{rows}R,R{out}->{of_y}", low, self.b.astype(x.dtype))
        return jnp.einsum(axes, x, self.weight.astype(x.dtype)) + self.scale * adapter

    def merged(self) -> jax.Array:
        """The one matrix that does the same, float32."""
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        stacked = self.a.ndim + self.b.ndim - 2 > self.weight.ndim
        change = (jax.vmap(product) if stacked else product)(self.a, self.b)
        return self.weight.astype(jnp.float32) + self.scale * change


def configured(section: Any) -> Lora | None:
    """The adapters that a config's section `model.lora` asks for; None at rank 0."""
    return Lora(section.rank, section.alpha, tuple(section.targets)) if section.rank else None


def init(config: ModelConfig, lora: Lora, key: jax.Array) -> decoder.Params:
    """Fresh adapters, float32: A normal with deviation 1 / sqrt(in), B zero."""
    L, R = config.num_layers, lora.rank

    def adapter(name: str) -> dict[str, jax.Array]:
        into, out = _sides(config, name)
        # By name, so that a layer's adapter does not depend on which others are adapted.
        a = jax.random.normal(jax.random.fold_in(key, LINEAR.index(name)), (L, *into, R))
        return {"a": a / math.sqrt(math.prod(into)), "b": jnp.zeros((L, R, *out))}

    return {"layers": {name: adapter(name) for name in lora.targets}}


def abstract_params(config: ModelConfig, lora: Lora) -> decoder.Params:
    """The tree of adapters as `jax.ShapeDtypeStruct`s; allocates nothing."""
    return jax.eval_shape(lambda: init(config, lora, jax.random.key(0)))


def join(frozen: Frozen | None, trained: decoder.Params) -> decoder.Params:
    """The tree that the forward pass takes: the base with its adapters, or, without a base, what is trained."""
    if frozen is None:
        return trained
    base = frozen.params["layers"]
    adapted = {name: Adapted(base[name], **ab, scale=frozen.scale) for name, ab in trained["layers"].items()}
    return {**frozen.params, "layers": {**base, **adapted}}


def merge(params: Any) -> Any:
    """A joined tree, stacked or of one layer, with plain matrices; the identity on trees without adapters."""
    is_adapted = lambda x: isinstance(x, Adapted)  # noqa: E731
    return jax.tree.map(lambda x: x.merged() if is_adapted(x) else x, params, is_leaf=is_adapted)


def _sides(config: ModelConfig, name: str) -> tuple[Sequence[int], Sequence[int]]:
    """Sizes of a matrix's input axes and of its output axes."""
    tensor = next(t for t in layout.tensors(config) if t.name == name)
    _, into = tensor.file_axes.split(",")  # [out, in] in a file; in the tree the input axes come first
    return tensor.shape[: len(into)], tensor.shape[len(into) :]
