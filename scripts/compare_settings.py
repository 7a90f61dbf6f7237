"""Compare settings that should not change what a run learns: paired runs, and the differences of their scores.

    python scripts/compare_settings.py configs/compare_countdown_micro.yaml OUTPUT --seeds 0,1,2,3,4 \\
        int8=--sampling.kv_dtype=int8 fp8=--sampling.kv_dtype=fp8 bfloat16=--optimizer.state=bfloat16

The first setting, `plain`, is the config itself; every argument adds one, as LABEL=OVERRIDE[,OVERRIDE...]. All runs
begin with the model of one supervised warm start. Runs of the same seed have the same prompts and random numbers.
`--set` overrides a key for all of them (`--set=--training.steps=24`).

Prints, for every setting, held-out pass@1 at the end and its mean over the evaluations, the difference from `plain`
with its 95% interval (over seeds and problems, `lpo_jax.compare.table`), and the gap between the log-probs of sampler
and trainer. Finished runs are kept: the command may be repeated.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from lpo_jax.compare.grid import cell_base_config, warm_config
from lpo_jax.compare.table import Outcome, estimate_mean, measures, read_outcome
from lpo_jax.config import Config, load_config, override_config
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training.loop import train
from lpo_jax.training.sft import sft

PLAIN = "plain"
SCORES = ("final pass@1", "mean pass@1")


def outcome_of(config: Config) -> Outcome:
    """Run a config unless it has been run, and read its outcome."""
    run = Path(config.output)
    found = Outcome.load(run)
    if found is None:
        train(config, resume=True)
        found = read_outcome(run)
        found.save(run)
    return found


def gap_of(run: str) -> tuple[float, float]:
    """The log-prob gap of a run: mean over steps of the mean, and the largest."""
    rows = [row for row in read_metrics(run) if "lpo/logp_gap_max" in row]
    mean = float(np.mean([row["lpo/logp_gap_mean"] for row in rows]))
    return mean, max(row["lpo/logp_gap_max"] for row in rows)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("output")
    parser.add_argument("settings", nargs="+", metavar="LABEL=OVERRIDE,...")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--set", action="append", default=[], metavar="OVERRIDE")
    arguments = parser.parse_args()
    settings = {PLAIN: []}
    settings |= {label: text.split(",") for label, _, text in (x.partition("=") for x in arguments.settings)}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]

    config = load_config(arguments.config, [*arguments.set, f"--output={arguments.output}"])
    warm = warm_config(config)
    if config.warm_start.steps and not (Path(warm.output) / "hf").exists():
        sft(warm, resume=True)
        load_run(warm.output, "latest")[0].save(Path(warm.output) / "hf")
    base = cell_base_config(config)
    values: dict[str, list[dict[str, np.ndarray]]] = {label: [] for label in settings}
    gaps: dict[str, list[tuple[float, float]]] = {label: [] for label in settings}
    for seed in seeds:
        for label, overrides in settings.items():
            run = dataclasses.replace(base, output=f"{arguments.output}/cells/{label}-seed{seed}", seed=seed)
            outcome = outcome_of(override_config(run, overrides))
            values[label].append(measures(outcome, int(outcome.valid.max())))
            gaps[label].append(gap_of(run.output))
    print(f"{len(seeds)} seeds, {outcome.passed.shape[1]} problems; percentage points, 95% intervals")
    for label, found in values.items():
        parts = []
        for name in SCORES:
            score = 100 * float(np.mean([one[name].mean() for one in found]))
            of = estimate_mean(
                np.stack([one[name] - plain[name] for one, plain in zip(found, values[PLAIN])])
            )
            difference = f" ({100 * of.mean:+.1f}, {100 * of.low:+.1f} to {100 * of.high:+.1f})"
            parts.append(f"{name} {score:.1f}" + difference * (label != PLAIN))
        mean, largest = np.mean([gap[0] for gap in gaps[label]]), max(gap[1] for gap in gaps[label])
        print(f"{label}: {'; '.join(parts)}; log-prob gap mean {mean:.2g}, max {largest:.2g}")


if __name__ == "__main__":
    main()
