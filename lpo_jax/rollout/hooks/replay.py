"""PIPO: one more update on the previous batch, weighted by the change of the reward since."""

import base64
import io

import jax
import numpy as np

from lpo_jax.models.runner import Groups
from lpo_jax.objectives import Scored, Teacher
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.hooks.base import RunHook, judged


class PreviousBatch(RunHook):
    """Keeps the previous batch and the mean rewards of a window of steps."""

    spec: specs.Replay

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        self.rewards: list[float] = []
        self.before: Batch | None = None
        self.weight = 0.0

    def replay(self, batch):
        """Return the previous batch with its weight, if there is one, and keep `batch` for the next step."""
        again, self.before = self.before, jax.device_get(batch)
        if again is None or self.weight == 0 or not np.any(again.scored.valid):
            return None
        P = again.scored.rewards.shape[0]
        weight = np.full(P, self.weight, np.float32)
        return again.replace(scored=again.scored.replace(weight=weight, progress=batch.scored.progress))

    def observe(self, sampled: Rollouts):
        rewards = judged(sampled).rewards
        if not rewards.size:  # without a judged response there is nothing to compare
            self.weight = 0.0
            return
        mean = float(rewards.mean())
        window = np.array(self.rewards[-self.spec.window :] or [mean])
        # The mean of a batch is uncertain by its standard error, even if the means of the window happen to be equal.
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
                self.before = _batch(dict(arrays))


def _flat(batch: Batch) -> dict[str, np.ndarray]:
    """All arrays of a batch by path, such as "scored.teacher.ids"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {".".join(key.name for key in path): np.asarray(leaf) for path, leaf in flat}


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    """The batch of which `_flat` returned the arrays."""

    def fields(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): x
            for name, x in arrays.items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }

    scored, teacher = fields("scored."), fields("scored.teacher.")
    if teacher:
        scored["teacher"] = Teacher(**teacher)  # type: ignore[assignment]
    return Batch(Groups(**fields("groups.")), Scored(**scored))
