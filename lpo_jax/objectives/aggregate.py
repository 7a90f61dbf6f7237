"""Aggregation: token weights that reduce the token losses of a batch to one number."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.part import Part

# The default of every `max_tokens` that means the response budget of the run. `lpo train` replaces it by that budget.
RESPONSE_BUDGET = 1024

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def token_weights(tokens: jax.Array, aggregation: str, max_tokens: int = RESPONSE_BUDGET) -> jax.Array:
    """Return token weights W [P,K,T]: the loss is sum W phi(delta, c), where c [P,K] includes the 1/K of its group.

    n_k is the number of tokens of response k, K_p the number of responses of a prompt and N the number of all tokens;
    P counts the prompts that have a token:

    | aggregation | W | effect for c = -A / K |
    |---|---|---|
    | token-mean | K_p / N | every token of the batch has the same weight (DAPO) |
    | seq-mean-token-mean | 1 / (P n_k) | every response of a group has the same weight (GRPO) |
    | seq-mean-token-sum | 1 / P | the weight of a response is its length |
    | seq-mean-token-sum-norm | 1 / (P max_tokens) | the same, divided by a constant (Dr. GRPO) |

    Args:
      tokens: [P,K,T] bool, the tokens to include.
      aggregation: one of `AGGREGATIONS`, which are verl's names.
      max_tokens: the constant of "seq-mean-token-sum-norm": the response budget of the run. It is never the padded
        width, because then the step size would depend on the longest response of the batch.

    Returns:
      [P,K,T] float32, 0 outside `tokens`, finite if there are no tokens.
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
    """The aggregation of a method, as a part.

    Attributes:
      aggregation: see `token_weights`.
      max_tokens: the constant of "seq-mean-token-sum-norm". `lpo train` sets it to the run's response budget unless
        the config or the method's paper gives another number.
    """

    aggregation: str = "seq-mean-token-mean"
    max_tokens: int = RESPONSE_BUDGET

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return weights [P,K,T] of the tokens [P,K,T] to include."""
        return token_weights(tokens, self.aggregation, self.max_tokens)
