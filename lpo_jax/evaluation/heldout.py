"""Held-out evaluation: the same problems with the same random numbers every time, so that changes are paired."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lpo_jax.evaluation.metrics import summarise
from lpo_jax.rollout.collect import Collector, Rollouts
from lpo_jax.rollout.failures import Failures, failures, require_judged
from lpo_jax.sampling import SampleRequest

# Added to the run's seed: held-out samples never share random numbers with training.
SEED_OFFSET = 0x5EED


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model. `passed` and `valid` are `[problems, samples]`."""

    summary: dict[str, Any]
    passed: np.ndarray
    valid: np.ndarray
    records: list[dict]
    truncated: float
    mean_reward: float
    mean_length: float
    failures: Failures

    @property
    def score(self) -> float:
        """Held-out pass@1."""
        return self.summary["pass@1"]["mean"]


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n: the k of pass@k unless the config says otherwise."""
    return tuple(2**i for i in range(n.bit_length()))


def sample_rows(
    collect: Collector,
    weights: Any,
    rows: Sequence[dict],
    request: SampleRequest,
    *,
    prompts_per_batch: int,
    start: int = 0,
) -> Iterator[Rollouts]:
    """Samples every row from `start` on, batch by batch. The last batch is padded, never dropped."""
    request = dataclasses.replace(request, seed=request.seed + SEED_OFFSET)
    for first in range(start, len(rows), prompts_per_batch):
        yield collect(
            weights,
            list(enumerate(rows[first : first + prompts_per_batch], first)),
            request,
            at_least=prompts_per_batch,
        )


def evaluate(
    collect: Collector,
    weights: Any,
    rows: Sequence[dict],
    request: SampleRequest,
    *,
    prompts_per_batch: int,
    ks: Sequence[int] = (),
) -> Evaluation:
    """Samples `request.num_responses` to every row, verifies them, and summarises pass@k with intervals.

    Raises:
      VerifierFailed: not one response could be judged.
    """
    batches = list(sample_rows(collect, weights, rows, request, prompts_per_batch=prompts_per_batch))
    found = failures(verdict for batch in batches for group in batch.verdicts for verdict in group)
    require_judged(found, "held-out evaluation")
    join = lambda name: np.concatenate([getattr(batch, name) for batch in batches])  # noqa: E731
    passed, valid, rewards = join("passed"), join("valid"), join("rewards")
    lengths = np.concatenate([batch.responses.lengths for batch in batches])
    finished = np.concatenate([batch.responses.finished for batch in batches])
    return Evaluation(
        summary=summarise(passed, valid, ks=ks or powers_of_two(request.num_responses), seed=request.seed),
        passed=passed,
        valid=valid,
        records=[record for batch in batches for record in batch.records()],
        truncated=float(np.mean(~finished)),
        mean_reward=float(rewards[valid].mean()) if valid.any() else float("nan"),
        mean_length=float(lengths.mean()),
        failures=found,
    )
