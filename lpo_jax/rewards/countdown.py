"""The Countdown verifier: combine the given numbers into an expression that equals the target.

The rewards are those of the LPO paper: 1 if correct, 0.1 if wrong but well-formatted, 0 otherwise. There are two modes:

robust (default): the answer is the content of the last `<answer>...</answer>` pair; it may have newlines, and text may
  follow. It is well-formatted if `expression.parse_expression` accepts it. `3 + 5 = 8` is an equation: it counts as
  `3 + 5` if its right side is the target, and is wrong otherwise.
strict: TinyZero's scoring, including its false positives and false negatives; see `tinyzero.py`.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.rewards import expression, tinyzero
from lpo_jax.rewards.answers import last_tagged
from lpo_jax.rewards.expression import parse_expression
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor
from lpo_jax.types import Json

_EQUATION = re.compile(r"(?P<left>[^=]*)=\s*(?P<right>-?[0-9]{1,30})")


def countdown_verifier(
    *, scores: Sequence[float] = (1.0, 0.1, 0.0), strict: bool = False, use_all: bool = True
) -> Verifier:
    """Build the Countdown verifier. Examples have `numbers` (a list of integers) and `target` (an integer).

    Args:
      scores: rewards for correct answers, for wrong but well-formatted ones, and for all others.
      strict: whether to score as TinyZero does, for comparison with published numbers.
      use_all: whether each given number must be used exactly once; False: at most once. Strict mode requires True.

    Returns:
      A function `(response, example) -> Verdict`.

    Raises:
      UserError: if `scores` is not three finite numbers, or `strict` is combined with `use_all=False`.
    """
    correct, wrong, malformed = three_scores("countdown", scores)
    if strict and not use_all:
        raise UserError(
            "countdown: strict scores as TinyZero does, which requires all numbers to be used; set use_all: true"
        )

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        numbers, target = sorted(int(n) for n in example["numbers"]), int(example["target"])
        if strict:
            grade, parts = tinyzero.grade(response, numbers, target)
        else:
            grade, parts = _grade(response, numbers, target, use_all)
        return Verdict({"pass": correct, "wrong": wrong, "malformed": malformed}[grade], grade, parts)

    return verify


DESCRIPTOR = VerifierDescriptor("countdown", countdown_verifier, fields=("numbers", "target"))


def _grade(text: str, numbers: list[int], target: int, use_all: bool) -> tuple[str, dict[str, float | str]]:
    answer = last_tagged(text)
    if answer is None:
        return "malformed", {"reason": "no <answer>...</answer>"}
    parts: dict[str, float | str] = {"answer": answer[: expression.MAX_CHARS]}
    claimed = target
    if len(answer) <= expression.MAX_CHARS and (equation := _EQUATION.fullmatch(answer)):
        answer, claimed = equation["left"], int(equation["right"])
    try:
        tree = parse_expression(answer)
    except expression.NotAllowed as error:
        return "malformed", parts | {"reason": str(error)}
    value, used = expression.value(tree), expression.integers(tree)
    parts["value"] = "undefined" if value is None else str(value)
    unused = collections.Counter(numbers)
    unused.subtract(used)
    if min(unused.values()) < 0 or (use_all and max(unused.values()) > 0):
        return "wrong", parts | {"reason": "does not use the given numbers"}
    if claimed != target:
        return "wrong", parts | {"reason": f"the right side of the equation is {claimed}, not the target"}
    if value != target:
        return "wrong", parts | {"reason": "does not equal the target"}
    return "pass", parts


def three_scores(name: str, scores: Sequence[float]) -> tuple[float, float, float]:
    """Check the rewards for correct, wrong and malformed answers.

    Raises:
      UserError: if they are not three finite numbers.
    """
    try:
        correct, wrong, malformed = (float(score) for score in scores)
        if all(math.isfinite(score) for score in (correct, wrong, malformed)):
            return correct, wrong, malformed
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name}: scores {scores!r}: need three finite numbers, for correct, wrong and malformed")
