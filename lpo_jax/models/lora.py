"""Low-rank adapters (LoRA): y = x W + (x A) B alpha / r, where W is frozen and only A and B are trained.

Adapters are a separate tree, `{"layers": {name: {"a": [L, in, R], "b": [L, R, out]}}}`, which the optimizer updates
and checkpoints contain; those of a vision tower are in its branch `vision`, as its weights are. `with_adapters` inserts
them into the frozen base. The forward pass takes the resulting tree like any other, and its backward pass computes no
gradient of W. `merge_adapters` adds them to the weights, for export. B starts at zero, so an untrained adapter changes
nothing. On a mesh, the base is split as usual; the adapters, about a hundredth of its size, are replicated on every
device.

In bfloat16, an adapter that has had few updates is far below the rounding error of the weights and of x W: merged
weights would be rounded back to the base. Therefore the two products are computed separately, in sampling too, and
their float32 sum is rounded once. The adapter's contribution then changes the direction of rounding in proportion to
its size.

Axes: L layers · R rank; in and out are one or two of D H G N F. Source: LoRA, arXiv 2106.09685.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lpo_jax.config import LoraSection, ModelSection
from lpo_jax.errors import UserError, nearest
from lpo_jax.models import decoder
from lpo_jax.models.attend import KEPT, accumulator
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import VISION, declared, matrix_names, named, tower_matrix_names
from lpo_jax.types import PyTree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The settings of adapters, from the section `model.lora` of a config.

    Attributes:
      rank: r; the adapter of a matrix has r (in + out) parameters.
      alpha: the output of an adapter is multiplied by alpha / r.
      targets: names of matrices of the decoder's layers or of the vision tower's; by default all of the decoder's.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = dataclasses.field(default_factory=matrix_names)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def check(self, config: ModelConfig) -> None:
        """Check that the targets exist and the rank fits. Raises `UserError` if not."""
        adaptable = (*matrix_names(), *tower_matrix_names())
        have = [p.name for p in declared(config) if p.name in adaptable]
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


class Frozen(struct.PyTreeNode):
    """Weights that are not trained: the base of adapters, or the vision tower alone.

    Attributes:
      params: the parameter tree, or its branch `vision`.
      scale: alpha / r of the adapters; None without adapters.
    """

    params: decoder.Params
    scale: float | None = struct.field(pytree_node=False)


class Adapted(struct.PyTreeNode):
    """A matrix with its adapter. It replaces the matrix in the parameter tree.

    Attributes:
      weight: `[(L,) in, out]`, or an `Int8` of that shape.
      a: `[(L,) in, R]`.
      b: `[(L,) R, out]`.
      scale: alpha / r.
    """

    weight: PyTree
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)

    def product(self, axes: str, x: jax.Array) -> jax.Array:
        """Compute `jnp.einsum(axes, x, merged)` in x's dtype without forming the merged matrix.

        The weight is frozen and has no gradient.
        """
        # Only the sum is named, so that a backward pass saves it and not its two float32 terms.
        return checkpoint_name(_product(axes, self.scale, x, self.weight, self.a, self.b), KEPT)

    def merged(self) -> jax.Array:
        """Return the equivalent plain matrix, at least float32."""
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        stacked = self.a.ndim + self.b.ndim - 2 > self.weight.ndim
        change = (jax.vmap(product) if stacked else product)(self.a, self.b)
        return self.weight.astype(accumulator(self.weight.dtype)) + self.scale * change


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(axes: str, scale: float, x: jax.Array, weight: PyTree, a: jax.Array, b: jax.Array) -> jax.Array:
    """x W + scale (x A) B, summed in at least float32 and rounded once."""
    wide = accumulator(x.dtype)
    if hasattr(weight, "product"):  # quantised
        base = weight.product(axes, x, wide)
    else:
        base = jnp.einsum(axes, x, weight.astype(x.dtype), preferred_element_type=wide)
    return (base + scale * _low_rank(axes, x, a, b, wide)).astype(x.dtype)


def _low_rank(axes: str, x: jax.Array, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """(x A) B, with the last product accumulated in `dtype`."""
    of_x, of_weight, of_y = axes.replace("->", ",").split(",")
    into = "".join(i for i in of_weight if i in of_x)
    out = "".join(i for i in of_weight if i not in of_x)
    rows = "".join(i for i in of_x if i not in into)
    low = jnp.einsum(f"{of_x},{into}R->{rows}R", x, a.astype(x.dtype))
    return jnp.einsum(f"{rows}R,R{out}->{of_y}", low, b.astype(x.dtype), preferred_element_type=dtype)


def _product_forward(axes, scale, x, weight, a, b):
    return _product(axes, scale, x, weight, a, b), (x, weight, a, b)


def _product_backward(axes, scale, kept, g):
    # The products of the backward pass are in x's dtype, like those of a plain matrix. By autodiff they would be in
    # float32, which takes an accelerator twice as long.
    x, weight, a, b = kept

    def rounded(x, a, b):
        base = jnp.einsum(axes, x, weight.astype(x.dtype))
        return base + scale * _low_rank(axes, x, a, b, x.dtype)

    # This is traced after `decoder.forward` has returned, so the precision is set again.
    with jax.default_matmul_precision("float32" if x.dtype == jnp.float32 else "default"):
        d_x, d_a, d_b = jax.vjp(rounded, x, a, b)[1](g)
    return d_x, None, d_a, d_b


_product.defvjp(_product_forward, _product_backward)


def configured(section: LoraSection) -> Lora | None:
    """Return the adapters' settings from the section `model.lora` of a config; None if its rank is 0."""
    if not section.rank:
        return None
    targets = tuple(section.targets)
    named_all = (matrix_names() if name == "all" else (name,) for name in targets)
    return Lora(section.rank, section.alpha, tuple(dict.fromkeys(itertools.chain(*named_all))))


def freezes_tower(section: ModelSection, model: ModelConfig) -> bool:
    """Return whether a run trains the decoder and keeps the vision tower; beside adapters it belongs to their base."""
    return model.vision is not None and not section.lora.rank and section.vision.freeze


def keeps_tower(section: ModelSection, model: ModelConfig) -> bool:
    """Return whether a run neither trains nor adapts any weight of a vision tower."""
    adapters = configured(section.lora)
    if model.vision is None or adapters is None:
        return freezes_tower(section, model)
    return not set(adapters.targets) & set(tower_matrix_names())


def init(config: ModelConfig, lora: Lora, key: jax.Array) -> decoder.Params:
    """Draw initial adapters, float32: A normal with standard deviation 1 / sqrt(in), B zero."""
    R, order = lora.rank, (*matrix_names(), *tower_matrix_names())

    def adapter(name: str) -> dict[str, jax.Array]:
        L, (into, out) = named(name).depth(config), _sides(config, name)
        # The key depends on the matrix, so that its adapter does not depend on which others are adapted.
        a = jax.random.normal(jax.random.fold_in(key, order.index(name)), (L, *into, R))
        return {"a": a / math.sqrt(math.prod(into)), "b": jnp.zeros((L, R, *out))}

    adapters: dict[bool, dict[str, PyTree]] = {False: {}, True: {}}
    for name in lora.targets:
        adapters[named(name).branch[:1] == VISION][name] = adapter(name)
    of_tower = {"vision": {"layers": adapters[True]}} if adapters[True] else {}
    return ({"layers": adapters[False]} if adapters[False] else {}) | of_tower


def abstract_params(config: ModelConfig, lora: Lora) -> decoder.Params:
    """Return the tree of adapters as `jax.ShapeDtypeStruct`s, without allocating memory."""
    return jax.eval_shape(lambda: init(config, lora, jax.random.key(0)))


def with_adapters(frozen: Frozen | None, trained: decoder.Params) -> decoder.Params:
    """Return the tree for the forward pass: the base with its adapters, or `trained` with what is frozen beside it."""
    if frozen is None:
        return trained
    if frozen.scale is None:
        return {**trained, **frozen.params}
    return _joined(frozen.params, trained, frozen.scale)


def _joined(base: decoder.Params, adapters: decoder.Params, scale: float) -> decoder.Params:
    """The branches of a base with their adapters."""
    found = dict(base)
    for name, x in adapters.items():
        leaf = x.keys() == {"a", "b"}
        found[name] = Adapted(base[name], **x, scale=scale) if leaf else _joined(base[name], x, scale)
    return found


def merge_adapters(params: T) -> T:
    """Replace every `Adapted` in a tree, stacked or of one layer, by its merged matrix."""
    is_adapted = lambda x: isinstance(x, Adapted)  # noqa: E731
    return jax.tree.map(lambda x: x.merged() if is_adapted(x) else x, params, is_leaf=is_adapted)


def _sides(config: ModelConfig, name: str) -> tuple[Sequence[int], Sequence[int]]:
    """The sizes of a matrix's input axes and of its output axes."""
    parameter = named(name)
    shape, inputs = parameter.shape(config, stacked=False), len(parameter.inputs)
    return shape[:inputs], shape[inputs:]
