"""The response lengths that `lpo plan --lengths` plans for: drawn from a distribution, or recorded by a run.

Axes: P prompts · K responses.
"""

import math
import re
from pathlib import Path
from statistics import NormalDist

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.inspection.load import groups_of, read_run, read_samples

WIDEST = 5  # the largest sigma
_FORM = re.compile(r"mean=(?P<mean>[\d.]+),sigma=(?P<sigma>[\d.]+)")


def response_lengths(source: str, P: int, K: int, limit: int) -> np.ndarray:
    """Return the lengths `[P, K]` int32 of one step's responses, at least 1 and at most `limit`.

    Args:
      source: `mean=1024,sigma=1.0`, a log-normal distribution that is cut at the limit, where `mean` is the mean after
        the cut and `sigma` the standard deviation of the logarithm before it; or the directory of a run, whose last
        recorded groups are taken.

    Raises:
      UserError: `source` is neither, its mean cannot be reached, or the run has no rollouts.
    """
    match = _FORM.fullmatch(source.replace(" ", ""))
    if match is None:
        if not Path(source).is_dir():
            raise UserError(
                f"--lengths {source!r}: is neither of the form mean=1024,sigma=1.0 nor the directory of a run"
            )
        return _recorded(Path(source), P, K, limit)
    try:
        mean, sigma = float(match["mean"]), float(match["sigma"])
    except ValueError:
        raise UserError(f"--lengths {source!r}: mean and sigma must be numbers") from None
    if not (1 <= mean < limit and sigma <= WIDEST):
        raise UserError(
            f"--lengths {source!r}: the mean must be from 1 to below sampling.max_tokens = {limit}, and sigma at most "
            f"{WIDEST}"
        )
    drawn = np.exp(_location(mean, sigma, limit) + sigma * np.random.default_rng(0).normal(size=(P, K)))
    return np.clip(np.round(drawn), 1, limit).astype(np.int32)


def _location(mean: float, sigma: float, limit: int) -> float:
    """The mean of the logarithm with which lengths that are cut at the limit have the given mean."""
    low, high = math.log(mean) - sigma**2, math.log(limit) + 8 * sigma + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, sigma, limit) < mean else (low, middle)
    return low


def _cut_mean(location: float, sigma: float, limit: int) -> float:
    """E[min(X, limit)] of a log-normal X."""
    if sigma == 0:
        return min(math.exp(location), limit)
    below, cdf = (math.log(limit) - location) / sigma, NormalDist().cdf
    return math.exp(location + sigma**2 / 2) * cdf(below - sigma) + limit * (1 - cdf(below))


def _recorded(path: Path, P: int, K: int, limit: int) -> np.ndarray:
    """The lengths of a run's last recorded groups. Groups of another size are drawn from, with replacement."""
    run, groups = read_run(path), []
    for step in sorted(run.rollouts, reverse=True):
        rows, _ = read_samples(run.rollouts[step])
        of_step = ([row.get("tokens") for row in group] for group in groups_of(rows))
        groups += [np.array(group) for group in of_step if all(isinstance(n, int) for n in group)]
        if len(groups) >= P:
            break
    if not groups:
        raise UserError(
            f"--lengths {path}: the run has no rollouts with lengths; it needs training.save_rollouts=true"
        )
    rng = np.random.default_rng(0)
    if len(groups) < P:
        groups = [groups[i] for i in rng.integers(len(groups), size=P)]
    lengths = [group if len(group) == K else rng.choice(group, K) for group in groups[:P]]
    return np.clip(lengths, 1, limit).astype(np.int32)
