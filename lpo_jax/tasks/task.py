"""What a task is: rows, how a row is asked, and how an answer is judged."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.data import content_hash

Row = Mapping[str, Any]
Prompt = str | list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with checkable answers.

    Attributes:
      name: as in `tasks.names()`.
      train, heldout: rows by index, plain dicts of JSON values; no row is in both.
      prompt: row -> everything that the model continues. A text is used as it is; a list of chat messages
        goes through the model's chat template, and where its last message is the assistant's, that one is
        continued. Either way the prefill is already in it.
      verifier: how to make the verifier, in plain data; it puts the prefill back before each response.
      solution: row -> a response that the verifier passes, for supervised warm start; None where none is
        known.
      about: of tasks from files, by split: what became of the files' rows (see `prepared.prepare_rows`).
    """

    name: str
    train: Sequence[Row]
    heldout: Sequence[Row]
    prompt: Callable[[Row], Prompt]
    verifier: VerifierSpec
    solution: Callable[[Row], str | None] = lambda row: None
    about: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def prefill(self) -> str:
        """The text with which the prompt begins the model's answer, such as `<answer>`; often empty."""
        return self.verifier.prefill

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over all rows: a resume compares it to refuse changed data."""
        return content_hash(self.train, self.heldout)


def with_prefill(prompt: Prompt, prefill: str) -> Prompt:
    """The prompt with the beginning of the model's answer at its end."""
    if not prefill:
        return prompt
    if isinstance(prompt, str):
        return prompt + prefill
    return [*prompt, {"role": "assistant", "content": prefill}]


def as_chat(task: Task, system: str = "") -> Task:
    """The same task asked through the model's chat template.

    A raw prompt becomes the user's message and its prefill the beginning of the assistant's. Prompts that are
    messages already only get the system message.
    """

    def messages(row: Row) -> list[dict[str, str]]:
        prompt = task.prompt(row)
        if isinstance(prompt, str):
            user = {"role": "user", "content": prompt.removesuffix(task.prefill).strip()}
            prompt = with_prefill([user], task.prefill)
        return [{"role": "system", "content": system}, *prompt] if system else prompt

    return dataclasses.replace(task, prompt=messages)


def warn_overlap(task: Task) -> Task:
    """Warns when held-out prompts are also trained on; returns the task."""
    trained = {hash(str(task.prompt(row))) for row in task.train}  # hashes, for training rows may be many
    shared = sum(hash(str(task.prompt(row))) in trained for row in task.heldout)
    if shared:
        warnings.warn(
            f"task {task.name}: {shared} of {len(task.heldout)} held-out prompts are trained on too, "
            "so held-out scores are not those of unseen problems",
            stacklevel=2,
        )
    return task
