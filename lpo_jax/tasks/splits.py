"""What the tasks from files share: which rows are trained on, which held out, and what their fields are called."""

import dataclasses
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError, nearest
from lpo_jax.json_lines import lone_surrogate
from lpo_jax.rewards import Verifier
from lpo_jax.tasks.prepared import Recipe, Unusable, prepare_rows
from lpo_jax.tasks.task import Row

MOST_HELD_OUT = 512  # where nothing says how many


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows to train on and rows held out, and by split what became of the rows of the files (`prepare_rows`)."""

    train: Sequence[Row]
    heldout: Sequence[Row]
    about: Mapping[str, Mapping[str, Any]]


def splits(
    recipe: Recipe,
    path: str,
    heldout: str,
    train_size: int,
    heldout_size: int,
    seed: int,
    strict: bool = True,
) -> Splits:
    """Rows from files, drawn by a seed; no problem is in both splits or twice in one.

    Args:
      recipe: what to make of the rows.
      path: the source of training rows (`records.find_files`); empty for a task that is only evaluated on.
      heldout: the source of held-out rows. All its problems are kept out of training, drawn or not. Empty: rows are
        held out of `path`, the same ones whatever `train_size` is.
      train_size: training rows drawn; 0: all.
      heldout_size: held-out rows drawn; 0: all of `heldout`, or without one a tenth of `path`, at most
        `MOST_HELD_OUT`.
      seed: of the draws.
      strict: refuse rows whose gold answer cannot be used, instead of skipping them with a warning.

    Raises:
      UserError: if no source is given, a source has fewer rows than asked for, or `prepare_rows` raises it.
    """
    if not path and not heldout:
        raise UserError(f"task {recipe.name} needs the option 'path', or 'heldout' for evaluation alone")
    if min(train_size, heldout_size) < 0:
        raise UserError(
            f"task {recipe.name}: train_size {train_size}, heldout_size {heldout_size}: 0 or more"
        )
    about: dict[str, Any] = {}

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
    left = range(len(rows))
    if not heldout:
        size = heldout_size or max(1, min(MOST_HELD_OUT, len(rows) // 10))
        held = draw("heldout", left, size, path)
        kept, left = rows.select(held), sorted(set(left).difference(held))
        if not left:
            raise UserError(
                f"{path}: heldout_size {heldout_size} leaves none of its {len(rows)} rows to train on"
            )
    return Splits(rows.select(draw("train", left, train_size, path)), kept, about)


def refuse_or_warn(task: str, source: str, about: Mapping[str, Any], strict: bool) -> None:
    """Says what was skipped of a source, as `prepare_rows` counts it.

    Raises:
      UserError: if something was, and `strict`.
    """
    if not about["skipped"]:
        return
    what = (
        f"{source}: {about['skipped']} of {about['read']} rows have a gold answer that cannot be used "
        f"(first: {about['first_skipped'][0]})"
    )
    if strict:
        raise UserError(f"{what}; mend them, or set strict: false to skip them")
    warnings.warn(f"task {task}: {what}; they are skipped", stacklevel=4)


def check_gold(verify: Verifier, row: Row) -> None:
    """Raises `Unusable` where the verifier cannot read a row's gold answer: it would mask every response to it."""
    check_answer(row.get("answer"))
    try:
        verdict = verify("", row)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable(str(error)) from None
    if verdict.masked:
        raise Unusable(str(verdict.parts.get("reason", "the verifier cannot judge it")))


def check_answer(gold: Any) -> None:
    """Raises `Unusable` for a value that a verifier would turn into a text that nobody means, such as `nan`."""
    if isinstance(gold, bool | Mapping) or (isinstance(gold, float) and not math.isfinite(gold)):
        raise Unusable(f"the answer is {str(gold)[:60]}, not a text or a number")
    if isinstance(gold, str) and (half := lone_surrogate(gold)):
        raise Unusable(f"the answer holds {half}")
    if isinstance(gold, list | tuple):
        for item in gold:
            check_answer(item)


def field(row: Row, name: str, known: Sequence[str], fields: Mapping[str, str]) -> Any:
    """The value of a field under the first of the names that files give it.

    Args:
      row: what the file holds.
      name: ours.
      known: names in files, the likeliest first; `"a.b"` is the field `b` of the mapping `a`.
      fields: the user's own answer: our name -> the file's.

    Raises:
      UserError: if there is no such field.
    """
    for path in [fields[name]] if name in fields else known:
        value: Any = row
        for part in path.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            return value
    wanted = fields.get(name, known[0])
    raise UserError(
        f"no field {wanted!r}{nearest(wanted, row)}; it has {', '.join(row) or 'none'} "
        f"(the option fields says what the file calls {name!r})"
    )


_ABSENT = object()


def as_text(value: Any, name: str) -> str:
    """A field as text, for a prompt.

    Raises:
      UserError: if it is empty or no text.
    """
    if not isinstance(value, str):
        raise UserError(f"the field {name!r} is {str(value)[:60]!r}, not text")
    if not value.strip():
        raise UserError(f"the field {name!r} is empty")
    return value.encode(errors="replace").decode()  # half a surrogate pair is no text


def check_fields(task: str, fields: Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """The option `fields` of a task.

    Raises:
      UserError: if it is no mapping of our names to the file's.
    """
    if not isinstance(fields, Mapping | None) or not all(
        isinstance(value, str) for value in (fields or {}).values()
    ):
        raise UserError(f"task {task}: fields is {fields!r}, but has to be a mapping of names to names")
    for name in fields or {}:
        if name not in known:
            raise UserError(
                f"task {task}: no field {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
    return dict(fields or {})


def squeezed(problem: str) -> str:
    """A problem's text without whitespace: the same problem is often wrapped in another way."""
    return "".join(problem.split())
