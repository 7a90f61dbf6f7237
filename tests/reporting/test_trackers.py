"""Weights & Biases and trackio, with the real packages and without a network: each row once, also over a resume."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lpo_jax.errors import UserError
from lpo_jax.reporting import RunWriter
from lpo_jax.reporting.trackers import Trackers, require_trackers


def interrupted_run(run_dir, **projects):
    """Write steps 1 to 3, resume from step 2, and write steps 3 and 4."""
    for first, last in ((1, 3), (3, 4)):
        with (
            Trackers(run_dir, projects, {"seed": 7}) as trackers,
            RunWriter(run_dir, trackers.send) as writer,
        ):
            if first > 1:
                writer.truncate_after(first - 1)
            for step in range(first, last + 1):
                norm = float("nan") if step == 2 else 0.5
                writer.write(step, {"actor/entropy": step + 0.125, "actor/grad_norm": norm})
    return json.loads((run_dir / "trackers.json").read_text())


def in_a_process(tmp_path, library):
    """Run `interrupted_run` in a process of its own, whose end the libraries wait for; return what it returned."""
    pytest.importorskip(library, reason=f"the extra [{library}] is not installed")
    script = (
        "import sys; from pathlib import Path; from test_trackers import interrupted_run;"
        f"interrupted_run(Path(sys.argv[1]), {library}='doctor')"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    settings = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    environment = os.environ | settings | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], env=environment, check=True)
    return json.loads((tmp_path / "run" / "trackers.json").read_text())


def test_trackio_continues_the_run(tmp_path):
    state = in_a_process(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "doctor.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert state["rows"] == 4 and {name for name, *_ in rows} == {f"run-{state['id']}"}
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, row["actor/entropy"]) for step, row in values] == [
        (step, step + 0.125) for step in (1, 2, 3, 4)
    ]
    assert "actor/grad_norm" in values[0][1] and "actor/grad_norm" not in values[1][1]


def test_wandb_continues_the_run(tmp_path):
    state = in_a_process(tmp_path, "wandb")
    logs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and all(log.name == f"run-{state['id']}.wandb" for log in logs)
    first, second = (log.read_bytes() for log in logs)
    assert all(number in first for number in (b"1.125", b"2.125", b"3.125")) and b"4.125" not in first
    assert b"4.125" in second and b"3.125" not in second


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_trackers({"wandb": "none", "trackio": "none"})
    with pytest.raises(UserError, match=r"tracking.wandb = p: .*pip install 'lpo_jax\[wandb\]'"):
        require_trackers({"wandb": "p"})
