"""Trust-region gates: how far one token may move in one update.

A gate is a primitive phi(delta, c) of the token log-ratio delta = log pi_theta - log pi_b (nats) and the
coefficient c of its response (no gradient flows through c). Its derivative is c times a factor: 1 at
delta = 0, and 0 on the tokens that the gate shuts. A descent step makes a response with c < 0 likelier.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# verl's bound on the log-ratio before exp: beyond it the ratio is a broken model's and would overflow.
MAX_LOG_RATIO = 20.0

CLIPS = ("hard", "ppo", "joint", "none")


@dataclasses.dataclass(frozen=True)
class Gate:
    """No trust region: phi = c delta. The base of the others."""

    def scored(self, delta: jax.Array) -> jax.Array:
        """The log-ratios [P,K,T] that the scores s_k are made of."""
        return delta

    def __call__(self, delta: jax.Array, c: jax.Array) -> jax.Array:
        """Token loss [P,K,T] of log-ratios [P,K,T] and coefficients [P,K,1]."""
        return c * delta


@dataclasses.dataclass(frozen=True)
class HardLogClip(Gate):
    """phi = c clip(delta, log(1 - eps), log(1 + eps)): a token out of range is silent, whatever c's sign.

    The literal reading of LPO, arXiv 2605.06139, appendix D.3 (variant A). UNCERTAIN: the same sentence cites
    PPO, which suggests `PessimisticLogClip` (B); the paper does not say whether s is clipped too (C).
    """

    epsilon: float

    def clip(self, delta: jax.Array) -> jax.Array:
        return jnp.clip(delta, math.log1p(-self.epsilon), math.log1p(self.epsilon))

    def __call__(self, delta: jax.Array, c: jax.Array) -> jax.Array:
        return c * self.clip(delta)


@dataclasses.dataclass(frozen=True)
class PessimisticLogClip(HardLogClip):
    """phi = max(c delta, c clip(delta)): PPO's rule in log space (variant B).

    A token out of range is silent only where c would push it further out; it may always come back.
    """

    def __call__(self, delta: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.maximum(c * delta, c * self.clip(delta))


@dataclasses.dataclass(frozen=True)
class JointLogClip(HardLogClip):
    """Scores of clipped log-ratios too (variant C): the gradient of D(w*, softmax(mean clip(delta))).

    By the chain rule that is variant A with c taken at the clipped scores, and it is written so.
    """

    def scored(self, delta: jax.Array) -> jax.Array:
        return self.clip(delta)


@dataclasses.dataclass(frozen=True)
class RatioClip(Gate):
    """phi = max(c rho, c clip(rho, 1 - low, 1 + high)), rho = exp(delta): PPO's clipped surrogate.

    References:
      PPO, arXiv 1707.06347, equation 7; with c = -A / K it is GRPO's (LPO, equation 2).
    """

    low: float
    high: float

    def __call__(self, delta: jax.Array, c: jax.Array) -> jax.Array:
        ratio = jnp.exp(jnp.clip(delta, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        return jnp.maximum(c * ratio, c * jnp.clip(ratio, 1 - self.low, 1 + self.high))


def log_clip(clip: str, epsilon: float) -> Gate:
    """The gate that the `clip` option of the listwise methods names: one of `CLIPS`."""
    if clip == "none":
        return Gate()
    return {"hard": HardLogClip, "ppo": PessimisticLogClip, "joint": JointLogClip}[clip](epsilon)
