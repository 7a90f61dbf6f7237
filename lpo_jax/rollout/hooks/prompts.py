"""Which prompts are sampled: by pass rate, and only groups with signal."""

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.hooks.base import RunHook, joined, judged


class PassRates(RunHook):
    """Keeps each prompt's pass rate and draws by it; subclasses say how rates weigh."""

    uniform_share = 0.0
    unknown = 0.5  # the rate of a prompt that has not been sampled yet

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        self.rates: dict[int, float] = {}

    def weights(self, rates: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def draw(self, rows, step, seen):
        """The first rows as they come, the rest drawn without replacement by weight, from the run's seed."""
        kept = [row for row in rows[: round(self.uniform_share * len(rows))] if row[0] not in seen]
        train = self.session.train_rows
        rates = np.full(len(train), self.unknown)
        rates[list(self.rates)] = list(self.rates.values())
        free = np.ones(len(train), bool)
        free[[*seen, *(i for i, _ in kept)]] = False
        wanted = min(len(rows) - len(kept), int(free.sum()))
        if wanted == 0:
            return kept
        weights = np.where(free, self.weights(rates), 0)
        if np.count_nonzero(weights) < wanted:  # too few prompts stand out: the others are drawn evenly
            weights = np.where(free, weights + 1e-9, 0)
        # The rounds of a step draw different numbers: each has seen more rows than the one before.
        rng = np.random.default_rng((self.session.config.seed, step, len(seen)))
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
    """DAPO: groups whose rewards are all equal give way to those of further prompts."""

    spec: specs.DynamicSampling

    def __init__(self, spec, session, objective):
        super().__init__(spec, session, objective)
        if session.config.sampling.num_responses < 2:
            raise UserError(
                "sampling.num_responses = 1: dynamic-sampling keeps groups whose rewards differ; it needs 2 or more"
            )

    def select(self, round, more):
        wanted, rounds = len(round.batch.ids), [joined([round])]
        useful = lambda: sum(int(judged(part.batch).mixed.sum()) for part in rounds)  # noqa: E731
        for _ in range(self.spec.max_rounds - 1):
            if useful() >= wanted:
                break
            if (further := more()) is not None:
                rounds.append(further)
        everything = joined(rounds)
        outcomes = judged(everything.batch)
        good = np.flatnonzero(outcomes.mixed).tolist()[:wanted]
        # Groups without signal; those of which nothing is known are masked, and come last.
        rest = np.flatnonzero(~outcomes.mixed)
        rest = rest[np.argsort(~outcomes.known[rest], kind="stable")].tolist()
        round.batch = everything.batch.take(self._spread(good, rest, wanted))
        round.rescore = everything.rescore
        self.rounds, self.kept = len(rounds), len(good) / wanted

    def _spread(self, good: list[int], rest: list[int], wanted: int) -> list[int]:
        """An order of groups whose equal parts, the step's minibatches, share those with signal evenly."""
        if not good or len(good) == wanted:
            return [*good, *rest][:wanted]
        updates = self.session.config.training.updates_per_step
        repeated = [good[i % len(good)] for i in range(max(updates, len(good)))]
        ranked = np.array([*repeated, *rest][:wanted])
        return ranked.reshape(-1, updates).T.ravel().tolist()

    def metrics(self):
        return {"lpo/sampling_rounds": self.rounds, "lpo/useful_group_frac": self.kept}
