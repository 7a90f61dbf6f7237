"""Several processes as one job: started by hand on this machine, with four fake devices each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.parallel import hosts
from lpo_jax.reporting import metric_names, read_metrics
from lpo_jax.runs.directory import checkpoint_directory

ROOT = Path(__file__).parents[2]


def test_one_process_needs_no_others():
    assert not hosts.many() and hosts.is_first()
    assert hosts.share(7) == slice(0, 7)
    assert hosts.gather({"a": 1}) == [{"a": 1}] and hosts.gather_lists([1, 2]) == [1, 2]
    assert hosts.on_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError), hosts.together():
        1 / 0  # noqa: B018 - nobody waits for this process, so the error goes its usual way


@pytest.mark.parametrize("n, count", [(7, 2), (8, 3), (2, 4), (0, 2)])
def test_shares_are_contiguous_and_cover_everything(monkeypatch, n, count):
    monkeypatch.setattr(hosts, "many", lambda: True)
    monkeypatch.setattr("jax.process_count", lambda: count)
    things, got = list(range(n)), []
    for i in range(count):
        monkeypatch.setattr("jax.process_index", lambda i=i: i)
        got += things[hosts.share(n)]
    assert got == things


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"LPO_COORDINATOR": "a:1"}, "is set but not LPO_NUM_PROCESSES, LPO_PROCESS_ID"),
        (
            {"LPO_COORDINATOR": "a", "LPO_NUM_PROCESSES": "2", "LPO_PROCESS_ID": "0"},
            "LPO_COORDINATOR = 'a': expected host:port",
        ),
        (
            {"LPO_COORDINATOR": "a:1", "LPO_NUM_PROCESSES": "2", "LPO_PROCESS_ID": "2"},
            "LPO_PROCESS_ID = '2' of LPO_NUM_PROCESSES = '2'",
        ),
    ],
)
def test_a_wrong_start_is_refused(monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        hosts.connect()
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_gs_path_without_credentials_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    values = {"output": "-", "model": {"path": "-"}, "task": "countdown"}
    config = parse_config(values | {"checkpoint": {"directory": "gs://no-such-bucket/run"}})
    started = time.monotonic()
    with pytest.raises(UserError, match=r"checkpoint\.directory = gs") as refused:
        checkpoint_directory(config)
    assert "\n" not in str(refused.value) and time.monotonic() - started < 20


def environment(devices):
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def start(config, devices, *overrides, processes=1):
    """The processes of one job of `lpo train`; the stderr of process i goes to `i.log` beside the config."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = []
    for i in range(processes):
        many = {"LPO_COORDINATOR": address, "LPO_NUM_PROCESSES": str(processes), "LPO_PROCESS_ID": str(i)}
        command = [sys.executable, "-m", "lpo_jax.commands.main", "train", str(config), *overrides]
        env = environment(devices) | (many if processes > 1 else {})
        with open(config.parent / f"{i}.log", "w") as log:
            jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=log))
    return jobs


def finish(config, *arguments):
    (job,) = start(config, *arguments)
    assert job.wait(timeout=900) == 0, (config.parent / "0.log").read_text()


def rows(run):
    """The metrics of a run, without times and the sampler's gap, which depends on rounding."""
    skip = lambda name: metric_names.is_timing(name) or name.startswith(("lpo/logp_gap", "training/rollout"))  # noqa: E731
    kept = [{k: v for k, v in row.items() if not skip(k)} for row in read_metrics(run)]
    return [row for row in kept if row.keys() != {"step"}]


def texts(run):
    return {
        path.stem: [json.loads(line)["output"] for line in path.read_text().splitlines()]
        for path in (run / "rollouts").glob("*.jsonl")
    }


def written(path, model, task):
    """Write the config of a run into `path / "one"`."""
    from tiny import run_values

    values = run_values(path / "one", model, task)
    values["training"] |= {"steps": 4, "prompts_per_step": 8, "token_budget": 160}
    # Adam's usual eps makes a sign of a gradient that is all rounding, and a trajectory of that. At a learning rate of
    # 0.01, an update made a difference of 4e-7 between two gradients one of 3e-5.
    values["optimizer"] = {"learning_rate": 0.001, "eps": 1.0, "clip_norm": 0.0, "weight_decay": 0.0}
    values["evaluation"] = {"every": 0, "problems": 4}
    values["mesh"] = {"data": 2, "fsdp": 2, "tensor": 2}
    values["checkpoint"] = {"every": 2}
    config = path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def agree(run, other):
    """Check that responses are the same, and metrics up to rounding."""
    assert texts(run) == texts(other)
    found, expected = rows(run), rows(other)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, wanted in zip(found, expected):
        for name in row:
            # A score is the difference of log-probs of whole responses, which are far larger.
            rounding = 3e-5 if name == "lpo/score_abs_max" else 1e-6
            np.testing.assert_allclose(row[name], wanted[name], rtol=1e-5, atol=rounding, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_process_ends_the_job_which_another_machine_takes_up(tmp_path, tiny_model, tiny_task):
    config = written(tmp_path, tiny_model, tiny_task)
    finish(config, 8)
    two = tmp_path / "two"
    jobs = start(config, 4, f"--output={two}", "--training.steps=1000", processes=2)
    deadline = time.monotonic() + 900
    while not (two / "rollouts" / "3.jsonl").exists():
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
        time.sleep(0.1)
    jobs[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert jobs[0].wait(timeout=120) != 0
    assert time.monotonic() - killed < 60
    errors = (tmp_path / "0.log").read_text()
    assert "lpo: process 0 of 2 stops" in errors or "JAX distributed service detected fatal errors" in errors

    assert (two / "checkpoints" / "2").is_dir()  # once, by both
    finish(config, 4, f"--output={two}", "--resume", "--mesh.data=1")
    agree(two, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_wait_on_two_processes_as_on_one(tmp_path, tiny_model, tiny_task):
    config = written(tmp_path, tiny_model, tiny_task)
    few = "--training.steps=2", "--sampling.max_rows=8"  # of 32: two on each of four shards, the others wait
    finish(config, 8, *few)
    jobs = start(config, 4, f"--output={tmp_path / 'two'}", *few, processes=2)
    assert [job.wait(timeout=900) for job in jobs] == [0, 0], (tmp_path / "0.log").read_text()
    agree(tmp_path / "two", tmp_path / "one")
