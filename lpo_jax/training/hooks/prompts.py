"""Which prompts are sampled: by pass rate, and only groups with signal."""

import numpy as np

from lpo_jax.evaluation.collect import join
from lpo_jax.objectives import hooks as specs
from lpo_jax.training.hooks.base import RunHook, pass_rates


class PassRates(RunHook):
    """Keeps each prompt's pass rate and draws by it; subclasses say how rates weigh."""

    uniform_share = 0.0
    unknown = 0.5  # the rate of a prompt that has not been sampled yet

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        self.rates: dict[int, float] = {}

    def weights(self, rates: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def draw(self, rows, step):
        """The first rows as they come, the rest drawn without replacement by weight, from the run's seed."""
        kept = rows[: round(self.uniform_share * len(rows))]
        train = self.session.train_rows
        rates = np.full(len(train), self.unknown)
        rates[list(self.rates)] = list(self.rates.values())
        weights = self.weights(rates)
        weights[[i for i, _ in kept]] = 0
        wanted = len(rows) - len(kept)
        if (
            np.count_nonzero(weights) < wanted
        ):  # nearly everything is solved, or nothing: no prompt stands out
            weights = weights + 1e-9
            weights[[i for i, _ in kept]] = 0
        rng = np.random.default_rng((self.session.config.seed, step))
        chosen = rng.choice(len(train), wanted, replace=False, p=weights / weights.sum())
        return kept + [(int(i), train[int(i)]) for i in chosen]

    def observe(self, batch):
        for row, rate in zip(batch.ids, pass_rates(batch)):
            before = self.rates.get(row, self.unknown if self.spec.rate_momentum else rate)
            self.rates[row] = float(self.spec.rate_momentum * before + (1 - self.spec.rate_momentum) * rate)

    def state(self):
        return {str(row): rate for row, rate in self.rates.items()}

    def restore(self, state):
        self.rates = {int(row): rate for row, rate in state.items()}


class Learnability(PassRates):
    """VAS: p (1 - p)."""

    spec: specs.LearnabilitySampling

    @property
    def uniform_share(self):
        return self.spec.uniform_share

    def weights(self, rates):
        return rates * (1 - rates)


class Gaussian(PassRates):
    """FG-ExPO: a bell around one half."""

    spec: specs.GaussianSampling

    def weights(self, rates):
        return np.exp(-((rates - 0.5) ** 2) / (2 * self.spec.width**2))


class Dynamic(RunHook):
    """DAPO: groups whose rewards are all equal are sampled anew from further prompts."""

    spec: specs.DynamicSampling

    def fill(self, round, more, tools):
        wanted, batches, self.rounds = len(round.batch.ids), [round.batch], 1
        useful = self._useful(round.batch)
        while len(useful) < wanted and self.rounds < self.spec.max_rounds:
            seen = {row for batch in batches for row in batch.ids}
            rows = [row for row in more() if row[0] not in seen]
            self.rounds += 1
            if rows:
                batches.append(tools.sample(rows, at_least=wanted))
                useful = self._useful(join(batches))
        everything = join(batches)
        rest = [p for p in range(len(everything.ids)) if p not in set(useful)]
        round.batch = everything.take([*useful, *rest][:wanted])
        self.kept = min(len(useful), wanted) / wanted

    def metrics(self):
        return {"lpo/sampling_rounds": self.rounds, "lpo/useful_group_frac": self.kept}

    @staticmethod
    def _useful(batch) -> list[int]:
        rewards = np.where(batch.valid, batch.rewards, np.nan)
        least, most = (
            f(rewards, -1, initial=i, where=batch.valid) for f, i in ((np.min, np.inf), (np.max, -np.inf))
        )
        return np.flatnonzero(most > least).tolist()
