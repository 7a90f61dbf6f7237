"""Tasks from a user's own files: rows used as they are, and TFDS builders on disk (array_record, without TensorFlow).

Every row is checked before work begins. A missing or empty field is an error whose message names file and line.
"""

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lpo_jax.errors import UserError, nearest
from lpo_jax.json_lines import lone_surrogate
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.data import plain
from lpo_jax.tasks.images import MARK, ImageReader, row_images
from lpo_jax.tasks.prepared import DiskRows, Unusable
from lpo_jax.tasks.records import find_files, read_data_file, unique_ids
from lpo_jax.tasks.splits import check_gold, refuse_or_warn
from lpo_jax.tasks.task import Row, Task, warn_overlap, with_prefill
from lpo_jax.tasks.templates import FIELD, fill
from lpo_jax.types import Json


def jsonl_task(
    *,
    prompt: str,
    verifier: str,
    path: str = "",
    heldout: str | None = None,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    fields: Mapping[str, str] | None = None,
    verifier_options: Mapping[str, Json] | None = None,
    prefill: str = "",
    solution: str | None = None,
    images: str = "",
    image_folder: str = "",
) -> Task:
    """Build a task from JSON lines, or from any other source of rows (`lpo_jax.tasks.records`), held in memory.

    Args:
      prompt: a template with `{field}` for a field of the row, such as `"{question}\\n"`.
      verifier: a built-in name, or `"path/to/file.py:function"`.
      path: the source of training rows; empty for a task that is used only for evaluation.
      heldout: a second source, of held-out rows. Without it, `heldout_fraction` of the prompts of `path` are held out,
        drawn by `seed`.
      heldout_fraction: fraction of the distinct prompts; rows with the same prompt stay together.
      seed: seed of that split.
      strict: whether to refuse rows whose gold answer the verifier cannot read, instead of skipping them with a
        warning.
      fields: the verifier's name of a field -> the file's name, such as `{"answer": "final_answer"}`.
      verifier_options: options of a built-in verifier.
      prefill: text that begins the model's answer. It is appended to the prompt and prepended to each response.
      solution: a template of a target response (the text after the prefill), for the supervised warm start.
      images: the name of the field with a row's images (`lpo_jax.tasks.images`), for which the prompt has as many marks
        `<image>`. Without it, rows are text.
      image_folder: the folder, or the tar file, that the paths of images are relative to. By default the folder of the
        file with the rows.

    Raises:
      UserError: if a field is missing or empty, a line is not JSON, or an image cannot be decoded; the message names
        file and line.
    """
    if not path and heldout is None:
        raise UserError("task jsonl needs the option 'path', or 'heldout' for evaluation only")
    reader = ImageReader([images], image_folder) if images else None
    form = _Form(prompt, verifier, fields, verifier_options, prefill, solution, reader)
    train: list[Row] = []
    about: dict[str, Json] = {}
    if path:
        train, about["train"] = form.rows(path, "train", strict)
    if heldout is not None:
        kept, about["heldout"] = form.rows(heldout, "heldout", strict)
    else:
        train, kept = _split(train, form.key, heldout_fraction, seed, path)
    return warn_overlap(form.task("jsonl", train, kept, about))


def tfds_task(
    *,
    path: str,
    prompt: str,
    verifier: str,
    train: str = "train",
    heldout: str = "test",
    fields: Mapping[str, str] | None = None,
    verifier_options: Mapping[str, Json] | None = None,
    prefill: str = "",
    solution: str | None = None,
    images: str = "",
) -> Task:
    """Build a task from a prepared TFDS builder (the directory with `dataset_info.json`) in array_record files.

    Args:
      path: the directory, such as `data/my_task/1.0.0`.
      train, heldout: names of splits; slices such as `"train[:90%]"` are allowed.
      prompt, verifier, fields, verifier_options, prefill, solution, images: see `jsonl_task`. Images are the encoded
        bytes of a tensor or sequence of texts, or as `lpo_jax.tasks.prepared` writes them; TFDS's own image feature
        would decode them.

    Raises:
      UserError: if the directory or a split does not exist, or a row lacks a field.
    """
    import tensorflow_datasets  # imported here, because it is slow to import

    reader = ImageReader([images]) if images else None
    form = _Form(prompt, verifier, fields, verifier_options, prefill, solution, reader)
    if not os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise UserError(
            f"{path}: not a prepared TFDS builder, because it has no dataset_info.json; give data_dir/name/version"
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

        def convert(index: int, row: Row) -> Row:
            where = f"{path}: split {name}, row {index}"
            try:
                encoded = {images: _encoded(row[images])} if images in row else {}
                return form.row(where, plain({**row, **dict.fromkeys(encoded)}) | encoded, Path(path))
            except Unusable as reason:
                raise UserError(f"{where}: its gold answer cannot be used: {reason}") from None

        rows = DiskRows(source, convert)
        if not len(rows):
            raise UserError(f"{path}: split {name!r} has no rows")
        return rows

    # The check for overlap reads every row, and so validates it.
    return warn_overlap(form.task("tfds", split(train), split(heldout), {}))


class _Form:
    """Converts rows of a file to prompts and to examples for the verifier."""

    def __init__(self, prompt, verifier, fields, verifier_options, prefill, solution, images):
        for name, value in (("fields", fields), ("verifier_options", verifier_options)):
            if not isinstance(value, Mapping | None):
                raise UserError(f"task: {name} is {value!r}, but must be a mapping")
        self._template, self._solution, self._fields = prompt, solution, dict(fields or {})
        self._images: ImageReader | None = images
        self._verifier = VerifierSpec(verifier, verifier_options or {}, prefill)
        self._verify = self._verifier.load() if self._verifier.descriptor.fields else None
        self._in_templates = set(FIELD.findall(prompt + (solution or "")))
        self._wanted = sorted({*self._in_templates, *self._verifier.descriptor.fields, *self._fields})
        if not FIELD.search(prompt) and not images:
            raise UserError(
                f"task: the prompt template {prompt!r} has no {{field}}, so every prompt would be the same"
            )

    def row(self, where: str, row: Row, beside: Path) -> dict[str, Json]:
        """Check a row of the file, read its images, and add its fields under the verifier's names.

        Args:
          where: the location of the row, for messages.
          row: the row.
          beside: the folder that paths of images are relative to by default.

        Raises:
          UserError: if the row lacks a field, or an image cannot be used.
          Unusable: if the verifier cannot read the row's gold answer.
        """
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
                    "(set the option fields if the file uses another name)"
                )
            value = named[field]
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                raise UserError(f"{where}: the field {field!r} is empty")
            if field not in self._in_templates:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{where}: the field {field!r} is {value}, not a number")
            if half := lone_surrogate(value):
                raise UserError(f"{where}: the field {field!r} holds {half}, which a tokenizer cannot encode")
        if self._verify:
            check_gold(self._verify, named)
        return self._with_images(where, named, beside) if self._images else named

    def _with_images(self, where: str, row: dict[str, Json], beside: Path) -> dict[str, Json]:
        try:
            images = self._images.read(row, beside)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        row = {name: value for name, value in row.items() if name not in self._images.names}
        marks = self.prompt(row).count(MARK)
        if marks != len(images):
            raise UserError(
                f"{where}: the prompt has {marks} marks {MARK} for {len(images)} images; their numbers must be equal"
            )
        return row | {"images": images}

    def rows(self, source: str, split: str, strict: bool) -> tuple[list[Row], dict[str, Json]]:
        """Read the rows of a source; return them with the counts of `prepared.prepare_rows`."""
        kept: list[Row] = []
        skips: list[str] = []
        for path in find_files(source, split):
            for where, row in unique_ids(read_data_file(path)):
                try:
                    kept.append(self.row(where, row, path.parent))
                except Unusable as reason:
                    skips.append(f"{where}: {reason}")
        read = len(kept) + len(skips)
        about = {"read": read, "kept": len(kept), "skipped": len(skips), "first_skipped": skips[:5]}
        refuse_or_warn(self._verifier.source, source, about, strict)
        return kept, about

    def prompt(self, row: Row) -> str:
        return with_prefill(fill(self._template, row), self._verifier.prefill)  # type: ignore[return-value]

    def key(self, row: Row) -> str:
        """Return a text that is equal for rows with the same prompt and images."""
        return "\n".join((self.prompt(row), *(image.hash for image in row_images(row))))

    def task(
        self, name: str, train: Sequence[Row], heldout: Sequence[Row], about: Mapping[str, Json]
    ) -> Task:
        solution = (lambda row: fill(self._solution, row)) if self._solution else lambda row: None
        return Task(name, train, heldout, self.prompt, self._verifier, solution, about)


def _encoded(images: Json) -> Json:
    """Return the images of a row in a TFDS builder as `ImageReader` takes them."""
    if isinstance(images, Mapping):
        pairs = zip(images.get("data", ()), images.get("source", ()))
        return [{"bytes": bytes(data), "path": source.decode()} for data, source in pairs]
    return [bytes(data) for data in images] if not isinstance(images, bytes) else images


def _split(
    rows: list[Row], key: Callable[[Row], str], fraction: float, seed: int, path: str
) -> tuple[list[Row], list[Row]]:
    """Split rows by their prompts, drawn by the seed; the order of the rows in the file has no effect."""
    prompts = sorted({key(row) for row in rows})
    if not 0 < fraction < 1 or len(prompts) < 2:
        raise UserError(
            f"{path}: cannot hold out {fraction} of {len(prompts)} different prompts; "
            "need a heldout_fraction between 0 and 1 and at least two prompts, or a held-out file"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    kept = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if key(row) not in kept], [row for row in rows if key(row) in kept]
