"""Token weights: how the token losses of a batch become one number."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.part import Part

# The default of every `max_tokens` that stands for the response budget of the run, which `lpo train` puts in its place.
RESPONSE_BUDGET = 1024

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def token_weights(tokens: jax.Array, aggregation: str, max_tokens: int = RESPONSE_BUDGET) -> jax.Array:
    """Weights W [P,K,T]: the loss is sum W phi(delta, c), where c [P,K] already holds the 1/K of its group.

    With n_k tokens in response k, K_p responses and N tokens in all, over prompts that have a token:

    | aggregation | W | what it means for c = -A / K |
    |---|---|---|
    | token-mean | K_p / N | every token of the batch weighs the same (DAPO) |
    | seq-mean-token-mean | 1 / (P n_k) | every response of a group weighs the same (GRPO) |
    | seq-mean-token-sum | 1 / P | a response weighs by its length |
    | seq-mean-token-sum-norm | 1 / (P max_tokens) | the same over a constant (Dr. GRPO) |

    Args:
      tokens: [P,K,T] bool, the tokens that take part.
      aggregation: one of `AGGREGATIONS`, with verl's names.
      max_tokens: the constant of "seq-mean-token-sum-norm": the response budget of the run. Never the padded
        width, which would change the step size with the longest response of the batch.

    Returns:
      [P,K,T] float32, 0 outside `tokens`, finite when there are none.
    """
    lengths = tokens.sum(-1, keepdims=True)  # [P,K,1]
    responses = (lengths > 0).sum(1, keepdims=True)  # [P,1,1]
    prompts = jnp.maximum((responses > 0).sum(), 1)
    if aggregation == "token-mean":
        each = responses / jnp.maximum(lengths.sum(), 1)
    elif aggregation == "seq-mean-token-mean":
        each = 1 / (prompts * jnp.maximum(lengths, 1))
    elif aggregation == "seq-mean-token-sum":
        each = 1 / prompts
    else:
        each = 1 / (prompts * max_tokens)
    return jnp.where(tokens, each, 0)


@dataclasses.dataclass(frozen=True)
class Aggregate(Part):
    """How tokens are weighed.

    Attributes:
      aggregation: as `token_weights` takes it.
      max_tokens: the constant of "seq-mean-token-sum-norm"; `lpo train` sets it to the run's response budget
        unless the config or the method's own paper gives another number.
    """

    aggregation: str = "seq-mean-token-mean"
    max_tokens: int = RESPONSE_BUDGET

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Weights [P,K,T] of the tokens [P,K,T] that take part."""
        return token_weights(tokens, self.aggregation, self.max_tokens)
