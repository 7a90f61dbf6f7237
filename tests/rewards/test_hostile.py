"""Hostile texts from scripts/stress_verifiers.py, but fewer: all are scored quickly, and none is masked."""

import importlib.util
import random
import time
from pathlib import Path

import pytest

from lpo_jax import rewards
from lpo_jax.rewards import sandbox
from lpo_jax.rewards.answers import last_program
from lpo_jax.rewards.same import same_output, same_result

SCRIPT = Path(__file__).parents[2] / "scripts" / "stress_verifiers.py"
WHY_NOT = sandbox.why_not("bubblewrap")


def _script():
    spec = importlib.util.spec_from_file_location("stress_verifiers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STRESS = _script()


NAMES = [*STRESS.VERIFIERS, "printed output", "results"]  # `judges()` imports what the verifiers need


@pytest.mark.parametrize("name", NAMES)
def test_hostile_texts_are_scored(name):
    if name == "code" and WHY_NOT:
        pytest.skip(f"no bubblewrap here: {WHY_NOT}")
    judges = dict(STRESS.judges())
    assert list(judges) == NAMES
    items = 20 if name in ("code", "math") else 100
    # Processor time, so that a busy machine fails no test; scripts/stress_verifiers.py measures wall-clock time.
    assert STRESS.judge_hostile(name, judges[name], items=items, seed=1, clock=time.process_time)


# Texts of 256 KB that took quadratic time, or would with a careless pattern.
SIZE = 1 << 18
LONG = {
    "digits": "1" * SIZE + "x",
    "digits and points": "1." * (SIZE // 2) + "x",
    "exponents": "1e" * (SIZE // 2),
    "fraction": "0." + "1" * SIZE + "x",
    "blanks": " " * SIZE + "x",
    "quotation marks": "```python\n" + "'''\n```\n" * (SIZE // 8),
    "escaped quotation marks": "```python\n'''\n" + "\\'''\n```\n```python\n'''\n" * (SIZE // 24),
    "strings that are never closed": "```python\n'''\n\\'''\n```\n" * (SIZE // 24),
    "blocks": "```python\n'''\n```\n" * (SIZE // 18),
    "fences": "```\n" * (SIZE // 4),
    "boxes": "\\boxed   " * (SIZE // 9),
    "hashes": "####" * (SIZE // 4),
    "tags": "<answer>" * (SIZE // 8),
    "labels": "answer \t" * (SIZE // 8),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_takes_no_time(name):
    text, started = LONG[name], time.thread_time()
    for expected in ("1", "1.5", "1" * 100):
        assert not same_output(text, expected)
        assert not same_result(text.encode(), float(expected))
    last_program(text)
    for source, options, row in (
        ("arithmetic", {}, {"answer": 1}),
        ("countdown", {}, {"numbers": [1], "target": 1}),
        ("countdown", {"strict": True}, {"numbers": [1], "target": 1}),
        ("gsm8k", {}, {"answer": "1"}),
        ("math", {}, {"answer": "1"}),
        ("math", {"extract": "answer_line"}, {"answer": "1"}),
        ("math", {"mode": "strict"}, {"answer": "1"}),
        ("format", {}, {}),
    ):
        assert not rewards.get(source, **options)(text, row).masked
    assert time.thread_time() - started < 10  # a fraction of a second; a quadratic pattern takes minutes


@pytest.mark.skipif(bool(WHY_NOT), reason=f"no bubblewrap here: {WHY_NOT}")
def test_no_output_of_a_program_drives_the_comparison_over_the_limit():
    """Otherwise the sample would be masked, and the program would avoid its 0."""
    row = {"tests": {"inputs": ["1"], "outputs": ["1"]}}
    call = {"tests": {"fn_name": "f", "inputs": ["1"], "outputs": ["1.5"]}}
    with rewards.VerifierPool("code", workers=1, timeout=10.0) as pool:
        printed = ["'1' * 20000 + 'x'", "'1' * 4_000_000 + 'x'", "'1.' * 2_000_000", "'0.' + '1' * 4_000_000"]
        programs = [f"```python\nprint({text})\n```" for text in printed]
        values = [
            "16 ** 400_000",
            "[[]] * 10 ** 5",
            "'1' * 4_000_000",
        ]
        functions = [f"```python\ndef f(n): return {value}\n```" for value in values]
        verdicts = pool.verify([*programs, *functions], [row] * len(programs) + [call] * len(functions))
    assert {verdict.outcome for verdict in verdicts} <= {"wrong", "timeout"}


def test_an_exception_of_the_comparison_is_the_answers_fault(monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("in a library")

    monkeypatch.setattr("lpo_jax.rewards.structure.same_answer", fail)
    verdict = rewards.get("math")(r"\boxed{\sqrt{2}}", {"answer": "5"})
    assert verdict.outcome == "wrong"
    assert verdict.parts["reason"] == "the comparison raised ZeroDivisionError: in a library"


def test_the_generator_makes_texts_of_the_length_asked_for():
    rng = random.Random(0)
    lengths = [len(STRESS.hostile(rng, 1000)) for _ in range(300)]
    assert max(lengths) <= 1001 and min(lengths) >= 900
