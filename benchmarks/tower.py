"""Time the vision tower's share of a step, and print one JSON line.

A round of a run's first prompts is sampled and its gradient computed, once with their images and once without the
tower: the same tokens, whose placeholders keep their embeddings. The optimizer and the verifiers are left out.

    python benchmarks/tower.py configs/micro_vision.yaml --sampling.num_responses=8
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

from lpo_jax.bench.measure import seconds
from lpo_jax.config import load_config
from lpo_jax.models.prompt_images import lay_out
from lpo_jax.objectives import TokenStats
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.rounds import make_batch
from lpo_jax.sampling import PromptBatch, SampleRequest
from lpo_jax.sampling.rows import image_outputs
from lpo_jax.training.check import check_config
from lpo_jax.training.session import Session, open_session


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--repeats", type=int, default=5, help="counted calls of each kind, taking turns")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [*overrides, f"--output={folder}/run"])
        with open_session(config) as session:
            calls = _calls(session)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats + 1):  # the first turn compiles
        for name, call in calls.items():
            times[name].append(seconds(call))
    found = {name: statistics.median(of[1:]) for name, of in times.items()}
    updates = config.training.updates_per_step
    step = found["sampling"] + updates * found["gradient"]
    tower = found["tower"] + updates * max(found["gradient"] - found["gradient_without"], 0.0)
    print_line(
        {
            "benchmark": "tower",
            "config": arguments.config,
            "prompts": config.training.prompts_per_step,
            "responses": config.sampling.num_responses,
            "frozen": session.model.freezes_tower,
            "seconds": found,
            "share_of_sampling": found["tower"] / found["sampling"],
            "share_of_gradient": 1 - found["gradient_without"] / found["gradient"],
            "share_of_step": tower / step,
        }
    )


def _calls(session: Session) -> dict:
    """The calls to time: sampling a round, the tower over its images, and a minibatch's gradient with and without."""
    config, objective = session.config, check_config(session.config)
    state, environment = session.model.load_state(), session.environment
    weights = environment.collect.sampler.prepare(state.policy)
    rows = next(environment.prompts(config.training.prompts_per_step, None))
    request = SampleRequest(config.sampling.num_responses, config.sampling.max_tokens, seed=config.seed)
    rollouts: Rollouts = environment.collect(weights, rows, request)
    prompts = PromptBatch(
        rollouts.prompts, rollouts.prompt_lengths, np.array(rollouts.ids, np.uint32), rollouts.patches
    )
    real = np.arange(rollouts.prompts.shape[1]) < rollouts.prompt_lengths[:, None]
    images = lay_out(session.model.architecture, rollouts.prompts, real, rollouts.patches)

    part = rollouts.take(range(len(rollouts.ids) // config.training.updates_per_step))
    batch = make_batch(part, config.sampling.max_tokens, 0.0)
    runner = session.model.runner(config.sampling.temperature, objective)
    groups = runner.pack(batch.groups, batch.scored.mask)
    weight = np.random.default_rng(0).normal(size=batch.scored.mask.shape) * batch.scored.mask
    pull_back = jax.jit(runner.pull_back)

    def gradient(groups):
        return pull_back(state.params, groups, TokenStats(weight.astype(np.float32)), state.frozen)[0]

    without = dataclasses.replace(groups, images=groups.images.replace(rows=None))
    sampler, model, dtype = environment.collect.sampler, session.model.architecture, session.model.dtype
    return {
        "sampling": lambda: sampler(weights, prompts, request).lengths,
        "tower": lambda: image_outputs(model, weights, images.rows, dtype),
        "gradient": lambda: gradient(groups),
        "gradient_without": lambda: gradient(without),
    }


if __name__ == "__main__":
    main()
