"""Sampling ahead: rows of later steps take free slots, and go on with other weights where earlier ones have stopped."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from precision import FORWARD_ROUNDING

from lpo_jax.models import decoder
from lpo_jax.parallel.sharding import AXES
from lpo_jax.sampling import (
    Ahead,
    PromptBatch,
    Responses,
    Sampler,
    SampleRequest,
    batching,
    calls,
    kv_cache,
    pages,
    rows,
)
from lpo_jax.sampling.padding import pad_prompts
from lpo_jax.sampling.responses import concatenate_responses

P, K, T = 3, 4, 24  # P prompts in each step
EOS = (1, 17)
STEPS = 4
rng = np.random.default_rng(0)
PROMPTS = [[list(range(3, 4 + p + step)) for p in range(P)] for step in range(STEPS + 3)]
LENGTHS = {
    "ends": np.full((STEPS + 3, P, K), T),
    "ragged": rng.integers(1, T + 1, (STEPS + 3, P, K)),
    "long tail": np.minimum(np.exp(rng.normal(1, 1, (STEPS + 3, P, K))).astype(int) + 1, T),
    "truncated": np.full((STEPS + 3, P, K), T),
    "none": np.where(rng.random((STEPS + 3, P, K)) < 0.5, 0, T),
}


def slow(*values):
    """A case whose programs no other test needs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(batching, "MIN_SLOTS", 8)
    monkeypatch.setattr(rows, "PREFILL_ROWS", 3)
    monkeypatch.setattr(calls, "FEWEST", 4)
    monkeypatch.setattr(pages, "PAGE", 4)
    monkeypatch.setattr(kv_cache, "FIRST_TOKENS", 16)


@pytest.fixture(scope="module")
def models(one_layer):
    """Config and the parameters of every step."""
    config, first = one_layer
    return config, [jax.tree.map(lambda x, i=i: x * (1 + 0.05 * i), first) for i in range(STEPS)]


def batch(prompts, step):
    padded, lengths = pad_prompts(prompts, 16)
    return PromptBatch(padded, lengths, np.tile(np.arange(P, dtype=np.uint32), len(prompts) // P))


def run(models, ahead, lengths, weights_of, *, eos=EOS, **settings):
    """The responses of all steps, each of which begins up to `ahead` steps early, and those that were reported."""
    config, params = models
    sampler = Sampler(config, eos, np.float32, **settings)
    done, reported, in_flight = [], [], []
    for step in range(STEPS):
        while len(in_flight) <= ahead:
            in_flight.append(Responses.empty(P, K, 1))
        steps = range(step, step + ahead + 1)
        got = sampler(
            sampler.prepare(params[weights_of(step)]),
            batch([ids for s in steps for ids in PROMPTS[s]], step),
            SampleRequest(K, T, seed=5, step=step),
            budgets=np.concatenate([lengths[s] for s in steps]),
            on_finished=lambda *row, step=step: reported.append((step, *row)),
            ahead=Ahead(ahead + 1, np.repeat(steps, P), concatenate_responses(in_flight)),
        )
        done.append(got.take(np.arange(P)).trimmed())
        in_flight = [got.take(np.arange(i * P, (i + 1) * P)) for i in range(1, ahead + 1)]
        in_flight = [Responses.from_text(later.to_text()) for later in in_flight]
    return done, reported


def alone(models, lengths, weights_of, **settings):
    return run(models, 0, lengths, weights_of, **settings)[0]


@pytest.mark.parametrize("ahead, max_rows", [(2, 5), slow(1, 0), slow(2, 0), slow(1, 5)])
@pytest.mark.parametrize("case", ["ends", "ragged", "long tail", slow("truncated"), "none"])
def test_rows_that_began_early_draw_the_same_tokens_from_the_same_weights(models, case, ahead, max_rows):
    """Without an update in between, nothing shows when a row has been sampled, or with which others."""
    lengths = LENGTHS[case]
    eos = (-1,) if case == "truncated" else EOS
    whole = alone(models, lengths, lambda step: 0, eos=eos)
    got, reported = run(models, ahead, lengths, lambda step: 0, eos=eos, max_rows=max_rows)
    early = 0
    for step, (one, other) in enumerate(zip(got, whole)):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.lengths, other.lengths)
        np.testing.assert_array_equal(one.finished, other.finished)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2 * FORWARD_ROUNDING)
        age = step - one.versions[one.mask]
        assert age.size == 0 or 0 <= age.min() <= age.max() <= min(ahead, step)
        early += (age > 0).sum()
    assert early > 0 or (case == "truncated" and not max_rows)  # then all rows end together
    assert sorted(reported) == [
        (step, p, k, x.ids(p, k))
        for step, x in enumerate(got)
        for p in range(P)
        for k in range(K)
        if lengths[step, p, k]
    ]


@pytest.mark.parametrize("ahead", [1, 2])
def test_tokens_are_those_of_the_recorded_weights(models, ahead):
    """The log-prob of each token is the one of the weights of its version, given all tokens before it."""
    config, params = models
    got, _ = run(models, ahead, LENGTHS["ragged"], lambda step: step)
    log_softmax = jax.jit(lambda params, ids: jax.nn.log_softmax(decoder.logits(config, params, ids)))
    ages, change = set(), 0.0
    for step, responses in enumerate(got):
        rows = [(PROMPTS[step][p], responses.ids(p, k)) for p, k in np.ndindex(P, K)]
        ids = np.zeros((P * K, 16 + T), np.int32)  # causal: padding behind a row changes nothing
        for row, (prompt, response) in zip(ids, rows):
            row[: len(prompt) + len(response)] = prompt + response
        by_version = [np.asarray(log_softmax(params[version], ids)) for version in range(step + 1)]
        for row, (p, k) in enumerate(np.ndindex(P, K)):
            prompt, response = rows[row]
            at = len(prompt) - 1 + np.arange(len(response))
            versions = responses.versions[p, k, : len(response)]
            assert (np.diff(versions) >= 0).all()
            expected = np.array([by_version[v][row, i, token] for v, i, token in zip(versions, at, response)])
            found = responses.log_probs[p, k, : len(response)]
            np.testing.assert_allclose(found, expected, atol=2 * FORWARD_ROUNDING)
            change = max(change, np.abs(by_version[step][row, at, response] - expected).max())
            ages |= set((step - versions).tolist())
    assert ages == set(range(ahead + 1))
    assert change > 0.01  # so that the weights of another step would have been noticed


@pytest.mark.parametrize(
    ("many", "attention"), [slow(False, "interpret"), (True, "plain")], ids=["kernels", "two shards"]
)
def test_kernels_and_shards_go_on_alike(models, many, attention):
    devices = np.array(jax.devices()[:4]).reshape(2, 1, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3) if many else None
    lengths = LENGTHS["long tail"]
    whole = alone(models, lengths, lambda step: 0)
    got, _ = run(models, 1, lengths, lambda step: 0, mesh=mesh, attention=attention, max_rows=6)
    assert any((x.versions[x.mask] < step).any() for step, x in enumerate(got))
    for one, other in zip(got, whole):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2 * FORWARD_ROUNDING)


def test_a_batch_may_go_on_without_later_rounds(models):
    """All rows have a slot from the start, and some of them begin with tokens."""
    config, params = models
    sampler = Sampler(config, EOS, np.float32)
    weights, prompts = sampler.prepare(params[0]), batch(PROMPTS[0], 0)
    request = SampleRequest(K, T, seed=5)
    whole = sampler(weights, prompts, request)
    started = sampler(weights, prompts, request, budgets=LENGTHS["ragged"][0])
    got = sampler(weights, prompts, request, ahead=Ahead(1, np.zeros(P), started))
    np.testing.assert_array_equal(got.tokens, whole.tokens)
    np.testing.assert_allclose(got.log_probs, whole.log_probs, atol=2 * FORWARD_ROUNDING)


def test_text_keeps_every_bit():
    responses = Responses.empty(2, 3, 4)
    responses.log_probs[:] = np.random.default_rng(0).normal(size=(2, 3, 4))
    for name, x in vars(Responses.from_text(responses.to_text())).items():
        assert x.dtype == getattr(responses, name).dtype
        np.testing.assert_array_equal(x, getattr(responses, name))
