"""Hooks that sample groups without any passing response again, with a hint in the prompt."""

import dataclasses

import numpy as np

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.collect import Rollouts, concatenate, replace_response
from lpo_jax.rollout.encode import encode_hinted
from lpo_jax.rollout.hooks.base import HINTED, RunHook, Tools, judged, require_solutions


class Hints(RunHook):
    """Samples failed groups again with stronger and stronger hints, until a response passes or no hint is left."""

    def hints(self, row: tasks.Row) -> list[str]:
        """The hints for a row, the weakest first."""
        raise NotImplementedError

    def use(self, rollouts: Rollouts, p: int, hinted: Rollouts, q: int) -> Rollouts:
        """Return the rollouts with failed group `p` repaired by group `q` of the hinted samples, which has a pass."""
        raise NotImplementedError

    def begin(self) -> None:
        self.hinted = 0

    def mend(self, rollouts: Rollouts, tools: Tools) -> Rollouts:
        task, tokenizer, train_rows = (
            self.environment.task,
            self.environment.tokenizer,
            self.environment.train_rows,
        )
        failed = np.flatnonzero(judged(rollouts).failed).tolist()
        hints = {p: self.hints(train_rows[rollouts.ids[p]]) for p in failed}
        level = 0
        while failed := [p for p, texts in hints.items() if level < len(texts)]:
            rows = [(rollouts.ids[p], train_rows[rollouts.ids[p]]) for p in failed]
            prompts = [
                encode_hinted(task, tokenizer, row, hints[p][level]) for p, (_, row) in zip(failed, rows)
            ]
            hinted = tools.sample(
                rows, stream=HINTED + 16 * level, prompts=prompts, at_least=len(rollouts.ids)
            )
            still_failed = judged(hinted).failed
            for q, p in enumerate(failed):
                if (hinted.passed[q] & hinted.valid[q]).any():
                    rollouts = self.use(rollouts, p, hinted, q)
                    self.hinted += 1
                if not still_failed[q]:  # it passed, or its result is unknown and does not justify more help
                    del hints[p]
            level += 1
        return rollouts

    def metrics(self):
        return {"lpo/hinted_groups": self.hinted}


class Solutions(Hints):
    """GHPO: the hinted group replaces the failed one."""

    spec: specs.SolutionHints

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        require_solutions(environment, objective, "to take hints from")

    def hints(self, row):
        solution = self.environment.task.solution(row)
        return [f"A solution begins: {solution[: int(f * len(solution))]}" for f in self.spec.hint_fractions]

    def use(self, rollouts, p, hinted, q):
        order = list(range(len(rollouts.ids)))
        order[p] = len(order) + q
        return concatenate([rollouts, hinted]).take(order)


class Ladder(Hints):
    """Scaf-GRPO: a response that passed with a hint replaces a failed one, under the prompt without the hint."""

    spec: specs.LadderHints

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        for index, row in enumerate(environment.train_rows):
            hints = row.get("hints")
            if not isinstance(hints, list | tuple) or not hints or not all(isinstance(h, str) for h in hints):
                raise UserError(
                    f"objective {objective.name}: training row {index} of task {environment.task.name!r} "
                    "has no `hints`, "
                    "a list of texts from the vaguest to the whole solution"
                )

    def hints(self, row):
        return list(row["hints"])

    def mend(self, rollouts, tools):
        return super().mend(rollouts, tools) if tools.step > self.spec.hint_after else rollouts

    def use(self, rollouts, p, hinted, q):
        best = int(np.argmax(hinted.passed[q] & hinted.valid[q]))
        # A response that could not be judged is replaced first; else the first, which failed as all others did.
        k = int(np.argmin(rollouts.valid[p]))
        mended = replace_response(rollouts, p, k, hinted, q, best)
        return dataclasses.replace(
            mended, rescore=True
        )  # it was not sampled from the prompt that it is trained under
