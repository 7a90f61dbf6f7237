"""A changed, damaged, moved or contended run directory gives a one-line error, and no saved data is lost."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from tiny import run_values
from whole_runs import pad_groups, skip_plots

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.directory import RunDirectory, read_config
from lpo_jax.runs.recorder import missing_steps
from lpo_jax.runs.signals import Interrupted, Signals
from lpo_jax.training import loop
from lpo_jax.training.loop import train
from lpo_jax.training.session import Session

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_task):
    """The directory of a run of three steps, with checkpoints."""
    values = run_values(tmp_path_factory.mktemp("finished") / "run", tiny_model, tiny_task)
    values["training"] |= {"steps": 3, "save_plots": False}
    values["evaluation"] |= {"every": 0, "problems": 4}
    with pytest.MonkeyPatch.context() as patch:
        pad_groups(patch)
        skip_plots(patch)
        train(parse_config(values))
    return values


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, and its resolved config."""
    shutil.copytree(finished["output"], tmp_path / "run")
    return tmp_path / "run", read_config(finished["output"]).to_dict() | {"output": str(tmp_path / "run")}


def files(path):
    """Read all files of a run directory except its lock."""
    return {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"}


def refusal(config, *, resume=True):
    with pytest.raises(UserError) as refused:
        RunDirectory(parse_config(config), "train", resume)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("how", ["another directory", "moved", "unmounted"])
def test_a_resume_without_a_checkpoint_in_sight_is_refused(run, tmp_path, how):
    path, config = run
    if how == "another directory":
        config = config | {"checkpoint": {"directory": str(tmp_path / "elsewhere")}}
    else:
        (path / "checkpoints").rename(tmp_path / "moved")
    if how == "unmounted":
        (path / "checkpoints").mkdir()
    before, looked_in = (
        files(path),
        config["checkpoint"]["directory"].replace("auto", str(path / "checkpoints")),
    )
    error = refusal(config)
    assert error.startswith(
        f"{path}: there is no checkpoint in {looked_in}, but this run has saved step 1 in "
    )
    assert "checkpoint.directory" in error and files(path) == before and not (tmp_path / "elsewhere").exists()
    if how == "moved":  # following the message repairs the run
        RunDirectory(
            parse_config(config | {"checkpoint": {"directory": str(tmp_path / "moved")}}), "train", True
        )


def test_a_directory_that_holds_no_checkpoint_but_something_else(run):
    path, config = run
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints" / "lost+found").mkdir(parents=True)
    before = {p: data for p, data in files(path).items() if p.suffix == ".jsonl"}
    with pytest.raises(UserError, match=r"there is no checkpoint in .*, but this run has saved step 1"):
        train(parse_config(config), resume=True)
    assert {p: data for p, data in files(path).items() if p.suffix == ".jsonl"} == before


def test_a_run_that_ends_before_its_first_checkpoint_begins_again(run_config, one_layout, monkeypatch):
    config = run_config(checkpoint={"every": 0}, evaluation={"every": 0}, training={"steps": 3})
    run_step = loop.run_step

    def killed(session, learner, position, *rest):
        if position.step == 2:
            raise SystemError
        run_step(session, learner, position, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(loop, "run_step", killed)
        train(parse_config(config))
    assert max(row["step"] for row in read_metrics(config["output"])) == 2
    train(parse_config(config), resume=True)
    assert missing_steps(Path(config["output"]), 3) == "" and load_run(config["output"], "latest")[1] == 3


def test_a_run_that_is_stopped_in_its_first_evaluation_is_resumed(run_config, one_layout, monkeypatch):
    """It has a checkpoint of step 0, but no row in metrics.jsonl."""
    config = run_config(training={"steps": 1})

    def stopped(session, model):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Session, "evaluate", stopped)
        train(parse_config(config))
    assert (Path(config["output"]) / "checkpoints" / "0").exists()
    assert not (Path(config["output"]) / "metrics.jsonl").exists()
    train(parse_config(config), resume=True)
    assert [row["step"] for row in read_metrics(config["output"]) if "val-core/python/acc/pass@1" in row] == [
        0,
        1,
    ]


def test_of_two_starts_in_a_race_one_begins(run_config):
    config = parse_config(run_config())
    one, other = (
        RunDirectory(config, "train", resume=False) for _ in range(2)
    )  # both found the directory free
    with one:
        with pytest.raises(UserError, match="another process is writing"), other:
            pass
        (one.path / "metrics.jsonl").write_text('{"step": 0}\n')
    before = files(one.path)
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"), other:
        pass
    assert files(one.path) == before
    with RunDirectory(config, "train", resume=True) as resumed:  # the refused one holds no lock
        assert resumed.resumed


def test_a_start_that_was_refused_under_its_lock_leaves_the_place_free(run_config):
    config = parse_config(run_config())
    path = Path(config.output)
    path.mkdir()
    (path / ".lock").touch()
    with RunDirectory(config, "train", resume=False):
        pass


DAMAGE = ["", "{", '{"kind": "tra', "null", "\0\0\0\0", "[1]"]


@pytest.mark.parametrize("text", DAMAGE)
@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_damaged_settings_are_one_line(run, name, text):
    path, config = run
    (path / name).write_text(text)
    assert str(path / name) in refusal(config)
    if name == "config.yaml":
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_config(path)
    else:  # following the message repairs the run
        (path / name).unlink()
        RunDirectory(parse_config(config), "train", True)


@pytest.mark.parametrize("damage", ["empty folder", "empty file", "half a line", "another name"])
def test_a_finished_run_is_finished_whatever_became_of_its_samples(run, capsys, damage):
    path, config = run
    newest = path / "validation" / "3.jsonl"
    if damage == "empty folder":
        shutil.rmtree(path / "validation")
        (path / "validation").mkdir()
    elif damage == "another name":
        (path / "validation" / "notes.jsonl").touch()
    else:
        newest.write_bytes(b"" if damage == "empty file" else newest.read_bytes()[:-20])
    train(parse_config(config), resume=True)
    said = capsys.readouterr().out
    assert "checkpoints  latest step 3" in said
    assert ("none to show" in said) == (damage in ("empty folder", "half a line"))


def test_missing_rows_are_told(run, capsys):
    path, config = run
    lines = (path / "metrics.jsonl").read_bytes().split(b"\n")
    (path / "metrics.jsonl").write_bytes(b"\n".join(line for line in lines if b'"step": 2' not in line))
    train(parse_config(config), resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl has no rows of step 2, which the checkpoint of step 3 includes" in said
    (path / "metrics.jsonl").unlink()
    train(parse_config(config), resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl has no rows of steps 1-3, which the checkpoint of step 3 includes" in said


def test_which_steps_are_missing(tmp_path):
    assert missing_steps(tmp_path, 3) == "steps 1-3" and missing_steps(tmp_path, 0) == ""
    rows = [f'{{"step": {step}, "actor/lr": 1.0}}\n' for step in (1, 4, 5, 7, 9, 11, 13, 15, 17)]
    saved = '{"step": 2, "timing_s/save_checkpoint": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text("".join([rows[0], saved, *rows[1:]]))
    assert missing_steps(tmp_path, 7) == "steps 2-3, 6"
    assert missing_steps(tmp_path, 17) == "steps 2-3, 6, 8, 10, 12, and 2 more ranges"


def test_a_signal_inside_a_finaliser_is_obeyed_later_without_a_traceback(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), Signals() as signals:
        finalised = Finalised()
        del finalised  # Python drops exceptions that a finaliser raises
        with signals.deferred():
            reached = True
    assert reached and not shown
    assert sys.unraisablehook == shown.append


@pytest.fixture
def hangup():
    """SIGHUP has its default effect, also if the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_run_where_nothing_is_half_done(number, hangup):
    with pytest.raises(Interrupted), Signals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), number)
            done = True
        raise AssertionError("not obeyed")
    assert done


def test_a_second_hangup_and_one_that_is_ignored_end_nothing(hangup):
    with pytest.raises(Interrupted), Signals():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(
                os.getpid(), signal.SIGHUP
            )  # the kernel's, which follows the shell's, while the run is saving
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
