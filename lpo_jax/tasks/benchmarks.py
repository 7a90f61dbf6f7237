"""Evaluation suites: the paper's benchmarks, and how many samples each problem gets.

| suite | benchmark | k | in the data folder | on the hub |
| --- | --- | --- | --- | --- |
| math | aime24, aime25, amc23 | 32 | `math_eval/aime24.jsonl` (or `.parquet`), ... | `math-ai/aime24`, ... |
| math | minerva | 4 | `math_eval/minerva_math.jsonl` | `math-ai/minervamath` |
| math | math500 | 1 | `math/math500.jsonl` | `math-ai/math500` |
| math | olympiadbench | 1 | `math_eval/olympiadbench.jsonl` | `math-ai/olympiadbench` |
| countdown | cd34, cd4 (512 each) | 64 | `countdown/tinyzero_test_2001.parquet` | `Jiayi-Pan/Countdown-Tasks-...` |
| countdown-generated | cd34, cd4 (512 each) | 64 | none: problems from a seed | |
| geometry3k | geometry3k | 16 | `geometry3k/test.jsonl`, with its images | `hiyouga/geometry3k` |
| code | prime (its validation rows) | 8 | `code/prime_validation.parquet` | `PRIME-RL/Eurus-2-RL-Data` |
| code | codecontests, codeforces, leetcode | 8 | `code/code_contests_test_165.json`, ... | none: omitted |

To keep these problems out of training, a run on a file that contains them sets `heldout:` (the larger Countdown files
contain TinyZero's test problems). A user's own suite is a YAML file:

    - {name: mine, k: 16, task: {name: math, heldout: mine.jsonl}}

References:
  LPO, "Experiments": benchmarks and samples per problem.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping

from lpo_jax.errors import UserError, nearest
from lpo_jax.tasks.registry import get as get_task
from lpo_jax.tasks.task import Task
from lpo_jax.types import Json
from lpo_jax.yaml_text import read_yaml


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of problems with the number of samples per problem.

    Attributes:
      name: the name, unique in its suite.
      k: number of samples per problem; pass@1 is their average.
      task: name and options of the task whose held-out rows are the problems.
    """

    name: str
    k: int
    task: Mapping[str, Json]

    def build(self, **options: Json) -> Task:
        """Build the task.

        Args:
          **options: options such as `chat=True`, which override the task's own.

        Raises:
          UserError: see `tasks.get`.
        """
        return get_task(**{**self.task, **options})


@dataclasses.dataclass(frozen=True)
class _Known:
    """A benchmark of a built-in suite: its files in a data folder, in order of preference, and its hub dataset.

    Without either, its problems are generated.
    """

    name: str
    k: int
    task: str
    files: tuple[str, ...] = ()
    hub: str = ""
    options: Mapping[str, Json] = dataclasses.field(default_factory=dict)


_TINYZERO = "countdown/tinyzero_test_2001.parquet"
_CD34 = {"numbers": (3, 4), "heldout_size": 512}
_CD4 = {"numbers": 4, "heldout_size": 512}

# The names on the hub are those of the paper; they could not be tested here (no access to the hub). The files were
# tested.
_SUITES: dict[str, tuple[_Known, ...]] = {
    "math": (
        _Known(
            "aime24", 32, "math", ("math_eval/aime24.jsonl", "math_eval/aime24.parquet"), "math-ai/aime24"
        ),
        _Known(
            "aime25", 32, "math", ("math_eval/aime25.jsonl", "math_eval/aime25.parquet"), "math-ai/aime25"
        ),
        _Known("amc23", 32, "math", ("math_eval/amc23.jsonl",), "math-ai/amc23"),
        _Known("minerva", 4, "math", ("math_eval/minerva_math.jsonl",), "math-ai/minervamath"),
        _Known("math500", 1, "math", ("math/math500.jsonl", "math_eval/math500.jsonl"), "math-ai/math500"),
        _Known("olympiadbench", 1, "math", ("math_eval/olympiadbench.jsonl",), "math-ai/olympiadbench"),
    ),
    # The hub's cd34 consists of the rows that a training run on that dataset holds out with the same seed.
    "countdown": (
        _Known("cd34", 64, "countdown", (_TINYZERO,), "Jiayi-Pan/Countdown-Tasks-3to4:*.parquet", _CD34),
        _Known("cd4", 64, "countdown", (_TINYZERO,), "Jiayi-Pan/Countdown-Tasks-4:*.parquet", _CD4),
    ),
    "countdown-generated": (
        _Known("cd34", 64, "countdown", options={**_CD34, "train_size": 1}),
        _Known("cd4", 64, "countdown", options={**_CD4, "train_size": 1}),
    ),
    "geometry3k": (
        _Known(
            "geometry3k", 16, "geometry3k", ("geometry3k/test.jsonl",), "hiyouga/geometry3k", {"chat": True}
        ),
    ),
    "code": (
        _Known("prime", 8, "code", ("code/prime_validation.parquet",), "PRIME-RL/Eurus-2-RL-Data"),
        _Known("codecontests", 8, "code", ("code/code_contests_test_165.json",)),
        _Known("codeforces", 8, "code", ("code/codeforces_test_408.json",)),
        _Known("leetcode", 8, "code", ("code/leetcode_test_200.json",)),
    ),
}


def suite_names() -> list[str]:
    """Return the names of the built-in suites, sorted."""
    return sorted(_SUITES)


def get_suite(name: str, data_dir: str | None = None) -> list[Benchmark]:
    """Return the benchmarks of a suite. No data is read before a benchmark is built.

    Args:
      name: one of `suite_names()`, or a YAML file.
      data_dir: a folder with the files named above. Benchmarks whose file is missing are omitted with a warning. None
        uses the hub.

    Raises:
      UserError: if there is no such suite, the folder has none of its files, or the YAML file is invalid.
    """
    if name.endswith((".yaml", ".yml")):
        return _from_yaml(name)
    if name not in _SUITES:
        raise UserError(
            f"unknown suite {name!r}{nearest(name, _SUITES)}; the suites are {', '.join(suite_names())}, or "
            "a YAML file of your own"
        )
    suite = _SUITES[name]
    sources = [_source(known, data_dir) for known in suite]
    missing = [known.name for known, source in zip(suite, sources) if source is None]
    if len(missing) == len(suite):
        wanted = ", ".join(known.files[0] for known in suite)
        hub = ", ".join(f"hf:{known.hub}" for known in suite if known.hub)
        raise UserError(
            f"suite {name}: {data_dir} has none of its files: {wanted}; put them there, or omit the folder to "
            f"download them from the hub ({hub})"
        )
    if missing and data_dir is not None:
        warnings.warn(
            f"suite {name}: {data_dir} has no file for {', '.join(missing)}, which are omitted", stacklevel=2
        )
    return [
        Benchmark(known.name, known.k, {"name": known.task, **source, **known.options})
        for known, source in zip(suite, sources)
        if source is not None
    ]


def _source(known: _Known, data_dir: str | None) -> dict[str, str] | None:
    """Return the task's option for the source of the problems; None if there is no source."""
    if not known.files:
        return {}  # generated
    if data_dir is None:
        return {"heldout": f"hf:{known.hub}"} if known.hub else None
    found = [path for file in known.files if os.path.isfile(path := os.path.join(data_dir, file))]
    return {"heldout": found[0]} if found else None


def _from_yaml(path: str) -> list[Benchmark]:
    entries = read_yaml(path, "suite")
    shape = "a list of {name: ..., k: ..., task: {name: ..., options}}"
    if not isinstance(entries, list) or not entries:
        raise UserError(f"suite {path}: expected {shape}")
    for entry in entries:
        well = (
            isinstance(entry, dict)
            and entry.keys() == {"name", "k", "task"}
            and isinstance(entry["task"], dict)
        )
        if not well or type(entry["k"]) is not int or entry["k"] < 1 or "name" not in entry["task"]:
            raise UserError(f"suite {path}: expected {shape}, not {str(entry)[:80]}")
    return [Benchmark(str(entry["name"]), entry["k"], entry["task"]) for entry in entries]
