"""A KV cache in pages: rows that are set aside and resumed draw the tokens that they draw alone, with few programs."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from precision import FORWARD_ROUNDING

from lpo_jax.errors import UserError
from lpo_jax.parallel.sharding import AXES
from lpo_jax.sampling import (
    Ahead,
    PromptBatch,
    Responses,
    Sampler,
    SampleRequest,
    calls,
    page_pool,
    pages,
    rows,
)
from lpo_jax.sampling import decode as device
from lpo_jax.sampling.padding import pad_prompts

P, K, T = 5, 4, 24
EOS = (1, 17)
PROMPTS = [list(range(3, 4 + p)) for p in range(P)]
BUDGETS = np.random.default_rng(0).integers(1, T + 10, (P, K))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(rows, "PREFILL_ROWS", 2)
    monkeypatch.setattr(calls, "FEWEST", 4)
    monkeypatch.setattr(pages, "PAGE", 4)


@pytest.fixture(params=[None, 9], ids=["all keys", "window"])
def window(request):
    return request.param


@pytest.fixture
def sample(tiny_config, tiny_params, window):
    config = dataclasses.replace(tiny_config, num_layers=1, sliding_window=window)
    params = tiny_params | {"layers": jax.tree.map(lambda x: x[:1], tiny_params["layers"])}
    # Two shards of two devices each: five prompts do not divide evenly.
    devices = np.array(jax.devices()[:4]).reshape(2, 1, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)

    def run(attention="interpret", max_rows=0, kv_tokens=0, many=False, kv_dtype="compute", **options):
        sampler = Sampler(
            config,
            EOS,
            np.float32,
            mesh=mesh if many else None,
            max_rows=max_rows,
            attention=attention,
            kv_tokens=kv_tokens,
            kv_dtype=kv_dtype,
        )
        padded, lengths = pad_prompts(PROMPTS, 16)
        batch = PromptBatch(padded, lengths, np.arange(P))
        return sampler(sampler.prepare(params), batch, SampleRequest(K, T, seed=5), **options)

    return run


@pytest.fixture
def moves(monkeypatch):
    """What `Admission.schedule` has decided."""
    found = []

    class Recorded(pages.Admission):
        def schedule(self, needed):
            found.append(super().schedule(needed))
            return found[-1]

    monkeypatch.setattr(pages, "Admission", Recorded)
    return found


def assert_same(got, whole):
    np.testing.assert_array_equal(got.tokens, whole.tokens)
    np.testing.assert_array_equal(got.lengths, whole.lengths)
    np.testing.assert_array_equal(got.finished, whole.finished)
    np.testing.assert_allclose(got.log_probs, whole.log_probs, atol=2 * FORWARD_ROUNDING)


def test_pages_and_preemption_change_no_response(sample, moves):
    """Against plain attention, with pools from the smallest to ample ones, on one device and on a mesh."""
    options = {"budgets": BUDGETS}
    whole = sample("plain", **options)
    assert len(np.unique(whole.lengths)) > 3
    set_aside = []
    for max_rows, kv_tokens, many in (
        (0, 0, False),
        (6, 0, False),
        (0, 40, False),
        (6, 80, False),
        (8, 112, True),
    ):
        moves.clear()
        got = sample(max_rows=max_rows, kv_tokens=kv_tokens, many=many, **options)
        set_aside.append(sum(len(move.set_aside) for move in moves))
        assert_same(got, whole)
    assert set_aside[:2] == [0, 0] and min(set_aside[2:]) >= 3


@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_keys_and_values_in_8_bits(sample, moves, kv_dtype, window):
    """The same responses plain and in pages, with preemption, on a mesh, and resumed; not those of floats.

    Where floats differ in their last digit, a number of 8 bits may differ by one, which is a difference of log-probs.
    """
    if window:
        pytest.skip("how keys and values are stored does not depend on the window")
    options = {"budgets": BUDGETS, "kv_dtype": kv_dtype}
    whole, of_floats = sample("plain", **options), sample("plain", budgets=BUDGETS)
    same = whole.tokens[..., 0] == of_floats.tokens[..., 0]
    gap = np.abs(whole.log_probs - of_floats.log_probs)[same][:, 0]
    assert 1e-3 < gap.max() < 0.3 and same.mean() > 0.5
    started = sample("plain", kv_dtype=kv_dtype, budgets=np.minimum(BUDGETS, 12))
    for got in (
        sample("plain", max_rows=6, **options),
        sample(max_rows=6, kv_tokens=80, **options),
        sample(max_rows=8, kv_tokens=112, many=True, **options),
        sample("plain", max_rows=8, ahead=Ahead(1, np.zeros(P, np.uint32), started), **options),
    ):
        np.testing.assert_array_equal(got.tokens, whole.tokens)
        np.testing.assert_allclose(got.log_probs, whole.log_probs, atol=0.02)
    assert sum(len(move.set_aside) for move in moves) >= 3


def test_rows_resume_in_a_later_call(sample, moves):
    """Rows begin with tokens of an earlier call, and some of them are set aside in this one."""
    whole = sample("plain")
    started = sample(kv_tokens=48, max_rows=8, budgets=np.minimum(BUDGETS, 12))
    moves.clear()
    got = sample(kv_tokens=48, max_rows=8, ahead=Ahead(1, np.zeros(P, np.uint32), started))
    assert sum(len(move.set_aside) for move in moves) >= 3
    assert_same(got, whole)


def test_rows_of_later_steps_are_set_aside_first(sample, moves, window):
    """Two rounds: those of the second are sampled as far as pages allow, and no row of the first waits for them."""
    if window:
        pytest.skip("the order does not depend on attention")
    first = np.zeros((P, K), int)
    first[:2] = T
    later = np.where(first, 0, T)
    whole = sample(budgets=first)
    started = Responses.empty(P, K, T)
    got = sample(kv_tokens=160, budgets=first + later, ahead=Ahead(1, np.zeros(P, np.uint32), started))
    np.testing.assert_array_equal(got.tokens[:2], whole.tokens[:2])
    assert all(row >= min(move.entered, default=0) for move in moves for row in move.set_aside)


def test_few_programs(sample, monkeypatch, window):
    """One program decodes, however many rows, pages and preemptions there are; prefills have one for each bucket."""
    if window:
        pytest.skip("programs do not depend on the window")
    shapes = {"decode_pages": [], "insert_sequences": []}

    def record(module, name):
        run = getattr(module, name)

        def recorded(*arguments):
            shapes[name].append(str(jax.tree.map(np.shape, arguments[1:])))
            return run(*arguments)

        monkeypatch.setattr(module, name, recorded)

    record(device, "decode_pages")
    record(page_pool, "insert_sequences")
    for budgets in (BUDGETS, np.full((P, K), T)):
        sample(max_rows=6, kv_tokens=80, budgets=budgets)
    assert len(set(shapes["decode_pages"])) == 1 < len(shapes["decode_pages"])
    # Prompts of 16 tokens, and sequences of prompt and response of up to 16 and up to 32.
    assert len(set(shapes["insert_sequences"])) <= 3 < len(shapes["insert_sequences"])


def test_a_cache_too_small_for_a_row_is_refused(sample, window):
    if window:
        pytest.skip("sizes do not depend on the window")
    with pytest.raises(
        UserError, match=r"^sampling.kv_tokens: 6 pages of 4 tokens .* needs 7; raise it"
    ) as error:
        sample(kv_tokens=27)
    assert "\n" not in str(error.value)
