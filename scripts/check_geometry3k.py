r"""Judge the gold answers of Geometry3k, and the wrong choices, with the verifier of the task geometry3k.

    python scripts/check_geometry3k.py DIR

DIR holds `train.jsonl`, `val.jsonl` and `test.jsonl` of InterGPS with their images. Every gold answer must pass, in the
form that the prompt requires; every other choice must be wrong, and well-formed. A choice whose text is that of the
gold answer is not wrong: such rows are listed. The script prints a table, then what missed. The exit status is 1 if
less than 99% of the gold answers of a split pass, or a wrong choice passes.
"""

import argparse
import pathlib
import sys
import warnings

from lpo_jax import tasks
from lpo_jax.rewards import VerifierPool
from lpo_jax.tasks.images import without_images

SPLITS = ("train", "val", "test")
FORM = "<think>So it is.</think> The answer is \\boxed{%s}."


def check(name: str, path: pathlib.Path) -> tuple[bool, list[str]]:
    """Print a line of the table; return whether the requirement is met, and notes on the failures."""
    task = tasks.get("geometry3k", heldout=str(path))
    rows = [without_images(row) for row in task.heldout]
    asked = [(row, choice, choice.strip() == row["answer"]) for row in rows for choice in row["choices"]]
    golds = [(row, row["answer"]) for row in rows]
    wrong = [(row, choice) for row, choice, same in asked if not same]
    with VerifierPool(task.verifier) as pool:
        of_golds, of_wrong = (
            pool.verify([FORM % answer for _, answer in pairs], [row for row, _ in pairs])
            for pairs in (golds, wrong)
        )
    passed = sum(verdict.outcome == "pass" for verdict in of_golds)
    fooled = sum(verdict.outcome == "pass" for verdict in of_wrong)
    formed = sum((verdict.outcome, verdict.reward) == ("wrong", 0.1) for verdict in of_wrong)
    about = task.about["heldout"]
    notes = [f"{name}: skipped {place}" for place in about["first_skipped"]]
    for pairs, verdicts, good in ((golds, of_golds, "pass"), (wrong, of_wrong, "wrong")):
        notes += [
            f"{name}: {answer!r} was judged {verdict.outcome} for {row['answer']!r} ({row['problem']})"
            for (row, answer), verdict in zip(pairs, verdicts)
            if verdict.outcome != good
        ]
    repeated = [row for row in rows if [choice.strip() for choice in row["choices"]].count(row["answer"]) > 1]
    notes += [f"{name}: {row['answer']!r} is among the choices twice ({row['problem']})" for row in repeated]
    notes += (
        [f"{name}: {about['duplicates']} row equals another, image included"] if about["duplicates"] else []
    )
    total = len(rows) + about["skipped"]
    print(f"{name:6} {total:5} {passed:5} {passed / total:8.2%} {len(wrong):6} {formed:7} {fooled:7}")
    return passed >= 0.99 * total and not fooled, notes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    directory = parser.parse_args().directory
    warnings.simplefilter("ignore")  # skipped rows are among the notes
    print(f"{'split':6} {'rows':>5} {'pass':>5} {'percent':>8} {'wrong':>6} {'scored':>7} {'passed':>7}")
    results = [check(name, directory / f"{name}.jsonl") for name in SPLITS]
    print(*(note for _, notes in results for note in notes), sep="\n")
    return int(not all(met for met, _ in results))


if __name__ == "__main__":
    sys.exit(main())
