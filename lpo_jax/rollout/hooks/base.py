"""The protocol of hooks: the phases of a step, what a hook may do in each, and the tools it has.

A step runs through these phases in this order, whatever the order of a method's hooks (`rounds.sample_round`):

  draw      the rows of a sampling round are chosen; its responses are then sampled and verified
  mend      failed groups or responses of that round are replaced
  select    the groups to learn from are chosen; it may ask for further rounds, which are drawn and mended alike
  observe   every hook takes notice of all that was sampled in the step, before it was mended and selected
  annotate  the objective gets fields of `Scored`
  replay    an update on an earlier batch follows the step's own

A hook's settings (`objectives/hook_specs.py`) declare in which phase it acts, and which hooks it excludes.
Each hook overrides the methods of its phase; its state is JSON and is saved with every checkpoint.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.models.decoder import Params
from lpo_jax.objectives.hook_specs import HookSpec
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.collect import Collected, join
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
    """Sampled groups on their way to the objective.

    Attributes:
      rescore: whether behaviour log-probs must be the trainer's: some response was not sampled from its prompt.
    """

    batch: Collected
    rescore: bool = False


def joined(rounds: Sequence[Round]) -> Round:
    """Several rounds as one."""
    return Round(join([round.batch for round in rounds]), any(round.rescore for round in rounds))


class RunHook:
    """A hook at work in a run. The base does nothing."""

    def __init__(self, spec: HookSpec, session: Session, objective: Objective):
        self.spec, self.session, self.objective = spec, session, objective

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def begin(self) -> None:
        """A step begins: what `metrics` counts is 0."""

    def draw(self, rows: Rows, step: int, seen: Collection[int]) -> Rows:
        """The rows to sample.

        Args:
          rows: what the order of the data offers.
          step: from 1.
          seen: the rows of the step's earlier rounds, which are not sampled again.
        """
        return rows

    def mend(self, round: Round, tools: Tools) -> None:
        """May change the round's groups."""

    def select(self, round: Round, more: Callable[[], Round | None]) -> None:
        """May change which groups the step learns from.

        Args:
          round: as many groups as the step is to have; changed in place.
          more: draws, samples and mends a further round; None where all rows that were offered have been seen.
        """

    def observe(self, sampled: Collected) -> None:
        """Takes notice of everything that the step sampled, before it was mended and selected."""

    def annotate(self, rollouts: Rollouts, batch: Collected, tools: Tools) -> dict[str, Any]:
        """Fields of `Scored`."""
        return {}

    def replay(self, rollouts: Rollouts) -> Rollouts | None:
        """A batch for one more update after the step's own."""
        return None

    def metrics(self) -> dict[str, float]:
        """What the last step has to report."""
        return {}

    def state(self) -> Any:
        """JSON."""
        return None

    def restore(self, state: Any) -> None:
        """Continues from `state()`."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Outcomes of a batch by group, over the responses that the verifier could judge.

    A failure of the verifier (outcome `infrastructure`) says nothing about the policy: it counts neither as a pass
    nor as a failure, and of a group that it left without a judged response nothing is known.

    Attributes:
      known: `[P]` bool: some response was judged.
      pass_rate: `[P]` share of the judged responses that passed; NaN where nothing is known.
      mean_reward: `[P]` mean reward of the judged responses; NaN where nothing is known.
      failed: `[P]` bool: some response was judged, and none passed.
      mixed: `[P]` bool: the rewards of the judged responses differ, so that the group has something to teach.
      rewards: `[N]` of all judged responses.
    """

    known: np.ndarray
    pass_rate: np.ndarray
    mean_reward: np.ndarray
    failed: np.ndarray
    mixed: np.ndarray
    rewards: np.ndarray


def judged(batch: Collected) -> Judged:
    """What is known of each group; the one place where hooks learn how a batch went."""
    valid, rewards = batch.valid, batch.rewards
    passed, count = batch.passed & valid, valid.sum(-1)
    known = count > 0
    share = lambda x: np.where(known, x.sum(-1, where=valid) / np.maximum(count, 1), np.nan)  # noqa: E731
    least = rewards.min(-1, initial=np.inf, where=valid)
    most = rewards.max(-1, initial=-np.inf, where=valid)
    return Judged(known, share(passed), share(rewards), known & ~passed.any(-1), most > least, rewards[valid])


def require_solutions(session: Session, objective: Objective, use: str) -> None:
    """Refuses a task some training row of which has no solution. Raises `UserError` naming the row."""
    for index, row in enumerate(session.train_rows):
        if session.task.solution(row) is None:
            raise UserError(
                f"objective {objective.name}: training row {index} of task {session.task.name!r} has no solution {use}"
            )
