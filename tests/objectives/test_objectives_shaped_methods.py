"""Whole methods that shape rewards: their invariances, options and errors (METHODS 4.4 items 1 and 4)."""

import chex
import jax
import numpy as np
import pytest
from objective_cases import (
    all_but,
    batch,
    full_batch,
    padded,
    put,
    run,
    run_jitted,
    some,
)

from lpo_jax import objectives as O
from lpo_jax.objectives import advantage
from lpo_jax.objectives.methods import shaped
from lpo_jax.objectives.targets import SCALES

NAMES = [row.objective.name for row in shaped.METHODS]


def case(objective, seed=0, **changes):
    """A full batch in which two answers agree, the first passes are long, and quantiles and probe are at work."""
    stats, scored = full_batch(seed, off=0.3, objective=objective)
    scored = scored.replace(clusters=np.int32([[0, 0, 0, 1], [2, -1, 2, 2], [3, 3, 4, 4]]))
    if objective.control is not None:
        scored = scored.replace(control=objective.next_control(stats, scored))
    return stats, scored.replace(**changes)


@pytest.mark.parametrize("name", some(NAMES, "rloo", "mc-grpo", "bnpo", "lpo-dgpo", "adora", "copo"))
def test_item_1_padding_changes_nothing(name):
    objective = O.get(name)
    stats, scored = case(objective, seed=9)
    loss, metrics, gradient = run(objective, stats, scored)
    loss2, metrics2, gradient2 = run_jitted(objective, *padded(stats, scored))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2[:3, :4, :6], gradient, rtol=1e-5, atol=1e-7)
    outside = np.pad(scored.mask, ((0, 1), (0, 2), (0, 3))) == 0
    np.testing.assert_array_equal(np.asarray(gradient2)[outside], 0)
    for key in metrics.keys() - {"lpo/masked_response_frac"}:
        np.testing.assert_allclose(metrics2[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert np.isfinite(loss) and np.abs(gradient).max() > 1e-5


@pytest.mark.parametrize(
    "name", some(NAMES, "maxrl", "mc-grpo", "bnpo", "dgpo", "lpo-dgpo", "progrpo", "fapo", "empo")
)
def test_item_4_equal_huge_or_no_rewards(name):
    objective = O.get(name)
    none = np.zeros((3, 4), bool)
    for changes in (
        {"rewards": np.float32([[0.1] * 4, [1e30, 0, -1e30, 1], [np.nan] * 4])},
        {"rewards": np.full((3, 4), np.inf, np.float32)},
        {"valid": none},
        {"valid": put(none, np.s_[:, 0], True)},
    ):
        stats, scored = case(objective, seed=3, **changes)
        loss, metrics, gradient = run(objective, stats, scored)
        chex.assert_tree_all_finite((loss, metrics, gradient))
        if not objective.listwise(stats, scored).active.any():
            np.testing.assert_array_equal(gradient, 0)
    assert objective.min_group_size == (1 if name in ("remax", "riskpo") else 2)


@pytest.mark.parametrize("name", all_but(NAMES, "riskpo", "poise"))
def test_traces_without_looking_at_values(name):
    objective = O.get(name)
    args = case(objective)
    loss, gradient = jax.eval_shape(jax.value_and_grad(lambda *a: objective(*a)[0]), *args)
    assert loss.shape == () and gradient.logp.shape == (3, 4, 6)
    assert jax.eval_shape(objective.next_control, *args) == jax.eval_shape(lambda: args[1].control)


@pytest.mark.parametrize("name", some(["bnpo", "mc-grpo", "riskpo"], "mc-grpo"))
def test_jitted_or_not(name):
    objective = O.get(name)
    args = case(objective, seed=4)
    loss, _, gradient = run(objective, *args)
    jitted = jax.jit(jax.value_and_grad(lambda *a: objective(*a)[0]))(*args)
    chex.assert_trees_all_close((jitted[0], jitted[1].logp), (loss, gradient), rtol=1e-4, atol=1e-7)


# Options of this family's parts, what else must be set to see them, and a value that must change the coefficients.
CHANGES = [
    ("fapo", "flaw_penalty", 0.3),
    ("fapo", "overlong_buffer", 0.9, {"max_tokens": 5}),
    ("fapo", "max_tokens", 5),
    ("empo", "entropy_threshold", 0.5),
    ("ssl-tiers", "tiers", 7),
    ("ssl-tiers", "tier_weight", 0.9),
    ("progrpo", "confidence_weight", 1.0),
    ("progrpo", "unlikely_share", 0.7),
    ("copo", "mix_slope", 9.0),
    ("copo", "mix_entropy", 0.2),
    ("dgpo", "difficulty_temperature", 0.3),
    ("lpo-dgpo", "prompt_weight_inside", False),
    ("riskpo", "bundle_size", 2),
    ("riskpo", "quantile_low", 0.4),
    ("riskpo", "quantile_high", 0.6),
    ("riskpo", "tail_weight", 0.2),
    ("poise", "probe_width", 2),
    ("poise", "probe_ridge", 9.0),
    ("poise", "probe_buffer", 3),
    *[("grpo", "centre", centre) for centre in advantage.CENTRES if centre != "mean"],
    *[("grpo", "temperature", rule) for rule in SCALES if rule != "grpo"],
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-{change[1]}-{change[2]}")
def test_no_dead_option(change):
    name, option, value, *others = change
    others = others[0] if others else {}
    objectives = O.get(name, **others), O.get(name, **others, **{option: value})
    c = [np.asarray(o.listwise(*case(o, seed=22)).coefficients) for o in objectives]
    assert np.abs(c[0] - c[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "remax"])
def test_a_kl_to_a_reference_is_off_until_asked_for(name):
    off, k3, k1 = (O.get(name, **o) for o in ({}, {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl": "k1"}))
    assert "ref_logp" not in off.needs and "ref_logp" in k3.needs
    stats, scored = case(off)
    g = [run(o, stats, scored)[2] for o in (off, k3, k1)]
    assert np.abs(g[0] - g[1]).max() > 1e-3 and np.abs(g[1] - g[2]).max() > 1e-3
    np.testing.assert_array_equal(run(off, stats.replace(ref_logp=None), scored)[2], g[0])


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("rloo", {"centre": "lou"}, "did you mean 'loo'?"),
        ("grpo", {"temperature": "mean_abs"}, "did you mean 'mean-abs'?"),
        ("ssl-tiers", {"tiers": 1}, "tiers must be a whole number of tiers, 2 or more, got 1"),
        ("fapo", {"judge": "judge"}, "judge must be 'path/to/file.py:function', got 'judge'"),
        ("riskpo", {"quantile_low": 0.9}, "quantile_low must be less than quantile_high, got 0.9 and 0.8"),
        ("dgpo", {"prompt_weight_inside": True}, "dgpo: unknown option 'prompt_weight_inside'"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(name, options, says):
    with pytest.raises(ValueError) as error:
        O.get(name, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_array_is_named():
    stats, scored = batch()
    for name, array in (
        ("remax", "baseline"),
        ("empo", "clusters"),
        ("fapo", "flawed"),
        ("poise", "control"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs scored.{array}, which is None"):
            O.get(name)(stats, scored)
