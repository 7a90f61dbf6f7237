"""PIPO: the batch before, once more, weighed by what came of it."""

import base64
import io

import jax
import numpy as np

from lpo_jax.objectives import Scored, Teacher
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.collect import Collected
from lpo_jax.rollout.hooks.base import RunHook, judged
from lpo_jax.training.batch import Groups, Rollouts


class PreviousBatch(RunHook):
    """Keeps the last batch and the mean rewards of the window."""

    spec: specs.Replay

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        self.rewards: list[float] = []
        self.before: Rollouts | None = None
        self.weight = 0.0

    def replay(self, rollouts):
        """The batch before with its weight, when there is one; the given batch is kept for the next step."""
        again, self.before = self.before, jax.device_get(rollouts)
        if again is None or self.weight == 0 or not np.any(again.scored.valid):
            return None
        P = again.scored.rewards.shape[0]
        weight = np.full(P, self.weight, np.float32)
        return again.replace(scored=again.scored.replace(weight=weight, progress=rollouts.scored.progress))

    def observe(self, sampled: Collected):
        rewards = judged(sampled).rewards
        if not rewards.size:  # nothing is known of this step, so nothing of how it compares
            self.weight = 0.0
            return
        mean = float(rewards.mean())
        window = np.array(self.rewards[-self.spec.window :] or [mean])
        # A batch's mean is no better known than its standard error, however alike those of the window happen to be.
        error = float(np.std(rewards)) / np.sqrt(max(rewards.size, 1))
        deviation = max(float(window.std()), error)
        known = len(window) > 1 and deviation > 1e-6
        xi = (mean - window.mean()) / deviation if known else 0.0
        self.weight = float(xi if xi >= 0 else self.spec.regress_scale * xi)
        self.rewards = [*self.rewards, mean][-self.spec.window :]

    def metrics(self):
        return {"lpo/replay_weight": self.weight}

    def state(self):
        state = {"rewards": self.rewards, "weight": self.weight}
        if self.before is None:
            return state
        file = io.BytesIO()
        np.savez_compressed(file, **_flat(self.before))
        return state | {"before": base64.b64encode(file.getvalue()).decode()}

    def restore(self, state):
        self.rewards, self.weight = state["rewards"], state["weight"]
        if "before" in state:
            with np.load(io.BytesIO(base64.b64decode(state["before"]))) as arrays:
                self.before = _rollouts(dict(arrays))


def _flat(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """Every array of a batch by its path, such as "scored.teacher.ids"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(rollouts)
    return {".".join(key.name for key in path): np.asarray(leaf) for path, leaf in flat}


def _rollouts(arrays: dict[str, np.ndarray]) -> Rollouts:
    """The batch of `_flat`."""

    def fields(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): x
            for name, x in arrays.items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }

    scored, teacher = fields("scored."), fields("scored.teacher.")
    if teacher:
        scored["teacher"] = Teacher(**teacher)
    return Rollouts(Groups(**fields("groups.")), Scored(**scored))
