"""Listwise methods against their papers' formulas in numpy: METHODS 4.4 items 1, 4, 5, 6, 9, 17 and 18."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import full_batch, groups, in_float64, on_host, padded, put, run, run_jitted, small, some

from lpo_jax import objectives as O
from lpo_jax.objectives.batch import Context
from lpo_jax.objectives.flow import RATIO_MAX
from lpo_jax.objectives.ranking import Preferences, RankingAdvantage, RewardLabels

NAMES = ["mpo", "tpo", "gvpo", "copg", "flowrl", "trpa", "real", "capo-calibration"]
METHODS = {name: O.get(name) for name in NAMES} | {
    "lpo-forward/js/sparsemax": O.get("lpo-forward", divergence="js", target="sparsemax"),
    "lpo-forward/alpha/entmax": O.get("lpo-forward", divergence="alpha", alpha=1.5, target="entmax"),
}


def methods(*default):
    return pytest.mark.parametrize("name", some(METHODS, *default))


@functools.cache
def case(name, seed=3, off=0.3, dtype=np.float32):
    """(objective, stats, scored) with all that the method needs, and a control that has learnt something."""
    objective = METHODS[name]
    stats, scored = full_batch(seed, off=off, dtype=dtype, objective=objective)
    if scored.control is not None:
        scored = scored.replace(control=jax.device_get(objective.next_control(stats, scored)))
    return objective, stats, scored


def numbers(stats, scored):
    """(logp, behaviour, reference, mask, lengths, rewards) in float64."""
    arrays = (stats.logp, scored.behaviour_logp, stats.ref_logp, scored.mask)
    logp, behaviour, reference, mask = (np.float64(x) for x in arrays)
    return logp, behaviour, reference, mask, mask.sum(-1), np.float64(scored.rewards)


def centred(x):
    return x - x.mean(-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigma(R):
    """The group's standard deviation, and infinity where all are equal: numpy's rounding error is not 0."""
    return np.where(np.ptp(R, -1, keepdims=True) > 0, R.std(-1, keepdims=True), np.inf)


def test_tpo_against_numpy():
    objective, stats, scored = case("tpo")
    scored = scored.replace(anchor_logp=None)
    logp, behaviour, _, m, _, R = numbers(stats, scored)
    P, P_t = (softmax((m * x).sum(-1)) for x in (logp, behaviour))
    w = P_t * np.exp(centred(R) / sigma(R))
    w /= w.sum(-1, keepdims=True)
    loss, _, gradient = run(objective, stats, scored)
    np.testing.assert_allclose(gradient, (P - w)[..., None] * m / 3, atol=1e-6)
    np.testing.assert_allclose(loss, (w * np.log(w / P)).sum(-1).mean(), rtol=1e-4)


def test_gvpo_is_the_public_loss_up_to_its_constant():
    objective, stats, scored = case("gvpo")
    logp, behaviour, _, m, _, R = numbers(stats, scored.replace(anchor_logp=None))
    beta, K = 0.1, 4

    def public(logp):
        implied = centred(beta * (m * (logp - behaviour)).sum(-1))
        return 0.5 * ((implied - centred(R)) ** 2).sum(-1).mean() / (K - 1)

    loss, _, gradient = run(objective, stats, scored.replace(anchor_logp=None))
    scale = beta**2 * K / (K - 1)
    np.testing.assert_allclose(public(logp), scale * loss, rtol=1e-4)
    nudge = np.random.default_rng(0).standard_normal(logp.shape)
    slope = (public(logp + 1e-6 * nudge) - public(logp - 1e-6 * nudge)) / 2e-6
    np.testing.assert_allclose(slope, scale * (gradient * nudge).sum(), rtol=1e-4)


@pytest.mark.slow
@in_float64
def test_item_18_copg_is_all_pairs_against_the_reference():
    objective, stats, scored = case("copg", dtype=np.float64)
    logp, _, reference, m, _, R = numbers(stats, scored)
    S, beta = (m * (logp - reference)).sum(-1), 0.1

    def gap(x):
        return x[:, :, None] - x[:, None, :]

    pairs = 0.5 * (gap(R) - beta * gap(S)) ** 2 / beta  # each pair in both orders
    loss, _, gradient = run(objective, stats, scored)
    np.testing.assert_allclose(pairs.sum((1, 2)).mean() / 2, beta * 4**2 * loss, rtol=1e-9)
    np.testing.assert_allclose(
        gradient, (centred(S - R / beta) / 4)[..., None] * m / 3, rtol=1e-8, atol=1e-12
    )
    # Its optimum is the tilted reference, wherever the update starts.
    no_anchor = run(objective, stats, scored.replace(anchor_logp=None))
    np.testing.assert_array_equal(gradient, no_anchor[2])


def test_mpo_is_weighted_regression_within_its_budget():
    objective, stats, scored = case("mpo")
    scored = scored.replace(anchor_logp=None)
    view = jax.device_get(objective.listwise(stats, scored))
    _, _, _, m, _, R = numbers(stats, scored)
    w = softmax(R / view.temperature)
    np.testing.assert_allclose(run(objective, stats, scored)[2], -w[..., None] * m / 3, rtol=1e-4, atol=1e-7)
    assert np.ptp(view.temperature) == 0  # one for the batch
    mixed = np.ptp(R, -1) > 0
    np.testing.assert_allclose((w * np.log(4 * w)).sum(-1)[mixed].mean(), 0.1, rtol=1e-4)


@in_float64
def test_mpo_temperature_minimises_the_dual():
    """MPO equation 8: g(eta) = eta epsilon + eta mean log mean exp(R / eta)."""
    _, stats, scored = case("mpo", dtype=np.float64)
    mixed = scored.replace(valid=put(scored.valid, 2, False))  # the last group's rewards are all equal

    def dual(eta, epsilon):
        return eta * epsilon + eta * np.log(np.exp(scored.rewards[:2] / eta).mean(-1)).mean()

    listwise = jax.jit(O.Objective.listwise, static_argnums=0)
    for epsilon in (0.01, 0.1, 0.3):
        eta = float(listwise(O.get("mpo", kl_budget=epsilon), stats, mixed).temperature[0, 0])
        assert dual(eta, epsilon) < min(dual(eta * 1.01, epsilon), dual(eta / 1.01, epsilon))
    # No target is 100 nats away: the best responses alone.
    view = listwise(O.get("mpo", kl_budget=100.0), stats, mixed.replace(anchor_logp=None))
    best = scored.rewards[:2] == scored.rewards[:2].max(-1, keepdims=True)
    np.testing.assert_allclose(view.target[:2], best / best.sum(-1, keepdims=True), atol=1e-9)


def test_flowrl_against_numpy():
    objective, stats, scored = case("flowrl", off=0.8)
    logp, behaviour, reference, m, n, R = numbers(stats, scored)
    s = (m * (logp - reference)).sum(-1) / n
    w = np.minimum(np.exp((m * (logp - behaviour)).sum(-1)), RATIO_MAX)
    assert (w == RATIO_MAX).any()
    log_z = _log_z(objective, stats, scored)
    residual = log_z[:, None] + s - 15 * centred(R) / sigma(R)
    loss, _, gradient = run(objective, stats, scored)
    np.testing.assert_allclose(loss, (w * residual**2 / 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(gradient, (w * residual / 4 / n / 3)[..., None] * m, rtol=1e-3, atol=1e-5)


def _log_z(objective, stats, scored):
    """log Z [P], read off the coefficients: on-policy and without a reward gap c = (log Z + s) / K."""
    stats = stats.replace(logp=scored.behaviour_logp, ref_logp=scored.behaviour_logp)
    flat = scored.replace(rewards=np.ones_like(scored.rewards), anchor_logp=None)
    return 4 * np.asarray(objective.listwise(stats, flat).coefficients)[:, 0]


def test_flowrl_learns_log_z_by_the_same_loss():
    objective, stats, scored = case("flowrl", off=0.5)
    # Features separate the prompts: what log Z learns from one prompt does not change it for another.
    scored = scored.replace(features=np.repeat(np.eye(3, 20, dtype=np.float32)[:, None], 4, 1))
    step = jax.jit(lambda stats, scored: objective.next_control(stats, scored))
    state = scored.control
    first = run(objective, stats, scored)[0]
    for _ in range(800):
        state = step(stats, scored.replace(control=state))
    learnt = scored.replace(control=jax.device_get(state))
    # At the best log Z the weighted residuals of a group sum to 0: what the logit variance has at once.
    view = objective.listwise(stats, learnt)
    np.testing.assert_allclose(view.coefficients.sum(-1), 0, atol=2e-2)
    assert run(objective, stats, learnt)[0] < first
    assert np.abs(objective.listwise(stats, scored).coefficients.sum(-1)).max() > 0.1
    # A prompt that takes no part teaches nothing, and neither does garbage in its features.
    out = scored.replace(
        valid=put(scored.valid, 0, False), features=put(scored.features, 0, np.float32(np.nan))
    )
    moved = jax.device_get(step(stats, out))
    chex.assert_tree_all_finite(moved)
    assert moved["bias"] != scored.control["bias"]
    nobody = jax.device_get(step(stats, out.replace(valid=np.zeros_like(scored.valid))))
    chex.assert_trees_all_equal(nobody, scored.control)


def _trpa(levels, s, beta=0.1, anisotropy=2.5):
    """The public loss of one group, in loops: levels 1 passed, 3 wrong, 4 malformed."""
    h = [
        (anisotropy if levels[i] == 1 else 1) * beta * (s[i] - s[j])
        for i in range(len(s))
        for j in range(len(s))
        if levels[i] < levels[j]
    ]
    if not h:
        h = [x if level == 1 else -x for level, x in zip(levels, s)]
    return np.log1p(np.exp(-np.array(h))).mean()


def test_trpa_against_its_public_loss():
    objective, stats, scored = case("trpa")
    scored = scored.replace(malformed=put(np.zeros((3, 4), bool), np.s_[:2, 0], True))
    logp, behaviour, reference, m, n, _ = numbers(stats, scored)
    s = (m * (logp - reference)).sum(-1) / n
    levels = np.where(scored.passed, 1, np.where(scored.malformed, 4, 3))
    assert set(levels[0]) == {1, 3, 4} and set(levels[2]) == {3}
    expected = np.mean([_trpa(l, x) for l, x in zip(levels, s)])
    delta = logp - behaviour
    k3 = (m * (np.exp(-delta) + delta - 1)).sum(-1) / n
    loss, metrics, _ = run(objective, stats, scored)
    np.testing.assert_allclose(loss, expected + 0.001 * k3.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["actor/kl_loss"], k3.mean(), rtol=1e-3)
    mild = run(O.get("trpa", preference_beta=0.2, anisotropy=1.0, kl_coef=0.0), stats, scored)[0]
    np.testing.assert_allclose(mild, np.mean([_trpa(l, x, 0.2, 1) for l, x in zip(levels, s)]), rtol=1e-4)


value = on_host(lambda loss, *rest: loss.value(*rest, None), static_argnums=0)
label_coefficients = on_host(lambda loss, *rest: loss.coefficients(*rest, None), static_argnums=0)


def _context(R, valid, **fields):
    zeros = jnp.zeros((*R.shape, 1))
    scored = O.Scored(fields.pop("behaviour_logp", zeros), R, zeros + 1, **fields)
    return Context(R, valid, valid[..., None], zeros, O.TokenStats(zeros), scored)


@hypothesis.given(groups(), st.sampled_from([0.1, 0.5, 2.0]))
@small
@in_float64
def test_item_6_and_18_reward_labels(groups, tau):
    R, s, _ = groups
    valid = np.ones(R.shape, bool)
    context, u = _context(R, valid), R - R.mean(-1, keepdims=True)
    u = np.where(np.ptp(R, -1, keepdims=True) > 0, u, 0)
    loss = RewardLabels(label_temperature=tau)
    above, mixed = u > 0, np.ptp(R, -1) > 0
    positive = np.log(1 + np.where(above, np.exp(-s / tau), 0).sum(-1))
    negative = np.log(1 + np.where(~above, np.exp(s / tau), 0).sum(-1))
    np.testing.assert_allclose(value(loss, context, u, s), np.where(mixed, positive + negative, 0), rtol=1e-9)
    c = label_coefficients(loss, context, u, s)
    np.testing.assert_array_less(np.abs(c) - 1 / tau, 1e-12)
    assert ((c < 0) == above).all()
    # On-policy in closed form.
    n = np.where(above, above.sum(-1, keepdims=True), (~above).sum(-1, keepdims=True))
    expected = np.where(above, -1, 1) / (tau * (1 + n)) * mixed[:, None]
    np.testing.assert_allclose(label_coefficients(loss, context, u, 0 * s), expected, atol=1e-12)
    bce = value(RewardLabels("bce", tau), context, u, s)
    np.testing.assert_allclose(
        bce, np.where(mixed, np.log1p(np.exp(np.where(above, -s, s) / tau)).mean(-1), 0), rtol=1e-9
    )


ranking = on_host(lambda part, context: part(context, None), static_argnums=0)


@functools.partial(on_host, static_argnums=3)
def surrogate_slope(v, passed, failed, tau):
    def surrogate(v):
        opposed = passed[:, :, None] & failed[:, None, :]
        return jnp.where(opposed, jax.nn.softplus(-(v[:, :, None] - v[:, None, :]) / tau), 0).sum()

    return jax.grad(surrogate)(v)


@hypothesis.given(groups(), st.sampled_from([0.3, 0.6]))
@small
@in_float64
def test_item_18_capo_advantages_are_minus_the_gradient_of_the_auc_surrogate(groups, tau):
    R, v, _ = groups
    passed, valid = R > 0.5, np.ones(R.shape, bool)
    valid[0, 0] = False
    A = ranking(RankingAdvantage(tau), _context(R, valid, behaviour_logp=v[..., None]))
    np.testing.assert_allclose(A.sum(-1), 0, atol=1e-9)
    np.testing.assert_allclose(A, -surrogate_slope(v, passed & valid, ~passed & valid, tau), atol=1e-9)


def test_capo_weighs_a_policy_gradient_by_them():
    objective, stats, scored = case("capo-calibration", off=0)
    logp, _, reference, m, n, _ = numbers(stats, scored)
    perplexity = np.exp(-(m * reference).sum(-1) / n)
    assert len(np.unique(np.sign(perplexity - 2.5))) == 2  # some are masked, some are not
    keep = np.where(scored.passed, perplexity <= 2.5, perplexity >= 1.05)
    view = objective.listwise(stats, scored)
    np.testing.assert_array_equal(view.valid, keep)
    A = np.asarray(view.utilities)
    np.testing.assert_allclose(A.sum(-1), 0, atol=1e-5)
    gradient = run(objective, stats, scored)[2]
    size = np.maximum(keep.sum(-1), 1)[:, None]
    weight = (keep / n / size / keep.any(-1).sum())[..., None] * m
    np.testing.assert_allclose(gradient, -A[..., None] * weight, rtol=1e-4, atol=1e-7)
    assert np.abs(A).max() > 0.1


@methods("mpo", "flowrl", "real", "lpo-forward/js/sparsemax")
def test_item_1_padding_changes_nothing(name):
    objective, stats, scored = case(name, seed=9, off=0.2)
    loss, metrics, gradient = run(objective, stats, scored)
    loss2, metrics2, gradient2 = run_jitted(objective, *padded(stats, scored))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2[:3, :4, :6], gradient, rtol=1e-4, atol=1e-6)
    outside = np.pad(np.asarray(scored.mask), ((0, 1), (0, 2), (0, 3))) == 0
    np.testing.assert_array_equal(np.asarray(gradient2)[outside], 0)
    for key in metrics.keys() - {"lpo/masked_response_frac"}:
        np.testing.assert_allclose(metrics2[key], metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)
    if scored.control is not None:
        learn = jax.jit(objective.next_control)
        whole, more = (learn(*x) for x in ((stats, scored), padded(stats, scored)))
        chex.assert_trees_all_close(more, whole, atol=1e-6)


@methods("mpo", "copg", "trpa", "lpo-forward/js/sparsemax")
def test_item_1_permuting_responses_and_prompts(name):
    objective, stats, scored = case(name, seed=10, off=0.2)
    prompts, responses = np.array([2, 0, 1]), np.array([3, 1, 0, 2])

    def move(x):
        if np.ndim(x) < 2:
            return np.asarray(x)[prompts] if np.ndim(x) else x
        return np.asarray(x)[prompts][:, responses % np.shape(x)[1]]

    control = scored.control
    moved = jax.tree.map(move, (stats, scored.replace(control=None)))
    loss, _, gradient = run(objective, stats, scored)
    loss2, _, gradient2 = run(objective, moved[0], moved[1].replace(control=control))
    np.testing.assert_allclose(loss2, loss, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient2, gradient[prompts][:, responses], rtol=1e-3, atol=1e-6)
    assert np.abs(gradient).max() > 1e-4


@methods("tpo", "gvpo", "flowrl", "trpa", "capo-calibration", "lpo-forward/alpha/entmax")
def test_item_4_nothing_to_learn_from_is_finite(name):
    objective, stats, scored = case(name, seed=13)
    for empty in (
        scored.replace(mask=np.zeros_like(scored.mask)),
        scored.replace(rewards=np.full_like(scored.rewards, np.nan)),
        scored.replace(valid=np.eye(3, 4, dtype=bool)),  # one response each
    ):
        _, metrics, gradient = run(objective, stats, empty)
        chex.assert_tree_all_finite(metrics)
        np.testing.assert_array_equal(gradient, 0)
    extreme = scored.replace(rewards=put(scored.rewards, np.s_[:2, 0], np.float32(1e30)))
    _, metrics, gradient = run(objective, stats, extreme)
    chex.assert_tree_all_finite((metrics, gradient))


@pytest.mark.parametrize(
    "name", ["tpo", "gvpo", "copg", "lpo-forward/js/sparsemax", "lpo-forward/alpha/entmax"]
)
def test_item_5_coefficients_sum_to_zero(name):
    objective, stats, scored = case(name)
    c = objective.listwise(stats, scored).coefficients
    np.testing.assert_allclose(c.sum(-1), 0, atol=1e-5 * np.abs(c).max())


@in_float64
def test_item_9_on_policy_gvpo_is_the_policy_gradient_of_sum_scores():
    objective, stats, scored = case("gvpo", off=0, dtype=np.float64)
    scored = scored.replace(anchor_logp=None)
    policy_gradient = O.get("grpo", temperature=0.1, aggregation="seq-mean-token-sum")
    np.testing.assert_allclose(
        *(run_jitted(method, stats, scored)[2] for method in (objective, policy_gradient)),
        rtol=1e-9,
        atol=1e-12,
    )


# Every option of every row that is not one of the shared parts', and a value that must change the gradient.
CHANGES = {
    "mpo": {
        "kl_budget": 0.3,
        "score": "mean",
        "target": "sparsemax",
        "divergence": "forward-kl",
        "degenerate": "mask",
    },
    "gvpo": {"temperature": "grpo", "divergence": "reverse-kl", "score": "mean", "degenerate": "mask"},
    "flowrl": {"temperature": 1.0, "ddof": 1, "reward_scale": 1.0, "degenerate": "mask"},
    "trpa": {"preference_beta": 1.0, "anisotropy": 1.0, "kl_coef": 1.0, "degenerate": "mask"},
    "real": {"label_loss": "bce", "label_temperature": 1.0, "degenerate": "mask"},
    "capo-calibration": {"ranking_temperature": 0.3, "ppl_correct_max": 100.0, "ppl_wrong_min": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_no_dead_option(name):
    objective, stats, scored = case(name)
    default = run(objective, stats, scored)[2]
    for option, value in CHANGES[name].items():
        changed = run(O.get(name, **{option: value}), stats, scored)[2]
        assert np.abs(default - changed).max() > 1e-5, option


def test_flowrl_log_z_rate_changes_what_is_learnt():
    objective, stats, scored = case("flowrl")
    slow = O.get("flowrl", log_z_rate=0.01)
    step, slow_step = (np.asarray(o.next_control(stats, scored)["bias"]) for o in (objective, slow))
    before = scored.control["bias"]
    np.testing.assert_allclose(step - before, 10 * (slow_step - before), rtol=1e-3)


@pytest.mark.parametrize("name,missing", [("copg", "stats.ref_logp"), ("flowrl", "scored.control")])
def test_what_is_missing_is_named(name, missing):
    objective, stats, scored = case(name)
    holder, field = missing.split(".")
    stats = stats.replace(**{field: None}) if holder == "stats" else stats
    scored = scored.replace(**{field: None}) if holder == "scored" else scored
    with pytest.raises(ValueError, match=f"{name} needs {missing}, which is None"):
        objective(stats, scored)


@pytest.mark.parametrize("name", ["mpo", "flowrl", "trpa"])
def test_jitted_in_one_trace(name):
    objective, stats, scored = case(name)
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(lambda o, *args: jax.grad(lambda s: o(s, args[1])[0])(args[0]), n=1),
        static_argnums=0,
    )
    for seed in (0, 1):
        fresh = case(name, seed=seed)
        gradient = step(fresh[0], *fresh[1:])
    np.testing.assert_allclose(gradient.logp, run(*fresh)[2], rtol=1e-4, atol=1e-6)


def test_the_levels_of_preferences_without_malformed_are_two():
    R, s = np.array([[1.0, 0.0, 0.0]]), np.array([[0.2, -0.1, 0.4]])
    got = Preferences().value(_context(R, np.ones(R.shape, bool)), R, s, None)
    np.testing.assert_allclose(got, _trpa([1, 3, 3], s[0]), rtol=1e-5)
