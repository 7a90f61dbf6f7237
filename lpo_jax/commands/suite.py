"""`lpo eval MODEL --suite`: benchmarks put to any model, or to a run's checkpoint."""

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpo_jax import __version__
from lpo_jax.commands import parsers
from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import CommandParser
from lpo_jax.commands.resumable import STOPPED
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line

if TYPE_CHECKING:
    from lpo_jax.evaluation.suite import Settings
    from lpo_jax.tasks.benchmarks import Benchmark

# The paper's response lengths; Countdown's for what is not in it.
_MAX_TOKENS = {"math": 4096, "code": 4096}
_DATA = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".arrow")
_SECONDS_BETWEEN_LINES = 15.0
# What `lpo eval` takes beside --suite, under the names of `evaluation.suite.Settings` and `suite_command`.
_OPTIONS: dict[str, dict[str, Any]] = {
    "data_dir": {
        "type": parsers.some_text,
        "metavar": "DIR",
        "help": "folder with the suite's files (default: from the hub)",
    },
    "task": {
        "type": parsers.some_text,
        "metavar": "NAME",
        "help": "of a data FILE: math, gsm8k, code, ...; its options as --task.option=value",
    },
    "out": {
        "type": parsers.some_text,
        "metavar": "DIR",
        "help": "where figures and responses go (runs/eval-MODEL-SUITE)",
    },
    "num_responses": {
        "type": parsers.positive,
        "metavar": "K",
        "help": "samples per problem (each benchmark's own; of a data FILE 1)",
    },
    "problems": {"type": parsers.positive, "metavar": "N", "help": "the first N of each benchmark (all)"},
    "temperature": {"type": parsers.finite, "metavar": "T", "help": "0 is greedy (0.6, the paper's)"},
    "top_p": {"type": parsers.finite, "metavar": "P", "help": "nucleus (1.0: off)"},
    "max_tokens": {
        "type": parsers.positive,
        "metavar": "N",
        "help": "response tokens at most (4096 for math and code, else 1024)",
    },
    "max_prompt_tokens": {
        "type": parsers.positive,
        "metavar": "N",
        "help": "at most (what the model's positions leave)",
    },
    "overlong_prompts": {
        "choices": ("error", "drop"),
        "help": "refuse longer ones, or leave them out (error)",
    },
    "stop": {
        "type": parsers.stop_string,
        "action": "append",
        "help": "a string that ends a response; may be repeated",
    },
    "chat": {
        "action": argparse.BooleanOptionalAction,
        "help": "ask through the chat template (as the benchmark says)",
    },
    "template_arguments": parsers.TEMPLATE_ARGUMENTS,
    "batch": {
        "type": parsers.positive,
        "metavar": "N",
        "help": "prompts sampled together (as many as make 64 responses)",
    },
    "dtype": {"choices": ("float32", "bfloat16"), "help": "of activations and products (float32)"},
    "seed": {"type": int, "metavar": "N", "help": "of the samples and the bootstrap (0)"},
    "allow_weak_sandbox": {"action": "store_true", "help": "run programs without bubblewrap; recorded"},
}


def add_options(command: CommandParser) -> None:
    """Adds --suite and the options that go with it."""
    group = command.add_argument_group(
        "suites",
        "Every response is kept, and the same command goes on where it was stopped. A FILE is data (jsonl, json,\n  "
        "parquet) with --task, or YAML: a list of {name: mine, k: 16, task: {name: math, heldout: mine.jsonl}}.",
    )
    group.add_argument(
        "--suite",
        metavar="NAME|FILE",
        help="math, countdown, countdown-generated, code, or a file of your own",
    )
    for name, option in _OPTIONS.items():
        dashes = f"--{name.replace('_', '-')}"
        group.add_argument(dashes, dest=name, default=argparse.SUPPRESS, **option)
        if "_" in name:  # as config keys are written
            hidden = {**option, "help": argparse.SUPPRESS}
            group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, **hidden)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that go with --suite and were given."""
    values = vars(arguments)
    return {name: values[name] for name in _OPTIONS if name in values}


def run(arguments: argparse.Namespace) -> int | None:
    """Runs `lpo eval --suite`. Returns the exit status."""
    from lpo_jax.runs.signals import Interrupted, Signals

    open_devices()
    try:
        with Signals():
            _evaluate(arguments, given_options(arguments))
    except Interrupted:
        print("lpo: stopped by a signal; the same command goes on where it stopped", file=sys.stderr)
        return STOPPED
    return None


def _evaluate(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Evaluates, writes and prints; `given` are the options of `given_options`."""
    import jax.numpy as jnp

    from lpo_jax import reporting
    from lpo_jax.commands import evaluation_files as files
    from lpo_jax.evaluation.suite import mean_pass_at_1, prepare_benchmarks, run_benchmark
    from lpo_jax.models.load import load_config_and_tokenizer, load_model
    from lpo_jax.reporting.tables import suite_table
    from lpo_jax.runs.checkpoint import load_run
    from lpo_jax.runs.directory import read_config
    from lpo_jax.sampling import Sampler

    target, suite, checkpoint = arguments.target, arguments.suite, arguments.checkpoint
    data_dir, task, out = (given.pop(name, None) for name in ("data_dir", "task", "out"))
    is_run = (Path(target) / "run.json").is_file()
    model_of_run = read_config(target).model if is_run else None
    settings = _settings(suite, model_of_run.template_arguments if model_of_run else {}, given)
    benchmarks = find_benchmarks(suite, data_dir, task, arguments.overrides)
    if not is_run and checkpoint != "best":
        raise UserError(f"--checkpoint {checkpoint}: {target} is not a run directory")
    if target.endswith((".yaml", ".yml")):
        raise UserError(
            f"{target}: --suite evaluates a model or a run directory; give the config's model.path"
        )
    name = model_of_run.path if model_of_run else target
    config, tokenizer, _ = load_config_and_tokenizer(name, template_arguments=settings.template_arguments)
    if tokenizer is None:
        raise UserError(f"{name}: has no tokenizer, so it cannot be asked")
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
        del model  # its memory is better spent on longer responses
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
        print(f"figures in {directory}/summary.json, every response in {directory}/responses")


def _settings(suite: str, template_arguments: Mapping[str, Any], given: Mapping[str, Any]) -> "Settings":
    from lpo_jax.evaluation.suite import Settings

    values = {"max_tokens": _MAX_TOKENS.get(suite, 1024), "template_arguments": template_arguments, **given}
    settings = Settings(**{**values, "stop": tuple(values.get("stop", ()))})
    settings.sampling  # noqa: B018 - refuses what makes no sense
    return settings


def find_benchmarks(
    suite: str, data_dir: str | None, task: str | None, overrides: Sequence[str]
) -> "list[Benchmark]":
    """The benchmarks of a suite, or the one that a data file is.

    Raises:
      UserError: no such suite or file, or options that do not go with it.
    """
    from lpo_jax.config import override_config, parse_config
    from lpo_jax.tasks.benchmarks import Benchmark, get_suite, suite_names

    is_data = suite.endswith(_DATA)
    if (task or overrides) and not is_data:
        said = f"--task {task}" if task else overrides[0]
        raise UserError(
            f"{said}: --suite {suite} has its own tasks; --task goes with a data file such as mine.jsonl"
        )
    if not is_data:
        if data_dir is not None and suite not in suite_names() and suite.endswith((".yaml", ".yml")):
            raise UserError(f"--data-dir: the suite {suite} says itself where its files are")
        if data_dir is not None and not os.path.isdir(data_dir):
            raise UserError(f"--data-dir {data_dir}: no such folder; without it the files come from the hub")
        return get_suite(suite, data_dir)
    if data_dir is not None:
        raise UserError(f"--data-dir: goes with a suite ({', '.join(suite_names())}), not with a data file")
    if not task:
        raise UserError(f"--suite {suite}: say how its rows are asked: --task math, gsm8k, code, ...")
    for override in overrides:
        if not override.startswith("--task."):
            raise UserError(f"{override}: no option of `lpo eval --suite`; a task's are --task.option=value")
    config = parse_config({"output": "-", "model": {"path": "-"}, "task": {"name": task, "heldout": suite}})
    options = override_config(config, overrides).task
    return [Benchmark(_slug(Path(suite).name.partition(".")[0]), 1, options)]


class _Progress:
    """A line on stderr now and then: an evaluation takes hours, and its output may be a pipe."""

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
    """A text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "model"
