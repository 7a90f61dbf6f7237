"""Measure the report of a large run: time to write, size, and time to open in headless Chromium. Prints one JSON line.

    python benchmarks/report_page.py                    # 200 steps x 256 prompts x 8 responses
    python benchmarks/report_page.py --steps 20         # a quick look

The run is made up by scripts/synthetic_run.py. The time to open is until the first chart is drawn; the browser has been
started before. It is null where no Chromium is installed. CPU times stand beside wall times, which grow with the load
of the machine.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In place of this folder, whose files may have the names of standard modules.
sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]

from synthetic_run import write_run

from lpo_jax.inspection.page import save_report


def seconds_to_open(path: Path, times: int) -> tuple[list[float], list[float]] | None:
    """Open a file several times in new pages; returns seconds of wall time, and CPU seconds of the page's thread."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    wall, cpu = [], []
    with sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        for _ in range(times):
            page = browser.new_page()
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            started = time.perf_counter()
            page.goto(path.as_uri(), wait_until="commit")
            page.wait_for_selector(".plot .main-svg")
            wall.append(round(time.perf_counter() - started, 2))
            metrics = session.send("Performance.getMetrics")["metrics"]
            cpu.append(round({of["name"]: of["value"] for of in metrics}["TaskDuration"], 2))
            page.close()
        browser.close()
    return wall, cpu


def main() -> None:
    """Run the measurement that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 200), ("prompts", 256), ("responses", 8), ("words", 40), ("times", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    times = sizes.pop("times")
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", **sizes)
        wall, cpu = time.perf_counter(), time.process_time()
        path = save_report([run])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        opened = seconds_to_open(path, times) or (None, None)
        result = sizes | {
            "megabytes_of_run": round(sum(p.stat().st_size for p in run.rglob("*.jsonl")) / 1e6, 1),
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "seconds_to_write": round(wall, 1),
            "cpu_seconds_to_write": round(cpu, 1),
            "seconds_to_open": opened[0],
            "cpu_seconds_to_open": opened[1],
            "load_average": round(os.getloadavg()[0], 1),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
