"""Programming problems with tests, from files in the shapes that are about.

PRIME's, LiveCodeBench's and their relatives' (see `lpo_jax.rewards.code_tests`), under `tests` or verl's
`reward_model.ground_truth`; and tests that are programs: LeetCode's `{"functional": "def check(candidate): ..."}`,
HumanEval's `test` with its `entry_point`, and MBPP's `test_list`. Their assertions are read as examples of input and
output, never run.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.rewards.answers import last_program
from lpo_jax.rewards.code_tests import as_columns, asserts_to_tests, read_tests
from lpo_jax.tasks.prepared import Recipe, Unusable
from lpo_jax.tasks.splits import as_text, check_fields, field, splits, squeezed
from lpo_jax.tasks.task import Row, Task
from lpo_jax.tasks.templates import CODE, bare, prompt_function

_PROBLEM = ("problem", "question", "text", "prompt")
_TESTS = ("tests", "test_cases", "test_list", "test", "reward_model.ground_truth")
_SOLUTION = ("solution", "solutions", "code", "canonical_solution")


def code_task(
    *,
    path: str = "",
    heldout: str = "",
    train_size: int = 0,
    heldout_size: int = 0,
    seed: int = 0,
    template: str = "prime",
    fields: Mapping[str, str] | None = None,
    strict: bool = False,
    verifier_options: Mapping[str, Any] | None = None,
) -> Task:
    """Programs to write: rows `{"problem": ..., "tests": {"inputs", "outputs", "fn_name"?}, "solution": ...}`.

    Args:
      path, heldout, train_size, heldout_size, seed, strict: see `lpo_jax.tasks.splits.splits`. Problems are the same
        when their text is, whitespace aside; rows whose tests cannot be used count as skipped.
      template: `"prime"`, `"eurus"` (the same as a chat with Eurus-2's system message), or a text with `{problem}`.
      fields: what the file calls `problem`, `tests` and `solution` (a Python program), where it is unusual.
      verifier_options: of the verifier; see `lpo_jax.rewards.code`.

    Raises:
      UserError: if an option makes no sense or the files are not as they must be.
    """
    ask = prompt_function("code", template, CODE, "problem")
    fields = check_fields("code", fields, ("problem", "tests", "solution"))

    def convert(row: Row) -> dict[str, Any] | None:
        if row.get("ability", "code") != "code":
            return None  # PRIME's own file holds mathematics too
        problem = as_text(bare(field(row, "problem", _PROBLEM, fields), CODE, "problem"), "problem")
        tests, solution = field(row, "tests", _TESTS, fields), _solution(row, fields)
        if "canonical_solution" in row:  # HumanEval's is the body of the function that the problem begins
            solution = problem + solution
        if isinstance(tests, list) and tests and isinstance(tests[0], str):
            problem = (
                f"{problem}\n{tests[0]}"  # MBPP's problem does not name the function; its first test does
            )
        tests = _tests(tests, row.get("entry_point"), row.get("metadata"))
        starter = row.get("starter_code")
        if tests.get("fn_name") and isinstance(starter, str) and starter.strip() not in problem:
            problem = f"{problem}\n{starter}"  # LiveCodeBench's problem does not name the function either
        return {"problem": problem, "tests": tests, "solution": solution}

    columns = {"problem": "text", "tests": "json", "solution": "text"}
    recipe = Recipe("code", columns, convert, lambda row: squeezed(row["problem"]), {"fields": fields})
    rows = splits(recipe, path, heldout, train_size, heldout_size, seed, strict)
    verifier = VerifierSpec("code", verifier_options or {})
    return Task("code", rows.train, rows.heldout, ask, verifier, _solve, rows.about)


def _tests(stored: Any, entry_point: str | None, metadata: Any) -> dict[str, Any]:
    """Tests as the verifier reads them without the rest of the row.

    Raises:
      Unusable: if it cannot, or an assertion is no example of input and output.
    """
    program = None
    if isinstance(stored, Mapping) and isinstance(stored.get("functional"), str):
        program = stored["functional"]
    elif isinstance(stored, list) and stored and all(isinstance(line, str) for line in stored):
        program = "\n".join(stored)
    elif isinstance(stored, str) and entry_point:
        program = f"{stored}\ncheck({entry_point})"
    if program is not None:
        stored = asserts_to_tests(program)
        if stored is None:
            raise Unusable("not every test is an example of input and output")
    try:
        columns = as_columns(stored, metadata)
        read_tests(columns)
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable(str(error)) from None
    return columns


def _solution(row: Row, fields: Mapping[str, str]) -> str:
    """The row's program, the first where it has several; without the fences of a Markdown block."""
    try:
        solution = field(row, "solution", _SOLUTION, fields)
    except UserError:
        if "solution" in fields:
            raise
        return ""
    if isinstance(solution, str) and solution.lstrip().startswith(
        "["
    ):  # TACO's list of programs is a JSON text
        with contextlib.suppress(ValueError, RecursionError):
            solution = json.loads(solution)
    if isinstance(solution, list) and solution:
        solution = solution[0]
    if not isinstance(solution, str) or not solution.strip():
        return ""
    solution = as_text(solution, "solution")
    return last_program(solution) or "" if "```" in solution else solution


def _solve(row: Row) -> str | None:
    return f"\n```python\n{row['solution'].strip()}\n```" if row["solution"] else None
