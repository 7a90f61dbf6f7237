"""Task rows to token ids."""

from collections.abc import Mapping
from typing import Any

from lpo_jax.tasks.task import Task


def encode_prompt(task: Task, tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """The ids a response continues.

    A raw prompt gets the special tokens the tokenizer puts before any text; a chat is rendered by the
    tokenizer's own template, which brings its own, so that no prompt has two beginnings.
    """
    prompt = task.prompt(row)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    continued = prompt[-1]["role"] == "assistant"  # the prefill is there already
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
    )
    return tokenizer.encode(text, add_special_tokens=False)


def encode_solution(task: Task, tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """The ids of the row's solution and the end token: what a supervised response must be.

    Encoded apart from the prompt: a sampled response begins at a token boundary too.
    """
    return [*tokenizer.encode(task.solution(row), add_special_tokens=False), tokenizer.eos_token_id]
