"""Groups in which everything fails, sampled again with help."""

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.collect import Collected, join, replace_response
from lpo_jax.rollout.encode import encode_hinted
from lpo_jax.rollout.hooks.base import HINTED, Round, RunHook, Tools, judged, require_solutions


class Hints(RunHook):
    """Goes up the hints of the failed groups until each has a passing response or is out of hints."""

    def hints(self, row) -> list[str]:
        """What a row offers, the least help first."""
        raise NotImplementedError

    def use(self, round: Round, p: int, again: Collected, q: int) -> None:
        """Group `p` of the round failed, and group `q` of the hinted samples has a response that passed."""
        raise NotImplementedError

    def begin(self) -> None:
        self.hinted = 0

    def mend(self, round: Round, tools: Tools) -> None:
        session = self.session
        failed = np.flatnonzero(judged(round.batch).failed).tolist()
        hints = {p: self.hints(session.train_rows[round.batch.ids[p]]) for p in failed}
        level = 0
        while failed := [p for p, texts in hints.items() if level < len(texts)]:
            rows = [(round.batch.ids[p], session.train_rows[round.batch.ids[p]]) for p in failed]
            prompts = [
                encode_hinted(session.task, session.tokenizer, row, hints[p][level])
                for p, (_, row) in zip(failed, rows)
            ]
            again = tools.sample(
                rows, stream=HINTED + 16 * level, prompts=prompts, at_least=len(round.batch.ids)
            )
            still_failed = judged(again).failed
            for q, p in enumerate(failed):
                if (again.passed[q] & again.valid[q]).any():
                    self.use(round, p, again, q)
                    self.hinted += 1
                if not still_failed[q]:  # solved, or nothing is known of it and more help would not be earned
                    del hints[p]
            level += 1

    def metrics(self):
        return {"lpo/hinted_groups": self.hinted}


class Solutions(Hints):
    """GHPO: the hinted group takes the place of the failed one."""

    spec: specs.SolutionHints

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        require_solutions(session, objective, "to take hints from")

    def hints(self, row):
        solution = self.session.task.solution(row)
        return [f"A solution begins: {solution[: int(f * len(solution))]}" for f in self.spec.hint_fractions]

    def use(self, round, p, again, q):
        order = list(range(len(round.batch.ids)))
        order[p] = len(order) + q
        round.batch = join([round.batch, again]).take(order)


class Ladder(Hints):
    """Scaf-GRPO: one response that passed with a hint takes the place of a failed one, under the plain prompt."""

    spec: specs.LadderHints

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        for index, row in enumerate(session.train_rows):
            hints = row.get("hints")
            if not isinstance(hints, list | tuple) or not hints or not all(isinstance(h, str) for h in hints):
                raise UserError(
                    f"objective {objective.name}: training row {index} of task {session.task.name!r} has no `hints`, "
                    "a list of texts from the vaguest to the whole solution"
                )

    def hints(self, row):
        return list(row["hints"])

    def mend(self, round, tools):
        if tools.step > self.spec.hint_after:
            super().mend(round, tools)

    def use(self, round, p, again, q):
        best = int(np.argmax(again.passed[q] & again.valid[q]))
        # A response that could not be judged is no loss; else the first, which failed as all others did.
        place = int(np.argmin(round.batch.valid[p]))
        round.batch = replace_response(round.batch, p, place, again, q, best)
        round.rescore = True  # it was not sampled from the prompt that it is trained under
