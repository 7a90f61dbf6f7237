"""The file of a learnt mirror map, which `lpo meta` writes and `objective.mirror` names."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.files import write_file
from lpo_jax.objectives.mirror import UNITS, map_problem

# Name -> slice of the 380 parameters. v, w and b are the names of the public code, in its order of units.
PARTS = {
    "v": slice(0, UNITS),
    "w": slice(UNITS, 2 * UNITS),
    "b": slice(2 * UNITS, 3 * UNITS),
    "a": slice(3 * UNITS, 3 * UNITS + 1),
    "c": slice(3 * UNITS + 1, None),
}


def write_map(path: Path, parameters: Sequence[float]) -> None:
    """Write a map atomically. Negative parameters become 0, because h would not be convex otherwise."""
    usable = np.maximum(parameters, 0).tolist()
    write_file(path, json.dumps({name: usable[part] for name, part in PARTS.items()}, indent=1))


def read_map(path: str) -> tuple[float, ...]:
    """Read the 380 parameters of a map.

    Raises:
      UserError: no such file, or it holds no map.
    """
    try:
        held = json.loads(Path(path).read_text())
        parameters = tuple(float(x) for name in PARTS for x in held[name])
    except FileNotFoundError:
        raise UserError(f"objective.mirror: {path}: no such file; `lpo meta` writes one") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"objective.mirror: {path}: not a mirror map as `lpo meta` writes it ({type(error).__name__}: {error})"
        ) from None
    problem = map_problem(parameters) if parameters else "is empty"
    if problem:
        raise UserError(f"objective.mirror: {path}: {problem}")
    return parameters
