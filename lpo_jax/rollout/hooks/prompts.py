"""Hooks that choose which prompts are sampled and which groups are kept."""

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.collect import concatenate
from lpo_jax.rollout.hooks.base import RunHook, judged


class PassRates(RunHook):
    """Records the pass rate of each prompt and draws prompts by it; subclasses define the weights."""

    uniform_share = 0.0
    unknown = 0.5  # the rate of a prompt that has not been sampled yet

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        self.rates: dict[int, float] = {}

    def weights(self, rates: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def draw(self, rows, step, seen):
        """The first rows in the order of the data, and others drawn without replacement by weight, from the seed."""
        kept = [row for row in rows[: round(self.uniform_share * len(rows))] if row[0] not in seen]
        train = self.environment.train_rows
        rates = np.full(len(train), self.unknown)
        rates[list(self.rates)] = list(self.rates.values())
        free = np.ones(len(train), bool)
        free[[*seen, *(i for i, _ in kept)]] = False
        wanted = min(len(rows) - len(kept), int(free.sum()))
        if wanted == 0:
            return kept
        weights = np.where(free, self.weights(rates), 0)
        if (
            np.count_nonzero(weights) < wanted
        ):  # too few prompts have a weight: the others are drawn uniformly
            weights = np.where(free, weights + 1e-9, 0)
        # Rounds of one step draw different numbers, because each has seen more rows than the one before.
        rng = np.random.default_rng((self.environment.config.seed, step, len(seen)))
        chosen = rng.choice(len(train), wanted, replace=False, p=weights / weights.sum())
        return kept + [(int(i), train[int(i)]) for i in chosen]

    def observe(self, sampled):
        outcomes, momentum = judged(sampled), self.spec.rate_momentum
        for row, rate, known in zip(sampled.ids, outcomes.pass_rate, outcomes.known):
            if known:
                before = self.rates.get(row, self.unknown if momentum else rate)
                self.rates[row] = float(momentum * before + (1 - momentum) * rate)

    def state(self):
        return {str(row): rate for row, rate in self.rates.items()}

    def restore(self, state):
        self.rates = {int(row): rate for row, rate in state.items()}


class Learnability(PassRates):
    """VAS: weights p (1 - p)."""

    spec: specs.LearnabilitySampling

    @property
    def uniform_share(self):
        return self.spec.uniform_share

    def weights(self, rates):
        return rates * (1 - rates)


class Gaussian(PassRates):
    """FG-ExPO: a Gaussian around a pass rate of one half."""

    spec: specs.GaussianSampling

    def weights(self, rates):
        return np.exp(-((rates - 0.5) ** 2) / (2 * self.spec.width**2))


class Dynamic(RunHook):
    """DAPO: groups whose rewards are all equal are replaced by groups of further prompts."""

    spec: specs.DynamicSampling

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        if environment.config.sampling.num_responses < 2:
            raise UserError(
                "sampling.num_responses = 1: dynamic-sampling keeps groups whose rewards differ; it needs 2 or more"
            )

    def select(self, rollouts, more):
        wanted, rounds = len(rollouts.ids), [rollouts]
        useful = lambda: sum(int(judged(part).mixed.sum()) for part in rounds)  # noqa: E731
        for _ in range(self.spec.max_rounds - 1):
            if useful() >= wanted:
                break
            if (further := more()) is not None:
                rounds.append(further)
        everything = concatenate(rounds)
        outcomes = judged(everything)
        good = np.flatnonzero(outcomes.mixed).tolist()[:wanted]
        # Groups without signal fill the rest; those whose result is unknown are masked, and come last.
        rest = np.flatnonzero(~outcomes.mixed)
        rest = rest[np.argsort(~outcomes.known[rest], kind="stable")].tolist()
        self.rounds, self.kept = len(rounds), len(good) / wanted
        return everything.take(self._spread(good, rest, wanted))

    def _spread(self, good: list[int], rest: list[int], wanted: int) -> list[int]:
        """An order of groups in which each of the step's minibatches has an equal share of those with signal."""
        if not good or len(good) == wanted:
            return [*good, *rest][:wanted]
        updates = self.environment.config.training.updates_per_step
        repeated = [good[i % len(good)] for i in range(max(updates, len(good)))]
        ranked = np.array([*repeated, *rest][:wanted])
        return ranked.reshape(-1, updates).T.ravel().tolist()

    def metrics(self):
        return {"lpo/sampling_rounds": self.rounds, "lpo/useful_group_frac": self.kept}
