"""The arrays of one batch of groups, as an update takes them."""

import jax
import numpy as np
from flax import struct

from lpo_jax.models.runner import Groups
from lpo_jax.objectives import Scored


class Batch(struct.PyTreeNode):
    """Token ids of groups, and everything that the objective needs to know about their responses."""

    groups: Groups
    scored: Scored

    def split(self, parts: int) -> list["Batch"]:
        """Equal minibatches of whole groups, in order; values without a prompt axis go into each of them."""
        size = self.groups.prompts.shape[0] // parts
        cut = lambda x, i: x[i * size : (i + 1) * size] if np.ndim(x) else x  # noqa: E731
        return [jax.tree.map(lambda x, i=i: cut(x, i), self) for i in range(parts)]
