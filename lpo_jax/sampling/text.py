"""From prompts to texts with a loaded model: what `Model.generate` and `lpo sample` do."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.sampling.distribution import Sampling
from lpo_jax.sampling.padding import pad_prompts
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.sampler import Responses, Sampler

Prompt = str | Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Generated(Responses):
    """`Responses` and their texts `[P][K]`; see `response_text`."""

    texts: list[list[str]]


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    num_responses: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 128,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    template_arguments: Mapping[str, Any] | None = None,
) -> Generated:
    """Samples responses; see `lpo_jax.sampling.model.Model.generate`."""
    if isinstance(prompts, str) or not prompts:
        raise UserError("generate: prompts must be a list of at least one text or list of chat messages")
    if num_responses < 1 or max_tokens < 1:
        raise UserError(
            f"generate: num_responses {num_responses} and max_tokens {max_tokens} must be at least 1"
        )
    tokenizer, limit = model.tokenizer, model.config.max_positions - max_tokens
    if tokenizer is None:
        raise UserError("generate: the model has no tokenizer")
    if template_arguments is not None:
        tokenizer = tokenizer.with_arguments(template_arguments)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    for index, row in enumerate(ids):
        if not 1 <= len(row) <= limit:
            raise UserError(
                f"generate: prompt {index} has {len(row)} tokens; need 1 to {limit} (the model's "
                f"{model.config.max_positions} positions less max_tokens)"
            )
    sampler = Sampler(model.config, model.eos_ids, jnp.float32, decode=tokenizer.decode)
    responses = sampler(
        sampler.prepare(model.params),
        PromptBatch(*pad_prompts(ids, limit), prompt_ids(ids)),
        SampleRequest(
            num_responses, max_tokens, Sampling(temperature, top_k, top_p, min_p), tuple(stop), seed
        ),
    )
    texts = [
        [response_text(tokenizer, responses.ids(p, k), model.eos_ids) for k in range(num_responses)]
        for p in range(len(ids))
    ]
    return Generated(**vars(responses), texts=texts)


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The ids a response continues.

    A text gets the special tokens the tokenizer puts before any text; chat messages are rendered by the
    tokenizer's own template, which brings its own, so that no prompt has two beginnings. Where the last message
    is the assistant's, that one is continued.

    Args:
      tokenizer: `lpo_jax.models.text.ModelTokenizer`.

    Raises:
      UserError: no chat template, one that does not take the messages, or a token without a row in the embedding.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.render(prompt), add_special_tokens=False)


def response_text(tokenizer: Any, ids: Sequence[int], eos_ids: Collection[int]) -> str:
    """The text of a response, as verifiers judge it and as it is shown and recorded.

    End tokens and padding at its end are left out. All other special tokens stay, because a tokenizer may have the
    tags that a verifier looks for, such as `<answer>` or `<think>`, among them.

    Args:
      tokenizer: of the model.
      ids: what was sampled, with or without its end token; or an encoded solution.
      eos_ids: every id that ends a response of the model.
    """
    ends = {*eos_ids, getattr(tokenizer, "pad_token_id", None)}
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return tokenizer.decode(ids[:length], skip_special_tokens=False)


def prompt_ids(ids: Sequence[Sequence[int]]) -> np.ndarray:
    """An identity `[P]` uint32 for each prompt's random numbers: of its tokens, and of how often they came before.

    So a prompt draws the same alone or among others, and twice the same prompt draws twice.
    """
    seen = collections.Counter()
    identities = []
    for row in map(tuple, ids):
        digest = hashlib.sha256(f"{seen[row]} {row}".encode()).digest()
        identities.append(int.from_bytes(digest[:4], "little"))
        seen[row] += 1
    return np.array(identities, np.uint32)
