"""Test deploy/worker.sh with mocks of systemd, gcloud storage and `lpo`."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Mock of gcloud storage: a bucket is a folder, gs://x is $BUCKETS/x.
GCLOUD = """
[[ $1 == storage ]] || exit 9
place() { echo "${1/#gs:\\/\\//$BUCKETS/}"; }
case $2 in
ls)
  touch "$ROWS/listing"
  while [[ -e $ROWS/hold ]]; do sleep 0.05; done
  ls "$(place "$3")"
  ;;
rsync)
  from=$(place "${@: -2:1}") to=$(place "${@: -1}")
  mkdir -p "$to" && cp -a "$from/." "$to"
  [[ $* != *--exclude=* ]] || rm -rf "$to/rollouts"
  ;;
esac
"""
# Starts the command in the background and records its process id.
SYSTEMD_RUN = """
while [[ $1 == --* ]]; do
  [[ $1 == --property=StandardOutput=append:* ]] && log=${1#--property=StandardOutput=append:}
  shift
done
nohup "$@" >>"$log" 2>&1 &
echo $! >"$UNIT_FILE"
"""
SYSTEMCTL = """
running() { [[ -e $UNIT_FILE ]] && kill -0 "$(<"$UNIT_FILE")" 2>/dev/null; }
case $1 in
show) if running; then [[ -e $UNIT_FILE.stopping ]] && echo deactivating || echo active; else echo inactive; fi ;;
stop)
  touch "$UNIT_FILE.stopping"
  kill "$(<"$UNIT_FILE")"
  while running; do sleep 0.05; done
  rm "$UNIT_FILE.stopping"
  ;;
esac
"""
LPO = """
echo "$@" >>"$ROWS/arguments"
output=$(printf '%s\\n' "$@" | sed -n 's/^--output=//p')
mkdir -p "$output"
[[ $BEHAVIOUR == other-host ]] && exit 0
trap 'while [[ -e $ROWS/hold ]]; do sleep 0.05; done; echo saved >>"$output/metrics.jsonl"; exit 130' TERM
echo "config" >"$output/config.yaml"
echo "row" >>"$output/metrics.jsonl"
mkdir -p "$output/rollouts" && touch "$output/rollouts/$(wc -l <"$output/metrics.jsonl").jsonl"
case $BEHAVIOUR in
fails) exit 1 ;;
runs) for _ in {1..300}; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def host(tmp_path):
    """Create a checkout on a worker and return `call(*arguments, behaviour=)`, which runs the script there."""
    home = tmp_path / "lpo_jax"
    (home / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "worker.sh", home / "deploy")
    (home / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    tools = {"gcloud": GCLOUD, "systemd-run": SYSTEMD_RUN, "systemctl": SYSTEMCTL, "sudo": '"$@"'}
    for path, text in {
        home / ".venv/bin/lpo": LPO,
        **{tmp_path / "bin" / k: v for k, v in tools.items()},
    }.items():
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "BUCKETS": str(tmp_path / "buckets"),
        "UNIT_FILE": str(tmp_path / "unit"),
        "ROWS": str(tmp_path),
        "LPO_COPY_SECONDS": "0.1",
    }

    def call(*arguments, behaviour="ends"):
        done = subprocess.run(
            [home / "deploy" / "worker.sh", *arguments],
            env=environment | {"BEHAVIOUR": behaviour},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout.strip()

    call.environment = environment
    call.home, call.arguments = home, tmp_path / "arguments"
    call.files = tmp_path / "buckets" / "bucket" / "demo" / "files"
    yield call
    call("stop")


JOB = ("demo", "gs://bucket/demo", "configs/quickstart.yaml")


def eventually(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_of_a_run(host):
    assert host("supervise", *JOB, "--task.template=a b")[0] == 0
    assert host.arguments.read_text().splitlines() == [
        "train configs/quickstart.yaml --resume --output=runs/demo "
        "--checkpoint.directory=gs://bucket/demo/checkpoints --task.template=a b"
    ]
    host("supervise", "demo", "-", "configs/quickstart.yaml")
    assert (
        host.arguments.read_text().splitlines()[1]
        == "train configs/quickstart.yaml --resume --output=runs/demo"
    )


def test_a_job_from_start_to_end(host):
    assert host("state") == (0, "job=none")
    host("start", *JOB, behaviour="runs")
    assert host("state") == (0, "job=running")
    rows = host.files / "metrics.jsonl"
    eventually(rows.exists)  # copied during the run
    assert host("stop")[0] == 0
    assert rows.read_text() == "row\nsaved\n"  # and again after the trainer has saved
    assert host("state") == (0, "job=stopped")
    host("start", *JOB)
    eventually(lambda: host("state") == (0, "job=done"))
    host("start", *JOB, behaviour="fails")
    eventually(lambda: host("state") == (0, "job=failed:1"))


def test_job_that_saves_before_its_exit_counts_as_running(host):
    host("start", *JOB, behaviour="runs")
    eventually((host.home / "runs/demo/metrics.jsonl").exists)
    hold = host.home.parent / "hold"
    hold.touch()
    stop = subprocess.Popen([host.home / "deploy" / "worker.sh", "stop"], env=host.environment)
    eventually((host.home.parent / "unit.stopping").exists)
    assert host("state") == (0, "job=running")
    hold.unlink()
    assert stop.wait(20) == 0
    assert host("state") == (0, "job=stopped")


def test_a_second_start_replaces_the_first(host):
    host("start", *JOB, behaviour="runs")
    eventually((host.home / "runs/demo/metrics.jsonl").exists)
    host("start", *JOB)
    eventually(lambda: host("state") == (0, "job=done"))
    assert (host.home / "runs/demo/metrics.jsonl").read_text() == "row\nsaved\nrow\n"


def test_the_shutdown_of_a_host_saves_and_counts_as_a_failure(host):
    """The state is not `stopped`, because `watch` must start the job again."""
    host("start", *JOB, behaviour="runs")
    eventually((host.home / "runs/demo/metrics.jsonl").exists)
    os.kill(int((host.home.parent / "unit").read_text()), signal.SIGTERM)
    eventually(lambda: host("state") == (0, "job=failed:130"))
    assert (host.files / "metrics.jsonl").read_text() == "row\nsaved\n"


def test_a_shutdown_before_the_trainer_runs(host):
    """The signal arrives while the files of the run are copied back."""
    hold = host.home.parent / "hold"
    hold.touch()
    host("start", *JOB, behaviour="runs")
    eventually((host.home.parent / "listing").exists)
    os.kill(int((host.home.parent / "unit").read_text()), signal.SIGTERM)
    hold.unlink()
    eventually(lambda: host("state") == (0, "job=failed:143"))
    assert not host.arguments.exists()  # the trainer did not start


def test_files_are_copied_back_to_a_new_disk(host):
    host("supervise", *JOB)
    shutil.rmtree(host.home / "runs")
    host("supervise", *JOB)
    assert (host.files / "metrics.jsonl").read_text() == "row\nrow\n"
    in_bucket, here = host.files / "rollouts", host.home / "runs/demo/rollouts"
    assert [path.name for path in here.iterdir()] == [
        "2.jsonl"
    ]  # old rollouts are not copied back, and not lost
    assert sorted(path.name for path in in_bucket.iterdir()) == ["1.jsonl", "2.jsonl"]


def test_a_host_that_writes_nothing_leaves_the_files_alone(host):
    """It has copied the files as all hosts do, but its copy is outdated when the job ends."""
    host("supervise", *JOB)
    shutil.rmtree(host.home / "runs")
    rows = host.files / "metrics.jsonl"
    os.utime(rows, (0, 0))
    host("supervise", *JOB, behaviour="other-host")
    assert (host.home / "runs/demo/metrics.jsonl").read_text() == "row\n"
    rows.write_text("row\nof the coordinator\n")
    host("supervise", *JOB, behaviour="other-host")
    assert rows.read_text() == "row\nof the coordinator\n"


def test_an_unknown_command(host):
    assert host("begin")[0] == 2
