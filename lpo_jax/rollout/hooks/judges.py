"""A second opinion on responses: a judge's, or that of one greedy response."""

import numpy as np

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rewards import Verdict, VerifierPool, VerifierSpec
from lpo_jax.rollout.collect import Collected
from lpo_jax.rollout.hooks.base import RunHook, Tools, judged


class Greedy(RunHook):
    """ReMax: the reward of the likeliest response to each prompt."""

    def annotate(self, rollouts, batch, tools):
        rows = list(zip(batch.ids, tools.rows_of(batch)))
        # Behind the group's own prompt, which holds a hint where a hook has given one.
        prompts = [ids[:n].tolist() for ids, n in zip(batch.prompts, batch.prompt_lengths)]
        greedy = judged(tools.sample(rows, num_responses=1, greedy=True, prompts=prompts))
        # Where the greedy response could not be judged, the group is compared to its own mean.
        baseline = np.where(greedy.known, greedy.mean_reward, judged(batch).mean_reward)
        return {"baseline": np.nan_to_num(baseline)[:, None].astype(np.float32)}


class FlawJudge(RunHook):
    """A user's function over the responses that need judging, in workers like those of the verifier."""

    spec: specs.Judge

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        if not spec.judge:
            raise UserError(
                f"objective {objective.name} needs a judge: set objective.judge to path/to/file.py:function"
            )
        rewards = session.config.rewards
        self.worked = False
        self.pool = VerifierPool(VerifierSpec(spec.judge), workers=rewards.workers, timeout=rewards.timeout)

    def __enter__(self):
        self.pool.__enter__()
        return self

    def __exit__(self, *exception):
        return self.pool.__exit__(*exception)

    def verdicts(self, batch: Collected, tools: Tools, wanted: np.ndarray) -> dict[tuple[int, int], Verdict]:
        """The verdicts on the responses `wanted` `[P, K]`, by place; those on which the judge failed are left out.

        Raises:
          RunStopped: the judge has failed on every response that it was given so far.
        """
        places = np.argwhere(wanted).tolist()
        rows = tools.rows_of(batch)
        verdicts = self.pool.verify([batch.texts[p][k] for p, k in places], [rows[p] for p, _ in places])
        found = {(p, k): v for (p, k), v in zip(places, verdicts) if not v.masked}
        self.worked |= bool(found)
        if verdicts and not self.worked:
            raise RunStopped(
                f"step {tools.step}: the judge {self.spec.judge} failed on all {len(verdicts)} responses; the first: "
                f"{verdicts[0].parts.get('reason', 'no reason given')}"
            )
        return found

    def annotate(self, rollouts, batch, tools):
        """FAPO: which passing responses are flawed."""
        flawed = np.zeros(batch.rewards.shape, bool)
        for place, verdict in self.verdicts(batch, tools, batch.passed & batch.valid).items():
            flawed[place] = verdict.reward > 0
        return {"flawed": flawed}
