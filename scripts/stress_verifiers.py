r"""Two thousand pathological answers and hanging verifiers in a row: are limits, worker count and memory kept?

    python scripts/stress_verifiers.py [--items 2000]

Random towers, factorials, deep nestings, near-cancellations, garbage and their like are scored by the `math`
verifier, one at a time, in a pool of one worker; then one in twenty of as many again by a verifier that sleeps,
spins in C, ignores SIGTERM, eats memory or dies. Prints outcomes, the slowest items and the memory of the parent
and of the workers as it goes. Exit status 1 if an item took longer than the limit and a second, a worker was lost
for good, or memory grew by more than a half.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import sys
import tempfile
import time

from lpo_jax.rewards import VerifierPool

LIMIT, HANG_LIMIT = 5.0, 0.5  # seconds

HANGING = """
import os, re, signal, time
def verify(response, example):
    if response == "sleep":
        time.sleep(600)
    if response == "spin":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if response == "eat":
        hoard = [bytearray(1 << 20) for _ in range(200)]
        time.sleep(600)
    if response == "die":
        os._exit(1)
    return 1.0
"""
GOLDS = [
    r"\sqrt{2}",
    "x",
    r"\pi",
    "5",
    r"\frac{1}{3}",
    "x^2+1",
    r"\lfloor n/2\rfloor",
    "(1,2)",
    r"\sin x",
    "0",
    "2i",
]
GOLDS.append(",".join(rf"\sqrt{{{n}}}" for n in range(2, 60)))


def nested(form: str, levels: int, inside: str) -> str:
    for _ in range(levels):
        inside = form.replace("@", inside)
    return inside


def pathological(rng: random.Random) -> str:
    n = rng.randint
    base = rng.choice(["5", "9", "x", r"\sqrt{2}", "10", "e", r"\pi", "2", "(x+1)"])
    symbols = re.findall(
        r"\S+", r"\frac \sqrt { } 1 x ^ _ \pm \cup ( ) = < \in , \begin{pmatrix} \end{pmatrix} & \\ \text{"
    )
    forms = [
        lambda: nested(base + "^{@}", n(2, 9), base),
        lambda: nested(base + "^(@)", n(2, 9), base),
        lambda: base + "!" * n(1, 9),
        lambda: f"({base}^{{{n(2, 99)}}})!",
        lambda: rf"\binom{{{10 ** n(3, 9)}}}{{{10 ** n(3, 9)}}}",
        lambda: rf"x\binom{{{n(2, 99)}^{{{n(2, 99)}}}}}{{{n(2, 10**6)}}}",
        lambda: nested(rng.choice(["(@)", "{@}", r"\left[@\right]"]), n(10, 900), "x"),
        lambda: nested(
            rng.choice([r"\frac{1}{1+@}", r"\sqrt{1+@}", r"\ln(1+@)", r"\sin(@)", "e^{@}"]), n(3, 60), "x"
        ),
        lambda: "+".join(["1"] * n(10, 900)),
        lambda: "".join(f"(x+{i})" for i in range(n(10, 200))),
        lambda: "+".join(rf"\sqrt{{{i}}}" for i in range(2, n(10, 60))),
        lambda: "+".join(rf"\frac{{1}}{{{n(2, 9)}^{{{n(1000, 9999)}}}}}" for _ in range(n(2, 80))),
        lambda: rf"\sin(10^{{{n(10, 9999)}}})",
        lambda: rf"\lfloor (\sqrt{{2}}+\sqrt{{3}})^{{{n(2, 3000)}}} \rfloor",
        lambda: f"1e{n(3, 10**9)}",
        lambda: rf"\infty^{{\infty}}+{base}/0",
        lambda: ",".join(rf"\sqrt{{{n(2, 10**6)}}}" for _ in range(n(10, 100))),
        lambda: rf"\tan({n(1, 10**6)}\pi/2+{base})",
        lambda: f"(x+y+z+1)^{{{n(50, 5000)}}}",
        lambda: "|".join(["x"] * n(3, 90)),
        lambda: "".join(rng.choice(r"0123456789+-*/^(){}\,!|xyz ") for _ in range(n(50, 400))),
        lambda: " ".join(rng.choice(symbols) for _ in range(n(10, 300))),
        lambda: r"\ln" * n(2, 60) + " " + base,
        lambda: rf"\operatorname{{eig}}(x)+\int_0^1 x^{{{n(1, 10**6)}}} dx",
        lambda: rf"\sum_{{k=1}}^{{{10 ** n(3, 12)}}} k^{{{n(3, 99)}}}",
        lambda: rf"\sqrt{{{n(2, 9)}^{{{n(1000, 9000)}}}+1}}",
        lambda: rf"\log_{{{n(2, 9)}}}({n(2, 9)}^{{{n(1000, 9000)}}}+1)",
        lambda: "+".join(f"{n(2000, 3000)}!/{n(2000, 3000)}!" for _ in range(n(2, 200))),
        lambda: r"\pm" * n(2, 500) + "1",
        lambda: "9" * n(1000, 5000),
        lambda: rf"\sqrt[{10 ** n(1, 9)}]{{{n(2, 10**9)}}}",
    ]
    return rng.choice(forms)()


def megabytes(pid: int) -> float:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(pool: VerifierPool, limit: float, items: list[tuple[str, dict]]) -> bool:
    """Scores items one by one; returns whether limits, worker count and memory were kept."""
    outcomes, slowest, memory = collections.Counter(), [], []
    workers = len(pool.pids)
    for index, (response, example) in enumerate(items):
        started = time.monotonic()
        (verdict,) = pool.verify([response], [example])
        slowest = sorted([*slowest, (time.monotonic() - started, response[:60])], reverse=True)[:3]
        outcomes[verdict.outcome] += 1
        if (index + 1) % max(1, len(items) // 10) == 0:
            memory.append((megabytes(os.getpid()), sum(map(megabytes, pool.pids))))
            print(
                f"  {index + 1:5} items, MB: parent {memory[-1][0]:.0f}, workers {memory[-1][1]:.0f}",
                flush=True,
            )
    print(f"  {dict(outcomes)}; slowest {[f'{seconds:.2f} s: {text}' for seconds, text in slowest]}")
    flat = all(last <= 1.5 * first for first, last in zip(memory[0], memory[-1]))
    return slowest[0][0] < limit + 1.0 and len(pool.pids) == workers and flat


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    answers = [
        (rf"\boxed{{{pathological(rng)}}}", {"answer": rng.choice(GOLDS)}) for _ in range(options.items)
    ]
    hanging = [
        (rng.choice(["sleep", "spin", "stay", "eat", "die", "1"]), {}) for _ in range(options.items // 20)
    ]
    print("pathological answers, limit", LIMIT)
    with VerifierPool("math", workers=1, timeout=LIMIT) as pool:
        kept = run(pool, LIMIT, answers)
    print("hanging verifiers, limit", HANG_LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "hanging.py"
        file.write_text(HANGING)
        with VerifierPool(f"{file}:verify", workers=2, timeout=HANG_LIMIT) as pool:
            kept &= run(pool, HANG_LIMIT, hanging)
    print("kept" if kept else "NOT KEPT")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
