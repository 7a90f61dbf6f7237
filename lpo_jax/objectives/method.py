"""An objective: signal -> project -> trust -> aggregate, composed once and used everywhere.

    grad = sum_k sum_t  W[k,t] * c_k(group) * gate(delta[k,t], c_k) * grad log pi(token)

    signal      rewards -> tau and u = (R - mu) / tau                       targets.py
    project     (P, w*, u) -> c [P,K], the coefficient of each response     divergences.py; else c = -u / K
    trust       (delta, c) -> token loss [P,K,T]                            trust.py
    aggregate   tokens -> weights W [P,K,T]                                 aggregate.py

c is a constant of the update: no gradient flows through it. `catalogue.py` names the compositions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.aggregate import token_weights
from lpo_jax.objectives.batch import Listwise, Scored, TokenStats
from lpo_jax.objectives.divergences import DIVERGENCES, Divergence
from lpo_jax.objectives.simplex import (
    as_float,
    as_mask,
    centred,
    listwise_log_probs,
    masked_mean,
    sequence_scores,
)
from lpo_jax.objectives.targets import TEMPERATURE_FLOOR, advantages, target_log_probs, temperature
from lpo_jax.objectives.trust import Gate


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as a pure function `(stats, scored) -> (loss, metrics)`; hashable, and equal when built alike.

    Make one with `get`, which checks the options.

    Attributes:
      name: its name in the catalogue.
      rule: the temperature rule, as `temperature` takes it.
      divergence: what the policy is projected by; None means policy gradient, c = -A / K.
      gate: the trust region.
      aggregation: how tokens are weighed, as `token_weights` takes it.
      max_tokens: the constant of the aggregation "seq-mean-token-sum-norm".
      score: "mean" or "sum" of a response's token log-ratios.
      ddof: of the group's standard deviation.
      temperature_floor: least sigma.
      degenerate: what becomes of a group whose rewards are all equal. "keep": its target is P_t, so later
        minibatches of LPO pull it back there, and it counts in the mean over prompts. "mask": it is left out
        of everything, as if it had not been sampled. (The paper is silent; "keep" is the literal reading.)
      min_group_size: the fewest valid responses that carry a signal. Smaller groups are left out.
    """

    name: str
    rule: str | float
    divergence: Divergence | None
    gate: Gate
    aggregation: str
    max_tokens: int = 1024
    score: str = "mean"
    ddof: int = 0
    temperature_floor: float = TEMPERATURE_FLOOR
    degenerate: str = "keep"
    min_group_size: int = 2

    def __call__(self, stats: TokenStats, scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a minibatch of whole groups, to be minimised, and its metrics.

        Args:
          stats: the current policy's log-probs; differentiate in these (`jax.grad(..., has_aux=True)`).
          scored: the sampled and verified responses.

        Returns:
          loss: for a listwise method the divergence in nats, mean over the active prompts, whose gradient is
            the gated coefficients'; for a policy gradient the clipped surrogate.
          metrics: float32 scalars. All are finite whenever the log-probs of the response tokens are; a NaN
            there means a broken model and is let through to the loss, for the step's guard to see.

        Raises:
          ValueError: two arrays disagree in shape.
        """
        view = self.listwise(jax.lax.stop_gradient(stats), scored)
        tokens = as_mask(scored.mask, stats.logp) & (view.valid & view.active[:, None])[..., None]  # [P,K,T]
        delta = _log_ratio(stats.logp, scored.behaviour_logp, tokens)
        c = view.coefficients[..., None]  # [P,K,1]
        with jax.named_scope("trust_and_aggregate"):
            loss = (token_weights(tokens, self.aggregation, self.max_tokens) * self.gate(delta, c)).sum()
        if self.divergence is not None:
            # The value is the divergence, the gradient is the surrogate's: the added term is exactly 0.
            value = masked_mean(self.divergence.value(view.log_policy, view.log_target), view.active)
            loss = value + (loss - jax.lax.stop_gradient(loss))
        metrics = self._metrics(view, scored, jax.lax.stop_gradient(delta), tokens) | {"actor/pg_loss": loss}
        return loss, {k: jax.lax.stop_gradient(v).astype(jnp.float32) for k, v in metrics.items()}

    def listwise(self, stats: TokenStats, scored: Scored) -> Listwise:
        """Target, policy and coefficients of each group, before the gate and before the mean over prompts."""
        _check_shapes(stats, scored)
        marked, rewards = _marked(scored), as_float(scored.rewards)
        valid = marked & jnp.isfinite(rewards)
        tokens = as_mask(scored.mask, stats.logp) & valid[..., None]  # [P,K,T]

        def scores(logp: jax.Array) -> jax.Array:
            delta = _log_ratio(logp, scored.behaviour_logp, tokens)
            return sequence_scores(self.gate.scored(delta), tokens, self.score)

        with jax.named_scope("signal"):
            tau = temperature(rewards, self.rule, valid, ddof=self.ddof, floor=self.temperature_floor)
            u = advantages(rewards, tau, valid)  # [P,K]
            size = valid.sum(-1)  # [P]
            degenerate = (size >= self.min_group_size) & (centred(rewards, valid) == 0).all(-1)
            active = size >= self.min_group_size
            if self.degenerate == "mask":
                active &= ~degenerate
        with jax.named_scope("project"):
            s = scores(stats.logp)
            s_t = None if scored.anchor_logp is None else scores(scored.anchor_logp)
            log_p = listwise_log_probs(s, valid)
            log_w = target_log_probs(rewards, tau, s_t, valid)
            if self.divergence is None:
                c = -u / jnp.maximum(size, 1)[:, None]
            else:
                c = self.divergence.coefficients(log_p, log_w)
            c = jnp.where(valid & active[:, None], c, 0)
        return Listwise(valid, active, degenerate, tau, s, log_p, log_w, c)

    def _metrics(
        self, view: Listwise, scored: Scored, delta: jax.Array, tokens: jax.Array
    ) -> dict[str, jax.Array]:
        size = view.valid.sum(-1)  # [P]
        uniform = jnp.where(view.valid, 1 / jnp.maximum(size, 1)[:, None], 0)  # [P,K]
        c = view.coefficients
        # A token counts as clipped when its response pulls on it and the gate lets nothing through.
        slope = jax.grad(lambda d: self.gate(d, c[..., None]).sum())(delta)
        pulled = tokens & (c != 0)[..., None]

        def group_mean(x: jax.Array) -> jax.Array:
            return masked_mean(x, view.active)

        return {
            "lpo/target_tv": group_mean(0.5 * jnp.abs(view.target - uniform).sum(-1)),
            "lpo/policy_tv": group_mean(0.5 * jnp.abs(view.policy - uniform).sum(-1)),
            "lpo/coef_l1": group_mean(jnp.abs(c).sum(-1)),
            "lpo/coef_sum": group_mean(c.sum(-1)),
            "lpo/score_abs_max": jnp.abs(view.scores).max(initial=0),
            # Groups without signal have the floor for a temperature, which would hide the others'.
            "lpo/temperature_mean": masked_mean(view.temperature[:, 0], view.active & ~view.degenerate),
            "lpo/degenerate_group_frac": masked_mean(view.degenerate, size >= self.min_group_size),
            "lpo/masked_response_frac": 1 - (view.valid & view.active[:, None]).mean(),
            "lpo/nonfinite_rewards": (_marked(scored) & ~view.valid).sum(),
            "lpo/forward_kl": group_mean(DIVERGENCES["forward-kl"].value(view.log_policy, view.log_target)),
            "lpo/reverse_kl": group_mean(DIVERGENCES["reverse-kl"].value(view.log_policy, view.log_target)),
            "actor/pg_clipfrac": masked_mean(pulled & (slope == 0), tokens),
            "actor/ppo_kl": masked_mean(-delta, tokens),
        }


def _marked(scored: Scored) -> jax.Array:
    """[P,K] the responses that the caller wants used and that have a token, whatever their reward."""
    has_token = (jnp.asarray(scored.mask) != 0).any(-1)
    return has_token & as_mask(scored.valid, has_token)


def _log_ratio(logp: jax.Array, behaviour_logp: jax.Array, tokens: jax.Array) -> jax.Array:
    """[P,K,T] delta, 0 outside `tokens`; exactly 0 where the two log-probs are the same number."""
    return jnp.where(tokens, as_float(logp) - as_float(behaviour_logp), 0)


def _check_shapes(stats: TokenStats, scored: Scored) -> None:
    shape = jnp.shape(stats.logp)
    if len(shape) != 3:
        raise ValueError(f"stats.logp: expected [P,K,T], got shape {shape}")
    for name, array, expected in (
        ("behaviour_logp", scored.behaviour_logp, shape),
        ("mask", scored.mask, shape),
        ("anchor_logp", scored.anchor_logp, shape),
        ("rewards", scored.rewards, shape[:2]),
        ("valid", scored.valid, shape[:2]),
    ):
        if array is not None and jnp.shape(array) != expected:
            raise ValueError(
                f"scored.{name}: expected shape {expected} from stats.logp {shape}, got {jnp.shape(array)}"
            )
