"""Policy-optimization objectives as pure functions of arrays: Listwise Policy Optimization and its relatives.

    from lpo_jax import objectives as O
    objective = O.get("lpo-forward", temperature="grpo")
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(O.TokenStats(logp), scored)

`gradient.logp` [P,K,T] is the coefficient of each token's log-prob. No model and no I/O here: jax and
flax.struct only.
"""

from lpo_jax.objectives.aggregate import AGGREGATIONS, token_weights
from lpo_jax.objectives.batch import Listwise, Scored, TokenStats
from lpo_jax.objectives.catalogue import get, names
from lpo_jax.objectives.divergences import DIVERGENCES, Divergence, divergence
from lpo_jax.objectives.method import Objective
from lpo_jax.objectives.simplex import listwise_log_probs, sequence_scores
from lpo_jax.objectives.targets import advantages, target_log_probs, temperature
from lpo_jax.objectives.trust import Gate, HardLogClip, JointLogClip, PessimisticLogClip, RatioClip

__all__ = [
    "AGGREGATIONS",
    "DIVERGENCES",
    "Divergence",
    "Gate",
    "HardLogClip",
    "JointLogClip",
    "Listwise",
    "Objective",
    "PessimisticLogClip",
    "RatioClip",
    "Scored",
    "TokenStats",
    "advantages",
    "divergence",
    "get",
    "listwise_log_probs",
    "names",
    "sequence_scores",
    "target_log_probs",
    "temperature",
    "token_weights",
]
