"""The state of a run between two steps: what a checkpoint holds."""

import dataclasses
import math
from collections.abc import Sequence

from flax import struct

from lpo_jax.evaluation.heldout import Evaluation
from lpo_jax.models.decoder import Params
from lpo_jax.models.lora import Frozen, with_adapters
from lpo_jax.rollout.rounds import InFlight
from lpo_jax.types import Json, PyTree

WARM_STARTED = "warm-started"  # the phase of a second evaluation at step 0


class TrainState(struct.PyTreeNode):
    """The arrays that an update changes, and those that belong to them.

    Attributes:
      params: what the optimizer updates: all parameters, or the adapters of a frozen base.
      opt_state: of the optimizer; it also counts the updates and the skipped ones.
      control: state of the method's controller; None for a method without one.
      reference: the reference policy that a penalty is measured from, as `params`; None without a penalty.
      frozen: the base of adapters or a frozen vision tower, shared by policy and reference; None if all parameters are
        trained.
    """

    params: Params
    opt_state: PyTree
    control: PyTree = None
    reference: Params | None = None
    frozen: Frozen | None = None

    @property
    def policy(self) -> Params:
        """The parameters that the model runs with, adapters joined with their base."""
        return with_adapters(self.frozen, self.params)


@dataclasses.dataclass
class Position:
    """The state of a run between two steps.

    Attributes:
      data: state of the prompt iterator after `step` batches; None before the first.
      evaluated: whether the held-out evaluation of `step` is done.
      evaluations: number of evaluations at `step`; two if the cold model was evaluated before a warm start.
      score: held-out score (`evaluation.score`) of `step`, by which checkpoints are compared; None if not evaluated.
      best: best held-out score so far.
      best_step: the first step with that score.
      skipped: number of non-finite gradients so far.
      hooks: states of the method's hooks; None before the first step.
      schedule_steps: steps of the learning rate's schedule: the number that the run was started with; 0 if unknown.
      in_flight: rounds of later steps that have begun (`sampling.ahead`).
      milestones: label -> per-problem outcomes of the evaluations shown at the end.
    """

    state: TrainState
    step: int = 0
    data: Json = None
    evaluated: bool = False
    evaluations: int = 0
    score: float | None = None
    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    hooks: list[Json] | None = None
    schedule_steps: int = 0
    in_flight: list[InFlight] = dataclasses.field(default_factory=list)
    milestones: dict[str, dict] = dataclasses.field(default_factory=dict)

    @property
    def phase(self) -> str:
        """The kind of the next held-out evaluation: of the "cold" or the "warm-started" model, or of a "step"."""
        return "step" if self.step else WARM_STARTED if self.evaluations else "cold"

    def advance(
        self,
        state: TrainState,
        data: Json,
        hooks: list[Json] | None = None,
        in_flight: Sequence[InFlight] = (),
    ) -> None:
        """Move the position one step on."""
        self.state, self.data, self.hooks, self.in_flight = state, data, hooks, list(in_flight)
        self.step, self.evaluated, self.evaluations, self.score = self.step + 1, False, 0, None

    def record(self) -> dict[str, Json]:
        """Everything but the train state, as JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "state"]
        record = {name: getattr(self, name) for name in names}
        return record | {"in_flight": [later.to_json() for later in self.in_flight]}

    @classmethod
    def of_record(cls, state: TrainState, record: dict[str, Json]) -> "Position":
        """Return the position that `record` describes; checkpoints of earlier versions have no rounds in flight."""
        in_flight = [InFlight.from_json(later) for later in record.get("in_flight", ())]
        return cls(state, **{**record, "in_flight": in_flight})

    def add_evaluation(self, evaluation: Evaluation, label: str | None) -> None:
        """Record the held-out evaluation of `step`; one with a label is shown at the end of the run."""
        self.evaluated, self.evaluations = True, self.evaluations + 1
        if self.step > 0 and math.isfinite(evaluation.score):
            self.score = evaluation.score
            if self.best is None or self.score > self.best:
                self.best, self.best_step = self.score, self.step
        if label:
            self.milestones[label] = {
                "passed": evaluation.passed.astype(int).tolist(),
                "valid": evaluation.valid.astype(int).tolist(),
                "scores": evaluation.scores.tolist(),
                "score_name": evaluation.score_name,
            }
