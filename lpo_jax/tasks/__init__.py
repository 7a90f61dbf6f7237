"""Tasks: rows with checkable answers, how they are asked, and how answers are judged.

Importing this imports neither jax nor grain nor tensorflow_datasets.
"""

from lpo_jax.tasks.data import PromptIterator, content_hash
from lpo_jax.tasks.registry import get, names
from lpo_jax.tasks.task import Prompt, Row, Task

__all__ = ["Prompt", "PromptIterator", "Row", "Task", "content_hash", "get", "names"]
