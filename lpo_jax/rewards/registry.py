"""Look up verifiers by name: built-in ones, and functions in a user's file."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import arithmetic, code, countdown, format, geometry, gsm8k, gym, math
from lpo_jax.rewards.user_code import load_function, split_reference
from lpo_jax.rewards.verdict import Verifier, VerifierDescriptor
from lpo_jax.types import Json

_BUILT_IN = {
    module.DESCRIPTOR.name: module.DESCRIPTOR
    for module in (arithmetic, code, countdown, format, geometry, gsm8k, gym, math)
}


def names() -> list[str]:
    """Return the names of the built-in verifiers, sorted."""
    return sorted(_BUILT_IN)


def get(name: str, *, prefill: str = "", **options: Json) -> Verifier:
    """Build a built-in verifier.

    Args:
      name: one of `names()`.
      prefill: the text with which the prompt template already begins the answer, such as `<think>` or `<answer>`. It is
        prepended to every response, so that the verifier sees the whole answer.
      **options: the options of the verifier; see `countdown_verifier`, `math_verifier` and so on.

    Returns:
      A function `(response, example) -> Verdict`, where `example` is the data row as a dict.

    Raises:
      UserError: if the name or an option is unknown, or an option has an invalid value.
    """
    if name not in _BUILT_IN:
        raise UserError(
            f"unknown verifier {name!r}{nearest(name, _BUILT_IN)}; the built-in verifiers are {', '.join(names())}; "
            "name a function of your own as path/to/file.py:function"
        )
    build = _BUILT_IN[name].build
    check_options(f"verifier {name}", build, options)
    return _after(prefill, build(**options))


def check_options(what: str, build: Callable[..., object], options: Mapping[str, Json]) -> None:
    """Check options against the keyword arguments of a builder.

    Types are checked only for arguments annotated as exactly bool, int, float or str. An int is accepted for a float.

    Args:
      what: what the options belong to, for error messages, such as `"verifier countdown"`.
      build: the function that takes the options.
      options: the options to check.

    Raises:
      UserError: if an option is unknown, missing or of the wrong type; the message names the option and, for an unknown
        one, the most similar known option.
    """
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            hint = nearest(option, known) or f"; its options are {', '.join(known) or 'none'}"
            raise UserError(f"{what} has no option {option!r}{hint}")
        wanted, value = known[option].annotation, options[option]
        accepted = {bool: bool, int: int, float: int | float, str: str}.get(wanted, object)
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted in (int, float)):
            raise UserError(f"{what}: {option} is {value!r}, but must be of type {wanted.__name__}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"{what} needs the option {option!r}")


def _after(prefill: str, verify: Verifier) -> Verifier:
    if not prefill:
        return verify
    return lambda response, example: verify(prefill + response, example)


@dataclasses.dataclass(frozen=True)
class VerifierSpec:
    """A verifier as plain data. The pool sends this to each worker process, which builds the verifier itself.

    Attributes:
      source: a built-in name, or `"path/to/file.py:function"`, whose path is made absolute.
      options: the options of a built-in verifier.
      prefill: text prepended to every response; see `get`.

    Raises:
      UserError: if the name or an option is unknown, or an option has an invalid value.
    """

    source: str
    options: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    prefill: str = ""

    def __post_init__(self):
        if file := split_reference(self.source):
            object.__setattr__(self, "source", ":".join(file))
            if self.options:
                raise UserError(f"verifier {self.source}: a function of your own takes no options")
        else:
            get(self.source, **self.options)  # a wrong name or option is an error here, not in a worker

    @property
    def descriptor(self) -> VerifierDescriptor:
        """The verifier's descriptor. That of a user's function has no requirements."""
        if self.source in _BUILT_IN:
            return _BUILT_IN[self.source]
        return VerifierDescriptor(self.source, functools.partial(load_function, self.source))

    def confined(self, *, allow_weak: bool, timeout: float) -> "tuple[VerifierSpec, str]":
        """Check the time limit and, for a verifier that runs programs, choose the sandbox, before work begins.

        Args:
          allow_weak: whether the weak sandbox may be used where there is no better one.
          timeout: seconds that the pool allows for one response. The time limit of programs stays below it, so that a
            program that takes too long is scored and not masked.

        Returns:
          The spec with its sandbox and time limit set, and the kind of sandbox. The kind is empty, and the spec
          unchanged, for verifiers that run no programs.

        Raises:
          UserError: if no permitted sandbox works here, or `timeout` is too short.
        """
        descriptor = self.descriptor
        if timeout < descriptor.least_timeout:
            raise UserError(
                f"rewards.timeout = {timeout:g}: the {self.source} verifier needs at least "
                f"{descriptor.least_timeout:g} seconds; with fewer, slow answers would be masked and not scored"
            )
        if descriptor.confine is None:
            return self, ""
        options, kind = descriptor.confine(self.options, allow_weak, timeout)
        return dataclasses.replace(self, options=options), kind

    def load(self) -> Verifier:
        """Build the verifier.

        Returns:
          A function `(response, example) -> Verdict`.

        Raises:
          UserError: if a user's file or function cannot be loaded.
        """
        return _after(self.prefill, self.descriptor.build(**self.options))
