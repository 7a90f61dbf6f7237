import itertools
import re
from fractions import Fraction

import pytest

from lpo_jax import rewards, tasks
from lpo_jax.errors import UserError

SHORT = {"numbers": 3, "max_number": 9, "operators": "+-*", "template": "short"}
SMALL = {"train_size": 60, "heldout_size": 20}


def solvable(numbers, target, operators):
    """Solve by brute force: join every pair in every way until one number is left."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [number for i, number in enumerate(numbers) if i not in (a, b)]
        x, y = numbers[a], numbers[b]
        values = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}
        if any(solvable([*rest, values[o]], target, operators) for o in operators if values[o] is not None):
            return True
    return False


def problem(row):
    return tuple(sorted(row["numbers"])), row["target"]


@pytest.mark.parametrize(
    "options",
    [SHORT, {"numbers": [3, 4], "max_number": 30, "operators": "+-*/"}, {"numbers": 2, "operators": "/"}],
)
def test_countdown_rows_are_solvable_distinct_and_within_bounds(options):
    task = tasks.get("countdown", **options, **SMALL, max_target=50)
    rows = [*task.train, *task.heldout]
    assert (len(task.train), len(task.heldout)) == (60, 20)
    assert len({problem(row) for row in rows}) == 80  # so no held-out problem is trained on
    counts = options["numbers"] if isinstance(options["numbers"], list) else [options["numbers"]]
    assert {len(row["numbers"]) for row in rows} == set(counts)
    for row in rows:
        assert all(1 <= number <= options.get("max_number", 99) for number in row["numbers"])
        assert 1 <= row["target"] <= 50
        assert set(row["solution"]) <= set("0123456789()") | set(options["operators"])
        assert solvable([Fraction(number) for number in row["numbers"]], row["target"], options["operators"])


def test_brute_force_can_say_no():
    assert not solvable([Fraction(n) for n in (1, 1, 1)], 50, "+-*/")


@pytest.mark.parametrize("template", ["short", "tinyzero"])
@pytest.mark.parametrize("strict", [False, True])
def test_countdown_solutions_pass_their_own_verifier(template, strict):
    task = tasks.get("countdown", template=template, strict=strict, **SMALL)
    verify = task.verifier.load()
    for row in [*task.train, *task.heldout]:
        assert verify(task.solution(row), row).reward == 1.0
        assert verify(task.solution(row), row | {"target": row["target"] + 1}).reward == 0.1


def test_solutions_have_no_needless_parentheses():
    from lpo_jax.rewards.expression import parse_expression, value

    primes = iter([101, 211, 307, 401] * 1000)
    seen = 0
    for row in tasks.get("countdown", **SMALL, numbers=4, max_number=20).train:
        # With other numbers, removing any necessary pair of parentheses changes the value.
        text = re.sub(r"\d+", lambda _: str(next(primes)), row["solution"])
        stack = []
        for i, character in enumerate(text):
            if character == "(":
                stack.append(i)
            elif character == ")":
                start = stack.pop()
                bare = text[:start] + text[start + 1 : i] + text[i + 1 :]
                assert value(parse_expression(bare)) != value(parse_expression(text))
                seen += 1
    assert seen > 10


def test_countdown_prompts():
    row = {"numbers": [3, 5, 2], "target": 16, "solution": "(3+5)*2"}
    short = tasks.get("countdown", **SHORT, **SMALL)
    assert short.prompt(row) == "Using the numbers [3, 5, 2], create an equation that equals 16.\n<answer>"
    assert (short.prefill, short.solution(row)) == ("<answer>", "(3+5)*2</answer>")
    assert short.solution({"numbers": [3, 5], "target": 8}) is None
    tinyzero = tasks.get("countdown", **SMALL)
    assert tinyzero.prompt(row) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer.\n"
        "User: Using the numbers [3, 5, 2], create an equation that equals 16. You can use basic "
        "arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in <think> "
        "</think> tags. And return the final answer in <answer> </answer> tags, for example <answer> "
        "(1 + 2) / 3 </answer>.\nAssistant: Let me solve this step by step.\n<think>"
    )
    format_reward = rewards.get("format", prefill=tinyzero.prefill)
    assert format_reward(tinyzero.solution(row), row).outcome == "pass"


def test_countdown_depends_on_the_seed_alone():
    first, again, other = (tasks.get("countdown", **SHORT, **SMALL, seed=seed) for seed in (0, 0, 1))
    assert first.train == again.train and first.content_hash == again.content_hash
    assert first.content_hash != other.content_hash
    # The problems must be the same on every machine and Python version, so that runs can be compared.
    assert first.train[0] == {"numbers": [5, 8, 1], "target": 14, "solution": "1+8+5"}
    assert first.content_hash.startswith("517ef812d87e5c97")


def test_sizes_do_not_change_the_other_rows():
    small = tasks.get("countdown", **SHORT, train_size=10, heldout_size=20)
    large = tasks.get("countdown", **SHORT, train_size=60, heldout_size=20)
    assert small.heldout == large.heldout and small.train == large.train[:10]


def test_arithmetic():
    task = tasks.get("arithmetic", terms=3, max_number=20, **SMALL)
    rows = [*task.train, *task.heldout]
    assert len({tuple(sorted(row["terms"])) for row in rows}) == 80
    verify = task.verifier.load()
    for row in rows:
        assert row["answer"] == sum(row["terms"]) and len(row["terms"]) == 3
        assert verify(task.solution(row), row).outcome == "pass"
        assert verify(task.solution(row), row | {"answer": row["answer"] + 1}).outcome == "wrong"
    assert task.prompt({"terms": [1, 2, 3]}) == "1 + 2 + 3 = ?\n<answer>"


def test_chat():
    raw, chat = (
        tasks.get("arithmetic", **SMALL, **options) for options in ({}, {"chat": True, "system": "Add."})
    )
    assert chat.prompt({"terms": [1, 2]}) == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 2 = ?"},
        {"role": "assistant", "content": "<answer>"},
    ]
    assert chat.content_hash == raw.content_hash and chat.verifier == raw.verifier


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, "did you mean 'countdown'"),
        ("countdown", {"train_sise": 5}, "did you mean 'train_size'"),
        ("countdown", {"train_size": "5"}, "must be of type int"),
        ("countdown", {"train_size": 0}, "at least 1 of each"),
        ("countdown", {"numbers": 1}, "from 2 to 8"),
        ("countdown", {"numbers": []}, "from 2 to 8"),
        ("countdown", {"operators": "+^"}, "operators"),
        ("countdown", {"template": "tinyzer"}, "did you mean 'tinyzero'"),
        ("countdown", {"max_number": 0}, "at least 1"),
        ("countdown", {"scores": [1]}, "three finite numbers"),
        (
            "countdown",
            {"numbers": 2, "max_number": 2, "train_size": 50},
            "found only [0-9]+ different problems",
        ),
        ("arithmetic", {"max_number": 3, "train_size": 50}, "found only 10 different problems"),
        ("arithmetic", {"terms": 1}, "2 terms"),
        ("arithmetic", {"system": "Add."}, "chat"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        tasks.get(name, **options)
    assert "\n" not in str(error.value)
