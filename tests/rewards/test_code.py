"""The code verifier: extraction of programs, formats of tests, and comparison of outputs."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards import code, sandbox
from lpo_jax.rewards.code_tests import ProblemTests, asserts_to_tests, read_tests
from lpo_jax.rewards.same import same_output, same_result
from lpo_jax.rewards.sandbox_child import encode_result

WHY_NOT = sandbox.why_not("bubblewrap")
confined = pytest.mark.skipif(bool(WHY_NOT), reason=f"no bubblewrap here: {WHY_NOT}")

ADD = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "0 0\n"], "outputs": ["3\n", "7\n", "11\n", "0\n"]}
RIGHT = "print(sum(map(int, input().split())))"


def block(program):
    return f"Some thoughts.\n```python\n{program}\n```\nDone."


def judge(program, tests, **options):
    return rewards.get("code", **options)(block(program), {"tests": tests})


@confined
@pytest.mark.parametrize(
    ("program", "score", "reward", "outcome"),
    [
        (RIGHT, "fraction", 1.0, "pass"),
        (RIGHT, "binary", 1.0, "pass"),
        ("print(3)", "fraction", 0.25, "wrong"),
        ("print(3)", "binary", 0.0, "wrong"),
        ("a, b = map(int, input().split())\nwhile a == 5: pass\nprint(a + b)", "fraction", 0.75, "timeout"),
        ("a, b = map(int, input().split())\nwhile a == 5: pass\nprint(a + b)", "binary", 0.0, "timeout"),
        ("print(1/0)", "fraction", 0.0, "wrong"),
        ("def main():", "fraction", 0.0, "wrong"),
    ],
)
def test_rewards_and_outcomes(program, score, reward, outcome):
    verdict = judge(program, ADD, score=score, time_limit=0.3)
    assert (verdict.reward, verdict.outcome) == (reward, outcome)
    assert not verdict.masked
    if outcome != "pass":
        assert verdict.parts["reason"].startswith("test ")


@confined
def test_parts_name_the_first_failure():
    verdict = judge("a, b = map(int, input().split())\nprint([3, 7][a // 2])", ADD)
    assert verdict.parts == {"passed": 2, "tests": 4, "reason": "test 3: IndexError: list index out of range"}


@confined
def test_only_the_first_tests_and_only_so_long():
    assert judge("print(3)", ADD, max_tests=1).outcome == "pass"
    verdict = judge("import time\ntime.sleep(0.4)\nprint(3)", ADD, total_limit=0.6)
    assert (verdict.reward, verdict.outcome) == (0.25, "timeout")


@confined
@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b): return a + b",
        "class Solution:\n    def add(self, a: List[int], b: Optional[int] = None): return a + b",
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    a: int\n"
        "def add(a, b):\n    print('not the result')\n    return P(a + b).a\n"
        "if __name__ == '__main__':\n    raise SystemExit(1)",
        "add = lambda a, b: reduce(xor, [a ^ b]) and a + b",
    ],
)
def test_functions_and_methods(program):
    tests = {"fn_name": "add", "inputs": ["1\n2", "-1\n2"], "outputs": ["3", "1"]}
    assert judge(program, tests).outcome == "pass"
    assert judge(program, {**tests, "outputs": ["3", "2"]}).reward == 0.5
    assert judge(program, {**tests, "inputs": [[1, 2], [-1, 2]], "outputs": [3, 1]}).outcome == "pass"


@confined
def test_values_of_every_builtin_type_cross_both_ways():
    program = "def f(value): return {'value': value, (1, 2): {3}, None: 2**2000, 'b': b'x', 'c': 1j}"
    values = [(1, [2.5]), {1: (2,)}, {3, 4}, "ü\n\ud800", None, True, 10**400, -0.0]
    expected = [{"value": v, (1, 2): {3}, None: 2**2000, "b": b"x", "c": 1j} for v in values]
    tests = {"fn_name": "f", "inputs": [[value] for value in values], "outputs": expected}
    assert judge(program, tests).parts == {"passed": len(values), "tests": len(values)}
    expected[3]["value"] = "u\n\ud800"
    assert judge(program, tests).parts["reason"] == "test 4: wrong result"


@confined
def test_what_programs_for_judges_do():
    tricks = """
import sys, threading
from functools import lru_cache
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)

@lru_cache(None)
def deep(n):
    return 0 if n == 0 else 1 + deep(n - 1)

def main():
    a, b = map(int, sys.stdin.buffer.readline().split())
    counts = Counter([a, b])
    heappush(heap := [b], a)
    print(deep(20_000) - 20_000 + sum(heap) + 0 * gcd(pow(2, 5, 7), 3) * len(str(10**5000)))

threading.Thread(target=main).start()
"""
    assert judge(tricks, ADD).outcome == "pass"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```py\na\n```", "a\n"),
        ("1. so:\n   ```Python3 \na\n   ```", "a\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("```python\ncut off", "cut off"),
        ("```python\r\na\r\n```", "a\r\n"),
        ("```\na\n```", None),
        ("```pythonic\na\n```", None),
        ("no code", None),
        ("```python\n \n```", None),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```\nDone.',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """\n',
        ),
        ("```python\ns = '''\n```python\nx\n```\n'''\n```", "s = '''\n```python\nx\n```\n'''\n"),
        ('```python\nr"""\\"""\n```\n"""\n```', 'r"""\\"""\n```\n"""\n'),
        ("```python\n# '''\na = \"'''\"\n```\n'''\n```", "# '''\na = \"'''\"\n"),
        ('```python\nx = """a\n```\nSo:\n```python\ny = """b"""\n```', 'y = """b"""\n'),  # x is not closed
        ('```python\nx = """a\n```\nSo:\n```python\ny\n```', "y\n"),
        ("```python\na\n```python\nb\n```", "b\n"),  # the first block is not closed
        ("- so:\n  ```python\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ("print(1)", None),
    ],
)
def test_the_last_python_block(response, program):
    assert code.last_program(response) == program
    if program is None:
        verdict = rewards.get("code")(response, {"tests": ADD})
        assert (verdict.reward, verdict.outcome) == (0.0, "malformed")


def test_shapes_of_tests():
    cases = (("1 2\n", "3\n"), ("3 4\n", "7\n"))
    stdin = {"inputs": [given for given, _ in cases], "outputs": [wanted for _, wanted in cases]}
    assert read_tests(stdin) == read_tests(json.dumps(stdin)) == ProblemTests("", cases)
    assert read_tests([{"input": given, "output": wanted} for given, wanted in cases]) == ProblemTests(
        "", cases
    )
    assert read_tests({**stdin, "fn_name": None}) == ProblemTests("", cases)
    assert read_tests({"inputs": [["1", "2"]], "outputs": [["3"]]}).cases == (("1\n2", "3"),)
    call = {
        "fn_name": "f",
        "inputs": ['"a"\n[1, null]', "(1, 2)\n{3}", ""],
        "outputs": ['{"1": 2}', "'x'", "True"],
    }
    assert read_tests(call) == ProblemTests(
        "f", ((("a", [1, None]), {1: 2}), (((1, 2), {3}), "x"), ((), True))
    )
    raw = {"fn_name": "f", "inputs": [["1", 2]], "outputs": ["3"]}
    assert read_tests(raw).cases == ((("1", 2), "3"),)  # the value itself, not its text


@confined
@pytest.mark.parametrize(
    ("body", "outputs", "passed"),
    [
        ("n % 2", [[1], [0], [1]], 3),  # PRIME wraps each value in a list
        ("[n % 2]", [[1], [0], [1]], 3),  # a function that returns lists has the same tests
        ("1", [[1], [0], [1]], 2),
        ("[n % 2] if n == 3 else n % 2", [[1], [0], [1]], 2),  # all tests use one convention
        ("n % 2", [[1], [0], [1, 1]], 0),  # not every value is a list with one item
        ("[n % 2]", [1, 0, 1], 0),
        ("[[n]]", [[[3]], [[4]], [[5]]], 3),
        ("[n]", [[[3]], [[4]], [[5]]], 3),
        ("n", [[[3]], [[4]], [[5]]], 0),
        ("{1: n}", [[{"1": 3}], [{"1": 4}], [{"1": 5}]], 3),
    ],
)
def test_values_that_a_data_set_keeps_in_lists_of_one(body, outputs, passed):
    for score in ("fraction", "binary"):
        tests = {"fn_name": "f", "inputs": [[3], [4], [5]], "outputs": outputs}
        verdict = judge(f"def f(n): return {body}", tests, score=score)
        assert verdict.reward == (passed / 3 if score == "fraction" else passed == 3)


def test_a_text_is_the_value_itself():
    tests = read_tests({"fn_name": "f", "inputs": ["3"], "outputs": ["[3]"]})
    assert not tests.wrapped and tests.readings(tests.cases[0][1]) == ([3],)


@confined
@pytest.mark.parametrize("where", ["the row", "the tests"])
def test_functional_tests_of_live_code_bench(where):
    tests = [
        {"input": '[1, 2]\n"a"', "output": '[3, "a"]', "testtype": "functional"},
        {"input": '[5]\n"b"', "output": '[5, "b"]', "testtype": "functional"},
    ]
    metadata = json.dumps({"func_name": "f"})
    row = {"tests": tests, "metadata": metadata}
    if where == "the tests":
        row = {"tests": json.dumps([{**test, "metadata": {"func_name": "f"}} for test in tests])}
    verify = rewards.get("code")
    right = "class Solution:\n    def f(self, a: List[int], b: str):\n        return [sum(a), b]"
    assert verify(block(right), row).outcome == "pass"
    assert verify(block(right.replace("sum(a)", "3")), row).reward == 0.5


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([{"input": "1", "output": "1", "testtype": "functional"}], "metadata.func_name does not name one"),
        ([{"input": "1", "output": "1", "testtype": "other"}], "functional in all tests, not other"),
        ({}, "no inputs and outputs"),
        ([], "0 inputs and 0 outputs"),
        ([{"input": "1"}], "objects with input and output"),
        ("not json", "Expecting value"),
        (3, "no inputs and outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": "1", "outputs": 1}, "must be lists"),
        ({"inputs": ["1"], "outputs": [2]}, "must be text, not 2"),
        ({"inputs": ["1"], "outputs": [" \n"]}, "no test expects any output"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "a.b"}, "not the name of a function"),
        ({"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"}, "neither JSON nor a Python literal: x y"),
        ({"inputs": [5], "outputs": ["1"], "fn_name": "f"}, "arguments must be a list"),
    ],
)
def test_tests_that_cannot_be_read_are_an_error_whatever_the_response(tests, message):
    with pytest.raises(ValueError, match=message):
        rewards.get("code")("no code at all", {"tests": tests})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "all"}, "unknown score 'all'; known: binary and fraction"),
        ({"score": "binry"}, "did you mean 'binary'"),
        ({"sandbox": "docker"}, "known: bubblewrap and weak"),
        ({"time_limit": 0.0}, "must be positive"),
        ({"memory_mb": 10}, "64 MB"),
        ({"max_test": 1}, "did you mean 'max_tests'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        rewards.VerifierSpec("code", options)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1   2 \r\n\n3", "1 2\n3\n", True),
        ("1\n2\n3", "1 2\n3", False),
        ("3\n1 2", "1 2\n3", False),  # PRIME accepts lines in any order
        ("yes", "YES", False),
        ("", "0", False),
        ("3.0", "3", True),
        ("3.0000001", "3", True),
        ("3.001", "3", False),
        ("1000000006.9999", "1000000007", False),
        ("1000000008.0", "1000000007", False),
        ("9007199254740993.0", "9007199254740992", False),
        ("+3", "3", True),
        ("007", "7", True),
        ("-0", "0", True),
        ("-7", "7", False),
        ("0.333333", "0.333334", True),
        ("0.3334", "0.3333", False),
        ("1e3", "1000.0", True),
        ("3", "3.0", True),
        ("nan", "3.0", False),
        ("inf", "1e400", False),
        ("1_000", "1000.0", False),
        ("٣", "3", False),
    ],
)
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) == same


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        ((1, 2), [1, 2], True),
        ([1, 2], (1, 2), True),
        ([1, 2], [2, 1], False),
        ([1, 2], {1, 2}, False),
        ({1, 2}, {2, 1}, True),
        ({(1, 2), frozenset({3})}, {frozenset({3}), (1, 2)}, True),
        ({1, 3}, {1, 2}, False),
        ({1: "a", (2, 3): None}, {(2, 3): None, 1: "a"}, True),
        ({"1": "a"}, {1: "a"}, False),
        ({1: "a"}, {1: "b"}, False),
        (True, 1, True),
        (3.0, 3, True),
        (3.0001, 3, False),
        (1 / 3, 0.333333, True),
        (2**3000, 2**3000, True),
        (2**3000 + 1, 2**3000, False),
        (2**3000, 1.0, False),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, math.inf, True),
        ("1", 1, False),
        (1, "1", False),
        (None, "", False),
        (None, 0, False),
        (None, None, True),
        (b"x", b"x", True),
        (1j, 1j, True),
        ([[]], [], False),
        (["💥" * 200] * 9 + [1j] * 99, ["💥" * 200] * 9 + [1j] * 99, True),
        ([1.0000000000000002] * 999, [1.0] * 999, True),
        ([{}, set(), frozenset()] * 99, [{}, set(), frozenset()] * 99, True),
        ([1] * 9999, [1], False),
    ],
)
def test_same_result(value, expected, same):
    assert same_result(json.dumps(encode_result(value)).encode(), expected) == same


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["set", "dict", "int", "bytes", "complex", "other"]), inner, max_size=2
        )
    ),
    max_leaves=8,
)


@given(_JSON | st.binary(), st.sampled_from([1, 1.5, "a", None, [1], {1}, {1: [2]}, b"a", 1j, ({(1,)},)]))
def test_no_claim_makes_the_comparison_fail(claim, expected):
    """An exception would mask the sample, so that the program would avoid its reward."""
    data = claim if isinstance(claim, bytes) else json.dumps(claim).encode()
    assert same_result(data, expected) in (True, False)


@given(_JSON.filter(lambda value: "\x00" not in repr(value)))
def test_every_value_is_the_same_as_itself(value):
    assert same_result(json.dumps(encode_result(value)).encode(), value)


def test_assertions_become_tests():
    mbpp = "assert f([1, 2], 'a') == (3, {4})\nassert f([], 'b', ) == -1.5"
    tests = asserts_to_tests(mbpp)
    assert read_tests(tests) == ProblemTests("f", ((([1, 2], "a"), (3, {4})), (([], "b"), -1.5)))
    check = "METADATA = {}\n\ndef check(candidate):\n    assert True, 'x'\n    assert candidate(1) == 2\n\ncheck(g)"
    assert read_tests(asserts_to_tests(check)) == ProblemTests("g", (((1,), 2),))
    leetcode = (
        "def check(candidate):\n    assert candidate(nums = [1], k = 2) == None\n    assert candidate(nums = [], "
        "k = 1) == 3\n\n\ncheck(Solution().h)"
    )
    assert read_tests(asserts_to_tests(leetcode)) == ProblemTests("h", ((([1], 2), None), (([], 1), 3)))


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert",
        "assert f(1)",  # accepts any true value
        "assert not f(1)",
        "assert f(1) == g(2)",
        "assert f(x) == 2",
        "assert set(f(1)) == {2}",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f(1) == 2\nassert g(1) == 2",
        "assert f(a=1) == 2\nassert f(b=1) == 2",
        "import os\nos.system('x')\nassert f(1) == 2",
        "def check(candidate):\n    assert candidate(1) == 2",
        "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == 2\ncheck(f)",
        "def check(candidate):\n    assert other(1) == 2\ncheck(f)",
        "assert f(" + "[" * 300 + "]" * 300 + ") == 1" + "(" * 10_000,
    ],
)
def test_anything_else_becomes_no_tests_at_all(program):
    assert asserts_to_tests(program) is None
