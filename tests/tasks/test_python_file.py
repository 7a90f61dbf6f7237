import os
import sys

import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierPool

TASK = """
import time

def dataset(split):
    start = {"train": 0, "heldout": 100}[split]
    return [{"prompt": f"reverse {n} ", "text": str(n)} for n in range(start, start + 5)]

def verify(response, example):
    if response == "hang":
        time.sleep(600)
    return 1.0 if response == example["text"][::-1] else 0.25
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(text, **options):
        (tmp_path / "mine.py").write_text(text)
        return tasks.get("python", file=str(tmp_path / "mine.py"), **options)

    return load


def test_two_functions_in_a_file_through_the_pool(load):
    task = load(TASK)
    assert (task.name, len(task.train), len(task.heldout)) == ("python", 5, 5)
    row = task.heldout[3]
    assert task.prompt(row) == "reverse 103 " and task.solution(row) is None
    with VerifierPool(task.verifier, workers=2, timeout=2.0) as pool:
        verdicts = pool.verify(["301", "103", "hang", "301"], [row] * 4)
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.25, 0.0, 1.0]
    assert [verdict.outcome for verdict in verdicts] == ["pass", "wrong", "infrastructure", "pass"]


def test_prompt_solution_and_prefill(load):
    text = TASK + (
        "def prompt(example):\n    return 'Reverse ' + example['text'] + ': '\n"
        "def solution(example):\n    return example['text'][::-1][1:]\n"
    )
    task = load(text, prefill="3")
    row = task.heldout[3]
    assert task.prompt(row) == "Reverse 103: 3"
    assert task.verifier.load()(task.solution(row), row).outcome == "pass"
    chat = load(text, prefill="3", chat=True)
    assert chat.prompt(row) == [
        {"role": "user", "content": "Reverse 103:"},
        {"role": "assistant", "content": "3"},
    ]


def test_prompts_may_be_messages(load):
    messages = "[{'role': 'user', 'content': example['text']}]"
    task = load(TASK + f"def prompt(example):\n    return {messages}\n", prefill="3")
    assert task.prompt({"text": "103"}) == [
        {"role": "user", "content": "103"},
        {"role": "assistant", "content": "3"},
    ]


def replaced(old, new):
    assert old in TASK
    return TASK.replace(old, new)


BAD = {
    "no dataset": (replaced("def dataset", "def data_set"), "no function 'dataset'; did you mean 'data_set'"),
    "no verify": (replaced("def verify", "def verifi"), "no function 'verify'; did you mean 'verifi'"),
    "dataset raises": (
        replaced('"heldout": 100', '"test": 100'),
        r"dataset\('heldout'\) raised KeyError: .*line 5",
    ),
    "no rows": (
        replaced("range(start, start + 5)", "[]"),
        r"dataset\('train'\) did not return a list of rows",
    ),
    "row is no dict": (
        replaced('{"prompt": f"reverse {n} ", "text": str(n)}', "n"),
        "row 0: a row must be a dict",
    ),
    "empty row": (
        replaced('{"prompt": f"reverse {n} ", "text": str(n)}', "{}"),
        "row 0: a row must be a dict",
    ),
    "empty prompt": (replaced('f"reverse {n} "', '"x" * (n - 1)'), "row 1: no prompt|row 0: no prompt"),
    "not JSON": (replaced("str(n)", "{n}"), "row 0: rows may hold only JSON values: .*set"),
    "prompt raises": (
        TASK + "def prompt(example):\n    return example['question']\n",
        "KeyError: 'question'",
    ),
    "prompt of no type": (TASK + "def prompt(example):\n    return [1]\n", "row 0: no prompt"),
    "syntax error": ("def dataset(:\n", "SyntaxError"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(load, case):
    text, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        load(text)
    assert "\n" not in str(error.value) and "mine.py" in str(error.value)


def test_a_changed_text_is_run_whatever_bytecode_is_cached(tmp_path, monkeypatch):
    """To Python's cache, a file with the same size that was changed in the same second is the same."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, rewards = tmp_path / "mine.py", []
    for reward in ("0.25", "0.75"):
        file.write_text(TASK.replace("0.25", reward))
        os.utime(file, (0, 0))
        task = tasks.get("python", file=str(file))
        rewards.append(task.verifier.load()("nonsense", task.train[0]).reward)
    assert rewards == [0.25, 0.75]


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.py: no such file"):
        tasks.get("python", file=str(tmp_path / "none.py"))


def test_held_out_rows_that_are_trained_on_are_told(load):
    with pytest.warns(UserWarning, match="task python: 5 of 5 held-out prompts are also trained on"):
        load(replaced('"heldout": 100', '"heldout": 0'))


@pytest.mark.parametrize(
    "value, says",
    [
        ("float('nan')", "rows may hold only JSON values"),
        ("'\\ud83d'", "half a character"),
        ("eval('[' * 150 + ']' * 150)", "nested more than 100 deep"),
        ("deep", "nested more than 100 deep"),
    ],
)
def test_rows_that_no_program_can_take_are_one_line(tmp_path, value, says):
    (tmp_path / "t.py").write_text(
        "deep = []\nfor _ in range(5000): deep = [deep]\n"
        f"def dataset(split): return [{{'prompt': split}}, {{'prompt': split + 'b', 'x': {value}}}]\n"
        "def verify(response, row): return 1.0\n"
    )
    with pytest.raises(UserError, match=r"t\.py: dataset\('train'\), row 1: ") as refused:
        tasks.get("python", file=str(tmp_path / "t.py"))
    assert says in str(refused.value) and "\n" not in str(refused.value)
