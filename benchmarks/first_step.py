"""Print the seconds from `lpo train` to the end of its first step as one JSON line.

Measured with an empty and with a warm compile cache, in wall time and, because other jobs change it less, in processor
time of all cores (Linux only), of which a part is spent in the kernel. Python caches bytecode, whatever the environment
says, as it does for an installed package. The run uses the quickstart's model and task with only 4 prompts x
4 responses, so that most of the time is start-up; it has no warm start, and the evaluation before the first step has
the same size as the step.

    python benchmarks/first_step.py

A virtual machine may return unused memory to its host, and getting it back is slow: up to 3 s for 1 GB on the machine
where this was written, compared with 0.1 s for memory that is already there. Reserved pages are not returned:

    echo 3500 > /proc/sys/vm/nr_hugepages     # 7 GB, as root; 0 gives them back
    GLIBC_TUNABLES=glibc.malloc.hugetlb=2 python benchmarks/first_step.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lpo_jax.json_lines import print_line
from lpo_jax.reporting import read_metrics
from lpo_jax.reporting.writers import METRICS_FILE

COMMAND = [
    *(sys.executable, "-m", "lpo_jax.commands.main", "train", "configs/quickstart.yaml"),
    *("--warm_start.steps=0", "--training.steps=1", "--evaluation.every=0"),
    *("--evaluation.problems=4", "--evaluation.num_responses=4"),
    *("--training.prompts_per_step=4", "--sampling.num_responses=4"),
]


def first_step(cache: str) -> tuple[float, float, float, float]:
    """Start a run with its compile cache in `cache`.

    Returns:
      Seconds until the first step is in metrics.jsonl, the seconds of the step itself, and the processor seconds of the
      process until then: all of them, and those in the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        started = time.perf_counter()
        with subprocess.Popen(
            [*COMMAND, f"--output={folder}"], env=environment, stdout=subprocess.DEVNULL
        ) as run:
            try:
                while not (steps := _steps(Path(folder))):
                    if run.poll():
                        raise SystemExit(f"lpo train ended with status {run.returncode}")
                    time.sleep(0.05)
                taken = time.perf_counter() - started
                user, kernel = _processor_seconds(run.pid)
                run.wait()
            finally:
                run.kill()
        return taken, steps[0]["timing_s/step"], user + kernel, kernel


def _processor_seconds(pid: int) -> tuple[float, float]:
    """Return the user and the kernel time of a process so far (`utime` and `stime` of proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, kernel = (int(x) / os.sysconf("SC_CLK_TCK") for x in fields[11:13])
    return user, kernel


def _steps(run: Path) -> list[dict]:
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    return [row for row in rows if "timing_s/step" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        cold, _, cold_processor, _ = first_step(cache)
        warm = sorted(first_step(cache) for _ in range(5))
    print_line(
        {
            "benchmark": "first step",
            "cold_s": cold,
            "cold_processor_s": cold_processor,
            "warm_s": warm[2][0],
            "of_which_the_step_s": warm[2][1],
            "warm_processor_s": sorted(run[2] for run in warm)[2],
            "of_which_in_the_kernel_s": sorted(run[3] for run in warm)[2],
            "all_warm_s": [run[0] for run in warm],
        }
    )


if __name__ == "__main__":
    main()
