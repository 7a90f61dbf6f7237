"""Reading and writing JSON lines: only a newline ends a row, whatever characters its strings contain."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lpo_jax import json_lines
from lpo_jax.errors import UserError

ROOT = Path(__file__).parents[1]

# Every character at which `str.splitlines` splits, and those at which a terminal or an editor may.
HOSTILE = "".join(map(chr, (*range(0x20), 0x7F, 0x85, 0x2028, 0x2029, 0xFEFF, 0x202E))) + "\ud83d \\u2028"


def test_rows_survive_a_round_trip(tmp_path):
    rows = [{"text": HOSTILE, HOSTILE: [HOSTILE]}, {"n": [1, 2.5, None, True]}]
    data = b"".join(map(json_lines.dump_line, rows))
    (tmp_path / "a.jsonl").write_bytes(data)
    assert json_lines.read_rows(tmp_path / "a.jsonl") == rows
    # Other readers, which may split at other characters, get the same rows.
    assert [json.loads(line) for line in data.decode().splitlines()] == rows


def test_rows_of_other_writers_are_split_at_newlines_alone(tmp_path):
    rows = [{"text": "a\u2028b\u2029c\u0085d"}, {"text": "e"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert json_lines.read_rows(tmp_path / "a.jsonl") == rows


def test_values_that_json_cannot_represent(capsys):
    row = {"a": math.nan, "b": [np.float32(math.inf), np.arange(2)], "c": Path("x"), 4: "\ud800\u2028"}
    expected = {"a": None, "b": [None, [0, 1]], "c": "x", "4": "\ud800\u2028"}
    assert json.loads(json_lines.dump_line(row)) == expected
    json_lines.print_line(row)
    printed = capsys.readouterr().out
    assert printed.isascii() and printed.count("\n") == 1 and json.loads(printed) == expected


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 101 + "]" * 101]
)
def test_deep_nesting_is_an_error_with_its_line(tmp_path, text):
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        json_lines.loads(text)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ' + text + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is damaged \(nested more than 100 deep\)"):
        json_lines.read_rows(tmp_path / "a.jsonl")


def test_nesting_up_to_the_limit_is_read():
    text = "[" * 99 + "[1], [2]" + "]" * 99
    assert json_lines.loads(text) == json.loads(text)


@pytest.mark.parametrize("torn", [b'{"a": 1', b"{", b"\0\0\0", b"\xff\xfe", b'"' + b"[" * 5000])
def test_only_the_last_line_may_be_truncated(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    assert json_lines.read_rows(path, may_be_torn=True) == [{"a": 1}]
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is damaged \(.+\); repair or remove that line"):
        json_lines.read_rows(path)
    path.write_bytes(b'{"a": 1}\n' + torn + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is damaged"):
        json_lines.read_rows(path, may_be_torn=True)


def test_no_other_code_of_the_package_reads_or_writes_rows():
    found = []
    for path in ROOT.glob("lpo_jax/**/*.py"):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            splits = "splitlines" in line and "json" in line
            joins = "json.dumps" in line and '"\\n"' in line and "indent" not in line
            if (splits or joins) and path.name != "json_lines.py":
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found
