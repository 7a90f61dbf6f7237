import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards.expression import NotAllowed, integers, parse_expression, value

EXAMPLE = {"numbers": [3, 5, 2], "target": 16}
robust = rewards.get("countdown")
strict = rewards.get("countdown", strict=True)


def answer(text):
    return f"some thought</think>\n<answer>{text}</answer>"


# answer, numbers, target, robust (reward, outcome), strict reward (that of TinyZero)
CASES = {
    "right": ("(3+5)*2", [3, 5, 2], 16, (1.0, "pass"), 1.0),
    "right with spaces": (" ( 3 + 5 ) * 2 ", [3, 5, 2], 16, (1.0, "pass"), 1.0),
    "wrong value": ("3+5+2", [3, 5, 2], 16, (0.1, "wrong"), 0.1),
    "number used twice": ("(3+5)*2*2/2", [3, 5, 2], 16, (0.1, "wrong"), 0.1),
    "number left out": ("8*2", [8, 2, 5], 16, (0.1, "wrong"), 0.1),
    "repeated number given twice": ("4*4-1", [1, 4, 4], 15, (1.0, "pass"), 1.0),
    "repeated number given once": ("4*4-1", [1, 4], 15, (0.1, "wrong"), 0.1),
    "fraction on the way": ("6/(1-3/4)", [1, 3, 4, 6], 24, (1.0, "pass"), 1.0),
    "exact thirds": ("8/(3-8/3)", [3, 3, 8, 8], 24, (1.0, "pass"), 1.0),
    "division by zero": ("3/(5-5)", [3, 5, 5], 16, (0.1, "wrong"), 0.1),
    "unary minus": ("-3+5", [3, 5], 2, (1.0, "pass"), 1.0),
    "a power": ("2**3", [2, 3], 8, (0.0, "malformed"), 1.0),
    "floor division": ("7//2", [7, 2], 3, (0.0, "malformed"), 1.0),
    "floats out of digits": ("4.4*5", [4, 4, 5], 22, (0.0, "malformed"), 1.0),
    "words": ("hello", [3, 5], 8, (0.0, "malformed"), 0.1),
    "nothing": ("", [3, 5], 8, (0.0, "malformed"), 0.1),
    "equation that holds": ("(3+5) = 8", [3, 5], 8, (1.0, "pass"), 0.1),
    "equation with another right side": ("(3+5) = 9", [3, 5], 8, (0.1, "wrong"), 0.1),
    "equation that does not hold": ("(3-5) = 8", [3, 5], 8, (0.1, "wrong"), 0.1),
    "two equations": ("3+5 = 8 = 8", [3, 5], 8, (0.0, "malformed"), 0.1),
    "newlines inside": ("\n3+5\n", [3, 5], 8, (1.0, "pass"), 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_scores(case):
    text, numbers, target, (reward, outcome), tinyzero = CASES[case]
    example = {"numbers": numbers, "target": target}
    verdict = robust(answer(text), example)
    assert (verdict.reward, verdict.outcome) == (reward, outcome)
    assert strict(answer(text), example).reward == tinyzero


# whole response, robust, strict
TEXTS = {
    "text after, same line": (answer("(3+5)*2") + " done.", 1.0, 1.0),
    "text after, next line": (answer("(3+5)*2") + "\nI am sure.", 1.0, 0.0),
    "newline after": (answer("(3+5)*2") + "\n", 1.0, 0.0),
    "the last answer counts": (answer("1+1") + " or rather <answer>(3+5)*2</answer>", 1.0, 1.0),
    "a later wrong answer counts": (answer("(3+5)*2") + " or <answer>3+5+2</answer>", 0.1, 0.1),
    "no answer": ("It is (3+5)*2.", 0.0, 0.0),
    "never closed": ("<answer>(3+5)*2", 0.0, 0.0),
    "never opened": ("(3+5)*2</answer>", 0.0, 0.0),
    "a stray close after": ("<answer>(3+5)*2</answer></answer>", 1.0, 1.0),
    "the prefill written once more": ("<answer><answer>(3+5)*2</answer>", 1.0, 0.1),
    "with the prompt before it": (
        "User: for example <answer> (1 + 2) / 3 </answer>.\nAssistant: Let me solve this.\n<think>"
        + answer("(3+5)*2"),
        1.0,
        1.0,
    ),
    "only the prompt's own answer": (
        "User: for example <answer> (3+5)*2 </answer>.\nAssistant: Let me solve this.\n<think> I cannot.",
        1.0,  # robust mode judges the whole text: the pool passes responses without prompts
        0.0,
    ),
    "a second Assistant:": (answer("1+1") + "\nAssistant: <answer>(3+5)*2</answer>", 1.0, 1.0),
    "Assistant: after the answer": (answer("(3+5)*2") + " Assistant: bye", 1.0, 1.0),
}


@pytest.mark.parametrize("case", TEXTS)
def test_extraction(case):
    text, in_robust, in_strict = TEXTS[case]
    assert robust(text, EXAMPLE).reward == in_robust
    assert strict(text, EXAMPLE).reward == in_strict


def test_prefill_is_put_back():
    response = "(3+5)*2</answer>"
    assert robust(response, EXAMPLE).outcome == "malformed"
    assert rewards.get("countdown", prefill="<answer>")(response, EXAMPLE).outcome == "pass"
    assert rewards.get("countdown", prefill="<answer>", strict=True)(response, EXAMPLE).reward == 1.0


ATTACKS = {
    "tower of powers": "9**9**9**9",
    "large power in strict's bounds": "9**9**9",
    "nested parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "unary minus chain": "-" * 10_000 + "1",
    "short unary minus chain": "-" * 190 + "1",
    "unicode digits": "٣+٥",
    "superscript": "3²",
    "import": "__import__('os').system('true')",
    "call": "(3)(5)",
    "attribute": "(3).real",
    "huge integer": "9" * 5000,
    "huge product": "9" * 90 + "*" + "9" * 90,
    "very long": "1+" * 500_000 + "1",
    "many openings": "<answer>" * 100_000,
    "null byte": "3\0+5",
    "lone surrogate": "3+\ud800",
    "underscores": "1_6",
    "hex": "0x10",
    "leading zero": "016",
    "comparison": "16==16",
    "walrus": "(x:=16)",
    "ellipsis": "...",
    "imaginary": "16j",
    "comment": "16#",
}


@pytest.mark.parametrize("case", ATTACKS)
def test_attacks_are_quick_and_never_pass(case):
    example = {"numbers": [9, 9, 9, 9], "target": 16}
    started = time.perf_counter()
    for verify in (robust, strict):
        verdict = verify(answer(ATTACKS[case]), example)
        assert verdict.outcome in ("wrong", "malformed") and verdict.reward <= 0.1
    assert time.perf_counter() - started < 5.0


def test_strict_bounds_powers_of_the_given_numbers():
    # All numbers are used once, so that only the bound on powers prevents an endless computation.
    verdict = strict(answer("9**9**9**9"), {"numbers": [9, 9, 9, 9], "target": 1})
    assert (verdict.reward, verdict.outcome) == (0.1, "wrong")
    assert strict(answer("9**9//9**9"), {"numbers": [9, 9, 9, 9], "target": 1}).reward == 1.0


def test_scores_are_configurable():
    verify = rewards.get("countdown", scores=[2, -0.5, -1])
    assert [verify(answer(text), EXAMPLE).reward for text in ("(3+5)*2", "3+5+2", "no")] == [2.0, -0.5, -1.0]


@pytest.mark.parametrize("scores", [[1, 0], [1, 0.1, float("nan")], "abc", 5])
def test_bad_scores(scores):
    with pytest.raises(UserError, match="three finite numbers"):
        rewards.get("countdown", scores=scores)


def test_each_at_most_once():
    verify = rewards.get("countdown", use_all=False)
    assert verify(answer("8*2"), {"numbers": [8, 2, 5], "target": 16}).outcome == "pass"
    assert verify(answer("4*4"), {"numbers": [8, 4, 5], "target": 16}).outcome == "wrong"
    with pytest.raises(UserError, match="strict"):
        rewards.get("countdown", use_all=False, strict=True)


def test_depth_guard():
    assert value(parse_expression("-" * 63 + "1")) == -1
    with pytest.raises(NotAllowed, match="64 levels"):
        parse_expression("-" * 64 + "1")


def trees(leaf):
    return st.recursive(leaf, lambda part: st.tuples(part, st.sampled_from("+-*/"), part), max_leaves=6)


@given(trees(st.integers(0, 99)))
def test_value_is_python_s_and_numbers_are_those_of_the_text(tree):
    leaves = []

    def text(node):
        if isinstance(node, int):
            leaves.append(node)
            return str(node)
        return f"({text(node[0])}{node[1]}{text(node[2])})"

    def exact(node):
        if isinstance(node, int):
            return Fraction(node)
        a, b = exact(node[0]), exact(node[2])
        return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[node[1]]()

    parsed = parse_expression(text(tree))
    try:
        expected = exact(tree)
    except ZeroDivisionError:
        expected = None
    assert value(parsed) == expected
    assert integers(parsed) == sorted(leaves)
