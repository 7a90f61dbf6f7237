"""A disk that is full, read-only or dead, wherever it is met: one line, and the directory can be used again."""

import errno
import json
import os

import pytest
import yaml

from lpo_jax import files, reporting
from lpo_jax.commands.main import main
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.training import loop

FAULTS = [errno.ENOSPC, errno.EROFS, errno.EIO]


def failing_at(name, number, inner=files.write_atomically):
    """Return a `write_atomically` that fails, as on a broken disk, when the file `name` is written."""

    def write(path, data):
        if path.name == name:
            path.with_name(f"{name}.tmp").write_bytes(data[: len(data) // 2])
            raise OSError(number, os.strerror(number), str(path))
        inner(path, data)

    return write


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_start_whose_first_files_did_not_fit_can_be_started_again(run_config, monkeypatch, name, number):
    config = parse_config(run_config())
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", failing_at(name, number))
        with (
            pytest.raises(UserError, match=f"{name}.*{os.strerror(number)}"),
            RunDirectory(config, "train", False),
        ):
            pass
    for resume in (True, False):  # the folder is neither a run nor somebody else's
        with RunDirectory(config, "train", resume) as run:
            assert not run.resumed
    assert yaml.safe_load((run.path / "config.yaml").read_text())["output"] == config.output


def test_what_is_noted_later_leaves_run_json_whole(run_config, monkeypatch):
    config = parse_config(run_config())
    with RunDirectory(config, "train", False) as run:
        monkeypatch.setattr(files, "write_atomically", failing_at("run.json", errno.EIO))
        with pytest.raises(UserError, match=r"run\.json"):
            run.note(data={})
        assert json.loads((run.path / "run.json").read_text())["kind"] == "train"


def test_a_folder_with_other_files_is_still_refused(run_config):
    config = parse_config(run_config())
    run = RunDirectory(config, "train", False)
    run.path.mkdir()
    (run.path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunDirectory(config, "train", False)


@pytest.mark.parametrize("number", FAULTS)
def test_plots_that_do_not_fit_leave_no_half_file(tmp_path, monkeypatch, number):
    with reporting.RunWriter(tmp_path) as writer:
        writer.write(1, {"actor/entropy": 1.0})
    inner, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=os.strerror(number)) as refused:
            reporting.save_plots(tmp_path)
    assert calls and "\n" not in str(refused.value) and os.replace is inner
    assert not list((tmp_path / "plots").glob("*.png"))
    assert [path.name for path in reporting.save_plots(tmp_path)] == ["learning_curves.png"]


@pytest.mark.parametrize("number", [*FAULTS, errno.EDQUOT])
def test_a_disk_that_fails_anywhere_else_is_one_line(run_config, tmp_path, monkeypatch, capsys, number):
    def fail(config, resume):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(loop, "train", fail)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config()))
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"lpo: /some/file: {os.strerror(number)}; ") and told.count("\n") == 1


def test_an_os_error_that_is_not_the_disks_stays_an_error(run_config, tmp_path, monkeypatch):
    def fail(config, resume):
        raise OSError(errno.EBADF, "a mistake of ours")

    monkeypatch.setattr(loop, "train", fail)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config()))
    with pytest.raises(OSError, match="a mistake of ours"):
        main(["train", str(tmp_path / "config.yaml")])
