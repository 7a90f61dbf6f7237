"""Policy-optimization objectives as pure functions of arrays: Listwise Policy Optimization and its relatives.

    from lpo_jax import objectives as O
    objective = O.get("lpo-forward", temperature="grpo")
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(O.TokenStats(logp), scored)

`gradient.logp` [P,K,T] is the coefficient of each token's log-prob. Nothing here knows a model or does I/O: the
package depends on jax, numpy and flax.struct alone, and imports no other package of `lpo_jax`.
"""

from lpo_jax.objectives.advantage import Advantage, Utility, advantages
from lpo_jax.objectives.aggregate import AGGREGATIONS, Aggregate, token_weights
from lpo_jax.objectives.batch import Context, Listwise, Scored, Teacher, TokenStats
from lpo_jax.objectives.catalogue import get, names
from lpo_jax.objectives.control import Control
from lpo_jax.objectives.credit import Credit
from lpo_jax.objectives.divergences import (
    DIVERGENCES,
    Divergence,
    alpha_divergence,
    bregman,
    divergence,
    f_divergence,
)
from lpo_jax.objectives.hook_specs import HookSpec
from lpo_jax.objectives.method import Objective
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.projection import Projection, Simplex
from lpo_jax.objectives.prompt_weight import PromptWeight
from lpo_jax.objectives.regular import Regular
from lpo_jax.objectives.select import Select
from lpo_jax.objectives.shaping import Shape
from lpo_jax.objectives.simplex import listwise_log_probs, sequence_scores
from lpo_jax.objectives.targets import target_log_probs, temperature
from lpo_jax.objectives.token_weight import TokenWeight
from lpo_jax.objectives.trust import Gate, LogClip, RatioClip

__all__ = [
    "AGGREGATIONS",
    "DIVERGENCES",
    "Advantage",
    "Aggregate",
    "Context",
    "Control",
    "Credit",
    "Divergence",
    "Gate",
    "HookSpec",
    "Listwise",
    "LogClip",
    "Objective",
    "Part",
    "Projection",
    "PromptWeight",
    "RatioClip",
    "Regular",
    "Scored",
    "Select",
    "Shape",
    "Simplex",
    "Teacher",
    "TokenStats",
    "TokenWeight",
    "Utility",
    "advantages",
    "alpha_divergence",
    "bregman",
    "divergence",
    "f_divergence",
    "get",
    "listwise_log_probs",
    "names",
    "sequence_scores",
    "target_log_probs",
    "temperature",
    "token_weights",
]
