"""A second opinion on responses: a judge's, or that of one greedy response."""

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.evaluation.collect import Collected
from lpo_jax.objectives import hooks as specs
from lpo_jax.rewards import VerifierPool, VerifierSpec
from lpo_jax.training.hooks.base import RunHook


class Greedy(RunHook):
    """ReMax: the reward of the likeliest response to each prompt."""

    def extras(self, rollouts, batch, tools):
        rows = list(zip(batch.ids, tools.rows_of(batch)))
        greedy = tools.sample(rows, num_responses=1, greedy=True)
        # A verifier's failure says nothing of the prompt: it is compared to its own mean then.
        own = np.array([r[v].mean() if v.any() else 0 for r, v in zip(batch.rewards, batch.valid)])
        return {"baseline": np.where(greedy.valid, greedy.rewards, own[:, None]).astype(np.float32)}


class Judge(RunHook):
    """A user's function over the responses that need judging, in workers like those of the verifier."""

    spec: specs.Judge

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        if not spec.judge:
            raise UserError(
                f"objective {objective.name} needs a judge: set objective.judge to path/to/file.py:function"
            )
        rewards = session.config.rewards
        self.pool = VerifierPool(VerifierSpec(spec.judge), workers=rewards.workers, timeout=rewards.timeout)

    def __enter__(self):
        self.pool.__enter__()
        return self

    def __exit__(self, *exception):
        return self.pool.__exit__(*exception)

    def judged(self, batch: Collected, tools, wanted: np.ndarray):
        """The verdicts on the responses `wanted` `[P, K]`, by place. Those the judge failed on are left out."""
        places = np.argwhere(wanted).tolist()
        rows = tools.rows_of(batch)
        verdicts = self.pool.verify([batch.texts[p][k] for p, k in places], [rows[p] for p, _ in places])
        return {(p, k): v for (p, k), v in zip(places, verdicts) if not v.masked}

    def extras(self, rollouts, batch, tools):
        """FAPO: which passing responses are flawed."""
        flawed = np.zeros(batch.rewards.shape, bool)
        for place, verdict in self.judged(batch, tools, batch.passed & batch.valid).items():
            flawed[place] = verdict.reward > 0
        return {"flawed": flawed}
