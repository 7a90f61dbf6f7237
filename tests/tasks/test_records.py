"""Sources of rows: every format gives the same rows, and every mistake is a one-line error."""

from pathlib import Path

import huggingface_hub
import pytest

from lpo_jax.errors import UserError
from lpo_jax.tasks.records import find_files, read_data_file, unique_ids

ROWS = [{"id": n, "q": f"é {n}", "tests": {"inputs": [[n]], "name": None}, "x": n / 2} for n in range(5)]


def rows(source, split="train"):
    return [row for path in find_files(source, split) for _, row in read_data_file(path)]


def names(source, split):
    return [path.name for path in find_files(source, split)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_formats(write, name):
    assert rows(write(name, ROWS)) == ROWS


def test_json_may_hold_lines(write, tmp_path):
    Path(write("a.jsonl", ROWS)).rename(tmp_path / "a.json")
    assert rows(str(tmp_path / "a.json")) == ROWS


def test_places(write):
    for name, place in (("a.jsonl", ":3"), ("a.json", ": row 2"), ("a.parquet", ": row 2")):
        path = write(name, ROWS)
        assert [where for where, _ in read_data_file(Path(path))][2] == path + place


def test_patterns_and_folders(write, tmp_path):
    write("set/train-0.jsonl", ROWS[:2])
    write("set/deep/train-1.json", ROWS[2:4])
    write("set/validation.jsonl", ROWS[4:])
    (tmp_path / "set" / "README.md").write_text("not data")
    folder = str(tmp_path / "set")
    assert names(folder, "train") == ["train-1.json", "train-0.jsonl"]
    assert names(folder, "heldout") == ["validation.jsonl"]
    write("set/test.jsonl", ROWS[:1])  # preferred to validation
    assert names(folder, "heldout") == ["test.jsonl"]
    assert names(folder + "/*.jsonl", "heldout") == ["test.jsonl", "train-0.jsonl", "validation.jsonl"]


def test_a_folder_that_names_no_split_is_taken_whole(write, tmp_path):
    write("set/one.jsonl", ROWS[:2])
    write("set/contested.jsonl", ROWS[2:])  # "test" inside a word is not a split
    for split in ("train", "heldout"):
        assert names(str(tmp_path / "set"), split) == ["contested.jsonl", "one.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.json", b'[{"a": 1}, 2]', "a.json: row 1: a row must be a JSON object"),
        ("a.json", b'[{"a": 1}', "a.json: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "a.jsonl:2: a row must be a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a":\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n\n', "a.jsonl:2: the line is empty"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab", "a.jsonl.gz: "),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read as parquet"),
        ("a.csv", b"a,b\n", "a.csv: not a data file; its name must end in .parquet"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_empty_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a.parquet: the file is empty"):
        rows(str(tmp_path / "a.parquet"))


def test_missing_sources(write, tmp_path):
    write("set/train.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("none.jsonl", "none.jsonl: No such file"),
        ("org/name", "did you mean hf:org/name"),
        (str(tmp_path / "*.parquet"), "No such file"),
        (str(tmp_path / "empty"), "no data file in it"),
        (str(tmp_path / "set"), "no file is named for the heldout rows; it has train.jsonl"),
        ("hf:name", "expected hf:org/name"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(source, "heldout")


def test_ids_must_differ():
    def places(ids):
        return ((f"f:{n}", {"id": value}) for n, value in enumerate(ids, 1))

    assert len(list(unique_ids(places([1, "1", None, None, 2])))) == 5
    with pytest.raises(UserError, match="f:3: its id 'a' is also that of f:1; ids must be unique"):
        list(unique_ids(places(["a", "b", "a"])))


@pytest.fixture
def hub(monkeypatch, write, tmp_path):
    """A dataset on a fake hub, which records the requests."""
    write("hub/main/train-00000.parquet", ROWS[:3])
    write("hub/main/test-00000.parquet", ROWS[3:])
    write("hub/socratic/test-00000.parquet", ROWS[:1])
    asked = []

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        asked.append((repo, repo_type, revision, tuple(allow_patterns)))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub(hub):
    assert rows("hf:org/name:main/*") == ROWS[:3]
    assert rows("hf:org/name@v1:main/*", "heldout") == ROWS[3:]
    assert len(rows("hf:org/name", "heldout")) == 3
    assert hub[0] == ("org/name", "dataset", None, ("main/*",))
    assert hub[1][2] == "v1"
    # Without a pattern, the training files, which may be large, are not requested.
    assert "*test*.parquet" in hub[2][3] and not any("train" in pattern for pattern in hub[2][3])


def test_hub_set_without_named_splits(monkeypatch, write, tmp_path):
    write("hub/data.jsonl", ROWS)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, allow_patterns, **_: asked.append(allow_patterns) or str(tmp_path / "hub"),
    )
    assert rows("hf:org/name") == ROWS
    assert rows("hf:org/name:*.jsonl", "heldout") == ROWS


def test_hub_failures(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data 'hf:lpo-jax-tests/none': cannot be downloaded") as error:
        find_files("hf:lpo-jax-tests/none", "train")
    assert "\n" not in str(error.value)
