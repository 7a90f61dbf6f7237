"""Rows on disk: what is written, when it is reused, and when it is prepared again."""

import dataclasses
import json
import subprocess
import sys

import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.tasks import prepared
from lpo_jax.tasks.prepared import Recipe, Unusable, prepare_rows


def convert(row):
    if row["n"] < 0:
        raise Unusable("it is negative")
    if row["n"] == 13:
        return None
    return {
        "text": f"é {row['n']}",
        "n": row["n"],
        "ns": [row["n"]] * (row["n"] % 3),
        "any": {"x": [None, row["n"]]},
    }


RECIPE = Recipe(
    "numbers",
    {"text": "text", "n": "int", "ns": "ints", "any": "json"},
    convert,
    lambda row: row["n"] % 100,
    {},
)


def numbers(*ns):
    return [{"n": n} for n in ns]


def test_rows_come_back_in_order(write):
    path = write("a.jsonl", numbers(*range(12, -1, -1)))
    rows, about = prepare_rows(RECIPE, path, "train")
    expected = [convert({"n": n}) for n in range(12, -1, -1)]
    assert list(rows) == expected and [rows[i] for i in range(13)] == expected
    assert rows[3:6] == expected[3:6] and list(rows.select([5, 0, 5])) == [expected[i] for i in (5, 0, 5)]
    assert rows.select([5, 3, 1]).select([2, 0])[0] == expected[1]
    assert about["read"] == about["kept"] == 13
    with pytest.raises(IndexError):
        rows[13]
    assert tasks.content_hash(rows) == tasks.content_hash(expected)


def test_loops_over_more_than_a_block(write, monkeypatch):
    monkeypatch.setattr(prepared, "_BLOCK", 4)
    rows, _ = prepare_rows(RECIPE, write("a.jsonl", numbers(*range(11))), "train")
    assert [row["n"] for row in rows] == list(range(11))
    assert [row["n"] for row in rows.select(range(10, 0, -1))] == list(range(10, 0, -1))


def test_batches_come_from_disk(write):
    rows, _ = prepare_rows(RECIPE, write("a.jsonl", numbers(*range(9))), "train")
    some = rows.select([7, 1, 4, 2])
    batches = tasks.PromptIterator(some, prompts=2, seed=0)
    assert all(row == some[index] for _ in range(4) for index, row in next(batches))


def test_what_is_left_out_is_counted(write):
    path = write("a.jsonl", numbers(1, 101, 2, -5, 13, 3, 3, 4, -6))
    rows, about = prepare_rows(RECIPE, path, "train", leave_out=[4])
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert about == {
        "read": 9,
        "kept": 3,
        "skipped": 2,
        "other_kind": 1,
        "duplicates": 2,
        "held_out": 1,
        "first_skipped": [f"{path}:4: it is negative", f"{path}:9: it is negative"],
    }
    assert prepare_rows(RECIPE, path, "train", leave_out=[4])[1] == about  # also from the cache


def test_several_files_are_one_source(write, tmp_path):
    write("set/train-0.jsonl", numbers(1, 2))
    write("set/train-1.parquet", numbers(2, 3))
    rows, about = prepare_rows(RECIPE, str(tmp_path / "set"), "train")
    assert [row["n"] for row in rows] == [1, 2, 3] and about["duplicates"] == 1


def test_found_again_unless_something_changed(write, capsys, monkeypatch):
    def made(recipe=RECIPE, source=None, **options):
        prepare_rows(recipe, source or path, "train", **options)
        return "preparing numbers" in capsys.readouterr().err

    path = write("a.jsonl", numbers(501, 502))
    assert made() and not made()
    assert not made(source=write("copy.jsonl", numbers(501, 502)))  # the name does not matter
    assert made(leave_out=[1]) and made(dataclasses.replace(RECIPE, settings={"a": 1}))
    assert made(source=write("a.jsonl", numbers(501, 503)))
    monkeypatch.setattr(prepared, "_code_digest", lambda: b"other code")
    assert made() and not made()


def test_nothing_usable(write):
    path = write("a.jsonl", numbers(13, -1, -2))
    message = r"none of its 3 rows can be used: 2 skipped, 1 other kind, 0 held out \(first: .*:2: it is"
    with pytest.raises(UserError, match=message):
        prepare_rows(RECIPE, path, "train")


def test_mistakes_name_the_row_and_leave_nothing_behind(write, prepared_rows):
    def refuse(row):
        raise UserError("no field 'm'")

    files = lambda: sorted(path for path in prepared_rows.rglob("*") if path.is_file())  # noqa: E731
    before = files()
    path = write("a.jsonl", numbers(1, 2))
    with pytest.raises(UserError, match=r"a.jsonl:1: no field 'm'$"):
        prepare_rows(dataclasses.replace(RECIPE, convert=refuse), path, "train")
    with pytest.raises(UserError, match=r"a.jsonl:2: its id 7 is also that of"):
        prepare_rows(RECIPE, write("a.jsonl", [{"id": 7, "n": 1}, {"id": 7, "n": 2}]), "train")
    assert files() == before


def test_a_cache_that_cannot_be_written(write, monkeypatch, tmp_path):
    path = write("a.jsonl", numbers(1))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*; set LPO_CACHE"):
        prepare_rows(RECIPE, path, "train")


def test_another_process_was_faster(write, monkeypatch):
    path = write("a.jsonl", numbers(71, 72))
    builder = prepared._builder

    def slow(*arguments):
        monkeypatch.setattr(prepared, "_builder", builder)
        prepare_rows(RECIPE, path, "train")
        return builder(*arguments)

    monkeypatch.setattr(prepared, "_builder", slow)
    assert [row["n"] for row in prepare_rows(RECIPE, path, "train")[0]] == [71, 72]


def test_others_can_read_it(write, prepared_rows):
    """The result is a normal TFDS dataset, which the task `tfds` can read."""
    before = set(prepared_rows.glob("tasks/*"))
    prepare_rows(RECIPE, write("a.jsonl", numbers(*range(600, 610))), "train")
    (folder,) = set(prepared_rows.glob("tasks/*")) - before
    fields = {"answer": "n"}
    task = tasks.get(
        "tfds", path=str(folder / "1.0.0"), prompt="{text}", verifier="arithmetic", fields=fields, train="train[:80%]",
        heldout="train[80%:]",
    )  # fmt: skip
    assert [row["answer"] for row in task.heldout] == [608, 609]


def test_neither_tensorflow_nor_jax_is_imported(write):
    path = write("a.jsonl", [{"nums": [1, n], "target": 1 + n} for n in range(1, 21)])
    code = f"""
import json, sys
from lpo_jax import tasks
task = tasks.get("countdown", path={path!r}, numbers=2, train_size=0, heldout_size=2)
print(json.dumps([len(task.train), "tensorflow" in sys.modules, "jax" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [18, False, False]
