"""`lpo eval MODEL --suite`: evaluate any model, or a run's checkpoint, on benchmarks."""

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpo_jax import __version__
from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import STOP, TEMPLATE_ARGUMENTS, CommandParser, finite, positive, some_text
from lpo_jax.commands.resumable import STOPPED
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line
from lpo_jax.types import Json

if TYPE_CHECKING:
    from lpo_jax.evaluation.suite import Settings
    from lpo_jax.tasks.benchmarks import Benchmark

# Default response lengths: those of the LPO paper, and the one for Countdown (1024) for all other suites.
_MAX_TOKENS = {"math": 4096, "code": 4096}
_DATA = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".arrow")
_SECONDS_BETWEEN_LINES = 15.0


def _valued(kind: Callable[[str], Json], metavar: str, text: str) -> dict[str, Json]:
    """Keyword arguments of `add_argument` for an option with a value."""
    return {"type": kind, "metavar": metavar, "help": text}


# Options that require --suite. Except for data_dir, task and out they are fields of `evaluation.suite.Settings`.
_OPTIONS: dict[str, dict[str, Json]] = {
    "data_dir": _valued(some_text, "DIR", "folder with the suite's files (default: download from the hub)"),
    "task": _valued(
        some_text,
        "NAME",
        "task of a data FILE: math, gsm8k, code, ...; set its options with --task.option=value",
    ),
    "out": _valued(some_text, "DIR", "directory for results and responses (runs/eval-MODEL-SUITE)"),
    "num_responses": _valued(positive, "K", "samples per problem (set by each benchmark; 1 for a data FILE)"),
    "problems": _valued(positive, "N", "use the first N problems of each benchmark (all)"),
    "temperature": _valued(finite, "T", "0 is greedy (0.6, as in the paper)"),
    "top_p": _valued(finite, "P", "nucleus sampling (1.0: off)"),
    "max_tokens": _valued(positive, "N", "maximum tokens per response (4096 for math and code, else 1024)"),
    "max_prompt_tokens": _valued(
        positive, "N", "maximum tokens per prompt (the model's positions less --max-tokens)"
    ),
    "overlong_prompts": {"choices": ("error", "drop"), "help": "refuse longer prompts, or drop them (error)"},
    "stop": STOP,
    "chat": {
        "action": argparse.BooleanOptionalAction,
        "help": "format prompts with the chat template (set by the benchmark)",
    },
    "template_arguments": TEMPLATE_ARGUMENTS,
    "batch": _valued(positive, "N", "prompts sampled together (as many as give 64 responses)"),
    "dtype": {"choices": ("float32", "bfloat16"), "help": "dtype of activations and products (float32)"},
    "seed": _valued(int, "N", "seed of the samples and the bootstrap (0)"),
    "allow_weak_sandbox": {
        "action": "store_true",
        "help": "run programs without bubblewrap; this is recorded",
    },
}


def add_options(command: CommandParser) -> None:
    """Add --suite and the options that require it."""
    group = command.add_argument_group(
        "suites",
        "All responses are kept; the same command continues a stopped evaluation. FILE is a data file (jsonl, json,\n  "
        "parquet) with --task, or YAML: a list of {name: mine, k: 16, task: {name: math, heldout: mine.jsonl}}.",
    )
    group.add_argument(
        "--suite", metavar="NAME|FILE", help="math, countdown, countdown-generated, code, or your own file"
    )
    for name, option in _OPTIONS.items():
        dashes = f"--{name.replace('_', '-')}"
        group.add_argument(dashes, dest=name, default=argparse.SUPPRESS, **option)
        if "_" in name:  # the spelling of config keys
            hidden = {**option, "help": argparse.SUPPRESS}
            group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, **hidden)


def given_options(arguments: argparse.Namespace) -> dict[str, Json]:
    """Return the options that require --suite and are on the command line, by name."""
    values = vars(arguments)
    return {name: values[name] for name in _OPTIONS if name in values}


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo eval --suite` and return the exit status."""
    from lpo_jax.runs.signals import Interrupted, Signals

    open_devices()
    try:
        with Signals():
            _evaluate(arguments, given_options(arguments))
    except Interrupted:
        print("lpo: stopped by a signal; the same command continues the evaluation", file=sys.stderr)
        return STOPPED
    return None


def _evaluate(arguments: argparse.Namespace, given: dict[str, Json]) -> None:
    """Evaluate, write and print; `given` is the result of `given_options`."""
    import jax.numpy as jnp

    from lpo_jax import reporting
    from lpo_jax.commands import evaluation_files as files
    from lpo_jax.evaluation.suite import mean_pass_at_1, prepare_benchmarks, run_benchmark
    from lpo_jax.models.load import load_config_and_tokenizer
    from lpo_jax.reporting.tables import suite_table
    from lpo_jax.runs.checkpoint import load_run
    from lpo_jax.runs.directory import read_config
    from lpo_jax.sampling import Sampler
    from lpo_jax.sampling.model import load_model

    target, suite, checkpoint = arguments.target, arguments.suite, arguments.checkpoint
    data_dir, task, out = (given.pop(name, None) for name in ("data_dir", "task", "out"))
    is_run = (Path(target) / "run.json").is_file()
    model_of_run = read_config(target).model if is_run else None
    settings = _settings(suite, model_of_run.template_arguments if model_of_run else {}, given)
    benchmarks = find_benchmarks(suite, data_dir, task, arguments.overrides)
    if not is_run:
        _check_model(target, checkpoint)
    name = model_of_run.path if model_of_run else target
    config, tokenizer, _ = load_config_and_tokenizer(name, template_arguments=settings.template_arguments)
    if tokenizer is None:
        raise UserError(f"{name}: has no tokenizer, so it cannot be evaluated")
    prepared = prepare_benchmarks(benchmarks, settings, tokenizer, config.max_positions)
    model, step = load_run(target, checkpoint) if is_run else (load_model(target), None)
    label = f"{target}, step {step}" if is_run else target
    plain = dataclasses.asdict(settings) | {"stop": list(settings.stop)}
    identity = {
        "model": {"name": label, "weights": files.weights_hash(model)},
        "suite": suite,
        "settings": plain,
        "benchmarks": {benchmark.name: benchmark.identity() for benchmark in prepared},
    }
    directory = Path(out or f"runs/eval-{_slug(target)}-{_slug(suite)}")
    sampler = Sampler(model.config, model.eos_ids, jnp.dtype(settings.dtype), decode=tokenizer.decode)
    with files.opened(directory, identity):
        weights = sampler.prepare(model.params)
        del model  # frees memory for longer responses
        results, show = {}, _Progress()
        for benchmark in prepared:
            path = files.responses_file(directory, benchmark.name)
            results[benchmark.name] = run_benchmark(
                benchmark, settings, sampler, weights, tokenizer, path, show
            )
        summary = {
            "model": label,
            "suite": suite,
            "lpo_jax": __version__,
            "settings": plain,
            "pass@1": mean_pass_at_1(results),
            "benchmarks": results,
        }
        files.write_summary(directory, summary)
    if arguments.json:
        print_line(summary)
    else:
        reporting.console().print(suite_table(results, summary["pass@1"], f"{suite}: {label}"))
        print(f"results in {directory}/summary.json, all responses in {directory}/responses")


def _settings(suite: str, template_arguments: Mapping[str, Json], given: Mapping[str, Json]) -> "Settings":
    from lpo_jax.evaluation.suite import Settings

    values = {"max_tokens": _MAX_TOKENS.get(suite, 1024), "template_arguments": template_arguments, **given}
    settings = Settings(**{**values, "stop": tuple(values.get("stop", ()))})
    settings.sampling  # noqa: B018 - raises for invalid values
    return settings


def _check_model(target: str, checkpoint: str) -> None:
    if checkpoint != "best":
        raise UserError(f"--checkpoint {checkpoint}: {target} is not a run directory")
    if target.endswith((".yaml", ".yml")):
        raise UserError(
            f"{target}: --suite evaluates a model or a run directory; pass the config's model.path"
        )


def find_benchmarks(
    suite: str, data_dir: str | None, task: str | None, overrides: Sequence[str]
) -> "list[Benchmark]":
    """Return the benchmarks of a suite, or a data file as one benchmark.

    Args:
      suite: a built-in name, a YAML file of benchmarks, or a data file.
      data_dir: folder with the files of a built-in suite; None: download them from the hub.
      task: task of a data file.
      overrides: `--task.option=value`, options of that task.

    Raises:
      UserError: the suite or file does not exist, or an option does not apply to it.
    """
    from lpo_jax.config import override_config, parse_config
    from lpo_jax.tasks.benchmarks import Benchmark, get_suite, suite_names

    is_data = suite.endswith(_DATA)
    if (task or overrides) and not is_data:
        option = f"--task {task}" if task else overrides[0]
        raise UserError(
            f"{option}: --suite {suite} has its own tasks; --task requires a data file such as mine.jsonl"
        )
    if not is_data:
        if data_dir is not None and suite not in suite_names() and suite.endswith((".yaml", ".yml")):
            raise UserError(f"--data-dir: the suite {suite} names its own files")
        if data_dir is not None and not os.path.isdir(data_dir):
            raise UserError(
                f"--data-dir {data_dir}: no such folder; without it the files are downloaded from the hub"
            )
        return get_suite(suite, data_dir)
    if data_dir is not None:
        raise UserError(
            f"--data-dir: requires a built-in suite ({', '.join(suite_names())}), not a data file"
        )
    if not task:
        raise UserError(f"--suite {suite}: a data file needs a task: --task math, gsm8k, code, ...")
    for override in overrides:
        if not override.startswith("--task."):
            raise UserError(
                f"{override}: not an option of `lpo eval --suite`; task options are --task.option=value"
            )
    config = parse_config({"output": "-", "model": {"path": "-"}, "task": {"name": task, "heldout": suite}})
    options = override_config(config, overrides).task
    return [Benchmark(_slug(Path(suite).name.partition(".")[0]), 1, options)]


class _Progress:
    """Print progress lines on stderr at intervals: an evaluation takes hours, and stdout may be a pipe."""

    def __init__(self) -> None:
        self._name, self._shown = "", 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        from lpo_jax.reporting.text import duration

        now = time.monotonic()
        if name != self._name:
            self._name, self._since, self._first = name, now, done
        elif now - self._shown < _SECONDS_BETWEEN_LINES and done < total:
            return
        self._shown = now
        rate = (now - self._since) / (done - self._first) if done > self._first else float("nan")
        left = f", {duration(rate * (total - done))} left" if done < total else ""
        print(f"{name}: {done} of {total} problems{left}", file=sys.stderr, flush=True)


def _slug(text: str) -> str:
    """Turn a text into a part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "model"
