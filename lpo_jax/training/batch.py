"""What an update learns from.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import jax
from flax import struct

from lpo_jax.models.packing import Layout
from lpo_jax.objectives import Scored


@struct.dataclass
class Groups:
    """Token ids of whole groups, left-aligned and padded with 0.

    prompts `[P, S]`, lengths `[P]` (at least 1), responses `[P, K, T]`; which response tokens count is the
    scored record's mask. top_ids `[P, K, T, J]` are tokens whose log-probs are wanted beside the sampled ones'.
    layout says which tokens run together; None: as if every response had T tokens.
    """

    prompts: jax.Array
    lengths: jax.Array
    responses: jax.Array
    top_ids: jax.Array | None = None
    layout: Layout | None = None


@struct.dataclass
class Rollouts:
    """Groups with everything the objective needs."""

    groups: Groups
    scored: Scored
