"""Encoding of task rows as token ids.

An image takes as many tokens as the model's tower makes of it, which follows from its size. Between the tokens that
the model expects around an image, the prompt holds its placeholder once for each of them.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.images import Grid
from lpo_jax.models.prompt_images import Images, expand
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.sampling.text import encode, response_text
from lpo_jax.tasks.images import MARK, EncodedImage, row_images
from lpo_jax.tasks.task import Task
from lpo_jax.types import Json, Tokenizer


def encode_prompt(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json]) -> list[int]:
    """Return the token ids of a row's prompt, including the task's prefill and a placeholder for each image token.

    Raises:
      UserError: the row has images that a text model cannot take, or not as many as its prompt has placeholders.
    """
    vision, images = getattr(tokenizer, "vision", None), row_images(row)
    if images and vision is None:
        raise UserError("the prompt has images, but the model reads text only; take a vision model")
    prompt = task.prompt(row)
    if isinstance(prompt, str) and images:
        prompt = with_placeholders(tokenizer, prompt)
    return expand(vision, encode(tokenizer, prompt), [_grid(vision, image) for image in images])


def with_placeholders(tokenizer: Tokenizer, text: str) -> str:
    """Return a text with the tokens that a vision model has around an image, and a placeholder, at each mark."""
    vision = tokenizer.vision
    around = [vision.start_token, vision.image_token, vision.end_token]
    return text.replace(MARK, "".join(tokenizer.convert_ids_to_tokens(around)))


def encode_images(tokenizer: Tokenizer, row: Mapping[str, Json]) -> Images:
    """Cut the images of a row into patches.

    Raises:
      UserError: an image cannot be decoded.
    """
    return tuple(
        tokenizer.vision.processor.patches(image.pixels(), f"image {image.source}")
        for image in row_images(row)
    )


def count_image_tokens(tokenizer: Tokenizer, image: EncodedImage) -> int:
    """Return the number of tokens of an image in a prompt of a vision model."""
    return tokenizer.vision.processor.num_tokens(_grid(tokenizer.vision, image))


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a prompt, in which each image is shown by one placeholder."""
    if vision := getattr(tokenizer, "vision", None):
        repeated = [a == b == vision.image_token for a, b in itertools.pairwise(ids)]
        ids = [token for token, again in zip(ids, [*repeated, False]) if not again]
    return tokenizer.decode(ids)


def encode_hinted(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json], hint: str) -> list[int]:
    """Return the token ids of a row's prompt with a hint at the end of the question, before the prefill.

    Raises:
      UserError: the row has images.
    """
    if row_images(row):
        raise UserError("hints are not supported for rows with images; take a method without hints")
    prompt = task.prompt(row)
    if isinstance(prompt, str):
        return encode(tokenizer, f"{prompt.removesuffix(task.prefill).rstrip()}\n{hint}\n{task.prefill}")
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    asked = {"role": "user", "content": f"{prompt[last]['content']}\n{hint}"}
    return encode(tokenizer, [*prompt[:last], asked, *prompt[last + 1 :]])


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


def _grid(vision: VisionConfig, image: EncodedImage) -> Grid:
    return vision.processor.grid(*image.size, f"image {image.source}")
