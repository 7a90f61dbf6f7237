"""`lpo compare` on a tiny model: its table, also after interruptions, and failing cells."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import CONFIG, character_tokenizer

from lpo_jax import load_model, rewards
from lpo_jax.commands.main import main
from lpo_jax.compare import command, pool, table, worker
from lpo_jax.compare.command import compare, load_outcomes
from lpo_jax.compare.grid import make_grid
from lpo_jax.compare.pool import Job, Resources, divide_machine, run_jobs
from lpo_jax.compare.table import make_table
from lpo_jax.config import parse_config
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.models.hf import write_configs
from lpo_jax.models.tokenizer import save_tokenizer
from lpo_jax.runs.signals import Interrupted
from lpo_jax.training import loop

METHODS = [{"name": "grpo", "label": "pg"}, {"name": "lpo-forward", "label": "forward"}]


@pytest.fixture(scope="session")
def empty_model(tmp_path_factory):
    """A model directory with a config and a tokenizer, but without weights."""
    path = tmp_path_factory.mktemp("shape")
    write_configs(path, CONFIG, "float32", character_tokenizer())
    save_tokenizer(character_tokenizer(), path)
    return path


@pytest.fixture
def compared(run_config, empty_model):
    """The values of a config that compares within seconds: 1 rule, 2 methods, 2 seeds, 2 steps."""

    def make(output="run", **changes):
        values = run_config(
            output,
            model={"path": str(empty_model), "init": "random"},
            training={"steps": 2, "save_rollouts": False},
            evaluation={"every": 1, "problems": 6},
            warm_start={"steps": 2, "batch_size": 4},
            compare={"rules": ["grpo"], "methods": METHODS, "seeds": [0, 1]} | changes,
        )
        del values["objective"]
        return values

    return make


@pytest.fixture(scope="module")
def one_pool():
    """Verifier processes that are started once and shared by all runs, which have the same task."""
    make, made = rewards.VerifierPool, []

    def shared(spec, **options):
        if not made:
            made.append(make(spec, **options))
        return contextlib.nullcontext(made[0])

    yield shared
    for started in made:
        started.close()


@pytest.fixture
def in_process(monkeypatch, one_pool):
    """Runs the jobs one after another in this process; the value is the list of started jobs."""
    begun = []

    def run_jobs(jobs, resources, logs, ended):
        for job in jobs:
            begun.append(job.name)
            ended(job, worker._run({"kind": job.kind, "config": job.config.to_dict()}))

    monkeypatch.setattr(command, "run_jobs", run_jobs)
    monkeypatch.setattr(rewards, "VerifierPool", one_pool)
    return begun


def table_of(values):
    return (Path(values["output"]) / "table.json").read_text()


@pytest.mark.slow
def test_an_interrupted_comparison_has_the_same_table(compared, in_process, monkeypatch, capsys):
    whole, stopped = compared("whole"), compared("stopped")
    compare(parse_config(whole))
    everything = ["warm", "grpo-pg-seed0", "grpo-pg-seed1", "grpo-forward-seed0", "grpo-forward-seed1"]
    assert in_process == everything
    table = json.loads(table_of(whole))
    assert table["evaluated_after"] == [0, 1, 2] and table["problems"] == 6 and not table["missing"]
    report = (Path(whole["output"]) / "report.md").read_text()
    assert "1 temperature rule x 2 methods x 2 seeds = 4 runs" in report and "Against pg" in report
    assert {path.name for path in Path(whole["output"]).glob("*.png")} == {"grpo.png", "differences.png"}
    links = re.findall(r"\]\((.*report\.html)\)", report)
    assert len(links) == 4 and all((Path(whole["output"]) / link).is_file() for link in links)
    printed = capsys.readouterr().out
    assert "Held-out scores" in printed and "pass@1" in printed

    in_process.clear()
    monkeypatch.setattr(command, "save_figures", lambda *_: [])  # drawing takes longer than all cells
    run_step = loop.run_step

    def stop_in_the_second_cell(session, learner, position, data, recorder):
        if position.step == 1 and session.config.seed == 1:
            raise Interrupted
        run_step(session, learner, position, data, recorder)

    monkeypatch.setattr(loop, "run_step", stop_in_the_second_cell)
    with pytest.raises(Interrupted):
        compare(parse_config(stopped))
    assert in_process == everything[:3]
    monkeypatch.setattr(loop, "run_step", run_step)
    with pytest.raises(UserError, match="continue it with --resume"):
        compare(parse_config(stopped))
    in_process.clear()
    compare(parse_config(stopped), resume=True)
    assert in_process == everything[2:]  # neither the warm start nor the first cell is repeated
    assert table_of(stopped) == table_of(whole)
    in_process.clear()
    compare(parse_config(stopped), resume=True)
    assert in_process == [] and table_of(stopped) == table_of(whole)
    with pytest.raises(UserError, match=r"cannot resume with training\.steps = 3"):
        compare(parse_config(stopped | {"training": stopped["training"] | {"steps": 3}}), resume=True)

    cells = make_grid(parse_config(whole)).cells
    assert not any((Path(cell.config.output) / "checkpoints").exists() for cell in cells)
    check_pairing(parse_config(whole), table)
    check_start(parse_config(whole))


def check_pairing(config, table):
    """Both methods of a seed start from the same model and samples, and the table contains their difference."""
    found = load_outcomes(make_grid(config))
    first, last = {}, {}
    for (_, method, seed), of in found.items():
        first.setdefault(seed, []).append(of.passed[0].tolist())
        last[method, seed] = of.passed[-1] / of.valid[-1]
    assert all(one == other for one, other in first.values())
    assert first[0] != first[1]  # other seeds have other samples
    difference = np.mean([last["forward", s] - last["pg", s] for s in (0, 1)])
    held = table["differences"]["pg"]["grpo"]["forward"]["final pass@1"]
    assert held["mean"] == pytest.approx(difference) and held["pairs"] == 2


def check_start(config):
    """The warm-started model can be loaded like any Hugging Face directory."""
    warm = load_model(f"{config.output}/warm/hf")
    assert warm.config == CONFIG and warm.tokenizer is not None


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_others_continue(compared, in_process, monkeypatch):
    values = compared()
    run_step = loop.run_step

    def fail_in_one_cell(session, *arguments):
        if session.config.output.endswith("grpo-pg-seed1"):
            raise RuntimeError("out of memory")
        run_step(session, *arguments)

    monkeypatch.setattr(loop, "run_step", fail_in_one_cell)
    monkeypatch.setattr(command, "save_figures", lambda *_: [])
    says = r"1 of 4 cells failed .*: grpo-pg-seed1; grpo-pg-seed1: RuntimeError: out of memory; .* --resume"
    with pytest.raises(RunStopped, match=says):
        compare(parse_config(values))
    table = json.loads(table_of(values))
    assert table["missing"] == ["grpo-pg-seed1"]
    assert table["differences"]["pg"]["grpo"]["forward"]["final pass@1"]["pairs"] == 1
    assert "grpo-pg-seed1" in (Path(values["output"]) / "report.md").read_text()


def test_without_weights_the_error_names_model_init(empty_model):
    with pytest.raises(UserError, match=r"no weights .*--model\.init=random"):
        load_model(empty_model)


# The table, from artificial outcomes


def made_up(rule_shift, method_shift, seed):
    rng = np.random.default_rng(seed)
    passed = np.minimum(rng.integers(0, 3, size=(3, 20)) + rule_shift + method_shift, 4)
    curves = {name: np.array([1.0, 2.0 + method_shift]) for name in table.CURVES}
    steps = np.array([1, 2])
    return table.Outcome(np.array([0, 1, 2]), passed, np.full((3, 20), 4), steps, curves, 1.0, {})


def test_the_table_contains_means_over_seeds_and_paired_differences(run_config):
    values = run_config(
        compare={"rules": ["grpo", "maxrl"], "methods": METHODS, "seeds": [0, 1, 2], "against": ["pg"]}
    )
    del values["objective"]
    grid = make_grid(parse_config(values))
    shift = {"grpo": 0, "maxrl": 1, "pg": 0, "forward": 1}
    found = {(c.rule, c.method, c.seed): made_up(shift[c.rule], shift[c.method], c.seed) for c in grid.cells}
    table = make_table(grid, found)
    for rule in grid.rules:
        last = np.mean([found[rule, "pg", s].passed[-1] / 4 for s in grid.seeds])
        assert table["scores"][rule]["pg"]["final pass@1"]["mean"] == pytest.approx(last)
        of = table["differences"]["pg"][rule]["forward"]
        assert of["final pass@1"]["mean"] == pytest.approx(
            0.25
        )  # one more passing sample of four on every problem
        assert of["mean pass@1"]["mean"] == pytest.approx(0.25) and of["final pass@1"]["wins"] == 3
        assert of["mean actor/entropy"]["mean"] == pytest.approx(0.5)
    pooled = table["differences"]["pg"]["all"]["forward"]["final pass@1"]
    assert pooled["mean"] == pytest.approx(0.25) and pooled["low"] > 0
    assert (pooled["wins"], pooled["pairs"]) == (6, 6)  # pairs of runs, not seeds
    # A seed that one of the two methods lacks is not a pair.
    del found["grpo", "pg", 2]
    table = make_table(grid, found)
    assert table["missing"] == ["grpo-pg-seed2"]
    assert table["differences"]["pg"]["grpo"]["forward"]["final pass@1"]["pairs"] == 2
    assert table["differences"]["pg"]["maxrl"]["forward"]["final pass@1"]["pairs"] == 3


# Worker processes

ECHO = """
import json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["kind"] == "die":
        os._exit(3)
    print(json.dumps({"error": job["kind"] + " of " + str(os.getpid()) if job["kind"] == "fail" else None}))
    sys.stdout.flush()
"""


def test_a_worker_that_dies_fails_only_its_job(compared, tmp_path, monkeypatch):
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    monkeypatch.setattr(pool, "WORKER", (sys.executable, str(script)))
    config, ended = parse_config(compared()), {}
    jobs = [
        Job(f"{kind}{i}", kind, config) for i, kind in enumerate(["ok", "die", "fail", "ok", "die", "ok"])
    ]
    run_jobs(
        jobs,
        [Resources([], {})] * 2,
        tmp_path / "logs",
        lambda job, error: ended.update({job.name: error}),
    )
    assert sorted(ended) == sorted(job.name for job in jobs)
    assert ended["ok0"] is ended["ok3"] is ended["ok5"] is None
    assert ended["fail2"].startswith("fail of ")
    for name in ("die1", "die4"):
        assert ended[name].startswith("its process ended with status 3; see ")


def test_the_machine_is_divided_equally(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert divide_machine(1) == [Resources([], {})]
    assert [part.cores for part in divide_machine(2)] == [[0, 2], [1, 3]]
    assert [part.cores for part in divide_machine(5)][-1] == [
        0
    ]  # with more workers than cores, workers share a core
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [part.environment for part in divide_machine(2)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    with pytest.raises(UserError, match=r"compare\.workers = 3 is more than the 2 GPUs"):
        divide_machine(3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_can_be_killed_and_resumed(compared, tmp_path, number):
    """Two real worker processes, killed during the first cells and then resumed."""
    whole, killed = compared("whole", workers=2), compared("killed", workers=2)
    paths = [tmp_path / "whole.yaml", tmp_path / "killed.yaml"]
    for path, values in zip(paths, (whole, killed)):
        path.write_text(yaml.safe_dump(values))
    assert main(["compare", str(paths[0])]) == 0
    run = subprocess.Popen([sys.executable, "-m", "lpo_jax.commands.main", "compare", str(paths[1])])
    cells = Path(killed["output"]) / "cells"
    wait_for(lambda: list(cells.glob("*/metrics.jsonl")))
    run.send_signal(number)
    run.wait(60)
    wait_for(lambda: resumes(paths[1]))
    assert table_of(killed) == table_of(whole)


def resumes(path):
    """Whether the resume succeeds; right after SIGKILL a worker may still be saving its run."""
    return main(["compare", str(path), "--resume"]) == 0


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
