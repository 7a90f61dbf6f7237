"""The grid of a comparison: rules x methods x seeds, one ordinary run per cell.

All cells share the task, the budget and the warm-started model; the seed determines prompts and random numbers. Two
cells with the same rule and seed therefore differ only in their method. All methods with the same rule have the same
target, because the rule is the temperature tau by which a policy gradient divides its advantage and a listwise method
its rewards.
"""

import dataclasses
import re
from pathlib import Path

from lpo_jax import objectives
from lpo_jax.config import Config
from lpo_jax.errors import UserError, nearest
from lpo_jax.objectives.targets import temperature_problem
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.check import check_config
from lpo_jax.types import Json


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method of the grid: its label, and the objective's name and options without the temperature."""

    label: str
    objective: dict[str, Json]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      rule: the temperature rule, as text.
      method: label of the method.
      seed: seed of the run.
      config: config of the run, including its `output`.
    """

    rule: str
    method: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """`<rule>-<method>-seed<n>`, which is also the name of the run directory."""
        return Path(self.config.output).name


@dataclasses.dataclass(frozen=True)
class Grid:
    """A checked grid.

    Attributes:
      rules: temperature rules, in the order of the config.
      methods: labels of the methods, in the order of the config.
      seeds: in the order of the config.
      against: labels of the methods with which the others are compared.
      cells: one for each rule, method and seed.
    """

    rules: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    against: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_grid(config: Config) -> Grid:
    """Build the grid of a config's `compare` section, and check every cell as `lpo train` does before loading a model.

    Raises:
      UserError: the grid is empty or ambiguous, a rule or method is unknown, a cell's config is invalid, or a cell's
        directory contains a run with other settings.
    """
    section = config.compare
    if config.objective != Config().objective:
        raise UserError(
            "objective: lpo compare takes its methods from compare.methods; move this objective there"
        )
    if config.checkpoint.directory != Config().checkpoint.directory:
        raise UserError("checkpoint.directory: each cell of a comparison has its own; remove this key")
    for key in ("rules", "methods", "seeds"):
        if not getattr(section, key):
            raise UserError(f"compare.{key} is empty: there is nothing to compare")
    for rule in section.rules:
        if problem := temperature_problem(rule):
            raise UserError(f"compare.rules: a rule {problem}")
    methods = [read_method_spec(spec) for spec in section.methods]
    labels = tuple(method.label for method in methods)
    rules = tuple(str(rule) for rule in section.rules)
    for key, values in (("rules", rules), ("methods", labels), ("seeds", section.seeds)):
        if twice := [value for value in values if values.count(value) > 1]:
            hint = "; give the methods different labels" if key == "methods" else ""
            raise UserError(f"compare.{key}: {twice[0]} occurs twice{hint}")
    for label in section.against:
        if label not in labels:
            known = ", ".join(labels)
            raise UserError(
                f"compare.against: no method {label!r}{nearest(label, labels)}; the labels are {known}"
            )
    base = cell_base_config(config)
    cells = tuple(
        Cell(str(rule), method.label, seed, _cell_config(base, rule, method, seed))
        for rule in section.rules
        for method in methods
        for seed in section.seeds
    )
    for cell in cells:
        _check(cell)
    return Grid(rules, labels, section.seeds, section.against or labels[:1], cells)


def read_method_spec(spec: str | dict[str, Json]) -> MethodSpec:
    """Parse an entry of `compare.methods`: a name, or a mapping with `name`, options, and `label` (default: the name).

    Raises:
      UserError: the method is unknown or has no temperature, the entry sets the temperature, or the label is invalid.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, label = options.get("name"), options.pop("label", options.get("name"))
    known = objectives.names()
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"compare.methods: unknown method {name!r}{nearest(str(name), known)}; `lpo methods` lists them"
        )
    if "temperature" in options:
        raise UserError(f"compare.methods: {label}: the temperature is set by compare.rules; remove it here")
    if "temperature" not in known[name]["options"]:
        raise UserError(
            f"compare.methods: {name} has no temperature that a rule could set, so it cannot be compared"
        )
    if not isinstance(label, str) or not re.fullmatch(r"[\w.+-]+", label):
        raise UserError(
            f"compare.methods: label {label!r} becomes part of file names; use letters, digits, - and _"
        )
    return MethodSpec(label, options)


def warm_config(config: Config) -> Config:
    """Return the config of the common warm start, which is a run of `lpo sft` in `<output>/warm`."""
    evaluation = dataclasses.replace(config.evaluation, every=0)
    return dataclasses.replace(config, output=f"{config.output}/warm", evaluation=evaluation)


def cell_base_config(config: Config) -> Config:
    """Return the config that all cells share: it starts from the warm-started model, if any, without a warm start."""
    # Single runs draw no curves: the report draws all of them, and drawing takes as long as a small run.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, save_plots=False))
    if not config.warm_start.steps:
        return config
    model = dataclasses.replace(config.model, path=f"{config.output}/warm/hf", init="weights")
    warm_start = dataclasses.replace(config.warm_start, steps=0)
    return dataclasses.replace(config, model=model, warm_start=warm_start)


def _cell_config(base: Config, rule: str | float, method: MethodSpec, seed: int) -> Config:
    return dataclasses.replace(
        base,
        output=f"{base.output}/cells/{rule}-{method.label}-seed{seed}",
        seed=seed,
        objective=method.objective | {"temperature": rule},
    )


def _check(cell: Cell) -> None:
    try:
        objective = check_config(cell.config)
    except UserError as error:
        raise UserError(f"compare: cell {cell.name}: {error}") from None
    config = choose_behaviour(cell.config, objective).resolve(cell.config)  # as `train` records it
    RunDirectory(config, "train", resume=True)  # only checks the directory; errors name it
