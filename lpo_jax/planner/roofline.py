"""How long a step takes at the limits of the hardware, and how much memory, by arithmetic alone.

Every phase is described by what each device does: matrix FLOPs, bytes from and to memory, bytes sent to others.
At best it takes max(FLOPs / peak, bytes / bandwidth), and then the communication, taken not to overlap. `estimate`
fills these in from the sizes of the model; `lpo_jax.planner.programs` reads them off the compiled programs instead.
Estimates rank settings and stand alone for GPUs; what is compiled is what is promised.

Axes: P prompts · K responses · S prompt tokens · T response tokens · L D H G N F V of the model.
"""

import dataclasses
import math
from collections.abc import Iterator

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import chunk_size
from lpo_jax.models.packing import full_pieces
from lpo_jax.models.parameters import num_params
from lpo_jax.objectives.fields import Field
from lpo_jax.parallel.mesh import MeshSizes
from lpo_jax.planner.topology import Chip
from lpo_jax.sampling.kv_cache import CHUNK, FIRST_TOKENS, Capacity

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
# Logits of a chunk exist as float32 in about this many arrays at once (`models.head`).
LOGIT_COPIES = 3
# Queries of a row whose scores are taken to lie in memory at once: more than plain attention has, and kernels none, for
# what an estimate says fits is then compiled, and a compilation that shows it does not is a minute lost.
SCORED = 512


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run: P prompts of at most S tokens, K responses of at most T each, in `updates` minibatches."""

    model: ModelConfig
    P: int
    K: int
    S: int
    T: int
    updates: int
    itemsize: int  # bytes of activations and of the sampler's weights
    reference: bool  # whether a frozen copy of the parameters is kept
    scorings: int  # minibatches that are scored in a step, the reference's included

    @property
    def trained_tokens(self) -> int:
        """Of a step: every prompt once, every response, all at full length."""
        return self.P * (self.S + self.K * self.T)

    @property
    def minibatch_tokens(self) -> int:
        return self.trained_tokens // self.updates

    @property
    def call_tokens(self) -> int:
        """That every row draws in one call of `sampling.decode`."""
        return min(CHUNK, self.T)

    @property
    def calls(self) -> int:
        """Of `sampling.decode`, until a response has its full length."""
        return math.ceil(self.T / self.call_tokens)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a user can choose for a given slice.

    Attributes:
      rows: responses that are sampled at once; the others wait.
    """

    mesh: MeshSizes
    token_budget: int
    remat: bool
    rows: int

    @property
    def shards(self) -> int:
        """Parts of a minibatch."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def parts(self) -> int:
        """Devices that share a parameter and its optimizer state."""
        return self.mesh.fsdp * self.mesh.tensor

    @property
    def decode_shards(self) -> int:
        """Parts of the prompts while sampling."""
        return self.mesh.devices // self.mesh.decode_tensor

    def waves(self, work: Workload) -> int:
        """How often the sampler fills its rows in a step, every response at full length."""
        return math.ceil(work.P * work.K / self.rows)

    def capacity(self, work: Workload) -> Capacity:
        """The sizes of the sampler's KV caches, over all devices together."""
        shards = self.decode_shards
        return Capacity.of(work.P + -work.P % shards, work.K, work.T, self.rows, shards)

    def describe(self) -> str:
        """In words, for a terminal."""
        m = self.mesh
        weights = f"split over {m.decode_tensor}" if m.decode_tensor > 1 else "whole on every device"
        return (
            f"data {m.data} x fsdp {m.fsdp} x tensor {m.tensor}, {self.token_budget} tokens in a row of a microbatch, "
            f"{'remat' if self.remat else 'no remat'}, {self.rows} rows sampled at once, their weights {weights}"
        )

    def overrides(self) -> list[str]:
        """The config keys that choose it, as the command line takes them."""
        keys = {
            "mesh.data": self.mesh.data,
            "mesh.fsdp": self.mesh.fsdp,
            "mesh.tensor": self.mesh.tensor,
            "training.token_budget": self.token_budget,
            "training.remat": str(self.remat).lower(),
            "sampling.max_rows": self.rows,
        }
        return [f"--{key}={value}" for key, value in keys.items()]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective of a phase: `times` in one run, each with a result of `bytes` on one device of `devices`."""

    kind: str
    bytes: float
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device of a ring passes on in one run of the phase."""
        others = max(self.devices - 1, 0)
        share = others / max(self.devices, 1)
        of = {"all-reduce": 2 * share, "reduce-scatter": others, "all-gather": share, "all-to-all": share}
        return of.get(self.kind, 1.0) * self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step, on one device.

    Attributes:
      times: how often it runs in a step; all other figures are of one run.
      flops: of matrix products, with what is recomputed.
      bytes: moved between memory and chip.
      held: bytes in memory while it runs, that stay: parameters, optimizer, weights, keys and values.
      temporary: bytes that it needs beside them.
      seconds_compiling: 0 for an estimate.
      too_large: the compiler refused it, so that only its memory is known.
    """

    name: str
    times: int
    flops: float
    bytes: float
    held: float
    temporary: float
    exchanges: tuple[Exchange, ...] = ()
    seconds_compiling: float = 0.0
    too_large: bool = False

    @property
    def memory(self) -> float:
        return self.held + self.temporary

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others."""
        return sum(exchange.sent for exchange in self.exchanges)

    def shares(self, chip: Chip) -> dict[str, float]:
        """Seconds that each resource is busy in one run."""
        return {
            "arithmetic": self.flops / chip.peak,
            "memory": self.bytes / chip.bandwidth,
            "network": self.sent / chip.ring,
        }

    def seconds(self, chip: Chip) -> float:
        """Of all its runs in a step, at the hardware's limits."""
        shares = self.shares(chip)
        return self.times * (max(shares["arithmetic"], shares["memory"]) + shares["network"])


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of a model by the part they play."""

    layers: int  # matrices of all layers
    head: int  # the output matrix
    embed: int  # the input table where it is not the output matrix
    other: int  # norms and biases

    @classmethod
    def of(cls, m: ModelConfig) -> "Sizes":
        head = m.vocab_size * m.width
        tables, other = num_params(m, "embedding"), num_params(m, "norm", "bias")
        return cls(num_params(m, "matrix"), head, tables - head, other)

    @property
    def total(self) -> int:
        return self.layers + self.head + self.embed + self.other


def model_flops(work: Workload) -> float:
    """What a step's updates cannot do without: 6 per parameter and token, and attention three times."""
    sizes = Sizes.of(work.model)
    responses = work.P * work.K * work.T
    matrices = 6 * (sizes.layers * work.trained_tokens + sizes.head * responses)
    return matrices + 3 * attention_flops(work, work.P)


def attention_flops(work: Workload, prompts: int) -> float:
    """One forward pass of attention over whole groups; masked pairs are computed too, as the plain form does."""
    m, S, K, T = work.model, work.S, work.K, work.T
    pairs = S * S + K * T * (S + T)
    return 4.0 * m.num_layers * m.num_heads * m.head_width * pairs * prompts


def kernel_flops(work: Workload, setting: Setting, phase: str) -> float:
    """Of attention on one device where Pallas kernels compute it: pairs behind the mask are skipped.

    A backward pass computes the scores again and four more products of the forward's two.
    """
    m, S, K, T = work.model, work.S, work.K, work.T
    pair = 4.0 * m.num_layers * m.num_heads * m.head_width
    if phase in ("prefill", "decode"):
        prompts = math.ceil(setting.rows / K / setting.decode_shards)
        pairs = S * S / 2 if phase == "prefill" else work.call_tokens * K * (S + T / 2)
        return pair * pairs * prompts / setting.mesh.decode_tensor
    groups = math.ceil(work.P / work.updates / setting.shards)
    forward = pair * (S * S / 2 + K * T * (S + T / 2)) * groups / setting.mesh.tensor
    return forward * (3.5 + setting.remat if phase == "update" else 1)


def kv_bytes(work: Workload) -> int:
    """Keys and values of one token in all layers."""
    m = work.model
    return 2 * m.num_layers * m.num_kv_heads * m.head_width * work.itemsize


def mean_cache_tokens(T: int, first: int = FIRST_TOKENS) -> float:
    """Mean length of the response cache while T tokens are drawn: it doubles from `first` as responses get longer."""
    total, size, done = 0, min(first, T), 0
    while done < T:
        total += (size - done) * size
        done, size = size, min(2 * size, T)
    return total / T


def standing(work: Workload, setting: Setting) -> dict[str, float]:
    """Bytes on a device that a run stores, by what they are."""
    total, parts = Sizes.of(work.model).total, setting.mesh.decode_tensor
    size = setting.capacity(work)
    kept = (size.prompts + size.prefill_batch * size.queued) * work.S + size.slots * size.tokens
    return {
        "parameters": FULL * total / setting.parts,
        "optimizer": 2 * FULL * total / setting.parts,
        "reference": FULL * total * work.reference / setting.parts,
        "sampler's weights": work.itemsize * total / parts,
        "keys and values": kept * kv_bytes(work) / setting.mesh.devices,
    }


def estimate(work: Workload, setting: Setting) -> list[Phase]:
    """The phases of a step by arithmetic, attention in its plain form."""
    apart = lambda phase: tuple(e for e in phase.exchanges if e.devices > 1)  # noqa: E731
    return [dataclasses.replace(phase, exchanges=apart(phase)) for phase in _phases(work, setting)]


def _phases(work: Workload, setting: Setting) -> Iterator[Phase]:
    m, sizes, mesh = work.model, Sizes.of(work.model), setting.mesh
    D, L, K, S, T, item = m.width, m.num_layers, work.K, work.S, work.T, work.itemsize
    heads = m.num_heads * m.head_width
    *state, weights, stored = standing(work, setting).values()
    state = sum(state)

    # Sampling: every device has whole weights or a part of each, and some prompts with their rows.
    parts = mesh.decode_tensor
    prompts = math.ceil(setting.rows / K / setting.decode_shards)
    rows, waves = prompts * K, setting.waves(work)
    read = prompts * (S + K * mean_cache_tokens(T)) * kv_bytes(work) / parts
    width = 4 * D + (2 * heads + 3 * m.ffn_width) / parts  # of what a layer makes of one token
    sums = lambda tokens, turns=1: (Exchange("all-reduce", tokens * D * item, parts, 2 * L * turns),)  # noqa: E731
    moved = (Exchange("all-gather", weights / L, mesh.fsdp, 1),)
    yield Phase("layout", L, 0.0, 3 * weights / L, state + weights, weights / L, moved)
    yield Phase(
        "prefill",
        waves,
        prompts * S * (2 * sizes.layers + 4 * L * heads * S) / parts,
        weights + 12 * L * prompts * S * D * item,
        state + weights + (stored if setting.capacity(work).queued else 0),
        prompts * S * (item * width + 8 * m.num_heads / parts * min(S, SCORED)),
        sums(prompts * S),
    )
    token = rows * (2 * (sizes.layers + sizes.head) + 4 * L * heads * (S + mean_cache_tokens(T))) / parts
    yield Phase(
        "decode",
        waves * work.calls,
        work.call_tokens * token,
        work.call_tokens * (weights + read),
        state + weights + stored,
        rows * (item * width + LOGIT_COPIES * FULL * m.vocab_size / parts),
        sums(rows, work.call_tokens),
    )

    # Training: a microbatch is some groups on every device, or some responses of one.
    parts = mesh.tensor
    group = full_pieces(K, S, T, setting.token_budget) * S + K * T  # the prompt runs once with each piece
    tokens = math.ceil(work.P / work.updates / setting.shards) * group
    micro = min(max(setting.token_budget, S + T), tokens)
    runs = math.ceil(tokens / micro)
    forward = 2 * sizes.layers * tokens / parts
    head = 2 * sizes.head * tokens * (K * T / group) / parts
    attention = attention_flops(work, 1) * tokens / group / parts
    layers = item * sizes.total / parts
    traffic = runs * layers + 20 * L * tokens * D * item / parts
    gathered = lambda passes: Exchange("all-gather", layers, mesh.fsdp, runs * passes)  # noqa: E731
    summed = lambda passes: Exchange("all-reduce", micro * D * item, parts, 2 * L * runs * passes)  # noqa: E731
    width = 6 * D + (5 * heads + 4 * m.ffn_width) / parts
    scores = 8 * micro / (S + T) * m.num_heads / parts * min(T, SCORED) * (S + T)
    logits = LOGIT_COPIES * FULL * min(chunk_size(m.vocab_size), micro) * m.vocab_size / parts
    if work.scorings:
        yield Phase(
            "score",
            work.scorings,
            forward + head + attention,
            traffic,
            state + weights,
            micro * item * width + scores + logits,
            (gathered(1), summed(1)),
        )
    again = 1 if setting.remat else 0
    yield Phase(
        "update",
        work.updates,
        (3 + again) * forward + 3 * head + (4 + again) * attention,
        (3 + again) * traffic + 28 * sizes.total / setting.parts,
        state,
        FULL * sizes.total / setting.parts  # the gradient
        + L * micro * item * (D if setting.remat else width)
        + 2 * micro * item * width
        + 2 * scores
        + logits,
        (
            gathered(2 + again),
            summed(3 + again),
            Exchange("reduce-scatter", FULL * sizes.total / setting.parts, mesh.fsdp, runs),
            Exchange("all-reduce", FULL * sizes.total / setting.parts, mesh.data, 1),
        ),
    )


def workload(config: Config, model: ModelConfig, needs: frozenset[Field], scores_first: bool) -> Workload:
    """What one step of a config has to do.

    Args:
      needs: of the objective.
      scores_first: whether the first update after sampling is scored as well.
    """
    training, sampling = config.training, config.sampling
    updates = training.updates_per_step
    reference = Field.REF_LOGP in needs
    passes = (updates if scores_first else updates - 1) + updates * (training.behaviour == "rescored")
    return Workload(
        model,
        training.prompts_per_step,
        sampling.num_responses,
        sampling.max_prompt_tokens,
        sampling.max_tokens,
        updates,
        HALF if config.model.dtype == "bfloat16" else FULL,
        reference,
        passes + updates * reference,
    )
