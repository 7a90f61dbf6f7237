"""Selection of responses, by the same rules for `lpo show` and the report."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lpo_jax.errors import UserError
from lpo_jax.inspection.load import Row, finite_number


@dataclass(frozen=True)
class Selection:
    """Conditions on a response, all of which must hold; None stands for no condition.

    Attributes:
        outcome: the verdict's outcome, such as "wrong".
        prompt: the id of the prompt, as text.
        regex: a regular expression that the response or the prompt contains.
        min_reward: the lowest reward.
        max_reward: the highest reward.
        min_tokens: the shortest length in tokens.
        max_tokens: the greatest length in tokens.
    """

    outcome: str | None = None
    prompt: str | None = None
    regex: re.Pattern[str] | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is any condition."""
        return self != Selection()

    def __call__(self, row: Row) -> bool:
        """Return whether a response fulfils the conditions."""
        return (
            (self.outcome is None or row.get("outcome") == self.outcome)
            and (self.prompt is None or str(row.get("id")) == self.prompt)
            and _within(finite_number(row.get("score")), self.min_reward, self.max_reward)
            and _within(finite_number(row.get("tokens")), self.min_tokens, self.max_tokens)
            and (
                self.regex is None
                or any(self.regex.search(str(row.get(key, ""))) for key in ("output", "input"))
            )
        )


def compile_regex(text: str) -> re.Pattern[str]:
    """Compile a regular expression of the command line.

    Raises:
        UserError: it is not one.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--regex: {text!r} is not a regular expression: {error}") from None


def best(rows: Iterable[Row], count: int) -> list[Row]:
    """Return the `count` responses with the highest rewards, the shortest first among equals."""
    return sorted(_judged(rows), key=lambda row: (-row["score"], row.get("tokens", 0)))[:count]


def worst(rows: Iterable[Row], count: int) -> list[Row]:
    """Return the `count` responses with the lowest rewards, the longest first among equals."""
    return sorted(_judged(rows), key=lambda row: (row["score"], -row.get("tokens", 0)))[:count]


def most_pushed(rows: Iterable[Row], count: int) -> list[Row]:
    """Return the `count` responses with the greatest |coefficient|."""
    size: Callable[[Row], float] = lambda row: abs(finite_number(row.get("coefficient")) or 0.0)  # noqa: E731
    return sorted(rows, key=lambda row: -size(row))[:count]


def _judged(rows: Iterable[Row]) -> Sequence[Row]:
    return [row for row in rows if row.get("valid", True) and finite_number(row.get("score")) is not None]


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)
