"""The catalogue of methods: `get` builds one by name, `names` lists all; `methods/` holds the rows."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from lpo_jax.objectives.checks import did_you_mean
from lpo_jax.objectives.method import Objective
from lpo_jax.objectives.methods import guided, listwise, ratio, shaped, tokens
from lpo_jax.objectives.options import OPTIONS
from lpo_jax.objectives.part import Part, word
from lpo_jax.objectives.projection import Simplex
from lpo_jax.objectives.trust import Gate
from lpo_jax.objectives.vocabulary import ONE, SEVERAL, parts_named
from lpo_jax.objectives.weights import RESPONSE_BUDGET

CATALOGUE = {
    row.objective.name: row for family in (listwise, shaped, ratio, tokens, guided) for row in family.METHODS
}


class MethodRecord(TypedDict):
    """A row of the catalogue as plain data; see `Method` for the texts."""

    name: str
    formula: str
    paper: str
    fidelity: str
    note: str
    options: dict[str, object]
    parts: dict[str, str | list[str]]
    needs: list[str]


def names() -> dict[str, MethodRecord]:
    """Return every method by name, as plain data."""
    return {
        name: {
            "name": name,
            "formula": method.formula,
            "paper": method.paper,
            "fidelity": method.fidelity,
            "note": method.note,
            "options": {
                k: list(v) if isinstance(v, tuple) else v for k, v in options(method.objective).items()
            },
            "parts": _parts(method.objective),
            "needs": [f"K >= {method.objective.min_group_size}", *sorted(map(str, method.objective.needs))],
        }
        for name, method in CATALOGUE.items()
    }


def _parts(objective: Objective) -> dict[str, str | list[str]]:
    """Return the parts that a config may name, by kind: a name, a list of names, or "none"."""
    parts: dict[str, str | list[str]] = {}
    for kind in ONE:
        part = getattr(objective, kind)
        parts[kind] = "none" if part in (None, Gate()) else word(part)
    return parts | {kind: [word(part) for part in getattr(objective, kind)] for kind in SEVERAL}


def options(objective: Objective) -> dict[str, object]:
    """Return every option of a method with its value: the fields of its parts."""
    of_parts = {f.name: getattr(part, f.name) for part in objective.parts for f in dataclasses.fields(part)}
    return of_parts | {name: getattr(objective, name) for name in _own_options(objective)}


def _own_options(objective: Objective) -> tuple[str, ...]:
    """Return the fields of the objective itself that are options, without those that have no effect."""
    weighs_targets = objective.prompt_weight is not None and isinstance(objective.projection, Simplex)
    return ("degenerate", "prompt_weight_inside") if weighs_targets else ("degenerate",)


def get(name: str, **chosen: object) -> Objective:
    """Build the method called `name`.

    Args:
      name: lower case with hyphens, as `names` lists it: "lpo-forward", "grpo", ...
      **chosen: changes of the defaults that `names` lists. They are options, which are fields of the method's parts, or
        parts by name ("none", or a list of names for a kind that holds several).

    Returns:
      An `Objective`: a pure function `(stats, scored) -> (loss, metrics)`. It compares equal to another one built from
      the same arguments, so it can be a static argument of a jitted function.

    Raises:
      ValueError: a name or option is unknown, or a value is out of range; the message is one line.
    """
    if name not in CATALOGUE:
        raise ValueError(
            f"unknown method {name!r}{did_you_mean(name, CATALOGUE)} (known: {', '.join(CATALOGUE)})"
        )
    objective = CATALOGUE[name].objective
    parts = {key: value for key, value in chosen.items() if key in ONE | SEVERAL}
    for key, value in parts.items():
        try:
            objective = dataclasses.replace(objective, **{key: parts_named(key, value)})
        except ValueError as error:
            raise ValueError(f"{name}: {key} {error}") from None
    chosen = {key: value for key, value in chosen.items() if key not in parts}
    known = options(objective)
    for key, value in chosen.items():
        if key not in known:
            every = ", ".join([*known, *ONE, *SEVERAL])
            raise ValueError(f"{name}: unknown option {key!r}{did_you_mean(key, known)} (known: {every})")
        problem = OPTIONS[key](value)
        if problem:
            raise ValueError(f"{name}: {key} {problem}")
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return with_options(objective, hashable)


def with_options(objective: Objective, chosen: Mapping[str, object]) -> Objective:
    """Return the objective with changed fields of its parts."""

    def renewed(part: Part) -> Part:
        known = {field.name for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{k: v for k, v in chosen.items() if k in known})

    own: dict[str, Any] = {k: v for k, v in chosen.items() if k in _own_options(objective)}
    return dataclasses.replace(_with_parts(objective, renewed), **own)


def with_response_budget(objective: Objective, max_tokens: int) -> Objective:
    """Return the objective of a run with this response budget, which replaces the default of every `max_tokens`.

    A method whose paper sets a constant, such as NFT's 1000, keeps it.
    """

    def renewed(part: Part) -> Part:
        stands = getattr(part, "max_tokens", None) == RESPONSE_BUDGET
        return dataclasses.replace(part, **{"max_tokens": max_tokens}) if stands else part

    return _with_parts(objective, renewed)


def _with_parts(objective: Objective, change: Callable[[Part], Part]) -> Objective:
    """Return the objective with `change` applied to every part."""

    def changed(value: object) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return change(value) if isinstance(value, Part) else value

    return Objective(**{f.name: changed(getattr(objective, f.name)) for f in dataclasses.fields(objective)})
