"""Verifiers by name: built in, or a function in a user's file."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import gym
from lpo_jax.rewards import math as math_verifier
from lpo_jax.rewards.arithmetic import arithmetic
from lpo_jax.rewards.code import code
from lpo_jax.rewards.countdown import countdown
from lpo_jax.rewards.format import format_tags
from lpo_jax.rewards.gsm8k import gsm8k
from lpo_jax.rewards.gym import reasoning_gym
from lpo_jax.rewards.math import math
from lpo_jax.rewards.user_code import load_function, split_reference
from lpo_jax.rewards.verdict import Verdict

Verifier = Callable[[str, Mapping[str, Any]], Verdict]

# name: (builder, the fields an example must have)
_BUILT_IN: dict[str, tuple[Callable[..., Verifier], tuple[str, ...]]] = {
    "arithmetic": (arithmetic, ("answer",)),
    "code": (code, ("tests",)),
    "countdown": (countdown, ("numbers", "target")),
    "format": (format_tags, ()),
    "gsm8k": (gsm8k, ("answer",)),
    "math": (math, ("answer",)),
    "reasoning-gym": (reasoning_gym, ("question", "answer", "metadata")),
}
# What a worker does before it says that it is ready: slow imports, which no item's time should go into, and a
# bound on its memory, in bytes.
_SLOW_IMPORTS = {"math": ("lpo_jax.rewards.symbolic",)}
_MEMORY = {"math": 2 << 30}
# Seconds that the pool must give: twice a verifier's own limit of processor time, so that it comes first.
_LEAST_TIMEOUT = {"math": 2 * 1.5 * math_verifier.CPU_SECONDS, "reasoning-gym": 2 * gym.CPU_SECONDS}


def names() -> list[str]:
    """Names of the built-in verifiers."""
    return sorted(_BUILT_IN)


def get(name: str, *, prefill: str = "", **options: Any) -> Verifier:
    """A built-in verifier.

    Args:
      name: one of `names()`.
      prefill: the text with which the prompt's template has already begun the answer (`<think>`, `<answer>`);
        it is put before every response, for a verifier must see what the model continued.
      **options: those of the verifier: see `countdown`, `arithmetic`, `format_tags`.

    Returns:
      `(response, example) -> Verdict`; `example` is the dict of the data row.

    Raises:
      UserError: if the name or an option is unknown, or an option's value makes no sense.
    """
    if name not in _BUILT_IN:
        raise UserError(
            f"unknown verifier {name!r}{nearest(name, _BUILT_IN)}; built in are {', '.join(names())}, "
            "and a function of your own is path/to/file.py:function"
        )
    build, _ = _BUILT_IN[name]
    check_options(f"verifier {name}", build, options)
    return _after(prefill, build(**options))


def check_options(what: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuses options that a builder does not take or not of that type, and the lack of those it must have.

    Types are checked where the builder says bool, int, float or str and no more; an int will do for a float.

    Raises:
      UserError: naming the option, and the nearest right one.
    """
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            hint = nearest(option, known) or f"; it has {', '.join(known) or 'none'}"
            raise UserError(f"{what} has no option {option!r}{hint}")
        wanted, value = known[option].annotation, options[option]
        accepted = {bool: bool, int: int, float: int | float, str: str}.get(wanted, object)
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted in (int, float)):
            raise UserError(f"{what}: {option} is {value!r}, but has to be of type {wanted.__name__}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"{what} needs the option {option!r}")


def _after(prefill: str, verify: Verifier) -> Verifier:
    if not prefill:
        return verify
    return lambda response, example: verify(prefill + response, example)


@dataclasses.dataclass(frozen=True)
class VerifierSpec:
    """How to make a verifier, in plain data: a worker process is sent this and imports the verifier itself.

    Attributes:
      source: a built-in name, or `"path/to/file.py:function"` (made absolute).
      options: those of a built-in verifier.
      prefill: text put before every response; see `get`.
    """

    source: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefill: str = ""

    def __post_init__(self):
        if file := split_reference(self.source):
            object.__setattr__(self, "source", ":".join(file))
            if self.options:
                raise UserError(f"verifier {self.source}: a function of your own takes no options")
        else:
            get(self.source, **self.options)  # a wrong name or option is an error here, not in a worker

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every example must have; none are known for a user's function."""
        return _BUILT_IN[self.source][1] if self.source in _BUILT_IN else ()

    @property
    def slow_imports(self) -> tuple[str, ...]:
        """Modules that a worker imports before its first item."""
        return _SLOW_IMPORTS.get(self.source, ())

    @property
    def memory(self) -> int | None:
        """Bytes that a worker may allocate; None where that is not bounded."""
        return _MEMORY.get(self.source)

    @property
    def least_timeout(self) -> float:
        """Seconds that the pool must give a response; with fewer, an answer that takes long is masked, not scored."""
        return _LEAST_TIMEOUT.get(self.source, 0.0)

    def load(self) -> Verifier:
        """The verifier itself.

        Raises:
          UserError: if a user's file or function cannot be loaded.
        """
        if split_reference(self.source):
            return _after(self.prefill, load_function(self.source))
        return get(self.source, prefill=self.prefill, **self.options)
