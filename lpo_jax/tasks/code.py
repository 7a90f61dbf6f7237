"""Programming problems with tests, from files in the shapes that are about.

PRIME's and its relatives' (see `lpo_jax.rewards.code_tests`), under `tests` or verl's `reward_model.ground_truth`; and
tests that are programs: LeetCode's `{"functional": "def check(candidate): assert ..."}`, HumanEval's `test` with its
`entry_point`, and MBPP's `test_list`. Their assertions are read as examples of input and output, never run.
"""

from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.rewards.code_tests import asserts_to_tests, read_tests
from lpo_jax.tasks.prepared import Recipe, Unusable
from lpo_jax.tasks.splits import check_fields, field, splits, squeezed, text
from lpo_jax.tasks.task import Row, Task
from lpo_jax.tasks.templates import CODE, asker, bare

_PROBLEM = ("problem", "question", "text", "prompt")
_TESTS = ("tests", "test_cases", "test_list", "test", "reward_model.ground_truth")
_SOLUTION = ("solution", "solutions", "code", "canonical_solution")


def code(
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
    ask = asker("code", template, CODE, "problem")
    fields = check_fields("code", fields, ("problem", "tests", "solution"))

    def convert(row: Row) -> dict[str, Any] | None:
        if row.get("ability", "code") != "code":
            return None  # PRIME's own file holds mathematics too
        problem = text(bare(field(row, "problem", _PROBLEM, fields), CODE, "problem"), "problem")
        tests, solution = field(row, "tests", _TESTS, fields), _solution(row, fields)
        if "canonical_solution" in row:  # HumanEval's is the body of the function that the problem begins
            solution = problem + solution
        if isinstance(tests, list) and tests and isinstance(tests[0], str):
            problem = (
                f"{problem}\n{tests[0]}"  # MBPP's problem does not name the function; its first test does
            )
        return {"problem": problem, "tests": _tests(tests, row.get("entry_point")), "solution": solution}

    columns = {"problem": "text", "tests": "json", "solution": "text"}
    recipe = Recipe("code", columns, convert, lambda row: squeezed(row["problem"]), {"fields": fields})
    rows = splits(recipe, path, heldout, train_size, heldout_size, seed, strict)
    verifier = VerifierSpec("code", verifier_options or {})
    return Task("code", rows.train, rows.heldout, ask, verifier, _solve, rows.about)


def _tests(stored: Any, entry_point: str | None) -> Any:
    """Tests as the verifier reads them.

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
        read_tests(stored)
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable(str(error)) from None
    return stored


def _solution(row: Row, fields: Mapping[str, str]) -> str:
    try:
        solution = field(row, "solution", _SOLUTION, fields)
    except UserError:
        if "solution" in fields:
            raise
        return ""
    return text(solution, "solution") if isinstance(solution, str) and solution.strip() else ""


def _solve(row: Row) -> str | None:
    return f"\n```python\n{row['solution'].strip()}\n```" if row["solution"] else None
