"""Whole runs, and their results that must not depend on interruptions."""

import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import yaml

from lpo_jax.reporting import is_timing, read_metrics
from lpo_jax.runs.checkpoint import load_run


def learned(config):
    """Read the results that must not depend on interruptions: parameters, metrics and rollouts."""
    run = Path(config["output"])
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(run)]
    rollouts = {
        f"{folder}/{p.name}": p.read_text()
        for folder in ("rollouts", "validation")
        for p in (run / folder).iterdir()
    }
    return load_run(run, "latest")[0].params, [row for row in rows if len(row) > 1], rollouts


def assert_same_run(one, other):
    chex.assert_trees_all_equal(one[0], other[0])
    assert one[1] == other[1]
    assert one[2] == other[2]


def start(config, path, *arguments):
    """Start `lpo train` in a new process."""
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lpo_jax.commands.main", "train", str(path), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for_step(config, number, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if Path(config["output"], "rollouts", f"{number}.jsonl").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {number}: {process.communicate()[0]}")
