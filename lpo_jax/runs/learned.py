"""What the updates of a step computed about its responses: the source of their records and of some metrics.

Axes: P prompts · K responses · T response tokens.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from lpo_jax.objectives import Listwise
from lpo_jax.parallel import hosts

_OF_GROUP = {
    "shaped_reward": "rewards",
    "advantage": "utilities",
    "target": "target",
    "policy": "policy",
    "coefficient": "coefficients",
}


class Learned(struct.PyTreeNode):
    """What an update computed about its minibatch, or all updates of a step about the step's groups.

    Attributes:
      view: the objective's view of the groups.
      mask: `[P, K, T]` response tokens.
      behaviour_logp: `[P, K, T]` log-probs that the objective takes ratios to.
      used_logp: `[P, K, T]` log-probs that the objective used as the current policy's.
      logp: `[P, K, T]` the trainer's log-probs of the tokens; NaN at tokens that the update did not run.
      update: `[P]` index of the update in the step.
    """

    view: Listwise
    mask: jax.Array
    behaviour_logp: jax.Array
    used_logp: jax.Array
    logp: jax.Array
    update: np.ndarray | None = None

    @classmethod
    def on_host(cls, updates: Sequence["Learned"]) -> "Learned":
        """Join the updates of a step, with all arrays in the memory of the host."""
        updates = hosts.to_host(list(updates))
        sizes = [len(of_update.view.active) for of_update in updates]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *updates)
        return joined.replace(update=np.repeat(np.arange(len(sizes)), sizes))

    def metrics(self) -> dict[str, float]:
        """Shaped rewards and advantages, over the responses that belong to their groups."""
        valid = self.view.valid
        return {
            f"critic/{name}/{how}": float(getattr(x[valid], how)()) if valid.any() else float("nan")
            for name, x in (("rewards", self.view.rewards), ("advantages", self.view.utilities))
            for how in ("mean", "max", "min")
        }

    def records(self) -> list[dict]:
        """One dict for each response, group by group: target w*, policy P, coefficient c, and what led to them."""
        values = {key: np.asarray(getattr(self.view, name), np.float64) for key, name in _OF_GROUP.items()}
        return [
            {"update": int(self.update[p]), "valid": bool(self.view.valid[p, k])}
            | {key: float(x[p, k]) for key, x in values.items()}
            for p, k in np.ndindex(self.view.valid.shape)
        ]

    def of_tokens(self) -> dict[str, jax.Array | np.ndarray]:
        """Numbers `[P, K, T]` of the tokens by their keys in the records."""
        ratio = np.where(self.mask, self.used_logp.astype(np.float64) - self.behaviour_logp, 0)
        return {
            "token_trainer_logp": self.logp,
            "token_ratio": np.exp(ratio),
            "token_gate": ~self.view.clipped,
        }
