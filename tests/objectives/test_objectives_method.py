"""Whole objectives: gradients, on-policy equalities (METHODS 4.4 items 8, 9, 17), the bugs of PEERS."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import OBJECTIVES, all_but, batch, full_batch, in_float64, put, run, run_jitted, some

from lpo_jax import objectives as O

# The others differ from these in the temperature or the weights of tokens only.
every_objective = pytest.mark.parametrize(
    "name", all_but(OBJECTIVES, "lpo-forward-onpolicy", "dr-grpo", "maxrl")
)
LISTWISE = [n for n in OBJECTIVES if n.startswith("lpo")]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_lpo_forward_against_numpy():
    """Appendix D.3 read literally, in a few lines of numpy and no masks but the tokens'."""
    stats, scored = batch(seed=3, off=0.3)
    logp, behaviour, R = (np.float64(x) for x in (stats.logp, scored.behaviour_logp, scored.rewards))
    m = np.asarray(scored.mask)
    n = m.sum(-1)
    delta = np.where(m, logp - behaviour, 0)
    P, w = softmax(delta.sum(-1) / n), softmax(R / np.maximum(R.std(-1, keepdims=True), 1e-6))
    in_range = m & (delta > np.log(0.8)) & (delta < np.log(1.2))
    loss, metrics, gradient = run(O.get("lpo-forward"), stats, scored)
    np.testing.assert_allclose(loss, (w * np.log(w / P)).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(
        gradient, (P - w)[..., None] * in_range / n[..., None] / 3, rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(metrics["actor/pg_clipfrac"], 1 - in_range.sum() / m.sum(), rtol=1e-5)


def test_grpo_against_numpy():
    stats, scored = batch(seed=3, off=0.3)
    logp, behaviour, R = (np.float64(x) for x in (stats.logp, scored.behaviour_logp, scored.rewards))
    m = np.asarray(scored.mask)
    A = ((R - R.mean(-1, keepdims=True)) / np.maximum(R.std(-1, keepdims=True), 1e-6))[..., None]
    A[2] = 0  # equal rewards: numpy's rounding error over the floor is not 0
    rho = np.exp(np.where(m, logp - behaviour, 0))
    surrogate = np.minimum(rho * A, np.clip(rho, 0.8, 1.2) * A)
    flows = rho * A <= np.clip(rho, 0.8, 1.2) * A
    loss, metrics, gradient = run(O.get("grpo"), stats, scored)
    n = m.sum(-1, keepdims=True)
    np.testing.assert_allclose(loss, -(np.where(m, surrogate, 0) / n).sum() / 12, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, -np.where(m & flows, rho * A, 0) / n / 12, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(metrics["actor/pg_clipfrac"], (m & ~flows).sum() / m.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/ppo_kl"], -np.log(rho)[m].mean(), rtol=1e-4)


class GradientTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_item_8_gradient_is_coefficient_times_token_weight(self):
        """Unclipped tokens get exactly W c (and rho, for a ratio), so two passes equal one."""
        stats, scored = batch(seed=4, off=0.01)
        for name in ("lpo-forward", "lpo-reverse", "grpo"):
            objective = O.get(name)
            gradient = self.variant(jax.grad(lambda s, o=objective: o(s, scored)[0]))(stats).logp
            c = objective.listwise(stats, scored).coefficients[..., None]
            W = objective.token_weights(scored.mask)
            ratio = jnp.exp(stats.logp - scored.behaviour_logp) if name == "grpo" else 1.0
            chex.assert_trees_all_close(gradient, W * c * ratio, rtol=1e-5)
            chex.assert_tree_all_finite(gradient)

    @chex.variants(with_jit=True, without_jit=True)
    def test_loss_of_a_listwise_method_is_the_divergence(self):
        stats, scored = batch(seed=4, off=0.3)
        for name, key in (("lpo-forward", "lpo/forward_kl"), ("lpo-reverse", "lpo/reverse_kl")):
            loss, metrics = self.variant(O.get(name))(stats, scored)
            chex.assert_trees_all_close(loss, metrics[key], metrics["actor/pg_loss"], rtol=1e-6)
            assert loss > 0.01
            chex.assert_shape([loss, *metrics.values()], ())
            chex.assert_type(list(metrics.values()), jnp.float32)


@every_objective
def test_item_8_gradient_equals_gate_slope_times_token_weight(name):
    """For every method and clip: one expression, sum W phi(delta, sg(c)), has the objective's gradient."""
    objective = OBJECTIVES[name]
    stats, scored = batch(seed=5, off=0.3)

    view = objective.listwise(stats, scored)

    def by_parts(logp):
        tokens = scored.mask & (view.valid & view.active[:, None])[..., None]
        W = objective.token_weights(tokens)
        delta = logp - scored.behaviour_logp
        return (W * objective.gate(delta, view.coefficients[..., None], None)).sum()

    np.testing.assert_allclose(
        run(objective, stats, scored)[2], jax.grad(by_parts)(stats.logp), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("rule", ["grpo", "dr-grpo", "maxrl"])
@pytest.mark.parametrize("ddof", [0, 1])
@in_float64
def test_item_9_on_policy_lpo_reverse_is_the_policy_gradient(rule, ddof):
    reverse = O.get("lpo-reverse", temperature=rule, ddof=ddof)
    policy_gradient = O.get(rule, aggregation="seq-mean-token-mean", ddof=ddof)
    on_policy = batch(seed=6, off=0, dtype=np.float64)
    gradient = run(reverse, *on_policy)[2]
    np.testing.assert_allclose(gradient, run(policy_gradient, *on_policy)[2], rtol=1e-9, atol=1e-15)
    assert np.abs(gradient).max() > 1e-3
    # Off-policy they differ: the equality above is not an accident of the code.
    moved = batch(seed=6, off=0.05, dtype=np.float64)
    assert np.abs(run(reverse, *moved)[2] - run(policy_gradient, *moved)[2]).max() > 1e-4


def test_item_9_in_float32_to_rounding():
    stats, scored = batch(seed=6, off=0)
    reverse, grpo = (run(O.get(n), stats, scored)[2] for n in ("lpo-reverse", "grpo"))
    np.testing.assert_allclose(reverse, grpo, rtol=1e-5, atol=1e-8)


@in_float64
def test_item_9_on_policy_lpo_forward_is_a_policy_gradient_with_another_advantage():
    """c = 1/K - w* = -A' / K with A' = K softmax(A) - 1: the control agrees on-policy and only there."""
    stats, scored = batch(seed=6, off=0, dtype=np.float64)
    forward, control = (O.get(n) for n in ("lpo-forward", "lpo-forward-onpolicy"))
    np.testing.assert_allclose(run(forward, stats, scored)[2], run(control, stats, scored)[2], atol=1e-15)
    view = forward.listwise(stats, scored)
    A = O.advantages(scored.rewards, view.temperature)
    np.testing.assert_allclose(view.coefficients, -(4 * softmax(np.asarray(A)) - 1) / 4, atol=1e-12)
    moved = batch(seed=6, off=0.1, dtype=np.float64)
    assert np.abs(run(forward, *moved)[2] - run(control, *moved)[2]).max() > 1e-4


@pytest.mark.parametrize("name", ["lpo-forward", "lpo-reverse"])
@in_float64
def test_item_9_at_a_high_temperature_every_divergence_is_the_policy_gradient(name):
    stats, scored = batch(seed=6, off=0, dtype=np.float64)
    c = O.get(name, temperature=1e4).listwise(stats, scored).coefficients
    A = O.advantages(scored.rewards, 1e4)
    np.testing.assert_allclose(c, -A / 4, rtol=1e-3, atol=1e-12)  # the next order in 1 / temperature


def test_item_17_duplicating_every_token():
    """The mean score does not see it; the sum doubles."""
    stats, scored = batch(seed=7, off=0.05)
    twice = [np.repeat(x, 2, axis=-1) for x in (stats.logp, scored.behaviour_logp, scored.mask)]
    stats2, scored2 = O.TokenStats(twice[0]), O.Scored(twice[1], scored.rewards, twice[2])
    mean, total = (O.get("lpo-forward", score=s) for s in ("mean", "sum"))
    views = [o.listwise(*args) for o in (mean, total) for args in ((stats, scored), (stats2, scored2))]
    np.testing.assert_allclose(views[1].scores, views[0].scores, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(views[1].coefficients, views[0].coefficients, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(views[3].scores, 2 * views[2].scores, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(views[2].scores, views[0].scores * scored.mask.sum(-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", some(OBJECTIVES, "lpo-forward", "lpo-reverse/none", "lpo-pointwise", "grpo/token-mean")
)
def test_item_17_whole_groups_split_into_microbatches(name):
    """A batch is the mean of its parts, weighed by their prompts (or tokens, for the token mean)."""
    objective = OBJECTIVES[name]
    stats, scored = batch(seed=8, off=0.2)
    size = scored.mask.sum((1, 2)) if "token-mean" in name else np.ones(3)
    size = size * np.asarray(objective.listwise(stats, scored).active)
    loss, gradient = 0, 0
    for part in ([True, False, False], [False, True, True]):
        some = scored.replace(valid=np.tile(np.array(part)[:, None], 4))
        share = size[np.array(part)].sum() / size.sum()
        part_loss, _, part_gradient = run_jitted(objective, stats, some)
        loss, gradient = loss + share * part_loss, gradient + share * part_gradient
    whole_loss, _, whole_gradient = run_jitted(objective, stats, scored)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5, atol=1e-8)


def pad(stats, scored, prompts=1, responses=2, tokens=3, garbage=np.nan):
    """The same batch with padding that holds garbage."""

    def tokenwise(x, fill):
        return np.pad(x, ((0, prompts), (0, responses), (0, tokens)), constant_values=fill)

    rewards = np.pad(scored.rewards, ((0, prompts), (0, responses)), constant_values=garbage)
    mask = tokenwise(scored.mask, False)
    logp, behaviour = (tokenwise(x, garbage) for x in (stats.logp, scored.behaviour_logp))
    logp = np.where(mask, logp, logp.dtype.type(garbage))  # the padding inside a response's row, too
    anchor = None if scored.anchor_logp is None else tokenwise(scored.anchor_logp, garbage)
    return O.TokenStats(logp), O.Scored(behaviour, rewards, mask, anchor)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    some(OBJECTIVES, "lpo-forward", "lpo-forward/joint", "lpo-reverse/mask", "grpo", "grpo/token-mean"),
)
def test_item_1_padding_changes_nothing(name, garbage):
    """PEERS bug classes 6 and 9: padded prompts, responses and tokens, with NaN or inf in them."""
    stats, scored = batch(seed=9, off=0.2, anchor=True)
    loss, metrics, gradient = run_jitted(OBJECTIVES[name], stats, scored)
    loss2, metrics2, gradient2 = run_jitted(OBJECTIVES[name], *pad(stats, scored, garbage=garbage))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2[:3, :4, :6], gradient, rtol=1e-5, atol=1e-7)
    outside = np.pad(np.asarray(scored.mask), ((0, 1), (0, 2), (0, 3))) == 0
    np.testing.assert_array_equal(np.asarray(gradient2)[outside], 0)
    for key in metrics.keys() - {"lpo/masked_response_frac"}:
        np.testing.assert_allclose(metrics2[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert metrics2["lpo/nonfinite_rewards"] == 0  # padding is not a broken verifier


@every_objective
def test_item_1_permuting_responses_and_prompts(name):
    """PEERS bug class 7: what a group does depends on its own rows only, whatever their order."""
    stats, scored = batch(seed=10, off=0.2)
    prompts, responses = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
    loss, _, gradient = run_jitted(OBJECTIVES[name], stats, scored)
    loss2, _, gradient2 = run_jitted(
        OBJECTIVES[name], *jax.tree.map(lambda x: x[prompts][:, responses], (stats, scored))
    )
    np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient2, gradient[prompts][:, responses], rtol=1e-4, atol=1e-7)
    other = scored.replace(rewards=put(scored.rewards, 1, np.array([1.0, 0.0, 0.0, 0.5])))
    changed = run_jitted(OBJECTIVES[name], stats, other)[2]
    np.testing.assert_array_equal(changed[0], gradient[0])
    assert np.abs(changed[1] - gradient[1]).max() > 1e-3


@every_objective
def test_item_4_a_group_of_equal_rewards(name):
    """PEERS bug class 8: finite, counted, no gradient while the policy has not moved."""
    stats, scored = batch(seed=11, off=0)
    objective = OBJECTIVES[name]
    _, metrics, gradient = run(objective, stats, scored)
    chex.assert_tree_all_finite((metrics, gradient))
    np.testing.assert_allclose(metrics["lpo/degenerate_group_frac"], 1 / 3, rtol=1e-6)
    view = objective.listwise(stats, scored)
    np.testing.assert_array_equal(view.degenerate, [False, False, True])
    np.testing.assert_array_equal(view.log_target[2], view.log_policy[2])
    if name == "lpo-pointwise":  # the control's flaw: it pushes every response up even so
        np.testing.assert_allclose(view.coefficients[2], -0.25, rtol=1e-6)
    else:
        np.testing.assert_array_equal(gradient[2], 0)


@every_objective
def test_nothing_to_learn_from_is_finite(name):
    """PEERS bug class 9: every response truncated away, marked invalid, or with a broken reward."""
    stats, scored = batch(seed=13)
    for empty in (
        scored.replace(mask=np.zeros_like(scored.mask)),
        scored.replace(valid=np.zeros(scored.rewards.shape, bool)),
        scored.replace(rewards=np.full_like(scored.rewards, np.nan)),
    ):
        loss, metrics, gradient = run_jitted(OBJECTIVES[name], stats, empty)
        assert loss == 0
        chex.assert_tree_all_finite(metrics)
        np.testing.assert_array_equal(gradient, 0)
        assert metrics["lpo/masked_response_frac"] == 1


@every_objective
def test_an_unusable_response_is_as_good_as_absent(name):
    """Marked invalid, or a broken reward: the rest of its group goes on as beside a response without tokens.

    (That one is padding, and as good as absent by item 1.)
    """
    stats, scored = batch(seed=14, off=0.2)
    absent = scored.replace(mask=put(scored.mask, np.s_[:, 3], False))
    loss, absent_metrics, gradient = run(OBJECTIVES[name], stats, absent)
    assert np.abs(gradient).max() > 0
    for unusable, broken_rewards in (
        (scored.replace(valid=put(np.ones((3, 4), bool), np.s_[:, 3], False)), 0),
        (scored.replace(rewards=put(scored.rewards, np.s_[:, 3], np.inf)), 3),
    ):
        loss2, metrics, gradient2 = run(OBJECTIVES[name], stats, unusable)
        np.testing.assert_allclose(loss2, loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient2, gradient, rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(gradient2[:, 3], 0)
        assert metrics["lpo/nonfinite_rewards"] == broken_rewards
        assert metrics["lpo/masked_response_frac"] == absent_metrics["lpo/masked_response_frac"] >= 0.25


@every_objective
def test_a_group_below_the_minimum_size_is_left_out(name):
    objective = OBJECTIVES[name]
    assert objective.min_group_size == 2
    stats, scored = batch(seed=15, off=0.2)
    one = scored.replace(valid=put(np.ones((3, 4), bool), np.s_[0, 1:], False))
    loss, metrics, gradient = run_jitted(objective, stats, one)
    loss_rest, _, gradient_rest = run_jitted(
        objective, stats, scored.replace(mask=put(scored.mask, 0, False))
    )
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(loss, loss_rest, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, gradient_rest, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 0
    left_out = 8 / 12 if "mask" in name else 4 / 12
    np.testing.assert_allclose(metrics["lpo/masked_response_frac"], left_out, rtol=1e-6)  # a float32
    # Every group of one: no coefficient, and no NaN.
    alone = scored.replace(valid=put(np.zeros((3, 4), bool), np.s_[:, 0], True))
    loss, metrics, gradient = run_jitted(objective, stats, alone)
    chex.assert_tree_all_finite((loss, metrics))
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(objective.listwise(stats, alone).coefficients, 0)


def test_item_4_one_response_per_prompt():
    stats, scored = jax.tree.map(lambda x: x[:, :1], batch(seed=15, off=0.2))
    step = jax.jit(jax.value_and_grad(O.get("lpo-pointwise"), has_aux=True))
    (loss, metrics), gradient = step(stats, scored)
    chex.assert_tree_all_finite((loss, metrics))
    np.testing.assert_array_equal(gradient.logp, 0)


@every_objective
def test_the_first_minibatch_is_not_clipped(name):
    """PEERS bug class 4: equal log-probs give a log-ratio of exactly 0, a uniform P, no clipped token."""
    stats, scored = batch(seed=16, off=0)
    _, metrics, gradient = run(OBJECTIVES[name], stats, scored)
    for key in ("actor/pg_clipfrac", "actor/ppo_kl", "lpo/policy_tv", "lpo/score_abs_max"):
        assert metrics[key] == 0, key
    assert np.abs(gradient[0]).max() > 0


@pytest.mark.parametrize("name", LISTWISE)
def test_metrics_against_numpy(name):
    objective = OBJECTIVES[name]
    stats, scored = batch(seed=17, off=0.3, anchor=True)
    view = jax.device_get(objective.listwise(stats, scored))
    metrics = run(objective, stats, scored)[1]
    P, w, c = (np.float64(x)[view.active] for x in (view.policy, view.target, view.coefficients))
    for key, expected in {
        "lpo/target_tv": 0.5 * np.abs(w - 0.25).sum(-1).mean(),
        "lpo/policy_tv": 0.5 * np.abs(P - 0.25).sum(-1).mean(),
        "lpo/coef_l1": np.abs(c).sum(-1).mean(),
        "lpo/coef_sum": 1 if name == "lpo-pointwise" else 0,
        "lpo/score_abs_max": np.abs(view.scores).max(),
        "lpo/temperature_mean": view.temperature[:2].mean(),
        "lpo/forward_kl": (w * np.log(w / P)).sum(-1).mean(),
        "lpo/reverse_kl": (P * np.log(P / w)).sum(-1).mean(),
        "lpo/masked_response_frac": 1 - view.active.mean(),
    }.items():
        np.testing.assert_allclose(metrics[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


def test_coef_sum_is_the_largest_of_any_group():
    """Sums of opposite sign do not cancel, and a group that takes no part does not count."""
    stats, scored = batch(seed=17, off=0.3)
    objective = O.get("grpo", centre="none")
    sums = np.asarray(objective.listwise(stats, scored).coefficients).sum(-1)
    scored = scored.replace(rewards=scored.rewards * np.array([[1], [-1], [1]], np.float32))
    metrics = run(objective, stats, scored)[1]
    np.testing.assert_allclose(metrics["lpo/coef_sum"], np.abs(sums).max(), rtol=1e-5)
    assert np.abs(sums).max() > 0.5


# Methods whose formula has neither a clip nor a floor of the ratio.
UNCLIPPED = {
    "rloo",
    "mpo",
    "tpo",
    "gvpo",
    "copg",
    "trpa",
    "real",
    "gtpo",
    "sapo",
    "r2vpo",
    "gbpo",
    "mdpo",
    "kl-cov",
}
# One method of each gate and projection in the catalogue: nothing else clips.
CLIPS = {(type(m.gate), type(m.projection)): name for name in reversed(O.names()) for m in [O.get(name)]}


COUNTED = {*CLIPS.values(), *UNCLIPPED, "cispo", "minpro"}


@pytest.mark.parametrize(
    "name", some(sorted(COUNTED), *(COUNTED - UNCLIPPED), "rloo", "tpo", "sapo", "r2vpo", "kl-cov")
)
def test_clip_fraction_counts_every_kind_of_clip(name):
    """Ratios of e^2 and e^-2, each on passing and on failing responses."""
    objective = O.get(name)
    stats, scored = full_batch(seed=19, objective=objective)
    side = np.float32([2, 2, -2, -2])[:, None]
    fraction = float(
        objective(stats.replace(logp=scored.behaviour_logp + side), scored)[1]["actor/pg_clipfrac"]
    )
    assert fraction == 0 if name in UNCLIPPED else 0.1 < fraction <= 1


def test_clip_fraction_of_clipped_weights_against_numpy():
    stats, scored = batch(seed=20, off=0.5)
    m, delta = scored.mask, np.where(scored.mask, stats.logp - scored.behaviour_logp, 0)
    pulled = m & (O.get("cispo").listwise(stats, scored).coefficients != 0)[..., None]
    out = lambda rho: ((rho > 1.28) & pulled).sum() / m.sum()  # noqa: E731
    before = np.minimum.accumulate(np.pad(delta, ((0, 0), (0, 0), (1, 0)))[..., :-1], -1)
    before[..., 1:] = np.minimum.accumulate(delta, -1)[..., :-1]
    for name, log_weight in (("cispo", delta), ("minpro", delta + before)):
        expected = out(np.exp(log_weight))
        assert expected > 0
        np.testing.assert_allclose(
            run(O.get(name), stats, scored)[1]["actor/pg_clipfrac"], expected, rtol=1e-6
        )


def test_the_listwise_view():
    stats, scored = batch(seed=18, off=0.2)
    scored = scored.replace(valid=put(np.ones((3, 4), bool), np.s_[1, 0], False))
    view = jax.jit(O.get("grpo").listwise)(stats, scored)
    chex.assert_shape([view.target, view.policy, view.coefficients, view.valid, view.scores], (3, 4))
    chex.assert_shape(view.temperature, (3, 1))
    R = np.asarray(scored.rewards)
    np.testing.assert_allclose(view.target[0], softmax(R[0] / R[0].std()), rtol=1e-5)
    np.testing.assert_allclose(view.coefficients[0], -(R[0] - R[0].mean()) / R[0].std() / 4, rtol=1e-5)
    # The invalid response is out of its group's statistics.
    rest = R[1, 1:]
    np.testing.assert_allclose(view.coefficients[1, 1:], -(rest - rest.mean()) / rest.std() / 3, rtol=1e-4)
    assert view.coefficients[1, 0] == view.target[1, 0] == view.policy[1, 0] == 0


def test_the_anchor_moves_the_target():
    """s_t enters w* = softmax(R / tau + s_t); at pi_theta = pi_t a group of equal rewards is at rest."""
    stats, scored = batch(seed=19, off=0.1)
    anchored = scored.replace(anchor_logp=stats.logp)
    for name in ("lpo-forward", "lpo-forward/joint", "lpo-reverse/none"):
        view = OBJECTIVES[name].listwise(stats, anchored)
        np.testing.assert_array_equal(view.coefficients[2], 0)
        log_w = O.target_log_probs(scored.rewards, view.temperature, view.scores)
        np.testing.assert_allclose(view.log_target, log_w, rtol=1e-6)
        assert np.abs(OBJECTIVES[name].listwise(stats, scored).coefficients[2]).max() > 1e-3


def test_dtypes():
    stats, scored = batch(seed=20)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, (stats, scored))
    loss, metrics, gradient = run(O.get("lpo-forward"), *half)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    chex.assert_type(list(metrics.values()), jnp.float32)
    integer = scored.replace(rewards=np.array([[0, 1, 0, 1]] * 3), mask=scored.mask.astype(np.int32))
    real = integer.replace(rewards=integer.rewards.astype(np.float32), mask=scored.mask)
    chex.assert_trees_all_equal(run(O.get("grpo"), stats, integer), run(O.get("grpo"), stats, real))


def test_a_broken_model_is_not_hidden():
    """NaN on a real token reaches the loss (for the step's guard) and no other prompt's gradient."""
    stats, scored = batch(seed=21)
    loss, _, gradient = run(
        O.get("lpo-forward"), O.TokenStats(put(stats.logp, np.s_[0, 0, 0], np.nan)), scored
    )
    assert np.isnan(loss)
    assert np.isfinite(gradient[1:]).all() and np.isnan(gradient[0]).any()


def test_one_trace_for_equal_objectives():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda o, *args: o(*args)[0], n=1), static_argnums=0)
    for seed in (0, 1):
        step(O.get("lpo-forward", temperature=0.5), *batch(seed=seed))
    assert O.get("grpo") == O.get("grpo") != O.get("grpo", epsilon_high=0.28)


def test_shape_errors_name_the_array():
    stats, scored = batch()
    for name, bad, expected in (
        ("rewards", scored.replace(rewards=scored.rewards[:, :3]), r"\(3, 4\)"),
        ("mask", scored.replace(mask=scored.mask[..., :5]), r"\(3, 4, 6\)"),
        ("valid", scored.replace(valid=np.ones(3)), r"\(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=rf"scored.{name}: expected shape {expected}.*got"):
            O.get("grpo")(stats, bad)
    with pytest.raises(ValueError, match=r"stats.logp: expected \[P,K,T\], got shape \(4, 6\)"):
        O.get("grpo")(O.TokenStats(stats.logp[0]), scored)
