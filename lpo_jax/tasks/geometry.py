r"""The task geometry3k: problems of plane geometry, each with a diagram.

The rows are those of `hiyouga/geometry3k` on the hub (`images`, `problem` with `<image>` in it, `answer`), or those of
InterGPS, where the answer is the letter of one of `choices` and the diagram is a file.

References:
  Lu et al., "Inter-GPS" (2021); LPO, "Experiments".
"""

from collections.abc import Mapping

from lpo_jax import rewards
from lpo_jax.tasks.images import MARK, ImageReader, row_images
from lpo_jax.tasks.prepared import Recipe, Unusable
from lpo_jax.tasks.splits import as_text, check_answer, check_fields, check_gold, field, splits, squeezed
from lpo_jax.tasks.task import Prompt, Row, Task
from lpo_jax.tasks.templates import GEOMETRY, bare, prompt_function
from lpo_jax.types import Json

_PROBLEM = ("problem", "question", "annotat_text", "problem_text")
_ANSWER = ("answer", "reward_model.ground_truth")
_IMAGES = ("images", "image")
_LETTERS = "ABCDEFGH"


def geometry3k_task(
    *,
    path: str = "",
    heldout: str = "",
    image_folder: str = "",
    train_size: int = 0,
    heldout_size: int = 0,
    seed: int = 0,
    template: str = "think",
    fields: Mapping[str, str] | None = None,
    strict: bool = False,
    verifier_options: Mapping[str, Json] | None = None,
) -> Task:
    """Build the Geometry3k task: rows `{"problem": "Find $x$.", "answer": "12.9", "choices": [...], "images": [...]}`.

    Args:
      path, heldout, train_size, heldout_size, seed, strict: see `lpo_jax.tasks.splits.splits`. Two problems are the
        same if their texts are equal except for whitespace, and their images are equal.
      image_folder: the folder, or the tar file, that the paths of images are relative to; see `lpo_jax.tasks.images`.
        By default the folder of the file with the rows.
      template: "think" (verl's, and the LPO paper's), "boxed", or a text with `{problem}`. The images come first.
      fields: the file's names for `problem`, `answer` and `images`, if they are unusual.
      verifier_options: options of the verifier; see `lpo_jax.rewards.geometry`.

    Raises:
      UserError: if an option has an invalid value, a file is missing or invalid, or an image cannot be decoded.
    """
    ask, verify = prompt_function("geometry3k", template, GEOMETRY, "problem"), rewards.get("geometry")
    fields = check_fields("geometry3k", fields, ("problem", "answer", "images"))

    def convert(row: Row) -> dict[str, Json]:
        problem = bare(field(row, "problem", _PROBLEM, fields), GEOMETRY, "problem")
        problem = as_text(problem, "problem").replace(MARK, " ").strip()
        choices = row.get("choices") if isinstance(row.get("choices"), list) else []
        converted = {
            "problem": problem,
            "answer": _gold(row, choices, fields),
            "choices": list(map(str, choices)),
        }
        check_gold(verify, converted)
        return converted

    def key(row: Row) -> tuple[str, ...]:
        return squeezed(row["problem"]), *(image.hash for image in row_images(row))

    def prompt(row: Row) -> Prompt:
        return MARK * len(row["images"]) + str(ask(row))  # the templates of this task are texts

    columns = {"problem": "text", "answer": "text", "choices": "json"}
    reader = ImageReader([fields["images"]] if "images" in fields else _IMAGES, image_folder)
    settings = {"fields": fields, "image_folder": image_folder}
    recipe = Recipe("geometry3k", columns, convert, key, settings, reader)
    rows = splits(recipe, path, heldout, train_size, heldout_size, seed, strict)
    verifier = rewards.VerifierSpec("geometry", verifier_options or {})
    return Task("geometry3k", rows.train, rows.heldout, prompt, verifier, about=rows.about)


def _gold(row: Row, choices: list[Json], fields: Mapping[str, str]) -> str:
    """Return the answer of a row; the letter of a choice becomes the choice."""
    gold = field(row, "answer", _ANSWER, fields)
    check_answer(gold)
    letter = str(gold).strip()
    if choices and letter in tuple(_LETTERS):
        if _LETTERS.index(letter) >= len(choices):
            raise Unusable(f"the answer is {letter}, but there are {len(choices)} choices")
        gold = choices[_LETTERS.index(letter)]
        check_answer(gold)
    if gold is None or not str(gold).strip():
        raise Unusable("the answer is empty")
    return as_text(str(gold).strip(), "answer")
