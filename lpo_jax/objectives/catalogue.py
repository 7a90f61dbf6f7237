"""The methods by name: a few lines each, and the options that they take."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from lpo_jax.objectives.aggregate import AGGREGATIONS
from lpo_jax.objectives.divergences import DIVERGENCES
from lpo_jax.objectives.hints import nearest
from lpo_jax.objectives.method import Objective
from lpo_jax.objectives.simplex import SCORES
from lpo_jax.objectives.targets import TEMPERATURE_FLOOR, temperature_problem
from lpo_jax.objectives.trust import CLIPS, RatioClip, log_clip

LPO_PAPER = "Listwise Policy Optimization, arXiv 2605.06139"

_SHARED = {"ddof": 0, "temperature_floor": TEMPERATURE_FLOOR, "degenerate": "keep"}
# Which of score mean or sum, clip hard, ppo or joint, and ddof 0 or 1 the paper used is UNCERTAIN: see
# `sequence_scores`, `HardLogClip` and `temperature`. The defaults follow its text.
_LISTWISE = {"temperature": "grpo", "score": "mean", "clip": "hard", "epsilon": 0.2, **_SHARED}
_POLICY_GRADIENT = {
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "aggregation": "seq-mean-token-mean",
    # Of "seq-mean-token-sum-norm": a constant scale. `lpo train` sets it to the run's response budget.
    "max_tokens": 1024,
    **_SHARED,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Attributes:
      formula: the response coefficient c_k = d loss / d s_k, in one line.
      paper: where it comes from.
      fidelity: "paper" (checked against the paper's text), "code" (against public code), or "derived" (a
        control of ours).
      build: (name, options) -> Objective.
      options: every option with its default.
      needs: what a run must provide.
    """

    formula: str
    paper: str
    fidelity: str
    build: Callable[[str, Mapping[str, Any]], Objective]
    options: Mapping[str, Any]
    needs: tuple[str, ...] = ("K >= 2",)


def _listwise(divergence: str) -> Callable[[str, Mapping[str, Any]], Objective]:
    def build(name: str, options: Mapping[str, Any]) -> Objective:
        return Objective(
            name,
            rule=options["temperature"],
            divergence=DIVERGENCES[divergence],
            gate=log_clip(options["clip"], options["epsilon"]),
            # The tokens of response k share d s_k / d logp: 1 / n_k of a mean score, 1 of a sum.
            aggregation=f"seq-mean-token-{options['score']}",
            score=options["score"],
            **{key: options[key] for key in _SHARED},
        )

    return build


def _policy_gradient(rule: str) -> Callable[[str, Mapping[str, Any]], Objective]:
    def build(name: str, options: Mapping[str, Any]) -> Objective:
        return Objective(
            name,
            rule=rule,
            divergence=None,
            gate=RatioClip(options["epsilon_low"], options["epsilon_high"]),
            aggregation=options["aggregation"],
            max_tokens=options["max_tokens"],
            **{key: options[key] for key in _SHARED},
        )

    return build


CATALOGUE = {
    "lpo-forward": Method(
        "c = P - w*, w* = softmax(R / tau + s_t)",
        f"{LPO_PAPER}, eq. 10",
        "paper",
        _listwise("forward-kl"),
        _LISTWISE,
    ),
    "lpo-reverse": Method(
        "c = P (d - sum P d), d = s - R / tau - s_t",
        f"{LPO_PAPER}, eq. 11",
        "paper",
        _listwise("reverse-kl"),
        _LISTWISE,
    ),
    "lpo-forward-onpolicy": Method(
        "c = 1/K - w* (policy gradient with A = K w* - 1)",
        f"control for {LPO_PAPER}",
        "derived",
        _listwise("forward-onpolicy"),
        _LISTWISE,
    ),
    "lpo-pointwise": Method(
        "c = -w* (weighted regression: MPO, AWR)",
        f"{LPO_PAPER}, sec. 5.4.1",
        "paper",
        _listwise("pointwise"),
        _LISTWISE,
    ),
    # No KL to a reference: the paper's runs, and most since DAPO, set its weight to 0.
    "grpo": Method(
        "c = -A / K, A = (R - mu) / sigma; PPO clip",
        "DeepSeekMath, arXiv 2402.03300",
        "code",
        _policy_gradient("grpo"),
        _POLICY_GRADIENT,
    ),
    "dr-grpo": Method(
        "c = -A / K, A = R - mu; PPO clip; token sum / max_tokens",
        "Understanding R1-Zero-Like Training, arXiv 2503.20783",
        "code",
        _policy_gradient("dr-grpo"),
        _POLICY_GRADIENT | {"aggregation": "seq-mean-token-sum-norm"},
    ),
    "maxrl": Method(
        "c = -A / K, A = (R - mu) / mu; PPO clip",
        "Maximum Likelihood Reinforcement Learning (Tajwar et al., 2026)",
        "code",
        _policy_gradient("maxrl"),
        _POLICY_GRADIENT,
        ("K >= 2", "rewards >= 0"),
    ),
}


def names() -> dict[str, dict[str, Any]]:
    """Every method by name, as plain data: formula, paper, fidelity, options (with defaults) and needs."""
    return {
        name: {
            "name": name,
            "formula": m.formula,
            "paper": m.paper,
            "fidelity": m.fidelity,
            "options": dict(m.options),
            "needs": list(m.needs),
        }
        for name, m in CATALOGUE.items()
    }


def get(name: str, **options: Any) -> Objective:
    """The method called `name`, as an objective.

    Args:
      name: lower case with hyphens, as `names` lists them: "lpo-forward", "grpo", ...
      **options: what to set differently from the defaults that `names` shows.

    Returns:
      An `Objective`: a pure function `(stats, scored) -> (loss, metrics)`. It compares equal to another made
      with the same arguments, so it may be a static argument of a jitted function.

    Raises:
      ValueError: one line: an unknown name or option, or a value out of range.
    """
    if name not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise ValueError(f"unknown method {name!r}{nearest(name, CATALOGUE)} (known: {known})")
    method = CATALOGUE[name]
    for key, value in options.items():
        if key not in method.options:
            known = ", ".join(method.options)
            raise ValueError(f"{name}: unknown option {key!r}{nearest(key, method.options)} (known: {known})")
        problem = OPTIONS[key](value)
        if problem:
            raise ValueError(f"{name}: {key} {problem}")
    return method.build(name, {**method.options, **options})


def _one_of(*choices: Any) -> Callable[[Any], str | None]:
    def problem(value: Any) -> str | None:
        if not isinstance(value, bool) and value in choices:
            return None
        known = ", ".join(map(repr, choices))
        return f"must be one of {known}, got {value!r}{nearest(value, choices)}"

    return problem


def _between(low: float, high: float) -> Callable[[Any], str | None]:
    def problem(value: Any) -> str | None:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and low < value < high:
            return None
        upper = "" if high == math.inf else f" and less than {high:g}"
        return f"must be a number greater than {low:g}{upper}, got {value!r}"

    return problem


def _count(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return None
    return f"must be a whole number of tokens, 1 or more, got {value!r}"


# Option -> what is wrong with a value, or None.
OPTIONS: Mapping[str, Callable[[Any], str | None]] = {
    "temperature": temperature_problem,
    "score": _one_of(*SCORES),
    "clip": _one_of(*CLIPS),
    "epsilon": _between(0, 1),
    "epsilon_low": _between(0, 1),
    "epsilon_high": _between(0, math.inf),
    "aggregation": _one_of(*AGGREGATIONS),
    "max_tokens": _count,
    "ddof": _one_of(0, 1),
    "temperature_floor": _between(0, math.inf),
    "degenerate": _one_of("keep", "mask"),
}
