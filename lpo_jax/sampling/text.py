"""Text to token ids and back: prompts, responses, and the identities of prompts."""

import collections
import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from lpo_jax.models.prompt_images import Images
from lpo_jax.models.text import Message, ModelTokenizer

Prompt = str | Sequence[Message]  # a text, or chat messages


def encode(tokenizer: ModelTokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids that a response continues.

    A text gets the special tokens that the tokenizer puts before any text. Chat messages are rendered by the
    tokenizer's template, which adds its own, so that no prompt begins twice. If the last message is the assistant's,
    the response continues it.

    Raises:
      UserError: there is no chat template, the template rejects the messages, or a token has no row in the embedding.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.render(prompt), add_special_tokens=False)


def response_text(tokenizer: ModelTokenizer, ids: Sequence[int], eos_ids: Collection[int]) -> str:
    """Return the text of a response, as verifiers judge it and as it is shown and recorded.

    End tokens and padding at its end are left out. All other special tokens stay, because tags that a verifier looks
    for, such as `<answer>` or `<think>`, can be special tokens of a tokenizer.

    Args:
      tokenizer: of the model.
      ids: sampled token ids, with or without the end token, or an encoded solution.
      eos_ids: every token id that ends a response of the model.
    """
    ends = {*eos_ids, getattr(tokenizer, "pad_token_id", None)}
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return tokenizer.decode(ids[:length], skip_special_tokens=False)


def prompt_ids(ids: Sequence[Sequence[int]], images: Sequence[Images] = ()) -> np.ndarray:
    """Return an identity `[P]` uint32 for the random numbers of each prompt.

    It is a hash of the prompt's tokens and images, and of the number of equal prompts before it. A prompt's responses
    are then the same alone and among others, and a repeated prompt gets different ones.
    """
    seen: collections.Counter[tuple[object, ...]] = collections.Counter()
    identities = []
    for tokens, shown in zip(ids, images or [()] * len(ids)):
        row: tuple[int | str, ...] = (*tokens, *(image.digest for image in shown))
        digest = hashlib.sha256(f"{seen[row]} {row}".encode()).digest()
        identities.append(int.from_bytes(digest[:4], "little"))
        seen[row] += 1
    return np.array(identities, np.uint32)
