"""The verifier for reasoning-gym's tasks, scored by their own `score_answer` (extra `[envs]`).

Some of its scorers evaluate the answer as Python, or with sympy, which also evaluates Python: they would run any code
that a model writes. For these, an answer reaches the scorer only if it is the gold answer itself, a literal, or
arithmetic of bounded size; any other answer is wrong. If a scorer raises an exception, the answer is wrong too.
"""

import ast
import inspect
import re
from collections.abc import Mapping

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards.answers import last_tagged
from lpo_jax.rewards.limits import OutOfTime, cpu_limit
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor, as_verdict
from lpo_jax.types import Json

# Well below the pool's wall-clock limit, so that a slow answer is scored and not masked.
CPU_SECONDS = 2.5
MAX_CHARS = 2000  # characters of an answer that a scorer evaluates
MAX_LENGTH = 20_000  # characters of any answer; a scorer's time may grow with its square
MAX_DIGITS = 20
MAX_DEGREE = 1000  # the number of digits grows with the degree; 20,000 digits are cheap

_EVALUATES = re.compile(r"(?<!\w)(?:eval|exec|compile|sympify)\(")
_SYMBOLIC = re.compile(r"(?<!\w)(?:parse_expr|parse_latex|simplify)\(")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"log", "ln", "exp", "sqrt", "Abs"}


def reasoning_gym_verifier(*, dataset: str, config: Mapping[str, Json] | None = None) -> Verifier:
    """Build the verifier of one of reasoning-gym's datasets. Examples are its entries (`question, answer, metadata`).

    The answer is the content of the last `<answer>...</answer>` pair. The reward is the dataset's score, from 0 to 1,
    which often gives partial credit to a wrong answer; 1 counts as `pass`.

    Args:
      dataset: the name of the dataset, such as `"leg_counting"`.
      config: the dataset's own options.

    Returns:
      A function `(response, example) -> Verdict`.

    Raises:
      UserError: if the package is not installed, or the dataset or an option is unknown or invalid.
    """
    data = open_dataset(dataset, config, seed=0, size=1)
    scorer = inspect.getsource(type(data).score_answer)
    symbolic, evaluates = _SYMBOLIC.search(scorer), _EVALUATES.search(scorer)

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        answer = last_tagged(response)
        if not answer:
            return Verdict(0.0, "malformed", {"reason": "no <answer>...</answer>, or nothing in it"})
        parts: dict[str, float | str] = {"answer": answer[:200]}
        if len(answer) > MAX_LENGTH:
            return Verdict(0.0, "wrong", parts | {"reason": f"longer than {MAX_LENGTH:,} characters"})
        if answer != example["answer"]:
            harmless = _arithmetic if symbolic else _literal if evaluates else lambda text: True
            if not harmless(answer):
                reason = "no plain value: it would be run as a program"
                return Verdict(0.0, "wrong", parts | {"reason": reason})
        try:
            with cpu_limit(CPU_SECONDS):
                score = data.score_answer(answer, entry=dict(example))
        except (OutOfTime, MemoryError) as error:
            return Verdict(0.0, "timeout", parts | {"reason": str(error) or "out of memory"})
        except Exception as error:
            reason = f"the scorer raised {type(error).__name__}: {error}"[:200]
            return Verdict(0.0, "wrong", parts | {"reason": reason})
        verdict = as_verdict(score)
        return Verdict(verdict.reward, verdict.outcome, verdict.parts | parts)

    return verify


DESCRIPTOR = VerifierDescriptor(
    "reasoning-gym", reasoning_gym_verifier, ("question", "answer", "metadata"), least_timeout=2 * CPU_SECONDS
)


def open_dataset(name: str, config: Mapping[str, Json] | None, *, seed: int, size: int) -> Json:
    """Open a dataset of reasoning-gym.

    Args:
      name: the name of the dataset.
      config: the dataset's own options, without seed and size.
      seed: seed of the entries.
      size: number of entries.

    Raises:
      UserError: if the package is not installed, or the dataset or an option is unknown or invalid.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(f"reasoning-gym is not installed ({error}): pip install 'lpo_jax[envs]'") from None
    if name not in DATASETS:
        raise UserError(
            f"reasoning-gym has no dataset {name!r}{nearest(name, DATASETS)}; it has {len(DATASETS)} datasets"
        )
    if not isinstance(config, Mapping | None) or {"seed", "size"} & set(config or {}):
        raise UserError(
            f"reasoning-gym {name}: config is {config!r}, but must be a mapping without seed and size"
        )
    try:
        return create_dataset(name, seed=seed, size=size, **(config or {}))
    except Exception as error:  # mostly assertions, whose messages name the option
        reason = " ".join(str(error).split())
        raise UserError(f"reasoning-gym {name}: {type(error).__name__}: {reason}") from None


def _literal(text: str) -> bool:
    try:
        ast.literal_eval(text if len(text) <= MAX_CHARS else "")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _arithmetic(text: str) -> bool:
    """Return whether a text is an expression of numbers, single letters and common functions, of bounded size."""
    try:
        return len(text) <= MAX_CHARS and _degree(ast.parse(text.strip(), mode="eval").body) <= MAX_DEGREE
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError):
        return False


def _degree(node: ast.expr) -> float:
    """Return the degree of an expression, counting numbers as variables.

    Raises:
      ValueError: if the node is not such an expression, or an exponent is not a number.
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
    """Return an upper bound on an exponent such as 3, -2 or 3/2; for one without numbers, such as x, its degree.

    Raises:
      ValueError: if the exponent is a number that would have to be computed first.
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
