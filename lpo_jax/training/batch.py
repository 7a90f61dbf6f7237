"""A batch as an update takes it."""

from flax import struct

from lpo_jax.models.runner import Groups
from lpo_jax.objectives import Scored


@struct.dataclass
class Rollouts:
    """Groups with everything the objective needs."""

    groups: Groups
    scored: Scored
