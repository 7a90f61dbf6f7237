"""State that some methods carry from update to update, explicit and checkpointed with the run.

The state is a pytree of arrays. `Scored.control` passes it to the objective, and `Objective.next_control` returns the
next one. A state used in an update was computed from earlier updates only.
"""

import dataclasses

from lpo_jax.objectives.batch import Context, ControlState, Listwise
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part


@dataclasses.dataclass(frozen=True)
class Control(Part):
    """The base class: an initial state and its transition."""

    reads = (Field.CONTROL,)

    def init(self) -> ControlState:
        """Return the state at the start of a run, a pytree of arrays of fixed shapes."""
        raise NotImplementedError

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        """Return the state after an update on the minibatch `context`, whose groups are `view`."""
        raise NotImplementedError
