"""Tasks from files: JSON lines, and TFDS builders on disk (array_record, read without TensorFlow).

Every row is checked before work begins: a missing or empty field is an error that names file and line.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.data import plain
from lpo_jax.tasks.task import Row, Task, warn_overlap, with_prefill

# {field} and nothing else: \boxed{} and other braces of a template stay what they are.
_FIELD = re.compile(r"\{(\w+)\}")


def jsonl(
    *,
    path: str,
    prompt: str,
    verifier: str,
    heldout: str | None = None,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
    verifier_options: Mapping[str, Any] | None = None,
    prefill: str = "",
    solution: str | None = None,
) -> Task:
    """A task from a file with one JSON object a line.

    Args:
      path: the training rows.
      prompt: template with `{field}` for a row's field, such as `"{question}\\n"`.
      verifier: a built-in name, or `"path/to/file.py:function"`.
      heldout: a second file. Without it, `heldout_fraction` of the prompts of `path` are held out, drawn by
        `seed`.
      heldout_fraction: share of distinct prompts (rows with the same prompt stay together).
      seed: of that split.
      fields: what the verifier calls a field -> what the file calls it, such as `{"answer": "final_answer"}`.
      verifier_options: options of a built-in verifier.
      prefill: text that begins the model's answer; it is put at the prompt's end and before each response.
      solution: template of a target response (what follows the prefill), for supervised warm start.

    Raises:
      UserError: naming file and line, for what is missing, empty or not JSON.
    """
    form = _Form(prompt, verifier, fields, verifier_options, prefill, solution)
    rows = [form.row(where, row) for where, row in _json_lines(path)]
    if heldout is not None:
        train, kept = rows, [form.row(where, row) for where, row in _json_lines(heldout)]
    else:
        train, kept = _split(rows, form.prompt, heldout_fraction, seed, path)
    return warn_overlap(form.task("jsonl", train, kept))


def tfds(
    *,
    path: str,
    prompt: str,
    verifier: str,
    train: str = "train",
    heldout: str = "test",
    fields: Mapping[str, str] | None = None,
    verifier_options: Mapping[str, Any] | None = None,
    prefill: str = "",
    solution: str | None = None,
) -> Task:
    """A task from a prepared TFDS builder (the directory with `dataset_info.json`) in array_record files.

    Args:
      path: the directory, such as `data/my_task/1.0.0`.
      train, heldout: names of splits; slices such as `"train[:90%]"` work.
      prompt, verifier, fields, verifier_options, prefill, solution: as for `jsonl`.

    Raises:
      UserError: if the directory or a split is not there, or a row lacks a field.
    """
    import tensorflow_datasets  # here, for it is slow to import

    form = _Form(prompt, verifier, fields, verifier_options, prefill, solution)
    if not os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise UserError(
            f"{path}: no prepared TFDS builder, for it holds no dataset_info.json; give data_dir/name/version"
        )
    builder = tensorflow_datasets.builder_from_directory(path)

    def split(name: str) -> Sequence[Row]:
        try:
            source = builder.as_data_source(name)
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: split {name!r}: {reason}; it has {', '.join(builder.info.splits)}"
            ) from None
        rows = _Records(source, lambda index, row: form.row(f"{path}: split {name}, row {index}", row))
        if not len(rows):
            raise UserError(f"{path}: split {name!r} has no rows")
        return rows

    # This reads, and so checks, every row.
    return warn_overlap(form.task("tfds", split(train), split(heldout)))


class _Records(Sequence):
    """Rows read from disk when they are asked for."""

    def __init__(self, source: Sequence[Row], convert: Callable[[int, Row], Row]):
        self._source, self._convert = source, convert

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._convert(index, plain(self._source[index]))


class _Form:
    """How rows of a file become prompts and examples."""

    def __init__(self, prompt, verifier, fields, verifier_options, prefill, solution):
        for name, value in (("fields", fields), ("verifier_options", verifier_options)):
            if not isinstance(value, Mapping | None):
                raise UserError(f"task: {name} is {value!r}, but has to be a mapping")
        self._template, self._solution, self._fields = prompt, solution, dict(fields or {})
        self._verifier = VerifierSpec(verifier, verifier_options or {}, prefill)
        # A built-in verifier is shown every row: a gold answer it cannot read would mask all its samples.
        self._judge = self._verifier.load() if self._verifier.fields else lambda response, row: None
        in_templates = _FIELD.findall(prompt + (solution or ""))
        self._wanted = sorted({*in_templates, *self._verifier.fields, *self._fields})
        if not _FIELD.search(prompt):
            raise UserError(
                f"task: the prompt template {prompt!r} has no {{field}}, so every prompt would be the same"
            )

    def row(self, where: str, row: Row) -> dict[str, Any]:
        """A row of the file with the verifier's names added, once it has all it needs."""
        if not row:
            raise UserError(f"{where}: the row is empty")
        named = dict(row)
        for ours, theirs in self._fields.items():
            if theirs not in row:
                raise UserError(
                    f"{where}: no field {theirs!r}{nearest(theirs, row)}; it has {', '.join(row)}"
                )
            named[ours] = row[theirs]
        for field in self._wanted:
            if field not in named:
                raise UserError(
                    f"{where}: no field {field!r}{nearest(field, row)}; it has {', '.join(row)} "
                    "(the option fields gives the file's name for one)"
                )
            value = named[field]
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                raise UserError(f"{where}: the field {field!r} is empty")
        try:
            self._judge("", named)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: the verifier {self._verifier.source} cannot read it: {error}"
            ) from None
        return named

    def prompt(self, row: Row) -> str:
        return with_prefill(_fill(self._template, row), self._verifier.prefill)

    def task(self, name: str, train: Sequence[Row], heldout: Sequence[Row]) -> Task:
        solution = (lambda row: _fill(self._solution, row)) if self._solution else lambda row: None
        return Task(name, train, heldout, self.prompt, self._verifier, solution)


def _fill(template: str, row: Row) -> str:
    return _FIELD.sub(lambda match: str(row[match[1]]), template)


def _json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:line", row)` for every line of a file."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    raise UserError(f"{path}:{number}: the line is empty")
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: a row is a JSON object with named fields, not {line.strip()[:60]}"
                    )
                yield f"{path}:{number}", row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text after line {number}: {error.reason}") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


def _split(
    rows: list[Row], prompt: Callable[[Row], str], fraction: float, seed: int, path: str
) -> tuple[list[Row], list[Row]]:
    """Parts the prompts by seed; rows of one prompt go the same way, whatever the order in the file."""
    prompts = sorted({prompt(row) for row in rows})
    if not 0 < fraction < 1 or len(prompts) < 2:
        raise UserError(
            f"{path}: cannot hold out {fraction} of {len(prompts)} different prompts; "
            "need a heldout_fraction between 0 and 1 and two prompts, or a held-out file"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    kept = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if prompt(row) not in kept], [row for row in rows if prompt(row) in kept]
