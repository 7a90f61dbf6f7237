"""Time the updates of a real run with and without the responses that have no signal, and print one JSON line.

The first steps of a run are sampled and recorded: the warm start, if the config has one, then real prompts, responses
and rewards. Their updates are then repeated from the same parameters, with `training.pull_back` signal and all, taking
turns. Both must end at the same parameters.

    python benchmarks/reward_signal.py configs/quickstart.yaml --steps 5 --evaluation.problems=8
"""

import argparse
import dataclasses
import statistics
import tempfile

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

import jax
import numpy as np
import optax

from lpo_jax.bench.measure import seconds
from lpo_jax.config import load_config
from lpo_jax.rollout.hooks import open_hooks
from lpo_jax.rollout.rounds import make_batch, sample_round
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.recorder import Recorder
from lpo_jax.runs.signals import Signals
from lpo_jax.training.check import check_config
from lpo_jax.training.learner import Learner, complete_batch, take_step
from lpo_jax.training.loop import begin
from lpo_jax.training.session import open_session


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="how often all updates are repeated, each way")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [*overrides, f"--output={folder}/run"])
        start, batches, learner = recorded_batches(config, arguments.steps)
    ways = {
        True: dataclasses.replace(learner, signal_only=True),
        False: dataclasses.replace(learner, signal_only=False),
    }
    times: dict[bool, list[float]] = {True: [], False: []}
    shares, ends = [], {}
    for _ in range(arguments.repeats + 1):  # the first turn compiles
        for way, learner in ways.items():
            state = jax.tree.map(jax.numpy.copy, start)
            for batch in batches:

                def step(learner=learner, batch=batch):
                    nonlocal state
                    state, metrics, _ = take_step(learner, state, batch)
                    shares.append(metrics["perf/signal_fraction"])
                    return state

                times[way].append(seconds(step))
            ends[way] = jax.device_get(state.params)
    changes = [jax.tree.map(np.subtract, ends[way], jax.device_get(start.params)) for way in (True, False)]
    apart = jax.tree.map(np.subtract, *ends.values())
    timed = {way: of[arguments.steps :] for way, of in times.items()}
    print_line(
        {
            "benchmark": "signal",
            "config": arguments.config,
            "steps": arguments.steps,
            "signal_fraction": statistics.mean(shares[: arguments.steps]),
            "groups_without_signal": float(np.mean([_without_signal(batch) for batch in batches])),
            "seconds": statistics.median(timed[True]),
            "seconds_without": statistics.median(timed[False]),
            "times_faster": sum(timed[False]) / sum(timed[True]),
            "all_seconds": timed[True],
            "all_seconds_without": timed[False],
            "seconds_compiling": [sum(times[way][: arguments.steps]) for way in (True, False)],
            "parameters_apart": float(optax.global_norm(apart) / optax.global_norm(ends[False])),
            "change_apart": float(optax.global_norm(apart) / optax.global_norm(changes[1])),
        }
    )


def recorded_batches(config, steps):
    """Run the first steps of a run; returns the train state before them, their batches, and the learner."""
    objective = check_config(config)
    with open_session(config) as session, open_hooks(objective, session.environment) as hooks:
        learner = Learner.of(session.model, objective, hooks, config.training.steps)
        run = RunDirectory(config, "train", False)
        with (
            run,
            Signals() as signals,
            Recorder(run, signals, config.training.steps, session.environment.tokenizer) as recorder,
        ):
            position = begin(session, learner, recorder)
        state, batches = position.state, []
        start = jax.tree.map(jax.numpy.copy, state)
        data = session.environment.prompts(config.training.prompts_per_step, None)
        for step in range(1, steps + 1):
            rollouts, tools, _ = sample_round(
                session.environment, hooks, learner.runner, state.policy, data, step
            )
            batch = make_batch(rollouts, config.sampling.max_tokens, learner.progress(step))
            batch, _ = complete_batch(learner, batch, rollouts, tools)
            batches.append(batch)
            state, *_ = take_step(learner, state, batch)
    return start, batches, learner


def _without_signal(batch) -> float:
    """The share of groups whose rewards are all equal."""
    return float(np.mean(np.ptp(batch.scored.rewards, axis=1) == 0))


if __name__ == "__main__":
    main()
