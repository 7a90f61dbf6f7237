"""The program of a worker process: takes runs from its standard input, one JSON line each, and answers when one ends.

One process runs many cells, so that jax starts once and programs are compiled once: those of the model do not know
the method. What runs print goes to standard error, which is the worker's log.
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
from typing import Any

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.json_lines import dump_line


def serve(cores: str) -> None:
    """Serves the pool until it closes the line.

    Args:
      cores: a JSON list of CPU cores to run on; empty: all.
    """
    if chosen := json.loads(cores):
        os.sched_setaffinity(0, chosen)  # before jax counts them
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
    # The line is closed, or whoever held it is gone: a run that is under way saves its position and ends.
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: dict[str, Any]) -> str | None:
    """Runs a job to its end; returns one line that says what went wrong, or None."""
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


def _warm(config: Any) -> None:
    """The common warm start, exported to `hf` in its directory."""
    from lpo_jax.runs.checkpoint import load_run
    from lpo_jax.training.sft import sft

    sft(config, resume=True)
    load_run(config.output, "latest")[0].save(Path(config.output) / "hf")


def _cell(config: Any) -> None:
    """One run of the grid, from where an earlier start left off; its checkpoints make room when it has ended."""
    from lpo_jax.compare.outcome import read_outcome
    from lpo_jax.training.loop import train

    train(config, resume=True)
    run = Path(config.output)
    read_outcome(run).save(run)
    shutil.rmtree(run / "checkpoints")


RUNNERS = {"warm": _warm, "cell": _cell}

if __name__ == "__main__":
    serve(sys.argv[1])
