"""One row of the catalogue."""

import dataclasses
from typing import Any

from lpo_jax.objectives.method import Objective

FIDELITIES = ("paper", "code", "note", "reconstructed", "derived")


@dataclasses.dataclass(frozen=True)
class Method:
    """A named composition and its source.

    Attributes:
      formula: the response coefficient c_k = d loss / d s_k, in one line.
      paper: its source.
      fidelity: "paper" (checked against the paper's text), "code" (against public code), "note" (against a third
        party's notes that quote the formulas), "reconstructed" (from the abstract only), or "derived" (ours).
      objective: the composition with its defaults.
      note: what is uncertain or left out, in one line.
    """

    formula: str
    paper: str
    fidelity: str
    objective: Objective
    note: str = ""


def method(name: str, formula: str, paper: str, fidelity: str, note: str = "", **parts: Any) -> Method:
    """Build a row from the parts that differ from `Objective`'s defaults (group mean, PPO's clip, sequence means)."""
    return Method(formula, paper, fidelity, Objective(name, **parts), note)
