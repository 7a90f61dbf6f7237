"""A run's files are valid at all times, and a killed and resumed run writes the same ones as an uninterrupted run."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.reporting import RunWriter, is_timing, read_metrics, writers
from lpo_jax.reporting.writers import sample_files


def _metrics(step):
    return {
        "actor/entropy": 1 / (step + 3),
        "perf/total_num_tokens": 100 + step,
        "timing_s/gen": np.random.rand(),
    }


def _without_timing(rows):
    return [{name: value for name, value in row.items() if not is_timing(name)} for row in rows]


def _write(run_dir, steps, resume_after=None):
    with RunWriter(run_dir) as writer:
        if resume_after is not None:
            writer.truncate_after(resume_after)
        for step in steps:
            writer.write(step, _metrics(step))
            writer.write_samples(step, [{"input": "q", "output": f"answer {step}", "score": 1.0}])


def _events(run_dir):
    """Read all events of the TensorBoard files, oldest file first, and check their checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    events = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def test_rows_come_back_as_written(tmp_path):
    with RunWriter(tmp_path / "run") as writer:
        writer.write(0, {"val-core/countdown/acc/pass@1": 0.25})
        writer.write(1, {"actor/entropy": np.float32(0.1), "perf/total_num_tokens": np.int64(7)})
        rows = read_metrics(tmp_path / "run")  # both are on the disk before the files are closed
        assert [event.step for event in _events(tmp_path / "run") if event.HasField("summary")] == [0, 1]
    assert rows == [
        {"step": 0, "val-core/countdown/acc/pass@1": 0.25},
        {"step": 1, "actor/entropy": float(np.float32(0.1)), "perf/total_num_tokens": 7},
    ]


def test_unknown_metric_is_rejected_and_nothing_written(tmp_path):
    with RunWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="unknown metric 'actor/entropi'; did you mean 'actor/entropy'"):
            writer.write(1, {"actor/lr": 0.1, "actor/entropi": 1.0})
        with pytest.raises(ValueError, match="'actor/lr' is not a single number"):
            writer.write(1, {"actor/lr": np.zeros(2)})
        with pytest.raises(ValueError, match="'actor/lr' is not a single number"):
            writer.write(1, {"actor/lr": None})
        assert not (tmp_path / "metrics.jsonl").exists()


def test_nonfinite_values_keep_the_json_valid(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write(1, {"actor/grad_norm": np.float32("nan"), "actor/pg_loss": -math.inf, "actor/lr": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "actor/grad_norm": None,
        "actor/pg_loss": None,
        "actor/lr": 0.5,
        "nonfinite": {"actor/grad_norm": "nan", "actor/pg_loss": "-inf"},
    }


def test_resume_gives_the_files_of_an_uninterrupted_run(tmp_path):
    _write(tmp_path / "whole", [1, 2, 3, 4])
    _write(tmp_path / "resumed", [1, 2, 3])  # the checkpoint is of step 2; step 3 was lost with the process
    _write(tmp_path / "resumed", [3, 4], resume_after=2)
    whole, resumed = (read_metrics(tmp_path / run) for run in ("whole", "resumed"))
    assert _without_timing(resumed) == _without_timing(whole)
    assert resumed != whole  # the timings differ, so the comparison above did ignore something
    files = {run: _files(tmp_path / run / "rollouts") for run in ("whole", "resumed")}
    assert files["whole"] == files["resumed"]
    assert list(files["whole"]) == ["1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_truncate_drops_later_samples_only(tmp_path):
    with RunWriter(tmp_path) as writer:
        for step in (0, 2, 10):
            writer.write_samples(step, [{"output": "x"}])
            writer.write_samples(step, [{"output": "y"}], folder="validation")
        (tmp_path / "rollouts/1.jsonl.tmp").write_text(
            "half a fi"
        )  # a process killed while writing leaves this
        writer.truncate_after(2)
    for folder in ("rollouts", "validation"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["0.jsonl", "2.jsonl"]


def test_tensorboard_holds_each_step_and_a_purge_mark_on_resume(tmp_path):
    _write(tmp_path, [1, 2, 3])
    _write(tmp_path, [3, 4], resume_after=2)
    events = _events(tmp_path)
    steps = [event.step for event in events if event.HasField("summary")]
    assert steps == [1, 2, 3, 3, 4]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard hides earlier events from step 3 on
    first = next(event for event in events if event.HasField("summary"))
    values = {value.tag: value.simple_value for value in first.summary.value}
    assert values["actor/entropy"] == pytest.approx(0.25) and values["perf/total_num_tokens"] == 101


@pytest.mark.parametrize("torn", [b'{"step": 3, "actor/en', b"{", b"\0\0\0\0", b'{"actor/lr": 1.0}'])
def test_truncated_last_line_is_skipped_and_removed(tmp_path, torn):
    _write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert path.read_bytes() == whole + torn  # reading does not change the file
    with RunWriter(tmp_path) as writer:
        assert path.read_bytes() == whole
        writer.write(3, _metrics(3))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    _write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    _write(tmp_path, [3])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    _write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    damaged = b"x" + path.read_bytes()
    path.write_bytes(damaged)
    for reader in (read_metrics, RunWriter):
        with pytest.raises(UserError, match="line 1 is damaged"):
            reader(tmp_path)
    assert path.read_bytes() == damaged


def test_a_decreasing_step_is_rejected(tmp_path):
    _write(tmp_path, [1, 2, 3])
    with RunWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="truncate_after"):
            writer.write(2, _metrics(2))
        writer.truncate_after(1)
        writer.write(2, _metrics(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_kill_9_loses_at_most_the_row_being_written(tmp_path):
    program = """
        import sys
        from lpo_jax.reporting import RunWriter
        writer = RunWriter(sys.argv[1])
        for step in range(1, 100000):
            writer.write(step, {"actor/entropy": step / 7, "actor/lr": 1e-6})
            print(step, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    confirmed = [int(process.stdout.readline()) for _ in range(30)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= confirmed
    with RunWriter(tmp_path) as writer:
        writer.truncate_after(confirmed)
        writer.write(confirmed + 1, {"actor/entropy": (confirmed + 1) / 7, "actor/lr": 1e-6})
    expected = [{"step": s, "actor/entropy": s / 7, "actor/lr": 1e-6} for s in range(1, confirmed + 2)]
    assert read_metrics(tmp_path) == expected


def test_samples_are_whole_or_absent(tmp_path, monkeypatch):
    with RunWriter(tmp_path) as writer:
        path = writer.write_samples(1, [{"output": "first"}])
        before = path.read_bytes()

        def disk_full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", disk_full)
        with pytest.raises(UserError, match="No space left on device"):
            writer.write_samples(1, [{"output": "second"}])
        assert path.read_bytes() == before


def test_full_disk_leaves_the_rows_before_it(tmp_path, monkeypatch):
    with RunWriter(tmp_path) as writer:
        writer.write(1, _metrics(1))
        before = (tmp_path / "metrics.jsonl").read_bytes()

        def disk_full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk_full)
            with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
                writer.write(2, _metrics(2))
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        writer.write(2, _metrics(2))  # once there is space, the same writer works again
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_samples_can_contain_any_text_and_value(tmp_path):
    row = {
        "output": "line\nbreak \u2028 \x1b[31m \udc80 日本",
        "score": np.float32(0.5),
        "target": np.array([0.25, 0.75]),
        "reward": float("nan"),
        "gts": {"numbers": (3, 5), "ok": np.bool_(True)},
    }
    with RunWriter(tmp_path) as writer:
        path = writer.write_samples(12, [row, {"output": ""}])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert "日本" in lines[0]
    assert json.loads(lines[0]) == {
        "output": row["output"],
        "score": 0.5,
        "target": [0.25, 0.75],
        "reward": None,
        "gts": {"numbers": [3, 5], "ok": True},
        "step": 12,
    }


def test_samples_go_to_known_folders_only(tmp_path):
    with RunWriter(tmp_path) as writer, pytest.raises(ValueError, match="folder"):
        writer.write_samples(1, [], folder="../elsewhere")


def test_reading_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_unwritable_directory_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunWriter(tmp_path / "file")


def test_import_is_light():
    program = "import sys, lpo_jax.reporting; print({'jax', 'matplotlib', 'tensorboardX'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert writers.SAMPLE_FOLDERS == ("rollouts", "validation")


@pytest.mark.parametrize(
    "evaluations, rows, kept", [(None, 3, [0.25, 0.75]), (2, 3, [0.25, 0.75]), (1, 2, [0.25]), (0, 1, [])]
)
def test_evaluations_after_the_checkpoint_are_removed(tmp_path, evaluations, rows, kept):
    """A step can have two evaluations: before and after the warm start. Those that will run again are removed."""
    with RunWriter(tmp_path) as writer:
        writer.write(2, {"actor/entropy": 1.0})
        for score in (0.25, 0.75):
            writer.write_samples(2, [{"score": score}], folder="validation", again=score == 0.75)
            writer.write(2, {"val-core/python/acc/pass@1": score})
        writer.write_samples(3, [{"output": "x"}], folder="validation")
        writer.truncate_after(2, evaluations=evaluations)
    held = read_metrics(tmp_path)
    assert len(held) == rows and held[0]["actor/entropy"] == 1.0
    assert [row["val-core/python/acc/pass@1"] for row in held[1:]] == [0.25, 0.75][: rows - 1]
    files = sample_files(tmp_path, "validation")
    assert [file.path.name for file in files] == ["2.jsonl", "2.warm-started.jsonl"][: len(kept)]
    assert [json.loads(file.path.read_text())["score"] for file in files] == kept
