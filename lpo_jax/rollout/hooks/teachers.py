"""Next-token distributions of another policy on the same responses."""

import jax.numpy as jnp
import numpy as np

from lpo_jax.objectives import hook_specs as specs
from lpo_jax.rollout.encode import encode_hinted
from lpo_jax.rollout.hooks.base import RunHook
from lpo_jax.sampling.padding import NO_LIMIT, pad_prompts
from lpo_jax.training.batch import Groups
from lpo_jax.training.step import likeliest


class Previous(RunHook):
    """MDPO: the policy that sampled the round."""

    spec: specs.PreviousPolicy

    def annotate(self, rollouts, batch, tools):
        count = min(self.spec.top, self.session.model_config.vocab_size)
        return {"teacher": likeliest(tools.program, count, tools.params, rollouts.groups)}


class Sibling(RunHook):
    """SRPO: the policy itself, once it has read a response of the group that passed."""

    spec: specs.SiblingTeacher

    def annotate(self, rollouts, batch, tools):
        session, groups = self.session, rollouts.groups
        P, K, T = groups.responses.shape
        good = batch.passed & batch.valid
        taught = ~good & batch.valid & good.any(-1, keepdims=True)  # [P, K]
        prompts = []
        for row, texts, passed in zip(tools.rows_of(batch), batch.texts, good):
            hint = self.spec.reprompt.replace("{solution}", texts[int(np.argmax(passed))])
            prompts.append(encode_hinted(session.task, session.tokenizer, row, hint))
        padded, lengths = pad_prompts(prompts, NO_LIMIT)
        count = min(self.spec.top, session.model_config.vocab_size)
        teacher = likeliest(tools.program, count, tools.params, Groups(padded, lengths, groups.responses))
        return {"teacher": teacher.replace(valid=jnp.asarray(taught))}
