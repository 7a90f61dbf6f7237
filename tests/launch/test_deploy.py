"""Test the JobSet and the shell scripts as far as possible without a cluster."""

import math
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from lpo_jax.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())


def container_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_job_requests_every_chip_of_the_slice(jobset):
    job, pod, container = container_of(jobset)
    hosts = job["template"]["spec"]["parallelism"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    resources = container["resources"]
    assert hosts == job["template"]["spec"]["completions"]
    assert hosts * resources["limits"]["google.com/tpu"] == math.prod(map(int, topology.split("x")))
    assert resources["limits"] == resources["requests"]


def test_table_of_slices_in_the_comment():
    text = (ROOT / "deploy" / "jobset.yaml").read_text()
    rows = re.findall(r"^#   tpu-\S+ +(\S+) +(\d+) +(\d+)", text, re.M)
    assert len(rows) == 3
    for topology, hosts, chips in rows:
        assert int(hosts) * int(chips) == math.prod(map(int, topology.split("x")))


def test_pods_run_the_command_of_the_launcher(jobset):
    _, _, container = container_of(jobset)
    shell, script, verb, name, remote, config, *_ = container["command"]
    assert (shell, script, verb) == ("bash", "deploy/worker.sh", "supervise")
    # `start` runs the same command as a service.
    assert '/deploy/worker.sh" supervise "$@"' in (ROOT / script).read_text()
    assert remote == f"gs://BUCKET/{name}"
    load_config(ROOT / config)


def test_lost_host_restarts_all_and_wrong_settings_do_not(jobset):
    job, pod, container = container_of(jobset)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["replicas"] == 1 and job["template"]["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def shell_scripts():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [name for name in listed if name.endswith(".sh") or name == ".ci/run"]


def test_shellcheck():
    scripts = shell_scripts()
    assert {"launch_tpu.sh", "deploy/worker.sh"} <= set(scripts)
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([tool, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
