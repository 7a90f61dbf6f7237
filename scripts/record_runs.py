"""Record the metrics of runs that are sick in one way each, and of healthy ones, for the tests of the run doctor.

    python scripts/record_runs.py [NAME ...]

A tiny model learns to answer with the right number of sevens. Each run changes one thing, in the verifier or in the
config. `tests/reporting/golden/runs/NAME.jsonl` keeps the metrics that the doctor reads.
"""

import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for tiny.py

from tiny import CONFIG, character_tokenizer, run_values  # noqa: E402

from lpo_jax.config import parse_config  # noqa: E402
from lpo_jax.errors import RunStopped  # noqa: E402
from lpo_jax.models import hf, runner  # noqa: E402
from lpo_jax.models.decoder import init_params  # noqa: E402
from lpo_jax.models.packing import full_layout  # noqa: E402
from lpo_jax.parallel.sharding import batch_shards  # noqa: E402
from lpo_jax.reporting import doctor, read_metrics  # noqa: E402
from lpo_jax.rollout.environment import Environment  # noqa: E402
from lpo_jax.training.loop import train  # noqa: E402

ALSO = ("step", "critic/score/min", "critic/score/max")
TARGET = ROOT / "tests" / "reporting" / "golden" / "runs"

TASK = '''
import time
from lpo_jax.rewards import Verdict

def dataset(split):
    first, count = {"train": (0, 48), "heldout": (100, 48)}[split]
    return [{"n": n, "answer": "7" * (1 + n % 4)} for n in range(first, first + count)]

def prompt(row):
    return f"say {row['n']} "

def solution(row):
    return row["answer"]

def exact(response, row):
    """1 for the answer; less the more characters differ."""
    answer = row["answer"]
    same = sum(a == b for a, b in zip(response, answer)) / max(len(response), len(answer), 1)
    return Verdict(same, "pass" if response == answer else "wrong")

def verify(response, row):
    return VERIFY
'''

# name: (value of the verifier, changes of the config by section)
RUNS = {
    "healthy": ("exact(response, row)", {}),
    "healthy-gspo": (
        "exact(response, row)",
        {"objective": {"name": "gspo"}, "training": {"updates_per_step": 2}},
    ),
    "masked-responses": ("exact(response, row) if len(response) % 3 else 1 / 0", {}),
    "truncated-responses": ("exact(response, row)", {"warm_start": {"steps": 0}}),
    "groups-without-signal": ("Verdict(0.0, 'wrong')", {}),
    "entropy-collapse": (
        "Verdict(float(response[:1] == '7'), 'wrong')",
        {"optimizer": {"learning_rate": 3e-2}, "training": {"steps": 40}},
    ),
    "repetition": (
        "Verdict(response.count('7') / 16, 'pass' if len(response) > 15 else 'wrong')",
        {"sampling": {"max_tokens": 16}, "training": {"steps": 40}},
    ),
    "reward-without-passes": (
        "Verdict(len(response) / 8, exact(response, row).outcome)",
        {"training": {"steps": 40}},
    ),
    "heldout-falls": (
        "Verdict(len(response) / 8, exact(response, row).outcome)",
        {"training": {"steps": 16, "updates_per_step": 4}, "optimizer": {"learning_rate": 5e-3}},
    ),
    "sampler-gap": ("exact(response, row)", {}),
    "gradient-spike": (
        "Verdict(exact(response, row).reward * (300 if row['n'] == 7 else 1), exact(response, row).outcome)",
        {"objective": {"name": "dr-grpo"}},
    ),
    "nonfinite-gradients": ("exact(response, row)", {"optimizer": {"learning_rate": 1e30, "clip_norm": 0.0}}),
    "unreachable-pass": ("0.9 * exact(response, row).reward", {}),
    "slow-verifier": ("time.sleep(0.02) or exact(response, row)", {"training": {"steps": 8}}),
    "zero-learning-rate": ("exact(response, row)", {"optimizer": {"learning_rate": 0.0}}),
}


@contextlib.contextmanager
def drifting_sampler():
    """A fault of the program itself: weights for sampling that drift away from the trained ones."""
    prepare, calls = Environment.prepare, []

    def drifting(self, params):
        calls.append(1)
        return prepare(self, jax.tree.map(lambda x: x * (1 + 0.02 * len(calls)), params))

    with mock.patch.object(Environment, "prepare", drifting):
        yield


def record(name: str, folder: Path, model: Path) -> None:
    """Train one run and write its metrics."""
    verifier, changes = RUNS[name]
    task = folder / f"{name}.py"
    task.write_text(TASK.replace("VERIFY", verifier))
    values = run_values(folder / name, model, task)
    base = {
        "sampling": {"num_responses": 8, "max_tokens": 8},
        "training": {"steps": 24, "updates_per_step": 1, "prompts_per_step": 8, "save_plots": False},
        "optimizer": {"learning_rate": 2e-3},
        "evaluation": {"every": 8, "problems": 48},
        "checkpoint": {"every": 0},
        "warm_start": {"steps": 30, "batch_size": 32, "learning_rate": 1e-2},
    }
    for sections in (base, changes):
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
    fault = drifting_sampler() if name == "sampler-gap" else contextlib.nullcontext()
    with contextlib.suppress(RunStopped), fault:
        train(parse_config(values))
    read = re.compile("|".join(re.findall(r'"([a-z_]+/[a-z_/]+)"', Path(doctor.__file__).read_text())))
    rows = [
        {key: row[key] for key in row if key in ALSO or read.fullmatch(key) or "/score/" in key}
        for row in read_metrics(values["output"])
    ]
    rows = [row for row in rows if len(row) > 1]
    lines = (
        json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
        for row in rows
    )
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    print(f"{name}: {', '.join(d.name for d in doctor.diagnose(rows)) or 'nothing'}")


def one_layout(self, groups, mask, *, rounded=False):
    """A layout that does not depend on the sampled lengths, so that one program serves all steps."""
    P, K, T = mask.shape
    return groups.replace(
        layout=full_layout(P, K, groups.prompts.shape[1], T, self.token_budget, batch_shards())
    )


def main(names: list[str]) -> None:
    """Record the named runs, or all of them."""
    patched = mock.patch.object(runner.ModelRunner, "pack", one_layout)
    with tempfile.TemporaryDirectory() as held, patched:
        folder = Path(held)
        params = init_params(CONFIG, jax.random.key(0))
        hf.save_hf(folder / "tiny", CONFIG, params, character_tokenizer())
        for name in names or RUNS:
            record(name, folder, folder / "tiny")


if __name__ == "__main__":
    main(sys.argv[1:])
