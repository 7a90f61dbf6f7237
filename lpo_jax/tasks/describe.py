"""Summarise a task's data before training: `lpo data`."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.rewards import Verdict, VerifierPool
from lpo_jax.tasks.images import EncodedImage, row_images, without_images
from lpo_jax.tasks.task import Row, Task, prompt_hash
from lpo_jax.types import Json

_JUDGED = 256  # solutions judged in one call
_NAMED = 5  # rows with a failing solution that are shown


def describe_task(
    task: Task,
    encode: Callable[[Row], list[int]] | None = None,
    decode: Callable[[list[int]], str] | None = None,
    written: Callable[[Row], str] | None = None,
    image_tokens: Callable[[EncodedImage], int] | None = None,
    pool: Mapping[str, Json] | None = None,
) -> dict[str, Json]:
    """Summarise a task: counts, the content hash, and the first row as the model and the verifier see it.

    Args:
      task: the task. All its rows are read, and every solution is judged.
      encode: maps a row to the token ids of its prompt. Without it, lengths are in characters.
      decode: maps token ids to text. Without it, messages are shown unchanged.
      written: maps a row to its solution as the verifier would see it if a model had written it; by default the
        solution itself.
      image_tokens: maps an image to the number of its tokens in a prompt.
      pool: options of the `VerifierPool` that judges the solutions.

    Returns:
      A dict of JSON values. For each split: `rows`, `different_prompts`, `longest_prompt` and `mean_prompt` (in
      `unit`), `with_solution`, `solution_fails` (the number of rows whose own solution the verifier does not pass) with
      the first ones and the reasons in `first_failing`, and the counts of `prepared.prepare_rows` for rows from files;
      for rows with images, `images` (their number), `smallest_image` and `largest_image` by area, as width x height,
      and with `image_tokens` `most_image_tokens` and `mean_image_tokens`.
      For both splits together: `content_hash`, `overlap` (the number of held-out prompts that are also trained on), and
      `verifier` with its options. For the first row: `prompt`, `row`, and `solution` with its `verdict`.

    Raises:
      UserError: if the verifier cannot be started, or a prompt cannot be encoded.
    """
    unit = "tokens" if encode else "characters"
    seen: Callable[[Row], Json] = encode or (lambda row: str(task.prompt(row)))
    decode, written = decode or str, written or task.solution
    splits = {"train": task.train, "heldout": task.heldout}
    summaries, prompts = {}, {}
    for name, rows in splits.items():
        summaries[name], prompts[name] = _split(task, name, rows, seen)
        summaries[name] |= _images(rows, image_tokens)
    first = task.train[0] if len(task.train) else task.heldout[0]
    solution = task.solution(first)
    if any(summary["with_solution"] for summary in summaries.values()):
        with VerifierPool(task.verifier, **(pool or {})) as judges:
            for name, rows in splits.items():
                summaries[name] |= _failing(task, rows, written, judges)
            if solution is not None:
                solution = written(first)
                (verdict,) = judges.verify([solution], [without_images(first)])
    summary = {
        "task": task.name,
        "content_hash": task.content_hash,
        "verifier": {"name": task.verifier.source, **task.verifier.options},
        "prefill": task.prefill,
        "unit": unit,
        **{name: {**summary, **task.about.get(name, {})} for name, summary in summaries.items()},
        "overlap": sum(prompt in prompts["train"] for prompt in prompts["heldout"]),
    }
    summary |= {"prompt": decode(seen(first)), "row": _plain(first), "solution": solution}
    if solution is not None:
        summary["verdict"] = {"outcome": verdict.outcome, "reward": verdict.reward, **verdict.parts}
    return summary


def _failing(
    task: Task, rows: Sequence[Row], written: Callable[[Row], str], judges: VerifierPool
) -> dict[str, Json]:
    """Count the rows whose solution the verifier does not pass; the first ones are listed with the reason."""
    failing, first = 0, []
    solved = ((index, row) for index, row in enumerate(rows) if task.solution(row) is not None)
    while batch := list(itertools.islice(solved, _JUDGED)):
        verdicts = judges.verify(
            [written(row) for _, row in batch], [without_images(row) for _, row in batch]
        )
        for (index, _), verdict in zip(batch, verdicts):
            if verdict.outcome != "pass":
                failing += 1
                first.append(f"row {index}: {_why(verdict)}")
        first = first[:_NAMED]
    return {"solution_fails": failing, "first_failing": first}


def _why(verdict: Verdict) -> str:
    known = verdict.parts.get("reason") or f"reward {verdict.reward:g}"
    return f"{verdict.outcome} ({known})"


def _plain(row: Row) -> dict[str, Json]:
    """Return a row as JSON values, with references in place of its images."""
    images = row_images(row)
    return dict(row) | ({"images": [image.reference() for image in images]} if images else {})


def _images(rows: Sequence[Row], tokens: Callable[[EncodedImage], int] | None) -> dict[str, Json]:
    """Return the figures of a split's images; empty for rows of text."""
    sizes: list[tuple[int, int]] = []
    counts: list[int] = []
    for row in rows:
        sizes += [image.size for image in row_images(row)]
        counts += [tokens(image) for image in row_images(row)] if tokens else []
    if not sizes:
        return {}
    small, large = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
    figures: dict[str, Json] = {
        "images": len(sizes),
        "smallest_image": f"{small[1]} x {small[0]}",
        "largest_image": f"{large[1]} x {large[0]}",
    }
    if counts:
        figures |= {
            "most_image_tokens": max(counts),
            "mean_image_tokens": round(sum(counts) / len(counts), 1),
        }
    return figures


def _split(
    task: Task, split: str, rows: Sequence[Row], encode: Callable[[Row], Json]
) -> tuple[dict[str, Json], set[int]]:
    """Return the figures of one split, and the hashes of its prompts, which may be too many to keep."""
    prompts, longest, total, solved = set(), 0, 0, 0
    for index, row in enumerate(rows):
        try:
            length = len(encode(row))
        except UserError as error:
            raise UserError(f"{split} row {index}: {error}") from None
        prompts.add(prompt_hash(task, row))
        longest, total = max(longest, length), total + length
        solved += task.solution(row) is not None
    return {
        "rows": len(rows),
        "different_prompts": len(prompts),
        "longest_prompt": longest,
        "mean_prompt": round(total / max(len(rows), 1), 1),
        "with_solution": solved,
    }, prompts


def description_lines(summary: dict[str, Json]) -> list[str]:
    """Format a summary of `describe_task` as lines of text."""
    splits = [summary["train"], summary["heldout"]]
    named = ("first_skipped", "first_failing")
    names = [name for name in dict.fromkeys([*splits[0], *splits[1]]) if name not in named]
    verifier = {**summary["verifier"]}
    table = [
        ("", "train", "held-out"),
        *((name, *(str(split.get(name, "")) for split in splits)) for name in names),
    ]
    shown = [
        f"task          {summary['task']}",
        f"content hash  {summary['content_hash']}",
        f"verifier      {verifier.pop('name')}"
        + "".join(f" {name}={value}" for name, value in verifier.items()),
        f"overlap       {summary['overlap']} held-out prompts are also trained on",
        "",
        *(f"{name.replace('_', ' '):<20}{train:>12}{heldout:>12}" for name, train, heldout in table),
        *(f"skipped: {place}" for split in splits for place in split.get("first_skipped", ())),
        *(
            f"solution fails: {name} {place}"
            for name, split in zip(table[0][1:], splits)
            for place in split.get("first_failing", ())
        ),
        f"(lengths in {summary['unit']})",
        "",
        "first prompt:",
        summary["prompt"],
        "",
        "its row:",
        *(f"  {name}: {str(value)[:200]}" for name, value in summary["row"].items()),
    ]
    if summary["solution"] is not None:
        verdict = summary["verdict"]
        shown += [
            f"its solution (judged {verdict['outcome']}, reward {verdict['reward']:g}), as the verifier sees it:",
            summary["solution"],
        ]
    return shown
