r"""The mathematics verifier: the answer in the last `\boxed{}`, compared with the gold answer by value.

robust (default): answers are parsed into lists (in any order), tuples, intervals, matrices, equations and scalars. Two
  scalars are equal if they have the same spelling or are exactly the same rational number. Scalars with roots, letters
  or functions are compared by sympy, through math-verify's grammar. Decimals are never rounded: 0.333 is not 1/3. A
  unit or a percent sign may be missing on one side, but different units make the answer wrong.
strict: verl's scoring, which compares strings, except that an empty box never passes; see `hendrycks.py`.

The model's answer is bounded before it is parsed (2,000 characters), before it is evaluated (32,768 bits), and in
processor time. Exceeding a bound is the answer's fault: it earns no reward and is never masked.
"""

import functools
import re
from collections.abc import Mapping
from fractions import Fraction

from lpo_jax.errors import UserError
from lpo_jax.rewards import hendrycks, rational, structure
from lpo_jax.rewards.answers import last_boxed, last_line_after
from lpo_jax.rewards.latex import Unreadable
from lpo_jax.rewards.limits import OutOfTime, cpu_limit
from lpo_jax.rewards.structure import Value
from lpo_jax.rewards.units import clash
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor, infrastructure
from lpo_jax.types import Json

# Processor time for the comparison in sympy; the comparison before it gets half as much. Most answers take microseconds
# or milliseconds, hard ones a tenth of a second.
CPU_SECONDS = 1.0

_ALTERNATIVES = re.compile(r"\\text\{\s*OR\s*\}")


def math_verifier(*, mode: str = "robust", extract: str = "boxed") -> Verifier:
    r"""Build the mathematics verifier. Examples have `answer`, LaTeX or a number.

    Args:
      mode: "robust", or "strict" for verl's string equality.
      extract: "boxed" takes the last `\boxed{}` or `\fbox{}`; "answer_line" takes the rest of the line after the last
        `Answer:`, as DAPO's prompt requires (only with "robust").

    Returns:
      A function `(response, example) -> Verdict` with reward 1 or 0. Outcomes other than `pass` and `wrong`:
      `malformed` for a response without an answer in that form; `timeout` for an answer that takes more than 1.5 s of
      processor time or too much memory; `infrastructure` for every response to a row whose gold answer cannot be parsed
      (see `parses`). Strict mode parses nothing and accepts any gold answer that is not empty.

    Raises:
      UserError: if an option has an invalid value.
    """
    if mode not in ("robust", "strict") or extract not in ("boxed", "answer_line"):
        raise UserError(
            f"math: mode {mode!r}, extract {extract!r}: mode is robust or strict, extract is boxed or answer_line"
        )
    if mode == "strict" and extract != "boxed":
        raise UserError(
            "math: mode strict reads \\boxed{} as verl does; use extract answer_line with mode robust"
        )

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        gold = str(example["answer"])
        if not (parses(gold) if mode == "robust" else gold.strip()):
            return infrastructure(f"the gold answer cannot be read: {gold[:200]}")
        if mode == "strict":
            answer = hendrycks.boxed(response)
        else:
            answer = last_boxed(response) if extract == "boxed" else _answer_line(response)
        if answer is None or not answer.strip():
            reason = f"no answer in the form that was asked for: {extract}"
            return Verdict(0.0, "malformed", {"reason": reason})
        parts: dict[str, float | str] = {"answer": answer[:200]}
        if mode == "strict":
            right = hendrycks.equal(answer, gold)
            return Verdict(1.0, "pass", parts) if right else Verdict(0.0, "wrong", parts)
        try:
            outcome = "pass" if _same(gold, answer) else "wrong"
        except (Unreadable, rational.TooLarge, RecursionError) as error:
            return Verdict(0.0, "wrong", parts | {"reason": str(error)})
        except (OutOfTime, MemoryError) as error:
            return Verdict(0.0, "timeout", parts | {"reason": str(error) or "out of memory"})
        except ImportError:
            raise  # an error of the installation, not of the answer
        except Exception as error:  # sympy raises many kinds, and none of them may mask a wrong answer
            reason = f"the comparison raised {type(error).__name__}: {error}"[:200]
            return Verdict(0.0, "wrong", parts | {"reason": reason})
        return Verdict(float(outcome == "pass"), outcome, parts)

    return verify


DESCRIPTOR = VerifierDescriptor(
    "math",
    math_verifier,
    fields=("answer",),
    slow_imports=("lpo_jax.rewards.symbolic",),
    memory=2 << 30,
    least_timeout=2 * 1.5 * CPU_SECONDS,  # twice the processor time that an answer may take
)


def parses(answer: str) -> bool:
    """Return whether a gold answer can be parsed: it is well-formed, not empty, and not prose.

    The verifier masks every response to a row whose gold answer cannot be parsed. This takes microseconds.
    """
    return bool(_gold(answer))


@functools.lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Value, ...]:
    """Return all readings of a gold answer, which may offer alternatives ('A OR B'); empty if it cannot be parsed."""
    if "\\boxed" in answer:
        answer = last_boxed(answer) or ""
    try:
        return tuple(value for part in _ALTERNATIVES.split(answer) for value in structure.read_answer(part))
    except (Unreadable, RecursionError):
        return ()


def _answer_line(response: str) -> str | None:
    line = last_line_after("answer", response)
    return line if line is None else last_boxed(line) or line.strip("*").strip()


def _same(gold: str, answer: str) -> bool:
    undecided: list[bool] = []

    def cheaply(g: Value, a: Value) -> bool:
        verdict = _same_exactly(g, a)
        undecided.append(verdict is None)
        return bool(verdict)

    with cpu_limit(CPU_SECONDS / 2):
        pairs = [(g, a) for a in structure.read_answer(answer) for g in _gold(gold)]
        if any(structure.same_answer(g, a, cheaply) for g, a in pairs):
            return True
    if not any(undecided):
        return False
    from lpo_jax.rewards import symbolic  # imports sympy, which most answers do not need

    def thoroughly(g: Value, a: Value) -> bool:
        verdict = _same_exactly(g, a)
        if verdict is not None:
            return verdict
        if g.kind == "equation":
            return symbolic.same_equation(_sides(g), _sides(a))
        return symbolic.equal(g.text, a.text)

    with cpu_limit(CPU_SECONDS):
        return any(structure.same_answer(g, a, thoroughly) for g, a in pairs)


def _sides(equation: Value) -> tuple[str, str]:
    left, right = equation.parts
    return left.text, right.text


def _same_exactly(gold: Value, answer: Value) -> bool | None:
    """Compare two scalars or equations without sympy, by text and rational value; return None if undecided."""
    if gold.kind == "equation":
        scalars = all(part.kind == "scalar" for part in (*gold.parts, *answer.parts))
        return None if scalars and len(gold.parts) == len(answer.parts) == 2 else False
    if clash(gold.unit, answer.unit):
        return False
    percents = "%" in gold.unit, "%" in answer.unit
    if gold.text == answer.text and percents[0] == percents[1]:
        return True
    numbers = rational.value(gold.text), rational.value(answer.text)
    if None in numbers:
        return None
    return _same_number(*numbers, *percents)


def _same_number(gold: Fraction, answer: Fraction, gold_percent: bool, answer_percent: bool) -> bool:
    """Compare numbers, of which one may have a percent sign.

    8% equals 0.08. It also equals 8, because the question may ask for a percentage; but a gold answer of at most 1 may
    be a fraction, and then 1% does not equal 1.
    """
    if gold_percent == answer_percent:
        return gold == answer
    if gold_percent:
        return answer in (gold, gold / 100)
    return answer / 100 == gold or (answer == gold and abs(gold) > 1)
