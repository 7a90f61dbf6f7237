"""The task record: rows, their prompts, and the verifier that judges the responses."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.data import content_hash
from lpo_jax.tasks.images import MARK, row_images
from lpo_jax.types import Json

Row = Mapping[str, Json]
Prompt = (
    str | list[dict[str, Json]]
)  # the content of a message is a text, or a list of parts with images among them


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with checkable answers.

    Attributes:
      name: as in `tasks.names()`.
      train, heldout: rows by index, which are dicts of JSON values and, in the field `images`, of encoded images; no
        row is in both.
      prompt: maps a row to the prompt, including the prefill. Text is used unchanged; in the prompt of a row with
        images, each mark `<image>` stands for one of them. A list of chat messages is rendered with the model's chat
        template; if the last message is the assistant's, the model continues that message. The content of a message
        is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`.
      verifier: the verifier as plain data. It prepends the prefill to each response.
      solution: maps a row to a response that the verifier passes, for the supervised warm start; None if none is known.
      about: for tasks from files, the counts of `prepared.prepare_rows` by split.
      score: what is maximised: "pass", "reward", or the name of a numeric part of the verdicts.
    """

    name: str
    train: Sequence[Row]
    heldout: Sequence[Row]
    prompt: Callable[[Row], Prompt]
    verifier: VerifierSpec
    solution: Callable[[Row], str | None] = lambda row: None
    about: Mapping[str, Mapping[str, Json]] = dataclasses.field(default_factory=dict)
    score: str = "pass"

    @property
    def prefill(self) -> str:
        """The text with which the prompt begins the model's answer, such as `<answer>`; often empty."""
        return self.verifier.prefill

    def gold(self, row: Row) -> str | None:
        """Return the reference answer to show beside the responses: the row's `answer`, its solution or its target."""
        for value in (row.get("answer"), self.solution(row), row.get("target")):
            if value is not None:
                return str(value)
        return None

    @functools.cached_property
    def content_hash(self) -> str:
        """The SHA-256 of all rows, which a resume compares in order to refuse changed data."""
        return content_hash(self.train, self.heldout)


def with_prefill(prompt: Prompt, prefill: str) -> Prompt:
    """Append the prefill, which begins the model's answer, to a prompt."""
    if not prefill:
        return prompt
    if isinstance(prompt, str):
        return prompt + prefill
    return [*prompt, {"role": "assistant", "content": prefill}]


def as_chat(task: Task, system: str = "") -> Task:
    """Return the task with prompts that are rendered with the model's chat template.

    A text prompt becomes the user's message, and its prefill the beginning of the assistant's message. Prompts that are
    already messages get only the system message. The marks `<image>` of a row with images become parts of the message.
    """

    def messages(row: Row) -> list[dict[str, Json]]:
        prompt = task.prompt(row)
        if isinstance(prompt, str):
            user = {"role": "user", "content": prompt.removesuffix(task.prefill).strip()}
            prompt = with_prefill([user], task.prefill)
        asked: list[dict[str, Json]] = list(prompt)  # type: ignore[arg-type]
        if row_images(row):
            asked = [{**message, "content": message_parts(message["content"])} for message in asked]
        return [{"role": "system", "content": system}, *asked] if system else asked

    return dataclasses.replace(task, prompt=messages)


def message_parts(content: Json) -> Json:
    """Split the text of a message at the marks of its images; return a text without marks, and parts, unchanged."""
    if not isinstance(content, str) or MARK not in content:
        return content
    first, *rest = ([{"type": "text", "text": text}] if text else [] for text in content.split(MARK))
    return [*first, *(part for texts in rest for part in ({"type": "image"}, *texts))]


def prompt_hash(task: Task, row: Row) -> int:
    """Return a hash of a row's prompt and images, which is the same within one process."""
    return hash((str(task.prompt(row)), *(image.hash for image in row_images(row))))


def warn_overlap(task: Task) -> Task:
    """Warn if held-out prompts are also trained on; return the task."""
    trained = {prompt_hash(task, row) for row in task.train}  # hashes, to save memory
    shared = sum(prompt_hash(task, row) in trained for row in task.heldout)
    if shared:
        warnings.warn(
            f"task {task.name}: {shared} of {len(task.heldout)} held-out prompts are also trained on, "
            "so held-out scores are not those of unseen problems",
            stacklevel=2,
        )
    return task
