"""Paired differences between two methods, with intervals that know of seeds and of problems.

Every seed of one method is held against the same seed of the other, problem by problem, which cancels what seed and
problem have in common. What is left varies in two ways: another seed would have trained another model, and other
problems would have been easier for one of the two. All seeds are put to the same problems, so the differences are a
table with crossed random effects, and the variance of their mean is the sum of both parts by the analysis of
variance: sigma_s^2 / S + sigma_p^2 / P + sigma_e^2 / (S P), e being what a seed and a problem have together, with
the noise of the single samples. Resampling seeds and problems (the pigeonhole bootstrap) would count that noise three
times, and it is most of what varies here; quantiles of five resampled seeds would in turn be too narrow. Student's t
with Satterthwaite's degrees of freedom accounts for few seeds.

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
      low, high: of its 95% interval; NaN with one seed.
      wins, pairs: in how many of the seeds its mean over problems is above 0.
    """

    mean: float
    low: float
    high: float
    wins: int
    pairs: int


def solved(passed: np.ndarray, valid: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each problem, from counts of any shape; NaN where fewer than k samples count."""
    return pass_at_k(valid, passed, k)


def estimate_mean(values: np.ndarray) -> Estimate:
    """The mean of `values [S, P]` and its interval.

    A problem that is NaN at any seed is left out. One seed says nothing of other seeds, and gets no interval.

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
    """Variance of the mean of `values [S, P]` over other seeds and other problems, and its degrees of freedom.

    A part that came out smaller than the noise alone would make it counts as the noise: seeds that happen to agree
    are no evidence that others would. So intervals are wider than need be where seeds differ by noise alone.
    """
    S, P = values.shape
    by_seed, by_problem = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    if P == 1:
        return values.var(ddof=1) / S, S - 1
    rest = (S - 1) * (P - 1)
    noise = np.square(values - by_seed - by_problem + values.mean()).sum() / rest
    # Mean squares, each of which holds the noise once.
    seeds, problems = max(P * by_seed.var(ddof=1), noise), max(S * by_problem.var(ddof=1), noise)
    total = seeds + problems - noise
    if total == 0:
        return 0.0, S - 1
    spread = seeds**2 / (S - 1) + problems**2 / (P - 1) + noise**2 / rest
    return total / (S * P), max(total**2 / spread, S - 1)
