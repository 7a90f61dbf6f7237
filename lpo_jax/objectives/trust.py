"""Trust-region gates: how far one token may move in one update.

A gate is a primitive phi(delta, c) of the token log-ratio delta = log pi_theta - log pi_b (nats) and the
coefficient c of its response (no gradient flows through c). Its derivative is c times a factor: 1 at
delta = 0 unless its class says otherwise, and 0 on the tokens that the gate shuts. A descent step makes a
response with c < 0 likelier.

Here are the gates that look at one token; `sequence_gates.py` has those that look at a whole response, and
`covariance_gates.py` those that pick tokens from the whole minibatch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import masked_median, masked_std

# verl's bound on the log-ratio before exp: beyond it the ratio is a broken model's and would overflow.
MAX_LOG_RATIO = 20.0

CLIPS = ("hard", "ppo", "joint", "none")


@dataclasses.dataclass(frozen=True)
class Gate(Part):
    """No trust region: phi = c delta. The base of the others."""

    def scored(self, delta: jax.Array) -> jax.Array:
        """The log-ratios [P,K,T] that the scores s_k are made of."""
        return delta

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """Token loss [P,K,T] of log-ratios [P,K,T], 0 outside `context.tokens`, and coefficients [P,K,1] or [P,K,T].

        Only `delta` carries a gradient.
        """
        return c * delta

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """The tokens [P,K,T] on which the trust region acts: those that it shuts, whose slope is 0.

        A gate that limits a token's weight without shutting the token overrides this.
        """
        slope: jax.Array = jax.grad(lambda d: self(d, c, context).sum())(delta)
        return slope == 0


@dataclasses.dataclass(frozen=True)
class LogClip(Gate):
    """The clip on token log-ratios of LPO: range [log(1 - epsilon), log(1 + epsilon)].

    Attributes:
      clip: "hard": phi = c clip(delta), a token out of range is silent whatever c's sign: the literal reading of
        the paper (variant A). "ppo": phi = max(c delta, c clip(delta)), a token may always come back (B).
        "joint": as "hard", and the scores are of clipped log-ratios too, so that the gradient is that of
        D(w*, softmax(mean clip(delta))) (C). "none": no clip. UNCERTAIN: the sentence that says A cites PPO,
        which suggests B, and does not say whether s is clipped (C).
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
    """rho = exp(delta), kept finite."""
    return jnp.exp(jnp.clip(delta, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def magnitude(x: jax.Array) -> jax.Array:
    """|x| with slope 0 at 0, where `jnp.abs` has 1: a policy that has not moved must not be pushed."""
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
      epsilon_low, epsilon_high: widths of the range below and above 1; 1 below is no lower clip.
      dual_clip: where c > 0 (A < 0) the loss is at most c dual_clip, so a token that grew far beyond the range
        no longer pulls; 0 is off. verl has 3, DAPO's recipe 10.

    References:
      PPO, arXiv 1707.06347, equation 7; with c = -A / K it is GRPO's (LPO, equation 2). Dual clip: arXiv
      1912.09729; verl, `compute_policy_loss_vanilla`.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float = 0.0

    def clipped(self, rho: jax.Array, stretch: jax.Array | float = 1.0) -> jax.Array:
        """`rho` in the range, whose widths are multiplied by `stretch`."""
        return jnp.clip(rho, 1 - self.epsilon_low * stretch, 1 + self.epsilon_high * stretch)

    def pessimistic(self, rho: jax.Array, clipped: jax.Array, c: jax.Array) -> jax.Array:
        """The worse of the losses of a ratio and of its clipped self, under the dual clip."""
        loss = jnp.maximum(c * rho, c * clipped)
        return jnp.where(c > 0, jnp.minimum(loss, c * self.dual_clip), loss) if self.dual_clip else loss

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        rho = ratio(delta)
        return self.pessimistic(rho, self.clipped(rho), c)


@dataclasses.dataclass(frozen=True)
class ElasticClip(RatioClip):
    """PPO's surrogate in a range that is wider where the signal is strong.

    Both widths are multiplied by (1 + a tanh|A|) (1 + b Var R), with the variance of the group's rewards. The
    abstract says as much; tanh, the plain variance and the two constants are RECONSTRUCTED.

    Attributes:
      advantage_stretch: a, of one response.
      variance_stretch: b, of its group; the variance of pass or fail is at most 1/4.

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
    """phi = c sg(clip(rho, 1 - low, 1 + high)) delta: every token keeps a gradient, of bounded weight.

    The public losses have log pi where this has delta: another value by a constant, the same gradient.

    References:
      CISPO, MiniMax-M1, arXiv 2506.13585; verl, `compute_policy_loss_cispo`.
    """

    epsilon_low: float = 1.0
    epsilon_high: float = 0.28

    def log_weight(self, delta: jax.Array, context: Context) -> jax.Array:
        """Log of the importance weight [P,K,T] before it is clipped."""
        return delta

    def weights(self, delta: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The importance weights [P,K,T], and their clipped selves."""
        weight = ratio(self.log_weight(jax.lax.stop_gradient(delta), context))
        return weight, jnp.clip(weight, 1 - self.epsilon_low, 1 + self.epsilon_high)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return c * self.weights(delta, context)[1] * delta

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        weight, clipped = self.weights(delta, context)
        return weight != clipped


@dataclasses.dataclass(frozen=True)
class SoftGate(Gate):
    """phi = c (4 / tau) sigmoid(tau (rho - 1)): the slope falls off smoothly on both sides of rho = 1.

    Attributes:
      tau_pos, tau_neg: how fast, for responses with A > 0 and for the others.

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
    """phi = c rho + lambda (rho - 1)^2 / K: no clip, but a price on the variance of the ratio.

    The slope is rho (c + 2 lambda (rho - 1) / K), so a response is at rest at rho = 1 + A / (2 lambda). lambda is
    the state of the method's `RatioVarianceDual`.

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
    """phi = |c| |rho - r*|: every ratio moves to a target of its own inside the range, and stays there.

    r* = 1 - low + (low + high) sigmoid((A - median A) / lambda), over the group; with low = high = e it is
    1 + e tanh((A - median A) / (2 lambda)).

    Attributes:
      epsilon_low, epsilon_high: widths of the range below and above 1.
      target_temperature: lambda, in units of A. Towards 0 the target is an end of the range, or 1 at the median.

    References:
      BPO and GBPO, arXiv 2604.18578; public code bounded-ratio-rl/bounded_ratio_rl, `compute_policy_loss_gbpo`.
    """

    epsilon_low: float = 0.3
    epsilon_high: float = 0.3
    target_temperature: float = 1e-4

    def target(self, c: jax.Array, context: Context) -> jax.Array:
        """r* of coefficients [P,K,1] or [P,K,T], in their shape."""
        A = implied_advantage(c, context)
        median = masked_median(A.swapaxes(1, 2), context.valid[:, None]).swapaxes(1, 2)  # [P,1,1] or [P,1,T]
        share = jax.nn.sigmoid((A - median) / self.target_temperature)
        return 1 - self.epsilon_low + (self.epsilon_low + self.epsilon_high) * share

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return jnp.abs(c) * magnitude(ratio(delta) - self.target(c, context))


@dataclasses.dataclass(frozen=True)
class ImplicitNegative(Gate):
    """Likelihood of the passing responses under pi_theta, and of the failing ones under what pi_theta leaves them.

    With pass rate p the policy that sampled is p pi_+ + (1 - p) pi_-. If pi_theta stands for pi_+, then
    pi_- / pi_b = (1 - p rho) / (1 - p), so

        c < 0    phi = c log rho
        c > 0    phi = -c w log max(floor, (1 - p rho) / (1 - p)),   straight through the maximum

    At rho = 1 the slopes are c and c w p / (1 - p).

    Attributes:
      negative_floor: where the likelihood of the failing responses is not allowed to fall below.
      negative_weight: w; 0 learns from the passing responses alone (rejection-sampling fine-tuning).

    References:
      NFT, arXiv 2505.18116; public code NVlabs/NFT, `clamp_negative` and `neg_weight`.
    """

    negative_floor: float = 1.0
    negative_weight: float = 1.0

    def left(self, delta: jax.Array, context: Context) -> jax.Array:
        """(1 - p rho) / (1 - p), the ratio of pi_- to pi_b [P,K,T], before the floor."""
        p = context.pass_rate.clip(0.02, 0.98)[..., None]  # [P,1,1]
        return (1 - p * ratio(delta)) / (1 - p)

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return (c > 0) & (self.left(delta, context) < self.negative_floor)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        left = self.left(delta, context)
        held = jnp.maximum(left, self.negative_floor)
        # The value is `held`'s, the gradient is `left`'s: the added difference is exactly 0.
        held = jax.lax.stop_gradient(held) + (left - jax.lax.stop_gradient(left))
        return jnp.where(c < 0, c * delta, -c * self.negative_weight * jnp.log(held))


def implied_advantage(c: jax.Array, context: Context) -> jax.Array:
    """A of a policy gradient's coefficients c = -A / K [P,K,1] or [P,K,T], in their shape."""
    return -c * context.size[..., None]
