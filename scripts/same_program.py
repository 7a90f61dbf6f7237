"""Compare two checkouts: do they print and write the same numbers, to the last digit?

    python scripts/same_program.py OLD_CHECKOUT NEW_CHECKOUT [--scratch DIR] [--only NAME]

Every case of `CASES` runs once in each checkout, with the Python that runs this script and the checkout on
PYTHONPATH: five steps of the quickstart, of a GSPO run and of a GBMPO run, then `lpo eval` and `lpo plan` in several
forms. Sizes are overridden so that the comparison takes a few minutes on two cores, most of it compiling; with
JAX_DISABLE_MOST_OPTIMIZATIONS=1 in the environment it is faster. With `--scratch` the old checkout's results are kept
there, and are used again by the next comparison.

Compared as text are metrics (without durations and machine figures), sampled rollouts, evaluation responses and the
JSON that the commands print. The table that is printed gives the number of values compared and of equal ones for each
file. The exit status is 1 if anything differs; the first difference of each file is printed.

Both checkouts share one compilation cache, whose keys contain the whole program: the second checkout compiles only what
the first did not.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

# Durations, and figures of the machine or the process: docs/metrics.md marks the metrics with a dagger.
MACHINE_FIGURES = re.compile(r"timing_s/|perf/(?!total_num_tokens)|seconds_planning$")

SMALL = (
    "--training.steps=5 --training.prompts_per_step=4 --training.updates_per_step=2 --sampling.num_responses=4 "
    "--training.save_rollouts=true --training.save_plots=false --checkpoint.every=0 --warm_start.only_below=1.0 "
    "--evaluation.problems=4 --evaluation.num_responses=2 --evaluation.every=2 "
    "--task.scores=[1.0,0.1,0.0]"  # most groups of an untrained model would otherwise carry no signal
)
QUICKSTART = "--warm_start.steps=2 --warm_start.batch_size=4 --training.token_budget=320"
MICRO = "--warm_start.steps=40 --warm_start.batch_size=32 --rewards.workers=1"


@dataclasses.dataclass(frozen=True)
class Case:
    """One `lpo` command, and what of it is compared: its JSON output, and the .jsonl files in the directory `name`.

    Paths are relative to a working directory in which `configs` is that of the checkout.
    """

    name: str
    command: str
    devices: int = 1  # CPU devices that JAX is given
    prints: bool = False  # standard output is JSON and is compared
    status: tuple[int, ...] = (0,)


CASES = (
    Case("quickstart", f"train configs/quickstart.yaml --output=quickstart {SMALL} {QUICKSTART}"),
    Case(
        "gspo",
        f"train configs/compare_countdown_micro.yaml --output=gspo {SMALL} {MICRO} "
        "--objective.name=gspo --sampling.max_rows=8 --checkpoint.every=2",
    ),
    Case(
        "gbmpo",
        f"train configs/compare_countdown_micro.yaml --output=gbmpo {SMALL} {MICRO} "
        "--objective.name=gbmpo-probl2kl --mesh.fsdp=2 --training.remat=true",
        devices=2,
    ),
    Case("eval-run", "eval gspo --checkpoint=latest --json", prints=True),
    Case("eval-config", "eval configs/quickstart.yaml --evaluation.problems=4 --json", prints=True),
    Case(
        "eval-suite",
        "eval quickstart --checkpoint=latest --suite=countdown-generated --out=eval-suite --json "
        "--problems=4 --num-responses=2 --max-tokens=12",
        prints=True,
    ),
    Case(
        "plan", "plan configs/quickstart.yaml --topology=h100:8 --estimate --json", prints=True, status=(0, 3)
    ),
    Case(
        "plan-1p7b",
        "plan configs/math_1p7b.yaml --model.path=configs/models/qwen3-1.7b --topology=h100:8 --estimate --json",
        prints=True,
        status=(0, 3),
    ),
)


def main() -> int:
    """Run all cases in both checkouts and print what is equal; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=pathlib.Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=pathlib.Path, metavar="NEW_CHECKOUT")
    parser.add_argument(
        "--scratch", type=pathlib.Path, help="directory that keeps the runs (default: a temporary one)"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="run this case only; may be repeated")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or pathlib.Path(temporary)).resolve()
        shutil.rmtree(scratch / "new", ignore_errors=True)
        old = _run_checkout(arguments.old.resolve(), scratch / "old", scratch, cases)
        new = _run_checkout(arguments.new.resolve(), scratch / "new", scratch, cases)
    return _report(old, new)


def _run_checkout(
    checkout: pathlib.Path, directory: pathlib.Path, scratch: pathlib.Path, cases: list[Case]
) -> dict[str, dict[str, str]]:
    """Run the cases that have no results yet; returns the text of every value, by file and by its path in the file."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "configs").exists():
        (directory / "configs").symlink_to(checkout / "configs")
    module, function = _entry_point(checkout)
    program = (
        f"import sys, lpo_jax; from {module} import {function} as main\n"
        f"assert lpo_jax.__file__.startswith({str(checkout)!r}), lpo_jax.__file__\n"
        "sys.exit(main())"
    )
    values: dict[str, dict[str, str]] = {}
    for case in cases:
        results = directory / f"{case.name}.json"
        if not results.exists():
            results.write_text(
                json.dumps(_run_case(case, checkout, directory, program, scratch / "programs"))
            )
        values |= json.loads(results.read_text())
    return values


def _run_case(
    case: Case, checkout: pathlib.Path, directory: pathlib.Path, program: str, cache: pathlib.Path
) -> dict[str, dict[str, str]]:
    """Run one case in its working directory; returns its values as `_run_checkout` does."""
    print(f"{directory.name}: lpo {case.name}", file=sys.stderr, flush=True)
    shutil.rmtree(directory / case.name, ignore_errors=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={case.devices}",
    }
    command = [sys.executable, "-c", program, *case.command.split()]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode not in case.status:
        raise SystemExit(f"{checkout}: lpo {case.name} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    values = {}
    if case.prints:
        printed = json.loads(done.stdout, parse_float=str, parse_int=str)
        values[f"{case.name} (printed)"] = dict(_leaves(printed))
    for path in sorted((directory / case.name).rglob("*.jsonl")):
        rows = [json.loads(line, parse_float=str, parse_int=str) for line in path.open()]
        values[str(path.relative_to(directory))] = dict(_leaves(rows))
    return values


def _entry_point(checkout: pathlib.Path) -> tuple[str, str]:
    """Module and function of the command `lpo`, which have moved between checkouts."""
    with (checkout / "pyproject.toml").open("rb") as file:
        module, _, function = tomllib.load(file)["project"]["scripts"]["lpo"].partition(":")
    return module, function


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every number, string, flag and null in a JSON value, without figures of the machine."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not MACHINE_FIGURES.search(key):
                yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, "null" if value is None else str(value)


def _report(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> int:
    """Print the table of files and the first difference of each; returns the exit status."""
    differences = []
    width = max(map(len, old | new))
    print(f"{'file':{width}}  values   equal")
    compared = equal = 0
    for file in old | new:
        before, after = old.get(file, {}), new.get(file, {})
        paths = list(before | after)
        differing = [path for path in paths if before.get(path) != after.get(path)]
        print(f"{file:{width}}  {len(paths):6}  {len(paths) - len(differing):6}")
        compared, equal = compared + len(paths), equal + len(paths) - len(differing)
        if differing or not paths:
            path = differing[0] if differing else "(nothing to compare)"
            differences.append(
                f"{file}: {path.lstrip('.')}: {before.get(path)} before, {after.get(path)} after"
            )
    print(f"{'all':{width}}  {compared:6}  {equal:6}")
    for difference in differences:
        print(f"DIFFERS {difference}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
