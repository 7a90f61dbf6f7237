"""Hooks that compare responses with a judge's verdict or with one greedy response."""

import numpy as np

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rewards import Verdict, VerifierPool, VerifierSpec
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.hooks.base import RunHook, Tools, judged
from lpo_jax.tasks.images import without_images


class Greedy(RunHook):
    """ReMax: the baseline is the reward of the greedy response to each prompt."""

    def annotate(self, batch, rollouts, tools):
        rows = list(zip(rollouts.ids, tools.rows_of(rollouts)))
        # After the group's own prompt, which contains a hint if a hook has added one.
        prompts = [ids[:n].tolist() for ids, n in zip(rollouts.prompts, rollouts.prompt_lengths)]
        greedy = judged(tools.sample(rows, num_responses=1, greedy=True, prompts=prompts))
        # If the greedy response could not be judged, the baseline is the group's own mean.
        baseline = np.where(greedy.known, greedy.mean_reward, judged(rollouts).mean_reward)
        return {"baseline": np.nan_to_num(baseline)[:, None].astype(np.float32)}


class FlawJudge(RunHook):
    """Applies a user's function to responses, in worker processes like those of the verifier."""

    spec: specs.Judge

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        if not spec.judge:
            raise UserError(
                f"objective {objective.name} needs a judge: set objective.judge to path/to/file.py:function"
            )
        rewards = environment.config.rewards
        self.worked = False
        self.pool = VerifierPool(VerifierSpec(spec.judge), workers=rewards.workers, timeout=rewards.timeout)

    def __enter__(self):
        self.pool.__enter__()
        return self

    def __exit__(self, *exception):
        return self.pool.__exit__(*exception)

    def verdicts(
        self, rollouts: Rollouts, tools: Tools, wanted: np.ndarray
    ) -> dict[tuple[int, int], Verdict]:
        """Verdicts on the responses `wanted` `[P, K]`, by (p, k); those on which the judge failed are left out.

        Raises:
          RunStopped: the judge has failed on every response so far.
        """
        places = np.argwhere(wanted).tolist()
        rows = tools.rows_of(rollouts)
        verdicts = self.pool.verify(
            [rollouts.texts[p][k] for p, k in places], [without_images(rows[p]) for p, _ in places]
        )
        found = {(p, k): v for (p, k), v in zip(places, verdicts) if not v.masked}
        self.worked |= bool(found)
        if verdicts and not self.worked:
            raise RunStopped(
                f"step {tools.step}: the judge {self.spec.judge} failed on all {len(verdicts)} responses; the first: "
                f"{verdicts[0].parts.get('reason', 'no reason given')}"
            )
        return found

    def annotate(self, batch, rollouts, tools):
        """FAPO: marks passing responses that the judge calls flawed."""
        flawed = np.zeros(rollouts.rewards.shape, bool)
        for place, verdict in self.verdicts(rollouts, tools, rollouts.passed & rollouts.valid).items():
            flawed[place] = verdict.reward > 0
        return {"flawed": flawed}
