r"""Check that verifiers keep their time limits, workers and memory on pathological answers and hostile texts.

    python scripts/stress_verifiers.py [--items 2000] [--hostile 20000]

By default, random pathological answers (towers of powers, factorials, deep nesting, near-cancellations, garbage) are
judged by the `math` verifier, one at a time, in a pool with one worker. Then a twentieth of that number of items is
judged by a verifier that sleeps, spins in C, ignores SIGTERM, allocates memory, or dies. The script prints the
outcomes, the slowest items, and the memory of the parent and the workers. The exit status is 1 if an item took more
than a second longer than the limit, a worker was not replaced, or memory grew by more than half.

With `--hostile N`, every built-in verifier instead judges N texts of up to 64 KB: long runs of digits, nested brackets
and LaTeX, repeated delimiters and tags, backslashes, combining characters, surrogates, NUL, and mixtures of these, with
and without the delimiters that the verifier searches for. The comparisons of printed output and of results, which run
outside the sandbox, judge as many. For each verifier, the script prints the outcomes, and the longest time at 1, 4, 16
and 64 KB. The exit status is 1 if a verifier raises an exception, masks a text, or takes longer than `HOSTILE_LIMIT`.
"""

import argparse
import collections
import importlib
import os
import pathlib
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from lpo_jax import rewards
from lpo_jax.rewards import VerifierPool
from lpo_jax.rewards.same import same_output, same_result

LIMIT, HANG_LIMIT = 5.0, 0.5  # seconds
HOSTILE_LIMIT = 5.0  # seconds for one text: half the default of rewards.timeout
SCORED = {"pass", "wrong", "malformed", "timeout", "True", "False"}  # not masked

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
    """Judge items one by one; return whether limits, worker count and memory were kept."""
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


# Texts that are repeated up to a length, to detect superlinear time and recursion.
REPEATED = [
    *("1", "1 ", "1,", "1.", "1/", "1e", "9" * 18 + ",", "-", "+-", "1+", "(", "((1)", "[", "{", "}", "([{"),
    *("\\", "\\\\", " ", "\n", "\t", " \n", "\r", "\x00", "\ud800", "\udfff\ud800", "é", "e\u0301", "\u0301"),
    *(
        "\u202e",
        "\u2028",
        "١",
        "２",
        "½",
        "²",
        "\U0001d7d8",
        "💥",
        "=",
        "1=",
        "1=1,",
        "^",
        "^{",
        "2^",
        "9^{9",
    ),
    *("_{", "!", "3!", "|", "%", "$", r"\frac{", r"\frac{1}{", r"\frac1", r"\sqrt", r"\sqrt[", r"\sqrt{2+"),
    *(
        r"\left(",
        r"\text{",
        r"\text{a} ",
        r"\pm",
        r"\boxed{",
        r"\boxed{1}",
        "\\boxed ",
        r"\fbox",
        r"\boxed  ",
    ),
    *(r"\cup", r"\in", ",", ";", "1,,", ", ", "x=1,", "and ", r"\begin{pmatrix}", "&", r"\binom{9}{"),
    *(r"\overline{", r"\sum_{k=1}^{", r"\mathrm", "cm ", "^{\\circ}", "'", "#### ", "####", "#### 1", "#"),
    *("<answer>", "</answer>", "<answer>1</answer>", "<think>", "</think>", "<", "<<", "Answer:", "Answer: "),
    *("answer \t", "answer:1\n", "```python\n", "```\n", "```python\n```\n", "```", "'''", '"""', '"'),
    *('```python\n"""\n```\n', "```python\n'''\n\\'''\n```\n", "```py\n#'''\n", "f'{", "lambda:", "not "),
    *("[0]*9**", "a.b", "def f():\n ", '{"a":', "[[", "[1,", '{"set": [', '{"int": "0x', "null,", "NaN "),
    *("1e999 ", ".5", "0." + "0" * 50),
]
BRACKETS = [("(", ")"), ("{", "}"), ("[", "]"), (r"\frac{", "}{2}"), ("<answer>", "</answer>")]
# For each verifier: frames with the delimiters that it searches for (@ is the text), and the data row.
FRAMES = {
    "arithmetic": (("@", "<answer>@</answer>", "<answer>@"), {"answer": 19}),
    "countdown": (("@", "<answer>@</answer>", "<answer>@ = 19</answer>"), {"numbers": [12, 7], "target": 19}),
    "format": (("@", "<think>@</think><answer>@</answer>"), {}),
    "gsm8k": (("@", "#### @", "#### 19@", r"\boxed{@}"), {"answer": "19"}),
    "math": (
        ("@", r"\boxed{@}", r"\boxed{19@}", r"\boxed{\text{@}}", "Answer: @"),
        {"answer": r"\frac{\sqrt{3}}{2}"},
    ),
    "code": (
        (*["@"] * 30, "```python\n@\n```", "```python\ns = '''\n@\n```\n'''\nprint(s)\n```"),
        {"tests": {"inputs": ["1"], "outputs": ["1"]}},
    ),
}
VERIFIERS = {
    "arithmetic": ("arithmetic", {}),
    "countdown": ("countdown", {}),
    "countdown, strict": ("countdown", {"strict": True}),
    "format": ("format", {}),
    "gsm8k": ("gsm8k", {}),
    "gsm8k, flexible": ("gsm8k", {"mode": "flexible"}),
    "math": ("math", {}),
    "math, answer_line": ("math", {"extract": "answer_line"}),
    "math, strict": ("math", {"mode": "strict"}),
    "code": ("code", {}),
}
OUTPUTS = ("1", "1.0", "3 4\n5", "0.5 " * 100)
RESULTS = (1, 1.5, "a", [1, 2], {1, 2}, {1: [2]}, None, b"a", 1j, [[[]]], {"a": {"b": 1}})

Judge = Callable[[random.Random, str], str]


def hostile(rng: random.Random, length: int) -> str:
    """Return a text of about `length` characters: one or several shapes repeated, or nested brackets."""
    if rng.random() < 0.2:
        opening, closing = rng.choice(BRACKETS)
        levels = 1 + length // len(opening + closing)
        text = opening * levels + rng.choice(["", "1", rng.choice(REPEATED)]) + closing * levels
    else:
        shapes = [rng.choice(REPEATED) for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 8]))]
        if rng.random() < 0.3:
            shapes = ["".join(shapes)]
        part = 1 + length // len(shapes)
        text = "".join((shape * (part // len(shape) + 1))[:part] for shape in shapes)
    return text[: length - 1] + rng.choice(["", "x", "\n", "}", "1"])


def judges() -> Iterator[tuple[str, Judge]]:
    """Yield each verifier and comparison with its name, as a function `(rng, text) -> outcome`."""

    def judge(verifier: str, options: dict) -> Judge:
        for module in rewards.VerifierSpec(verifier, options).descriptor.slow_imports:
            importlib.import_module(module)  # as a worker does before its first response
        verify, (frames, row) = rewards.get(verifier, **options), FRAMES[verifier]
        return lambda rng, text: verify(rng.choice(frames).replace("@", text), row).outcome

    for name, (verifier, options) in VERIFIERS.items():
        yield name, judge(verifier, options)
    yield "printed output", lambda rng, text: str(same_output(text, rng.choice(OUTPUTS)))
    yield "results", lambda rng, text: str(same_result(text.encode(errors="replace"), rng.choice(RESULTS)))


def judge_hostile(
    name: str, judge: Judge, items: int, seed: int, clock: Callable[[], float] = time.monotonic
) -> bool:
    """Judge hostile texts of up to 64 KB and print a line; return whether all were scored within the limit."""
    rng, outcomes, longest, worst = random.Random(f"{name} {seed}"), collections.Counter(), {}, (0.0, "")
    for _ in range(items):
        size = rng.choice([1, 4, 16, 64])
        text = hostile(rng, rng.randint(512 * size, 1024 * size))
        started = clock()
        try:
            outcome = judge(rng, text)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:100]
        seconds = clock() - started
        outcomes[outcome] += 1
        longest[size] = max(seconds, longest.get(size, 0.0))
        worst = max(worst, (seconds, text[:40]))
    times = ", ".join(f"{1000 * longest[size]:.1f} at {size} KB" for size in sorted(longest))
    print(f"{name:18} {dict(outcomes)}; at most {times} (ms); slowest {worst[1]!r}", flush=True)
    return outcomes.keys() <= SCORED and worst[0] < HOSTILE_LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--hostile", type=int, default=0, help="number of hostile texts for each verifier")
    parser.add_argument("--only", default="", help="run only verifiers whose name begins with this text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.hostile:
        some = [(name, judge) for name, judge in judges() if name.startswith(options.only)]
        kept = all([judge_hostile(name, judge, options.hostile, options.seed) for name, judge in some])
        print("kept" if kept else "NOT KEPT")
        return int(not kept)
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
