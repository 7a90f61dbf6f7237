"""`lpo compare`: one warm start, every run of the grid, and what came of them.

Leaves in `config.output`: warm/ (the common start; warm/hf is the model), cells/ (each run without its checkpoints,
with outcome.json), logs/ (what the runs printed), table.json, report.md and its figures. A run that has ended is not
run again and one that was stopped goes on from its checkpoint, so that a comparison that is killed and resumed ends
with the same table.
"""

import json
import time
from pathlib import Path

import jax

from lpo_jax import reporting
from lpo_jax.compare.figures import save_figures
from lpo_jax.compare.grid import Grid, make_grid, warm_config
from lpo_jax.compare.outcome import Outcome
from lpo_jax.compare.pairs import solved
from lpo_jax.compare.pool import Job, divide_machine, run_jobs
from lpo_jax.compare.report import render_report
from lpo_jax.compare.table import Outcomes, make_table
from lpo_jax.config import Config
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.files import write_file
from lpo_jax.json_lines import dump_line
from lpo_jax.parallel import hosts
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.signals import Signals


def compare(config: Config, *, resume: bool = False) -> None:
    """Runs `lpo compare`.

    Raises:
      UserError: as `make_grid`, the output holds something else, or this is one of many hosts.
      RunStopped: the warm start or some of the cells failed; the report holds the others.
      Interrupted: SIGTERM or Ctrl-C; every run has saved its position.
    """
    if hosts.many():
        raise UserError("lpo compare divides one machine; start it on one host, outside of a job of many")
    # This process computes nothing: the devices belong to the workers.
    jax.config.update("jax_platforms", "cpu")
    grid, parts, console = make_grid(config), divide_machine(config.compare.workers), reporting.console()
    logs = Path(config.output) / "logs"
    with RunDirectory(config, "compare", resume), Signals():
        _warm_start(config, logs, console)
        failed = _run_cells(grid, parts, logs, console)
        outcomes = load_outcomes(grid)
        if outcomes:
            write_report(config, grid, outcomes)
            console.print(f"report       {config.output}/report.md, table.json and figures")
    if failed:
        name, error = next(iter(failed.items()))
        raise RunStopped(
            f"{len(failed)} of {len(grid.cells)} cells failed and are missing in the report: {', '.join(failed)}; "
            f"{name}: {error}; run them again with --resume"
        )


def _warm_start(config: Config, logs: Path, console) -> None:
    """Makes the common start, unless it is there or none is asked for."""
    warm = warm_config(config)
    if config.warm_start.steps == 0 or Path(warm.output, "hf").exists():
        return
    console.print(f"warm start: {config.warm_start.steps} supervised updates; its log is in {logs}")
    errors = []
    run_jobs([Job("warm", "warm", warm)], divide_machine(1), logs, lambda _, error: errors.append(error))
    if errors[0]:
        raise RunStopped(f"the warm start failed: {errors[0]}")


def load_outcomes(grid: Grid) -> Outcomes:
    """The finished cells, by rule, method and seed."""
    found = {
        (cell.rule, cell.method, cell.seed): Outcome.load(Path(cell.config.output)) for cell in grid.cells
    }
    return {key: outcome for key, outcome in found.items() if outcome is not None}


def write_report(config: Config, grid: Grid, outcomes: Outcomes) -> None:
    """table.json, the figures, and report.md."""
    output = Path(config.output)
    table = make_table(grid, outcomes)
    # By way of a JSON line, in which numbers that are not finite are null.
    write_file(output / "table.json", json.dumps(json.loads(dump_line(table)), indent=1) + "\n")
    figures = save_figures(output, grid, outcomes, table)
    write_file(output / "report.md", render_report(config, grid, outcomes, table, figures))


def _run_cells(grid: Grid, parts, logs: Path, console) -> dict[str, str]:
    """Runs what is not finished; returns what went wrong, by cell."""
    todo = [cell for cell in grid.cells if Outcome.load(Path(cell.config.output)) is None]
    jobs = [Job(cell.name, "cell", cell.config) for cell in todo]
    failed: dict[str, str] = {}
    done, started = len(grid.cells) - len(todo), time.monotonic()
    if done and todo:
        console.print(f"{done} of {len(grid.cells)} cells are finished already")

    def ended(job: Job, error: str | None) -> None:
        nonlocal done
        done += 1
        if error:
            failed[job.name] = error
            told = f"failed: {error}"
        else:
            outcome = Outcome.load(Path(job.config.output))
            score = float(solved(outcome.passed[-1], outcome.valid[-1], 1).mean())
            told = f"held-out pass@1 {reporting.percent(score)}, {reporting.duration(outcome.seconds)}"
        left = len(grid.cells) - done
        pace = (time.monotonic() - started) / (len(todo) - left)
        console.print(
            f"cell {done}/{len(grid.cells)} {job.name}: {told} · left {reporting.duration(left * pace)}"
        )

    run_jobs(jobs, parts, logs, ended)
    return failed
