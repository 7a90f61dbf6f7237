"""Countdown, GSM8K and mathematics from files: conversion of rows, prompts, and refused rows."""

import re
import warnings

import pytest

from lpo_jax import rewards, tasks
from lpo_jax.errors import UserError
from lpo_jax.tasks import splits

COUNTDOWN = [{"target": 20 + n, "nums": [n, 20, 7, 9][: 3 + n % 2]} for n in range(1, 41)]
MATH = [{"problem": f"What is ${n} + 1$?", "answer": str(n + 1), "level": 1} for n in range(40)]


def problems(rows):
    return [(sorted(row["numbers"]), row["target"]) for row in rows]


def questions(rows):
    return [row["problem"] for row in rows]


def test_countdown(write):
    path = write("a.parquet", COUNTDOWN)
    task = tasks.get("countdown", path=path, train_size=20, heldout_size=10)
    assert (len(task.train), len(task.heldout)) == (20, 10)
    assert set(task.train[0]) == {"numbers", "target"}
    assert not [problem for problem in problems(task.train) if problem in problems(task.heldout)]
    row = task.train[0]
    assert str(row["numbers"]) in task.prompt(row) and task.prompt(row).endswith("<think>")
    assert task.solution(row) is None and task.verifier.source == "countdown"


def test_countdown_four(write):
    """Read Countdown-4 from a file with both tasks; JSON files say `numbers`, others `nums`."""
    path = write("a.jsonl", [{"numbers": row["nums"], "target": row["target"]} for row in COUNTDOWN])
    task = tasks.get("countdown", path=path, numbers=4, train_size=0, heldout_size=5)
    assert {len(row["numbers"]) for row in [*task.train, *task.heldout]} == {4}
    assert (len(task.train), len(task.heldout)) == (15, 5)
    assert task.about["train"]["other_kind"] == 20


def test_countdown_problems_are_the_same_in_any_order(write):
    path = write("a.jsonl", [*COUNTDOWN, *({**row, "nums": row["nums"][::-1]} for row in COUNTDOWN[:8])])
    heldout = write("b.jsonl", [{**row, "nums": row["nums"][1:] + row["nums"][:1]} for row in COUNTDOWN[30:]])
    task = tasks.get("countdown", path=path, heldout=heldout, train_size=0, heldout_size=4)
    # The whole held-out file is excluded from training, not only the rows drawn from it.
    assert (len(task.train), len(task.heldout)) == (30, 4)
    assert task.about["train"]["duplicates"] == 8 and task.about["train"]["held_out"] == 10


def test_draws_depend_on_the_seed_and_held_out_rows_on_nothing_else(write):
    path = write("a.jsonl", COUNTDOWN)

    def draw(**options):
        task = tasks.get("countdown", path=path, **{"train_size": 10, "heldout_size": 8, **options})
        return problems(task.train), problems(task.heldout)

    assert draw() == draw() and draw()[1] == draw(train_size=20)[1]
    assert draw(seed=1)[0] != draw()[0] and draw(seed=1)[1] != draw()[1]
    hashes = {
        tasks.get("countdown", path=path, train_size=9, heldout_size=5, seed=s).content_hash
        for s in (0, 0, 1)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [1, 2, 3]}, r":41: no field 'target'; it has nums"),
        ({"target": 3}, r":41: no field 'nums'"),
        ({"nums": [1, "2", 3], "target": 3}, "need a list of whole numbers"),
        ({"nums": [1, 2, 3], "target": 3.5}, "and a whole number"),
        ({"nums": 12, "target": 3}, "need a list of whole numbers"),
    ],
)
def test_countdown_bad_rows(write, row, message):
    with pytest.raises(UserError, match=message):
        tasks.get("countdown", path=write("a.jsonl", [*COUNTDOWN, row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "heldout_size 512 is more than its 40 different problems"),
        ({"heldout_size": 20}, "train_size 2000 is more than its 20 different problems"),
        ({"heldout_size": 40, "train_size": 0}, "leaves none of its 40 rows to train on"),
        ({"heldout_size": -1}, "0 or more"),
        ({"max_number": 9}, "apply only to generated problems"),
        ({"numbers": 5}, "none of its 40 rows can be used: 0 skipped, 40 other kind"),
        ({"path": "none.parquet"}, "none.parquet: No such file"),
    ],
)
def test_countdown_bad_options(write, options, message):
    with pytest.raises(UserError, match=message):
        tasks.get("countdown", **{"path": write("a.jsonl", COUNTDOWN), **options})


def test_math_as_the_paper_asks_it(write):
    task = tasks.get("math", path=write("a.json", MATH))
    row = task.train[0]
    assert task.prompt(row) == (
        f"{row['problem']} Let's think step by step and output the final answer within \\boxed{{}}."
    )
    assert (len(task.train), len(task.heldout)) == (36, 4)  # a tenth is held out
    verify = task.verifier.load()
    for row in [*task.train, *task.heldout]:
        assert verify(f"So \\boxed{{{row['answer']}}}.", row).outcome == "pass"
        assert verify(f"So \\boxed{{{row['answer']}1}}.", row).outcome == "wrong"


SHAPES = {
    "MATH": {"problem": "P?", "solution": r"First \boxed{1}, so \boxed{\frac{1}{2}}.", "level": "Level 5"},
    "OlympiadBench": {
        "question": "P?",
        "final_answer": [r"$\frac{1}{2}$"],
        "solution": ["a proof"],
        "unit": None,
    },
    "DeepScaleR": {"problem": "P?", "answer": r"\frac{1}{2}", "solution": "no box"},
    "verl": {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": "P? Let's think step by step and output the final answer within \\boxed{}.",
            },
        ],
        "ability": "math",
        "reward_model": {"ground_truth": r"\frac{1}{2}", "style": "rule"},
    },
    "R1": {
        "prompt": [
            {
                "role": "user",
                "content": "A conversation between User and Assistant.\nUser: P?\nAssistant: <think>",
            }
        ],
        "reward_model": {"ground_truth": r"\frac{1}{2}"},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_math_shapes(write, shape, suffix):
    task = tasks.get("math", heldout=write(f"a.{suffix}", [SHAPES[shape]]))
    (row,) = task.heldout
    assert row["problem"] == "P?" and not len(task.train)
    assert row["answer"].strip("$") == r"\frac{1}{2}"
    assert task.verifier.load()(r"\boxed{0.5}", row).outcome == "pass"
    solution = task.solution(row)
    assert (solution is not None) == (shape == "MATH")
    assert solution is None or task.verifier.load()(solution, row).outcome == "pass"


def test_other_names_and_templates(write):
    path = write("a.jsonl", [{"q": f"P{n}?", "meta": {"final": n}} for n in range(3)])
    fields = {"problem": "q", "answer": "meta.final"}
    task = tasks.get("math", heldout=path, fields=fields, template="Q: {problem}\nA:")
    assert [task.prompt(row) for row in task.heldout] == [f"Q: P{n}?\nA:" for n in range(3)]
    assert [row["answer"] for row in task.heldout] == ["0", "1", "2"]
    chat = tasks.get("math", heldout=path, fields=fields, template="qwen", chat=True).prompt(task.heldout[1])
    assert [message["role"] for message in chat] == ["system", "user"] and chat[1]["content"] == "P1?"
    raw = tasks.get("math", heldout=path, fields=fields, chat=True, system="Hm.").prompt(task.heldout[1])
    assert raw[0]["content"] == "Hm." and raw[1]["content"].startswith("P1? Let's think")


def test_a_problem_with_braces_is_asked_as_it_is(write):
    r"""`{problem}` in the row's own text is not replaced, and \boxed{} is not a field."""
    task = tasks.get(
        "math", heldout=write("a.jsonl", [{"problem": r"{problem} $\frac{a}{b}$", "answer": "1"}])
    )
    assert task.prompt(task.heldout[0]).startswith(r"{problem} $\frac{a}{b}$ Let's")


def test_gold_answers_that_cannot_be_used(write):
    bad = [{"problem": f"bad {n}", "answer": answer} for n, answer in enumerate((None, " ", "\\frac{1"))]
    path = write("a.json", [*MATH, *bad])
    with pytest.warns(
        UserWarning, match=r"3 of 43 rows have a gold answer .* \(first: .*: row 40: the answer is"
    ):
        task = tasks.get("math", path=path)
    assert len(task.train) + len(task.heldout) == 40 and task.about["train"]["skipped"] == 3
    with pytest.raises(UserError, match=r"3 of 43 rows .*row 40.*strict: false") as error:
        tasks.get("math", path=path, strict=True)
    assert "\n" not in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks.get("math", path=write("b.json", MATH), strict=True)


def test_held_out_problems_are_not_trained_on(write):
    path, heldout = write("a.jsonl", MATH), write("b.jsonl", [{"problem": "What  is\n$3+1$?", "answer": "4"}])
    task = tasks.get("math", path=path, heldout=heldout)
    assert "What is $3 + 1$?" not in questions(task.train) and len(task.train) == 39
    assert task.about["train"]["held_out"] == 1


def test_at_most_so_many_are_held_out_of_the_training_file(write, monkeypatch):
    monkeypatch.setattr(splits, "MOST_HELD_OUT", 3)
    task = tasks.get("math", path=write("a.jsonl", MATH))
    assert (len(task.train), len(task.heldout)) == (37, 3)


GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many?",
    "answer": "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}


def test_gsm8k(write):
    rows = [GSM8K, {"question": "Q", "answer": "#### 1,080"}, {"question": "R", "answer": 5}]
    task = tasks.get("gsm8k", heldout=write("a.jsonl", rows))
    row = task.heldout[0]
    assert task.prompt(row).endswith(
        'How many? Let\'s think step by step and output the final answer after "####".'
    )
    assert task.solution(row) == " In May 48/2 = 24.\nIn all 48+24 = 72.\n#### 72"
    assert [row["answer"] for row in task.heldout] == ["72", "1,080", "5"]
    verify = task.verifier.load()
    for row, right, wrong in zip(task.heldout, ("72", "1080", "5.0"), ("7", "1", "5.1")):
        assert (
            verify(f"#### {right}", row).outcome == "pass" and verify(f"#### {wrong}", row).outcome == "wrong"
        )
    assert verify(task.solution(task.heldout[0]), task.heldout[0]).outcome == "pass"
    assert task.solution(task.heldout[2]) is None


def test_gsm8k_in_verls_shape(write):
    row = {
        "prompt": [{"role": "user", "content": GSM8K["question"] + " Let's ..."}],
        "reward_model": {"ground_truth": "72", "style": "rule"},
        "extra_info": {"question": GSM8K["question"], "answer": GSM8K["answer"]},
    }
    task = tasks.get("gsm8k", heldout=write("a.parquet", [row]))
    assert (task.heldout[0]["question"], task.heldout[0]["answer"]) == (GSM8K["question"], "72")


def test_gsm8k_gold_that_is_no_number(write):
    with pytest.warns(UserWarning, match=r"1 of 2 rows .*a.jsonl:2"):
        tasks.get("gsm8k", heldout=write("a.jsonl", [GSM8K, {"question": "Q", "answer": "many"}]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("math", {}, "task math needs the option 'path', or 'heldout' for evaluation only"),
        ("math", {"path": "{file}", "template": "boxd"}, "unknown template 'boxd'; did you mean 'boxed'"),
        ("math", {"path": "{file}", "template": "{question}?"}, r"write one with \{problem\} in it once"),
        ("math", {"path": "{file}", "fields": {"anser": "a"}}, "no field 'anser'; did you mean 'answer'"),
        ("math", {"path": "{file}", "fields": "answer"}, "must be a mapping"),
        (
            "math",
            {"path": "{file}", "fields": {"answer": "anwser"}},
            ":1: no field 'anwser'; did you mean 'answer'",
        ),
        ("math", {"path": "{file}", "verifier_options": {"mod": "strict"}}, "did you mean 'mode'"),
        ("math", {"path": "{file}", "strict": "yes"}, "strict is 'yes', but must be of type bool"),
        (
            "gsm8k",
            {"path": "{file}", "template": "boxed", "pth": "x"},
            "no option 'pth'; did you mean 'path'",
        ),
        ("math", {"heldout": "{file}", "heldout_size": 41}, "heldout_size 41 is more than its 40"),
    ],
)
def test_bad_options(write, name, options, message):
    file = write("a.jsonl", MATH)
    with pytest.raises(UserError, match=message) as error:
        tasks.get(name, **{k: file if v == "{file}" else v for k, v in options.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "P"}, r"a.jsonl:41: no field 'answer'; it has problem \(set the option fields"),
        ({"answer": "1"}, r"a.jsonl:41: no field 'problem'"),
        ({"problem": "", "answer": "1"}, r":41: the field 'problem' is empty"),
        ({"problem": 7, "answer": "1"}, r":41: the field 'problem' is '7', not text"),
    ],
)
def test_bad_rows(write, row, message):
    with pytest.raises(UserError, match=message):
        tasks.get("math", path=write("a.jsonl", [*MATH, row]))


def test_duplicate_ids_are_refused_in_every_file_task(write):
    path = write(
        "a.jsonl", [{"id": 1, "problem": "P", "answer": "1"}, {"id": 1, "problem": "Q", "answer": "2"}]
    )
    plain = {"path": path, "prompt": "{problem}", "verifier": "math"}
    for name, options in (("math", {"path": path}), ("jsonl", plain)):
        with pytest.raises(UserError, match=re.escape(f"{path}:2: its id 1 is also that of {path}:1")):
            tasks.get(name, **options)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "\\ud83d?", "answer": "1"}\n')
    assert tasks.get("math", heldout=str(tmp_path / "a.jsonl")).heldout[0]["problem"] == "??"


def test_verifier_options_reach_the_verifier(write):
    task = tasks.get("math", heldout=write("a.jsonl", MATH), verifier_options={"mode": "strict"})
    assert task.verifier == rewards.VerifierSpec("math", {"mode": "strict"})
