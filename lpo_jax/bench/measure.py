"""The three benchmarks. They use the components of a real run: its session, sampler, programs and training step.

`sampling_call`, `gradient_call` and `step_call` return the call to time, and `time_call` times it. Every timed call
waits for its results (`block_until_ready`), and compile time is reported separately.
"""

import contextlib
import dataclasses
import functools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lpo_jax.bench.work import Shapes, Work
from lpo_jax.config import override_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.models.runner import Groups
from lpo_jax.objectives import TokenStats
from lpo_jax.rollout.hooks import open_hooks
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.recorder import Recorder
from lpo_jax.runs.signals import Signals
from lpo_jax.runs.state import Position
from lpo_jax.sampling import PromptBatch, SampleRequest
from lpo_jax.sampling.text import encode
from lpo_jax.training.check import check_config
from lpo_jax.training.learner import Learner
from lpo_jax.training.loop import run_step
from lpo_jax.training.session import Session, open_session
from lpo_jax.types import Json

# Width of the square matrix product, and number of elements copied. Both are large enough for full speed; on an
# accelerator a smaller product or copy takes little longer than its launch.
WIDTH, COPIED = 4096, 1 << 26
ACCELERATOR_WIDTH, ACCELERATOR_COPIED = 8192, 1 << 29


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates of one device.

    Attributes:
      matrix_flops: FLOP/s of a large matrix product in the dtype of the benchmark.
      copy_bytes: bytes/s of a large copy, counting reads and writes.
    """

    matrix_flops: float
    copy_bytes: float

    @classmethod
    def measure(cls, dtype: DTypeLike, repeats: int = 5) -> "Machine":
        """Measure the rates: the medians of `repeats` timed calls after one untimed call.

        The operands are random, because accelerators multiply constants faster than real data.
        """
        on_cpu = jax.default_backend() == "cpu"
        width, copied = (WIDTH, COPIED) if on_cpu else (ACCELERATOR_WIDTH, ACCELERATOR_COPIED)
        a = jax.random.normal(jax.random.key(0), (width, width), dtype)
        precision = "float32" if a.dtype == jnp.float32 else "default"
        product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision))
        x = jnp.ones((copied,), jnp.float32)
        copy = jax.jit(lambda x, by: x + by)
        return cls(
            2 * width**3 / median(lambda: product(a, a), repeats),
            2 * x.nbytes / median(lambda: copy(x, 1.0), repeats),
        )


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock seconds that a call of `function` takes, including the computation of its result."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def median(function: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `repeats` calls, after one uncounted call."""
    seconds(function)
    return statistics.median(seconds(function) for _ in range(repeats))


def alternate(function: Callable[[], object], repeats: int, dtype: DTypeLike) -> tuple[list[float], Machine]:
    """Time calls of a function and measure the machine before, between and after them.

    The rates of a shared machine change from minute to minute, so the measurements alternate.

    Returns:
      The seconds of each of `repeats` calls, and the median rates of the machine.
    """
    machines, times = [Machine.measure(dtype)], []
    for _ in range(repeats):
        times.append(seconds(function))
        machines.append(Machine.measure(dtype))
    rates = zip(*map(dataclasses.astuple, machines))
    return times, Machine(*map(statistics.median, rates))


def peak_memory() -> int:
    """Return the peak memory in bytes: of the device if it counts them, otherwise of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


# Words that stay one token each when repeated: the first pair for byte-pair tokenizers, the second for character
# tokenizers.
_WORDS = ((" the", " of"), ("a", "b"))

# A task whose rewards differ within a group.
_TASK = """
import zlib

def dataset(split):
    word = {words}[split == "heldout"]
    return [{{"prompt": word * {prompt_tokens}, "row": i}} for i in range({rows})]

def verify(response, example):
    return float(zlib.crc32(response.encode()) % 2)
"""


@contextlib.contextmanager
def bench_session(model: str, shapes: Shapes, repeats: int, overrides: Sequence[str]) -> Iterator[Session]:
    """Open a session whose model never ends a response by itself, with a temporary run directory.

    Raises:
      UserError: a config key is invalid, or no prompt of exactly S tokens can be made with the model's tokenizer.
    """
    _, tokenizer, _ = load_config_and_tokenizer(model)
    S = shapes.prompt_tokens
    fitting = [words for words in _WORDS if all(len(encode(tokenizer, w * S)) == S for w in words)]
    if not fitting:
        raise UserError(
            f"{model}: cannot make a prompt of exactly {S} tokens by repeating a word with its tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.py"
        task.write_text(_TASK.format(words=fitting[0], prompt_tokens=S, rows=shapes.prompts))
        values = {
            "output": f"{folder}/run",
            "model": {"path": model},
            "task": {"name": "python", "file": str(task)},
            "sampling": {
                "num_responses": shapes.responses,
                "max_tokens": shapes.tokens,
                "max_prompt_tokens": shapes.prompt_tokens,
            },
            "training": {"steps": repeats + 1, "prompts_per_step": shapes.prompts, "updates_per_step": 1},
            "evaluation": {"every": 0, "problems": 1, "num_responses": 1},
        }
        config = override_config(parse_config(values), overrides)
        with open_session(config) as session:
            sampler = dataclasses.replace(session.environment.collect.sampler, eos_ids=(-1,))
            collect = dataclasses.replace(session.environment.collect, sampler=sampler)
            environment = dataclasses.replace(session.environment, collect=collect)
            yield dataclasses.replace(session, environment=environment)


def sampling_call(session: Session, shapes: Shapes) -> Callable[[], object]:
    """Return a call that samples with prepared weights, every row to its given length."""
    sampler = session.environment.collect.sampler
    return functools.partial(
        sampler,
        jax.block_until_ready(session.environment.prepare(session.model.load_params())),
        PromptBatch(
            shapes.prompt_ids(session.model.architecture.vocab_size),
            np.full(shapes.prompts, shapes.prompt_tokens, np.int32),
            np.arange(shapes.prompts, dtype=np.uint32),
        ),
        SampleRequest(shapes.responses, shapes.tokens),
        budgets=shapes.lengths(),
    )


def gradient_call(session: Session, shapes: Shapes) -> Callable[[], object]:
    """Return a call that computes the gradient of all parameters and the token statistics."""
    params, mask, runner = session.model.load_params(), shapes.mask(), session.model.runner(1.0)
    groups = Groups(
        shapes.prompt_ids(session.model.architecture.vocab_size),
        np.full(shapes.prompts, shapes.prompt_tokens, np.int32),
        shapes.response_ids(session.model.architecture.vocab_size),
    )
    packed = runner.pack(groups, mask)
    cotangent = TokenStats(np.where(mask, 1 / mask.sum(), 0.0).astype(np.float32))
    run = jax.jit(runner.pull_back)
    return lambda: run(params, packed, cotangent)


@contextlib.contextmanager
def step_call(session: Session) -> Iterator[Callable[[], object]]:
    """Return a call that takes the next training step as `lpo train` does: sampling, verification, updates, records."""
    config, objective = session.config, check_config(session.config)
    with open_hooks(objective, session.environment) as hooks:
        learner = Learner.of(session.model, objective, hooks, config.training.steps)
        run = RunDirectory(config, "train", resume=False)
        tokenizer = session.environment.tokenizer
        with run, Signals() as signals, Recorder(run, signals, config.training.steps, tokenizer) as recorder:
            position = Position(session.model.start(session.model.load_state(), learner.optimizer, objective))
            data = session.environment.prompts(config.training.prompts_per_step, None)
            yield lambda: run_step(session, learner, position, data, recorder)


def time_call(
    what: str, session: Session, shapes: Shapes, run: Callable[[], object], repeats: int
) -> dict[str, Json]:
    """Time a call of one of the functions above and compare it with the machine's rates.

    Args:
      what: "sample", "train" or "step".
      session: the session of the call.
      shapes: the shapes of the batch.
      run: the call.
      repeats: number of timed calls; measurements of the machine alternate with them.

    Returns:
      The shapes, "tokens_per_s" (response tokens; the gradient also counts prompt tokens), "seconds" (median) and
      "all_seconds", "compile_s", the peak memory in bytes, the FLOPs and bytes that the model needs, and "of_floor":
      the time of the matrix products alone at the machine's rate, divided by the measured time.
    """
    first = seconds(run)
    times, machine = alternate(run, repeats, session.model.dtype)
    middle = statistics.median(times)
    lengths, dtype = shapes.lengths(), session.model.dtype
    work = Work.forward(session.model.architecture, shapes, lengths, dtype.itemsize)
    passes = {"sample": 1, "train": 3, "step": 4}[what]  # the backward pass is two more
    tokens = lengths.sum() + (shapes.prompts * shapes.prompt_tokens if what == "train" else 0)
    gradient_bytes = passes * work.weight_bytes + work.cache_bytes
    floor = passes * work.product_flops / machine.matrix_flops
    return {
        "benchmark": what,
        "model": session.config.model.path,
        "dtype": dtype.name,
        **dataclasses.asdict(shapes),
        "tokens_per_s": float(tokens / middle),
        "seconds": middle,
        "all_seconds": times,
        "compile_s": max(0.0, first - middle),
        "peak_memory_bytes": peak_memory(),
        "model_flops": passes * work.flops,
        "model_bytes": work.sampling_bytes if what == "sample" else gradient_bytes,
        "machine_matrix_flops_per_s": machine.matrix_flops,
        "machine_copy_bytes_per_s": machine.copy_bytes,
        "floor_seconds": floor,
        "of_floor": floor / middle,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }
