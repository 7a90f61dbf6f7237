"""One sampling round: prompts are drawn, responses are sampled and verified, and hooks mend and select the groups.

Axes: P prompts · K responses · T response tokens.
"""

from collections.abc import Sequence

import numpy as np

from lpo_jax import tasks
from lpo_jax.models.decoder import Params
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import Scored
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts, concatenate
from lpo_jax.rollout.environment import Environment
from lpo_jax.rollout.hooks import RunHook, Tools
from lpo_jax.sampling.padding import bucket, pad_to


def sample_round(
    environment: Environment,
    hooks: Sequence[RunHook],
    runner: ModelRunner,
    params: Params,
    data: tasks.PromptIterator,
    step: int,
) -> tuple[Rollouts, Tools]:
    """Sample the groups of a step, phase by phase (`hooks/base.py`).

    Args:
      hooks: the method's, in its order.
      runner: how hooks score responses with the trainer.
      params: the current policy.
      data: yields the step's prompts.
      step: from 1.

    Returns:
      The rollouts to learn from, and the tools that the hooks of this step have.
    """
    tools = Tools(environment, runner, step, params, environment.prepare(params))
    sampled: list[Rollouts] = []
    for hook in hooks:
        hook.begin()

    def more() -> Rollouts | None:
        """Sample a further batch of prompts that the step has not seen yet; None if the data offers no others."""
        seen = {row for rollouts in sampled for row in rollouts.ids}
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
    return rollouts, tools


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
    return Batch(Groups(rollouts.prompts, rollouts.prompt_lengths, tokens), scored)


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
