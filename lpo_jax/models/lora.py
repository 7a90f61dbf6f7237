"""Low-rank adapters: y = x W + (x A) B alpha / r, where W is frozen and only A and B are trained.

Adapters are a tree of their own, `{"layers": {name: {"a": [L, in, r], "b": [L, r, out]}}}`, which the optimizer
moves and checkpoints hold. `join` puts them into the frozen base; the forward pass takes the joined tree as it
takes any other, and its backward pass makes no gradient of W. `merge` adds them to the weights, for export.
B starts at zero, so an untrained adapter changes nothing. On a mesh the base is split as ever, and the adapters,
about a hundredth of it, are whole on every device.

In bfloat16 an early adapter is far below the rounding of what it is added to: of the weights, whose merged sum would
be rounded back to the base, and of x W. So the products are kept apart, in sampling too, and their sum is rounded
once, from float32: then what the adapter adds decides, in proportion, which way a sum is rounded.

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
from jax.ad_checkpoint import checkpoint_name

from lpo_jax.errors import UserError, nearest
from lpo_jax.models import decoder
from lpo_jax.models.attend import KEPT
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import matrix_names, named


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which layers are adapted, and how: the settings of `model.lora`.

    Attributes:
      rank: r; the adapter of a layer has r (in + out) parameters.
      alpha: its output is multiplied by alpha / r.
      targets: names of matrices; by default all of a layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = dataclasses.field(default_factory=matrix_names)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def check(self, config: ModelConfig) -> None:
        """Refuses what cannot be adapted. Raises `UserError`, one line."""
        have = matrix_names()
        for name in self.targets:
            if name not in have:
                raise UserError(
                    f"model.lora.targets: no linear layer {name!r}{nearest(name, have)} (have {', '.join(have)})"
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
      weight: [(L,) in, out], or an `Int8` of that shape; a: [(L,) in, R]; b: [(L,) R, out].
    """

    weight: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)

    def product(self, axes: str, x: jax.Array) -> jax.Array:
        """`jnp.einsum(axes, x, merged)` in x's dtype, without ever forming the merged matrix.

        No gradient of the weight is made: it is frozen.
        """
        # The sum's own name, so that a backward pass keeps it alone, not the two float32 terms.
        return checkpoint_name(_product(axes, self.scale, x, self.weight, self.a, self.b), KEPT)

    def merged(self) -> jax.Array:
        """The one matrix that does the same, float32."""
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        stacked = self.a.ndim + self.b.ndim - 2 > self.weight.ndim
        change = (jax.vmap(product) if stacked else product)(self.a, self.b)
        return self.weight.astype(jnp.float32) + self.scale * change


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(axes: str, scale: float, x: jax.Array, weight: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """x W + scale (x A) B, added up in float32 and rounded once."""
    if hasattr(weight, "product"):  # quantised
        base = weight.product(axes, x, jnp.float32)
    else:
        base = jnp.einsum(axes, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return (base + scale * _low_rank(axes, x, a, b, jnp.float32)).astype(x.dtype)


def _low_rank(axes: str, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """(x A) B, its last product added up in `dtype`."""
    of_x, of_weight, of_y = axes.replace("->", ",").split(",")
    into = "".join(i for i in of_weight if i in of_x)
    out = "".join(i for i in of_weight if i not in of_x)
    rows = "".join(i for i in of_x if i not in into)
    low = jnp.einsum(f"{of_x},{into}R->{rows}R", x, a.astype(x.dtype))
    return jnp.einsum(f"{rows}R,R{out}->{of_y}", low, b.astype(x.dtype), preferred_element_type=dtype)


def _product_forward(axes, scale, x, weight, a, b):
    return _product(axes, scale, x, weight, a, b), (x, weight, a, b)


def _product_backward(axes, scale, kept, g):
    # The products of the backward pass are in x's dtype, as those of a plain matrix: left to autodiff they would be
    # float32, which costs an accelerator twice the time.
    x, weight, a, b = kept

    def rounded(x, a, b):
        base = jnp.einsum(axes, x, weight.astype(x.dtype))
        return base + scale * _low_rank(axes, x, a, b, x.dtype)

    # Traced after `decoder.forward` has returned, so its precision is asked for again.
    with jax.default_matmul_precision("float32" if x.dtype == jnp.float32 else "default"):
        d_x, d_a, d_b = jax.vjp(rounded, x, a, b)[1](g)
    return d_x, None, d_a, d_b


_product.defvjp(_product_forward, _product_backward)


def configured(section: Any) -> Lora | None:
    """The adapters that a config's section `model.lora` asks for; None at rank 0."""
    if not section.rank:
        return None
    targets = tuple(section.targets)
    return Lora(section.rank, section.alpha, matrix_names() if targets == ("all",) else targets)


def init(config: ModelConfig, lora: Lora, key: jax.Array) -> decoder.Params:
    """Fresh adapters, float32: A normal with deviation 1 / sqrt(in), B zero."""
    L, R, order = config.num_layers, lora.rank, matrix_names()

    def adapter(name: str) -> dict[str, jax.Array]:
        into, out = _sides(config, name)
        # By name, so that a layer's adapter does not depend on which others are adapted.
        a = jax.random.normal(jax.random.fold_in(key, order.index(name)), (L, *into, R))
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
    parameter = named(name)
    shape, inputs = parameter.shape(config, stacked=False), len(parameter.inputs)
    return shape[:inputs], shape[inputs:]
