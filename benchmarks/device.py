"""Measure one accelerator, and compare it with `lpo plan`: print one JSON line per measurement and a table at the end.

Models have the shapes of `configs/models` and random weights, so nothing is downloaded. Every time is the median of
several calls after one that compiles; each call waits for its results. Rates are compared with the rates of large
matrix products and copies that the same device reached in the same run. `planned_over_measured` is the time that `lpo
plan` predicts for the same shapes, divided by the measured one.

    python benchmarks/device.py                    # at most seven minutes, mostly compiling; what is left over is named
    python benchmarks/device.py --dry-run          # tiny shapes on any device, to test this script
    python benchmarks/device.py --only parity decode --out results/

`device.sh` in the same folder also installs missing packages.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpo_jax import objectives
from lpo_jax.bench.measure import Machine, peak_memory, seconds
from lpo_jax.bench.work import Shapes, Work
from lpo_jax.config import OptimizerConfig, load_config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params, abstract_params, init_params
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.objectives import Scored, TokenStats
from lpo_jax.planner.plan import compile_phase, setting_of, workload
from lpo_jax.planner.topology import CHIPS, Topology, chip_of
from lpo_jax.runs.state import TrainState
from lpo_jax.sampling import PromptBatch, Responses, Sampler, SampleRequest
from lpo_jax.training.check import check_config
from lpo_jax.training.optimizer import make_optimizer
from lpo_jax.training.step import signal, update

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of each measurement; `decode` has one entry per number of rows.

    `stand_in` is the chip whose plan is compared with a device that the planner does not know.
    """

    models: tuple[str, ...] = ("qwen3-0.6b", "qwen3-4b")
    decode: tuple[Shapes, ...] = (Shapes(8, 8, 1024, 64), Shapes(32, 8, 1024, 64))
    gradient: Shapes = Shapes(4, 8, 512, 448)  # 16,384 tokens
    token_budget: int = 4096
    step: Shapes = Shapes(16, 8, 256, 64)
    parity: Shapes = Shapes(2, 4, 64, 32)
    layers: int | None = None  # number of layers of the models; None: all of them
    vocab_size: int | None = None  # vocabulary size of the models; None: unchanged
    stand_in: str | None = None


TINY = Sizes(
    models=("qwen3-0.6b",),
    decode=(Shapes(2, 2, 8, 4),),
    gradient=Shapes(2, 2, 8, 4),
    token_budget=32,
    step=Shapes(2, 2, 8, 4),
    parity=Shapes(2, 2, 8, 4),
    layers=1,
    vocab_size=512,
    stand_in="h100",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--only", nargs="+", choices=tuple(MEASUREMENTS), default=tuple(MEASUREMENTS))
    parser.add_argument("--models", nargs="+", help="names in configs/models")
    parser.add_argument(
        "--out", type=Path, help="folder of device.jsonl and device.txt, which are appended to"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420,
        help="time after which no further row is begun; each takes a minute at most",
    )
    arguments = parser.parse_args()
    sizes = TINY if arguments.dry_run else Sizes()
    if arguments.models:
        sizes = dataclasses.replace(sizes, models=tuple(arguments.models))

    started, rows, failed = time.perf_counter(), [], 0
    for name in arguments.only:
        try:
            for row in within(arguments.seconds - (time.perf_counter() - started), MEASUREMENTS[name](sizes)):
                row = {"measurement": name, **row, "at_s": round(time.perf_counter() - started, 1)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                save(arguments.out, "device.jsonl", json.dumps(row))
        except Exception:  # continue with the other measurements; the exit status reports the failure
            traceback.print_exc()
            failed += 1
    print(table(rows))
    save(arguments.out, "device.txt", table(rows))
    return int(failed > 0)


def within(seconds: float, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows until the time is over, then one that says so instead of the rest."""
    end = time.perf_counter() + seconds
    for row in iter(lambda: {"left_out": "no time"} if time.perf_counter() > end else next(rows, None), None):
        yield row
        if "left_out" in row:
            return


def save(folder: Path | None, name: str, text: str) -> None:
    """Append text to a file of the folder, if there is one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "a") as file:
            file.write(text + "\n")


def machine(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the device and its peak rates."""
    rates = device_rates()
    yield {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "bfloat16_tflops": rates.matrix_flops / 1e12,
        "float32_tflops": Machine.measure(jnp.float32).matrix_flops / 1e12,
        "copy_gb_per_s": rates.copy_bytes / 1e9,
    }


def parity(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the largest differences between the device and this machine's CPU, plain attention, and the sampler."""
    shapes = sizes.parity
    # Two layers and a small vocabulary, because the slow CPU computes the same program.
    config = dataclasses.replace(model_config(sizes.models[0], sizes), num_layers=2, vocab_size=4096)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
    groups, mask = batch(config, shapes)
    cotangent = cotangents(mask)
    for dtype in (jnp.float32, jnp.bfloat16):
        runner = ModelRunner(config, token_budget=sizes.token_budget, dtype=dtype)
        plain = dataclasses.replace(runner, attention="plain")
        results = []
        for device, runs in ((cpu, plain), (jax.devices()[0], plain), (jax.devices()[0], runner)):
            with jax.default_device(device):
                here = jax.device_put(params, device)
                stats = score(runs, here, groups)
                gradient, _ = jax.jit(runs.pull_back)(here, groups, cotangent)
                results.append(jax.device_get((stats.logp, gradient)))
        on_cpu, (logp, gradient), with_kernels = results
        sampled = sample(config, here, shapes, dtype)
        rescored = score(runner, here, groups.replace(responses=sampled.tokens))
        largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
        differ = lambda a, b: max(map(_largest, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
        yield {
            "dtype": jnp.dtype(dtype).name,
            "logp_device_minus_cpu": differ(logp, on_cpu[0]),
            "gradient_device_minus_cpu": differ(gradient, on_cpu[1]) / largest,
            "logp_kernels_minus_plain": differ(with_kernels[0], logp),
            "gradient_kernels_minus_plain": differ(with_kernels[1], gradient) / largest,
            "logp_sampler_minus_trainer": float(np.abs(sampled.log_probs - rescored.logp).max()),
        }


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def decode(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the speed of sampling in bfloat16, and its share of the device's copy bandwidth."""
    for name in sizes.models:
        config, rates = model_config(name, sizes), device_rates()
        sampler = Sampler(config, (-1,), jnp.bfloat16)
        weights = jax.block_until_ready(sampler.prepare(init_params(config, jax.random.key(0), jnp.bfloat16)))
        for shapes in sizes.decode:
            run = functools.partial(draw, sampler, weights, shapes)
            first = seconds(run)
            prefill = statistics.median(seconds(lambda: run(1)) for _ in range(REPEATS))  # noqa: B023
            middle = statistics.median(seconds(run) for _ in range(REPEATS))
            steps = shapes.tokens - 1  # `prefill` includes the first token
            work = Work.forward(config, shapes, shapes.lengths(), 2)
            least = (work.weight_bytes * steps + work.cache_reads) / rates.copy_bytes
            measured = (middle - prefill) / steps
            yield {
                "model": name,
                "rows": shapes.prompts * shapes.responses,
                "tokens_per_s": shapes.prompts * shapes.responses * shapes.tokens / middle,
                "ms_per_token_step": 1e3 * measured,
                **compared(measured, planned(sizes, config, shapes, "decode"), shapes.tokens),
                "prefill_s": prefill,
                "of_bandwidth": least / (middle - prefill),
                "compile_s": first - middle,
                "peak_gb": peak_memory() / 1e9,
            }


def gradient(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the speed of the gradient in bfloat16 with float32 parameters, and its share of the matrix rate."""
    shapes = sizes.gradient
    for name in sizes.models:
        config, rates = model_config(name, sizes), device_rates()
        params = init_params(config, jax.random.key(0))
        groups, mask = batch(config, shapes)
        runner = ModelRunner(config, token_budget=sizes.token_budget, dtype=jnp.bfloat16, remat=False)
        packed = runner.pack(groups, mask)
        run = jax.jit(runner.pull_back)
        call = lambda: run(params, packed, cotangents(mask))  # noqa: B023, E731 - called before the next one
        first = seconds(call)
        middle = statistics.median(seconds(call) for _ in range(REPEATS))
        work = Work.forward(config, shapes, shapes.lengths(), 2)
        tokens = shapes.prompts * (shapes.prompt_tokens + shapes.responses * shapes.tokens)
        yield {
            "model": name,
            "tokens": tokens,
            "tokens_per_s": tokens / middle,
            "seconds": middle,
            "of_matrix_rate": 3 * work.flops / rates.matrix_flops / middle,
            **compared(middle, planned(sizes, config, shapes, "gradient")),
            "compile_s": first - middle,
            "peak_gb": peak_memory() / 1e9,
        }


def step(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the times of LPO-forward steps: sampling, coefficients, gradient and optimizer, without verification."""
    name, shapes = sizes.models[0], sizes.step
    config = model_config(name, sizes)
    runner = ModelRunner(config, token_budget=sizes.token_budget, dtype=jnp.bfloat16, remat=False)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), 100)
    objective = objectives.get("lpo-forward")
    params = init_params(config, jax.random.key(0))
    state = TrainState(params, optimizer.init(params))
    rewards = np.random.default_rng(0).integers(0, 2, (shapes.prompts, shapes.responses)).astype(np.float32)
    times: dict[str, list[float]] = {"sampling": [], "update": []}
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        sampled = sample(config, state.params, shapes, jnp.bfloat16)
        between = time.perf_counter()
        groups, mask = batch(config, shapes)
        groups = runner.pack(groups.replace(responses=sampled.tokens), sampled.mask)
        scored = Scored(sampled.log_probs, rewards, sampled.mask)
        learned = signal(objective, TokenStats(sampled.log_probs), scored)
        state, _, norm = update(runner, optimizer, state, groups, learned.cotangent)
        if not np.isfinite(jax.device_get(norm)):
            raise FloatingPointError(f"the gradient norm is {norm}")
        times["sampling"].append(between - started)
        times["update"].append(time.perf_counter() - between)
    middle = {f"{part}_s": statistics.median(of[1:]) for part, of in times.items()}
    tokens = shapes.prompts * shapes.responses * shapes.tokens
    yield {
        "model": name,
        "rows": shapes.prompts * shapes.responses,
        **middle,
        "tokens_per_s": tokens / sum(middle.values()),
        "first_s": times["sampling"][0] + times["update"][0],
        "peak_gb": peak_memory() / 1e9,
    }


def planned(sizes: Sizes, config: ModelConfig, shapes: Shapes, name: str) -> float | None:
    """Return the seconds that the planner predicts for "decode" or "gradient"; None for a chip that it does not know.

    The program is compiled by the device's own compiler. Only if the device is no accelerator, as in tests, its
    attention is plain and the chip another one.
    """
    known = chip_of(jax.devices()[0].device_kind)
    if known is None and sizes.stand_in is None:
        return None
    chip = known or CHIPS[sizes.stand_in]
    target = Topology(chip, (1,) * max(chip.axes, 1))
    overrides = {
        "model.attention": "auto" if known else "plain",
        "sampling.num_responses": shapes.responses,
        "sampling.max_prompt_tokens": shapes.prompt_tokens,
        "sampling.max_tokens": shapes.tokens,
        "training.prompts_per_step": shapes.prompts,
        "training.updates_per_step": 1,
        "training.token_budget": sizes.token_budget,
        "training.remat": "false",
        "training.behaviour": "sampled",
    }
    run = load_config(CONFIGS / "math_1p7b.yaml", [f"--{key}={value}" for key, value in overrides.items()])
    objective = check_config(run)
    work = workload(run, config, objective.needs, False, chip)
    of = run, config, (-1,), objective, work, setting_of(run, work, target), jax.devices()[:1], target
    phase = compile_phase(*of, "decode" if name == "decode" else "update")
    if name == "decode":
        return phase.seconds(chip)
    optimizer = chip.busy(0.0, 28.0 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))))
    return phase.seconds(chip) - optimizer


def compared(measured: float, seconds_planned: float | None, runs: int = 1) -> dict[str, float]:
    """Return the prediction for `runs` runs beside the measured seconds of one, if there is a prediction."""
    if seconds_planned is None:
        return {}
    return {"planned_s": seconds_planned / runs, "planned_over_measured": seconds_planned / runs / measured}


MEASUREMENTS: dict[str, Callable[[Sizes], Iterator[dict[str, Any]]]] = {
    "machine": machine,
    "parity": parity,
    "gradient": gradient,
    "step": step,
    "decode": decode,
}


def device_rates() -> Machine:
    """Measure the rates of bfloat16 products and copies. They change because a busy device changes its clocks."""
    return Machine.measure(jnp.bfloat16)


def model_config(name: str, sizes: Sizes) -> ModelConfig:
    """Return a model of `configs/models`, with the layers and vocabulary of `sizes` if set."""
    config = ModelConfig.from_hf(json.loads((CONFIGS / "models" / name / "config.json").read_text()), name)
    layers, vocab_size = sizes.layers or config.num_layers, sizes.vocab_size or config.vocab_size
    return dataclasses.replace(config, num_layers=layers, vocab_size=vocab_size)


def batch(config: ModelConfig, shapes: Shapes) -> tuple[Groups, np.ndarray]:
    """Return random prompts and responses, and the mask `[P, K, T]` of response tokens."""
    lengths = np.full(shapes.prompts, shapes.prompt_tokens, np.int32)
    groups = Groups(shapes.prompt_ids(config.vocab_size), lengths, shapes.response_ids(config.vocab_size))
    return groups, shapes.mask()


def cotangents(mask: np.ndarray) -> TokenStats:
    """Return the cotangents of the mean log-prob."""
    return TokenStats(np.where(mask, 1 / mask.sum(), 0.0).astype(np.float32))


def sample(config: ModelConfig, params: Params, shapes: Shapes, dtype: Any) -> Responses:
    """Prepare the parameters and sample responses, as a training step does."""
    sampler = Sampler(config, (-1,), dtype)
    return draw(sampler, sampler.prepare(params), shapes)


def draw(sampler: Sampler, weights: Params, shapes: Shapes, tokens: int | None = None) -> Responses:
    """Sample from prepared weights; responses have `tokens` tokens, by default those of `shapes`."""
    rows = shapes.prompts, shapes.responses
    return sampler(
        weights,
        PromptBatch(
            shapes.prompt_ids(sampler.config.vocab_size),
            np.full(shapes.prompts, shapes.prompt_tokens, np.int32),
            np.arange(shapes.prompts, dtype=np.uint32),
        ),
        SampleRequest(shapes.responses, shapes.tokens),
        budgets=np.full(rows, tokens or shapes.tokens),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as text, one line per row."""
    show = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)  # noqa: E731
    lines = []
    for row in rows:
        values = ", ".join(
            f"{k} {show(v)}" for k, v in row.items() if k not in ("measurement", "at_s", "model")
        )
        lines.append(f"{row['measurement']:10} {row.get('model', ''):12} {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
