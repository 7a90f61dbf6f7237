"""`lpo compare`: the common warm start, all runs of the grid, and the report.

`config.output` receives warm/ (the warm start; warm/hf is the model), cells/ (the run directories without checkpoints,
each with outcome.json), logs/ (the output of the runs), table.json, report.md and its figures. Finished runs are not
repeated and stopped runs are resumed from their checkpoints, so a comparison that is killed and resumed ends with the
same table.
"""

import json
import time
from pathlib import Path

import jax

from lpo_jax import reporting
from lpo_jax.compare.figures import save_figures
from lpo_jax.compare.grid import Grid, make_grid, warm_config
from lpo_jax.compare.pool import Job, divide_machine, run_jobs
from lpo_jax.compare.report import comparison_table, render_report
from lpo_jax.compare.table import Outcome, Outcomes, make_table, solved
from lpo_jax.config import Config
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.files import write_file
from lpo_jax.inspection.page import save_report
from lpo_jax.json_lines import dump_line
from lpo_jax.parallel import hosts
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.signals import Signals
from lpo_jax.types import Json


def compare(config: Config, *, resume: bool = False) -> None:
    """Run `lpo compare`.

    Args:
      config: a config with a `compare` section.
      resume: continue the comparison in `config.output`.

    Raises:
      UserError: as in `make_grid`; `config.output` contains something else; or the job has several hosts.
      RunStopped: the warm start or some cells failed. The report contains the other cells.
      Interrupted: SIGTERM or Ctrl-C. Every run has saved its position.
    """
    if hosts.many():
        raise UserError("lpo compare runs on one machine; start it on one host, outside of a multi-host job")
    # This process computes nothing; the devices are for the workers.
    jax.config.update("jax_platforms", "cpu")
    grid, parts, console = make_grid(config), divide_machine(config.compare.workers), reporting.console()
    logs = Path(config.output) / "logs"
    with RunDirectory(config, "compare", resume), Signals():
        _warm_start(config, logs, console)
        failed = _run_cells(grid, parts, logs, console)
        outcomes = load_outcomes(grid)
        if outcomes:
            table = write_report(config, grid, outcomes)
            write_cell_reports(grid, outcomes)
            console.print(comparison_table(table))
            console.print(
                f"report       {config.output}/report.md, table.json and figures; report.html of each cell"
            )
    if failed:
        name, error = next(iter(failed.items()))
        raise RunStopped(
            f"{len(failed)} of {len(grid.cells)} cells failed and are missing in the report: {', '.join(failed)}; "
            f"{name}: {error}; repeat them with --resume"
        )


def _warm_start(config: Config, logs: Path, console) -> None:
    """Run the common warm start, unless it is finished or the config has none."""
    warm = warm_config(config)
    if config.warm_start.steps == 0 or Path(warm.output, "hf").exists():
        return
    console.print(f"warm start: {config.warm_start.steps} supervised updates; log in {logs}")
    errors = []
    run_jobs([Job("warm", "warm", warm)], divide_machine(1), logs, lambda _, error: errors.append(error))
    if errors[0]:
        raise RunStopped(f"the warm start failed: {errors[0]}")


def load_outcomes(grid: Grid) -> Outcomes:
    """Read the outcomes of the finished cells, by (rule, method, seed)."""
    found = {(c.rule, c.method, c.seed): Outcome.load(Path(c.config.output)) for c in grid.cells}
    return {key: outcome for key, outcome in found.items() if outcome is not None}


def write_cell_reports(grid: Grid, outcomes: Outcomes) -> None:
    """Write the report.html of each finished cell that does not have one yet."""
    for cell in grid.cells:
        finished = (cell.rule, cell.method, cell.seed) in outcomes
        if finished and not Path(cell.config.output, "report.html").exists():
            save_report([cell.config.output])


def write_report(config: Config, grid: Grid, outcomes: Outcomes) -> dict[str, Json]:
    """Write table.json, the figures and report.md, and return the table."""
    output = Path(config.output)
    table = make_table(grid, outcomes)
    # dump_line replaces non-finite numbers by null.
    write_file(output / "table.json", json.dumps(json.loads(dump_line(table)), indent=1) + "\n")
    figures = save_figures(output, grid, outcomes, table)
    write_file(output / "report.md", render_report(config, grid, outcomes, table, figures))
    return table


def _run_cells(grid: Grid, parts, logs: Path, console) -> dict[str, str]:
    """Run the cells that are not finished; return the error messages of failed cells by name."""
    todo = [cell for cell in grid.cells if Outcome.load(Path(cell.config.output)) is None]
    jobs = [Job(cell.name, "cell", cell.config) for cell in todo]
    failed: dict[str, str] = {}
    done, started = len(grid.cells) - len(todo), time.monotonic()
    if done and todo:
        console.print(f"{done} of {len(grid.cells)} cells are already finished")

    def ended(job: Job, error: str | None) -> None:
        nonlocal done
        done += 1
        if error:
            failed[job.name] = error
            result = f"failed: {error}"
        else:
            outcome = Outcome.load(Path(job.config.output))
            score = float(solved(outcome.passed[-1], outcome.valid[-1], 1).mean())
            result = f"held-out pass@1 {reporting.percent(score)}, {reporting.duration(outcome.seconds)}"
        left = len(grid.cells) - done
        pace = (time.monotonic() - started) / (len(todo) - left)
        console.print(
            f"cell {done}/{len(grid.cells)} {job.name}: {result} · left {reporting.duration(left * pace)}"
        )

    run_jobs(jobs, parts, logs, ended)
    return failed
