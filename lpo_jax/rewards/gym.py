"""reasoning-gym's tasks, scored by their own `score_answer` (extra `[envs]`).

Some of its scorers evaluate the answer as Python or through sympy, which evaluates Python too: a model could write
whatever it liked, and it would be run. Answers to those reach the scorer only if they are the gold answer itself, a
literal, or arithmetic of bounded size; any other is wrong. What a scorer raises is the answer's fault as well.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards.answers import last_tagged
from lpo_jax.rewards.descriptor import Verifier, VerifierDescriptor
from lpo_jax.rewards.limits import OutOfTime, cpu_limit
from lpo_jax.rewards.verdict import Verdict, as_verdict

# Well below the pool's limit on the clock, so that an answer that takes long is scored, and not masked.
CPU_SECONDS = 2.5
MAX_CHARS = 2000  # of an answer that a scorer evaluates
MAX_LENGTH = 20_000  # of any answer, in characters; a scorer's time may grow with the square of it
MAX_DIGITS = 20
MAX_DEGREE = 1000  # digits grow with the degree: 20,000 are little work

_EVALUATES = re.compile(r"(?<!\w)(?:eval|exec|compile|sympify)\(")
_SYMBOLIC = re.compile(r"(?<!\w)(?:parse_expr|parse_latex|simplify)\(")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"log", "ln", "exp", "sqrt", "Abs"}


def reasoning_gym_verifier(*, dataset: str, config: Mapping[str, Any] | None = None) -> Verifier:
    """The verifier of one of reasoning-gym's data sets; examples are its entries (`question, answer, metadata`).

    The answer is what the last `<answer>...</answer>` holds; the reward is the score that the data set gives it, 0 to
    1, often a little for an answer that is wrong; 1 passes.

    Args:
      dataset: its name, such as `"leg_counting"`.
      config: its own options.

    Returns:
      `(response, example) -> Verdict`.

    Raises:
      UserError: if the package, the data set or an option of it is not there.
    """
    data = open_dataset(dataset, config, seed=0, size=1)
    scorer = inspect.getsource(type(data).score_answer)
    symbolic, evaluates = _SYMBOLIC.search(scorer), _EVALUATES.search(scorer)

    def verify(response: str, example: Mapping[str, Any]) -> Verdict:
        answer = last_tagged(response)
        if not answer:
            return Verdict(0.0, "malformed", {"reason": "no <answer>...</answer>, or nothing in it"})
        parts: dict[str, float | str] = {"answer": answer[:200]}
        if len(answer) > MAX_LENGTH:
            return Verdict(0.0, "wrong", parts | {"reason": f"longer than {MAX_LENGTH:,} characters"})
        if answer != example["answer"]:
            harmless = _arithmetic if symbolic else _literal if evaluates else lambda text: True
            if not harmless(answer):
                return Verdict(
                    0.0, "wrong", parts | {"reason": "no plain value: it would be run as a program"}
                )
        try:
            with cpu_limit(CPU_SECONDS):
                score = data.score_answer(answer, entry=dict(example))
        except (OutOfTime, MemoryError) as error:
            return Verdict(0.0, "timeout", parts | {"reason": str(error) or "out of memory"})
        except Exception as error:
            return Verdict(
                0.0, "wrong", parts | {"reason": f"the scorer raised {type(error).__name__}: {error}"[:200]}
            )
        verdict = as_verdict(score)
        return Verdict(verdict.reward, verdict.outcome, verdict.parts | parts)

    return verify


DESCRIPTOR = VerifierDescriptor(
    "reasoning-gym",
    reasoning_gym_verifier,
    fields=("question", "answer", "metadata"),
    least_timeout=2 * CPU_SECONDS,
)


def open_dataset(name: str, config: Mapping[str, Any] | None, *, seed: int, size: int) -> Any:
    """A data set of reasoning-gym.

    Raises:
      UserError: if the package, the data set or an option of it is not there, or makes no sense to it.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(f"reasoning-gym is not installed ({error}): pip install 'lpo_jax[envs]'") from None
    if name not in DATASETS:
        raise UserError(
            f"reasoning-gym has no data set {name!r}{nearest(name, DATASETS)}; it has {len(DATASETS)}"
        )
    if not isinstance(config, Mapping | None) or {"seed", "size"} & set(config or {}):
        raise UserError(
            f"reasoning-gym {name}: config is {config!r}, but has to be a mapping without seed and size"
        )
    try:
        return create_dataset(name, seed=seed, size=size, **(config or {}))
    except Exception as error:  # assertions, mostly; they say which option
        raise UserError(
            f"reasoning-gym {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None


def _literal(text: str) -> bool:
    try:
        ast.literal_eval(text if len(text) <= MAX_CHARS else "")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _arithmetic(text: str) -> bool:
    """Whether a text is an expression of numbers, single letters and usual functions, and of bounded size."""
    try:
        return len(text) <= MAX_CHARS and _degree(ast.parse(text.strip(), mode="eval").body) <= MAX_DEGREE
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError):
        return False


def _degree(node: ast.expr) -> float:
    """The degree of an expression, numbers taken for variables.

    Raises:
      ValueError: if it is none, or an exponent no number.
    """
    match node:
        case ast.Constant(int() | float() as number) if len(str(number)) <= MAX_DIGITS:
            return 1
        case ast.Name(name) if len(name) == 1 or name == "pi":
            return 1
        case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
            return _degree(operand)
        case ast.Call(ast.Name(name), [argument], []) if name in _FUNCTIONS:
            return _degree(argument)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            return max(_degree(left), _degree(right))
        case ast.BinOp(left, ast.Mult() | ast.Div(), right):
            return _degree(left) + _degree(right)
        case ast.BinOp(left, ast.Pow(), right):
            return _degree(left) * max(1.0, _exponent(right))
    raise ValueError


def _exponent(node: ast.expr) -> float:
    """The size of an exponent such as 3, -2 or 3/2; 1 for one without numbers, such as x.

    Raises:
      ValueError: if it is a number that has to be worked out first.
    """
    match node:
        case ast.Constant(int() | float() as number):
            return abs(float(number))
        case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
            return _exponent(operand)
        case ast.BinOp(left, ast.Div(), ast.Constant(int() | float())):
            return _exponent(left)
    if any(isinstance(inside, ast.Constant) for inside in ast.walk(node)):
        raise ValueError
    return _degree(node)
