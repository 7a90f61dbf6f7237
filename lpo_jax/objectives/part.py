"""Parts: the small frozen dataclasses that methods are composed of, each of one kind.

The fields of a part are options of every method that contains it, so a field name has one meaning in all parts. A
part is a pure function of arrays:

    Shape         (context) -> rewards [P,K]                                          shaping.py
    Advantage     (context) -> u [P,K], tau [P,1]                                     advantage.py
    Select        (context, u) -> valid [P,K]                                         shaping.py
    Bias          (context, u) -> u [P,K]                                             shaping.py
    PromptWeight  (context) -> [P,1]                                                  weights.py
    Credit        (context, u, tau) -> u [P,K,T]                                      advantage.py
    Projection    (context, u, s, s_t) -> c [P,K]                                     projection.py
    Gate          (delta, c, context) -> token loss [P,K,T]                           trust.py
    TokenWeight   (context, u) -> [P,K,T]                                             weights.py
    Aggregate     (tokens) -> weights [P,K,T]                                         weights.py
    Regular       (stats, context) -> token penalty [P,K,T]                           regular.py
    Control       state, and (state, context) -> state after an update                part.py
    HookSpec      settings of what the run does around an update; no arithmetic       hook_specs.py
"""

import dataclasses
import re
from typing import ClassVar

from lpo_jax.objectives.batch import Context, ControlState, Field, Listwise


@dataclasses.dataclass(frozen=True)
class Part:
    """The base class of all kinds.

    Attributes:
      reads: the fields that the part computes with.
      uses: the fields that the part computes with where they are not None, and without which it does nothing.
    """

    reads: ClassVar[tuple[Field, ...]] = ()
    uses: ClassVar[tuple[Field, ...]] = ()

    @property
    def needs(self) -> tuple[Field, ...]:
        """Fields that may not be None with these options: `reads`, unless an option switches the part off."""
        return self.reads


def word(part: Part) -> str:
    """Return the name of a part in a config: its class name in lower case with hyphens."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(part).__name__).lower()


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
