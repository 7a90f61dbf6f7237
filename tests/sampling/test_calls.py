"""The number of tokens of a call of `decode`: the rule, and that responses do not depend on it."""

import numpy as np
import pytest
from precision import FORWARD_ROUNDING

from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest, calls, pages

EOS, P, K, T = (1, 17), 3, 4, 40


def test_calls_are_longer_where_looks_take_a_share_of_the_time():
    tokens, look = calls.call_tokens, calls.look_seconds(1000)
    assert [tokens(4096, 1000, look * steps) for steps in (10, 3, 1)] == [16, 64, 128]
    # Steps that read memory for each token of a call: the time of looks and of these reads is least at 32 tokens.
    assert tokens(4096, 1000, look, recent_seconds=look / 32**2) == 32
    limits = 10, 256, 512, 1024, 2048, 10**6
    assert [tokens(limit, 1000, 0.0) for limit in limits] == [16, 16, 32, 64, 128, 128]


def test_there_are_four_numbers():
    """Whatever the sizes, so that few programs are compiled."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform([0, 0, 6, 0], [5, 5, 11, 9], (2000, 4))
    found = {
        calls.planned_call_tokens(int(limit), int(rows), weights, recent, platform)
        for limit, rows, weights, recent in sizes
        for platform in ("cpu", "gpu", "tpu")
    }
    assert found == {16, 32, 64, 128}


@pytest.mark.parametrize("sizes", [(5, 32), pytest.param((16, 5), marks=pytest.mark.slow)])
@pytest.mark.parametrize("attention", [pytest.param("plain", marks=pytest.mark.slow), "interpret"])
def test_no_response_depends_on_the_tokens_of_a_call(one_layer, monkeypatch, attention, sizes):
    """With more rows than slots, a small pool of pages, and a stop string."""
    monkeypatch.setattr(pages, "PAGE", 4)
    config, params = one_layer
    letters = lambda ids: "".join(chr(97 + i % 26) for i in ids)  # noqa: E731
    kv_tokens = 160 if attention == "interpret" else 0
    sampler = Sampler(config, EOS, np.float32, letters, max_rows=6, attention=attention, kv_tokens=kv_tokens)
    weights = sampler.prepare(params)
    prompts = PromptBatch(np.arange(3, 3 + P * 4, dtype=np.int32).reshape(P, 4), np.full(P, 4), np.arange(P))
    found = []
    for tokens in sizes:
        monkeypatch.setattr(calls, "planned_call_tokens", lambda *sizes, tokens=tokens: tokens)
        found.append(sampler(weights, prompts, SampleRequest(K, T, stop=("ab",), seed=3)))
    assert len(np.unique(found[0].lengths)) > 3
    np.testing.assert_array_equal(found[1].tokens, found[0].tokens)
    np.testing.assert_array_equal(found[1].lengths, found[0].lengths)
    np.testing.assert_allclose(found[1].log_probs, found[0].log_probs, atol=2 * FORWARD_ROUNDING)
