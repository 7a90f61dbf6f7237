"""Token penalties: KL, entropy, distillation, against numpy twins and by their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import full_batch, in_float64, padded, run, some

from lpo_jax import objectives as O
from lpo_jax.objectives import mirror, regular
from lpo_jax.objectives.trust import Gate
from lpo_jax.objectives.weights import Aggregate
from lpo_jax.reporting import metric_names

PARTS = {
    "k1": regular.KL(0.3, "k1"),
    "k2": regular.KL(0.3, "k2"),
    "k3": regular.KL(0.3, "k3"),
    "abs": regular.KL(0.3, "abs"),
    "adaptive": regular.AdaptiveKL(0.3),
    "entropy": regular.Entropy(0.3),
    "distil": regular.Distil(0.3, 0.3, 0.7),
    "l2": mirror.Bregman(0.3),
    "probl2": mirror.ProbL2(0.3),
    "mirror": mirror.NeuralMirror(0.3),
}


def objective(*parts, **others):
    """Nothing but penalties: every reward counts 0."""
    return O.Objective(
        "x", advantage=O.Advantage("dr-grpo", centre="none"), gate=Gate(), regular=parts, **others
    )


def batch(seed=0, off=0.3, dtype=np.float64):
    stats, scored = full_batch(seed, off=off, dtype=dtype)
    return stats, scored.replace(rewards=np.zeros_like(scored.rewards))


def gradients(f, stats, scored):
    (loss, metrics), gradient = jax.value_and_grad(f, has_aux=True)(stats, scored)
    return loss, metrics, gradient


def mean_over_responses(x, m):
    return (np.where(m, x, 0).sum(-1) / m.sum(-1)).mean()


def twin(name, stats, scored):
    """(penalty, its slope in the field it is differentiated in, weight, field)."""
    d = stats.logp - stats.ref_logp
    q, q0 = np.exp(stats.logp), np.exp(stats.ref_logp)
    return {
        "k1": (d, np.ones_like(d), 0.3),
        "k2": (d**2 / 2, d, 0.3),
        "k3": (np.exp(-d) + d - 1, 1 - np.exp(-d), 0.3),
        "abs": (np.abs(d), np.sign(d), 0.3),
        "adaptive": (np.exp(-d) + d - 1, 1 - np.exp(-d), 0.3 * (np.tanh(scored.passed.mean()) + 1) / 2),
        "l2": (d**2, 2 * d, 0.3),
        "probl2": ((q - q0) ** 2, 2 * (q - q0) * q, 0.3),
    }[name]


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "adaptive", "l2", "probl2"])
@in_float64
def test_towards_a_reference_against_numpy(name):
    """Loss, gradient and the metric, which is the penalty before its weight, as verl's `actor/kl_loss`."""
    rtol = 1e-6 if name == "adaptive" else 1e-9  # its weight is a float32: tanh of a mean of booleans
    stats, scored = batch()
    m = np.asarray(scored.mask)
    penalty, slope, weight = twin(name, stats, scored)
    loss, metrics, gradient = gradients(objective(PARTS[name]), stats, scored)
    np.testing.assert_allclose(metrics[PARTS[name].metric], mean_over_responses(penalty, m), rtol=1e-6)
    np.testing.assert_allclose(loss, weight * mean_over_responses(penalty, m), rtol=rtol)
    expected = weight * np.where(m, slope, 0) / m.sum(-1, keepdims=True) / 12
    np.testing.assert_allclose(gradient.logp, expected, rtol=rtol, atol=1e-15)
    assert not np.asarray(gradient.ref_logp).any()


@in_float64
def test_a_penalty_is_weighed_as_the_loss_is():
    """Token mean: every token the same; a length normaliser: token sums over the constant."""
    stats, scored = batch()
    m = np.asarray(scored.mask)
    k2 = np.where(m, twin("k2", stats, scored)[0], 0)
    for aggregate, expected in {
        Aggregate("token-mean"): k2.sum() / m.sum(),
        Aggregate("seq-mean-token-sum"): k2.sum() / 12,
        Aggregate("seq-mean-token-sum-norm", 40): k2.sum() / 480,
    }.items():
        loss = objective(PARTS["k2"], aggregate=aggregate)(stats, scored)[0]
        np.testing.assert_allclose(loss, 0.3 * expected, rtol=1e-9)


@in_float64
def test_entropy_bonus():
    """Its gradient is in the entropy alone, which is what `differentiates` says; the trainer pulls it back."""
    stats, scored = batch()
    m = np.asarray(scored.mask)
    loss, metrics, gradient = gradients(objective(PARTS["entropy"]), stats, scored)
    np.testing.assert_allclose(loss, -0.3 * mean_over_responses(stats.entropy, m), rtol=1e-9)
    np.testing.assert_allclose(gradient.entropy, -0.3 * m / m.sum(-1, keepdims=True) / 12, rtol=1e-9)
    np.testing.assert_array_equal(gradient.logp, 0)


def jsd_twin(stats, scored, share, decay):
    """Token by token, over J tokens and the rest."""
    teacher, m = scored.teacher, np.asarray(scored.mask)
    taught = m & teacher.valid[..., None]
    full = lambda logp: np.concatenate([np.exp(logp), 1 - np.exp(logp).sum(-1, keepdims=True)], -1)  # noqa: E731
    q, p = full(teacher.logp), full(stats.top_logp)
    mix = share * q + (1 - share) * p
    jsd = share * (q * np.log(q / mix)).sum(-1) + (1 - share) * (p * np.log(p / mix)).sum(-1)
    sure = np.exp(-decay * teacher.entropy)
    return np.where(taught, jsd * sure / sure[taught].mean(), 0)


@in_float64
def test_distillation_against_numpy():
    stats, scored = batch()
    m = np.asarray(scored.mask)
    f = objective(PARTS["distil"])
    loss, metrics, gradient = gradients(f, stats, scored)
    np.testing.assert_allclose(
        loss, 0.3 * mean_over_responses(jsd_twin(stats, scored, 0.3, 0.7), m), rtol=1e-7
    )
    assert metrics["lpo/distil_jsd"] > 0
    got = np.asarray(gradient.top_logp)
    taught = m & scored.teacher.valid[..., None]
    np.testing.assert_array_equal(got[~taught], 0)
    assert (np.abs(got[taught]) > 0).mean() > 0.9
    where, step = (*np.argwhere(taught)[1], 2), 1e-6
    moved = stats.top_logp.copy()
    moved[where] += step
    np.testing.assert_allclose(
        (f(stats.replace(top_logp=moved), scored)[0] - loss) / step, got[where], rtol=1e-4
    )


@in_float64
def test_distillation_from_oneself_is_at_rest():
    stats, scored = batch()
    stats = stats.replace(top_logp=scored.teacher.logp)
    loss, _, gradient = gradients(objective(PARTS["distil"]), stats, scored)
    np.testing.assert_allclose(loss, 0, atol=1e-15)
    np.testing.assert_allclose(gradient.top_logp, 0, atol=1e-15)


def test_distillation_of_nobody_and_of_a_teacher_that_is_sure():
    stats, scored = batch(dtype=np.float32)
    nobody = scored.replace(teacher=scored.teacher.replace(valid=np.zeros((3, 4), bool)))
    loss, _, gradient = gradients(objective(PARTS["distil"]), stats, nobody)
    assert loss == 0 and not np.asarray(gradient.top_logp).any()
    # All the mass on one of the J tokens, on either side: the rest is 0 to float32.
    sure = np.log(np.float32([1.0, 1e-30, 1e-30])) + np.zeros((3, 4, 6, 1), np.float32)
    for teacher, top in ((sure, stats.top_logp), (scored.teacher.logp, sure), (sure, sure)):
        given = scored.replace(teacher=scored.teacher.replace(logp=teacher))
        loss, _, gradient = gradients(objective(PARTS["distil"]), stats.replace(top_logp=top), given)
        assert np.isfinite(loss)
        np.testing.assert_array_less(-loss, 1e-6)
        assert np.isfinite(gradient.top_logp).all()


@pytest.mark.parametrize("name", some(PARTS, "k3", "adaptive", "entropy", "distil", "mirror"))
def test_garbage_outside_the_tokens_leaks_nowhere(name):
    stats, scored = batch(dtype=np.float32)
    f = objective(PARTS[name])
    loss, metrics, gradient = gradients(f, stats, scored)
    assert loss != 0
    loss2, metrics2, gradient2 = jax.jit(gradients, static_argnums=0)(f, *padded(stats, scored))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    inside = np.pad(np.asarray(scored.mask), ((0, 1), (0, 2), (0, 3)))
    for field in ("logp", "entropy", "top_logp"):
        ours, theirs = np.asarray(getattr(gradient, field)), np.asarray(getattr(gradient2, field))
        np.testing.assert_allclose(theirs[:3, :4, :6], ours, rtol=1e-4, atol=1e-8)
        np.testing.assert_array_equal(theirs[~inside], 0)
    metric_names.check(metrics)


@pytest.mark.parametrize("name", PARTS)
def test_differentiates_is_where_the_gradient_is(name):
    """The trainer pulls back the fields that `differentiates` names and no other."""
    stats, scored = batch(dtype=np.float32)
    f = objective(PARTS[name])
    gradient = gradients(f, stats, scored)[2]
    live = {field for field, g in vars(gradient).items() if np.asarray(g).any()}
    assert live | {"logp"} == f.differentiates
    assert live == set(PARTS[name].differentiates)
    assert f.needs == set(PARTS[name].reads)


def test_a_coefficient_of_0_is_as_good_as_absent():
    stats, scored = full_batch(off=0.2)
    off = tuple(type(part)(0.0) for part in PARTS.values())
    f = O.Objective("x", regular=off)
    assert f.needs == frozenset() and f.differentiates == {"logp"}
    bare, scored = O.TokenStats(stats.logp), scored.replace(teacher=None)
    plain = run(O.Objective("x"), bare, scored)
    jax.tree.map(np.testing.assert_array_equal, run(f, bare, scored), plain)


def test_a_broken_reference_stays_finite():
    stats, scored = batch(dtype=np.float32)
    for name in ("k3", "probl2", "mirror"):
        in_one = jax.jit(functools.partial(gradients, objective(PARTS[name])))
        for log_q, log_q0 in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)):
            far = stats.replace(
                logp=np.full_like(stats.logp, log_q), ref_logp=np.full_like(stats.logp, log_q0)
            )
            loss, _, gradient = in_one(far, scored)
            assert np.isfinite(loss) and np.isfinite(gradient.logp).all()


@in_float64
def test_adaptive_kl_follows_the_accuracy():
    """rho(0) = 1/2, rho(1) = (tanh 1 + 1) / 2; invalid responses are not counted."""
    stats, scored = batch()
    part = regular.AdaptiveKL(1.0)
    for passed, valid, a in ((0, 1, 0), (1, 1, 1), (scored.passed, scored.passed, 1)):
        shape = scored.passed.shape
        tokens = jnp.asarray(scored.mask)
        context = O.Context(
            jnp.zeros(shape),
            jnp.broadcast_to(jnp.asarray(valid, bool), shape),
            tokens,
            None,
            stats,
            scored.replace(passed=np.broadcast_to(np.asarray(passed, bool), shape)),
        )
        np.testing.assert_allclose(part.weight(context), (np.tanh(a) + 1) / 2, rtol=1e-6)
