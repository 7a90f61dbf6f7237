"""What some methods keep from update to update: an explicit state, checkpointed with the run.

The state is a pytree of arrays. `Scored.control` carries it into the objective, `Objective.next_control` gives
the one after; the parts of the method read it there, and never see the data of the update it is used in.
"""

import dataclasses

from lpo_jax.objectives.batch import Context, ControlState, Listwise
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part


@dataclasses.dataclass(frozen=True)
class Control(Part):
    """The base: a state, and what an update makes of it."""

    reads = (Field.CONTROL,)

    def init(self) -> ControlState:
        """The state at the start of a run, a pytree of arrays of fixed shape."""
        raise NotImplementedError

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        """The state after an update on the minibatch `context`, whose groups are `view`."""
        raise NotImplementedError
