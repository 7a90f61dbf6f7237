"""Metrics of a step and of an evaluation, under the names of `lpo_jax.reporting.metric_names`."""

import collections
import contextlib
import numbers
import resource
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lpo_jax.config import SamplingSection
from lpo_jax.evaluation.heldout import Evaluation
from lpo_jax.reporting import validation_metrics
from lpo_jax.rewards.verdict import OUTCOMES
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.runs import compiles
from lpo_jax.sampling import Responses
from lpo_jax.types import Json

# Reduced by max over the updates of a step; all others by mean.
WORST = {"lpo/score_abs_max", "lpo/coef_sum"}
# The gap between sampler and trainer is that of the first update, because later updates run with other weights.
FIRST_ONLY = {
    "lpo/logp_gap_mean",
    "lpo/logp_gap_max",
    "training/rollout_probs_diff_mean",
    "training/rollout_probs_diff_max",
}


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the start of the block, or of the whole block after its end."""
    start, end = time.perf_counter(), None
    yield lambda: (end or time.perf_counter()) - start
    end = time.perf_counter()


def over_updates(updates: list[dict[str, Json]]) -> dict[str, float]:
    """Reduces the metrics of a step's updates to one value each."""
    merged = {}
    for name in updates[0]:
        values = [float(update[name]) for update in updates]
        merged[name] = (
            values[0] if name in FIRST_ONLY else max(values) if name in WORST else float(np.mean(values))
        )
    return merged


def rollout_metrics(rollouts: Rollouts, sampling: SamplingSection) -> dict[str, float]:
    """Rewards, outcomes, lengths and times of a step's rollouts."""
    rewards = rollouts.rewards[rollouts.valid]
    lengths, prompts = rollouts.responses.lengths, rollouts.prompt_lengths
    outcomes = [verdict.outcome for group in rollouts.verdicts for verdict in group]
    metrics = {f"reward/outcome/{name}": outcomes.count(name) / len(outcomes) for name in OUTCOMES}
    metrics["reward/pass_rate"] = (
        float(rollouts.passed[rollouts.valid].mean()) if rewards.size else float("nan")
    )
    for prefix, values in (
        ("critic/score", rewards),
        ("response_length", lengths),
        ("prompt_length", prompts),
    ):
        for how in ("mean", "max", "min"):
            metrics[f"{prefix}/{how}"] = float(getattr(values, how)()) if values.size else float("nan")
    metrics |= {f"reward/parts/{name}": value for name, value in part_means(rollouts).items()}
    tokens = rollouts.responses.mask
    entropies = rollouts.responses.entropies[tokens]
    metrics["actor/entropy"] = float(entropies.mean()) if tokens.any() else float("nan")
    metrics["response_length/clip_ratio"] = float(np.mean(~rollouts.responses.finished))
    metrics["response/repetition"] = repeated_share(rollouts.responses.tokens, lengths)
    metrics["prompt_length/clip_ratio"] = float(np.mean(prompts >= sampling.max_prompt_tokens))
    metrics["perf/total_num_tokens"] = int(lengths.sum() + prompts.sum())
    metrics["perf/useful_row_steps"] = float(lengths.sum() / max(rollouts.responses.row_steps.sum(), 1))
    metrics["timing_s/gen"] = rollouts.seconds_sampling
    metrics["timing_s/reward"] = rollouts.seconds_verifying
    return metrics


def repeated_share(tokens: np.ndarray, lengths: np.ndarray, n: int = 4) -> float:
    """Share of the sequences of n tokens that occurred before in the same response, mean over the responses.

    Args:
      tokens: `[P, K, T]`.
      lengths: `[P, K]`; responses of fewer than n tokens do not count.
    """
    T = tokens.shape[-1]
    count = np.maximum(lengths - n + 1, 0)
    if T < n or not count.any():
        return 0.0
    # Sequences as 64-bit hashes; equal ones are neighbours once they are sorted.
    factors = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, n + 1, dtype=np.uint64)
    hashes = (np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), n, -1) * factors).sum(-1)
    real = np.arange(T - n + 1) < count[..., None]
    ordered = np.sort(np.where(real, hashes, np.iinfo(np.uint64).max), -1)
    repeats = ((ordered[..., 1:] == ordered[..., :-1]) & real[..., 1:]).sum(-1)
    return float((repeats[count > 0] / count[count > 0]).mean())


def part_means(rollouts: Rollouts) -> dict[str, float]:
    """Mean of each numeric part of the verdicts, over the valid responses that have it."""
    values: dict[str, list[float]] = collections.defaultdict(list)
    for verdict in (verdict for group in rollouts.verdicts for verdict in group if not verdict.masked):
        for name, value in verdict.parts.items():
            if isinstance(value, numbers.Real):
                values[name].append(float(value))
    return {name: float(np.mean(held)) for name, held in sorted(values.items())}


def staleness_metrics(responses: Responses, step: int) -> dict[str, float]:
    """Age of the behaviour policy at `step`, in steps, over the tokens (`sampling.ahead`)."""
    age = step - responses.versions[responses.mask]
    return {
        "lpo/staleness_mean": float(age.mean()),
        "lpo/staleness_max": int(age.max()),
        "lpo/stale_token_fraction": float((age > 0).mean()),
    }


def evaluation_metrics(name: str, evaluation: Evaluation) -> dict[str, float]:
    """Metrics of a held-out evaluation, named `val-core/...` and `val-aux/...`."""
    samples = evaluation.summary["samples_per_problem"]
    return validation_metrics(name, evaluation.summary) | {
        f"val-aux/{name}/reward/mean@{samples}": evaluation.mean_reward,
        f"val-aux/{name}/response_length/mean": evaluation.mean_length,
        f"val-aux/{name}/response_length/clip_ratio": evaluation.truncated,
    }


def machine_metrics(seconds: float, tokens: int) -> dict[str, float]:
    """Speed and memory of the machine in a step.

    Args:
      tokens: prompt and response tokens of the step.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    metrics = {
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds / jax.device_count(),
        "perf/cpu_memory_used_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "perf/compiles": compiles.compiled(),
    }
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        metrics["perf/max_memory_allocated_gb"] = stats["peak_bytes_in_use"] / 1e9
    return metrics
