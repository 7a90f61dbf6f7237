"""The Countdown task: generated problems with solutions for the supervised warm start, or problems from files."""

import functools
import random
from collections.abc import Sequence
from fractions import Fraction

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.generate import train_and_heldout
from lpo_jax.tasks.prepared import Recipe
from lpo_jax.tasks.splits import Splits, field, splits
from lpo_jax.tasks.task import Prompt, Row, Task, with_prefill
from lpo_jax.types import Json

# name: (prompt, prefill, target response after the prefill)
TEMPLATES = {
    "short": (
        "Using the numbers {numbers}, create an equation that equals {target}.\n",
        "<answer>",
        "{solution}</answer>",
    ),
    # TinyZero's template for base models, verbatim.
    "tinyzero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer.\n"
        "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
        "arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in "
        "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example <answer> "
        "(1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n",
        "<think>",
        " {solution} = {target} </think>\n<answer> {solution} </answer>",
    ),
}

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # binding strength of an expression


def countdown_task(
    *,
    path: str = "",
    heldout: str = "",
    numbers: int | Sequence[int] = (3, 4),
    max_number: int = 99,
    max_target: int = 100,
    operators: str = "+-*/",
    train_size: int = 2000,
    heldout_size: int = 512,
    seed: int = 0,
    template: str = "tinyzero",
    strict: bool = False,
    scores: Sequence[float] = (1.0, 0.1, 0.0),
) -> Task:
    """Build the Countdown task: rows `{"numbers": [3, 5, 2], "target": 16, "solution": "(3+5)*2"}`.

    Problems are generated from a seed, or read from files with the columns `nums` (or `numbers`) and `target`, such as
    `hf:Jiayi-Pan/Countdown-Tasks-3to4` (Countdown-34) and `hf:Jiayi-Pan/Countdown-Tasks-4` (Countdown-4). Problems from
    files have no solution. No problem (numbers in any order, target) occurs twice, within a split or across.

    Args:
      path, heldout: sources of problems (`lpo_jax.tasks.records`), used as in `lpo_jax.tasks.splits.splits`. If both
        are empty, problems are generated.
      numbers: how many numbers a problem has, or a list of such counts to draw from. Rows of files with other counts
        are dropped.
      max_number, max_target: for generated problems, the largest number and target; the smallest is 1.
      operators: for generated problems, the operators in solutions, such as `"+-*"`.
      train_size, heldout_size: number of rows. For files, 0 means all training rows, and for held-out rows see
        `splits`.
      seed: seed of the problems, or of the draw from files.
      template: "short", a brief prompt for small models, or "tinyzero".
      strict, scores: options of the verifier; see `lpo_jax.rewards.countdown`.

    Raises:
      UserError: if an option has an invalid value, there are too few different problems, or a file is missing or
        invalid.
    """
    counts = [numbers] if isinstance(numbers, int) else list(numbers)
    if not counts or not all(isinstance(count, int) and 2 <= count <= 8 for count in counts):
        raise UserError(
            f"task countdown: numbers {numbers!r}: need a count from 2 to 8, or a list of such counts"
        )
    if max_number < 1 or max_target < 1:
        raise UserError(f"task countdown: max_number {max_number}, max_target {max_target}: need at least 1")
    if not operators or set(operators) - set("+-*/"):
        raise UserError(f'task countdown: operators {operators!r}: need some of + - * /, such as "+-*"')
    if template not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"task countdown: unknown template {template!r}{nearest(template, TEMPLATES)}; known: {known}"
        )
    if path or heldout:
        if (max_number, max_target, operators) != (99, 100, "+-*/"):
            raise UserError(
                "task countdown: max_number, max_target and operators apply only to generated problems; omit either "
                "them or the files"
            )
        rows = splits(_recipe(counts), path, heldout, train_size, heldout_size, seed)
    else:
        draw = functools.partial(_draw, counts, max_number, max_target, operators)
        sizes = {"train_size": train_size, "heldout_size": heldout_size}
        rows = Splits(*train_and_heldout(draw, _key, name="countdown", **sizes, seed=seed), {})
    prompt, prefill, response = TEMPLATES[template]

    def ask(row: Row) -> Prompt:
        return with_prefill(prompt.format(numbers=list(row["numbers"]), target=row["target"]), prefill)

    def solve(row: Row) -> str | None:
        return response.format(**row) if row.get("solution") else None

    verifier = VerifierSpec("countdown", {"strict": strict, "scores": scores}, prefill)
    return Task("countdown", rows.train, rows.heldout, ask, verifier, solve, rows.about)


def _key(row: Row) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(row["numbers"])), row["target"]


def _recipe(counts: list[int]) -> Recipe:
    """Return the recipe for files, which keeps rows with these counts of numbers."""

    def convert(row: Row) -> dict[str, Json] | None:
        numbers = field(row, "numbers", ("nums", "numbers"), {})
        target = field(row, "target", ("target",), {})
        whole = isinstance(numbers, list) and all(
            type(n) is int and abs(n) < 2**63 for n in [*numbers, target]
        )
        if not whole:
            raise UserError(
                f"numbers {numbers!r}, target {target!r}: need a list of whole numbers and a whole number"
            )
        return {"numbers": numbers, "target": target} if len(numbers) in counts else None

    return Recipe(
        "countdown", {"numbers": "ints", "target": "int"}, convert, _key, {"counts": sorted(counts)}
    )


def _draw(
    counts: list[int], max_number: int, max_target: int, operators: str, rng: random.Random
) -> dict[str, Json] | None:
    """Draw a problem; None if the expression has no value, or one that is no target."""
    given = [1 + rng.randrange(max_number) for _ in range(counts[rng.randrange(len(counts))])]
    solution, value = _random_expression(rng, given, operators)
    if value is None or value.denominator != 1 or not 1 <= value <= max_target:
        return None
    return {"numbers": given, "target": int(value), "solution": solution}


def _random_expression(rng: random.Random, given: list[int], operators: str) -> tuple[str, Fraction | None]:
    """Join random pairs of parts with random operators until one expression is left.

    Parts are drawn at random, so the order of the given numbers carries no information about the solution.

    Returns:
      The text, without unnecessary parentheses, and the value. The value is None if the expression divides by zero.
    """
    parts = [(str(number), _ATOM, Fraction(number)) for number in given]
    while len(parts) > 1:
        left, right = parts.pop(rng.randrange(len(parts))), parts.pop(rng.randrange(len(parts)))
        operator = operators[rng.randrange(len(operators))]
        if operator == "/" and right[2] == 0:
            return "", None
        parts.append(_join(left, operator, right))
    return parts[0][0], parts[0][2]


def _join(left: tuple[str, int, Fraction], operator: str, right: tuple[str, int, Fraction]):
    binding = _SUM if operator in "+-" else _PRODUCT
    # a-(b+c) and a/(b*c) need their parentheses; a+(b-c) and a*(b/c) do not.
    needs = binding + (operator in "-/")
    text = _bracket(left, binding) + operator + _bracket(right, needs)
    a, b = left[2], right[2]
    return text, binding, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]


def _bracket(part: tuple[str, int, Fraction], needs: int) -> str:
    return part[0] if part[1] >= needs else f"({part[0]})"
