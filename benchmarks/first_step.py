"""Seconds from `lpo train` to the end of its first step, with an empty and with a warm compile cache: one JSON line.

The step of the quickstart's model, shapes and task, without warm start and with a single held-out sample.

    python benchmarks/first_step.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [
    *(sys.executable, "-m", "lpo_jax.cli", "train", "configs/quickstart.yaml"),
    *("--warm_start.steps=0", "--training.steps=1", "--evaluation.every=0"),
    *("--evaluation.problems=1", "--evaluation.num_responses=1"),
]


def first_step(cache: str) -> float:
    """Starts a run with compiled programs in `cache`; seconds until its first step is in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        started = time.perf_counter()
        with subprocess.Popen(
            [*COMMAND, f"--output={folder}"], env=environment, stdout=subprocess.DEVNULL
        ) as run:
            while not (metrics.exists() and "training/global_step" in metrics.read_text()):
                if run.poll():
                    raise SystemExit(f"lpo train ended with status {run.returncode}")
                time.sleep(0.05)
            taken = time.perf_counter() - started
        return taken


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        cold = first_step(cache)
        warm = sorted(first_step(cache) for _ in range(3))
    print(json.dumps({"benchmark": "first step", "cold_s": cold, "warm_s": warm[1], "all_warm_s": warm}))


if __name__ == "__main__":
    main()
