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
    batching,
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
    monkeypatch.setattr(batching, "MIN_SLOTS", P * K)  # with plain attention, rows never move: one program
    monkeypatch.setattr(rows, "PREFILL_ROWS", 2)
    monkeypatch.setattr(calls, "FEWEST", 4)
    monkeypatch.setattr(pages, "PAGE", 4)


@pytest.fixture
def window(request):
    return getattr(request, "param", None)


@pytest.fixture
def sample(one_layer, window):
    config, params = one_layer
    config = dataclasses.replace(config, sliding_window=window)
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


def slow(*values):
    """A case whose programs no other test needs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def pool(max_rows=0, kv_tokens=0, many=False):
    return {"max_rows": max_rows, "kv_tokens": kv_tokens, "many": many}


@pytest.mark.parametrize(
    "window, options",
    [
        (None, pool(8, 112, many=True)),
        (9, pool(6)),
        slow(9, pool(kv_tokens=40)),
        slow(None, pool()),
        slow(None, pool(6)),
        slow(None, pool(6, 80)),
        slow(None, pool(kv_tokens=40)),
        slow(9, pool()),
        slow(9, pool(6, 80)),
        slow(9, pool(8, 112, many=True)),
    ],
    indirect=["window"],
)
def test_pages_and_preemption_change_no_response(sample, moves, options):
    """Against plain attention, with pools from the smallest to ample ones, on one device and on a mesh."""
    whole = sample("plain", budgets=BUDGETS)
    assert len(np.unique(whole.lengths)) > 3
    assert_same(sample(budgets=BUDGETS, **options), whole)
    set_aside = sum(len(move.set_aside) for move in moves)
    assert set_aside >= 3 if options["kv_tokens"] else set_aside == 0


@pytest.mark.parametrize("window", [None], indirect=True)
@pytest.mark.parametrize(
    "kv_dtype, way",
    [
        slow("int8", "pages"),
        slow("int8", "resumed"),
        slow("int8", "slots"),
        slow("int8", "mesh"),
        *(slow("fp8", way) for way in ("pages", "resumed", "slots", "mesh")),
    ],
)
def test_keys_and_values_in_8_bits(sample, moves, kv_dtype, way):
    """The same responses plain and in pages, with preemption, on a mesh, and resumed; not those of floats.

    Where floats differ in their last digit, a number of 8 bits may differ by one, which is a difference of log-probs.
    How keys and values are stored does not depend on the window.
    """
    options = {"budgets": BUDGETS, "kv_dtype": kv_dtype}
    whole, of_floats = sample("plain", **options), sample("plain", budgets=BUDGETS)
    same = whole.tokens[..., 0] == of_floats.tokens[..., 0]
    gap = np.abs(whole.log_probs - of_floats.log_probs)[same][:, 0]
    assert 1e-3 < gap.max() < 0.3 and same.mean() > 0.5
    if way == "resumed":
        started = sample("plain", kv_dtype=kv_dtype, budgets=np.minimum(BUDGETS, 12))
        got = sample("plain", max_rows=8, ahead=Ahead(1, np.zeros(P, np.uint32), started), **options)
    elif way == "slots":
        got = sample("plain", max_rows=6, **options)
    else:
        got = sample(**(pool(6, 80) if way == "pages" else pool(8, 112, many=True)), **options)
    np.testing.assert_array_equal(got.tokens, whole.tokens)
    np.testing.assert_allclose(got.log_probs, whole.log_probs, atol=0.02)
    assert way not in ("pages", "mesh") or sum(len(move.set_aside) for move in moves) >= 2


@pytest.mark.parametrize("window", [None, slow(9)], indirect=True)
def test_rows_resume_in_a_later_call(sample, moves):
    """Rows begin with tokens of an earlier call, and some of them are set aside in this one."""
    whole = sample("plain")
    started = sample(kv_tokens=44, max_rows=8, budgets=np.minimum(BUDGETS, 12))
    moves.clear()
    got = sample(kv_tokens=44, max_rows=8, ahead=Ahead(1, np.zeros(P, np.uint32), started))
    assert sum(len(move.set_aside) for move in moves) >= 3
    assert_same(got, whole)


@pytest.mark.slow
def test_rows_of_later_steps_are_set_aside_first(sample, moves):
    """Two rounds: those of the second are sampled as far as pages allow, and no row of the first waits for them."""
    first = np.zeros((P, K), int)
    first[:2] = T
    later = np.where(first, 0, T)
    whole = sample(budgets=first)
    started = Responses.empty(P, K, T)
    got = sample(kv_tokens=160, budgets=first + later, ahead=Ahead(1, np.zeros(P, np.uint32), started))
    np.testing.assert_array_equal(got.tokens[:2], whole.tokens[:2])
    assert all(row >= min(move.entered, default=0) for move in moves for row in move.set_aside)


def test_few_programs(sample, monkeypatch):
    """One program decodes, however many rows, pages and preemptions there are; prefills have one for each bucket."""
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


def test_a_cache_too_small_for_a_row_is_refused(sample):
    with pytest.raises(
        UserError, match=r"^sampling.kv_tokens: 6 pages of 4 tokens .* needs 7; raise it"
    ) as error:
        sample(kv_tokens=27)
    assert "\n" not in str(error.value)
