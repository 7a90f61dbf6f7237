"""The code task: tests in every format become pairs that the verifier reads, or the row is skipped."""

import json

import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.rewards.code_tests import read_tests

STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALLS = {"inputs": [[1, [2]], [3, [4]]], "outputs": [3, 7], "fn_name": "add"}
STDIN_CASES = (("1 2\n", "3\n"), ("3 4\n", "7\n"))
CALL_CASES = (((1, [2]), 3), ((3, [4]), 7))
LEETCODE = (
    "def check(candidate):\n"
    "    assert candidate(a = 1, b = [2]) == 3\n"
    "    assert candidate(a = 3, b = [4]) == 7\n\n\n"
    "check(Solution().add)"
)
HUMANEVAL = (
    "\n\nMETADATA = {'author': 'me'}\n\n\ndef check(candidate):\n"
    "    assert candidate(1, [2]) == 3\n"
    "    assert candidate(3, [4]) == 7\n    assert True\n"
)
ASSERTS = ["assert add(1, [2]) == 3", "assert add(3, [4]) == 7"]
PROMPT = [
    {"role": "system", "content": "Use actions."},
    {
        "role": "user",
        "content": "Add.\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\n"
        "at the end.",
    },
]

SHAPES = {
    "CodeContests": ({"problem": "Add.", "tests": STDIN}, "", STDIN_CASES),
    "Codeforces": (
        {"problem": "Add.", "tests": [{"input": a, "output": b} for a, b in STDIN_CASES]},
        "",
        STDIN_CASES,
    ),
    "functions": ({"problem": "Add.", "tests": CALLS}, "add", CALL_CASES),
    "PRIME": (
        {
            "prompt": PROMPT,
            "ability": "code",
            "reward_model": {"ground_truth": json.dumps(STDIN), "style": "rule"},
        },
        "",
        STDIN_CASES,
    ),
    "LeetCode": ({"problem": "Add.", "tests": {"functional": LEETCODE}}, "add", CALL_CASES),
    "HumanEval": ({"prompt": "Add.", "test": HUMANEVAL, "entry_point": "add"}, "add", CALL_CASES),
    "MBPP": ({"text": "Add.", "test_list": ASSERTS}, "add", CALL_CASES),
    "LiveCodeBench": (
        {
            "problem": "Add.",
            "metadata": '{"func_name": "add"}',
            "tests": [
                {"input": "1\n[2]", "output": "3", "testtype": "functional"},
                {"input": "3\n[4]", "output": "7", "testtype": "functional"},
            ],
        },
        "add",
        CALL_CASES,
    ),
}


def get(write, *rows, name="a.json", **options):
    return tasks.get("code", heldout=write(name, list(rows)), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(write, shape):
    stored, function, cases = SHAPES[shape]
    (row,) = get(write, stored).heldout
    tests = read_tests(row["tests"])
    assert (tests.function, tests.cases) == (function, cases)
    # MBPP's problem does not name the function; its first test does.
    assert row["problem"] == ("Add.\nassert add(1, [2]) == 3" if shape == "MBPP" else "Add.")


def test_prompts(write):
    task = get(write, SHAPES["PRIME"][0])
    assert task.prompt(task.heldout[0]) == PROMPT[1]["content"]  # once, although the file already contains it
    system, user = get(write, SHAPES["PRIME"][0], template="eurus", chat=True).prompt(task.heldout[0])
    assert "[SYNTHESIZE]" in system["content"] and user == {"role": "user", "content": PROMPT[1]["content"]}
    assert get(write, SHAPES["PRIME"][0], template="# {problem}\n").prompt(task.heldout[0]) == "# Add.\n"


SOLVED = {
    "LeetCode": {"solutions": "class Solution:\n    def add(self, a, b):\n        return a + b[0]\n"},
    "HumanEval": {
        "prompt": "def add(a, b):\n    '''Add.'''\n",
        "canonical_solution": "    return a + b[0]\n",
    },
    "MBPP": {"code": "def add(a, b):\n    return a + b[0]"},
    "CodeContests": {"solution": "print(sum(map(int, input().split())))"},
}


@pytest.mark.parametrize("shape", SOLVED)
def test_solutions_are_programs_that_pass(write, shape):
    task = get(write, {**SHAPES[shape][0], **SOLVED[shape]})
    (row,) = task.heldout
    assert task.solution(row).startswith("\n```python\n") and task.solution(row).endswith("\n```")
    code = task.solution(row).split("```")[1].removeprefix("python\n")
    if shape == "CodeContests":
        return
    names = {}
    exec(code, names)
    function = names["Solution"]().add if "Solution" in names else names["add"]
    assert [function(*given) for given, _ in CALL_CASES] == [3, 7]


def test_the_starter_code_names_the_function(write):
    starter = "class Solution:\n    def add(self, a, b):"
    (row,) = get(write, {**SHAPES["LiveCodeBench"][0], "starter_code": starter}).heldout
    assert row["problem"] == f"Add.\n{starter}"
    assert row["tests"] == {"inputs": ["1\n[2]", "3\n[4]"], "outputs": ["3", "7"], "fn_name": "add"}


@pytest.mark.parametrize(
    "stored",
    ["print(1)", ["print(1)", "print(2)"], json.dumps(["print(1)", "x"]), "So:\n```python\nprint(1)\n```"],
)
def test_one_solution_of_many_without_its_fences(write, stored):
    task = get(write, {"problem": "One.", "tests": STDIN, "solutions": stored})
    assert task.solution(task.heldout[0]) == "\n```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ({"functional": LEETCODE.replace("== 7", "in (7, 8)")}, "not every test is a pair"),
        ({"functional": LEETCODE.replace("[4]", "list_node([4])")}, "not every test is a pair"),
        ({"functional": "def check(candidate):"}, "not every test is a pair"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
        ([], "0 inputs and 0 outputs"),
        ({"outputs": ["1"]}, "no inputs and outputs"),
        ("not json", "Expecting value"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], "metadata.func_name does not name one"),
    ],
)
def test_tests_that_cannot_be_used(write, tests, reason):
    rows = [{"problem": "Add.", "tests": json.dumps(STDIN)}, {"problem": "Bad.", "tests": tests}]
    with pytest.warns(UserWarning, match=rf"1 of 2 rows .*row 1: .*{reason}"):
        task = get(write, *rows)
    assert [row["problem"] for row in task.heldout] == ["Add."]
    with pytest.raises(UserError, match="strict: false"):
        get(write, *rows, strict=True)


def test_mathematics_in_primes_file_is_another_task(write):
    mathematics = {"prompt": PROMPT, "ability": "math", "reward_model": {"ground_truth": "3"}}
    task = get(write, SHAPES["PRIME"][0], mathematics, name="a.parquet")
    assert len(task.heldout) == 1 and task.about["heldout"]["other_kind"] == 1
    both = write("b.parquet", [SHAPES["PRIME"][0], mathematics])
    assert [row["answer"] for row in tasks.get("math", heldout=both).heldout] == ["3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "Add."}, r"row 0: no field 'tests'; it has problem"),
        ({"tests": STDIN}, r"row 0: no field 'problem'"),
        ({"problem": " ", "tests": STDIN}, "row 0: the field 'problem' is empty"),
    ],
)
def test_missing_fields(write, row, message):
    with pytest.raises(UserError, match=message):
        get(write, row)
