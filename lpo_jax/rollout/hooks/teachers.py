"""Hooks that compute the next-token distributions of another policy on the same responses."""

import jax.numpy as jnp
import numpy as np

from lpo_jax.models.runner import Groups, top_k_teacher
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.encode import encode_hinted
from lpo_jax.rollout.hooks.base import RunHook
from lpo_jax.sampling.padding import NO_LIMIT, pad_prompts


class Previous(RunHook):
    """MDPO: the behaviour policy of the round is the teacher."""

    spec: specs.PreviousPolicy

    def annotate(self, batch, rollouts, tools):
        count = min(self.spec.top, tools.runner.config.vocab_size)
        return {"teacher": top_k_teacher(tools.runner, count, tools.params, batch.groups)}


class Sibling(RunHook):
    """SRPO: the policy itself, with a passing response of the group in its prompt."""

    spec: specs.SiblingTeacher

    def annotate(self, batch, rollouts, tools):
        environment, groups = self.environment, batch.groups
        P, K, T = groups.responses.shape
        good = rollouts.passed & rollouts.valid
        taught = ~good & rollouts.valid & good.any(-1, keepdims=True)  # [P, K]
        prompts = []
        for row, texts, passed in zip(tools.rows_of(rollouts), rollouts.texts, good):
            hint = self.spec.reprompt.replace("{solution}", texts[int(np.argmax(passed))])
            prompts.append(encode_hinted(environment.task, environment.tokenizer, row, hint))
        padded, lengths = pad_prompts(prompts, NO_LIMIT)
        count = min(self.spec.top, tools.runner.config.vocab_size)
        teacher = top_k_teacher(tools.runner, count, tools.params, Groups(padded, lengths, groups.responses))
        return {"teacher": teacher.replace(valid=jnp.asarray(taught))}
