"""`lpo eval MODEL --suite`: benchmarks put to any model, or to a run's checkpoint."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import __version__, reporting
from lpo_jax.config import override_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.evaluation.suite import Settings, mean_pass_at_1, prepare_benchmarks, run_benchmark
from lpo_jax.files import LOCK, lock_directory, write_file
from lpo_jax.json_lines import dump_line, print_line, read_object
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.reporting.tables import suite_table
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.directory import any_child, differences, read_config
from lpo_jax.sampling import Sampler
from lpo_jax.sampling.model import Model, load_model
from lpo_jax.tasks import benchmarks
from lpo_jax.tasks.benchmarks import Benchmark

# The paper's response lengths; Countdown's for what is not in it.
_MAX_TOKENS = {"math": 4096, "code": 4096}
_DATA = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".arrow")
_SECONDS_BETWEEN_LINES = 15.0


def suite_command(
    target: str,
    suite: str,
    given: Mapping[str, Any],
    *,
    data_dir: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
    out: str | None = None,
    checkpoint: str = "best",
    as_json: bool = False,
) -> dict[str, Any]:
    """Evaluates, writes and prints. Returns what `summary.json` holds.

    Args:
      target: a model as `load_model` names it, or a run directory.
      suite: a built-in name, a YAML file of benchmarks, or a data file.
      given: values for `Settings`; `max_tokens` depends on the suite unless it is there.
      data_dir: the folder of a built-in suite's files; None: the hub.
      task, overrides: of a data file: the task's name, and `--task.option=value`.
      out: directory of the results; default `runs/eval-MODEL-SUITE`.
      checkpoint: of a run.
    """
    is_run = (Path(target) / "run.json").is_file()
    model_of_run = read_config(target).model if is_run else None
    defaults = {"max_tokens": _MAX_TOKENS.get(suite, 1024)}
    if model_of_run:
        defaults["template_arguments"] = model_of_run.template_arguments
    settings = Settings(**{**defaults, **given})
    settings.sampling  # noqa: B018 - refuses what makes no sense
    benchmarks = find_benchmarks(suite, data_dir, task, overrides)
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
        "model": {"name": label, "weights": weights_hash(model)},
        "suite": suite,
        "settings": plain,
        "benchmarks": {benchmark.name: benchmark.identity() for benchmark in prepared},
    }
    directory = Path(out or f"runs/eval-{_slug(target)}-{_slug(suite)}")
    sampler = Sampler(model.config, model.eos_ids, jnp.dtype(settings.dtype), decode=tokenizer.decode)
    with _opened(directory, identity):
        weights = sampler.prepare(model.params)
        del model  # its memory is better spent on longer responses
        show = _Progress()
        results = {
            benchmark.name: run_benchmark(
                benchmark, settings, sampler, weights, tokenizer, _responses(directory, benchmark.name), show
            )
            for benchmark in prepared
        }
        summary = {
            "model": label,
            "suite": suite,
            "lpo_jax": __version__,
            "settings": plain,
            "pass@1": mean_pass_at_1(results),
            "benchmarks": results,
        }
        text = json.dumps(json.loads(dump_line(summary)), indent=2, ensure_ascii=False)
        write_file(directory / "summary.json", text + "\n")
    if as_json:
        print_line(summary)
    else:
        reporting.console().print(suite_table(results, summary["pass@1"], f"{suite}: {label}"))
        print(f"figures in {directory}/summary.json, every response in {directory}/responses")
    return summary


def find_benchmarks(
    suite: str, data_dir: str | None, task: str | None, overrides: Sequence[str]
) -> list[Benchmark]:
    """The benchmarks of a suite, or the one that a data file is.

    Raises:
      UserError: no such suite or file, or options that do not go with it.
    """
    is_data = suite.endswith(_DATA)
    if (task or overrides) and not is_data:
        said = f"--task {task}" if task else overrides[0]
        raise UserError(
            f"{said}: --suite {suite} has its own tasks; --task goes with a data file such as mine.jsonl"
        )
    if not is_data:
        if (
            data_dir is not None
            and suite not in benchmarks.suite_names()
            and suite.endswith((".yaml", ".yml"))
        ):
            raise UserError(f"--data-dir: the suite {suite} says itself where its files are")
        if data_dir is not None and not os.path.isdir(data_dir):
            raise UserError(f"--data-dir {data_dir}: no such folder; without it the files come from the hub")
        return benchmarks.get_suite(suite, data_dir)
    if data_dir is not None:
        raise UserError(
            f"--data-dir: goes with a suite ({', '.join(benchmarks.suite_names())}), not with a data file"
        )
    if not task:
        raise UserError(f"--suite {suite}: say how its rows are asked: --task math, gsm8k, code, ...")
    for override in overrides:
        if not override.startswith("--task."):
            raise UserError(f"{override}: no option of `lpo eval --suite`; a task's are --task.option=value")
    config = parse_config({"output": "-", "model": {"path": "-"}, "task": {"name": task, "heldout": suite}})
    options = override_config(config, overrides).task
    return [Benchmark(_slug(Path(suite).name.partition(".")[0]), 1, options)]


def weights_hash(model: Model) -> str:
    """SHA-256 over the sizes and some values of every parameter: another checkpoint has another one."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        values = np.asarray(leaf).reshape(-1)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(values[:: max(1, values.size // 4096)].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(directory: Path, identity: Mapping[str, Any]):
    """The directory of one evaluation, written to by this process alone.

    Raises:
      UserError: it holds another evaluation, or something else; or it cannot be written to.
    """
    record = directory / "evaluation.json"
    if any_child(directory) and not record.exists() and {x.name for x in directory.iterdir()} != {LOCK}:
        raise UserError(f"{directory}: is not empty and holds no evaluation; set another --out")
    with lock_directory(directory, "evaluation"):
        (directory / "responses").mkdir(exist_ok=True)
        if any(path.stat().st_size for path in (directory / "responses").iterdir()):
            held = read_object(record, "set another --out, or remove the directory to ask anew")
            for key, was, now in differences("", held, identity):
                raise UserError(
                    f"{directory}: holds another evaluation, with {key[1:]} = {was!r} and not {now!r}; "
                    "set another --out, or the same settings to go on with it"
                )
        else:
            write_file(record, json.dumps(identity, indent=2) + "\n")
        yield


class _Progress:
    """A line on stderr now and then: an evaluation takes hours, and its output may be a pipe."""

    def __init__(self):
        self._name, self._shown = "", 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if name != self._name:
            self._name, self._since, self._first = name, now, done
        elif now - self._shown < _SECONDS_BETWEEN_LINES and done < total:
            return
        self._shown = now
        rate = (now - self._since) / (done - self._first) if done > self._first else float("nan")
        left = f", {reporting.duration(rate * (total - done))} left" if done < total else ""
        print(f"{name}: {done} of {total} problems{left}", file=sys.stderr, flush=True)


def _responses(directory: Path, name: str) -> Path:
    return directory / "responses" / f"{name}.jsonl"


def _slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "model"
