"""PIPO: the batch before, once more, weighed by what came of it."""

import base64
import io

import jax
import numpy as np

from lpo_jax.evaluation.collect import Collected
from lpo_jax.objectives import Scored
from lpo_jax.objectives import hooks as specs
from lpo_jax.training.batch import Groups, Rollouts
from lpo_jax.training.hooks.base import RunHook, judged

_SCORED = (
    "behaviour_logp",
    "rewards",
    "mask",
    "valid",
    "passed",
    "malformed",
    "truncated",
    "token_ids",
    "clusters",
)


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
        xi = (mean - window.mean()) / max(float(window.std()), 1e-6) if len(window) > 1 else 0.0
        self.weight = float(xi if xi >= 0 else self.spec.regress_scale * xi)
        self.rewards = [*self.rewards, mean][-self.spec.window :]

    def metrics(self):
        return {"lpo/replay_weight": self.weight}

    def state(self):
        state = {"rewards": self.rewards, "weight": self.weight}
        if self.before is None:
            return state
        scored = {name: getattr(self.before.scored, name) for name in _SCORED}
        groups = {name: x for name, x in vars(self.before.groups).items() if x is not None}
        arrays = {f"scored.{k}": v for k, v in scored.items() if v is not None}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays, **{f"groups.{k}": v for k, v in groups.items()})
        return state | {"before": base64.b64encode(file.getvalue()).decode()}

    def restore(self, state):
        self.rewards, self.weight = state["rewards"], state["weight"]
        if "before" in state:
            with np.load(io.BytesIO(base64.b64decode(state["before"]))) as arrays:
                parts = {"scored": {}, "groups": {}}
                for key, value in arrays.items():
                    kind, _, name = key.partition(".")
                    parts[kind][name] = value
            self.before = Rollouts(Groups(**parts["groups"]), Scored(**parts["scored"]))
