"""Evolution of the parameters of a mirror map, as pure functions of arrays: no run is known here.

A round tries phi + sigma_t eps for pairs of opposite noises eps. When their mean fitness beats every round
before, phi moves along sum f eps; otherwise it stays, and the best noises are carried into the next round.

Axes: N candidates · E carried ones · D parameters.

References:
  GBMPO, arXiv 2602.04380; public code Lexsi-Labs/aligntune (backends/trl/rl/meta_es).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

CARRIED = 0.25  # of the population, after a round that is not accepted


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Where the search stands between two rounds.

    Attributes:
      phi: [D] the best parameters so far.
      carried_noise: [E,D] noises of an earlier round of the same phi that are not tried again.
      carried_fitness: [E] what they were worth then.
      history: mean fitness of each round.
    """

    phi: np.ndarray
    carried_noise: np.ndarray
    carried_fitness: np.ndarray
    history: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """Mean fitness of the last accepted round; -inf before the first."""
        return max(self.history, default=-math.inf)


def start_search(phi: Sequence[float]) -> Evolution:
    """The search from `phi` [D]."""
    return Evolution(np.asarray(phi, float), np.zeros((0, len(phi))), np.zeros(0))


def new_noise(state: Evolution, population: int, seed: int) -> np.ndarray:
    """Noises [N - E,D] of the candidates to try in this round, in opposite pairs.

    Args:
      population: N, even.
      seed: of the search; the round's number is the rest of the randomness.
    """
    pairs = (population - len(state.carried_noise)) // 2
    half = np.random.default_rng((seed, len(state.history))).standard_normal((pairs, len(state.phi)))
    return np.stack([half, -half], 1).reshape(-1, len(state.phi))


def deviation(state: Evolution, sigma: float, decay: float) -> float:
    """sigma_t of this round."""
    return sigma * decay ** len(state.history)


def advance(
    state: Evolution, noise: np.ndarray, fitness: Sequence[float], sigma: float, alpha: float
) -> Evolution:
    """The search after a round.

    Args:
      noise: what `new_noise` gave.
      fitness: of its candidates, 0 for one that failed: it counts in the mean, and moves nothing.
      sigma: this round's `deviation`.
      alpha: step along the estimated gradient.
    """
    noise = np.concatenate([state.carried_noise, noise])
    worth = np.concatenate([state.carried_fitness, np.asarray(fitness, float)])
    mean = float(worth.mean())
    history = (*state.history, mean)
    if mean > state.best:
        gradient = worth @ noise / (max((worth > 0).sum(), 1) * sigma)
        return Evolution(state.phi + alpha * gradient, noise[:0], worth[:0], history)
    # An even number, so that the rest are pairs, and never all: a round must try something new.
    carry = min(max(2, 2 * int(CARRIED * len(worth) / 2)), len(worth) - 2)
    best = np.argsort(worth, kind="stable")[len(worth) - carry :]
    return Evolution(state.phi, noise[best], worth[best], history)


def stalled(state: Evolution, patience: int, min_delta: float) -> bool:
    """Whether none of the last `patience` rounds was better than all before them by more than `min_delta`."""
    before, since = state.history[:-patience], state.history[-patience:]
    return bool(before) and max(since) <= max(before) + min_delta
