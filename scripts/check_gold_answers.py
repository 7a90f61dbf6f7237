r"""Judge the gold answers of the mathematics benchmarks, and similar wrong answers, with the built-in verifiers.

    python scripts/check_gold_answers.py DIR

DIR holds the files named in `BENCHMARKS`. Every gold answer, in `\boxed{}`, must pass. Every wrong answer derived from
it (a number increased by one, two digits swapped, a sign flipped, a bracket changed, an item moved, added or omitted, a
value increased by a tiny amount, another row's answer) must fail. The script prints a table, then the gold answers that
failed and the wrong answers that passed. The exit status is 1 if less than 99% of a benchmark's gold answers pass, or
if any wrong answer passes.
"""

import argparse
import pathlib
import random
import re
import sys
import time
from collections.abc import Iterator

from lpo_jax import json_lines
from lpo_jax.rewards import VerifierPool, VerifierSpec
from lpo_jax.rewards.answers import last_boxed

# name: (file, function that returns the gold answer of a row)
BENCHMARKS = {
    "MATH500": ("math/math500.jsonl", lambda row: row["answer"]),
    "AIME24": ("math_eval/aime24.jsonl", lambda row: row["answer"]),
    "AIME25": ("math_eval/aime25.parquet", lambda row: row["reward_model"]["ground_truth"]),
    "AMC23": ("math_eval/amc23.jsonl", lambda row: row["answer"]),
    "Minerva": ("math_eval/minerva_math.jsonl", lambda row: last_boxed(row["solution"])),
    "OlympiadBench": ("math_eval/olympiadbench.jsonl", lambda row: ",".join(row["final_answer"])),
    "GSM8K test": ("gsm8k/test.jsonl", lambda row: row["answer"].rpartition("####")[2].strip()),
}

_NUMBER = re.compile(r"(?<![0-9.,!{])[0-9]+(?![0-9.,])")
# After these, a flipped sign changes nothing or is not valid LaTeX: exponents, subscripts, cos(-x), 3 +- -2.
_NO_SIGN = re.compile(r"(?:[\^_]\{?|\\cos ?\(?|\\pm ?|m )$")
_NAME = re.compile(r"^\$?[A-Za-z](?:\([a-z]\))?\s*=\s*")


def neighbours(gold: str, others: list[str], rng: random.Random) -> Iterator[str]:
    """Yield wrong answers that are similar to the gold answer in spelling or in value."""
    numbers = list(_NUMBER.finditer(gold))
    for match in rng.sample(numbers, min(3, len(numbers))):
        before, digits, after = gold[: match.start()], match[0], gold[match.end() :]
        yield f"{before}{int(digits) + 1}{after}"
        yield f"{before}{digits}0{after}" if int(digits) else f"{before}7{after}"
        if len(digits) > 1 and digits[-1] != digits[-2]:
            yield f"{before}{digits[:-2]}{digits[-1]}{digits[-2]}{after}"
        if int(digits) and not _NO_SIGN.search(before):
            yield f"{before}-{digits}{after}"
    if re.search("[0-9]", gold) and not re.search(
        r"[=,;<>]|\\(?:text|mbox|begin|in|cup|pm|le|ge)|[A-Za-z]{4}", gold
    ):
        core = gold.replace("$", "").removesuffix("^\\circ").removesuffix("%").removesuffix("\\")
        yield rf"{core} + 10^{{-9}}"
        yield rf"-({core})" if re.search("[1-9]", gold) else "1"
    pair = re.fullmatch(r"\$?\(([^(),]*),([^(),]*)\)\$?", gold)
    if pair and pair[1].strip() != pair[2].strip():
        yield f"({pair[2]},{pair[1]})"
        yield f"[{pair[1]},{pair[2]})"
        yield f"({pair[1]})"
    if re.fullmatch(r"-?[0-9]{1,2}(,-?[0-9]{1,2})+", gold):
        yield gold.rpartition(",")[0]
        yield gold + ",99"
    yield from (other for other in rng.sample(others, min(2, len(others))) if _surely_differ(gold, other))


def _surely_differ(one: str, other: str) -> bool:
    """Return whether two answers consist of different digits and letters, ignoring their names."""
    made_of = [sorted(re.findall(r"\w", _NAME.sub("", text).removesuffix(".0"))) for text in (one, other)]
    return made_of[0] != made_of[1]


def check(name: str, golds: list[str], pool: VerifierPool, form: str, seed: int) -> tuple[bool, list[str]]:
    """Print a line of the table; return whether the requirement is met, and notes on the failures."""
    rng, started = random.Random(seed), time.monotonic()
    verdicts = pool.verify([form % gold for gold in golds], [{"answer": gold} for gold in golds])
    passed = sum(verdict.outcome == "pass" for verdict in verdicts)
    notes = [
        f"{name}, row {row}: missed {gold!r}: {verdict.outcome} {verdict.parts.get('reason', '')}"
        for row, (gold, verdict) in enumerate(zip(golds, verdicts))
        if verdict.outcome != "pass"
    ]
    near = [(gold, wrong) for gold in golds for wrong in neighbours(gold, golds, rng)]
    judged = pool.verify([form % wrong for _, wrong in near], [{"answer": gold} for gold, _ in near])
    fooled = [pair for pair, verdict in zip(near, judged) if verdict.outcome == "pass"]
    notes += [f"{name}: {wrong!r} passed for {gold!r}" for gold, wrong in fooled]
    print(
        f"{name:20} {len(golds):5} {passed:5} {passed / len(golds):8.2%} {len(near):11} {len(fooled):7} "
        f"{time.monotonic() - started:8.1f}",
        flush=True,
    )
    return passed >= 0.99 * len(golds) and not fooled, notes


def read_benchmark(path: pathlib.Path) -> list[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return json_lines.read_rows(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the wrong answers")
    options = parser.parse_args()
    golds = {
        name: [str(gold_of(row)) for row in read_benchmark(options.directory / path)]
        for name, (path, gold_of) in BENCHMARKS.items()
    }
    print(
        f"{'benchmark':20} {'rows':>5} {'pass':>5} {'percent':>8} {'neighbours':>11} {'passed':>7} {'seconds':>8}"
    )
    results = []
    with VerifierPool(VerifierSpec("math"), timeout=20.0) as pool:
        results += [check(name, rows, pool, r"\boxed{%s}", options.seed) for name, rows in golds.items()]
    with VerifierPool(VerifierSpec("gsm8k")) as pool:
        results.append(check("GSM8K test, ####", golds["GSM8K test"], pool, "#### %s", options.seed))
    print(*(note for _, notes in results for note in notes), sep="\n")
    return int(not all(met for met, _ in results))


if __name__ == "__main__":
    sys.exit(main())
