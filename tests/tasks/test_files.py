import json
import subprocess
import sys

import pytest

from lpo_jax import rewards, tasks
from lpo_jax.errors import UserError

FORM = {"prompt": "Q: {question} Write \\boxed{}.\n", "verifier": "arithmetic", "fields": {"answer": "final"}}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def question(n):
    return {"question": f"{n} + 1?", "final": n + 1, "steps": f"{n}+1={n + 1}", "level": "é"}


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "train.jsonl", [question(n) for n in range(20)])


def test_jsonl(file):
    task = tasks.get("jsonl", path=file, **FORM, prefill="<think>", solution="{steps}</think> {final}")
    row = task.train[0]
    assert row["answer"] == row["final"] and row["level"] == "é"
    assert task.prompt(row) == f"Q: {row['question']} Write \\boxed{{}}.\n<think>"
    assert task.solution(row) == f"{row['steps']}</think> {row['final']}"
    assert task.verifier == rewards.VerifierSpec("arithmetic", prefill="<think>")
    verify = task.verifier.load()
    assert verify(task.solution(row), row).outcome == "pass"
    assert verify(str(row["answer"] + 1), row).outcome == "wrong"


def test_jsonl_split_by_seed(file, tmp_path):
    def split(seed, path=file):
        task = tasks.get("jsonl", path=path, **FORM, heldout_fraction=0.25, seed=seed)
        return [[row["final"] for row in rows] for rows in (task.train, task.heldout)]

    train, heldout = split(0)
    assert (len(train), len(heldout)) == (15, 5)
    assert sorted(train + heldout) == list(range(1, 21))
    assert split(0) == [train, heldout] and split(1)[1] != heldout
    # Rows with the same prompt stay together, and the order in the file does not matter.
    shuffled = write(tmp_path / "twice.jsonl", [question(n) for n in range(19, -1, -1)] * 2)
    again = split(0, shuffled)
    assert sorted(again[1]) == sorted(heldout * 2) and not set(again[0]) & set(again[1])


def test_jsonl_held_out_file(file, tmp_path):
    other = write(tmp_path / "test.jsonl", [question(n) for n in range(30, 33)])
    task = tasks.get("jsonl", path=file, heldout=other, **FORM)
    assert (len(task.train), len(task.heldout)) == (20, 3)
    with pytest.warns(UserWarning, match="20 of 20 held-out prompts are also trained on"):
        tasks.get("jsonl", path=file, heldout=file, **FORM)


def test_jsonl_content_hash_is_that_of_the_content(file, tmp_path):
    same = write(tmp_path / "same.jsonl", [json.dumps(question(n), sort_keys=True) for n in range(20)])
    other = write(tmp_path / "other.jsonl", [question(n) | {"level": "e"} for n in range(20)])
    hashes = [tasks.get("jsonl", path=path, **FORM).content_hash for path in (file, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


BAD = {
    "missing prompt field": ([question(1), {"final": 2}], r"train.jsonl:2: no field 'question'"),
    "missing answer": (
        [question(1), {"question": "a", "finl": 2}],
        r":2: no field 'final'; did you mean 'finl'",
    ),
    "null": ([question(1), question(2), question(3) | {"final": None}], r":3: the field 'answer' is empty"),
    "blank": ([question(1) | {"question": "  "}], r":1: the field 'question' is empty"),
    "an id twice": ([question(1) | {"id": 4}, question(2) | {"id": 4}], r":2: its id 4 is also that of .*:1"),
    "empty line": ([question(1), "", question(2)], r":2: the line is empty"),
    "empty row": ([question(1), {}], r":2: the row is empty"),
    "not JSON": ([question(1), "{'a': 1}"], r":2: not JSON"),
    "not an object": ([question(1), "[1, 2]"], r":2: a row must be a JSON object"),
    "empty file": ([], r"train.jsonl: the file is empty"),
    "one row": ([question(1)], r"cannot hold out 0.1 of 1 different prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_jsonl_bad_files(tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        tasks.get("jsonl", path=write(tmp_path / "train.jsonl", rows), **FORM)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verifier", ["arithmetic", "gsm8k", "math"])
def test_jsonl_gold_answers_that_the_verifier_cannot_read(tmp_path, verifier):
    path = write(tmp_path / "a.jsonl", [*map(question, range(5)), question(5) | {"final": "\\frac{two"}])
    options = {"path": path, **FORM, "verifier": verifier}
    with pytest.warns(
        UserWarning, match=r"1 of 6 rows have a gold answer that cannot be used \(first: .*a.jsonl:6"
    ):
        task = tasks.get("jsonl", **options)
    assert len(task.train) + len(task.heldout) == 5 and task.about["train"]["skipped"] == 1
    with pytest.raises(UserError, match=r"1 of 6 rows .*a.jsonl:6.*strict: false"):
        tasks.get("jsonl", **options, strict=True)


def test_jsonl_takes_any_source(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([question(n) for n in range(10)]))
    assert len(tasks.get("jsonl", path=str(tmp_path / "rows.json"), **FORM).train) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "none.jsonl"}, r"none\.jsonl: No such file"),
        ({"heldout": "none.jsonl"}, r"none\.jsonl: No such file"),
        ({"prompt": "no field at all"}, "every prompt would be the same"),
        ({"prompt": "{problem}"}, "no field 'problem'"),
        ({"solution": "{stepz}"}, "no field 'stepz'; did you mean 'steps'"),
        ({"verifier": "arithmetik"}, "did you mean 'arithmetic'"),
        ({"verifier": "countdown"}, "no field 'numbers'"),
        ({"verifier_options": {"score": 1}}, "did you mean 'scores'"),
        ({"fields": "final"}, "must be a mapping"),
        ({"heldout_fraction": 1.0}, "cannot hold out 1.0"),
    ],
)
def test_jsonl_bad_options(file, options, message):
    with pytest.raises(UserError, match=message):
        tasks.get("jsonl", **{"path": file, **FORM, **options})


def test_required_options_are_named():
    with pytest.raises(UserError, match="task jsonl needs the option 'path'"):
        tasks.get("jsonl", prompt="{a}", verifier="arithmetic")


def test_not_utf8(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(
        b'{"question": "a", "final": 1}\n{"question": "\xe9", "final": 1}\n'
    )
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8"):
        tasks.get("jsonl", path=str(tmp_path / "latin.jsonl"), **FORM)


@pytest.fixture(scope="module")
def builder_dir(tmp_path_factory):
    import numpy as np
    import tensorflow_datasets as tfds

    class Sums(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "parts": tfds.features.Sequence(np.int64),
                "final": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {
                "train": self._generate_examples(range(12)),
                "test": self._generate_examples(range(12, 16)),
            }

        def _generate_examples(self, numbers):
            for n in numbers:
                yield n, {"question": f"{n} + 1 é?", "parts": [n, 1], "final": n + 1}

    builder = Sums(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_tfds_reads_array_record_without_tensorflow(builder_dir):
    task = tasks.get("tfds", path=builder_dir, **FORM)
    assert (len(task.train), len(task.heldout)) == (12, 4)
    rows = list(task.train)
    assert sorted(row["final"] for row in rows) == list(range(1, 13))
    for row in rows:
        n = row["final"] - 1
        assert row == {"question": f"{n} + 1 é?", "parts": [n, 1], "final": n + 1, "answer": n + 1}
    assert task.train[5] == rows[5] and task.train[2:5] == rows[2:5]
    assert "tensorflow" not in sys.modules
    batches = tasks.PromptIterator(task.train, prompts=4, seed=0, data_hash=task.content_hash)
    assert all(row == rows[index] for _ in range(4) for index, row in next(batches))
    sliced = tasks.get("tfds", path=builder_dir, **FORM, train="train[:50%]", heldout="train[50%:]")
    assert (len(sliced.train), len(sliced.heldout)) == (6, 6)


def test_tfds_hash_is_that_of_the_rows(builder_dir, tmp_path):
    task = tasks.get("tfds", path=builder_dir, **FORM)
    train, test = (
        write(tmp_path / name, [{k: v for k, v in row.items() if k != "answer"} for row in rows])
        for name, rows in (("train.jsonl", task.train), ("test.jsonl", task.heldout))
    )
    assert tasks.get("jsonl", path=train, heldout=test, **FORM).content_hash == task.content_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": "validation"}, "split 'validation'.*it has train, test"),
        ({"fields": {"answer": "finl"}}, "split train, row 0: no field 'finl'; did you mean 'final'"),
        ({"path": "nowhere"}, "nowhere: not a prepared TFDS builder"),
        ({"fields": {"answer": "question"}}, "split train, row 0: its gold answer cannot be used"),
    ],
)
def test_tfds_errors(builder_dir, options, message):
    with pytest.raises(UserError, match=message) as error:
        tasks.get("tfds", **{"path": builder_dir, **FORM, **options})
    assert "\n" not in str(error.value)


def test_reading_a_builder_imports_no_tensorflow(builder_dir):
    code = f"""
import sys
from lpo_jax import tasks
fields = {{"answer": "final"}}
task = tasks.get("tfds", path={builder_dir!r}, prompt="{{question}}", verifier="arithmetic", fields=fields)
print(len(task.train), "tensorflow" in sys.modules, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "12 False False\n"


NO_ANSWERS = [
    "true",
    "false",
    "NaN",
    "Infinity",
    "-Infinity",
    '{"value": 5}',
    '"\\ud83d5"',
    "[1, NaN]",
    "[true]",
]


@pytest.mark.parametrize("verifier", ["arithmetic", "gsm8k", "math"])
def test_gold_answers_that_are_no_text_and_no_number(tmp_path, verifier):
    rows = [
        f'{{"question": "q{n}", "final": {answer}}}' for n, answer in enumerate(["5", *NO_ANSWERS, '"6"'])
    ]
    path = write(tmp_path / "a.jsonl", rows)
    options = {"path": path, **FORM, "verifier": verifier}
    with pytest.warns(
        UserWarning, match=rf"{len(NO_ANSWERS)} of {len(rows)} rows .*a\.jsonl:2: the answer is True"
    ):
        task = tasks.get("jsonl", **options)
    assert sorted(str(row["answer"]) for row in [*task.train, *task.heldout]) == ["5", "6"]
    with pytest.raises(UserError, match=rf"{len(NO_ANSWERS)} of {len(rows)} rows .*a\.jsonl:2"):
        tasks.get("jsonl", **options, strict=True)


@pytest.mark.parametrize("task, problem", [("math", "problem"), ("gsm8k", "question")])
def test_gold_answers_of_file_tasks_that_are_no_text_and_no_number(tmp_path, task, problem):
    answers = ["5", *NO_ANSWERS, '"6"']
    rows = [f'{{"{problem}": "q{n}", "answer": {answer}}}' for n, answer in enumerate(answers)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.warns(
        UserWarning, match=rf"{len(NO_ANSWERS)} of {len(rows)} rows .*a\.jsonl:2: the answer is True"
    ):
        found = tasks.get(task, path=path)
    assert sorted(row["answer"] for row in [*found.train, *found.heldout]) == ["5", "6"]


@pytest.mark.parametrize(
    "row, says",
    [
        ('{"question": "\\ud83d", "final": 1}', "holds half a character"),
        ('{"question": NaN, "final": 1}', "'question' is nan"),
        ('{"question": "q", "final": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 deep"),
        (
            '{"question": "q", "final": 1, "x": ' + '{"a":' * 101 + "1" + "}" * 101 + "}",
            "nested more than 100 deep",
        ),
    ],
)
def test_rows_that_no_program_can_take_name_file_and_line(tmp_path, row, says):
    path = write(tmp_path / "a.jsonl", [question(1), row, question(2)])
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as refused:
        tasks.get("jsonl", path=path, **FORM)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    (tmp_path / "a.json").write_text(f"[{row}]")
    with pytest.raises(UserError, match=r"a\.json: .*row"):
        tasks.get("jsonl", path=str(tmp_path / "a.json"), **FORM)


def test_separators_of_lines_inside_a_row_do_not_part_it(tmp_path):
    text = "one\u2028two\u2029three\u0085four"
    rows = [json.dumps({"question": f"{text}{n}", "final": n}, ensure_ascii=False) + "\r" for n in range(3)]
    task = tasks.get("jsonl", path=write(tmp_path / "a.jsonl", rows), **FORM)
    assert sorted(row["question"][-1] for row in [*task.train, *task.heldout]) == ["0", "1", "2"]
