"""Policy-optimization objectives as pure functions of arrays: Listwise Policy Optimization and its relatives.

    from lpo_jax import objectives as O
    objective = O.get("lpo-forward", temperature="grpo")
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(O.TokenStats(logp), scored)

`gradient.logp` [P,K,T] is the coefficient of each token's log-prob. Nothing here knows a model or does I/O: the
package depends on jax, numpy and flax.struct alone, and imports no other package of `lpo_jax`.
"""

from lpo_jax.objectives.advantage import Advantage as Advantage
from lpo_jax.objectives.advantage import Credit as Credit
from lpo_jax.objectives.advantage import Utility as Utility
from lpo_jax.objectives.advantage import advantages as advantages
from lpo_jax.objectives.batch import Context as Context
from lpo_jax.objectives.batch import Listwise as Listwise
from lpo_jax.objectives.batch import Scored as Scored
from lpo_jax.objectives.batch import Teacher as Teacher
from lpo_jax.objectives.batch import TokenStats as TokenStats
from lpo_jax.objectives.catalogue import get as get
from lpo_jax.objectives.catalogue import names as names
from lpo_jax.objectives.divergences import DIVERGENCES as DIVERGENCES
from lpo_jax.objectives.divergences import Divergence as Divergence
from lpo_jax.objectives.divergences import alpha_divergence as alpha_divergence
from lpo_jax.objectives.divergences import bregman as bregman
from lpo_jax.objectives.divergences import divergence as divergence
from lpo_jax.objectives.divergences import f_divergence as f_divergence
from lpo_jax.objectives.hook_specs import HookSpec as HookSpec
from lpo_jax.objectives.method import Objective as Objective
from lpo_jax.objectives.part import Control as Control
from lpo_jax.objectives.part import Part as Part
from lpo_jax.objectives.projection import Projection as Projection
from lpo_jax.objectives.projection import Simplex as Simplex
from lpo_jax.objectives.regular import Regular as Regular
from lpo_jax.objectives.shaping import Select as Select
from lpo_jax.objectives.shaping import Shape as Shape
from lpo_jax.objectives.simplex import listwise_log_probs as listwise_log_probs
from lpo_jax.objectives.simplex import sequence_scores as sequence_scores
from lpo_jax.objectives.targets import target_log_probs as target_log_probs
from lpo_jax.objectives.targets import temperature as temperature
from lpo_jax.objectives.trust import Gate as Gate
from lpo_jax.objectives.trust import LogClip as LogClip
from lpo_jax.objectives.trust import RatioClip as RatioClip
from lpo_jax.objectives.weights import AGGREGATIONS as AGGREGATIONS
from lpo_jax.objectives.weights import Aggregate as Aggregate
from lpo_jax.objectives.weights import PromptWeight as PromptWeight
from lpo_jax.objectives.weights import TokenWeight as TokenWeight
from lpo_jax.objectives.weights import token_weights as token_weights
