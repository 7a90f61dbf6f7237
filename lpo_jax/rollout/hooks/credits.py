"""Hooks that assign credit to parts of a response, each by computing `Scored.credit` `[P, K, T]`.

The objective's credit part defines how the credit enters its coefficients.
"""

import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models.runner import Groups, score
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.collect import concatenate
from lpo_jax.rollout.hooks.base import BUDGETED, RunHook, judged, require_solutions
from lpo_jax.rollout.hooks.judges import FlawJudge
from lpo_jax.sampling.padding import NO_LIMIT, pad_prompts


class StepCredits(FlawJudge):
    """CAPO (credit): 1 on the tokens of wrong steps."""

    spec: specs.StepJudge

    def annotate(self, batch, rollouts, tools):
        credit = np.zeros(batch.scored.mask.shape, np.float32)
        for (p, k), verdict in self.verdicts(rollouts, tools, rollouts.valid).items():
            ids = rollouts.responses.ids(p, k)
            for span in str(verdict.parts.get("wrong", "")).split():
                first, _, last = span.partition(":")
                if not (first.isdigit() and last.isdigit()):
                    raise UserError(
                        f"{self.spec.judge}: wrong steps are ranges of characters such as '12:40 80:95', got {span!r}"
                    )
                credit[p, k, self._token_at(ids, int(first)) : self._token_at(ids, int(last) - 1) + 1] = 1
        return {"credit": credit}

    def _token_at(self, ids: list[int], place: int) -> int:
        """Index of the token that contains character `place` of the text, by bisection over the decoded prefixes."""
        low, high = 0, len(ids) - 1
        while low < high:
            middle = (low + high) // 2
            text = self.environment.collect.text(ids[: middle + 1])
            low, high = (low, middle) if len(text) > place else (middle + 1, high)
        return low


class Values(RunHook):
    """GRPO-VPS: the gain in the probability of the row's solution over each segment of a response."""

    spec: specs.PrefixValues

    def __init__(self, spec, environment, objective):
        super().__init__(spec, environment, objective)
        require_solutions(environment, objective, "whose chance could be measured")

    def annotate(self, batch, rollouts, tools):
        encode = lambda text: self.environment.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        P, K, T = batch.scored.mask.shape
        M, cue = self.spec.segments, encode(self.spec.cue)
        prefixes, solutions = [], []
        for p, row in enumerate(tools.rows_of(rollouts)):
            prompt = rollouts.prompts[p, : rollouts.prompt_lengths[p]].tolist()
            responses = [rollouts.responses.ids(p, k) for k in range(K)]
            # Part m of n tokens ends before token ceil((m + 1) n / M).
            cuts = [ids[: -(-(m + 1) * len(ids) // M)] for ids in responses for m in range(M)]
            prefixes += [prompt + ids + cue for ids in ([], *cuts)]
            solutions += [encode(self.environment.task.solution(row))] * (1 + K * M)
        chances = self._chances(tools, prefixes, solutions).reshape(P, 1 + K * M)
        before, after = chances[:, :1], chances[:, 1:].reshape(P, K, M)
        gains = np.diff(after, axis=-1, prepend=np.broadcast_to(before[..., None], (P, K, 1)))  # [P, K, M]
        lengths = np.maximum(rollouts.responses.lengths, 1)[..., None]
        part = np.minimum(np.arange(T) * M // lengths, M - 1)  # [P, K, T]
        return {"credit": np.take_along_axis(gains, part, axis=-1).astype(np.float32)}

    def _chances(self, tools, prefixes: list[list[int]], solutions: list[list[int]]) -> np.ndarray:
        """Probability `[N]` of each solution given its prefix."""
        prompts, lengths = pad_prompts(prefixes, NO_LIMIT)
        targets, sizes = pad_prompts(solutions, NO_LIMIT)
        logp = score(tools.runner, tools.params, Groups(prompts, lengths, targets[:, None])).logp[:, 0]
        return np.exp(np.where(np.arange(targets.shape[1]) < sizes[:, None], jnp.asarray(logp), 0).sum(-1))


class Cuts(RunHook):
    """BRPO: mean reward of answers that are sampled after a response is truncated at each budget."""

    spec: specs.Budgets

    def annotate(self, batch, rollouts, tools):
        spec, environment = self.spec, self.environment
        S, longest = spec.budgets, environment.config.sampling.max_tokens
        P, K, T = batch.scored.mask.shape
        cue = environment.tokenizer.encode(spec.cue, add_special_tokens=False)
        segment = np.minimum(np.arange(T) * S // longest, S - 1)
        credit = np.broadcast_to(rollouts.rewards[..., None], (P, K, T)).astype(np.float32).copy()
        for s in range(S - 1):
            cut = -(-(s + 1) * longest // S)  # the first token of segment s + 1
            places = np.argwhere(rollouts.responses.lengths > cut).tolist()
            rows, prompts, written = [], [], []
            for p, k in places:
                begun = rollouts.responses.ids(p, k)[:cut]
                # A response's random numbers do not depend on the other responses of its group.
                rows.append((rollouts.ids[p] + ((k + 1) << 24), environment.train_rows[rollouts.ids[p]]))
                prompts.append(rollouts.prompts[p, : rollouts.prompt_lengths[p]].tolist() + begun + cue)
                written.append(environment.collect.text(begun) + spec.cue)
            answers = [
                tools.sample(
                    rows[i : i + P],
                    stream=BUDGETED + 16 * s,
                    num_responses=spec.summaries,
                    max_tokens=spec.summary_tokens,
                    prompts=prompts[i : i + P],
                    written=written[i : i + P],
                    at_least=P,
                )
                for i in range(0, len(rows), P)
            ]
            if answers:
                outcomes = judged(concatenate(answers))
                for (p, k), known, mean in zip(places, outcomes.known, outcomes.mean_reward):
                    if known:
                        credit[p, k, segment == s] = mean
        return {"credit": credit}
