"""Tasks: rows with checkable answers, the prompts made from them, and the verifiers that judge the responses.

`registry.py` looks tasks up by name; `benchmarks.py` lists the evaluation suites. Importing this package imports
neither JAX nor grain nor tensorflow_datasets.
"""

from lpo_jax.tasks.data import PromptIterator, content_hash
from lpo_jax.tasks.registry import get, names
from lpo_jax.tasks.task import Prompt, Row, Task

__all__ = ["Prompt", "PromptIterator", "Row", "Task", "content_hash", "get", "names"]
