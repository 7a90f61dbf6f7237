"""Test launch_tpu.sh with a mock of gcloud: the calls it makes, their order, and its user errors."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = ["--name", "demo", "--project", "my-project", "--zone", "us-east5-a", "--poll", "0"]
COPIED = [*WHERE, "--tpu", "v6e:4x4", "--output", "gs://bucket/demo"]
POD = [*COPIED, "--repo", "https://host/me/lpo.git"]  # faster than an archive of the working tree
CONFIG = "configs/quickstart.yaml"
TWO = "ACTIVE\t2"  # slices
ABSENT = "error: ERROR: (gcloud) NOT_FOUND: no such resource"


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs the script and returns status, stdout, stderr and the arguments of each call."""
    (tmp_path / "bin").mkdir()
    # Started by the interpreter of the tests: `python3` on PATH may be a shell script that takes 0.1 s to find one.
    stand_in = shlex.join([sys.executable, "-IS", str(Path(__file__).with_name("gcloud_stand_in.py"))])
    (tmp_path / "bin" / "gcloud").write_text(f'#!/bin/sh\nexec {stand_in} "$@"\n')
    (tmp_path / "bin" / "gcloud").chmod(0o755)

    def run(*argv, environment=None, **answers):
        by_verb = {
            "queued": "queued-resources describe",
            "node": "tpu-vm describe",
            "state": "worker.sh state",
            "install": "worker.sh install",
            "start": "worker.sh start",
            "create": "queued-resources create",
        }
        (tmp_path / "answers.json").write_text(json.dumps({by_verb[k]: v for k, v in answers.items()}))
        calls = tmp_path / "calls.jsonl"
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
        paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [ROOT / "launch_tpu.sh", *argv],
            env=clean | paths | {"STAND_IN": str(tmp_path)} | (environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        made = [json.loads(line) for line in calls.read_text().splitlines()]
        assert all(call[:2] == ["compute", "tpus"] for call in made)
        return done.returncode, done.stdout, done.stderr, [call[2:] for call in made]

    return run


def verbs(calls):
    """Return one word per call: the verb, or the command of worker.sh that it runs on the workers."""
    short = []
    for call in calls:
        command = next((flag.partition("=")[2] for flag in call if flag.startswith("--command=")), None)
        worker = re.search(r"bash lpo_jax/deploy/worker.sh (\w+)", command or "")
        short.append(call[1] if command is None else worker[1] if worker else "unpack")
    return short


def of(calls, verb):
    """Return the only call with this verb."""
    (found,) = [call for call, name in zip(calls, verbs(calls)) if name == verb]
    return found


SET_UP = ["unpack", "install"]


def test_up_creates_a_queued_resource_waits_and_sets_up_every_worker(launch):
    status, _, err, calls = launch(
        "up",
        *POD,
        queued=[ABSENT, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        node=["CREATING", "READY"],
    )
    assert status == 0, err
    assert verbs(calls)[:2] == ["describe", "create"]
    assert verbs(calls)[-2:] == SET_UP
    create = of(calls, "create")
    assert create[:3] == ["queued-resources", "create", "demo"]
    assert {"--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=demo"} <= set(create)
    assert "--spot" not in create
    for call in calls:
        assert {"--project=my-project", "--zone=us-east5-a"} <= set(call)
    for verb in SET_UP:
        assert {"--node=all", "--worker=all"} <= set(of(calls, verb))
    assert "WAITING_FOR_RESOURCES" in err


@pytest.mark.parametrize(
    "tpu, flags",
    [
        ("v5p:4x4x4", {"--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"}),
        ("v5e:4x4", {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"}),
        ("v6e:8x8", {"--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"}),
    ],
)
def test_types(launch, tpu, flags):
    status, out, _, calls = launch("up", *WHERE, "--tpu", tpu, "--dry-run")
    assert status == 0 and not calls
    assert flags <= set(shlex.split(out.splitlines()[0]))


def test_spot_slices_and_image(launch):
    _, _, _, calls = launch(
        "up", *POD, "--spot", "--slices", "2", "--runtime", "other", queued=[ABSENT, TWO], node=["READY"]
    )
    create = of(calls, "create")
    assert {"--spot", "--node-count=2", "--node-prefix=demo", "--runtime-version=other"} <= set(create)
    assert not any(flag.startswith("--node-id") for flag in create)
    described = [call[2] for call in calls if call[:2] == ["tpu-vm", "describe"]]
    assert described == ["demo-0", "demo-1"]


def test_other_number_of_slices_is_left_alone(launch):
    for command in (["up", *POD], ["watch", *POD, CONFIG]):
        status, _, err, calls = launch(*command, queued=[TWO], node=["READY", "PREEMPTED"])
        assert status == 1 and "has 2 slices, not 1" in err
        assert set(verbs(calls)) == {"describe"}
    # The other commands work with any number of slices.
    status, out, _, _ = launch("status", *WHERE, queued=[TWO], node=["READY"], state=["job=running"])
    assert (status, out) == (0, "tpu: READY\njob: running\n")


def test_up_with_a_single_vm(launch):
    status, _, err, calls = launch(
        "up", *WHERE, "--vm", "--tpu", "v5e:2x4", "--spot", node=[ABSENT, "CREATING", "READY"]
    )
    assert status == 0, err
    assert all(call[0] == "tpu-vm" and "--node=all" not in call for call in calls)
    assert {"--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--spot"} <= set(
        of(calls, "create")
    )


def test_up_reuses_a_ready_tpu(launch):
    status, _, err, calls = launch("up", *POD, queued=["ACTIVE"], node=["READY"], state=["job=none"])
    assert status == 0 and "reusing" in err
    assert "create" not in verbs(calls) and verbs(calls)[-2:] == SET_UP


def test_up_does_not_replace_the_code_of_a_running_job(launch):
    status, _, err, calls = launch(
        "up", *POD, queued=["ACTIVE"], node=["READY"], state=["job=done\njob=running"]
    )
    assert status == 1 and "running" in err
    assert "unpack" not in verbs(calls)


def test_up_deletes_a_lost_tpu_first(launch):
    status, _, err, calls = launch("up", *POD, queued=["SUSPENDED", "ACTIVE"], node=["READY"])
    assert status == 0, err
    assert verbs(calls)[:3] == ["describe", "delete", "create"]
    assert {"--force", "--quiet"} <= set(of(calls, "delete"))


def test_up_reports_missing_capacity(launch):
    status, _, err, _ = launch("up", *POD, queued=[ABSENT, "FAILED"])
    assert status == 1 and "became FAILED" in err


def test_up_retries_while_a_new_vm_refuses_connections(launch):
    status, _, err, calls = launch(
        "up", *POD, queued=[ABSENT, "ACTIVE"], node=["READY"], install=["error: Connection refused", "fine"]
    )
    assert status == 0, err
    assert verbs(calls).count("install") == 2


def test_up_copies_the_working_tree(launch, tmp_path):
    _, _, _, calls = launch("up", *COPIED, queued=["ACTIVE"], node=["READY"], state=["job=none"])
    assert verbs(calls)[-3:] == ["scp", *SET_UP]
    scp = of(calls, "scp")
    assert scp[2:4] == [f"{tmp_path}/demo.tgz", "demo:"]
    assert "tar -xzf demo.tgz -C lpo_jax" in " ".join(of(calls, "unpack"))
    assert not (tmp_path / "demo.tgz").exists()
    copied = set((tmp_path / "copied.txt").read_text().splitlines())
    assert {
        "pyproject.toml",
        "constraints.txt",
        "deploy/worker.sh",
        "lpo_jax/commands/main.py",
        CONFIG,
    } <= copied
    assert not any(name.startswith((".git/", ".venv/", "runs/")) or ".egg-info" in name for name in copied)


def test_up_clones_a_repository(launch):
    _, _, _, calls = launch("up", *POD, "--ref", "v1", queued=["ACTIVE"], node=["READY"])
    assert "scp" not in verbs(calls)
    clone = " ".join(of(calls, "unpack"))
    assert "git clone --quiet https://host/me/lpo.git lpo_jax" in clone and "origin v1" in clone


def test_run_starts_the_job_on_every_worker(launch):
    status, _, err, calls = launch("run", *POD, CONFIG, "--task.template=a 'b' $c", "--training.steps=3")
    assert status == 0, err
    (call,) = calls
    assert {"--node=all", "--worker=all"} <= set(call)
    command = next(flag.partition("=")[2] for flag in call if flag.startswith("--command="))
    # The words after parsing by the shell of the worker.
    words = ["start", "demo", "gs://bucket/demo", CONFIG, "--task.template=a 'b' $c", "--training.steps=3"]
    assert shlex.split(command) == ["bash", "lpo_jax/deploy/worker.sh", *words]


def test_one_worker_needs_no_bucket(launch):
    status, _, err, (call,) = launch("run", *WHERE, "--vm", "--tpu", "v5e:2x4", CONFIG)
    assert status == 0, err
    assert "start demo - configs/quickstart.yaml" in " ".join(call)


def test_watch_resumes_after_a_preemption(launch):
    status, _, err, calls = launch(
        "watch",
        *POD,
        "--spot",
        CONFIG,
        # One state per check: absent; ready, not started; running; preempted; waiting; ready again; done.
        queued=[ABSENT, "ACTIVE", "ACTIVE", "ACTIVE", "WAITING_FOR_RESOURCES", "ACTIVE"],
        node=["READY", "READY", "PREEMPTED", "READY"],
        state=["job=none", "job=running\njob=running", "job=none", "job=done\njob=done"],
    )
    assert status == 0, err
    done = [verb for verb in verbs(calls) if verb != "describe"]
    start = [*SET_UP, "start"]
    assert done == ["create", "state", *start, "state", "delete", "create", "state", *start, "state"]
    first, second = (call for call, verb in zip(calls, verbs(calls)) if verb == "start")
    assert first == second
    assert "PREEMPTED" in err and "the job is done" in err


def test_watch_restarts_a_failed_job_a_few_times(launch):
    states = ["job=running", "job=failed:1\njob=running"]
    status, _, err, calls = launch(
        "watch", *POD, "--max-restarts", "2", CONFIG, queued=["ACTIVE"], node=["READY"], state=states
    )
    assert status == 1 and "after 2 restarts" in err
    assert verbs(calls).count("start") == 2
    assert "create" not in verbs(calls) and "delete" not in verbs(calls)


def test_watch_ends_on_wrong_settings_and_on_a_stopped_job(launch):
    there = {"queued": ["ACTIVE"], "node": ["READY"]}
    status, _, err, calls = launch("watch", *POD, CONFIG, **there, state=["job=running", "job=failed:2"])
    assert status == 1 and "refused its settings" in err and "start" not in verbs(calls)
    status, _, err, calls = launch("watch", *POD, CONFIG, **there, state=["job=running", "job=stopped"])
    assert status == 0 and "was stopped" in err and "start" not in verbs(calls)


def test_watch_ignores_the_state_of_an_earlier_job(launch):
    status, _, err, calls = launch(
        "watch", *POD, CONFIG, queued=["ACTIVE"], node=["READY"], state=["job=stopped", "job=done"]
    )
    assert status == 0, err
    assert verbs(calls).count("start") == 1 and verbs(calls).count("install") == 1


def test_watch_deletes_nothing_if_gcloud_fails(launch):
    offline = "error: could not reach the server"
    status, _, err, calls = launch(
        "watch",
        *POD,
        "--slices",
        "2",
        CONFIG,
        queued=[TWO, offline, TWO],
        node=["READY"],
        state=["job=running", "job=done"],
    )
    assert status == 0, err
    assert not {"delete", "create", "start"} & set(verbs(calls))


def test_commands_end_if_gcloud_cannot_read_the_state(launch):
    for command in (["up", *POD], ["watch", *POD, CONFIG], ["down", *WHERE]):
        status, _, err, calls = launch(
            *command, queued=["error: You do not currently have an active account"]
        )
        assert status == 1 and "active account" in err and "cannot read the state" in err
        assert verbs(calls) == ["describe"]


def test_watch_ends_if_creation_fails(launch):
    status, _, err, calls = launch("watch", *POD, CONFIG, queued=[ABSENT], create=["error: no quota"])
    assert status == 1 and "cannot be created" in err and "no quota" in err
    assert verbs(calls) == ["describe", "create"]


def test_status_logs_stop_and_down(launch):
    there = {"queued": ["ACTIVE"], "node": ["READY"], "state": ["job=running\njob=running"]}
    assert launch("status", *WHERE, **there)[:2] == (0, "tpu: READY\njob: running\n")
    _, _, _, (call,) = launch("logs", *WHERE)
    assert {"--node=0", "--worker=0"} <= set(call) and "worker.sh logs" in " ".join(call)
    _, _, _, calls = launch("stop", *WHERE)
    assert verbs(calls) == ["stop"]
    _, _, _, calls = launch("down", *WHERE, **there)
    assert verbs(calls) == ["describe", "describe", "stop", "delete"]
    _, _, _, calls = launch("down", *WHERE, queued=["SUSPENDED"])
    assert verbs(calls) == ["describe", "delete"]
    status, _, err, calls = launch("down", *WHERE, queued=[ABSENT])
    assert status == 0 and "does not exist" in err and verbs(calls) == ["describe"]


@pytest.mark.parametrize("command", ["up", "run", "watch", "logs", "status", "stop", "down"])
def test_dry_run_prints_commands_and_calls_nothing(launch, tmp_path, command):
    config = [CONFIG, "--task.template=it's $5"] if command in ("run", "watch") else []
    status, out, err, calls = launch(command, *COPIED, "--dry-run", *config)
    assert status == 0 and calls == [], err
    pasted = subprocess.run(
        ["bash", "-euc", out],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(tmp_path)},
        capture_output=True,
    )
    assert pasted.returncode == 0, pasted.stderr
    made = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len(made) == sum(line.startswith("gcloud compute tpus ") for line in out.splitlines()) >= 1
    if config:
        command = next(flag for call in made for flag in call if "worker.sh start" in flag)
        assert shlex.split(command)[-1] == "--task.template=it's $5"


MISTAKES = {
    "no command": ([], "expected a command"),
    "unknown command": (["uo", *POD], "unknown command 'uo'"),
    "no name": (["stop", *WHERE[2:]], "needs --name"),
    "no zone": (["up", *POD[:4], *POD[6:]], "needs --zone"),
    "no project": (["up", *POD[:2], *POD[4:]], "needs --project"),
    "no type": (["up", *WHERE], "needs --tpu"),
    "bad name": (["up", *POD, "--name", "My_TPU"], "use a-z"),
    "unknown type": (["up", *WHERE, "--tpu", "h100:2x2"], "unknown type"),
    "flat v5p": (["up", *WHERE, "--tpu", "v5p:4x4"], "the slices of v5p are 2x2x1,"),
    "solid v6e": (["up", *WHERE, "--tpu", "v6e:4x4x4"], "no such slice"),
    "no value": (["up", *WHERE, "--tpu"], "--tpu needs a value"),
    "unknown option": (["run", *POD, "--training.steps=3", CONFIG], "follow CONFIG"),
    "slices of a vm": (["up", *POD, "--vm", "--slices", "2"], "queued resource"),
    "slices": (["up", *POD, "--slices", "two"], "is not an integer"),
    "no config": (["run", *POD], "needs a CONFIG"),
    "no such config": (["run", *COPIED, "configs/nothing.yaml"], "no such file"),
    "config from elsewhere": (["run", *COPIED, "/tmp/x.yaml"], "relative to this repository"),
    "config for down": (["down", *WHERE, CONFIG], "takes no"),
    "local output": (["run", *POD, "--output", "/tmp/run", CONFIG], "must be gs://"),
    "no output on a pod": (["run", *WHERE, "--tpu", "v6e:4x4", CONFIG], "several workers"),
    "no output on slices": (["run", *WHERE, "--tpu", "v6e:2x4", "--slices", "2", CONFIG], "several workers"),
    "no output, no type": (["run", *WHERE, CONFIG], "without --output"),
}


@pytest.mark.parametrize("argv, says", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_and_status_2(launch, argv, says):
    status, out, err, calls = launch(*argv)
    assert (status, out, calls) == (2, "", [])
    assert says in err and err.startswith("launch_tpu.sh: ") and len(err.splitlines()) == 1


def test_without_gcloud(launch, tmp_path):
    (tmp_path / "few").mkdir()
    for tool in ("bash", "dirname"):
        (tmp_path / "few" / tool).symlink_to(shutil.which(tool))
    status, _, err, _ = launch("stop", *WHERE, environment={"PATH": str(tmp_path / "few")})
    assert status == 2 and "gcloud is not on PATH" in err


def test_settings_from_the_environment_and_help(launch):
    settings = {"TPU_NAME": "demo", "TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_TYPE": "v5p:2x2x1"}
    status, out, _, _ = launch("up", "--dry-run", environment=settings)
    assert status == 0 and "--accelerator-type=v5p-8" in out and "--zone=z --project=p" in out
    status, out, _, _ = launch("--help")
    assert status == 0 and "set -euo" not in out
    source = (ROOT / "launch_tpu.sh").read_text()
    options = source.partition("    case $1 in\n")[2].partition(" -*)")[0]
    documented = [
        word for word in options.replace("|", " ").replace(")", " ").split() if word.startswith("--")
    ]
    assert len(documented) > 10 and all(option in out for option in documented)
