"""Evolution strategy for the parameters of a mirror map, as pure functions of arrays.

A round evaluates phi + sigma_t eps for pairs of opposite noises eps. If the mean fitness exceeds that of every earlier
round, phi moves along sum f eps. Otherwise phi stays, and the best noises are carried over to the next round.

Axes: N candidates · E carried candidates · D parameters.

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
    """The state of the search between two rounds.

    Attributes:
      phi: [D] the best parameters so far.
      carried_noise: [E,D] noises of an earlier round with the same phi, which are not evaluated again.
      carried_fitness: [E] their fitness in that round.
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
    """Return the initial state of a search that starts at `phi` [D]."""
    return Evolution(np.asarray(phi, float), np.zeros((0, len(phi))), np.zeros(0))


def new_noise(state: Evolution, population: int, seed: int) -> np.ndarray:
    """Return noises [N - E,D] of the candidates to evaluate in this round, in opposite pairs.

    Args:
      population: N, even.
      seed: seed of the search; the noise depends on it and on the number of the round.
    """
    pairs = (population - len(state.carried_noise)) // 2
    half = np.random.default_rng((seed, len(state.history))).standard_normal((pairs, len(state.phi)))
    return np.stack([half, -half], 1).reshape(-1, len(state.phi))


def deviation(state: Evolution, sigma: float, decay: float) -> float:
    """Return sigma_t of this round."""
    return sigma * decay ** len(state.history)


def advance(
    state: Evolution, noise: np.ndarray, fitness: Sequence[float], sigma: float, alpha: float
) -> Evolution:
    """Return the state of the search after a round.

    Args:
      state: the state before the round.
      noise: [N - E,D] the result of `new_noise`.
      fitness: [N - E] fitness of its candidates. A failed candidate has fitness 0: it counts in the mean and does not
        move phi.
      sigma: `deviation` of this round.
      alpha: step size along the estimated gradient.
    """
    noise = np.concatenate([state.carried_noise, noise])
    worth = np.concatenate([state.carried_fitness, np.asarray(fitness, float)])
    mean = float(worth.mean())
    history = (*state.history, mean)
    if mean > state.best:
        gradient = worth @ noise / (max((worth > 0).sum(), 1) * sigma)
        return Evolution(state.phi + alpha * gradient, noise[:0], worth[:0], history)
    # An even number, so that the others form pairs, and never all of them: each round evaluates new candidates.
    carry = min(max(2, 2 * int(CARRIED * len(worth) / 2)), len(worth) - 2)
    best = np.argsort(worth, kind="stable")[len(worth) - carry :]
    return Evolution(state.phi, noise[best], worth[best], history)


def stalled(state: Evolution, patience: int, min_delta: float) -> bool:
    """Whether none of the last `patience` rounds improved on all earlier rounds by more than `min_delta`."""
    before, since = state.history[:-patience], state.history[-patience:]
    return bool(before) and max(since) <= max(before) + min_delta
