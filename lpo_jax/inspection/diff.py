"""What differs between two runs: settings, code, data, and the first step, prompt and character."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpo_jax.inspection.load import Row, Run, read_samples
from lpo_jax.reporting.metric_names import is_timing
from lpo_jax.types import Json

_IGNORED = ("output",)  # differs between any two runs


@dataclass(frozen=True)
class FirstResponse:
    """The first responses, in the order of steps, prompts and k, that differ although both runs have them.

    Attributes:
        step: the training step.
        id: the id of the prompt.
        k: the number of the response in its group.
        unit: "token" if both runs recorded the texts of their tokens, else "character".
        position: of the first difference, from 0, in units.
        common: the text up to there.
        rest: the continuation in each run.
        compared: number of responses of that step that both runs have.
        equal: number of these that are equal.
    """

    step: int
    id: str
    k: int
    unit: str
    position: int
    common: str
    rest: tuple[str, str]
    compared: int
    equal: int


@dataclass(frozen=True)
class RunDifference:
    """What differs between two runs.

    Attributes:
        config: (key, first, second) of each setting that differs, except the output directory.
        about: the same for versions, devices, user files and the hash of the data.
        metrics_step: the first step at which both have metrics that differ; None if there is none.
        metrics: (name, first, second) of these.
        response: the first responses that differ; None if there are none.
        compared: number of training responses that both runs have.
    """

    config: Sequence[tuple[str, Json, Json]]
    about: Sequence[tuple[str, Json, Json]]
    metrics_step: int | None
    metrics: Sequence[tuple[str, Json, Json]]
    response: FirstResponse | None
    compared: int

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.config or self.about or self.metrics or self.response)


def compare_runs(first: Run, second: Run) -> RunDifference:
    """Compare two runs. Durations and other figures of the machine are not compared."""
    step, metrics = _first_metrics(first, second)
    response, compared = _first_response(first, second)
    return RunDifference(
        config=_pairs(first.config, second.config, _IGNORED),
        about=_pairs(_flat(first.about), _flat(second.about)),
        metrics_step=step,
        metrics=metrics,
        response=response,
        compared=compared,
    )


def common_prefix(first: Sequence, second: Sequence) -> int:
    """Return the number of leading items that are equal."""
    pairs = enumerate(zip(first, second))
    return next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))


def _first_metrics(first: Run, second: Run) -> tuple[int | None, list[tuple[str, Json, Json]]]:
    of_first, of_second = _by_step(first), _by_step(second)
    for step in sorted(of_first.keys() & of_second.keys()):
        pairs = _pairs(of_first[step], of_second[step])
        if differing := [pair for pair in pairs if not is_timing(pair[0])]:
            return step, differing
    return None, []


def _first_response(first: Run, second: Run) -> tuple[FirstResponse | None, int]:
    compared = 0
    for step in sorted(first.rollouts.keys() & second.rollouts.keys()):
        rows, others = _rows(first.rollouts[step]), _rows(second.rollouts[step])
        shared = [key for key in rows if key in others]
        compared += len(shared)
        differing = [key for key in shared if rows[key]["output"] != others[key]["output"]]
        if differing:
            response = _describe(step, rows[differing[0]], others[differing[0]], len(shared), len(differing))
            return response, compared
    return None, compared


def _describe(step: int, row: Row, other: Row, shared: int, differing: int) -> FirstResponse:
    of_tokens = isinstance(row.get("token_text"), list) and isinstance(other.get("token_text"), list)
    x, y = (row["token_text"], other["token_text"]) if of_tokens else (row["output"], other["output"])
    position = common_prefix(x, y)
    return FirstResponse(
        step=step,
        id=str(row.get("id")),
        k=row.get("k", 0),
        unit="token" if of_tokens else "character",
        position=position,
        common="".join(map(str, x[:position])),
        rest=("".join(map(str, x[position:])), "".join(map(str, y[position:]))),
        compared=shared,
        equal=shared - differing,
    )


def _rows(path: Path) -> dict[tuple[str, int], Row]:
    return {(str(row.get("id")), row.get("k", 0)): row for row in read_samples(path)[0]}


def _by_step(run: Run) -> dict[int, dict[str, Json]]:
    rows: dict[int, dict[str, Json]] = {}
    for row in run.metrics:
        rows.setdefault(row["step"], {}).update(row)
    return rows


def _flat(about: Mapping[str, Json]) -> dict[str, Json]:
    from lpo_jax.inspection.load import flatten

    kept = ("versions", "devices", "python", "user_files", "data", "kind", "behaviour")
    return {key: value for name in kept if name in about for key, value in flatten(about[name], name).items()}


def _pairs(
    first: Mapping[str, Json], second: Mapping[str, Json], ignored: Sequence[str] = ()
) -> list[tuple[str, Json, Json]]:
    keys = [*first, *(key for key in second if key not in first)]
    return [
        (key, first.get(key), second.get(key))
        for key in keys
        if first.get(key) != second.get(key) and key.split(".")[0] not in ignored
    ]
