"""Continuous batching: no response depends on when its row is queued, admitted or moved, or on how many devices."""

import gc
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from precision import FORWARD_ROUNDING

from lpo_jax.parallel.sharding import AXES
from lpo_jax.sampling import (
    PromptBatch,
    Responses,
    Sampler,
    SampleRequest,
    batching,
    calls,
    kv_cache,
    rows,
)
from lpo_jax.sampling.padding import pad_prompts

P, K, T = 5, 4, 24
EOS = (1, 17)


def slow(*values):
    """A case whose programs no other test needs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def text(ids):
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def sample(one_layer):
    prompts = [list(range(3, 4 + p)) for p in range(P)]
    config, params = one_layer
    # Two shards of two devices each: five prompts do not divide evenly.
    devices = np.array(jax.devices()[:4]).reshape(2, 1, 2)
    meshes = {False: None, True: Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)}
    prepared = {many: Sampler(config, EOS, mesh=mesh).prepare(params) for many, mesh in meshes.items()}

    def run(max_rows, many=False, stop=(), **options):
        sampler = Sampler(config, EOS, np.float32, text, meshes[many], max_rows)
        padded, lengths = pad_prompts(prompts, 16)
        request = SampleRequest(K, T, stop=stop, seed=5)
        return sampler(prepared[many], PromptBatch(padded, lengths, np.arange(P)), request, **options)

    return run


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(batching, "MIN_SLOTS", 4)
    monkeypatch.setattr(batching, "LAST_SLOTS", 8)
    monkeypatch.setattr(calls, "FEWEST", 4)
    monkeypatch.setattr(kv_cache, "FIRST_TOKENS", 16)


BUDGETS = np.random.default_rng(0).integers(1, T + 10, (P, K))
CASES = {
    "ends": {},
    "budgets": {"budgets": BUDGETS},
    "stops": {"stop": ("q", "ab")},
    "not sampled": {"budgets": BUDGETS * np.array([[1], [0], [1], [1], [0]])},
}


@pytest.mark.parametrize("max_rows", [slow(0), 8])
def test_weights_are_free_after_a_call_without_the_garbage_collector(tiny_config, tiny_params, max_rows):
    sampler = Sampler(tiny_config, EOS, max_rows=max_rows)
    weights = sampler.prepare(tiny_params)
    padded, lengths = pad_prompts([[3, 4], [5]] * 2, 16)
    gc.collect()
    gc.disable()
    try:
        sampler(weights, PromptBatch(padded, lengths, np.arange(4)), SampleRequest(K, 4))
        layer = weakref.ref(weights["layers"][0]["w_up"])
        del weights
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "max_rows, many", [(6, True), slow(0, False), slow(6, False), slow(0, True), slow(2, True)]
)
@pytest.mark.parametrize("case", CASES)
def test_batching_does_not_change_responses(sample, case, max_rows, many, monkeypatch):
    options = CASES[case]
    with monkeypatch.context() as patch:
        for name in ("MIN_SLOTS", "LAST_SLOTS"):
            patch.setattr(batching, name, P * K)  # rows never move
        whole = sample(0, **options)
    assert len(np.unique(whole.lengths)) > 3
    got = sample(max_rows, many, **options)
    np.testing.assert_array_equal(got.tokens, whole.tokens)
    np.testing.assert_array_equal(got.lengths, whole.lengths)
    np.testing.assert_array_equal(got.finished, whole.finished)
    np.testing.assert_allclose(got.log_probs, whole.log_probs, atol=2 * FORWARD_ROUNDING)


def test_budgets_bound_each_response(sample):
    free, bound = sample(0), sample(0, budgets=BUDGETS)
    np.testing.assert_array_equal(bound.lengths, np.minimum(free.lengths, BUDGETS))
    cut = BUDGETS < free.lengths
    assert cut.any() and not bound.finished[cut].any()
    np.testing.assert_array_equal(bound.finished[~cut], free.finished[~cut])


def test_finished_responses_are_reported_once_and_whole(sample):
    for max_rows, many in ((0, False), (6, True)):
        reported = []
        got = sample(max_rows, many, stop=("q",), on_finished=lambda *row, to=reported: to.append(row))
        assert sorted(reported) == [(p, k, got.ids(p, k)) for p in range(P) for k in range(K)]


@pytest.mark.parametrize("many", [slow(False), True])
def test_free_slots_are_filled_and_the_last_rows_move(sample, monkeypatch, many):
    slots = []

    def decode(settings, weights, state, *arguments, run=batching.device.decode):
        slots.append(len(state.token))
        return run(settings, weights, state, *arguments)

    monkeypatch.setattr(batching.device, "decode", decode)
    budgets = np.minimum(BUDGETS, 6)
    budgets[::3, 0] = T  # one long row on each of two shards
    got = sample(0, many, budgets=budgets)
    all_rows = (P + many) * K  # each of two shards gets the same number of prompts
    assert slots[0] == all_rows and slots[-1] < all_rows and sorted(slots, reverse=True) == slots
    slots.clear()
    waited = sample(6, many, budgets=budgets)
    assert slots[0] == 6 and sorted(slots, reverse=True) == slots
    for responses in (got, waited):
        assert (responses.row_steps >= responses.lengths).all()
    assert waited.lengths.sum() / waited.row_steps.sum() > got.lengths.sum() / got.row_steps.sum()


def test_rows_of_the_last_call_move_once_with_all_prompts(sample, monkeypatch):
    shapes = []

    def decode(settings, weights, state, lengths, *arguments, run=batching.device.decode):
        shapes.append((len(state.token), len(lengths)))
        return run(settings, weights, state, lengths, *arguments)

    monkeypatch.setattr(batching.device, "decode", decode)
    budgets = np.full((P, K), 1)
    budgets[:2, 0] = calls.FEWEST  # two rows go on after the first token, until the end of the call
    got = sample(0, budgets=budgets)
    assert shapes == [(P * K, P), (batching.LAST_SLOTS, P)]
    free = sample(0)
    np.testing.assert_array_equal(got.lengths, np.minimum(free.lengths, budgets))
    kept = np.arange(got.tokens.shape[-1]) < got.lengths[..., None]
    np.testing.assert_array_equal(got.tokens[kept], free.tokens[..., : got.tokens.shape[-1]][kept])


@pytest.mark.parametrize("shards", [1, 4])
def test_work_on_long_responses_of_uneven_length_is_mostly_useful(monkeypatch, shards):
    """Geometric lengths with a mean of an eighth of the longest: the host side alone, without a device."""
    rng = np.random.default_rng(2)
    P, K, T, max_rows = 64, 8, 512, 64
    budgets = np.minimum(rng.geometric(8 / T, (P, K)), T)

    def decode(settings, weights, state, lengths, prompt_kv, cache_tokens, index, limit, min_active):
        assert index + limit <= cache_tokens
        drawn, active, steps = state.drawn.copy(), state.active, 0
        while steps < limit and active.sum() >= min_active:
            drawn += active
            active, steps = active & (drawn < state.budget), steps + 1
        tokens = np.ones((len(drawn), settings.call_tokens), np.int32)
        floats = tokens.astype(np.float32)
        out = batching.device.DecodeOutput(tokens, floats, floats, drawn, active, steps)
        return out, cache_tokens

    monkeypatch.setattr(batching.device, "decode", decode)
    fakes = {
        "allocate": lambda config, dtype, sequences, tokens: tokens,
        "resize": lambda cache, sequences, shift, tokens: tokens,
        "prefill": lambda *arguments: None,
        "insert_prompts": lambda cache, *rest: cache,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(kv_cache, name, fake)
    monkeypatch.setattr(calls, "FEWEST", batching.device.DecodeSettings.call_tokens)
    monkeypatch.setattr(rows.sharding, "batch_shards", lambda: shards)
    keys = np.zeros((P, K, 2), np.uint32)
    batcher = batching.ContinuousBatcher(
        batching.device.DecodeSettings(None, (), None, None),
        None,
        PromptBatch(np.ones((P, 4), np.int32), np.ones(P, np.int32), np.arange(P)),
        keys,
        budgets,
        Responses.empty(P, K, T),
        0,
        max_rows,
        None,
        None,
    )
    got = batcher.run()
    np.testing.assert_array_equal(got.lengths, budgets)
    assert got.lengths.sum() / got.row_steps.sum() > (0.8 if shards == 1 else 0.7)
