"""Test the code verifier with attacks, a throughput measurement, and reference solutions of public datasets.

    python scripts/check_code_sandbox.py [DATA_DIR] [--sandbox weak]

The attacks are those of tests/red_team.py, each against a fresh sandbox. None may earn a reward, leave a process
behind, reach a port of this machine, or change a file. DATA_DIR holds any of HumanEval.jsonl.gz, mbpp_974.jsonl,
mbpp_sanitized_399.json, leetcode_*.json, codeforces_test_408.json and code_contests_test_165.json. Their own solutions
(for the last two, some solutions in this script) must pass; failures are listed. The exit status is 1 if an attack
succeeds. The script takes a few minutes on 2 cores.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lpo_jax import rewards
from lpo_jax.rewards.code_tests import asserts_to_tests

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import red_team

# Solutions for files without any: file -> index of the problem in it -> program.
BY_HAND = {
    "codeforces_test_408.json": {
        0: "for _ in range(int(input())):\n    print(*sorted(map(int, input().split())))",
        2: "for _ in range(int(input())):\n    a, b, c, d = map(int, input().split())\n    low, high = sorted((a, b))\n"
        "    print('YES' if (low < c < high) != (low < d < high) else 'NO')",
        3: "for _ in range(int(input())):\n    s = input()\n"
        "    print(1 + sum(a != b for a, b in zip(s, s[1:])) - ('01' in s))",
        5: "from math import isqrt\nfor _ in range(int(input())):\n    r = int(input())\n    total = 0\n"
        "    for x in range(1, r + 1):\n        low = isqrt(max(0, r * r - x * x - 1)) + 1 if x < r else 0\n"
        "        total += isqrt((r + 1) ** 2 - x * x - 1) - low + 1\n    print(4 * total)",
        6: "for _ in range(int(input())):\n    n, a = int(input()), list(map(int, input().split()))\n"
        "    groups = defaultdict(list)\n    for x in sorted(a, reverse=True):\n        groups[x >> 2].append(x)\n"
        "    print(*[groups[x >> 2].pop() for x in a])",
    },
    "code_contests_test_165.json": {
        0: "n, m = map(int, input().split())\n"
        "rows = [(input(), i) for i in range(1, n + 1)]\n"
        "key = lambda row: [ord(c) * (-1) ** j for j, c in enumerate(row[0])]\n"
        "print(*[i for _, i in sorted(rows, key=key)])",
        33: "n, best = int(input()), {0: -1}\n"
        "for x in map(int, input().split()):\n"
        "    for value, last in list(best.items()):\n"
        "        if last < x:\n            best[value ^ x] = min(best.get(value ^ x, 10**9), x)\n"
        "print(len(best))\nprint(*sorted(best))",
        55: "print(6 * pow(4, 2 ** int(input()) - 2, 10**9 + 7) % (10**9 + 7))",
        99: "for _ in range(int(input())):\n    x, n = map(int, input().split())\n"
        "    step = [0, -n, 1, n + 1][n % 4]\n    print(x + step if x % 2 == 0 else x - step)",
        132: "for _ in range(int(input())):\n    b = list(map(int, input().split()))\n"
        "    print(b[0], b[1], b[6] - b[0] - b[1])",
        154: "for _ in range(int(input())):\n    a, b, c = sorted(map(int, input().split()))\n"
        "    print('YES' if a + b == c or (a == b and c % 2 == 0) or (b == c and a % 2 == 0) else 'NO')",
    },
}

Problem = tuple[str, str, dict | None]  # name, solution, and tests, or None if they cannot be used


def problems(file: Path) -> Iterator[Problem]:
    """Yield the problems of a file that have a solution."""
    if file.suffix == ".gz":
        for row in map(json.loads, gzip.decompress(file.read_bytes()).split(b"\n")[:-1]):
            tests = asserts_to_tests(f"{row['test']}\ncheck({row['entry_point']})")
            yield row["task_id"], row["prompt"] + row["canonical_solution"], tests
        return
    rows = json.loads(file.read_text()) if file.suffix == ".json" else map(json.loads, file.open())
    for index, row in enumerate(rows):
        if "test_list" in row:
            yield f"task {row['task_id']}", row["code"], asserts_to_tests("\n".join(row["test_list"]))
        elif "solutions" in row:
            yield f"row {index}", row["solutions"], asserts_to_tests(row["tests"]["functional"])
        elif index in BY_HAND.get(file.name, {}):
            yield f"row {index}", BY_HAND[file.name][index], row["tests"]


def judge(
    spec: rewards.VerifierSpec, programs: list[str], tests: list
) -> tuple[list[rewards.Verdict], float]:
    """Return the verdicts of two workers, and the seconds that they took after their start."""
    responses = [f"```python\n{program}\n```" for program in programs]
    weak = spec.options["sandbox"] == "weak"
    with rewards.VerifierPool(spec, workers=2, timeout=30.0, allow_weak_sandbox=weak) as pool:
        started = time.perf_counter()
        verdicts = pool.verify(responses, [{"tests": each} for each in tests])
        return verdicts, time.perf_counter() - started


def attacks(kind: str) -> int:
    """Run every attack; return how many succeeded."""
    succeeded = 0
    chosen = {name: each for name, each in red_team.EXPLOITS.items() if kind == "bubblewrap" or each.weak}
    for name, exploit in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            result = red_team.attack(exploit, kind, Path(folder))
        verdict = result.verdict
        succeeded += not result.withstood
        print(
            f"  {'withstood' if result.withstood else 'SUCCEEDED'}  {name}: reward {verdict.reward:g}, "
            f"{verdict.outcome} ({verdict.parts.get('reason', '')[:60]}) {'; '.join(result.harm)}"
        )
    print(f"{len(chosen) - succeeded} of {len(chosen)} attacks withstood ({kind})")
    return succeeded


def throughput(spec: rewards.VerifierSpec) -> None:
    """Print the number of candidates judged per minute, on problems with ten tests."""
    tests = {
        "inputs": [f"{i} {i + 1}\n" for i in range(10)],
        "outputs": [f"{2 * i + 1}\n" for i in range(10)],
    }
    kinds = {
        "right": "a, b = map(int, input().split())\nprint(a + b)",
        "wrong": "a, b = map(int, input().split())\nprint(a * b)",
        "does not compile": "print(",
    }
    for name, program in kinds.items():
        verdicts, seconds = judge(spec, [program] * 100, [tests] * 100)
        outcomes = {verdict.outcome for verdict in verdicts}
        print(
            f"  {name}: {60 * len(verdicts) / seconds:.0f} candidates per minute, 10 tests each ({outcomes})"
        )


def references(spec: rewards.VerifierSpec, folder: Path) -> None:
    """Judge the solutions of every known file in the folder, and print those that fail."""
    for file in sorted(folder.iterdir()):
        found = list(problems(file)) if file.name.endswith((".json", ".jsonl", ".gz")) else []
        usable = [problem for problem in found if problem[2]]
        if not usable:
            continue
        verdicts, seconds = judge(spec, [each[1] for each in usable], [each[2] for each in usable])
        missed = [(name, v) for (name, _, _), v in zip(usable, verdicts) if v.outcome != "pass"]
        print(
            f"  {file.name}: {len(usable) - len(missed)} of {len(usable)} pass "
            f"({len(found) - len(usable)} have tests of another kind), {60 * len(usable) / seconds:.0f} per minute"
        )
        for name, verdict in missed:
            print(f"    {name}: {verdict.outcome}, {verdict.parts['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder with the datasets")
    parser.add_argument("--sandbox", choices=("bubblewrap", "weak"), default="bubblewrap")
    args = parser.parse_args()
    spec = rewards.VerifierSpec("code", {"sandbox": args.sandbox})
    print("attacks")
    succeeded = attacks(args.sandbox)
    print("throughput, 2 workers")
    throughput(spec)
    if args.data:
        print("reference solutions")
        references(spec, args.data)
    sys.exit(succeeded > 0)
