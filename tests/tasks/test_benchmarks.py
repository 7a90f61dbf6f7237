"""Suites: the paper's benchmarks and numbers of samples, from a folder or the hub."""

import warnings

import pytest

from lpo_jax.errors import UserError
from lpo_jax.tasks import benchmarks

PAPER = {"aime24": 32, "aime25": 32, "amc23": 32, "minerva": 4, "math500": 1, "olympiadbench": 1}
MATH = [{"problem": f"{n}?", "answer": n} for n in range(3)]


def test_the_papers_samples():
    assert {b.name: b.k for b in benchmarks.get_suite("math")} == PAPER
    for name in ("countdown", "countdown-generated"):
        assert [(b.name, b.k) for b in benchmarks.get_suite(name)] == [("cd34", 64), ("cd4", 64)]
    (prime,) = benchmarks.get_suite("code")  # the others are not on the hub
    assert (prime.name, prime.k) == ("prime", 8)
    assert benchmarks.suite_names() == ["code", "countdown", "countdown-generated", "geometry3k", "math"]
    (geometry,) = benchmarks.get_suite("geometry3k")
    assert (geometry.k, geometry.task["heldout"]) == (16, "hf:hiyouga/geometry3k")


def test_the_hubs_names():
    places = {
        b.name: b.task["heldout"]
        for suite in ("math", "countdown", "code")
        for b in benchmarks.get_suite(suite)
    }
    assert places["aime24"] == "hf:math-ai/aime24" and places["prime"] == "hf:PRIME-RL/Eurus-2-RL-Data"
    assert places["cd4"] == "hf:Jiayi-Pan/Countdown-Tasks-4:*.parquet"


def test_a_folder(write, tmp_path):
    write("data/math_eval/aime24.jsonl", MATH)
    write("data/math_eval/aime25.parquet", MATH[:2])
    with pytest.warns(
        UserWarning, match="has no file for amc23, minerva, math500, olympiadbench, which are omitted"
    ):
        first, second = benchmarks.get_suite("math", str(tmp_path / "data"))
    assert (first.name, first.k, second.name) == ("aime24", 32, "aime25")
    task = first.build(chat=True)
    assert [row["answer"] for row in task.heldout] == ["0", "1", "2"] and len(task.train) == 0
    assert task.prompt(task.heldout[0])[0]["content"].endswith("within \\boxed{}.")


def test_countdown_from_a_folder(write, tmp_path):
    rows = [{"nums": [n, n + 1, 7, 9][: 3 + n % 2], "target": n} for n in range(1, 1201)]
    write("data/countdown/tinyzero_test_2001.parquet", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cd34, cd4 = (b.build() for b in benchmarks.get_suite("countdown", str(tmp_path / "data")))
    assert (len(cd34.heldout), len(cd4.heldout)) == (512, 512)
    assert {len(row["numbers"]) for row in cd34.heldout} == {3, 4}
    assert {len(row["numbers"]) for row in cd4.heldout} == {4}


def test_countdown_generated_needs_nothing():
    cd34, cd4 = (b.build() for b in benchmarks.get_suite("countdown-generated"))
    assert (len(cd34.heldout), len(cd4.heldout)) == (512, 512)
    assert {len(row["numbers"]) for row in cd4.heldout} == {4}


def test_a_suite_of_ones_own(write, tmp_path):
    data = write("mine.jsonl", MATH)
    (tmp_path / "suite.yaml").write_text(f"- {{name: mine, k: 16, task: {{name: math, heldout: {data}}}}}\n")
    (mine,) = benchmarks.get_suite(str(tmp_path / "suite.yaml"))
    assert (mine.name, mine.k, len(mine.build().heldout)) == ("mine", 16, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "- 1",
        "- [1",
        "- {name: a, k: 0, task: {name: math}}",
        "- {name: a, k: true, task: {name: math}}",
        "- {name: a, task: {name: math}}",
        "- {name: a, k: 1, task: math}",
        "- {name: a, k: 1, task: {}}",
    ],
)
def test_bad_yaml(tmp_path, text):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError, match=r"suite .*suite.yaml: ") as error:
        benchmarks.get_suite(str(tmp_path / "suite.yaml"))
    assert "\n" not in str(error.value)


def test_unknown_suites(tmp_path):
    with pytest.raises(UserError, match="unknown suite 'maths'; did you mean 'math'"):
        benchmarks.get_suite("maths")
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        benchmarks.get_suite("none.yaml")
    with pytest.raises(UserError, match=r"has none of its files: countdown/tinyzero_test_2001.parquet"):
        benchmarks.get_suite("countdown", str(tmp_path))
