"""What a task's data is, for the eye before anything is trained on it: `lpo data`."""

from collections.abc import Callable, Sequence
from typing import Any

from lpo_jax.tasks.task import Prompt, Row, Task


def describe(
    task: Task,
    encode: Callable[[Prompt], list[int]] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> dict[str, Any]:
    """Counts, the content hash, and the first row as the model and the verifier see it.

    Args:
      task: the task; all its rows are read.
      encode, decode: a tokenizer's, chat template included. Without them lengths are in characters, and messages are
        shown as they are.

    Returns:
      JSON values. By split: `rows`, `different_prompts`, `longest_prompt` and `mean_prompt` (in `unit`),
      `with_solution`, and what became of the files' rows (`prepared.prepare`). For both: `content_hash`, `overlap`
      (held-out prompts that are trained on too), `verifier` with its options, and of the first row `prompt`, `row`,
      and `solution` with its `verdict`.
    """
    encode, unit = (encode, "tokens") if encode else (str, "characters")
    decode = decode or str
    summaries, prompts = {}, {}
    for name, rows in (("train", task.train), ("heldout", task.heldout)):
        summaries[name], prompts[name] = _split(task, rows, encode)
        summaries[name] |= task.about.get(name, {})
    summary = {
        "task": task.name,
        "content_hash": task.content_hash,
        "verifier": {"name": task.verifier.source, **task.verifier.options},
        "prefill": task.prefill,
        "unit": unit,
        **summaries,
        "overlap": sum(prompt in prompts["train"] for prompt in prompts["heldout"]),
    }
    first = task.train[0] if len(task.train) else task.heldout[0]
    solution = task.solution(first)
    summary |= {"prompt": decode(encode(task.prompt(first))), "row": dict(first), "solution": solution}
    if solution is not None:
        verdict = task.verifier.load()(solution, first)
        summary["verdict"] = {"outcome": verdict.outcome, "reward": verdict.reward, **verdict.parts}
    return summary


def _split(
    task: Task, rows: Sequence[Row], encode: Callable[[Prompt], Any]
) -> tuple[dict[str, Any], set[int]]:
    """One split's figures, and its prompts' hashes: rows may be many."""
    prompts, longest, total, solved = set(), 0, 0, 0
    for row in rows:
        prompt = task.prompt(row)
        length = len(encode(prompt))
        prompts.add(hash(str(prompt)))
        longest, total, solved = (
            max(longest, length),
            total + length,
            solved + (task.solution(row) is not None),
        )
    return {
        "rows": len(rows),
        "different_prompts": len(prompts),
        "longest_prompt": longest,
        "mean_prompt": round(total / max(len(rows), 1), 1),
        "with_solution": solved,
    }, prompts


def lines(summary: dict[str, Any]) -> list[str]:
    """A description as text, a table of the splits first."""
    splits = [summary["train"], summary["heldout"]]
    names = [name for name in dict.fromkeys([*splits[0], *splits[1]]) if name != "first_skipped"]
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
        f"overlap       {summary['overlap']} held-out prompts are trained on too",
        "",
        *(f"{name.replace('_', ' '):<20}{train:>12}{heldout:>12}" for name, train, heldout in table),
        *(f"skipped: {place}" for split in splits for place in split.get("first_skipped", ())),
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
            f"its solution (judged {verdict['outcome']}, reward {verdict['reward']:g}):",
            summary["solution"],
        ]
    return shown
