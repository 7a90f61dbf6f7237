"""What a hook may do with a round, and the tools it has.

A round is: rows are drawn, responses sampled and verified, groups mended, extra arrays given to the objective.
Each hook overrides what it needs; its state is JSON and is saved with every checkpoint.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.evaluation.collect import Collected
from lpo_jax.models.decoder import Params
from lpo_jax.objectives.hooks import Hook
from lpo_jax.objectives.method import Objective
from lpo_jax.sampling import Sampling
from lpo_jax.training.batch import Rollouts
from lpo_jax.training.session import Session
from lpo_jax.training.step import Program

Rows = list[tuple[int, tasks.Row]]

# Streams of random numbers, so that extra samples of a prompt differ from those of its own group.
HINTED, BUDGETED = 1, 2


@dataclasses.dataclass(frozen=True)
class Tools:
    """What hooks work with in one step: the run's parts and the step's weights."""

    session: Session
    program: Program
    step: int
    params: Params
    weights: Any  # in decode layout

    def sample(
        self,
        rows: Rows,
        *,
        stream: int = 0,
        num_responses: int = 0,
        max_tokens: int = 0,
        greedy: bool = False,
        **options: Any,
    ) -> Collected:
        """Samples and verifies as the run does; options are those of the collector."""
        config = self.session.config
        return self.session.collect(
            self.weights,
            rows,
            num_responses=num_responses or config.sampling.num_responses,
            max_tokens=max_tokens or config.sampling.max_tokens,
            sampling=Sampling(0.0 if greedy else config.sampling.temperature),
            seed=config.seed + (stream << 24),
            step=self.step,
            stop=config.sampling.stop,
            **options,
        )

    def rows_of(self, batch: Collected) -> list[tasks.Row]:
        """The data rows of a batch's groups."""
        return [self.session.train_rows[i] for i in batch.ids]


@dataclasses.dataclass
class Round:
    """One sampling round on its way to the objective.

    Attributes:
      extras: fields of `Scored` by name, `[P, ...]`.
      rescore: whether behaviour log-probs must be the trainer's: some response was not sampled from its prompt.
    """

    batch: Collected
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)
    rescore: bool = False


class RunHook:
    """A hook at work in a run. The base does nothing."""

    def __init__(self, spec: Hook, session: Session, objective: Objective):
        self.spec, self.session, self.objective = spec, session, objective

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def draw(self, rows: Rows, step: int) -> Rows:
        """The rows to sample, of those that the data's order offers."""
        return rows

    def fill(self, round: Round, more: Callable[[], Rows], tools: Tools) -> None:
        """May sample more groups, until the round has what it should."""

    def mend(self, round: Round, tools: Tools) -> None:
        """May change the round's groups."""

    def extras(self, rollouts: Rollouts, batch: Collected, tools: Tools) -> dict[str, Any]:
        """Fields of `Scored` that need the padded arrays."""
        return {}

    def replay(self, rollouts: Rollouts) -> Rollouts | None:
        """A batch for one more update after the step's own."""
        return None

    def observe(self, batch: Collected) -> None:
        """Takes notice of a finished round."""

    def metrics(self) -> dict[str, float]:
        """What the last round has to report."""
        return {}

    def state(self) -> Any:
        """JSON."""
        return None

    def restore(self, state: Any) -> None:
        """Continues from `state()`."""


def pass_rates(batch: Collected) -> np.ndarray:
    """`[P]` share of the valid responses that passed; 0 where none is valid."""
    return (batch.passed & batch.valid).sum(-1) / np.maximum(batch.valid.sum(-1), 1)


def solved_none(batch: Collected) -> Sequence[int]:
    """Groups in which no response passed."""
    return np.flatnonzero(~(batch.passed & batch.valid).any(-1)).tolist()


def require_solutions(session: Session, objective: Objective, use: str) -> None:
    """Refuses a task some training row of which has no solution. Raises `UserError` naming the row."""
    for index, row in enumerate(session.train_rows):
        if session.task.solution(row) is None:
            raise UserError(
                f"objective {objective.name}: training row {index} of task {session.task.name!r} has no solution {use}"
            )
