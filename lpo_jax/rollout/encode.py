"""Encoding of task rows as token ids."""

from collections.abc import Collection, Mapping

from lpo_jax.errors import UserError
from lpo_jax.sampling.text import encode, response_text
from lpo_jax.tasks.images import row_images
from lpo_jax.tasks.task import Task
from lpo_jax.types import Json, Tokenizer


def encode_prompt(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json]) -> list[int]:
    """Return the token ids of a row's prompt, including the task's prefill.

    Raises:
      UserError: the row has images, which a text model cannot take.
    """
    if row_images(row):
        raise UserError("the row has images, but the model reads only text; use a vision-language model")
    return encode(tokenizer, task.prompt(row))


def encode_hinted(task: Task, tokenizer: Tokenizer, row: Mapping[str, Json], hint: str) -> list[int]:
    """Return the token ids of a row's prompt with a hint at the end of the question, before the prefill."""
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
