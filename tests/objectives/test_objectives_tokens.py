"""Credit and weights of tokens, and the methods made of them, against numpy twins."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
    all_but,
    full_batch,
    in_float64,
    on_host,
    padded,
    put,
    run,
    run_jitted,
    small,
    some,
)

from lpo_jax import objectives as O
from lpo_jax.objectives import advantage, entropy_adaptive, weights
from lpo_jax.objectives.methods import tokens as rows
from lpo_jax.objectives.trust import Gate

NAMES = [row.objective.name for row in rows.METHODS]


def context_of(stats, scored, **changes):
    """What parts see of a batch in which every response is valid."""
    scored = scored.replace(**changes)
    tokens = jnp.asarray(scored.mask)
    delta = jnp.where(tokens, stats.logp - scored.behaviour_logp, 0)
    return O.Context(jnp.asarray(scored.rewards), tokens.any(-1), tokens, delta, stats, scored)


def case(seed=0, dtype=np.float64, **options):
    """(context, m, rewards and u in numpy)."""
    stats, scored = full_batch(seed, dtype=dtype, **options)
    R = np.asarray(scored.rewards)
    return context_of(stats, scored), np.asarray(scored.mask), R, R - R.mean(-1, keepdims=True)


def standardised(x, m):
    """Per group over its tokens."""
    out = np.zeros(x.shape)
    for p in range(len(x)):
        values = x[p][m[p]]
        out[p][m[p]] = (values - values.mean()) / max(values.std(), 1e-6)
    return out


# Credit


@in_float64
def test_entropy_cost_against_numpy():
    context, m, _, u = case()
    H = np.array([[h[mask].mean() for h, mask in zip(*group)] for group in zip(context.stats.entropy, m)])
    limit = np.median(H)
    got = advantage.EntropyCost(0.3, limit)(context, u, None)
    chex.assert_shape(got, (3, 4, 1))
    np.testing.assert_allclose(got[..., 0], np.where(limit >= H, u - 0.3 * H, 0), rtol=1e-12)
    assert 0 < (np.asarray(got) == 0).mean() < 1


@in_float64
def test_progress_and_step_penalty_against_numpy():
    context, m, _, u = case()
    prog = np.asarray(context.scored.credit)
    got = advantage.Progress(0.7)(context, u, None)
    np.testing.assert_allclose(got, u[..., None] + 0.7 * standardised(prog, m), rtol=1e-9, atol=1e-12)
    wrong = (prog > 0.6).astype(float)
    context = context_of(context.stats, context.scored, credit=wrong)
    got = np.asarray(advantage.StepPenalty(0.5)(context, u, None))
    np.testing.assert_allclose(got, standardised(u[..., None] - 0.5 * wrong, m), rtol=1e-9, atol=1e-12)
    assert (got[0][(wrong[0] == 1) & m[0]].mean()) < got[0][(wrong[0] == 0) & m[0]].mean()
    # Without a wrong step, a group of equal rewards has no signal.
    context = context_of(context.stats, context.scored, credit=np.zeros_like(prog))
    np.testing.assert_array_equal(advantage.StepPenalty()(context, u, None)[2], 0)


def brpo_twin(r, w):
    """The loops of the public code, for one group [K,S]."""
    K, S = r.shape
    A = np.zeros((K, S))
    for k in range(K):
        for s in range(S):
            group = (r[:, s:] * w[s:]).sum(-1).mean()
            twice = 2.0 ** np.arange(s)
            own = (r[k, :s] * twice).sum() / twice.sum() * w[s:].sum() if s else 0
            A[k, s] = (r[k, s:] * w[s:]).sum() - (s * own + (S - s) * group) / S
    return A


returns = on_host(lambda part, *inputs: part(*inputs), static_argnums=0)


@pytest.mark.parametrize("weights,w", [("linear", [1, 2, 3]), ("uniform", [1, 1, 1]), ("last", [0, 0, 1])])
@in_float64
def test_anytime_returns_against_the_public_loops(weights, w):
    """Segments of 2 of the 6 tokens; what a short response did not live to is its own reward."""
    context, m, R, u = case(seed=1)
    part = advantage.AnytimeReturns(budgets=3, budget_weights=weights, max_tokens=6)
    r = np.random.default_rng(0).random((3, 4, 3))
    segment = np.arange(6) // 2
    reached = np.stack([m[..., segment == s].any(-1) for s in range(3)], -1)
    assert not reached.all()
    context = context_of(context.stats, context.scored, credit=np.where(m, r[..., segment], np.nan))
    r = np.where(reached, r, R[..., None])
    tau = np.full((3, 1), 0.5)
    expected = np.stack([brpo_twin(group, np.array(w) / sum(w)) for group in r])[..., segment] / 0.5
    np.testing.assert_allclose(returns(part, context, u, tau), expected, rtol=1e-9, atol=1e-12)


@in_float64
def test_anytime_returns_with_one_budget_are_the_reward():
    context, m, R, u = case(seed=1)
    context = context_of(context.stats, context.scored, credit=np.broadcast_to(R[..., None], m.shape))
    got = returns(advantage.AnytimeReturns(budgets=1, max_tokens=6), context, u, np.ones((3, 1)))
    np.testing.assert_allclose(got, np.broadcast_to(u[..., None], m.shape), rtol=1e-9, atol=1e-12)


# Token weights


@in_float64
def test_top_entropy_and_impact_against_numpy():
    context, m, _, u = case()
    H = np.asarray(context.stats.entropy)
    for share in (0.2, 0.5, 1.0):
        got = weights.TopEntropy(share)(context, u)
        np.testing.assert_array_equal(got, m & (np.quantile(H[m], 1 - share) <= H))
    impact = np.abs(u)[..., None] * H
    for progress, share in ((0, 0.3), (0.5, 0.55), (1, 0.8)):
        context = context_of(context.stats, context.scored, progress=progress)
        got = weights.TopImpact(0.3, 0.8)(context, u)
        np.testing.assert_array_equal(got, m & (impact >= np.quantile(impact[m], 1 - share)))


@in_float64
def test_curvature_mask_against_numpy():
    """|e - pi|^2 from the whole distribution, and the most bent tokens rejected."""
    rng = np.random.default_rng(0)
    pi = rng.dirichlet(np.ones(7) / 2, (3, 4, 6))
    token = rng.integers(0, 7, (3, 4, 6))
    context, m, _, u = case()
    logp = np.log(np.take_along_axis(pi, token[..., None], -1)[..., 0])
    stats = context.stats.replace(logp=logp, collision=(pi**2).sum(-1))
    context = context_of(stats, context.scored)
    error = ((np.eye(7)[token] - pi) ** 2).sum(-1)
    bend = u[..., None] ** 2 * error * np.asarray(stats.hidden_norm) ** 2
    got = weights.CurvatureMask(0.25)(context, u)
    np.testing.assert_array_equal(got, m & (bend <= np.quantile(bend[m], 0.75)))
    np.testing.assert_array_equal(weights.CurvatureMask(0.0)(context, u), m)


def conflicts_twin(ids, m, above, weight):
    """One group, token by token."""
    K, T = ids.shape
    n = m.sum(-1)
    out = np.ones((K, T))
    hit = np.zeros((K, T), bool)
    for back in (False, True):
        place = (lambda k, i: n[k] - 1 - i) if back else (lambda k, i: i)
        for k in range(K):
            for i in range(n[k]):
                same = [j for j in range(K) if i < n[j] and ids[j, place(j, i)] == ids[k, place(k, i)]]
                if not (any(above[j] > 0 for j in same) and any(above[j] < 0 for j in same)):
                    break
                hit[k, place(k, i)] = True
                if above[k] != 0:
                    out[k, place(k, i)] *= weight if above[k] > 0 else 0
    return out * m / np.where(above != 0, np.maximum(hit.sum(-1), 1), 1)[:, None]


conflicts = on_host(lambda context: weights.Conflicts(3.0)(context, context.rewards))


@hypothesis.given(st.integers(0, 10**6))
@small
def test_conflicts_against_numpy(seed):
    context, m, R, _ = case(seed, dtype=np.float32)
    ids = np.random.default_rng(seed).integers(0, 2, m.shape).astype(np.int32)
    got = conflicts(context_of(context.stats, context.scored, token_ids=ids))
    expected = [conflicts_twin(ids[p], m[p], (R - R.mean(-1, keepdims=True))[p], 3.0) for p in (0, 1)]
    np.testing.assert_allclose(got[:2], expected, rtol=1e-6)
    np.testing.assert_array_equal(got[2], m[2])  # equal rewards: nobody is above


def test_conflicts_by_hand():
    """Good "1 2 3 9", bad "1 2 4 5 9": two tokens shared from the start, one from the end, whatever the lengths."""
    context, m, _, _ = case(dtype=np.float32)
    ids, mask, rewards = np.zeros(m.shape, np.int32), np.zeros_like(m), np.zeros((3, 4), np.float32)
    ids[0, :2] = [[1, 2, 3, 9, 0, 0], [1, 2, 4, 5, 9, 0]]
    mask[0, :2] = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    rewards[0, 0] = 1
    got = conflicts(context_of(context.stats, context.scored, token_ids=ids, mask=mask, rewards=rewards))
    np.testing.assert_allclose(3 * got[0, :2], [[3, 3, 1, 3, 0, 0], [0, 0, 1, 1, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(got[1:], 0)


def test_a_response_at_the_mean_has_no_conflict():
    """Good, bad and middle all begin "1 2": the middle one keeps its whole weight, as in the public code."""
    context, m, _, _ = case(dtype=np.float32)
    ids, mask, rewards = np.zeros(m.shape, np.int32), np.zeros_like(m), np.zeros((3, 4), np.float32)
    ids[0, :3] = [[1, 2, 3, 0, 0, 0], [1, 2, 4, 0, 0, 0], [1, 2, 5, 0, 0, 0]]
    mask[0, :3, :3] = 1
    rewards[0, :3] = [1, 0, 0.5]
    valid = np.array([[1, 1, 1, 0]] * 3, bool)
    changed = context_of(
        context.stats, context.scored, token_ids=ids, mask=mask, rewards=rewards, valid=valid
    )
    np.testing.assert_allclose(
        conflicts(changed)[0, :3, :3], [[1.5, 1.5, 0.5], [0, 0, 0.5], [1, 1, 1]], rtol=1e-6
    )


def test_untaught_responses():
    context, m, _, u = case(dtype=np.float32)
    got = weights.Untaught()(context, u)
    np.testing.assert_array_equal(got, m & ~context.scored.teacher.valid[..., None])


@in_float64
def test_truncated_importance_against_numpy():
    context, m, _, u = case(off=0.5)
    behaviour, sampler = context.scored.behaviour_logp, context.scored.sampler_logp
    got = np.asarray(weights.TruncatedImportance(1.2)(context, u))
    ratio = [exp if m[i] else 0 for i, exp in np.ndenumerate(np.exp(behaviour - sampler))]
    np.testing.assert_allclose(got.ravel(), np.clip(ratio, 0, 1.2), rtol=1e-12)
    assert (got[m] == 1.2).any() and (got[m] < 1).any()


def test_truncated_importance_weighs_the_gradient_token_by_token():
    """In any method: the gradient of a token is multiplied by its ratio, padding with garbage left out."""
    stats, scored = padded(*full_batch())
    ratio = np.exp(np.where(scored.mask, scored.behaviour_logp - scored.sampler_logp, 0))

    def gradient(**parts):
        return run_jitted(O.get("dr-grpo", max_tokens=6, **parts), stats, scored)[2]

    got = gradient(token_weight="truncated-importance", importance_cap=1.1)
    np.testing.assert_allclose(got, gradient() * np.minimum(ratio, 1.1), rtol=1e-5, atol=1e-8)


# HAPO


def relative_entropy_twin(H, m, pivot):
    log_H = np.log(H)
    middle = np.quantile(log_H[m], pivot, method="nearest")
    h = np.where(m, log_H - middle, 0)
    return np.where(h > 0, h / max(h.max(), 1e-30), h / max(-h.min(), 1e-30))


@in_float64
def test_relative_entropy_against_numpy():
    context, m, _, _ = case()
    for pivot in (0.0, 0.5, 0.8, 1.0):
        got = np.asarray(entropy_adaptive.relative_entropy(context, pivot))
        np.testing.assert_allclose(
            got, relative_entropy_twin(np.asarray(context.stats.entropy), m, pivot), rtol=1e-9
        )
        assert got.min() == (0 if pivot == 0 else -1) and got.max() == (0 if pivot == 1 else 1)
    flat = context_of(context.stats.replace(entropy=np.full(m.shape, 0.4)), context.scored)
    np.testing.assert_array_equal(entropy_adaptive.relative_entropy(flat, 0.8), 0)


@in_float64
def test_token_level_utility_against_numpy():
    context, m, R, _ = case(seed=2)
    got, tau = entropy_adaptive.TokenLevelUtility(ddof=1, most_utility=100.0)(context)
    plain, _ = entropy_adaptive.TokenLevelUtility(temperature=0.5)(context)
    for p in range(3):
        by_token = np.repeat(R[p], m[p].sum(-1))
        np.testing.assert_allclose(
            got[p], (R[p] - by_token.mean()) / max(by_token.std(), 1e-6), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(plain[p], (R[p] - by_token.mean()) / 0.5, rtol=1e-9, atol=1e-9)
    # A group with an extreme response falls back to its plain statistics, as a whole.
    limit = float(np.abs(got[0]).max()) - 1e-9
    mended, tau = entropy_adaptive.TokenLevelUtility(ddof=1, most_utility=limit)(context)
    np.testing.assert_allclose(mended[0], (R[0] - R[0].mean()) / R[0].std(ddof=1), rtol=1e-9)
    np.testing.assert_allclose(tau[0], R[0].std(ddof=1), rtol=1e-9)
    assert np.abs(mended[0] - got[0]).max() > 1e-3


@in_float64
def test_hapo_clip_and_weight_against_numpy():
    context, m, _, _ = case(seed=3, off=0.4)
    h = relative_entropy_twin(np.asarray(context.stats.entropy), m, 0.8)
    rho = np.exp(np.asarray(context.delta))
    low, high = 0.2 * np.where(h <= 0, 1 - h, 1), 0.3 * np.where(h > 0, 1 + h, 1)
    gate = entropy_adaptive.EntropyClip(0.2, 0.3, dual_clip=1.5)
    for c in (-0.4, 0.7):
        phi = np.maximum(c * rho, c * np.clip(rho, 1 - low, 1 + high))
        phi = np.minimum(phi, c * 1.5) if c > 0 else phi
        np.testing.assert_allclose(gate(context.delta, jnp.full((1, 1, 1), c), context), phi, rtol=1e-9)
    inside = (rho > 1 - low / 2) & (rho < 1 + high / 2)
    weight = np.where((h > 0) & ~inside | (h <= 0) & inside, 1 + 0.6 * h, 1)
    part = entropy_adaptive.EntropyWeight(0.2, 0.3, weight_growth=0.6)
    np.testing.assert_allclose(part(context, None), weight, rtol=1e-9)
    assert len(np.unique(np.round(weight[m], 6))) > 3


def test_item_15_at_no_movement_the_entropy_clip_passes_c():
    stats, scored = full_batch(off=0)
    context = context_of(stats, scored)
    c = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4, 1)
    for gate in (entropy_adaptive.EntropyClip(), entropy_adaptive.EntropyClip(dual_clip=10.0)):
        slope = jax.grad(lambda d, g=gate: g(d, c, context).sum())(context.delta)
        np.testing.assert_allclose(slope, np.broadcast_to(c, slope.shape), rtol=1e-6)


# Whole methods


@in_float64
def test_token_coefficients_reach_the_gradient():
    """gradient = W weight c, c [P,K,T] = -u / K of the credit, for an ungated composition."""
    stats, scored = full_batch(seed=4, dtype=np.float64)
    objective = O.Objective(
        "x",
        advantage=O.Advantage(temperature=1.0),
        credit=advantage.Progress(),
        gate=Gate(),
        token_weight=weights.TopEntropy(0.5),
    )
    gradient = run(objective, stats, scored)[2]
    R, m = np.asarray(scored.rewards), np.asarray(scored.mask)
    u = (R - R.mean(-1, keepdims=True))[..., None] + standardised(np.asarray(scored.credit), m)
    kept = m & (np.quantile(stats.entropy[m], 0.5) <= stats.entropy)
    np.testing.assert_allclose(
        gradient, -u / 4 * kept / (3 * m.sum(-1, keepdims=True)), rtol=1e-9, atol=1e-12
    )


def made(name, **options):
    """A method whose response budget is the batch's, and whose penalty can be seen beside its rewards."""
    known = O.names()[name]["options"]
    return O.get(
        name, **{k: v for k, v in {"max_tokens": 6, "mirror_coef": 0.5}.items() if k in known} | options
    )


BATCH = full_batch(seed=5, off=0.2)


@pytest.mark.parametrize("name", some(NAMES, "hapo", "d3s", "grpo-vps", "capo-curvature", "gbmpo-l2kl"))
def test_item_1_padding_changes_nothing(name):
    """More prompts, responses and tokens, NaN in every float of theirs and in the places after a response's end."""
    stats, scored = BATCH
    loss, metrics, gradient = run(made(name), stats, scored)
    loss2, metrics2, gradient2 = run_jitted(made(name), *padded(stats, scored))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2[:3, :4, :6], gradient, rtol=1e-5, atol=1e-7)
    outside = np.pad(np.asarray(scored.mask), ((0, 1), (0, 2), (0, 3))) == 0
    np.testing.assert_array_equal(np.asarray(gradient2)[outside], 0)
    assert np.abs(gradient).max() > 1e-3
    for key in metrics.keys() - {"lpo/masked_response_frac"}:
        np.testing.assert_allclose(metrics2[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", some(NAMES, "hapo", "gtpo", "earl", "capo-curvature", "gbmpo-probl2kl"))
def test_item_4_nothing_to_learn_from_is_finite(name):
    stats, scored = BATCH
    for empty in (
        scored.replace(mask=np.zeros_like(scored.mask)),
        scored.replace(rewards=np.full_like(scored.rewards, np.nan)),
        scored.replace(valid=put(np.zeros((3, 4), bool), np.s_[:, 0], True)),
    ):
        loss, metrics, gradient = run(made(name), stats, empty)
        assert loss == 0
        chex.assert_tree_all_finite(metrics)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "name",
    all_but(
        ["hapo", "gtpo", "d3s", "capo-curvature", "brpo", "gbmpo-mirror"],
        *("hapo", "gtpo", "d3s", "brpo", "gbmpo-mirror"),
    ),
)
def test_jitted_in_float64_is_the_same(name):
    stats, scored = BATCH
    loss, _, gradient = run(made(name), stats, scored)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, (stats, scored))
        (loss64, _), gradient64 = jax.jit(jax.value_and_grad(made(name), has_aux=True))(*wide)
    assert gradient64.logp.dtype == np.float64
    np.testing.assert_allclose(loss, loss64, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, gradient64.logp, rtol=1e-4, atol=1e-6)


# Every option of these methods' own parts: a method that has it, a value that must change its gradient, and what
# that takes.
CHANGES = {
    "entropy_cost": ("gtpo", 0.5, {"entropy_limit": 9.0}),
    "entropy_limit": ("gtpo", 0.3, {}),
    "conflict_weight": ("gtpo", 5.0, {}),
    "top_tokens": ("earl", 0.6, {}),
    "tokens_initial": ("d3s", 0.9, {}),
    "tokens_final": ("d3s", 0.05, {"tokens_initial": 0.9}),
    "reject_tokens": ("capo-curvature", 0.5, {}),
    "step_penalty": ("capo-credit", 3.0, {}),
    "temperature": ("capo-credit", 0.2, {}),
    "progress_weight": ("grpo-vps", 0.1, {}),
    "budgets": ("brpo", 2, {}),
    "budget_weights": ("brpo", "last", {}),
    "max_tokens": ("brpo", 12, {}),
    "most_utility": ("hapo", 0.5, {}),
    "ddof": ("hapo", 0, {"most_utility": 0.5}),
    "dual_clip": ("hapo", 1.01, {}),
    "entropy_pivot": ("hapo", 0.3, {}),
    "clip_growth": ("hapo", 0.0, {"epsilon_low": 0.1, "epsilon_high": 0.1}),
    "weight_growth": ("hapo", 0.1, {}),
    "mirror_coef": ("gbmpo-l2", 50.0, {}),
    "mirror": ("gbmpo-mirror", tuple(np.linspace(0.1, 2, 380)), {"mirror_coef": 50.0}),
    "mirror_seed": ("gbmpo-mirror", 7, {"mirror_coef": 1e5}),
    "kl_coef": ("gbmpo-l2kl", 2.0, {}),
    "kl": ("gbmpo-probl2kl", "k1", {"kl_coef": 2.0}),
}
OTHERS = {
    "centre",
    "temperature_floor",
    "aggregation",
    "degenerate",
    "epsilon_low",
    "epsilon_high",
}  # tested as such
OF_HOOKS = {"judge", "segments", "cue", "summaries", "summary_tokens", "responses_initial", "responses_final"}


def test_every_option_has_a_change():
    assert {o for n in NAMES for o in O.names()[n]["options"]} == CHANGES.keys() | OTHERS | OF_HOOKS


@pytest.mark.slow
@pytest.mark.parametrize("option", CHANGES)
def test_no_dead_option(option):
    name, value, others = CHANGES[option]
    stats, scored = full_batch(seed=5, off=0.3)
    scored = scored.replace(token_ids=np.minimum(scored.token_ids, 1))  # so that responses share tokens
    default = run(made(name, **others), stats, scored)[2]
    changed = run(made(name, **others | {option: value}), stats, scored)[2]
    assert np.abs(default - changed).max() > 1e-4


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("gbmpo-mirror", {"mirror": [1.0, 2.0]}, "mirror must be 380 numbers, or the path of a file"),
        ("gbmpo-mirror", {"mirror": [-1.0] * 380}, "mirror must hold finite numbers that are not negative"),
        ("gbmpo-l2kl", {"kl": "k4"}, "kl must be one of 'k1', 'k2', 'k3', 'abs', got 'k4'"),
        ("brpo", {"budget_weights": "lineer"}, "did you mean 'linear'?"),
        ("grpo-vps", {"cue": 3}, "cue must be a text, got 3"),
        ("earl", {"top_tokens": 1.2}, "top_tokens must be a number, 0 to 1, got 1.2"),
    ],
)
def test_errors_are_one_line(name, options, says):
    with pytest.raises(ValueError) as error:
        O.get(name, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_needs_are_named():
    for name, field in {
        "earl": "entropy",
        "gtpo": "token_ids",
        "d3s": "progress",
        "capo-curvature": "collision",
        "grpo-vps": "credit",
        "gbmpo-l2": "ref_logp",
    }.items():
        stats, scored = BATCH
        assert field in O.names()[name]["needs"]
        stats, scored = (
            record.replace(**{field: None}) if field in vars(record) else record for record in (stats, scored)
        )
        with pytest.raises(ValueError, match=rf"{name} needs .*\.{field}, which is None"):
            O.get(name)(stats, scored)
