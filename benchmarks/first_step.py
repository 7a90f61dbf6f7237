"""Seconds from `lpo train` to the end of its first step, with an empty and with a warm compile cache: one JSON line.

The quickstart's model and task with 4 prompts x 4 responses, so that it is starting that is timed and not a long
step; without warm start, the evaluation before the first step of the same size.

    python benchmarks/first_step.py

Memory of a virtual machine that nobody uses may go back to its host, which takes its time to hand it out again: where
this was written up to 3 s for 1 GB, against 0.1 s once it is there. Pages that are set aside stay:

    echo 3500 > /proc/sys/vm/nr_hugepages     # 7 GB, as root; 0 gives them back
    GLIBC_TUNABLES=glibc.malloc.hugetlb=2 python benchmarks/first_step.py
"""

import os
import resource
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


def first_step(cache: str) -> tuple[float, float, float]:
    """Starts a run with compiled programs in `cache`.

    Returns:
      Seconds until its first step is in metrics.jsonl, the seconds of them that the step took, and the processor
      seconds that the kernel took of the whole run.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_stime
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
                run.wait()
            finally:
                run.kill()
        kernel = resource.getrusage(resource.RUSAGE_CHILDREN).ru_stime - before
        return taken, steps[0]["timing_s/step"], kernel


def _steps(run: Path) -> list[dict]:
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    return [row for row in rows if "timing_s/step" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        cold, _, _ = first_step(cache)
        warm = sorted(first_step(cache) for _ in range(5))
    print_line(
        {
            "benchmark": "first step",
            "cold_s": cold,
            "warm_s": warm[2][0],
            "of_which_the_step_s": warm[2][1],
            "kernel_cpu_s": warm[2][2],
            "all_warm_s": [taken for taken, _, _ in warm],
        }
    )


if __name__ == "__main__":
    main()
