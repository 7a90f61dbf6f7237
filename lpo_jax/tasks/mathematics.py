r"""The tasks math and gsm8k: problems from files such as GSM8K, MATH, AIME, AMC, OlympiadBench and Polaris.

The answer may be in the field `answer`, `final_answer` or `expected_answer`, in verl's `reward_model.ground_truth`, or
only in the last `\boxed{}` of a `solution`. For other names, set the option `fields`.
"""

import re
from collections.abc import Callable, Mapping

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards.answers import last_boxed
from lpo_jax.tasks.prepared import Recipe, Unusable
from lpo_jax.tasks.splits import as_text, check_answer, check_fields, check_gold, field, splits, squeezed
from lpo_jax.tasks.task import Row, Task
from lpo_jax.tasks.templates import GSM8K, MATH, bare, prompt_function
from lpo_jax.types import Json

_PROBLEM = ("problem", "question", "extra_info.question", "prompt")
_ANSWER = ("answer", "final_answer", "expected_answer", "reward_model.ground_truth")


def math_task(
    *,
    path: str = "",
    heldout: str = "",
    train_size: int = 0,
    heldout_size: int = 0,
    seed: int = 0,
    template: str = "boxed",
    fields: Mapping[str, str] | None = None,
    strict: bool = False,
    verifier_options: Mapping[str, Json] | None = None,
) -> Task:
    r"""Build a task of mathematics problems: rows `{"problem": ..., "answer": "\\frac{1}{2}", "solution": ...}`.

    Args:
      path, heldout, train_size, heldout_size, seed, strict: see `lpo_jax.tasks.splits.splits`. Two problems are the
        same if their texts are equal except for whitespace.
      template: "boxed" (the LPO paper's), "qwen" (for chat), "prime", or a text with `{problem}`.
      fields: the file's names for `problem`, `answer` and `solution`, if they are unusual.
      verifier_options: options of the verifier; see `lpo_jax.rewards.math`.

    Raises:
      UserError: if an option has an invalid value, or a file is missing or invalid.
    """
    ask, verify = prompt_function("math", template, MATH, "problem"), rewards.get("math")
    fields = check_fields("math", fields, ("problem", "answer", "solution"))

    def convert(row: Row) -> dict[str, Json] | None:
        if row.get("ability", "math") != "math":
            return None
        problem, solution = _problem(row, "problem", MATH, fields), _solution(row, fields)
        row = {"problem": problem, "answer": _gold(row, solution, fields)}
        check_gold(verify, row)
        return row | {"solution": solution if last_boxed(solution) else ""}

    recipe = _recipe("math", "problem", convert, fields)
    rows = splits(recipe, path, heldout, train_size, heldout_size, seed, strict)
    verifier = rewards.VerifierSpec("math", verifier_options or {})
    return Task("math", rows.train, rows.heldout, ask, verifier, _solve, rows.about)


def gsm8k_task(
    *,
    path: str = "",
    heldout: str = "",
    train_size: int = 0,
    heldout_size: int = 0,
    seed: int = 0,
    template: str = "hashes",
    fields: Mapping[str, str] | None = None,
    strict: bool = False,
    verifier_options: Mapping[str, Json] | None = None,
) -> Task:
    """Build a task of grade-school word problems: rows `{"question": ..., "answer": "72", "solution": "...\\n####
    72"}`.

    The file's answer is a number, alone or after `####` at the end of a derivation. The derivation is then the
    solution, without calculator annotations such as `<<48/2=24>>`.

    Args:
      path, heldout, train_size, heldout_size, seed, strict: see `math_task`.
      template: "hashes" (verl's), "boxed", or a text with `{question}`.
      fields: the file's names for `question` and `answer`, if they are unusual.
      verifier_options: options of the verifier; see `lpo_jax.rewards.gsm8k`.

    Raises:
      UserError: if an option has an invalid value, or a file is missing or invalid.
    """
    ask, verify = prompt_function("gsm8k", template, GSM8K, "question"), rewards.get("gsm8k")
    fields = check_fields("gsm8k", fields, ("question", "answer"))

    def convert(row: Row) -> dict[str, Json]:
        question = _problem(row, "question", GSM8K, fields)
        derivation = _gold(row, "", fields)
        row = {"question": question, "answer": derivation.rpartition("####")[2].strip()}
        check_gold(verify, row)
        return row | {"solution": re.sub(r"<<[^<>]*>>", "", derivation) if "####" in derivation else ""}

    recipe = _recipe("gsm8k", "question", convert, fields)
    rows = splits(recipe, path, heldout, train_size, heldout_size, seed, strict)
    verifier = rewards.VerifierSpec("gsm8k", verifier_options or {})
    return Task("gsm8k", rows.train, rows.heldout, ask, verifier, _solve, rows.about)


def _recipe(name: str, problem: str, convert: Callable, fields: Mapping[str, str]) -> Recipe:
    columns = {problem: "text", "answer": "text", "solution": "text"}
    return Recipe(name, columns, convert, lambda row: squeezed(row[problem]), {"fields": fields})


def _problem(row: Row, name: str, known: Mapping, fields: Mapping[str, str]) -> str:
    return as_text(bare(field(row, name, _PROBLEM, fields), known, name), name)


def _solution(row: Row, fields: Mapping[str, str]) -> str:
    """Return the row's solution if it is text, else an empty text: OlympiadBench's solutions are lists of proofs."""
    if "solution" not in fields and "solution" not in row:
        return ""
    solution = field(row, "solution", ("solution",), fields)
    return as_text(solution, "solution") if isinstance(solution, str) and solution.strip() else ""


def _gold(row: Row, solution: str, fields: Mapping[str, str]) -> str:
    try:
        gold = field(row, "answer", _ANSWER, fields)
    except UserError:
        if not solution or "answer" in fields:
            raise
        gold = last_boxed(solution)
    check_answer(gold)
    if isinstance(gold, list):  # OlympiadBench stores a list; several answers are one text in it
        gold = ", ".join(map(str, gold))
    if gold is None or not str(gold).strip():
        raise Unusable("the answer is empty")
    return as_text(str(gold).strip(), "answer")


def _solve(row: Row) -> str | None:
    return f" {row['solution']}" if row["solution"] else None
