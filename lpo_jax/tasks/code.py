"""The code task: programming problems with tests, from files in the formats of common datasets.

Tests are in the format of PRIME, LiveCodeBench or similar datasets (see `lpo_jax.rewards.code_tests`), in the field
`tests` or in verl's `reward_model.ground_truth`. They may also be programs: LeetCode's
`{"functional": "def check(candidate): ..."}`, HumanEval's `test` with its `entry_point`, and MBPP's `test_list`. The
assertions of such programs are parsed as pairs of input and output, and never run.
"""

import contextlib
import json
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.rewards.answers import last_program
from lpo_jax.rewards.code_tests import as_columns, asserts_to_tests, read_tests
from lpo_jax.tasks.prepared import Recipe, Unusable
from lpo_jax.tasks.splits import as_text, check_fields, field, splits, squeezed
from lpo_jax.tasks.task import Row, Task
from lpo_jax.tasks.templates import CODE, bare, prompt_function
from lpo_jax.types import Json

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
    verifier_options: Mapping[str, Json] | None = None,
) -> Task:
    """Build the code task: rows `{"problem": ..., "tests": {"inputs", "outputs", "fn_name"?}, "solution": ...}`.

    Args:
      path, heldout, train_size, heldout_size, seed, strict: see `lpo_jax.tasks.splits.splits`. Two problems are the
        same if their texts are equal except for whitespace. Rows whose tests cannot be used count as skipped.
      template: "prime", "eurus" (the same as a chat with Eurus-2's system message), or a text with `{problem}`.
      fields: the file's names for `problem`, `tests` and `solution` (a Python program), if they are unusual.
      verifier_options: options of the verifier; see `lpo_jax.rewards.code`.

    Raises:
      UserError: if an option has an invalid value, or a file is missing or invalid.
    """
    ask = prompt_function("code", template, CODE, "problem")
    fields = check_fields("code", fields, ("problem", "tests", "solution"))

    def convert(row: Row) -> dict[str, Json] | None:
        if row.get("ability", "code") != "code":
            return None  # PRIME's own file also has mathematics problems
        problem = as_text(bare(field(row, "problem", _PROBLEM, fields), CODE, "problem"), "problem")
        tests, solution = field(row, "tests", _TESTS, fields), _solution(row, fields)
        if "canonical_solution" in row:
            # HumanEval's solution is the body of the function that the problem begins.
            solution = problem + solution
        if isinstance(tests, list) and tests and isinstance(tests[0], str):
            # MBPP's problem does not name the function; its first test does.
            problem = f"{problem}\n{tests[0]}"
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


def _tests(stored: Json, entry_point: str | None, metadata: Json) -> dict[str, Json]:
    """Convert tests to the format that the verifier reads without the rest of the row.

    Raises:
      Unusable: if the tests cannot be read, or an assertion is not a pair of input and output.
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
            raise Unusable("not every test is a pair of input and output")
    try:
        columns = as_columns(stored, metadata)
        read_tests(columns)
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable(str(error)) from None
    return columns


def _solution(row: Row, fields: Mapping[str, str]) -> str:
    """Return the row's program, the first if there are several, without Markdown fences; empty if there is none."""
    try:
        solution = field(row, "solution", _SOLUTION, fields)
    except UserError:
        if "solution" in fields:
            raise
        return ""
    if isinstance(solution, str) and solution.lstrip().startswith("["):
        # TACO stores a list of programs as JSON.
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
