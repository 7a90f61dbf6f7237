"""One sampling round: prompts are drawn, responses are sampled and verified, and hooks mend and select the groups.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lpo_jax import tasks
from lpo_jax.models.decoder import Params
from lpo_jax.models.runner import Groups, ModelRunner, picture_array
from lpo_jax.objectives import Scored
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts, concatenate
from lpo_jax.rollout.environment import Environment
from lpo_jax.rollout.hooks import RunHook, Tools
from lpo_jax.sampling import Ahead, Responses
from lpo_jax.sampling.padding import bucket, pad_to
from lpo_jax.sampling.responses import concatenate_responses
from lpo_jax.types import Json


@dataclasses.dataclass(frozen=True)
class InFlight:
    """The round of a later step, whose responses are sampled in slots that would be idle (`sampling.ahead`).

    Attributes:
      step: the step that learns from it.
      ids: `[P]` of its rows.
      responses: as far as they are drawn.
    """

    step: int
    ids: list[int]
    responses: Responses

    def to_json(self) -> dict[str, Json]:
        """Return the round as JSON, for a checkpoint."""
        return {"step": self.step, "ids": self.ids, "responses": self.responses.to_text()}

    @classmethod
    def from_json(cls, value: dict[str, Json]) -> "InFlight":
        """Return the round that `to_json` has written."""
        return cls(value["step"], value["ids"], Responses.from_text(value["responses"]))


def sample_round(
    environment: Environment,
    hooks: Sequence[RunHook],
    runner: ModelRunner,
    params: Params,
    data: tasks.PromptIterator,
    step: int,
    in_flight: Sequence[InFlight] = (),
) -> tuple[Rollouts, Tools, list[InFlight]]:
    """Sample the groups of a step, phase by phase (`hooks/base.py`).

    Args:
      hooks: the method's, in its order.
      runner: how hooks score responses with the trainer.
      params: the current policy.
      data: yields the step's prompts.
      step: from 1.
      in_flight: the rounds of this step and later ones that earlier steps have begun.

    Returns:
      The rollouts to learn from, the tools that the hooks of this step have, and the rounds in flight.
    """
    tools = Tools(environment, runner, step, params, environment.prepare(params))
    sampled: list[Rollouts] = []
    in_flight = list(in_flight)
    for hook in hooks:
        hook.begin()

    def more() -> Rollouts | None:
        """Sample a further batch of prompts that the step has not seen yet; None if the data offers no others."""
        seen = {row for rollouts in sampled for row in rollouts.ids}
        if environment.config.sampling.ahead:  # no hook acts on the phases below (`training/check.py`)
            rollouts, in_flight[:] = sample_ahead(tools, data, in_flight)
            sampled.append(rollouts)
            return rollouts
        rows = next(data)
        wanted = len(rows)
        for hook in hooks:
            rows = hook.draw(rows, step, seen)
        rows = [row for row in rows if row[0] not in seen]
        if not rows:
            return None
        rollouts = tools.sample(rows, at_least=wanted)
        sampled.append(rollouts)
        for hook in hooks:
            rollouts = hook.mend(rollouts, tools)
        return rollouts

    rollouts = more()
    for hook in hooks:
        rollouts = hook.select(rollouts, more)
    everything = concatenate(sampled)
    for hook in hooks:
        hook.observe(everything)
    return rollouts, tools, in_flight


def sample_ahead(
    tools: Tools, data: tasks.PromptIterator, in_flight: Sequence[InFlight]
) -> tuple[Rollouts, list[InFlight]]:
    """Sample the round of a step to its end, and those of the next `sampling.ahead` steps in the slots that are free.

    Returns:
      The rollouts of the step, and the other rounds.
    """
    environment, K = tools.environment, tools.environment.config.sampling.num_responses
    rounds = list(in_flight)
    for step in range(tools.step + len(rounds), tools.step + environment.config.sampling.ahead + 1):
        ids = [row_id for row_id, _ in next(data)]
        rounds.append(InFlight(step, ids, Responses.empty(len(ids), K, 1)))
    rows = [(row_id, environment.train_rows[row_id]) for later in rounds for row_id in later.ids]
    P = len(rounds[0].ids)
    ahead = Ahead(
        len(rounds),
        np.repeat([later.step for later in rounds], P).astype(np.uint32),
        concatenate_responses([later.responses for later in rounds]),
    )
    rollouts = tools.sample(rows, ahead=ahead)
    parts = [rollouts.ahead.take(np.arange(i * P, (i + 1) * P)).trimmed() for i in range(len(rounds) - 1)]
    later = [dataclasses.replace(old, responses=new) for old, new in zip(rounds[1:], parts)]
    return dataclasses.replace(rollouts, ahead=None), later


def make_batch(rollouts: Rollouts, max_tokens: int, progress: float) -> Batch:
    """The arrays that an update takes, with responses padded to a bucket of at most `max_tokens` tokens.

    Args:
      progress: of the run, 0 to 1.
    """
    responses = rollouts.responses
    T = bucket(responses.tokens.shape[-1], max_tokens)
    tokens = pad_to(responses.tokens, T)
    scored = Scored(
        behaviour_logp=pad_to(responses.log_probs, T),
        rewards=rollouts.rewards,
        mask=pad_to(responses.mask, T),
        valid=rollouts.valid,
        passed=rollouts.passed,
        malformed=rollouts.malformed,
        truncated=~responses.finished,
        token_ids=tokens,
        clusters=clusters(rollouts),
        progress=np.float32(progress),
    )
    pictures = picture_array(rollouts.patches)
    return Batch(Groups(rollouts.prompts, rollouts.prompt_lengths, tokens, pictures=pictures), scored)


def clusters(rollouts: Rollouts) -> np.ndarray:
    """Clusters of equal final answers, `[P, K]` int32, numbered from 0 in each group; -1 without an answer."""
    numbers = np.full(rollouts.rewards.shape, -1, np.int32)
    for p, group in enumerate(rollouts.verdicts):
        seen: dict[str, int] = {}
        for k, verdict in enumerate(group):
            answer = verdict.parts.get("answer")
            if answer not in (None, ""):
                numbers[p, k] = seen.setdefault(str(answer), len(seen))
    return numbers
