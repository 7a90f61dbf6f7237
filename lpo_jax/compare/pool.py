"""A pool of worker processes for whole runs. Each process runs one job at a time.

If a process dies, its job is reported as failed and a new process runs the next job.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.json_lines import dump_line
from lpo_jax.types import Json

WORKER = (sys.executable, "-m", "lpo_jax.compare.worker")


class Job(NamedTuple):
    """A run for a worker process; `kind` is a key of `lpo_jax.compare.worker.RUNNERS`."""

    name: str
    kind: str
    config: Config


class Resources(NamedTuple):
    """A worker's part of the machine: CPU cores (an empty list means all) and environment variables."""

    cores: list[int]
    environment: dict[str, str]


def run_jobs(
    jobs: Sequence[Job], resources: Sequence[Resources], logs: Path, ended: Callable[[Job, str | None], None]
) -> None:
    """Run all jobs, one worker process for each element of `resources`.

    On an exception, for example because of a signal, all workers save their runs and exit before it propagates.

    Args:
      jobs: the runs, started in this order.
      resources: one for each worker, see `divide_machine`.
      logs: directory of the logs `worker<i>.log`, which receive the output of the runs.
      ended: called with each job that has ended, and an error message or None.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, workers = deque(jobs), dict[int, _Worker]()
    try:
        while waiting or any(worker.job for worker in workers.values()):
            for index, part in enumerate(resources):
                if waiting and index not in workers:
                    workers[index] = _Worker(part, logs / f"worker{index}.log")
                if waiting and workers[index].job is None:
                    workers[index].give(waiting.popleft())
            for index in _answering(workers):
                job, error = workers[index].answer()
                if workers[index].process.poll() is not None:
                    del workers[index]
                ended(job, error)
    finally:
        for worker in workers.values():
            worker.close()
        for worker in workers.values():
            worker.process.wait()


class _Worker:
    def __init__(self, resources: Resources, log: Path):
        self.log = log
        self.job: Job | None = None
        with open(log, "a") as output:
            self.process = subprocess.Popen(
                [*WORKER, json.dumps(resources.cores)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=os.environ | _compile_cache() | resources.environment,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the workers
            )

    def give(self, job: Job) -> None:
        self.job = job
        # A dead worker is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            line = dump_line({"kind": job.kind, "config": job.config.to_dict()})
            self.process.stdin.write(line.decode())
            self.process.stdin.flush()

    def answer(self) -> tuple[Job, str | None]:
        """Return the job that has ended, and an error message or None."""
        job, self.job = self.job, None
        if line := self.process.stdout.readline():
            return job, json.loads(line)["error"]
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return job, f"its process ended with {how}; see {self.log}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _answering(workers: dict[int, _Worker]) -> list[int]:
    """Wait until workers have answered or died, and return their indices."""
    with selectors.DefaultSelector() as selector:
        for index, worker in workers.items():
            if worker.job:
                selector.register(worker.process.stdout, selectors.EVENT_READ, index)
        return [key.data for key, _ in selector.select()]


def divide_machine(workers: int) -> list[Resources]:
    """Divide the machine into equal parts: one GPU per worker if there are GPUs, otherwise CPU cores.

    Raises:
      UserError: there are GPUs, but fewer than workers.
    """
    if workers == 1:
        return [Resources([], {})]
    if gpus := _gpus():
        if workers > len(gpus):
            raise UserError(f"compare.workers = {workers} is more than the {len(gpus)} GPUs of this machine")
        return [Resources([], {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:workers]]
    if not hasattr(os, "sched_getaffinity"):  # macOS: the system schedules the workers
        return [Resources([], {}) for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [Resources(cores[i::workers] or [cores[i % len(cores)]], {}) for i in range(workers)]


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, found without initialising jax on them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listed.splitlines()))]


def _compile_cache() -> dict[str, Json]:
    """Environment variables that make the workers share this process's compilation cache."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    if not folder:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(seconds),
    }
