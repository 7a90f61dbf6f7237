"""Parts by name, so that a config can recombine a method: `gate: soft-gate`, `hooks: [dynamic-sampling]`.

The name of a part is its class name in lower case with hyphens. "none" leaves the part out; for a gate, it means no
trust region.
"""

from lpo_jax.objectives import entropy_adaptive, ranking, sequence_gates  # noqa: F401
from lpo_jax.objectives.advantage import Credit
from lpo_jax.objectives.checks import did_you_mean
from lpo_jax.objectives.hook_specs import HookSpec
from lpo_jax.objectives.part import Part, word
from lpo_jax.objectives.regular import Regular
from lpo_jax.objectives.shaping import Bias, Select, Shape
from lpo_jax.objectives.trust import Gate
from lpo_jax.objectives.weights import PromptWeight, TokenWeight

# Field of `Objective` -> base class of the parts that it may hold: one part, or several.
ONE: dict[str, type[Part]] = {
    "select": Select,
    "bias": Bias,
    "prompt_weight": PromptWeight,
    "credit": Credit,
    "gate": Gate,
    "token_weight": TokenWeight,
}
SEVERAL: dict[str, type[Part]] = {"shape": Shape, "regular": Regular, "hooks": HookSpec}


def words(kind: str) -> dict[str, Part]:
    """Return the parts of a kind with their defaults, by name. The base class is not among them."""
    return {word(part()): part() for part in _below((ONE | SEVERAL)[kind])}


def parts_named(kind: str, value: object) -> Part | tuple[Part, ...] | None:
    """Return the part that a config names, or the parts for a kind that holds several.

    Raises:
      ValueError: a name is unknown, or several are given for a kind that holds one. The text completes "<kind> ...".
    """
    known = words(kind)
    chosen: list[object] = list(value) if isinstance(value, list | tuple) else [value]
    parts = []
    for name in [] if chosen == ["none"] else chosen:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"has no {name!r}{did_you_mean(name, known)} (known: {', '.join(known)}, none)")
        parts.append(known[name])
    if kind in SEVERAL:
        return tuple(parts)
    if len(parts) > 1:
        raise ValueError(f"holds one part, got {value!r}")
    return parts[0] if parts else Gate() if kind == "gate" else None


def _below(base: type[Part]) -> list[type[Part]]:
    return [x for part in base.__subclasses__() for x in (part, *_below(part))]
