"""Finished responses are verified while others are still sampled; the order in which they finish changes nothing."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lpo_jax.rewards import VerifierPool
from lpo_jax.rollout.collect import Collector
from lpo_jax.sampling import Responses, SampleRequest

VERIFIER = """
import time
from lpo_jax.rewards import Verdict

def verify(response, row):
    time.sleep(0.05)
    return Verdict(float(response) + row["n"], "pass", {})
"""
P, K = 3, 4


@dataclasses.dataclass
class Endings:
    """A fake sampler whose response (p, k) is the token 10 p + k; responses finish in the given order."""

    order: list[tuple[int, int]]
    seconds: float
    eos_ids: tuple[int, ...] = ()

    def __call__(self, weights, prompts, request, *, at_least, on_finished, ahead):
        tokens = 10 * np.arange(len(prompts.ids))[:, None] + np.arange(K)
        for p, k in self.order:
            on_finished(p, k, [tokens[p, k]])
        time.sleep(self.seconds)
        ones = np.ones(tokens.shape, np.int32)
        of_tokens = tokens[..., None], -1.0 * ones[..., None], ones[..., None], ones[..., None]
        return Responses(*of_tokens, ones, ones > 0, ones)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    file = tmp_path_factory.mktemp("verifier") / "slow.py"
    file.write_text(VERIFIER)
    with VerifierPool(f"{file}:verify", workers=2) as pool:
        yield pool


@pytest.mark.parametrize("backwards", [False, True])
def test_verdicts_belong_to_their_responses_and_are_made_meanwhile(pool, backwards):
    order = list(np.ndindex(P, K))[:: -1 if backwards else 1]
    tokenizer = SimpleNamespace(
        encode=lambda text, **options: [1, 2],
        decode=lambda ids, **options: " ".join(map(str, ids)),
    )
    task = SimpleNamespace(prompt=lambda row: "a prompt", gold=lambda row: None)
    collect = Collector(task, tokenizer, Endings(order, seconds=2.0), pool, 8)
    got = collect(
        None,
        [(p, {"n": 100 * p}) for p in range(P)],
        SampleRequest(K, max_tokens=1),
        written=["0", "00", "000"],
        at_least=P + 1,
    )
    np.testing.assert_array_equal(got.rewards, 110 * np.arange(P)[:, None] + np.arange(K))
    assert got.texts[2] == ["20", "21", "22", "23"]
    # Verifying goes on during sampling, so that almost none is left after it.
    assert got.seconds_sampling > 2.0 and got.seconds_verifying < 0.3
