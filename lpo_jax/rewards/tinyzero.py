"""TinyZero's scoring of Countdown, for comparison with published numbers.

The answer is the last `<answer>...</answer>` pair in the last line of the text; without one the score is 0. The runs of
digits, sorted, must equal the given numbers; all characters must be digits, `+-*/().` or whitespace; and the value that
Python computes must be within 1e-5 of the target. An answer that fails any of these scores 0.1. So `2**3`, `7//2` and
`4.4*5` (for 4, 4, 5) can be right, any answer between tags earns 0.1, and an answer that spans lines or is followed by
another line scores 0.

There are three deviations from the original, which affect no reasonable answer:

- TinyZero scores prompt and response together, and first cuts the text at the prompt's `Assistant:`. Its template has a
  newline after that, so the last line is the same with the prompt, with the prefill, and without either. All three are
  accepted here, and a text without `Assistant:` is not scored 0 for that reason.
- Nothing is evaluated as code; the parsed expression is walked instead. Powers beyond 4,096 bits are rejected (0.1), so
  that `9**9**9**9`, on which TinyZero hangs, returns.
- Answers of more than 1,000 characters or 200 levels are rejected (0.1).
"""

import ast
import operator
import re

from lpo_jax.types import Json

MAX_CHARS = 1000
MAX_DEPTH = 200
MAX_POWER_BITS = 4096

_CLOSING = "</answer>"
_PAIR = re.compile(r"<answer>(.*?)</answer>")
_ALLOWED = re.compile(r"[\d+\-*/().\s]+")


def grade(text: str, numbers: list[int], target: int) -> tuple[str, dict[str, float | str]]:
    """Judge one response.

    Args:
      text: the response, optionally preceded by prompt and prefill.
      numbers: the given numbers, sorted.
      target: the value to reach.

    Returns:
      The outcome and the parts of the verdict. The outcome is `pass`, `wrong` (0.1, well-formatted or not) or
      `malformed` (0).
    """
    answer = _extract(text)
    if answer is None:
        return "malformed", {"reason": "no <answer>...</answer> in the last line"}
    parts: dict[str, float | str] = {"answer": answer[:200]}
    if len(answer) > MAX_CHARS:
        return "wrong", parts | {"reason": f"longer than {MAX_CHARS} characters"}
    if sorted(int(digits) for digits in re.findall(r"\d+", answer)) != numbers:
        return "wrong", parts | {"reason": "does not use the given numbers"}
    if not _ALLOWED.fullmatch(answer):
        return "wrong", parts | {"reason": "a character that is not allowed"}
    try:
        value = _value(ast.parse(answer, mode="eval").body, MAX_DEPTH)
        close, parts["value"] = abs(value - target) < 1e-5, repr(value)[:200]
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        return "wrong", parts | {"reason": f"no value: {type(error).__name__}"}
    return "pass" if close else "wrong", parts


def _extract(text: str) -> str | None:
    line = text[text.rfind("\n") + 1 :]
    # Text after the last closing tag cannot match. Without it, the search is linear even for "<answer>" * 10**5.
    pairs = _PAIR.findall(line[: line.rfind(_CLOSING) + len(_CLOSING)]) if _CLOSING in line else []
    return pairs[-1].strip() if pairs else None


def _power(base: Json, exponent: Json) -> Json:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and base.bit_length() * exponent > MAX_POWER_BITS:
        raise OverflowError("power too large")
    return base**exponent


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def _value(node: ast.expr, depth: int) -> Json:
    """Return the value that Python computes: an integer, a float, or a complex number from a power."""
    if depth == 0:
        raise RecursionError
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, depth - 1), _value(node.right, depth - 1))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, depth - 1))  # type: ignore[operator]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise TypeError(type(node).__name__)
