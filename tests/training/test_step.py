"""The three-part step against plain autodiff, whatever the microbatches.

Exactness is tested in float64, where rounding is far below any mistake; float32 is compared with the float64 result,
within what its rounding explains.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import EXACT, FORWARD_ROUNDING, GRADIENT_ROUNDING, astype, in_float64, norm

from lpo_jax import objectives as O
from lpo_jax.models import decoder
from lpo_jax.models.attention import Causal
from lpo_jax.models.runner import Groups, ModelRunner, log_prob_gap, score, top_k_teacher
from lpo_jax.objectives import Scored, TokenStats
from lpo_jax.rollout.batch import Batch
from lpo_jax.runs.state import TrainState
from lpo_jax.training.features import LAST, round_features
from lpo_jax.training.optimizer import Optimizer
from lpo_jax.training.step import signal, update

P, K, S, T = 4, 4, 6, 5


@pytest.fixture(scope="module")
def rollouts(tiny_config):
    rng = np.random.default_rng(0)
    lengths = np.array([1, 3, 6, 4], np.int32)  # ragged prompts
    tokens = rng.integers(1, tiny_config.vocab_size, (P, K, T)).astype(np.int32)
    response_lengths = rng.integers(1, T + 1, (P, K))
    response_lengths[0, 0], response_lengths[1, 2] = T, 1
    mask = np.arange(T) < response_lengths[..., None]
    prompts = rng.integers(1, tiny_config.vocab_size, (P, S)).astype(np.int32)
    scored = Scored(
        behaviour_logp=np.zeros((P, K, T), np.float32),
        rewards=rng.integers(0, 2, (P, K)).astype(np.float32),
        mask=mask,
        valid=np.ones((P, K), bool),
    )
    return Batch(Groups(prompts * (np.arange(S) < lengths[:, None]), lengths, tokens * mask), scored)


def program_for(config, budget=10**6, remat=False, **options):
    """Make a runner of the given budget, in the precision of the test."""
    options = {"dtype": jnp.float64 if jax.config.jax_enable_x64 else jnp.float32} | options
    return ModelRunner(config, 0.7, budget, remat=remat, **options)


def gradient_by_parts(runner, params, rollouts, objective):
    used = score(runner, params, rollouts.groups)
    return pull_back(runner, params, rollouts.groups, signal(objective, used, rollouts.scored).cotangent)[0]


pull_back = jax.jit(ModelRunner.pull_back, static_argnums=0)


def copied(params):
    """Copy parameters that an update may overwrite."""
    return jax.device_put(jax.tree.map(np.array, params))


def one_update(runner, params, rollouts, objective):
    """Run the first update after sampling; returns the state and the metrics."""
    optimizer = Optimizer(optax.sgd(1.0))
    state = TrainState(copied(params), jax.jit(optimizer.init)(params))
    used = TokenStats(rollouts.scored.behaviour_logp)
    learned = signal(objective, used, rollouts.scored)
    state, stats, norm = update(runner, optimizer, state, rollouts.groups, learned.cotangent)
    metrics = learned.metrics | log_prob_gap(used, stats, rollouts.scored.mask) | {"actor/grad_norm": norm}
    return state, metrics


def rows_alone(groups):
    """Return rows `[P*K, S+T]` of one response each, behind a copy of its prompt, and the lengths of the prompts."""
    lengths = np.repeat(groups.lengths, K)  # [P K]
    rows = np.zeros((P * K, S + T), np.int32)
    for r, n in enumerate(lengths):
        rows[r, :n] = groups.prompts[r // K, :n]
        rows[r, n : n + T] = groups.responses[r // K, r % K]
    return rows, lengths


def plain_log_probs(config, params, groups, temperature):
    """Compute log-probs with one response per row, behind a copy of its prompt, by plain causal attention."""
    rows, lengths = rows_alone(groups)
    predicting = lengths[:, None] - 1 + np.arange(T)
    responses = groups.responses.reshape(P * K, T)
    logp = log_probs_of_rows(config, temperature, params, rows, lengths + T, predicting, responses)
    return logp.reshape(P, K, T)


@functools.partial(jax.jit, static_argnums=(0, 1))
def log_probs_of_rows(config, temperature, params, rows, lengths, predicting, responses):
    valid = jnp.arange(rows.shape[1]) < lengths[:, None]
    logits = decoder.logits(config, params, rows, valid, dtype=params["embed"].dtype)
    logp = jax.nn.log_softmax(logits / temperature)
    return logp[jnp.arange(rows.shape[0])[:, None], predicting, responses]


@functools.partial(jax.jit, static_argnums=(0, 1))
def states_and_log_probs(config, temperature, params, rows):
    """Compute the states `[R, X, D]` and log-probs `[R, X, V]` of independent rows."""
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    context = Causal(jnp.ones(rows.shape, bool), positions)
    states = decoder.forward(config, params, rows, positions, context)[0]
    return states, jax.nn.log_softmax(decoder.project(states, decoder.unembedding(params)) / temperature)


PLAIN: dict[str, object] = {}


def plain_gradient(name, config, params, rollouts):
    """The gradient of the whole batch's loss by autodiff in float64, without microbatches; cached for each method."""
    objective = O.get(name)

    def loss(params):
        logp = plain_log_probs(config, params, rollouts.groups, 0.7)
        return objective(TokenStats(logp), rollouts.scored)[0]

    if name not in PLAIN:
        PLAIN[name] = jax.jit(jax.grad(loss))(params)
    return PLAIN[name]


def relative_error(got, want):
    """Return |got - want| / |want| over the whole gradient; the relative error of small entries is much larger."""
    got, want = astype(got, np.float64), astype(want, np.float64)
    return norm(jax.tree.map(np.subtract, got, want)) / norm(want)


def behaviour(config, params, rollouts, noise):
    """A batch whose behaviour log-probs are those of the model plus noise, as after an update."""
    logp = np.asarray(plain_log_probs(config, params, rollouts.groups, 0.7))
    logp = logp + noise * np.random.default_rng(1).normal(size=logp.shape)
    return rollouts.replace(scored=rollouts.scored.replace(behaviour_logp=logp))


@pytest.mark.parametrize("window", [None, 3])
def test_scores_equal_those_of_each_response_alone(tiny_config, tiny_params, rollouts, window):
    config = dataclasses.replace(tiny_config, sliding_window=window)
    got = score(program_for(config), tiny_params, rollouts.groups).logp
    want = plain_log_probs(config, tiny_params, rollouts.groups, 0.7)
    got, want = (np.where(rollouts.scored.mask, x, 0) for x in (got, want))
    chex.assert_trees_all_close(got, want, atol=2e-5)


@pytest.mark.parametrize("name", ["lpo-forward", pytest.param("lpo-reverse", marks=pytest.mark.slow), "grpo"])
@pytest.mark.parametrize(
    "budget, packed",
    [pytest.param(10**6, False, marks=pytest.mark.slow), (10**6, True), (2 * T + S, True), (1, True)],
)
@in_float64
def test_three_parts_equal_plain_autodiff(tiny_config, tiny_params, rollouts, name, budget, packed):
    """Rows are padded or packed, with several groups, whole groups, parts of groups and single responses."""
    rollouts = behaviour(tiny_config, tiny_params, rollouts, noise=0.1)
    runner = program_for(tiny_config, budget, remat=budget == 1)

    want = plain_gradient(name, tiny_config, tiny_params, rollouts)
    if packed:
        rollouts = rollouts.replace(groups=runner.pack(rollouts.groups, rollouts.scored.mask))
        assert budget == 1 or rollouts.groups.layout.pack is not None
    got = gradient_by_parts(runner, tiny_params, rollouts, O.get(name))
    assert norm(want) > 1e-3
    assert {x.dtype for x in jax.tree.leaves((got, want))} == {np.dtype(np.float64)}
    np.testing.assert_array_less(relative_error(got, want), EXACT)


@pytest.mark.parametrize("name", ["lpo-forward", pytest.param("grpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [10**6, pytest.param(1, marks=pytest.mark.slow)])
def test_three_parts_in_float32_differ_by_rounding(tiny_config, tiny_params, rollouts, budget, name):
    with jax.enable_x64(True):
        exact = astype(tiny_params, np.float64)
        rollouts = behaviour(tiny_config, exact, rollouts, noise=0.1)
        want = plain_gradient(name, tiny_config, exact, rollouts)
    got = gradient_by_parts(
        program_for(tiny_config, budget), tiny_params, astype(rollouts, np.float32), O.get(name)
    )
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    np.testing.assert_array_less(relative_error(got, want), GRADIENT_ROUNDING)


def test_packed_scores_and_top_k_equal_padded_ones(tiny_config, tiny_params, rollouts):
    groups, mask = rollouts.groups, rollouts.scored.mask
    runner = program_for(tiny_config, 30)
    packed = runner.pack(groups, mask)
    real = lambda tree: jax.tree.map(lambda x: x * mask.reshape(mask.shape + (1,) * (x.ndim - 3)), tree)  # noqa: E731
    want, got = (score(runner, tiny_params, some) for some in (groups, packed))
    chex.assert_trees_all_close(real(got), real(want), atol=2e-5)
    want, got = (top_k_teacher(runner, 3, tiny_params, some).replace(valid=None) for some in (groups, packed))
    chex.assert_trees_all_close(real(got), real(want), atol=2e-5)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_features_are_those_of_each_response_alone(tiny_config, tiny_params, rollouts, packed):
    """Features do not depend on the rows; a prompt of one token has no uncertainty."""
    groups, mask = rollouts.groups, rollouts.scored.mask
    runner = program_for(tiny_config, 30 if packed else 10**6)
    got = round_features(runner, tiny_params, runner.pack(groups, mask) if packed else groups, mask)
    assert got["prompt_confidence"][0] == 1
    rows, _ = rows_alone(groups)
    states, logp = jax.device_get(states_and_log_probs(tiny_config, runner.temperature, tiny_params, rows))
    states, logp = states.reshape(P, K, S + T, -1), logp.reshape(P, K, S + T, -1)
    for p, n in enumerate(groups.lengths):
        least = np.sort(logp[p, 0, np.arange(n - 1), groups.prompts[p, 1:n]])[: int(np.ceil(0.2 * (n - 1)))]
        np.testing.assert_allclose(
            got["prompt_confidence"][p], np.exp(least.mean()) if n > 1 else 1, rtol=1e-4
        )
    entropy = np.where(mask, score(runner, tiny_params, groups).entropy, 0)
    for p, k in np.ndindex(P, K):
        n, t = groups.lengths[p], mask[p, k].sum()
        H = entropy[p, k, :t]
        ends = [H.mean(), H.max(), H[0], H[-1]]
        of_prompt, of_response = states[p, k, :n], states[p, k, n - 1 : n + t - 1]
        want = np.concatenate([of_prompt[-LAST:].mean(0), of_response[-LAST:].mean(0), ends])
        np.testing.assert_allclose(got["features"][p, k], want, atol=2e-4)


@pytest.mark.slow  # a default test compares packed rows, split and whole, with autodiff
@pytest.mark.parametrize("budget", [S + K * T, S + T])
@in_float64
def test_split_and_unsplit_gradients_agree(tiny_config, tiny_params, rollouts, budget):
    rollouts = behaviour(tiny_config, tiny_params, rollouts, noise=0.1)
    want, got = (
        gradient_by_parts(program_for(tiny_config, size), tiny_params, rollouts, O.get("lpo-forward"))
        for size in (10**6, budget)
    )
    np.testing.assert_array_less(relative_error(got, want), EXACT)


@in_float64
def test_padding_changes_nothing(tiny_config, tiny_params, rollouts):
    """Additional padding of prompts and responses with arbitrary tokens does not change the gradient."""
    rollouts = behaviour(tiny_config, tiny_params, rollouts, noise=0.1)
    g, s = rollouts.groups, rollouts.scored
    junk = lambda x, n: np.concatenate([x, np.full((*x.shape[:-1], n), 7, x.dtype)], axis=-1)  # noqa: E731
    wider = Batch(
        Groups(junk(g.prompts, 3), g.lengths, junk(g.responses, 2)),
        s.replace(behaviour_logp=junk(s.behaviour_logp, 2), mask=np.pad(s.mask, ((0, 0), (0, 0), (0, 2)))),
    )
    got = gradient_by_parts(program_for(tiny_config), tiny_params, wider, O.get("lpo-forward"))
    want = plain_gradient("lpo-forward", tiny_config, tiny_params, rollouts)
    np.testing.assert_array_less(relative_error(got, want), EXACT)


def test_first_update_reports_no_gap_and_clips_nothing(tiny_config, tiny_params, rollouts):
    """Sampled log-probs replace part 1; the ratio is 1 for all sizes of microbatches."""
    rollouts = behaviour(tiny_config, tiny_params, rollouts, noise=0.0)
    _, metrics = one_update(program_for(tiny_config, S + T), tiny_params, rollouts, O.get("lpo-forward"))
    np.testing.assert_array_less(metrics["lpo/logp_gap_max"], 2 * FORWARD_ROUNDING)  # two ways to compute it
    assert metrics["actor/pg_clipfrac"] == 0
    assert metrics["lpo/score_abs_max"] == 0


def test_gap_shows_a_wrong_sampler(tiny_config, tiny_params, rollouts):
    rollouts = behaviour(tiny_config, tiny_params, rollouts, noise=0.5)
    _, metrics = one_update(program_for(tiny_config), tiny_params, rollouts, O.get("lpo-forward"))
    assert 0.2 < metrics["lpo/logp_gap_mean"] < 0.8


def test_all_masked_batch_gives_a_zero_gradient(tiny_config, tiny_params, rollouts):
    empty = rollouts.replace(scored=rollouts.scored.replace(mask=np.zeros((P, K, T), bool)))
    after, metrics = one_update(program_for(tiny_config), tiny_params, empty, O.get("lpo-forward"))
    chex.assert_trees_all_equal(after.params, tiny_params)
    assert metrics["actor/grad_norm"] == 0
    of_tokens = {
        name: metrics.pop(name) for name in list(metrics) if "logp_gap" in name or "probs_diff" in name
    }
    assert len(of_tokens) == 4 and np.isnan(list(of_tokens.values())).all()  # there is none to compare
    chex.assert_tree_all_finite(metrics)


def with_equal_rewards(rollouts):
    """Groups 1 and 3 have no signal, and neither has response 2 of group 0, which is masked."""
    rewards = np.array(rollouts.scored.rewards)
    rewards[:] = [0, 1, 0, 1]
    rewards[1], rewards[3] = 1, 0
    valid = np.array(rollouts.scored.valid)
    valid[0, 2] = False
    return rollouts.replace(scored=rollouts.scored.replace(rewards=rewards, valid=valid))


SIGNALS = [("lpo-forward", True, 2), ("lpo-forward", False, 0), ("grpo", False, 2)]
BUDGETS = [S + 2 * T, 1, 10**6]


# Every layout is a program: one budget is tested with the first and with a later update, the rest in the slow tests.
@pytest.mark.parametrize(
    "name, first, left_out, budget",
    [
        pytest.param(*case, budget, marks=[] if i < 2 and j == 0 else pytest.mark.slow)
        for i, case in enumerate(SIGNALS)
        for j, budget in enumerate(BUDGETS)
    ],
)
@in_float64
def test_what_has_no_signal_does_not_run_and_changes_nothing(
    tiny_config, tiny_params, rollouts, name, first, left_out, budget
):
    """In later updates LPO pulls groups of equal rewards back to uniform, so that these have a signal."""
    rollouts = with_equal_rewards(behaviour(tiny_config, tiny_params, rollouts, noise=0.1))
    runner, objective = program_for(tiny_config, budget), O.get(name)
    scored = score(runner, tiny_params, rollouts.groups)
    used = TokenStats(rollouts.scored.behaviour_logp) if first else scored
    found = signal(objective, used, rollouts.scored)
    everything, some = (
        runner.pack(rollouts.groups, np.asarray(mask)) for mask in (rollouts.scored.mask, found.tokens)
    )
    want, _ = pull_back(runner, tiny_params, everything, found.cotangent)
    got, stats = pull_back(runner, tiny_params, some, found.cotangent)
    assert norm(want) > 1e-3
    np.testing.assert_array_less(relative_error(got, want), EXACT)
    stats, scored = jax.device_get((stats, scored))
    ran = stats.logp != 0
    assert [ran[1].any(), ran[3].any()] == [left_out == 0] * 2
    np.testing.assert_array_equal(ran[[0, 2]].any(-1), [[True, True, False, True], [True] * 4])
    chex.assert_trees_all_close(np.where(ran, stats.logp, 0), np.where(ran, scored.logp, 0), atol=EXACT)


def test_rows_end_at_their_last_token_with_a_cotangent(tiny_config, tiny_params, rollouts):
    runner, groups = program_for(tiny_config), rollouts.groups
    tokens = np.zeros((P, K, T), bool)
    tokens[0, 0, 2] = tokens[2, 1, 0] = True
    packed = runner.pack(groups, tokens)
    assert packed.layout.num_tokens == groups.lengths[0] + 3 + groups.lengths[2] + 1
    cotangent = TokenStats(tokens.astype(np.float32))
    got, _ = pull_back(runner, tiny_params, packed, cotangent)
    want, _ = pull_back(runner, tiny_params, groups, cotangent)
    np.testing.assert_array_less(relative_error(got, want), GRADIENT_ROUNDING)


def test_an_update_without_any_signal_is_still_a_step_of_the_optimizer(tiny_config, tiny_params, rollouts):
    scored = rollouts.scored.replace(rewards=np.ones((P, K), np.float32))
    runner, optimizer = program_for(tiny_config, S + 2 * T), Optimizer(optax.adam(0.1))
    found = signal(O.get("lpo-forward"), TokenStats(scored.behaviour_logp), scored)
    gradient, start = jax.tree.map(np.ones_like, tiny_params), jax.jit(optimizer.init)(tiny_params)
    state = TrainState(*jax.jit(optimizer.apply)(gradient, start, copied(tiny_params))[:2])
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    packed = runner.pack(rollouts.groups, np.asarray(found.tokens))
    assert packed.layout.num_tokens == packed.layout.count == 0
    state, stats, norm = update(runner, optimizer, state, packed, found.cotangent)
    assert norm == 0 and not np.any(stats.logp)
    moments = lambda opt: optax.tree_utils.tree_get(opt, "mu")  # noqa: E731
    chex.assert_trees_all_close(
        moments(state.opt_state), jax.tree.map(lambda m: np.float32(0.9) * m, moments(before[1])), rtol=1e-6
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), before[0])
    assert max(jax.tree.leaves(moved)) > 1e-2  # the momentum goes on


@pytest.mark.slow
@in_float64
def test_gradient_reaches_the_parameters_through_every_statistic(tiny_config, tiny_params, rollouts):
    """Entropy, collision, state norms and other tokens' log-probs, each with a cotangent, against plain autodiff."""
    teacher = top_k_teacher(program_for(tiny_config), 3, tiny_params, rollouts.groups)
    groups = rollouts.groups.replace(top_ids=teacher.ids)
    rng = np.random.default_rng(2)

    def total(params):
        """Over plain statistics of all states at once."""
        runner = program_for(tiny_config)
        layout, rows = runner.rows(groups)
        rows = jax.tree.map(lambda x: x[0], rows)
        states = rows.predicting(runner.hidden(params, rows))
        logp = jax.nn.log_softmax(decoder.project(states, decoder.unembedding(params)) / 0.7)
        p = jnp.exp(logp)
        stats = {
            "entropy": -(p * logp).sum(-1),
            "collision": (p * p).sum(-1),
            "hidden_norm": jnp.linalg.norm(states, axis=-1),
            "top_logp": jnp.take_along_axis(logp, rows.top_ids, axis=-1),
        }
        return sum((layout.from_rows(stats[name][None]) * weight).sum() for name, weight in weights.items())

    shapes = {name: (P, K, T) for name in ("entropy", "collision", "hidden_norm")} | {
        "top_logp": (P, K, T, 3)
    }
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    cotangent = TokenStats(**({"logp": np.zeros((P, K, T))} | weights))
    extra = ("collision", "hidden_norm")
    want = jax.jit(jax.grad(total))(tiny_params)
    got, stats = pull_back(program_for(tiny_config, S + 2 * T, extra=extra), tiny_params, groups, cotangent)
    np.testing.assert_array_less(relative_error(got, want), EXACT)
    chex.assert_trees_all_close(stats.top_logp, teacher.logp, atol=EXACT)
    chex.assert_trees_all_close(stats.entropy, teacher.entropy, atol=EXACT)
