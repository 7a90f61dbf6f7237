"""The allowed values of the options of methods: a check for every field of a part."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from lpo_jax.objectives.advantage import CENTRES
from lpo_jax.objectives.aggregate import AGGREGATIONS
from lpo_jax.objectives.checks import did_you_mean, is_number
from lpo_jax.objectives.credit import BUDGET_WEIGHTS
from lpo_jax.objectives.divergences import DIVERGENCES, Divergence
from lpo_jax.objectives.mirror import map_problem
from lpo_jax.objectives.prompt_weight import NFT_WEIGHTS
from lpo_jax.objectives.ranking import LABEL_LOSSES
from lpo_jax.objectives.regular import KLS
from lpo_jax.objectives.simplex import SCORES
from lpo_jax.objectives.sparse import TARGETS
from lpo_jax.objectives.targets import temperature_problem
from lpo_jax.objectives.trust import CLIPS

# Returns what is wrong with a value, in words that follow the option's name, or None.
Check: TypeAlias = Callable[[object], str | None]


def one_of(*choices: object) -> Check:
    """Return a check for one of a few words or numbers."""

    def problem(value: object) -> str | None:
        if not isinstance(value, bool) and value in choices:
            return None
        known = ", ".join(map(repr, choices))
        return f"must be one of {known}, got {value!r}{did_you_mean(value, choices)}"

    return problem


def between(low: float, high: float) -> Check:
    """Return a check for a number inside an open interval."""

    def problem(value: object) -> str | None:
        if is_number(value) and low < value < high:
            return None
        upper = "" if high == math.inf else f" and less than {high:g}"
        return f"must be a number greater than {low:g}{upper}, got {value!r}"

    return problem


def within(low: float, high: float) -> Check:
    """Return a check for a number inside a closed interval."""

    def problem(value: object) -> str | None:
        if is_number(value) and low <= value <= high:
            return None
        upper = " or more" if high == math.inf else f" to {high:g}"
        return f"must be a number, {low:g}{upper}, got {value!r}"

    return problem


def count(unit: str, least: int = 1) -> Check:
    """Return a check for an integer of at least `least`."""

    def problem(value: object) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return None
        return f"must be a whole number of {unit}, {least} or more, got {value!r}"

    return problem


def either(what: str, *problems: Check) -> Check:
    """Return a check that any of several checks passes; `what` describes the allowed values."""
    return lambda value: f"must be {what}, got {value!r}" if all(f(value) for f in problems) else None


def flag(value: object) -> str | None:
    """Check for true or false."""
    return None if isinstance(value, bool) else f"must be true or false, got {value!r}"


def string(value: object) -> str | None:
    """Check for a text."""
    return None if isinstance(value, str) else f"must be a text, got {value!r}"


def function_path(value: object) -> str | None:
    """Check for the path and name of a function of the user, or "" for none."""
    file, _, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    if value == "" or (file.endswith(".py") and function):
        return None
    return f"must be 'path/to/file.py:function', got {value!r}"


def fractions(value: object) -> str | None:
    """Check for a list of increasing fractions."""
    parts = list(value) if isinstance(value, tuple | list) else []
    if parts and all(between(0, 1.0001)(x) is None for x in parts) and parts == sorted(parts):
        return None
    return f"must be a list of growing numbers, each greater than 0 and 1 at most, got {value!r}"


def reprompt(value: object) -> str | None:
    """Check for a text with a placeholder for the solution."""
    if isinstance(value, str) and "{solution}" in value:
        return None
    return f"must be a text with {{solution}} in it, got {value!r}"


# Option -> its check.
OPTIONS: Mapping[str, Check] = {
    # advantage.py
    "centre": one_of(*CENTRES),
    "temperature": temperature_problem,
    "ddof": one_of(0, 1),
    "temperature_floor": between(0, math.inf),
    # shaping.py
    "flaw_penalty": within(0, math.inf),
    "overlong_buffer": between(0, 1),
    "entropy_threshold": between(0, math.inf),
    "tiers": count("tiers", 2),
    "tier_weight": within(0, 1),
    # select.py
    "responses_initial": between(0, 1),
    "responses_final": between(0, 1),
    "ppl_correct_max": between(1, math.inf),
    "ppl_wrong_min": within(1, math.inf),
    # bias.py
    "confidence_weight": within(0, math.inf),
    "unlikely_share": between(0, 1),
    "mix_slope": between(0, math.inf),
    "mix_entropy": within(0, math.inf),
    # prompt_weight.py
    "difficulty_temperature": between(0, math.inf),
    "short_weight": within(0, 1),
    "nft_weight": one_of(*NFT_WEIGHTS),
    # risk.py
    "bundle_size": count("prompts"),
    "quantile_low": between(0, 1),
    "quantile_high": between(0, 1),
    "quantile_rate": between(0, math.inf),
    "tail_weight": within(0, math.inf),
    # probe.py
    "probe_buffer": count("responses"),
    "probe_width": count("features"),
    "probe_ridge": between(0, math.inf),
    # hook_specs.py: Judge
    "judge": function_path,
    # projection.py
    "score": one_of(*SCORES),
    "target": one_of(*TARGETS),
    "target_alpha": within(1.01, 4),
    "divergence": lambda value: None if isinstance(value, Divergence) else one_of(*DIVERGENCES)(value),
    "alpha": within(-1, 2),
    # ranking.py
    "preference_beta": between(0, math.inf),
    "anisotropy": between(0, math.inf),
    "label_loss": one_of(*LABEL_LOSSES),
    "label_temperature": between(0, math.inf),
    "ranking_temperature": between(0, math.inf),
    # flow.py
    "reward_scale": between(0, math.inf),
    "log_z_rate": between(0, 1),
    # dual.py
    "kl_budget": between(0, math.inf),
    # trust.py
    "clip": one_of(*CLIPS),
    "epsilon": between(0, 1),
    "epsilon_low": either("a number greater than 0, 1 at most", between(0, 1), one_of(1)),
    "epsilon_high": between(0, math.inf),
    "dual_clip": either("0 (off) or a number greater than 1", one_of(0), between(1, math.inf)),
    "advantage_stretch": within(0, math.inf),
    "variance_stretch": within(0, math.inf),
    "tau_pos": between(0, math.inf),
    "tau_neg": between(0, math.inf),
    "target_temperature": between(0, math.inf),
    "negative_floor": between(0, math.inf),
    "negative_weight": within(0, math.inf),
    # sequence_gates.py
    "log_epsilon_low": between(0, math.inf),
    "log_epsilon_high": between(0, math.inf),
    "token_share": either("'entropy' or a number, 0 to 1", one_of("entropy"), within(0, 1)),
    "sequence_epsilon_low": between(0, 1),
    "sequence_epsilon_high": between(0, math.inf),
    "base_epsilon": between(0, math.inf),
    "fiber_epsilon": between(0, math.inf),
    "variation_budget": between(0, math.inf),
    # covariance_gates.py
    "cov_low": either("a number", between(-math.inf, math.inf)),
    "cov_high": either("a number", between(-math.inf, math.inf)),
    "cov_fraction": either("a number greater than 0, 1 at most", between(0, 1), one_of(1)),
    "cov_kl_coef": within(0, math.inf),
    # proximal.py
    "step_size": between(0, math.inf),
    "step_floor": between(0, 1),
    "dual_start": within(0, math.inf),
    "dual_rate": within(0, math.inf),
    "variance_limit": within(0, math.inf),
    # hook_specs.py
    "top": count("tokens"),
    "max_rounds": count("sampling rounds"),
    "uniform_share": within(0, 1),
    "rate_momentum": either("a number, 0 or more and less than 1", one_of(0), between(0, 1)),
    "width": between(0, math.inf),
    "hint_fractions": fractions,
    "hint_after": count("steps", 0),
    "window": count("steps"),
    "regress_scale": within(0, math.inf),
    "reprompt": reprompt,
    # credit.py
    "entropy_cost": within(0, math.inf),
    "entropy_limit": between(0, math.inf),
    "progress_weight": within(0, math.inf),
    "step_penalty": within(0, math.inf),
    "budgets": count("budgets"),
    "budget_weights": one_of(*BUDGET_WEIGHTS),
    # token_weight.py
    "top_tokens": within(0, 1),
    "tokens_initial": within(0, 1),
    "tokens_final": within(0, 1),
    "reject_tokens": within(0, 1),
    "conflict_weight": within(0, math.inf),
    "importance_cap": between(0, math.inf),
    # entropy_adaptive.py
    "most_utility": between(0, math.inf),
    "entropy_pivot": within(0, 1),
    "clip_growth": within(0, math.inf),
    "weight_growth": within(0, 1),
    # regular.py
    "kl_coef": within(0, math.inf),
    "kl": one_of(*KLS),
    "entropy_coef": within(0, math.inf),
    "distil_coef": within(0, math.inf),
    "distil_share": between(0, 1),
    "distil_decay": within(0, math.inf),
    # mirror.py
    "mirror_coef": within(0, math.inf),
    "mirror": map_problem,
    "mirror_seed": count("a seed", 0),
    # hook_specs.py: PrefixValues, Budgets
    "segments": count("segments"),
    "cue": string,
    "summaries": count("answers"),
    "summary_tokens": count("tokens"),
    # aggregate.py
    "aggregation": one_of(*AGGREGATIONS),
    "max_tokens": count("tokens"),
    # method.py
    "degenerate": one_of("keep", "mask"),
    "prompt_weight_inside": flag,
}
