"""GSM8K: the number after the last `####`.

robust (default): the last line that begins with `####` and a number, wherever it is in the response and
  whatever is around the number: `#### 1,000`, `#### $18`, `####18`, `#### 18.00`, `#### **18**`,
  `#### \\boxed{18}`, `#### 18 dollars`, `#### 3 * 6 = 18`, `#### Answer: 18`. Numbers are compared exactly.
  Without any such line the last box counts.
strict, flexible: as verl scores them, false negatives included: they see the last 300 characters alone and
  compare strings. Strict wants `#### ` and digits right behind it, flexible takes the last number of all.
  References: Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021); verl,
  utils/reward_score/gsm8k.py.
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards.answers import last_boxed
from lpo_jax.rewards.verdict import Verdict, infrastructure

MODES = ("robust", "strict", "flexible")
TAIL = 300  # characters that verl looks at
MAX_CHARS = 200  # of a line that robust looks at

_MARKUP = re.compile(r"\\[A-Za-z]+|[$*{}\\£€~]")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}")
# A word and a colon may stand in front, a unit behind; arithmetic, a range or a second guess behind is no number.
_ANSWER = re.compile(
    r"[^A-Za-z0-9.+-]*(?:[A-Za-z][A-Za-z ]{0,30}:)?[^A-Za-z0-9.+-]*"
    r"(?P<number>(?>[+-]?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:\s*/\s*[0-9]+)?))"
    r"(?![0-9]|[eE][+-]?[0-9]|\s*(?:[-+*/^:×]|or|to)\s*[0-9(])"
)
_VALUE = re.compile(
    r"(?P<top>[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)(?:\s*/\s*(?P<bottom>[0-9]+))?"
)


def gsm8k(*, mode: str = "robust", format_score: float = 0.0) -> Callable[[str, Mapping[str, Any]], Verdict]:
    """The GSM8K verifier; examples have `answer`: the number, or the data set's solution that ends in `#### 42`.

    Args:
      mode: "robust", "strict" or "flexible"; see above.
      format_score: reward of an answer in the asked form that is wrong.

    Returns:
      `(response, example) -> Verdict`, reward 1 for the right number. `infrastructure` for every response to a
      row whose gold answer is no number.

    Raises:
      UserError: if an option makes no sense.
    """
    if mode not in MODES or not math.isfinite(format_score):
        raise UserError(
            f"gsm8k: mode {mode!r}, format_score {format_score!r}: mode is one of {', '.join(MODES)}, "
            "format_score a finite number"
        )

    def verify(response: str, example: Mapping[str, Any]) -> Verdict:
        gold = str(example["answer"]).rpartition("####")[2].strip().replace(",", "")
        expected = _value(gold)
        if expected is None:
            return infrastructure(f"the gold answer is no number: {gold[:200]}")
        answer = _robust(response) if mode == "robust" else _verl(response, mode)
        if answer is None or (mode == "robust" and _value(answer) is None):
            return Verdict(0.0, "malformed", {"reason": "no number in the form that was asked for"})
        right = answer == gold if mode != "robust" else _value(answer) == expected
        outcome, reward = ("pass", 1.0) if right else ("wrong", float(format_score))
        return Verdict(reward, outcome, {"answer": answer[:200]})

    return verify


def _robust(response: str) -> str | None:
    for line in reversed(response.split("####")[1:]):
        if number := _number(line.lstrip().partition("\n")[0]):
            return number
    box = last_boxed(response)
    return None if box is None else _number(box)


def _number(line: str) -> str | None:
    """The number that a line begins with, or that stands behind its last equals sign."""
    line = _FRACTION.sub(r"\1/\2", line[:MAX_CHARS].replace("\u2212", "-").replace(r"\,", ","))
    match = _ANSWER.match(_MARKUP.sub("", line).rpartition("=")[2].strip())
    return match["number"].rstrip(",") if match else None


def _value(number: str) -> Fraction | None:
    """The exact value of a number as people write it; None for what is none, such as 1,00."""
    match = _VALUE.fullmatch(number)
    if not match or not any(map(str.isdigit, match["top"])):
        return None
    bottom = int(match["bottom"] or 1)
    return Fraction(match["top"].replace(",", "").rstrip(".")) / bottom if bottom else None


def _verl(response: str, mode: str) -> str | None:
    tail = response[-TAIL:]
    if mode == "strict":
        found = re.findall(r"#### (\-?[0-9\.\,]+)", tail)
        return found[-1].replace(",", "").replace("$", "") if found else None
    found = re.findall(r"(\-?[0-9\.\,]+)", tail)
    return next(
        (number for number in reversed(found) if number not in ("", ".")), found[0] if found else None
    )
