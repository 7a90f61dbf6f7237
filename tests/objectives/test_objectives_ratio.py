"""The methods of methods/ratio.py as wholes (METHODS 4.4 items 1, 4, 16, 18), and what only one of them has."""

import dataclasses
import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import full_batch, in_float64, padded, put, run, run_jitted, small, some

from lpo_jax import objectives as O
from lpo_jax.objectives.methods import ratio
from lpo_jax.objectives.regular import PreviousKL, RatioVarianceDual
from lpo_jax.objectives.sequence_gates import GeometricClip, PrefixWeightClip, SequenceClip
from lpo_jax.objectives.trust import ClipCov, Ratio, TargetRatio, first_in_order

# Ranges tight enough that small minibatches reach them.
TIGHT = {
    "gspo": {"epsilon_low": 0.02, "epsilon_high": 0.02},
    "nft": {"max_tokens": 6},
    "clip-cov": {"cov_low": 0.1, "cov_fraction": 0.1},
    "kl-cov": {"cov_fraction": 0.1},
}
NAMES = [row.objective.name for row in ratio.METHODS]
OBJECTIVES = {name: O.get(name, **TIGHT.get(name, {})) for name in NAMES}
OBJECTIVES["dhpo/entropy"] = O.get("dhpo", token_share="entropy")


def objectives(*default):
    return pytest.mark.parametrize("name", some(OBJECTIVES, *default))


def test_the_names():
    assert set(NAMES) == {
        *("gspo", "gmpo", "cispo", "minpro", "sapo", "dhpo", "fiberpo", "apc", "r2vpo", "gbpo"),
        *("nft", "topr", "etr", "mdpo", "clip-cov", "kl-cov"),
    }


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@objectives("gspo", "fiberpo", "mdpo", "clip-cov")
def test_item_1_padding_changes_nothing(name, garbage):
    objective = OBJECTIVES[name]
    stats, scored = full_batch(seed=1, off=0.3, objective=objective)
    loss, metrics, gradient = run(objective, stats, scored)
    loss2, metrics2, gradient2 = run_jitted(objective, *padded(stats, scored, garbage=garbage))
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2[:3, :4, :6], gradient, rtol=1e-5, atol=1e-7)
    outside = np.pad(np.asarray(scored.mask), ((0, 1), (0, 2), (0, 3))) == 0
    np.testing.assert_array_equal(np.asarray(gradient2)[outside], 0)
    for key in metrics.keys() - {"lpo/masked_response_frac"}:
        np.testing.assert_allclose(metrics2[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


@objectives("gmpo", "minpro", "etr", "clip-cov", "kl-cov", "dhpo/entropy")
def test_item_1_permuting_responses_and_prompts(name):
    objective = OBJECTIVES[name]
    stats, scored = full_batch(seed=2, off=0.3, objective=objective)
    order = np.ix_([2, 0, 1], [3, 1, 0, 2])
    # clip-cov draws by the log-prob, so that a token is drawn wherever it stands.
    gradient = run(objective, stats, scored)[2]

    def permuted(x):
        x = np.asarray(x)
        return x[order] if x.shape[:2] == (3, 4) else x[[2, 0, 1]] if x.shape[:1] == (3,) else x

    gradient2 = run(objective, *jax.tree.map(permuted, (stats, scored)))[2]
    np.testing.assert_allclose(gradient2, gradient[order], rtol=1e-4, atol=1e-7)


@objectives("sapo", "nft", "topr", "kl-cov")
def test_item_4_equal_rewards_and_no_responses(name):
    objective = OBJECTIVES[name]
    on_policy, scored = full_batch(seed=3, off=0, objective=objective)
    gradient = run(objective, on_policy, scored)[2]
    assert np.abs(gradient[0]).max() > 1e-3
    if name != "topr":  # it has no baseline: all of a group may be pushed up or down
        np.testing.assert_array_equal(gradient[2], 0)
    for empty in (
        scored.replace(mask=np.zeros_like(scored.mask)),
        scored.replace(valid=put(np.zeros((3, 4), bool), np.s_[:, 0], True)),
        scored.replace(rewards=np.full_like(scored.rewards, np.nan)),
    ):
        loss, metrics, gradient = run(objective, on_policy, empty)
        assert loss == 0
        chex.assert_tree_all_finite(metrics)
        np.testing.assert_array_equal(gradient, 0)


@objectives("gspo", "dhpo", "gbpo", "r2vpo", "clip-cov")
def test_an_unusable_response_is_as_good_as_absent(name):
    objective = OBJECTIVES[name]
    stats, scored = full_batch(seed=4, off=0.3, objective=objective)
    absent = run(objective, stats, scored.replace(mask=put(scored.mask, np.s_[:, 3], False)))
    broken = run(objective, stats, scored.replace(rewards=put(scored.rewards, np.s_[:, 3], np.inf)))
    np.testing.assert_allclose(broken[0], absent[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(broken[2], absent[2], rtol=1e-4, atol=1e-7)
    assert np.abs(absent[2]).max() > 0


@pytest.mark.parametrize(
    "name",
    some(
        [n for n in OBJECTIVES if n not in ("nft", "topr", "gbpo")],
        *("gspo", "cispo", "sapo", "dhpo", "mdpo", "clip-cov"),
    ),
)
@in_float64
def test_item_15_on_policy_they_are_grpo(name):
    """Whatever the trust region: before the policy has moved it is the same step, from the same advantage."""
    aggregate = OBJECTIVES[name].aggregate.aggregation
    stats, scored = full_batch(seed=5, off=0, dtype=np.float64, objective=OBJECTIVES[name])
    if name == "mdpo":
        stats = stats.replace(top_logp=scored.teacher.logp)
    expected = run(O.get("grpo", aggregation=aggregate), stats, scored)[2]
    options = {"cov_low": 1e6, "cov_high": 2e6} if name == "clip-cov" else {}
    objective = O.get(name.partition("/")[0], **options)
    if name == "dhpo/entropy":
        objective = OBJECTIVES[name]
    np.testing.assert_allclose(run(objective, stats, scored)[2], expected, rtol=1e-9, atol=1e-15)
    assert np.abs(expected).max() > 1e-3


GATE_OPTIONS = [
    (row.objective.name, field.name)
    for row in ratio.METHODS
    for field in dataclasses.fields(row.objective.gate)
]
# A value that must change the gradient; where it depends on the method, by (method, option).
CHANGES = {
    ("gspo", "epsilon_low"): 0.9,
    ("gspo", "epsilon_high"): 0.9,
    ("cispo", "epsilon_low"): 0.1,
    ("minpro", "epsilon_low"): 0.1,
    "epsilon_low": 0.05,
    "epsilon_high": 0.05,
    "dual_clip": 1.01,
    "advantage_stretch": 0.0,
    "variance_stretch": 0.0,
    "tau_pos": 3.0,
    "tau_neg": 3.0,
    "target_temperature": 1.0,
    "negative_floor": 0.5,
    "negative_weight": 0.5,
    "log_epsilon_low": 0.1,
    "log_epsilon_high": 0.1,
    "token_share": 0.1,
    "sequence_epsilon_low": 0.9,
    "sequence_epsilon_high": 0.9,
    "base_epsilon": 0.01,
    "fiber_epsilon": 0.01,
    "variation_budget": 0.01,
    "cov_low": 0.5,
    "cov_high": 0.2,
    "cov_fraction": 0.5,
    "cov_kl_coef": 2.0,
}


@functools.cache
def default_gradient(name):
    """(statistics, responses, gradient) of a method with its default options."""
    stats, scored = full_batch(seed=6, off=0.4, objective=OBJECTIVES[name])
    return stats, scored, run(OBJECTIVES[name], stats, scored)[2]


@pytest.mark.slow
@pytest.mark.parametrize("name,option", GATE_OPTIONS)
def test_no_dead_option(name, option):
    stats, scored, gradient = default_gradient(name)
    changed = O.get(name, **TIGHT.get(name, {}) | {option: CHANGES.get((name, option), CHANGES.get(option))})
    assert np.abs(gradient - run(changed, stats, scored)[2]).max() > 1e-5


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("grpo", {"dual_clip": 0.5}, "dual_clip must be 0 (off) or a number greater than 1, got 0.5"),
        ("cispo", {"epsilon_low": 1.5}, "epsilon_low must be a number greater than 0, 1 at most, got 1.5"),
        (
            "dhpo",
            {"token_share": "entropi"},
            "token_share must be 'entropy' or a number, 0 to 1, got 'entropi'",
        ),
        ("clip-cov", {"cov_low": "high"}, "cov_low must be a number, got 'high'"),
        ("gspo", {"dual_clip": True}, "got True"),
    ],
)
def test_bad_options(name, options, says):
    with pytest.raises(ValueError) as error:
        O.get(name, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_they_need():
    assert {n: o.needs for n, o in OBJECTIVES.items() if o.needs} == {
        "r2vpo": {"control"},
        "mdpo": {"top_logp", "teacher", "progress"},
        "dhpo/entropy": {"entropy"},
    }
    stats, scored = full_batch()
    with pytest.raises(ValueError, match=r"r2vpo needs scored\.control, which is None"):
        O.get("r2vpo")(stats, scored)


# --- identities between methods


@pytest.mark.parametrize("weight", ["dr-grpo", "grpo"])
@in_float64
def test_item_18_on_policy_nft_is_grpo_or_dr_grpo(weight):
    """NFT (1 - p) = Dr. GRPO and NFT sqrt((1 - p) / p) = GRPO, on verdicts of 0 and 1, and only on-policy."""
    same = {"aggregation": "seq-mean-token-sum-norm", "max_tokens": 7, "degenerate": "mask"}
    nft, grpo = O.get("nft", nft_weight=weight, **same), O.get(weight, **same)
    gradients = []
    for off in (0, 0.1):
        stats, scored = full_batch(seed=7, off=off, dtype=np.float64)
        scored = scored.replace(passed=scored.rewards > 0.3)
        scored = scored.replace(rewards=scored.passed.astype(np.float64))
        gradients.append([run(o, stats, scored)[2] for o in (nft, grpo)])
    np.testing.assert_allclose(*gradients[0], rtol=1e-9, atol=1e-15)
    assert np.abs(gradients[0][0]).max() > 1e-3
    assert np.abs(np.subtract(*gradients[1])).max() > 1e-4


@in_float64
def test_nft_against_the_public_loss():
    """NVlabs' lines in numpy: (1 - p) times -log rho, or -log of the clamped proxy with a straight-through gradient."""
    stats, scored = full_batch(seed=8, off=0.4, dtype=np.float64)
    passed = np.array([[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    m = np.asarray(scored.mask)
    rho = np.exp(np.where(m, stats.logp - scored.behaviour_logp, 0))
    p = passed.mean(-1)[:, None, None].clip(0.02, 0.98)
    proxy = (1 - p * rho) / (1 - p)
    clamped = np.maximum(proxy, 1)
    loss = np.where(passed[..., None], -np.log(rho), -np.log(clamped)) * (1 - p) * m / 1000
    slope = np.where(passed[..., None], -1, p * rho / (1 - p) / clamped) * (1 - p) * m / 1000
    got, _, gradient = run(O.get("nft"), stats, scored.replace(passed=passed))
    # The last group passes whole and is dropped; the code sums over the other two's 8 responses.
    np.testing.assert_allclose(got * 8, loss[:2].sum(), rtol=1e-9)
    np.testing.assert_allclose(gradient[:2] * 8, slope[:2], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(gradient[2], 0)


@in_float64
def test_topr_against_numpy():
    stats, scored = full_batch(seed=8, off=0.3, dtype=np.float64)
    R = np.where(scored.passed, 1, -1)[..., None]
    m = np.asarray(scored.mask)
    rho_k = np.exp(np.where(m, stats.logp - scored.behaviour_logp, 0).sum(-1, keepdims=True))
    weight = np.where(R > 0, 1, np.clip(rho_k, 0, 1))
    assert 0 < (weight < 1).mean() < 1
    gradient = run(O.get("topr"), stats, scored)[2]
    np.testing.assert_allclose(gradient, -R * weight * m / 12, rtol=1e-9, atol=1e-15)


@hypothesis.given(
    st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), st.floats(0.0625, 0.875, width=32)
)
@small
def test_item_18_the_targets_of_bpo(A, epsilon):
    """r* = 1 + e tanh(x / 2 lambda), inside (1 - e, 1 + e), in the order of the advantages."""
    A = np.float32(A)
    stats, scored = full_batch(T=1)
    context = O.Context(scored.rewards, scored.valid, scored.mask, None, stats, scored)
    gate = TargetRatio(epsilon, epsilon, target_temperature=1.5)
    target = np.asarray(gate.target(jnp.tile(-A[:, None] / 4, (3, 1, 1)), context))[0, :, 0]
    np.testing.assert_allclose(target, 1 + epsilon * np.tanh((A - np.median(A)) / 3), rtol=1e-5)
    np.testing.assert_array_less(np.abs(target - 1) - epsilon, 1e-6)
    assert (np.diff(target[np.argsort(A)]) >= 0).all()


@in_float64
def test_item_16_sequence_ratios():
    """GSPO's is the exponential of the listwise score; GMPO's objective is below it, and below the arithmetic mean."""
    stats, scored = full_batch(seed=10, off=0.6, dtype=np.float64)
    scores = O.get("grpo").listwise(stats, scored).scores[..., None]
    delta = np.where(scored.mask, stats.logp - scored.behaviour_logp, 0)
    context = O.Context(scored.rewards, scored.valid, jnp.asarray(scored.mask), delta, stats, scored)
    for c in (-1.0, 1.0):
        wide = SequenceClip(0.99, 99.0)  # nothing is clipped
        gspo, gmpo = (
            gate(jnp.asarray(delta), jnp.full((3, 4, 1), c), context) for gate in (wide, GeometricClip())
        )
        np.testing.assert_allclose(gspo, np.tile(c * np.exp(scores), 6), rtol=1e-9)
        assert (gmpo >= gspo - 1e-12).all() and (gmpo > gspo + 1e-3).any()  # losses: the objective is below
    arithmetic = (np.exp(delta) * scored.mask).sum(-1) / scored.mask.sum(-1)
    assert (gspo[..., 0] <= arithmetic + 1e-12).all()


@in_float64
def test_item_16_minpro_looks_at_the_prefix():
    """The minimum over an empty prefix is 1; the order of tokens matters; a gap in the mask is no token."""
    gate = PrefixWeightClip(1.0, 9.0)
    stats, scored = full_batch(T=4, dtype=np.float64)
    mask = jnp.ones((1, 1, 4), bool)

    def weights(delta, mask=mask):
        context = O.Context(None, None, mask, None, stats, scored)
        return np.exp(gate.log_weight(jnp.log(jnp.array([[delta]])), context))[0, 0]

    np.testing.assert_allclose(weights([0.5, 2.0, 0.8, 1.0]), [0.5, 1.0, 0.4, 0.5])
    np.testing.assert_allclose(weights([2.0, 0.5, 1.0, 0.8]), [2.0, 1.0, 0.5, 0.4])
    np.testing.assert_allclose(
        weights([3.0, 1.0, 2.0, 1.0], mask.at[0, 0, 1].set(False)), [3.0, 3.0, 6.0, 2.0]
    )


# --- gates that pick tokens from the minibatch


def test_first_takes_the_smallest_candidates():
    order = np.float32([[[3, 1, 2], [0, 9, 5]]])
    candidates = np.array([[[1, 1, 1], [0, 1, 1]]], bool)
    for count, expected in ((2, [[0, 1, 1], [0, 0, 0]]), (4, [[1, 1, 1], [0, 0, 1]]), (99, candidates[0])):
        np.testing.assert_array_equal(first_in_order(jnp.float32(count), order, candidates)[0], expected)
    assert (
        first_in_order(jnp.float32(1), np.zeros((1, 2, 3)), np.ones((1, 2, 3), bool)).sum() == 1
    )  # ties, too


def test_clip_cov_draws_a_token_wherever_it_stands():
    objective = O.get("clip-cov", cov_low=-1e6, cov_high=1e6, cov_fraction=0.2)
    stats, scored = full_batch(seed=11, off=0)

    def silent(stats, scored):
        return (run(objective, stats, scored)[2] == 0) & scored.mask & (np.arange(3) < 2)[:, None, None]

    drawn = silent(stats, scored)
    # A fifth of the tokens, rounded down; those of the group without advantage cannot be told apart from it.
    assert 1 <= drawn.sum() <= int(0.2 * scored.mask.sum())
    reverse = jax.tree.map(
        lambda x: x[:, ::-1] if np.ndim(x) > 1 and np.shape(x)[1] == 4 else x, (stats, scored)
    )
    np.testing.assert_array_equal(silent(*reverse), drawn[:, ::-1])
    # Other log-probs, other tokens: it is a draw, and not a rule about places or sizes.
    other = stats.logp + np.float32(1e-4)
    assert (silent(stats.replace(logp=other), scored.replace(behaviour_logp=other)) != drawn).any()


def test_clip_cov_leaves_alone_what_ppo_clips():
    """verl takes clipped tokens off the candidates, so that the draw is not spent on them."""
    gate = ClipCov(cov_low=-1e6, cov_high=1e6, cov_fraction=1.0)
    stats, scored = full_batch(seed=12, off=0.5)
    delta = np.where(scored.mask, stats.logp - scored.behaviour_logp, 0)
    c = jnp.where(scored.passed, -0.5, 0.5)[..., None]
    context = jax.tree.map(
        jnp.asarray, O.Context(scored.rewards, scored.valid, scored.mask, delta, stats, scored)
    )
    rho = np.exp(delta)
    clipped = np.where(c < 0, rho > 1.2, rho < 0.8) & scored.mask
    assert clipped.any()
    np.testing.assert_array_equal(gate.silent(jnp.asarray(delta), c, context), scored.mask & ~clipped)


# --- penalties that the run sets


@in_float64
def test_mdpo_penalty_is_the_kl_to_the_old_policy():
    """With all tokens of a small vocabulary but one kept, the bin for the rest is that one: the KL is exact."""
    stats, scored = full_batch(seed=13, dtype=np.float64, objective=O.get("mdpo"))
    tokens = np.asarray(scored.mask) & scored.teacher.valid[..., None]
    top = np.exp(stats.top_logp), np.exp(scored.teacher.logp)
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in top)
    kl = np.where(tokens, (p * np.log(p / q)).sum(-1), 0)
    W = tokens / np.maximum(scored.mask.sum(-1, keepdims=True), 1) / 12

    def at(progress):
        loss, metrics = O.get("mdpo", step_size=2.0)(stats, scored.replace(progress=progress))
        return float(loss), metrics

    loss, metrics = at(0.25)
    np.testing.assert_allclose(metrics["lpo/previous_kl"], (W * kl).sum(), rtol=1e-6)
    np.testing.assert_allclose(loss - float(metrics["actor/pg_loss"]), (W * kl).sum() / 2 / 0.75, rtol=1e-5)
    # The weight is 1 / t: t falls from step_size, and is held at a share of it.
    penalties = [at(x)[0] - float(metrics["actor/pg_loss"]) for x in (0.0, 0.5, 0.95, 1.0)]
    np.testing.assert_allclose(np.array(penalties) / penalties[0], [1, 2, 20, 20], rtol=1e-5)


@in_float64
def test_mdpo_penalty_has_the_gradient_of_the_kl():
    """In logits: p (log p - log q - KL) at every place, and exactly nothing where p = q."""
    penalty, vocabulary = PreviousKL(), 4
    _, scored = full_batch(seed=14, dtype=np.float64)
    rng = np.random.default_rng(0)
    logits, old = rng.standard_normal((2, 3, 4, 6, vocabulary))
    log_q = np.asarray(jax.nn.log_softmax(old))
    scored = scored.replace(teacher=scored.teacher.replace(logp=log_q[..., :-1], valid=np.ones((3, 4), bool)))
    context = O.Context(scored.rewards, scored.valid, jnp.asarray(scored.mask), None, None, scored)

    def total(logits):
        return penalty(O.TokenStats(None, top_logp=jax.nn.log_softmax(logits)[..., :-1]), context).sum()

    log_p = np.asarray(jax.nn.log_softmax(logits))
    p, d = np.exp(log_p), log_p - log_q
    expected = p * (d - (p * d).sum(-1, keepdims=True)) * scored.mask[..., None]
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logits)), expected, rtol=1e-8, atol=1e-12)
    at_rest = jax.grad(lambda top: penalty(O.TokenStats(None, top_logp=top), context).sum())(log_q[..., :-1])
    np.testing.assert_allclose(at_rest, 0, atol=1e-12)


def test_r2vpo_raises_the_price_of_variance():
    objective = O.get("r2vpo", dual_rate=3.0, variance_limit=0.01)
    stats, scored = full_batch(seed=15, off=0.3, objective=objective)
    assert scored.control == 2.5
    variance = np.square(np.exp((stats.logp - scored.behaviour_logp)[scored.mask]) - 1).mean()
    learn = jax.jit(objective.next_control)
    after = learn(stats, scored)
    np.testing.assert_allclose(after, 2.5 + 3 * (variance - 0.01), rtol=1e-5)
    assert after.dtype == scored.control.dtype and after.shape == ()
    # On-policy there is none, and the price falls; never below 0.
    still = stats.replace(logp=scored.behaviour_logp)
    np.testing.assert_allclose(learn(still, scored), 2.5 - 3 * 0.01, rtol=1e-5)
    assert learn(still, scored.replace(control=np.float32(0.01))) == 0
    # The price is what the gate reads.
    free = scored.replace(control=np.float32(0))
    np.testing.assert_array_equal(
        run(objective, stats, free)[2],
        run(dataclasses.replace(objective, gate=Ratio(), control=None), stats, free)[2],
    )
    assert RatioVarianceDual(dual_start=0.5).init() == 0.5
