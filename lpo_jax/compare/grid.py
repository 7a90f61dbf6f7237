"""The grid of a comparison: rules x methods x seeds, one ordinary run each.

All cells share the task, the budget and the warm-started model, and a seed decides prompts and random numbers. So two
cells of one rule and seed differ by their method alone, and all methods of a rule aim at the same target: the rule is
their temperature tau, by which a policy gradient divides its advantage, and a listwise method its rewards.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from lpo_jax import objectives
from lpo_jax.config import Config
from lpo_jax.errors import UserError, nearest
from lpo_jax.objectives.targets import temperature_problem
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.training.check import check_config


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """One column of the grid: a label, and the objective's name and options without its temperature."""

    label: str
    objective: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      method: its label.
      config: of the run, `output` included.
    """

    rule: str
    method: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """`<rule>-<method>-seed<n>`, which is also the name of its directory."""
        return Path(self.config.output).name


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rules, labels and seeds in the order of the config, and all cells."""

    rules: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    against: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_grid(config: Config) -> Grid:
    """Every cell of a config's `compare` section, checked as `lpo train` would before it loads anything.

    Raises:
      UserError: an empty or ambiguous grid, an unknown rule or method, or a cell that could not train or would
        continue a run of other settings.
    """
    section = config.compare
    if config.objective != Config().objective:
        raise UserError(
            "objective: lpo compare takes its methods from compare.methods; put this one and its options there"
        )
    if config.checkpoint.directory != Config().checkpoint.directory:
        raise UserError("checkpoint.directory: the cells of a comparison keep their own; leave it out")
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
            hint = "; tell them apart by a label" if key == "methods" else ""
            raise UserError(f"compare.{key}: {twice[0]} is there twice, and would be one cell{hint}")
    for label in section.against:
        if label not in labels:
            known = ", ".join(labels)
            raise UserError(
                f"compare.against: no method {label!r}{nearest(label, labels)}; the labels are {known}"
            )
    start = cell_base_config(config)
    cells = tuple(
        Cell(str(rule), method.label, seed, _cell_config(start, rule, method, seed))
        for rule in section.rules
        for method in methods
        for seed in section.seeds
    )
    for cell in cells:
        _check(cell)
    return Grid(rules, labels, section.seeds, section.against or labels[:1], cells)


def read_method_spec(spec: str | dict[str, Any]) -> MethodSpec:
    """A method of `compare.methods`: a name, or a mapping with `name`, options, and `label` (default: the name)."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, label = options.get("name"), options.pop("label", options.get("name"))
    known = objectives.names()
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"compare.methods: unknown method {name!r}{nearest(str(name), known)}; `lpo methods` lists them"
        )
    if "temperature" in options:
        raise UserError(f"compare.methods: {label}: its temperature is the rule's; set compare.rules")
    if "temperature" not in known[name]["options"]:
        raise UserError(
            f"compare.methods: {name} has no temperature that a rule could set, so it has no place in the grid"
        )
    if not isinstance(label, str) or not re.fullmatch(r"[\w.+-]+", label):
        raise UserError(
            f"compare.methods: label {label!r} is to be part of file names; use letters, digits, - and _"
        )
    return MethodSpec(label, options)


def warm_config(config: Config) -> Config:
    """The config of the warm start that all cells begin from: `lpo sft` in `<output>/warm`."""
    evaluation = dataclasses.replace(config.evaluation, every=0)
    return dataclasses.replace(config, output=f"{config.output}/warm", evaluation=evaluation)


def cell_base_config(config: Config) -> Config:
    """The config with the warm-started model, if there is one, in place of its own and no warm start."""
    # No curves of single runs: the report draws them together, and drawing takes as long as a small run.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, save_plots=False))
    if not config.warm_start.steps:
        return config
    model = dataclasses.replace(config.model, path=f"{config.output}/warm/hf", init="weights")
    return dataclasses.replace(
        config, model=model, warm_start=dataclasses.replace(config.warm_start, steps=0)
    )


def _cell_config(start: Config, rule: str | float, method: MethodSpec, seed: int) -> Config:
    return dataclasses.replace(
        start,
        output=f"{start.output}/cells/{rule}-{method.label}-seed{seed}",
        seed=seed,
        objective=method.objective | {"temperature": rule},
    )


def _check(cell: Cell) -> None:
    try:
        check_config(cell.config)
    except UserError as error:
        raise UserError(f"compare: cell {cell.name}: {error}") from None
    RunDirectory(cell.config, "train", resume=True)  # only checks; its errors name the directory
