"""Test deploy/slurm.sh and deploy/skypilot.yaml with mocks of srun, scontrol, uv and lpo."""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from lpo_jax.config import load_config
from lpo_jax.parallel import hosts

ROOT = Path(__file__).parents[2]
# Records its arguments and some variables, and exits with the given status.
MOCK = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
env | grep ^LPO_ | sort >"$CALLS.env" || true
exit "${STATUS_OF_RUN:-0}"
"""


@pytest.fixture
def place(tmp_path):
    """Return a function that runs a command in a folder with mocks, and returns status, stderr and calls."""
    for name in ("bin/srun", "bin/scontrol", "bin/uv", ".venv/bin/lpo", ".venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MOCK if name != "bin/scontrol" else MOCK.replace('"${STATUS_OF_RUN:-0}"', "0"))
        path.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "worker.sh").write_text((ROOT / "deploy" / "worker.sh").read_text())

    def run(*command, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LPO_", "SKYPILOT_"))}
        paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
        done = subprocess.run(
            command, cwd=tmp_path, env=clean | paths | environment, capture_output=True, text=True, timeout=60
        )
        made = [line.strip("\0").split("\0") for line in calls.read_text().splitlines()]
        return done.returncode, done.stderr, made

    return run


def slurm(place, tmp_path, *arguments, **environment):
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return place("bash", str(ROOT / "deploy" / "slurm.sh"), *arguments, **(job | environment))


def test_a_slurm_job_resumes_its_run_on_every_gpu(place, tmp_path):
    status, err, calls = slurm(place, tmp_path, "configs/math_8b.yaml", "--output=/shared/a b")
    assert status == 0, err
    (call,) = calls
    command = ["--gpu-bind=none", "--kill-on-bad-exit=0", ".venv/bin/lpo", "train"]
    assert call == ["srun", *command, "configs/math_8b.yaml", "--resume", "--output=/shared/a b"]


def test_a_stopped_slurm_job_is_queued_again_and_a_failed_one_is_not(place, tmp_path):
    status, _, calls = slurm(place, tmp_path, "c.yaml", STATUS_OF_RUN="130")
    assert status == 130 and calls[1:] == [["scontrol", "requeue", "17"]]
    for failed in ("1", "2", "137"):
        status, _, calls = slurm(place, tmp_path, "c.yaml", STATUS_OF_RUN=failed)
        assert status == int(failed) and [call[0] for call in calls] == ["srun"]


def test_mistakes_before_a_slurm_job_runs_are_one_line(place, tmp_path):
    for arguments, environment, says in [
        ([], {}, "usage: sbatch"),
        (["c.yaml"], {"SLURM_JOB_ID": ""}, "submit it with sbatch"),
        (["c.yaml"], {"SLURM_SUBMIT_DIR": str(tmp_path / "bin")}, ".venv/bin/lpo is missing"),
    ]:
        status, err, calls = slurm(place, tmp_path, *arguments, **environment)
        assert (status, calls) == (2, []) and says in err and err.count("\n") == 1


def test_slurm_starts_a_process_for_each_gpu():
    """JAX gives every process of a Slurm job one GPU, so another number would leave some idle."""
    text = (ROOT / "deploy" / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"].startswith(
        "TERM@"
    )  # to the processes, not to this script, which has to queue again


@pytest.fixture
def task():
    return yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())


def test_skypilot_installs_the_cuda_extra_and_what_gs_needs(place, task):
    status, err, calls = place("bash", "-c", task["setup"])
    assert status == 0, err
    install = next(call for call in calls if call[:3] == ["uv", "pip", "install"])
    assert {"constraints.txt", ".[cuda]", "gcsfs"} <= set(install)


def test_skypilot_runs_one_process_on_one_host(place, task, tmp_path):
    node = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"}
    load_config(ROOT / task["envs"]["CONFIG"])
    status, err, calls = place("bash", "-c", task["run"], **task["envs"], **node)
    assert status == 0, err
    (call,) = calls
    assert call == ["lpo", "train", task["envs"]["CONFIG"], "--resume", "--output=runs/lpo"]
    assert "LPO_COORDINATOR" not in (tmp_path / "calls.env").read_text()


def test_skypilot_connects_several_hosts(place, task, tmp_path):
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    status, err, _ = place("bash", "-c", task["run"], **task["envs"], **node)
    assert status == 0, err
    given = dict(line.split("=", 1) for line in (tmp_path / "calls.env").read_text().splitlines())
    expected = {"coordinator_address": "10.0.0.1:8482", "num_processes": 2, "process_id": 1}
    assert hosts._by_hand({name: given[name] for name in hosts.BY_HAND}) == expected


def test_skypilot_reports_a_failed_run(place, task):
    node = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"}
    status, _, _ = place("bash", "-c", task["run"], **task["envs"], **node, STATUS_OF_RUN="2")
    assert status == 2


def test_shellcheck_of_the_skypilot_sections(task):
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for section in ("setup", "run"):
        # SkyPilot sets these variables and those of `envs`.
        code = f"#!/usr/bin/env bash\n# shellcheck disable=SC2154\n{task[section]}"
        found = subprocess.run([tool, "--format=json", "-"], input=code, capture_output=True, text=True)
        assert json.loads(found.stdout) == []
