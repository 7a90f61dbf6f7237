"""The GSM8K verifier: the number after the last `####`.

robust (default): the answer is in the last line that begins with `####` and a number, anywhere in the response. Text
  may surround the number: `#### 1,000`, `#### $18`, `####18`, `#### 18.00`, `#### **18**`, `#### \\boxed{18}`,
  `#### 18 dollars`, `#### 3 * 6 = 18`, `#### Answer: 18`, `#### 17 1/2`, `#### 17½`. Numbers are compared exactly. If
  the text after the number makes it a different number (`18 000`, `18 or 19`, `18²`, `18 \\cdot 2`, `18 million`), the
  line has no number. Without any such line, the last box counts.
strict, flexible: verl's scoring, including its false negatives. Both see only the last 300 characters and compare
  strings. Strict requires digits directly after `#### `; flexible takes the last number.

References:
  Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021); verl, utils/reward_score/gsm8k.py.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction

from lpo_jax.errors import UserError
from lpo_jax.rewards.answers import last_boxed
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor, infrastructure
from lpo_jax.types import Json

MODES = ("robust", "strict", "flexible")
TAIL = 300  # characters that verl reads, from the end
MAX_CHARS = 200  # characters of a line that robust reads

_SIGNS = {
    code: f" {unicodedata.normalize('NFKC', chr(code))}"  # ½ becomes 1/2, separated from a preceding whole number
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)
}
_SIGNS = {code: text.replace("\u2044", "/") for code, text in _SIGNS.items()}
_SIGNS |= {ord(sign): "/" for sign in "\u2044\u2215"}
_SIGNS |= {ord(sign): "-" for sign in "\u2212\u2013\u2010\u2011"}
_COMMA = re.compile(r"\\,|\{,\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}")
# Markup that changes the look of a number but not its value. Other commands stay, so that \sqrt{18} is not 18.
_MARKUP = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:bf|it|rm)|mbox|boxed|fbox|bf|quad|qquad|displaystyle|left|right|circ|degree"
    r"|approx|therefore|implies|[rR]ightarrow)(?![A-Za-z])|\\(?![A-Za-z])|[$*{}£€~]"
)
_LEAD = r"[^A-Za-z\d.+\-√∛∜≠¹²³⁰⁴-⁹]*"
_UNSIGNED = r"(?:[0-9][0-9,]*\s+[0-9]+\s*/\s*[0-9]+|(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:\s*/\s*[0-9]+)?)"
# A word with a colon may precede the number, and a unit may follow. If one of these follows, the text means another
# number or several: more digits, arithmetic, a range, a list, an alternative, a word for a power of ten, a half.
_OTHER = (
    r"\s*\d|[.,_'’]\d|[eE][+-]?\d|\([0-9.+-]|[¹²³⁰⁴-⁹₀-₉]|\s*[\\√∛∜π]"
    r"|\s*(?:[-+*/^:;&|×÷·⋅∙xX—…]|\.{2,}|or|to|and|plus|minus|times|over)\s*[\d(+\-.]"
    r"|\s*(?:hundred|thousand|[mb]illion|trillion|[kK])\b|\s+and\s+(?:a|one|two|three)\s"
)
_ANSWER = re.compile(
    rf"{_LEAD}(?:[A-Za-z][A-Za-z ]{{0,30}}:)?{_LEAD}(?P<number>(?>[+-]?{_UNSIGNED}))(?!{_OTHER})"
)
_VALUE = re.compile(
    r"(?P<top>[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)(?:\s*/\s*(?P<bottom>[0-9]+))?"
)
_MIXED = re.compile(r"(?P<whole>[+-]?[0-9,]+)\s+(?P<part>[0-9]+\s*/\s*[0-9]+)")


def gsm8k_verifier(*, mode: str = "robust", format_score: float = 0.0) -> Verifier:
    """Build the GSM8K verifier. Examples have `answer`: the number, or the dataset's solution that ends in `#### 42`.

    Args:
      mode: "robust", "strict" or "flexible"; see the module's docstring.
      format_score: reward of a wrong answer in the required form.

    Returns:
      A function `(response, example) -> Verdict` with reward 1 for the right number. The outcome is `infrastructure`
      for every response to a row whose gold answer is not a number.

    Raises:
      UserError: if an option has an invalid value.
    """
    if mode not in MODES or not math.isfinite(format_score):
        raise UserError(
            f"gsm8k: mode {mode!r}, format_score {format_score!r}: mode is one of {', '.join(MODES)}, "
            "format_score a finite number"
        )

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        gold = str(example["answer"]).rpartition("####")[2].translate(_SIGNS).strip().replace(",", "")
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


DESCRIPTOR = VerifierDescriptor("gsm8k", gsm8k_verifier, fields=("answer",))


def _robust(response: str) -> str | None:
    for line in reversed(response.split("####")[1:]):
        line = line.lstrip().partition("\n")[0]
        if line and (number := _number(line)):
            return number
    box = last_boxed(response)
    return None if box is None else _number(box)


def _number(line: str) -> str | None:
    """Return the number at the beginning of a line, or after its last equals sign; None if there is none."""
    whole = len(line) <= MAX_CHARS
    line = _COMMA.sub(",", line[:MAX_CHARS].translate(_SIGNS).replace(r"\!", ""))
    line = _FRACTION.sub(r" \1/\2 ", line)
    # Markup after a digit becomes a space, so that 3*6 and $3$4 do not become 36 and 34.
    line = _MARKUP.sub(lambda match: " " * line[: match.start()][-1:].isdigit(), line)
    line = line.rpartition("=")[2].strip()
    match = _ANSWER.match(line)
    if not match or (match.end() == len(line) and not whole):  # the number itself may have been cut
        return None
    return match["number"].rstrip(",")


def _value(number: str) -> Fraction | None:
    """Return the exact value of a number in common notation; None if it is not a number, such as 1,00."""
    if len(number) > MAX_CHARS:
        return None
    if mixed := _MIXED.fullmatch(number):  # 2 1/3
        whole, part = _value(mixed["whole"]), _value(mixed["part"])
        if whole is None or part is None or part >= 1:
            return None
        return whole - part if number.startswith("-") else whole + part
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
