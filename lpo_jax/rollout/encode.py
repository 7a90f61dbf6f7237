"""Encoding of task rows as token ids.

An image takes as many tokens as the model's tower makes of it, which follows from its size. Between the tokens that
the model expects around an image, the prompt holds its placeholder once for each of them.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.images import Grid, Patches
from lpo_jax.models.prompt_images import expand
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.sampling.text import encode, response_text
from lpo_jax.tasks.images import MARK, EncodedImage, row_images
from lpo_jax.tasks.task import Prompt, Task
from lpo_jax.types import Json, Tokenizer


def encode_prompt(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json]) -> list[int]:
    """Return the token ids of a row's prompt, including the task's prefill.

    Raises:
      UserError: the row has images and the model reads only text, or the prompt has more or fewer placeholders than the
        row has images.
    """
    return _encode(tokenizer, task.prompt(row), row_images(row))


def encode_hinted(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json], hint: str) -> list[int]:
    """Return the token ids of a row's prompt with a hint at the end of the question, before the prefill."""
    prompt = task.prompt(row)
    if isinstance(prompt, str):
        hinted = f"{prompt.removesuffix(task.prefill).rstrip()}\n{hint}\n{task.prefill}"
        return _encode(tokenizer, hinted, row_images(row))
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    content, more = prompt[last]["content"], f"\n{hint}"
    content = content + more if isinstance(content, str) else [*content, {"type": "text", "text": more}]
    asked = {"role": "user", "content": content}
    return _encode(tokenizer, [*prompt[:last], asked, *prompt[last + 1 :]], row_images(row))


def count_image_tokens(tokenizer: Tokenizer, image: EncodedImage) -> int:
    """Return the number of tokens of an image in a prompt of a vision model."""
    return tokenizer.vision.processor.num_tokens(_grid(tokenizer.vision, image))


def prompt_patches(tokenizer: Tokenizer, images: Sequence[EncodedImage]) -> list[Patches]:
    """Return the images of a prompt as the vision tower of the tokenizer's model reads them."""
    cut = tokenizer.vision.processor.patches
    return [cut(image.pixels(), f"image {image.source}") for image in images]


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a prompt, in which each image is shown by one placeholder."""
    if vision := _vision(tokenizer):
        repeated = [a == b == vision.image_token for a, b in itertools.pairwise(ids)]
        ids = [token for token, again in zip(ids, [*repeated, False]) if not again]
    return tokenizer.decode(ids)


def _encode(tokenizer: Tokenizer, prompt: Prompt, images: Sequence[EncodedImage]) -> list[int]:
    vision = _vision(tokenizer)
    if vision is None:
        if images:
            raise UserError("the prompt has images, but the model reads text only; take a vision model")
        return encode(tokenizer, prompt)
    if isinstance(prompt, str) and images:
        around = vision.start_token, vision.image_token, vision.end_token
        prompt = prompt.replace(MARK, "".join(tokenizer.convert_ids_to_tokens(list(around))))
    return expand(vision, encode(tokenizer, prompt), [_grid(vision, image) for image in images])


def _vision(tokenizer: Tokenizer) -> VisionConfig | None:
    return getattr(tokenizer, "vision", None)  # a tokenizer of transformers has none


def _grid(vision: VisionConfig, image: EncodedImage) -> Grid:
    return vision.processor.grid(*image.size, f"image {image.source}")


def encode_solution(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json]) -> list[int]:
    """Return the token ids of a row's solution and the end token, as a supervised response.

    The solution is encoded separately from the prompt, because a sampled response begins at a token boundary too.

    Raises:
      UserError: the model has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the model has no end token, which a solution must be taught with; set eos_token in its "
            "tokenizer_config.json or eos_token_id in its generation_config.json"
        )
    return [*tokenizer.encode(task.solution(row), add_special_tokens=False), tokenizer.eos_token_id]


def solution_text(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json], eos_ids: Collection[int]) -> str:
    """Return the text that the verifier would receive for a response with the tokens of the row's solution."""
    return response_text(tokenizer, tokenizer.encode(task.solution(row), add_special_tokens=False), eos_ids)
