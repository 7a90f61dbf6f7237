"""Paired differences between two methods, with intervals over seeds and problems.

Each seed of one method is compared with the same seed of the other, problem by problem, which cancels the effects that
the two methods share. The differences have two sources of variance: another seed would train another model, and other
problems could be easier for one of the methods. All seeds are evaluated on the same problems, so seeds and problems are
crossed random effects, and by the analysis of variance the variance of the mean difference is
sigma_s^2 / S + sigma_p^2 / P + sigma_e^2 / (S P), where e contains the interaction of seed and problem and the noise of
single samples. Resampling seeds and problems (the pigeonhole bootstrap) would count e three times, and e dominates
here; quantiles of five resampled seeds would be too narrow. Student's t with Satterthwaite's degrees of freedom
accounts for the small number of seeds.

Axes: S seeds · P problems.
"""

import dataclasses

import numpy as np
from scipy import special

from lpo_jax.evaluation.metrics import pass_at_k

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and problems.

    Attributes:
      mean: the mean.
      low: lower bound of the 95% interval; NaN with one seed.
      high: upper bound of the 95% interval; NaN with one seed.
      wins: number of seeds whose mean over the problems is above 0.
      pairs: number of seeds.
    """

    mean: float
    low: float
    high: float
    wins: int
    pairs: int


def solved(passed: np.ndarray, valid: np.ndarray, k: int) -> np.ndarray:
    """Compute pass@k of each problem from counts of any shape; NaN where fewer than k samples are valid."""
    return pass_at_k(valid, passed, k)


def estimate_mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of `values [S, P]` and its 95% interval.

    Problems with NaN at any seed are excluded. With one seed the interval is NaN, because the variance over seeds is
    unknown.

    References:
      Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4; Satterthwaite 1946.
    """
    values = np.asarray(values, np.float64)
    values = values[:, ~np.isnan(values).any(axis=0)]
    S, P = values.shape
    if P == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, S)
    mean, wins = float(values.mean()), int((values.mean(axis=1) > 0).sum())
    if S < 2:
        return Estimate(mean, float("nan"), float("nan"), wins, S)
    variance, freedom = variance_of_mean(values)
    half = special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, wins, S)


def variance_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Estimate the variance of the mean of `values [S, P]` over seeds and problems, and its degrees of freedom.

    Each mean square is at least the noise mean square, because seeds that agree by chance are no evidence that other
    seeds would agree. The intervals are therefore conservative if seeds differ only by noise.
    """
    S, P = values.shape
    by_seed, by_problem = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    if P == 1:
        return values.var(ddof=1) / S, S - 1
    rest = (S - 1) * (P - 1)
    noise = np.square(values - by_seed - by_problem + values.mean()).sum() / rest
    # Mean squares, each of which includes the noise once.
    seeds, problems = max(P * by_seed.var(ddof=1), noise), max(S * by_problem.var(ddof=1), noise)
    total = seeds + problems - noise
    if total == 0:
        return 0.0, S - 1
    spread = seeds**2 / (S - 1) + problems**2 / (P - 1) + noise**2 / rest
    return total / (S * P), max(total**2 / spread, S - 1)
