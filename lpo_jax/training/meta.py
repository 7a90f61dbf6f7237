"""`lpo meta`: learns the mirror map of GBMPO by evolution. Every candidate is a whole training run of the config.

All candidates start from the same model with the same random numbers, so that they differ only in their maps. The
search is saved after each candidate, and a candidate's run can be resumed, too: a search that is killed at any moment
and resumed has the same result.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath

from lpo_jax import reporting
from lpo_jax.config import Config, MetaSection
from lpo_jax.errors import Diverged, UserError
from lpo_jax.files import cannot_write
from lpo_jax.objectives import evolution
from lpo_jax.objectives.evolution import Evolution
from lpo_jax.objectives.mirror import NeuralMirror, initial_map
from lpo_jax.parallel import hosts
from lpo_jax.reporting.writers import METRICS_FILE
from lpo_jax.runs.checksums import read_checked, write_checked
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.training.check import check_config
from lpo_jax.training.loop import train
from lpo_jax.training.mirror_file import write_map


def meta(config: Config, *, resume: bool = False, fitness: Callable[[Config], float] | None = None) -> None:
    """Run `lpo meta`.

    Writes to `config.output`: mirror.json (the map learnt so far, for `objective.mirror`), metrics.jsonl (one row per
    round), maps/ and runs/ (each candidate's map and run, without its checkpoints).

    Args:
      fitness: computes the fitness of a candidate's config; by default `run_candidate`.

    Raises:
      UserError: as `lpo_jax.training.loop.train`, or the method has no mirror map, or the search cannot be saved.
      RunStopped: a candidate's run could not be saved.
      Interrupted: SIGTERM or Ctrl-C; the search is saved, and so is the candidate's run.
    """
    mirror = mirror_of(config)
    if hosts.many():
        raise UserError("lpo meta: a search runs on one host; start it once, not on every host of a job")
    console = reporting.console()
    with RunDirectory(config, "meta", resume) as run, reporting.RunWriter(run.path) as writer:
        phi = mirror.mirror or initial_map(mirror.mirror_seed)
        search = Search.load(run.path) or Search(evolution.start_search(phi))
        if not search.file(run.path).exists() and (run.path / METRICS_FILE).exists():
            raise UserError(
                f"{run.path}: metrics.jsonl holds rounds of a search, but {search.file(run.path)} is not there; put it "
                "back, or search anew with another --output=..."
            )
        writer.truncate_after(len(search.state.history))
        while not finished(search.state, config.meta):
            number, before = len(search.state.history) + 1, search.state
            sigma = evolution.deviation(before, config.meta.sigma, config.meta.decay)
            noise = evolution.new_noise(before, config.meta.population, config.seed)
            for i in range(len(search.fitness), len(noise)):
                worth = (fitness or run_candidate)(
                    candidate(config, number, i, before.phi + sigma * noise[i])
                )
                search.fitness.append(worth)
                search.save(run.path)
                shutil.rmtree(candidate_output(config, number, i) / "checkpoints", ignore_errors=True)
                console.print(f"round {number}, candidate {i + 1}/{len(noise)}: held-out pass@1 {worth:.1%}")
            search.state = evolution.advance(before, noise, search.fitness, sigma, config.meta.alpha)
            writer.write(number, round_metrics(before, search, sigma))
            write_map(run.path / "mirror.json", search.state.phi)
            search.fitness = []
            search.save(run.path)
        console.print(
            f"{len(search.state.history)} rounds; mean held-out pass@1 of the best {search.state.best:.1%}; train with "
            f"the map by --objective.mirror={run.path}/mirror.json"
        )


def finished(state: Evolution, settings: MetaSection) -> bool:
    """Whether the last round is finished."""
    stalled = evolution.stalled(state, settings.patience, settings.min_delta)
    return stalled or len(state.history) >= settings.iterations


@dataclasses.dataclass
class Search:
    """The saved state: the evolution, and the fitness of this round's candidates so far."""

    state: Evolution
    fitness: list[float] = dataclasses.field(default_factory=list)

    @staticmethod
    def file(output: Path) -> Path:
        # In checkpoints/, which distinguishes a run that has begun from one that failed at once.
        return output / "checkpoints" / "search.json"

    def save(self, output: Path) -> None:
        """Save the search atomically, with its checksum."""
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self.state).items()}
        path = epath.Path(self.file(output))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checked(path, json.dumps(plain | {"fitness": self.fitness}))
        except OSError as error:
            raise cannot_write(path, error) from None

    @classmethod
    def load(cls, output: Path) -> "Search | None":
        """Load the saved search; None in a fresh run. Raises `UserError` if it is damaged."""
        if not cls.file(output).exists():
            return None
        held = json.loads(read_checked(epath.Path(cls.file(output))))
        phi = np.array(held["phi"])
        noise = np.array(held["carried_noise"]).reshape(-1, len(phi))
        state = Evolution(phi, noise, np.array(held["carried_fitness"]), tuple(held["history"]))
        return cls(state, held["fitness"])


def mirror_of(config: Config) -> NeuralMirror:
    """Return the part of the config's method that is learnt. Raises `UserError` if there is none."""
    parts = check_config(config).parts
    mirror = next((part for part in parts if isinstance(part, NeuralMirror)), None)
    if mirror is None:
        raise UserError(
            f"objective.name = {config.objective['name']}: has no mirror map to learn; "
            "set --objective.name=gbmpo-mirror"
        )
    if not mirror.mirror_coef:
        raise UserError("objective.mirror_coef is 0: the mirror map would change nothing")
    return mirror


def candidate_output(config: Config, number: int, i: int) -> Path:
    """Return the run directory of candidate i of a round."""
    return Path(config.output) / "runs" / f"{number:02d}-{i:02d}"


def candidate(config: Config, number: int, i: int, phi: np.ndarray) -> Config:
    """Return the config of one candidate's run, and write its map to a file."""
    path = Path(config.output) / "maps" / f"{number:02d}-{i:02d}.json"
    write_map(path, phi)
    objective = config.objective | {"mirror": str(path)}
    output = str(candidate_output(config, number, i))
    checkpoint = dataclasses.replace(config.checkpoint, directory="auto")  # temporary ones
    return dataclasses.replace(config, output=output, objective=objective, checkpoint=checkpoint)


def run_candidate(config: Config) -> float:
    """Train or resume the run; returns the final held-out pass@1, or 0 if the run diverged."""
    try:
        train(config, resume=True)
    except Diverged:
        return 0.0
    finally:
        # Each map compiles another program; hundreds of them would exhaust the memory maps of the process.
        jax.clear_caches()
    rows = (row.items() for row in reversed(reporting.read_metrics(config.output)))
    scores = (v for row in rows for k, v in row if k.startswith("val-core/") and "/acc/mean@" in k)
    return float(next(scores))


def round_metrics(before: Evolution, search: Search, sigma: float) -> dict[str, float]:
    """Return the metrics of a finished round."""
    tried = np.concatenate([before.carried_fitness, search.fitness])
    after = search.state
    return {
        "meta/fitness/mean": after.history[-1],
        "meta/fitness/max": tried.max(),
        "meta/fitness/min": tried.min(),
        "meta/accepted": float(after.history[-1] > before.best),
        "meta/best": after.best,
        "meta/sigma": sigma,
        "meta/step_norm": float(np.linalg.norm(after.phi - before.phi)),
    }
