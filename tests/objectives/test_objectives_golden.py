"""Coefficients against verl's and TRL's own losses (golden/losses.npz, by scripts/make_golden_losses.py).

A twin holds the settings with which our objective is a peer's formula. The goldens are d loss / d log-prob of every
token: the coefficient of its response times gate and token weight.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lpo_jax import objectives as O

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = np.load(GOLDEN / "losses.npz")
CASES = json.loads((GOLDEN / "losses.json").read_text())["cases"]
BATCHES = ("near", "far", "close", "on-policy")
SHAPE = (4, 5, 9)
# In float64 what is left is what the peers compute in float32 all the same: verl GPG's alpha, TRL's K / (K - 1).
TOLERANCE = {"float32": 1e-5, "float64": 1e-7}


@dataclasses.dataclass(frozen=True)
class Twin:
    """Our objective that is a peer's.

    Attributes:
      epsilon: what the peer adds to the standard deviation of a group, where we have a floor.
      factor: rewards [P,K] -> the peer's loss over ours, where the methods' notes say that they differ.
      same_loss: whether the loss too is the same; one in log-probs and one in log-ratios differ by a constant.
    """

    objective: O.Objective
    epsilon: float = 0.0
    factor: Callable[[np.ndarray], float] | None = None
    same_loss: bool = True


def twin(name, epsilon=0.0, factor=None, same_loss=True, **options):
    return Twin(O.get(name, **options), epsilon, factor, same_loss)


def gpg_factor(rewards):
    """verl's alpha is responses over responses with a reward; ours is groups over groups whose rewards differ."""
    alpha = rewards.size / np.count_nonzero(rewards)
    return alpha / (len(rewards) / np.count_nonzero(np.ptp(rewards, -1)))


VERL, TRL = {"epsilon": 1e-6, "ddof": 1}, {"epsilon": 1e-4, "ddof": 1}
TOKENS = {"aggregation": "token-mean"}
SUMS = {"aggregation": "seq-mean-token-sum"}
MAX_TOKENS = {"max_tokens": 16}
WIDE = {"epsilon_low": 0.2, "epsilon_high": 0.28}
TWINS = {
    "verl-grpo": twin("grpo", **VERL),
    "verl-grpo-defaults": twin("grpo", **VERL, **TOKENS, dual_clip=3.0),
    "verl-dapo": twin("dapo", **VERL),
    "verl-dr-grpo": twin("dr-grpo", **MAX_TOKENS),
    "verl-rloo": twin("rloo", **SUMS, same_loss=False),
    "verl-rloo-ppo": twin("grpo", **TOKENS, centre="loo", temperature="dr-grpo"),
    "verl-gpg": twin("gpg", factor=gpg_factor, same_loss=False),
    "verl-opo": twin("opo", same_loss=False),
    "verl-grpo-passk": twin("grpo-passk", **VERL),
    "verl-gspo": twin("gspo", **VERL),
    "verl-gspo-wide": twin("gspo", **VERL, **WIDE),
    "verl-gmpo": twin("gmpo", **VERL),
    "verl-cispo": twin("cispo", **VERL, same_loss=False),
    "verl-cispo-low": twin("cispo", **VERL, epsilon_low=0.2, same_loss=False),
    "verl-sapo": twin("sapo", **VERL),
    "verl-clip-cov": twin("clip-cov", **VERL, cov_fraction=1.0, cov_low=0.1, cov_high=1.0),
    "verl-kl-cov": twin("kl-cov", temperature="dr-grpo", cov_fraction=0.1),
    "trl-grpo": twin("grpo", **TRL),
    "trl-grpo-delta": twin("grpo", **TRL, dual_clip=3.0),
    "trl-bnpo": twin("grpo", **TRL, **TOKENS),
    # TRL's has no dual clip.
    "trl-dapo": twin("dapo", **TRL, dual_clip=0.0),
    "trl-dr-grpo": twin("dr-grpo", **MAX_TOKENS),
    "trl-gspo": twin("gspo", **TRL),
    "trl-gspo-wide": twin("gspo", **TRL, **WIDE),
    # TRL's epsilon_high of CISPO is the bound itself, 1.28.
    "trl-cispo": twin("cispo", **TRL, same_loss=False),
    "trl-sapo": twin("sapo", **TRL),
    "trl-rloo": twin("rloo", **SUMS, same_loss=False),
}


def padded(array, fill, dtype):
    """`array` inside SHAPE: one shape for all batches, since each is a compile."""
    whole = np.full(SHAPE[: array.ndim], fill, dtype)
    whole[tuple(map(slice, array.shape))] = array
    return whole


def given(name, dtype):
    mask = padded(ANSWERS[f"{name}/mask"], False, bool)
    rewards, logp, behaviour = (
        padded(ANSWERS[f"{name}/{key}"], np.nan, dtype) for key in ("rewards", "logp", "behaviour_logp")
    )
    return O.TokenStats(np.where(mask, logp, np.nan)), O.Scored(behaviour, rewards, mask)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective, stats, scored):
    loss, gradient = jax.value_and_grad(lambda stats: objective(stats, scored)[0])(stats)
    return loss, gradient.logp


# In float32, one of each kind of gate and of weights.
FLOAT32 = ("verl-grpo", "verl-gspo", "verl-cispo", "verl-sapo", "verl-clip-cov", "trl-dr-grpo")
# In float64, one of each method. The others differ in their options, or are the same method of the other peer.
FLOAT64 = (
    *("verl-grpo", "verl-dapo", "verl-dr-grpo", "verl-rloo", "verl-gpg", "verl-opo", "verl-grpo-passk"),
    *("verl-gspo", "verl-gmpo", "verl-cispo", "verl-sapo", "verl-clip-cov", "verl-kl-cov"),
    *("trl-grpo-delta", "trl-bnpo"),
)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, marks=() if case in default else pytest.mark.slow)
        for dtype, default in (("float64", FLOAT64), ("float32", FLOAT32))
        for case in TWINS
    ],
)
def test_gradient_is_the_peers(case, dtype):
    ours, tolerance = TWINS[case], TOLERANCE[dtype]
    for name in BATCHES:
        with jax.enable_x64(dtype == "float64"):
            loss, gradient = jax.device_get(loss_and_gradient(ours.objective, *given(name, dtype)))
        peers_loss, expected = (ANSWERS[f"{case}/{name}/{dtype}/{key}"] for key in ("loss", "gradient"))
        rewards = ANSWERS[f"{name}/rewards"]
        sigma = np.maximum(rewards.std(-1, ddof=1), 1e-9)[:, None, None]
        factor = ours.factor(rewards) if ours.factor else 1.0
        expected = padded(expected * (1 + ours.epsilon / sigma) / factor, 0, dtype)
        assert gradient.dtype == dtype
        assert np.linalg.norm(gradient - expected) <= tolerance * np.linalg.norm(expected)
        np.testing.assert_allclose(
            gradient, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )
        if ours.same_loss:
            # No standard deviation but 0 is below 0.2.
            np.testing.assert_allclose(loss, peers_loss, rtol=tolerance, atol=5 * ours.epsilon + 1e-6)


def test_every_golden_has_a_twin():
    assert set(CASES) == set(TWINS)
