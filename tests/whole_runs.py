"""Whole runs, and their results that must not depend on interruptions."""

import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import yaml

from lpo_jax.models.packing import full_layout
from lpo_jax.models.runner import ModelRunner
from lpo_jax.parallel.sharding import batch_shards
from lpo_jax.reporting import is_timing, read_metrics
from lpo_jax.runs.checkpoint import load_run

# The fixtures `no_plots` and `one_layout` do this for a test; fixtures of modules do it for their own run.


def skip_plots(patch):
    """Skip the plots and the report at the end of a run."""
    patch.setattr("lpo_jax.reporting.save_plots", lambda run: [])
    patch.setattr("lpo_jax.inspection.page.save_report", lambda runs: runs[0])


def pad_groups(patch):
    """Run padded groups, which all have the same shapes."""
    packed = ModelRunner.pack

    def pack(self, groups, mask):
        P, K, T = mask.shape
        layout = full_layout(P, K, groups.prompts.shape[1], T, self.token_budget, batch_shards())
        return packed(self, groups, mask).replace(layout=layout)

    patch.setattr(ModelRunner, "pack", pack)


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


PADDED = """
import sys
import pytest
from lpo_jax.commands.main import main
from whole_runs import pad_groups
pad_groups(pytest.MonkeyPatch())
sys.exit(main(sys.argv[1:]))
"""


def start(config, path, *arguments):
    """Start `lpo train` in a new process, with padded groups."""
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", PADDED, "train", str(path), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for_step(config, number, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if Path(config["output"], "rollouts", f"{number}.jsonl").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {number}: {process.communicate()[0]}")
