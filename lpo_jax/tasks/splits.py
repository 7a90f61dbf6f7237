"""Shared by the tasks from files: the split into training and held-out rows, and access to fields."""

import dataclasses
import math
import random
import warnings
from collections.abc import Mapping, Sequence

from lpo_jax.errors import UserError, nearest
from lpo_jax.json_lines import lone_surrogate
from lpo_jax.rewards import Verifier
from lpo_jax.tasks.prepared import Recipe, Unusable, prepare_rows
from lpo_jax.tasks.task import Row
from lpo_jax.types import Json

MOST_HELD_OUT = 512  # largest default number of held-out rows


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training rows, held-out rows and, by split, the counts of `prepare_rows`."""

    train: Sequence[Row]
    heldout: Sequence[Row]
    about: Mapping[str, Mapping[str, Json]]


def splits(
    recipe: Recipe,
    path: str,
    heldout: str,
    train_size: int,
    heldout_size: int,
    seed: int,
    strict: bool = True,
) -> Splits:
    """Read the rows of files and draw the splits by a seed; no problem occurs twice, within a split or across.

    Args:
      recipe: how to convert the rows.
      path: the source of training rows (`records.find_files`); empty for a task that is used only for evaluation.
      heldout: the source of held-out rows. All its problems are excluded from training, whether they are drawn or not.
        If empty, rows are held out of `path`; the choice does not depend on `train_size`.
      train_size: number of training rows to draw; 0 uses all.
      heldout_size: number of held-out rows to draw; 0 uses all of `heldout` or, if that is empty, a tenth of `path`,
        but at most `MOST_HELD_OUT`.
      seed: seed of the draws.
      strict: whether to refuse rows whose gold answer cannot be used, instead of skipping them with a warning.

    Raises:
      UserError: if no source is given, a source has fewer rows than requested, or `prepare_rows` raises it.
    """
    if not path and not heldout:
        raise UserError(f"task {recipe.name} needs the option 'path', or 'heldout' for evaluation only")
    if min(train_size, heldout_size) < 0:
        raise UserError(
            f"task {recipe.name}: train_size {train_size}, heldout_size {heldout_size}: must be 0 or more"
        )
    about: dict[str, Json] = {}

    def load(source: str, split: str, leave_out=()):
        rows, about[split] = prepare_rows(recipe, source, split, leave_out)
        refuse_or_warn(recipe.name, source, about[split], strict)
        return rows

    def draw(split: str, rows: Sequence[int], size: int, source: str) -> list[int]:
        if size > len(rows):
            raise UserError(
                f"{source}: {split}_size {size} is more than its {len(rows)} different problems; ask for fewer"
            )
        return random.Random(f"{recipe.name}/{seed}/{split}").sample(rows, size) if size else list(rows)

    kept: Sequence[Row] = ()
    if heldout:
        whole = load(heldout, "heldout")
        kept = whole.select(draw("heldout", range(len(whole)), heldout_size, heldout))
        if not path:
            return Splits((), kept, about)
    rows = load(path, "train", {recipe.key(row) for row in whole} if heldout else ())
    left: Sequence[int] = range(len(rows))
    if not heldout:
        size = heldout_size or max(1, min(MOST_HELD_OUT, len(rows) // 10))
        held = draw("heldout", left, size, path)
        kept, left = rows.select(held), sorted(set(left).difference(held))
        if not left:
            raise UserError(
                f"{path}: heldout_size {heldout_size} leaves none of its {len(rows)} rows to train on"
            )
    return Splits(rows.select(draw("train", left, train_size, path)), kept, about)


def refuse_or_warn(task: str, source: str, about: Mapping[str, Json], strict: bool) -> None:
    """Warn if rows of a source were skipped, by the counts of `prepare_rows`.

    Raises:
      UserError: if rows were skipped and `strict` is true.
    """
    if not about["skipped"]:
        return
    what = (
        f"{source}: {about['skipped']} of {about['read']} rows have a gold answer that cannot be used "
        f"(first: {about['first_skipped'][0]})"
    )
    if strict:
        raise UserError(f"{what}; repair them, or set strict: false to skip them")
    warnings.warn(f"task {task}: {what}; they are skipped", stacklevel=4)


def check_gold(verify: Verifier, row: Row) -> None:
    """Check that the verifier can read a row's gold answer; otherwise it would mask every response to the row.

    Raises:
      Unusable: if it cannot.
    """
    check_answer(row.get("answer"))
    try:
        verdict = verify("", row)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable(str(error)) from None
    if verdict.masked:
        raise Unusable(str(verdict.parts.get("reason", "the verifier cannot judge it")))


def check_answer(gold: Json) -> None:
    """Check that a gold answer is a value whose text is meaningful, unlike `nan`.

    Raises:
      Unusable: if it is not.
    """
    if isinstance(gold, bool | Mapping) or (isinstance(gold, float) and not math.isfinite(gold)):
        raise Unusable(f"the answer is {str(gold)[:60]}, not a text or a number")
    if isinstance(gold, str) and (half := lone_surrogate(gold)):
        raise Unusable(f"the answer holds {half}")
    if isinstance(gold, list | tuple):
        for item in gold:
            check_answer(item)


def field(row: Row, name: str, known: Sequence[str], fields: Mapping[str, str]) -> Json:
    """Return the value of a field of a file's row, which may have one of several names.

    Args:
      row: the row of the file.
      name: the task's name of the field.
      known: names of the field in common datasets, in order of preference; `"a.b"` is the field `b` of the mapping `a`.
      fields: the option `fields`: the task's name -> the file's name.

    Raises:
      UserError: if there is no such field.
    """
    for path in [fields[name]] if name in fields else known:
        value: Json = row
        for part in path.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            return value
    wanted = fields.get(name, known[0])
    raise UserError(
        f"no field {wanted!r}{nearest(wanted, row)}; it has {', '.join(row) or 'none'} "
        f"(set the option fields to the file's name of {name!r})"
    )


_ABSENT = object()


def as_text(value: Json, name: str) -> str:
    """Check that a field is text that can be used in a prompt, and return it.

    Raises:
      UserError: if it is empty or not text.
    """
    if not isinstance(value, str):
        raise UserError(f"the field {name!r} is {str(value)[:60]!r}, not text")
    if not value.strip():
        raise UserError(f"the field {name!r} is empty")
    return value.encode(errors="replace").decode()  # replaces lone surrogates


def check_fields(task: str, fields: Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """Check the option `fields` of a task, and return it as a dict.

    Raises:
      UserError: if it is not a mapping from the task's names to the file's names.
    """
    if not isinstance(fields, Mapping | None) or not all(
        isinstance(value, str) for value in (fields or {}).values()
    ):
        raise UserError(f"task {task}: fields is {fields!r}, but must be a mapping of names to names")
    for name in fields or {}:
        if name not in known:
            raise UserError(
                f"task {task}: no field {name!r}{nearest(name, known)}; the fields are {', '.join(known)}"
            )
    return dict(fields or {})


def squeezed(problem: str) -> str:
    """Return a problem's text without whitespace, because copies of a problem are often wrapped differently."""
    return "".join(problem.split())
