"""The program of a worker process: it reads jobs from standard input and writes one answer per job, as JSON lines.

One process runs many cells, so that jax starts once and compiles programs once: the model's programs do not depend on
the method. The output of the runs goes to standard error, which is the worker's log.
"""

import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.json_lines import dump_line
from lpo_jax.types import Json


def main(cores: str) -> None:
    """Run jobs until standard input is closed.

    Args:
      cores: a JSON list of the CPU cores to run on; an empty list means all.
    """
    if chosen := json.loads(cores):
        os.sched_setaffinity(0, chosen)  # before jax counts the cores
    keep_freed_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    from lpo_jax.runs.signals import Interrupted

    try:
        while True:
            error = _run(jobs.get())
            answers.write(dump_line({"error": error}).decode())
            answers.flush()
    except Interrupted:
        return


def _listen(jobs: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    # The pool has closed the pipe or died: a run in progress saves its position and ends.
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: dict[str, Json]) -> str | None:
    """Run a job and return an error message of one line, or None."""
    from lpo_jax.config import parse_config
    from lpo_jax.parallel import hosts

    try:
        hosts.require_devices()
        RUNNERS[job["kind"]](parse_config(job["config"]))
    except (UserError, RunStopped) as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _warm(config: Json) -> None:
    """Run the common warm start and export the model to `hf` in its directory."""
    from lpo_jax.runs.checkpoint import load_run
    from lpo_jax.training.sft import sft

    sft(config, resume=True)
    load_run(config.output, "latest")[0].save(Path(config.output) / "hf")


def _cell(config: Json) -> None:
    """Run one cell of the grid, resuming it if it was started before; delete its checkpoints at the end."""
    from lpo_jax.compare.table import read_outcome
    from lpo_jax.runs.directory import SAVED, RunDirectory, read_config
    from lpo_jax.training.loop import train

    train(config, resume=True)
    run = Path(config.output)
    read_outcome(run).save(run)
    # Without this note a resume would report the deleted checkpoints as missing.
    RunDirectory(read_config(run), "train", resume=True).note(**{SAVED: None})
    shutil.rmtree(run / "checkpoints")


RUNNERS = {"warm": _warm, "cell": _cell}

if __name__ == "__main__":
    main(sys.argv[1])
