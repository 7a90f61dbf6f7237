"""Look up tasks by name."""

from collections.abc import Callable

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards.registry import check_options
from lpo_jax.tasks.arithmetic import arithmetic_task
from lpo_jax.tasks.code import code_task
from lpo_jax.tasks.countdown import countdown_task
from lpo_jax.tasks.files import jsonl_task, tfds_task
from lpo_jax.tasks.geometry import geometry3k_task
from lpo_jax.tasks.gym import reasoning_gym_task
from lpo_jax.tasks.mathematics import gsm8k_task, math_task
from lpo_jax.tasks.python_file import python_task
from lpo_jax.tasks.shapes import shapes_task
from lpo_jax.tasks.task import Task, as_chat
from lpo_jax.types import Json

_BUILDERS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic_task,
    "code": code_task,
    "countdown": countdown_task,
    "geometry3k": geometry3k_task,
    "gsm8k": gsm8k_task,
    "jsonl": jsonl_task,
    "math": math_task,
    "python": python_task,
    "reasoning-gym": reasoning_gym_task,
    "shapes": shapes_task,
    "tfds": tfds_task,
}


def names() -> list[str]:
    """Return the names of the tasks, sorted."""
    return sorted(_BUILDERS)


def get(name: str, *, chat: bool = False, system: str = "", **options: Json) -> Task:
    """Build a task and check all its rows.

    Args:
      name: one of `names()`.
      chat: whether prompts are rendered with the model's chat template, instead of used as raw text.
      system: the system message, if `chat` is true.
      **options: the options of the task; see `arithmetic_task`, `math_task` and so on.

    Raises:
      UserError: if the name or an option is unknown or invalid, or the data is missing or invalid.
    """
    if name not in _BUILDERS:
        raise UserError(
            f"unknown task {name!r}{nearest(name, _BUILDERS)}; the tasks are {', '.join(names())}"
        )
    if system and not chat:
        raise UserError("task: a system message needs chat: true")
    check_options(f"task {name}", _BUILDERS[name], options)
    task = _BUILDERS[name](**options)
    return as_chat(task, system) if chat else task
