"""The task python: a user's own task, defined by functions in one Python file.

    def dataset(split):             # "train" or "heldout" -> list of dicts
        return [{"prompt": "2 + 2 = ", "answer": 4}]

    def verify(response, example):  # -> float (or lpo_jax.rewards.Verdict)
        return float(response.strip() == str(example["answer"]))

Optional functions: `prompt(example)` returns text or chat messages (by default the row's field `prompt` is used), and
`solution(example)` returns a target response for the supervised warm start. `score = "reward"`, or the name of a
numeric part of the verdicts, makes that the held-out score (`evaluation.score`) instead of the pass rate. A row may
have images in a field `images`: paths relative to the file, or encoded bytes (`lpo_jax.tasks.images`). The file is
imported by the trainer and by every worker process, so load large data inside `dataset`, not at the top of the file.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.json_lines import MAX_DEPTH, deeper_than, lone_surrogate, too_deep
from lpo_jax.rewards import VerifierSpec
from lpo_jax.rewards.user_code import error_line, find_function, load_module
from lpo_jax.tasks.data import plain
from lpo_jax.tasks.images import ImageReader
from lpo_jax.tasks.task import Prompt, Row, Task, warn_overlap, with_prefill
from lpo_jax.types import Json

_IMAGES = ImageReader(["images"])


def python_task(*, file: str, prefill: str = "") -> Task:
    """Build a task from a user's Python file.

    Args:
      file: the path of the Python file.
      prefill: text that begins the model's answer. It is appended to the prompt and prepended to each response.

    Raises:
      UserError: if the file, a function, a row or a prompt is missing or invalid; the message names the location.
    """
    file = os.path.abspath(os.path.expanduser(file))
    module = load_module(file)
    dataset = find_function(module, "dataset", file)
    find_function(module, "verify", file)
    ask = getattr(module, "prompt", None) or (lambda row: row.get("prompt"))
    solution = getattr(module, "solution", None) or (lambda row: None)

    def prompt(row: Row) -> Prompt:
        return with_prefill(ask(row), prefill)

    def split(name: str) -> list[dict[str, Json]]:
        rows = _call(file, f"dataset({name!r})", dataset, name)
        if not isinstance(rows, list | tuple) or not rows:
            raise UserError(f"{file}: dataset({name!r}) did not return a list of rows")
        return [
            _check(f"{file}: dataset({name!r}), row {index}", file, row, ask)
            for index, row in enumerate(rows)
        ]

    verifier = VerifierSpec(f"{file}:verify", prefill=prefill)
    score = getattr(module, "score", "pass")
    if not isinstance(score, str):
        raise UserError(
            f"{file}: score = {score!r}: expected pass, reward, or the name of a part of the verdicts"
        )
    rows = split("train"), split("heldout")
    return warn_overlap(Task("python", *rows, prompt, verifier, solution, score=score))


def _check(where: str, file: str, row: Json, ask: Callable[[Row], Prompt]) -> dict[str, Json]:
    if not isinstance(row, Mapping) or not row:
        raise UserError(f"{where}: a row must be a dict with at least one field, not {str(row)[:60]!r}")
    if deeper_than(row, MAX_DEPTH):
        raise UserError(f"{where}: {too_deep()}")
    images = []
    if "images" in row:
        try:
            images = _IMAGES.read(row, Path(file).parent)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    row = plain({name: value for name, value in row.items() if name != "images"})
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: rows may hold only JSON values: {error}") from None
    if half := lone_surrogate(row):
        raise UserError(f"{where}: the row holds {half}, which a tokenizer cannot encode")
    if images:
        row["images"] = images
    text = _call(file, f"prompt of {where.rpartition(': ')[2]}", ask, row)
    if isinstance(text, str):
        good = bool(text.strip())
    else:
        good = (
            isinstance(text, list)
            and bool(text)
            and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in text)
        )
    if not good:
        raise UserError(
            f"{where}: no prompt; add a field 'prompt' to the row or a function prompt(example) to the file, "
            "with text or a list of {role, content} messages"
        )
    return row


def _call(file: str, what: str, function: Callable[..., object], *arguments: Json) -> Json:
    """Call a user's function; convert the exceptions that it raises to `UserError`."""
    try:
        return function(*arguments)
    except Exception as error:
        raise UserError(f"{file}: {what} raised {error_line(error, file)}") from error
