"""The allowed values of the options of methods: a check for every field of a part."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from lpo_jax.objectives.advantage import BUDGET_WEIGHTS, CENTRES
from lpo_jax.objectives.checks import did_you_mean, is_number
from lpo_jax.objectives.divergences import DIVERGENCES, Divergence
from lpo_jax.objectives.mirror import map_problem
from lpo_jax.objectives.ranking import LABEL_LOSSES
from lpo_jax.objectives.regular import KLS
from lpo_jax.objectives.simplex import SCORES
from lpo_jax.objectives.targets import TARGETS, temperature_problem
from lpo_jax.objectives.trust import CLIPS
from lpo_jax.objectives.weights import AGGREGATIONS, NFT_WEIGHTS

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


def _each(check: Check, names: str) -> dict[str, Check]:
    """One check for several options."""
    return dict.fromkeys(names.split(), check)


# Option -> its check.
OPTIONS: Mapping[str, Check] = {
    **_each(
        between(0, math.inf),
        """
        temperature_floor entropy_threshold mix_slope difficulty_temperature quantile_rate probe_ridge
        preference_beta anisotropy label_temperature ranking_temperature reward_scale kl_budget
        epsilon_high tau_pos tau_neg target_temperature negative_floor log_epsilon_low log_epsilon_high
        sequence_epsilon_high base_epsilon fiber_epsilon variation_budget step_size width entropy_limit
        importance_cap most_utility
    """,
    ),
    **_each(
        within(0, math.inf),
        """
        flaw_penalty confidence_weight mix_entropy tail_weight advantage_stretch variance_stretch
        negative_weight cov_kl_coef dual_start dual_rate variance_limit regress_scale entropy_cost
        progress_weight step_penalty conflict_weight clip_growth kl_coef entropy_coef distil_coef
        distil_decay mirror_coef
    """,
    ),
    **_each(
        between(0, 1),
        """
        overlong_buffer responses_initial responses_final unlikely_share quantile_low quantile_high
        log_z_rate epsilon sequence_epsilon_low step_floor distil_share
    """,
    ),
    **_each(
        within(0, 1),
        """
        tier_weight short_weight uniform_share top_tokens tokens_initial tokens_final reject_tokens
        entropy_pivot weight_growth
    """,
    ),
    "centre": one_of(*CENTRES),
    "temperature": temperature_problem,
    "ddof": one_of(0, 1),
    "tiers": count("tiers", 2),
    "ppl_correct_max": between(1, math.inf),
    "ppl_wrong_min": within(1, math.inf),
    "nft_weight": one_of(*NFT_WEIGHTS),
    "bundle_size": count("prompts"),
    "probe_buffer": count("responses"),
    "probe_width": count("features"),
    "judge": function_path,
    "score": one_of(*SCORES),
    "target": one_of(*TARGETS),
    "target_alpha": within(1.01, 4),
    "divergence": lambda value: None if isinstance(value, Divergence) else one_of(*DIVERGENCES)(value),
    "alpha": within(-1, 2),
    "label_loss": one_of(*LABEL_LOSSES),
    "clip": one_of(*CLIPS),
    "epsilon_low": either("a number greater than 0, 1 at most", between(0, 1), one_of(1)),
    "dual_clip": either("0 (off) or a number greater than 1", one_of(0), between(1, math.inf)),
    "token_share": either("'entropy' or a number, 0 to 1", one_of("entropy"), within(0, 1)),
    "cov_low": either("a number", between(-math.inf, math.inf)),
    "cov_high": either("a number", between(-math.inf, math.inf)),
    "cov_fraction": either("a number greater than 0, 1 at most", between(0, 1), one_of(1)),
    "top": count("tokens"),
    "max_rounds": count("sampling rounds"),
    "rate_momentum": either("a number, 0 or more and less than 1", one_of(0), between(0, 1)),
    "hint_fractions": fractions,
    "hint_after": count("steps", 0),
    "window": count("steps"),
    "reprompt": reprompt,
    "budgets": count("budgets"),
    "budget_weights": one_of(*BUDGET_WEIGHTS),
    "kl": one_of(*KLS),
    "mirror": map_problem,
    "mirror_seed": count("a seed", 0),
    "segments": count("segments"),
    "cue": string,
    "summaries": count("answers"),
    "summary_tokens": count("tokens"),
    "aggregation": one_of(*AGGREGATIONS),
    "max_tokens": count("tokens"),
    "degenerate": one_of("keep", "mask"),
    "prompt_weight_inside": flag,
}
