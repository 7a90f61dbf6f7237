"""What an objective is given and what it can show: three small pytrees of arrays.

Axis letters: P prompts, K responses per prompt, T response tokens. Log-probs are in nats.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenStats:
    """What the current policy says about the sampled tokens; an objective is differentiated in these.

    Attributes:
      logp: [P,K,T] log-prob of each sampled token under the current policy. Padded places may hold anything.
      entropy: [P,K,T] entropy of the next-token distribution, for the methods that weigh tokens by it.
      ref_logp: [P,K,T] log-probs under a frozen reference, for the methods that stay close to one.
    """

    logp: jax.Array
    entropy: jax.Array | None = None
    ref_logp: jax.Array | None = None


@flax.struct.dataclass
class Scored:
    """Sampled and verified responses: constants of the update.

    Attributes:
      behaviour_logp: [P,K,T] log-probs under the policy that sampled (pi_b).
      rewards: [P,K] one number a response. Invalid responses may hold anything; a non-finite reward makes
        its response invalid (and is counted in `lpo/nonfinite_rewards`).
      mask: [P,K,T] 1 on response tokens, the end token included; 0 on padding.
      anchor_logp: [P,K,T] log-probs under the policy at the start of the update (pi_t). None means that it is
        the one that sampled.
      valid: [P,K] 1 on the responses to learn from. None means all that have a token.
    """

    behaviour_logp: jax.Array
    rewards: jax.Array
    mask: jax.Array
    anchor_logp: jax.Array | None = None
    valid: jax.Array | None = None


@flax.struct.dataclass
class Listwise:
    """The group-level view of an update; `objective.listwise` makes it, and rollouts are written from it.

    Attributes:
      valid: [P,K] bool, the response is in its group: marked valid, has a token, has a finite reward.
      active: [P] bool, the group takes part in the loss and in every mean.
      degenerate: [P] bool, the group is large enough but its rewards are all equal.
      temperature: [P,1] tau, in units of reward.
      scores: [P,K] s_k, the log-ratio of response k to the policy that sampled it, in nats; 0 where invalid.
      log_policy: [P,K] log P = log softmax(s); -inf where invalid.
      log_target: [P,K] log w* = log softmax(R / tau + s_t); -inf where invalid.
      coefficients: [P,K] c_k = d (the prompt's loss) / d s_k, before the gate and the mean over prompts; 0 in
        an inactive group.
    """

    valid: jax.Array
    active: jax.Array
    degenerate: jax.Array
    temperature: jax.Array
    scores: jax.Array
    log_policy: jax.Array
    log_target: jax.Array
    coefficients: jax.Array

    @property
    def policy(self) -> jax.Array:
        """[P,K] P, 0 where invalid."""
        return jnp.exp(self.log_policy)

    @property
    def target(self) -> jax.Array:
        """[P,K] w*, 0 where invalid."""
        return jnp.exp(self.log_target)
