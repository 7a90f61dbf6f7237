"""Trust-region gates: how far one token can move in one update.

A gate is a function phi(delta, c) of the token log-ratio delta = log pi_theta - log pi_b (nats) and the coefficient c
of its response (no gradient flows through c). Its derivative is c times a factor: 1 at delta = 0 unless its class says
otherwise, and 0 on clipped tokens. A descent step raises the probability of a response with c < 0.

This file has the gates that depend on one token, and those that select tokens from the whole minibatch.
`sequence_gates.py` has those that depend on a whole response.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, masked_mean, masked_median, masked_std

# verl's bound of the log-ratio before exp: a larger one means a broken model, and the ratio would overflow.
MAX_LOG_RATIO = 20.0

CLIPS = ("hard", "ppo", "joint", "none")


@dataclasses.dataclass(frozen=True)
class Gate(Part):
    """No trust region: phi = c delta. It is the base class of the other gates."""

    def scored(self, delta: jax.Array) -> jax.Array:
        """Return the log-ratios [P,K,T] from which the scores s_k are computed."""
        return delta

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """Return the token loss [P,K,T].

        Args:
          delta: [P,K,T] log-ratios, 0 outside `context.tokens`. Only they carry a gradient.
          c: coefficients, [P,K,1] or [P,K,T].
          context: the minibatch.
        """
        return c * delta

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """Return the tokens [P,K,T] on which the trust region acts: those whose gradient it sets to 0.

        A gate that limits the weight of a token without removing its gradient overrides this.
        """
        slope: jax.Array = jax.grad(lambda d: self(d, c, context).sum())(delta)
        return slope == 0


@dataclasses.dataclass(frozen=True)
class LogClip(Gate):
    """The clip on token log-ratios of LPO: range [log(1 - epsilon), log(1 + epsilon)].

    Attributes:
      clip: "hard": phi = c clip(delta), so that a token out of range has no gradient, whatever the sign of c: the
        literal reading of the paper (variant A). "ppo": phi = max(c delta, c clip(delta)), so that a token can always
        return into the range (B). "joint": as "hard", with scores of clipped log-ratios, so that the gradient is that
        of D(w*, softmax(mean clip(delta))) (C). "none": no clip. UNCERTAIN: the sentence in the paper that says A cites
        PPO, which suggests B, and does not say whether s is clipped (C).
      epsilon: half the width of the range.

    References:
      LPO, arXiv 2605.06139, appendix D.3.
    """

    clip: str = "hard"
    epsilon: float = 0.2

    def clipped(self, delta: jax.Array) -> jax.Array:
        return jnp.clip(delta, math.log1p(-self.epsilon), math.log1p(self.epsilon))

    def scored(self, delta: jax.Array) -> jax.Array:
        return self.clipped(delta) if self.clip == "joint" else delta

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        if self.clip == "none":
            return c * delta
        if self.clip == "ppo":
            return jnp.maximum(c * delta, c * self.clipped(delta))
        return c * self.clipped(delta)


def ratio(delta: jax.Array) -> jax.Array:
    """Return rho = exp(delta), clipped to stay finite."""
    return jnp.exp(jnp.clip(delta, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def magnitude(x: jax.Array) -> jax.Array:
    """Return |x| with derivative 0 at 0, where that of `jnp.abs` is 1: an unchanged policy must have no gradient."""
    return x * jnp.sign(x)


@dataclasses.dataclass(frozen=True)
class Ratio(Gate):
    """phi = c rho: the importance-weighted policy gradient, without a bound."""

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return c * ratio(delta)


@dataclasses.dataclass(frozen=True)
class RatioClip(Gate):
    """phi = max(c rho, c clip(rho, 1 - low, 1 + high)), rho = exp(delta): PPO's clipped surrogate.

    Attributes:
      epsilon_low, epsilon_high: widths of the range below and above 1; a lower width of 1 disables the lower clip.
      dual_clip: upper bound of the ratio if c > 0 (A < 0): the loss is at most c dual_clip, so a token far above the
        range has no gradient. 0 disables it. verl has 3, DAPO's recipe 10.

    References:
      PPO, arXiv 1707.06347, equation 7; with c = -A / K it is GRPO's (LPO, equation 2). Dual clip: arXiv
      1912.09729; verl, `compute_policy_loss_vanilla`.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float = 0.0

    def clipped(self, rho: jax.Array, stretch: jax.Array | float = 1.0) -> jax.Array:
        """Return `rho` clipped to the range, whose widths are multiplied by `stretch`."""
        return jnp.clip(rho, 1 - self.epsilon_low * stretch, 1 + self.epsilon_high * stretch)

    def pessimistic(self, rho: jax.Array, clipped: jax.Array, c: jax.Array) -> jax.Array:
        """Return the larger of the losses of a ratio and of its clipped value, with the dual clip."""
        loss = jnp.maximum(c * rho, c * clipped)
        return jnp.where(c > 0, jnp.minimum(loss, c * self.dual_clip), loss) if self.dual_clip else loss

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        rho = ratio(delta)
        return self.pessimistic(rho, self.clipped(rho), c)


@dataclasses.dataclass(frozen=True)
class ElasticClip(RatioClip):
    """PPO's surrogate with a wider range where the signal is stronger.

    Both widths are multiplied by (1 + a tanh|A|) (1 + b Var R), where Var R is the variance of the group's rewards. The
    abstract describes the two factors; tanh, the plain variance and the two constants are RECONSTRUCTED.

    Attributes:
      advantage_stretch: a, the factor of the advantage of a response.
      variance_stretch: b, the factor of the variance of its group; the variance of binary rewards is at most 1/4.

    References:
      ETR, arXiv 2601.03723.
    """

    advantage_stretch: float = 0.5
    variance_stretch: float = 2.0

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        variance = jnp.square(masked_std(context.rewards, context.valid))[..., None]  # [P,1,1]
        strength = jnp.tanh(jnp.abs(implied_advantage(c, context)))
        stretch = (1 + self.advantage_stretch * strength) * (1 + self.variance_stretch * variance)
        rho = ratio(delta)
        return self.pessimistic(rho, self.clipped(rho, stretch), c)


@dataclasses.dataclass(frozen=True)
class WeightClip(Gate):
    """phi = c sg(clip(rho, 1 - low, 1 + high)) delta: every token keeps a gradient, with a bounded weight.

    The public losses use log pi in place of delta: the value differs by a constant, the gradient is the same.

    References:
      CISPO, MiniMax-M1, arXiv 2506.13585; verl, `compute_policy_loss_cispo`.
    """

    epsilon_low: float = 1.0
    epsilon_high: float = 0.28

    def log_weight(self, delta: jax.Array, context: Context) -> jax.Array:
        """Return the log of the importance weight [P,K,T] before clipping."""
        return delta

    def weights(self, delta: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Return the importance weights [P,K,T] and their clipped values."""
        weight = ratio(self.log_weight(jax.lax.stop_gradient(delta), context))
        return weight, jnp.clip(weight, 1 - self.epsilon_low, 1 + self.epsilon_high)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return c * self.weights(delta, context)[1] * delta

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        weight, clipped = self.weights(delta, context)
        return weight != clipped


@dataclasses.dataclass(frozen=True)
class SoftGate(Gate):
    """phi = c (4 / tau) sigmoid(tau (rho - 1)): the gradient decays smoothly on both sides of rho = 1.

    Attributes:
      tau_pos, tau_neg: decay rates for responses with A > 0 and for the others.

    References:
      SAPO, arXiv 2511.20347; verl, `compute_policy_loss_sapo`; TRL's `sapo`.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        tau = jnp.where(c < 0, self.tau_pos, self.tau_neg)
        return c * (4 / tau) * jax.nn.sigmoid(tau * (ratio(delta) - 1))


@dataclasses.dataclass(frozen=True)
class RatioVariance(Gate):
    """phi = c rho + lambda (rho - 1)^2 / K: a penalty on the variance of the ratio instead of a clip.

    The derivative is rho (c + 2 lambda (rho - 1) / K), which is 0 at rho = 1 + A / (2 lambda). lambda is the state of
    the method's `RatioVarianceDual`.

    References:
      R2VPO, arXiv 2601.03320.
    """

    reads = (Field.CONTROL,)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        rho = ratio(delta)
        price: jax.Array = required(context.scored.control)
        return c * rho + price * jnp.square(rho - 1) / context.size[..., None]


@dataclasses.dataclass(frozen=True)
class TargetRatio(Gate):
    """phi = |c| |rho - r*|: every ratio moves to its own target inside the range.

    r* = 1 - low + (low + high) sigmoid((A - median A) / lambda), with the median over the group. With low = high = e,
    it is 1 + e tanh((A - median A) / (2 lambda)).

    Attributes:
      epsilon_low, epsilon_high: widths of the range below and above 1.
      target_temperature: lambda, in units of A. As it tends to 0, r* tends to an end of the range, or 1 at the median.

    References:
      BPO and GBPO, arXiv 2604.18578; public code bounded-ratio-rl/bounded_ratio_rl, `compute_policy_loss_gbpo`.
    """

    epsilon_low: float = 0.3
    epsilon_high: float = 0.3
    target_temperature: float = 1e-4

    def target(self, c: jax.Array, context: Context) -> jax.Array:
        """Return r* of coefficients [P,K,1] or [P,K,T], in their shape."""
        A = implied_advantage(c, context)
        median = masked_median(A.swapaxes(1, 2), context.valid[:, None]).swapaxes(1, 2)  # [P,1,1] or [P,1,T]
        share = jax.nn.sigmoid((A - median) / self.target_temperature)
        return 1 - self.epsilon_low + (self.epsilon_low + self.epsilon_high) * share

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return jnp.abs(c) * magnitude(ratio(delta) - self.target(c, context))


@dataclasses.dataclass(frozen=True)
class ImplicitNegative(Gate):
    """Likelihood of passing responses under pi_theta, and of failing ones under the implicit negative policy pi_-.

    With pass rate p, the behaviour policy is p pi_+ + (1 - p) pi_-. If pi_theta models pi_+, then
    pi_- / pi_b = (1 - p rho) / (1 - p), so

        c < 0    phi = c log rho
        c > 0    phi = -c w log max(floor, (1 - p rho) / (1 - p)),   with a straight-through maximum

    At rho = 1, the derivatives are c and c w p / (1 - p).

    Attributes:
      negative_floor: lower bound of the likelihood ratio of the failing responses.
      negative_weight: w; with 0, only passing responses are trained on (rejection-sampling fine-tuning).

    References:
      NFT, arXiv 2505.18116; public code NVlabs/NFT, `clamp_negative` and `neg_weight`.
    """

    negative_floor: float = 1.0
    negative_weight: float = 1.0

    def left(self, delta: jax.Array, context: Context) -> jax.Array:
        """Return (1 - p rho) / (1 - p), the ratio of pi_- to pi_b [P,K,T], before the floor."""
        p = context.pass_rate.clip(0.02, 0.98)[..., None]  # [P,1,1]
        return (1 - p * ratio(delta)) / (1 - p)

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return (c > 0) & (self.left(delta, context) < self.negative_floor)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        left = self.left(delta, context)
        held = jnp.maximum(left, self.negative_floor)
        # The value is that of `held`, the gradient that of `left`: the added difference is exactly 0.
        held = jax.lax.stop_gradient(held) + (left - jax.lax.stop_gradient(left))
        return jnp.where(c < 0, c * delta, -c * self.negative_weight * jnp.log(held))


def implied_advantage(c: jax.Array, context: Context) -> jax.Array:
    """Return the A of a policy gradient's coefficients c = -A / K, [P,K,1] or [P,K,T], in their shape."""
    return -c * context.size[..., None]


def covariance(c: jax.Array, context: Context) -> jax.Array:
    """Return each token's part [P,K,T] of the covariance of advantage and log-prob; 0 outside the tokens.

    The change of a policy's entropy in an update is minus this covariance. The part of one token is
    (A - mean A)(log pi - mean log pi), with means over the tokens of the minibatch. `ClipCov` and `KLCov` select the
    few tokens that reduce the entropy most by it.

    References:
      The Entropy Mechanism of Reinforcement Learning, arXiv 2505.22617; verl, `compute_policy_loss_clip_cov` and
      `compute_policy_loss_kl_cov`.
    """
    tokens = context.tokens
    A = jnp.where(tokens, implied_advantage(c, context), 0)
    logp = jnp.where(tokens, as_float(context.stats.logp), 0)
    return jnp.where(tokens, (A - masked_mean(A, tokens)) * (logp - masked_mean(logp, tokens)), 0)


def first_in_order(count: jax.Array, order: jax.Array, candidates: jax.Array) -> jax.Array:
    """Return which candidates are among the `count` first in `order`: bool, in the shape of `order`."""
    place = jnp.argsort(jnp.argsort(jnp.where(candidates, order, jnp.inf).ravel())).reshape(order.shape)
    return candidates & (place < count)


@dataclasses.dataclass(frozen=True)
class ClipCov(RatioClip):
    """PPO's surrogate, without gradient on a few tokens whose covariance lies in a range.

    The public code draws these tokens at random. Here a hash of each token's log-prob selects them, so that the
    objective stays a pure function and the choice does not depend on the position in the minibatch. If there are no
    more candidates than tokens to select, both versions take all of them.

    Attributes:
      cov_low, cov_high: the range of covariance.
      cov_fraction: tokens without gradient, as a share of the minibatch's tokens; at least one.
    """

    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_fraction: float = 2e-4

    def silent(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """Return the tokens [P,K,T] that get no gradient, bool."""
        rho, cov = ratio(delta), covariance(c, context)
        shut = c * self.clipped(rho) > c * rho
        candidates = context.tokens & (cov > self.cov_low) & (cov < self.cov_high) & ~shut
        count = jnp.maximum(jnp.floor(self.cov_fraction * context.tokens.sum()), 1)
        return first_in_order(count, _hash(context.stats.logp), candidates)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return jnp.where(self.silent(delta, c, context), 0, super().__call__(delta, c, context))


@dataclasses.dataclass(frozen=True)
class KLCov(Gate):
    """phi = c rho, plus cov_kl_coef |delta| / K on the tokens of the highest covariance.

    Attributes:
      cov_fraction: tokens with the penalty, as a share of the minibatch's tokens; at least one.
      cov_kl_coef: weight of the penalty.
    """

    cov_fraction: float = 2e-4
    cov_kl_coef: float = 1.0

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        count = jnp.maximum(jnp.floor(self.cov_fraction * context.tokens.sum()), 1)
        held = first_in_order(count, -covariance(c, context), context.tokens)
        price = self.cov_kl_coef * magnitude(delta) / context.size[..., None]
        return c * ratio(delta) + jnp.where(held, price, 0)


def _hash(x: jax.Array) -> jax.Array:
    """Return a pseudo-random number for each float32 of `x`; equal inputs give equal numbers."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
    # Knuth's multiplicative hash.
    order: jax.Array = ((bits * jnp.uint32(2654435761)) >> 8).astype(jnp.float32)
    return order
