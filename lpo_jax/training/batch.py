"""What an update learns from, and how it is cut into microbatches.

A microbatch is p prompts with k of their K responses each. Whole groups (k = K) when they fit the token
budget, so that the shared prompt is computed once; otherwise one prompt with as many of its responses as fit.
Either way the objective sees whole groups: only scoring and pulling back are cut.

Axes: P prompts · K responses · S prompt tokens · T response tokens · M microbatches · p, k as above.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from lpo_jax.objectives import Scored


@struct.dataclass
class Groups:
    """Token ids of whole groups, left-aligned and padded with 0.

    prompts `[P, S]`, lengths `[P]` (at least 1), responses `[P, K, T]`; which response tokens count is the
    scored record's mask. top_ids `[P, K, T, J]` are tokens whose log-probs are wanted beside the sampled ones'.
    """

    prompts: jax.Array
    lengths: jax.Array
    responses: jax.Array
    top_ids: jax.Array | None = None


@struct.dataclass
class Rollouts:
    """Groups with everything the objective needs."""

    groups: Groups
    scored: Scored


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How `[P, K]` rows are cut: `count` pieces of `prompts` x `responses`."""

    count: int
    prompts: int
    responses: int

    @classmethod
    def plan(cls, P: int, K: int, S: int, T: int, token_budget: int) -> "Microbatches":
        """The largest microbatch of at most `token_budget` tokens (padding counted) that divides the batch.

        One response of one prompt is the smallest there is, and is used even where it exceeds the budget.
        """
        if S + K * T <= token_budget:
            prompts = max(p for p in range(1, P + 1) if P % p == 0 and p * (S + K * T) <= token_budget)
            return cls(P // prompts, prompts, K)
        responses = max(k for k in range(1, K + 1) if K % k == 0 and (k == 1 or S + k * T <= token_budget))
        return cls(P * K // responses, 1, responses)

    def split_groups(self, groups: Groups) -> Groups:
        """Leaves get a leading M; a group that is split repeats its prompt in each of its pieces."""
        P, K, _ = groups.responses.shape
        pieces = K // self.responses
        shape = (self.count, self.prompts)
        return Groups(
            prompts=jnp.repeat(groups.prompts, pieces, axis=0).reshape(*shape, -1),
            lengths=jnp.repeat(groups.lengths, pieces, axis=0).reshape(*shape),
            responses=self.split(groups.responses),
            top_ids=None if groups.top_ids is None else self.split(groups.top_ids),
        )

    def split(self, x: jax.Array) -> jax.Array:
        """`[P, K, ...]` to `[M, p, k, ...]`."""
        return x.reshape(self.count, self.prompts, self.responses, *x.shape[2:])

    def join(self, x: jax.Array, K: int) -> jax.Array:
        """`[M, p, k, ...]` back to `[P, K, ...]`."""
        return x.reshape(-1, K, *x.shape[3:])
