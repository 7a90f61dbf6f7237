"""The protocol of hooks: the phases of a step, what a hook may do in each phase, and the tools that it has.

A step runs through these phases in this order, whatever the order of a method's hooks (`rollout/rounds.py`):

  draw      choose the rows of a sampling round; their responses are then sampled and verified
  mend      replace failed groups or responses of that round
  select    choose the groups to learn from; may request further rounds, which are drawn and mended in the same way
  observe   read all rollouts of the step, as they were before they were mended and selected
  annotate  compute fields of `Scored` for the objective
  replay    request one more update on an earlier batch, after the step's own updates

A hook's settings (`objectives/hook_specs.py`) declare the phases in which it acts, and the hooks that it cannot be
combined with. Each hook overrides the methods of its phases. Its state is JSON and is saved with every checkpoint.
"""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.models.decoder import Params
from lpo_jax.models.runner import ModelRunner
from lpo_jax.objectives.hook_specs import HookSpec
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.environment import Environment
from lpo_jax.sampling import SampleRequest, Sampling
from lpo_jax.types import Json, PyTree

Rows = list[tuple[int, tasks.Row]]

# Streams of random numbers, so that extra samples of a prompt differ from those of its own group.
HINTED, BUDGETED = 1, 2


@dataclasses.dataclass(frozen=True)
class Tools:
    """What hooks work with in one step.

    Attributes:
      runner: scores given responses with the trainer.
      step: from 1.
      params: the current policy.
      weights: the same in decode layout, to sample with.
    """

    environment: Environment
    runner: ModelRunner
    step: int
    params: Params
    weights: PyTree

    def sample(
        self,
        rows: Rows,
        *,
        stream: int = 0,
        num_responses: int = 0,
        max_tokens: int = 0,
        greedy: bool = False,
        **options: Json,
    ) -> Rollouts:
        """Sample and verify responses with the run's settings.

        Args:
          stream: of random numbers.
          num_responses, max_tokens: 0 takes the run's.
          greedy: take the most probable token at each position.
          **options: those of `Collector`.
        """
        config = self.environment.config
        return self.environment.collect(
            self.weights,
            rows,
            SampleRequest(
                num_responses=num_responses or config.sampling.num_responses,
                max_tokens=max_tokens or config.sampling.max_tokens,
                distribution=Sampling(0.0 if greedy else config.sampling.temperature),
                stop=config.sampling.stop,
                seed=config.seed + (stream << 24),
                step=self.step,
            ),
            **options,
        )

    def rows_of(self, rollouts: Rollouts) -> list[tasks.Row]:
        """The data row of each group."""
        return [self.environment.train_rows[i] for i in rollouts.ids]


class RunHook:
    """A hook of a run. The base class does nothing in any phase."""

    def __init__(self, spec: HookSpec, environment: Environment, objective: Objective):
        self.spec, self.environment, self.objective = spec, environment, objective

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def begin(self) -> None:
        """Called at the beginning of a step; resets what `metrics` counts."""

    def draw(self, rows: Rows, step: int, seen: Collection[int]) -> Rows:
        """Return the rows to sample.

        Args:
          rows: the next rows in the order of the data.
          step: from 1.
          seen: ids of the rows of earlier rounds of the step, which are not sampled again.
        """
        return rows

    def mend(self, rollouts: Rollouts, tools: Tools) -> Rollouts:
        """Return the rollouts of a round with some groups or responses replaced."""
        return rollouts

    def select(self, rollouts: Rollouts, more: Callable[[], Rollouts | None]) -> Rollouts:
        """Return the groups that the step learns from, as many as it was given.

        Args:
          rollouts: the step's first round.
          more: draws, samples and mends a further round; returns None if all rows that were drawn have been seen.
        """
        return rollouts

    def observe(self, sampled: Rollouts) -> None:
        """Read everything that the step sampled, as it was before it was mended and selected."""

    def annotate(self, batch: Batch, rollouts: Rollouts, tools: Tools) -> dict[str, Json]:
        """Return fields of `Scored` by name."""
        return {}

    def replay(self, batch: Batch) -> Batch | None:
        """Return a batch for one more update after the step's own; None for no such update."""
        return None

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step."""
        return {}

    def state(self) -> PyTree:
        """The state to save, as JSON."""
        return None

    def restore(self, state: Json) -> None:
        """Restore what `state()` returned."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Outcomes of rollouts by group, over the responses that the verifier could judge.

    A failure of the verifier itself (outcome `infrastructure`) carries no information about the policy. It counts
    neither as a pass nor as a failure, and the result of a group without any judged response is unknown.

    Attributes:
      known: `[P]` bool: at least one response was judged.
      pass_rate: `[P]` share of the judged responses that passed; NaN where `known` is False.
      mean_reward: `[P]` mean reward of the judged responses; NaN where `known` is False.
      failed: `[P]` bool: at least one response was judged, and none passed.
      mixed: `[P]` bool: the rewards of the judged responses differ, so that the group has a learning signal.
      rewards: `[N]` of all judged responses.
    """

    known: np.ndarray
    pass_rate: np.ndarray
    mean_reward: np.ndarray
    failed: np.ndarray
    mixed: np.ndarray
    rewards: np.ndarray


def judged(rollouts: Rollouts) -> Judged:
    """Outcomes by group; all hooks read the results of rollouts through this function."""
    valid, rewards = rollouts.valid, rollouts.rewards
    passed, count = rollouts.passed & valid, valid.sum(-1)
    known = count > 0
    share = lambda x: np.where(known, x.sum(-1, where=valid) / np.maximum(count, 1), np.nan)  # noqa: E731
    least = rewards.min(-1, initial=np.inf, where=valid)
    most = rewards.max(-1, initial=-np.inf, where=valid)
    return Judged(known, share(passed), share(rewards), known & ~passed.any(-1), most > least, rewards[valid])


def require_solutions(environment: Environment, objective: Objective, use: str) -> None:
    """Raise `UserError`, naming the row, if a training row has no solution.

    Args:
      use: what the solution is needed for; ends the message.
    """
    for index, row in enumerate(environment.train_rows):
        if environment.task.solution(row) is None:
            raise UserError(
                f"objective {objective.name}: training row {index} of task {environment.task.name!r} has "
                f"no solution {use}"
            )
