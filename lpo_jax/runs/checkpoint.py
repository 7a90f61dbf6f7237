"""Checkpoints: everything that a run needs to continue exactly, saved by Orbax.

A checkpoint holds the train state (parameters, optimizer), a JSON record (step, state of the data iterator, hooks,
rounds in flight, best score so far) and the checksums of its files. Orbax writes to a temporary directory, which is
renamed to a checkpoint once all files are on the disk. The latest few checkpoints and the best by held-out score are
kept. The scores are in a separate file, because a step may be saved before it is evaluated.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.models import decoder, load_config_and_tokenizer, load_weights, lora
from lpo_jax.models.placement import current_shardings, placed
from lpo_jax.parallel import hosts
from lpo_jax.runs import checksums
from lpo_jax.runs.directory import checkpoint_directory, read_config
from lpo_jax.sampling.model import Model, load_model
from lpo_jax.types import Json, PyTree

SCORES = "scores.json"


class Checkpoints:
    """The checkpoints of one run. In a job of many hosts, every host has one, and all save and restore together.

    Raises:
      UserError: the directory cannot be read or written, or some hosts do not see it.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, read_only: bool = False):
        # Orbax logs every save, and the traceback of each of its threads that fails; failures are raised anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.directory, self._keep = epath.Path(directory), keep
        self._intact: set[int] = set()
        if hosts.many() and not read_only:
            self._check_shared()
        with _one_line(f"{self.directory}: cannot be used for checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=self._options(read_only),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
            self._scores = hosts.on_first(self._read_scores)

    def _options(self, read_only: bool) -> ocp.CheckpointManagerOptions:
        return ocp.CheckpointManagerOptions(
            preservation_policy=self,
            temporary_path_class=checksums.temporary_path(self.directory),
            # Otherwise the writing threads wait five minutes for a thread that could not create the directory.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            lightweight_initialize=True,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.wait()
        except RunStopped:
            with contextlib.suppress(Exception):  # it waits again for the failed save
                self._manager.close()
            if kind is None:  # do not hide an error that is already being raised
                raise
        else:
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the best held-out pass@1 (of equals the earliest); the latest without scores."""
        best = self._best_of(self.steps())
        return self.latest() if best is None else best

    def save(self, step: int, state: Json, record: dict[str, Json], score: float | None = None) -> bool:
        """Save in the background, after waiting for the previous save. Returns False if the step is already saved.

        Only the score of a saved step is updated, because it may have been saved before it was evaluated.

        Raises:
          RunStopped: the checkpoint could not be written. Earlier checkpoints are intact.
        """
        with self._explained(step):
            self._manager.wait_until_finished()
            self._note_score(step, score)
            if step in self._manager.all_steps():
                return False
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                force=True,
            )
        return True

    def wait(self) -> None:
        """Wait until the last save is on the disk. Raises `RunStopped` if it failed."""
        with self._explained(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def check(self) -> None:
        """Raise `RunStopped` if the save in the background has failed."""
        if not self._manager.is_saving_in_progress():  # `wait` would block
            self.wait()

    def record(self, step: int) -> dict[str, Json]:
        """Read the JSON record of a checkpoint.

        Raises (like `restore` and `restore_params`):
          UserError: the checkpoint is damaged or cannot be read.
        """
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
                "record"
            ]

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Restore the train state, with the shardings of the abstract one, or on the default device."""
        restored = ocp.args.Composite(state=ocp.args.StandardRestore(_somewhere(abstract_state)))
        with self._reading(step):
            return self._manager.restore(step, args=restored)["state"]

    def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
        """Restore the parameters only, without reading the optimizer state."""
        item = {"params": _somewhere(abstract_params)}
        arguments = jax.tree.map(lambda p: ocp.ArrayRestoreArgs(dtype=p.dtype, sharding=p.sharding), item)
        with self._reading(step):
            restored = ocp.PyTreeCheckpointHandler().restore(
                self._path(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
            )
            return restored["params"]

    def should_preserve(self, checkpoints: Sequence[PyTree], *, context: PyTree) -> list[bool]:
        """Called by Orbax: keep the latest few checkpoints, and the best."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _best_of(self, steps: Iterable[int]) -> int | None:
        scored = [step for step in steps if step in self._scores]
        return max(scored, key=lambda step: (self._scores[step], -step), default=None)

    def _read_scores(self) -> dict[int, float]:
        path = self.directory / SCORES
        if not path.exists():
            return {}
        return {int(step): score for step, score in json.loads(checksums.read_checked(path)).items()}

    def _note_score(self, step: int, score: float | None) -> None:
        if score is None or not math.isfinite(score) or self._scores.get(step) == score:
            return
        there = self._manager.all_steps()
        self._scores = {s: old for s, old in self._scores.items() if s in there} | {step: score}
        if hosts.is_first():
            checksums.write_checked(self.directory / SCORES, json.dumps(self._scores))

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _compare(self, step: int) -> None:
        """Compare a checkpoint with its checksums, once per process.

        Raises:
          UserError: it is damaged. The message names the newest intact checkpoint before it, or else one after it.
        """
        if step in self._intact:
            return
        problem = checksums.damage(self._path(step))
        if problem is None:
            self._intact.add(step)
            return
        others = sorted((s for s in self.steps() if s != step), key=lambda s: (s > step, -s))
        intact = next((s for s in others if checksums.damage(self._path(s)) is None), None)
        damaged = shlex.quote(str(self._path(step)))
        move = "gcloud storage mv" if damaged.startswith("gs://") else "mv"
        raise UserError(
            f"{self._path(step)}: the checkpoint of step {step} is damaged: {problem}; "
            + (
                "no other checkpoint is intact"
                if intact is None
                else f"the checkpoint of step {intact} is intact; to go on from it, move the damaged one out of the "
                f"way: {move} {damaged} {damaged}.damaged"
            )
        )

    @contextlib.contextmanager
    def _reading(self, step: int):
        with _one_line(f"{self._path(step)}: the checkpoint of step {step} cannot be read"):
            self._compare(step)
            yield

    def _check_shared(self) -> None:
        """Check that every host sees the directory of the first, because each writes a part of a checkpoint."""
        mark = self.directory / ".seen-by-all-hosts"

        def make() -> None:
            with _one_line(f"{self.directory}: cannot be used for checkpoints"):
                self.directory.mkdir(parents=True, exist_ok=True)
                mark.write_text("")

        hosts.on_first(make)
        seen = hosts.gather(mark.exists())
        hosts.on_first(lambda: mark.unlink())
        if not all(seen):
            raise UserError(
                f"{self.directory}: host {seen.index(False)} of {len(seen)} does not see this directory of the first "
                "one; set checkpoint.directory to a place that all share, such as gs://..."
            )

    @contextlib.contextmanager
    def _explained(self, step: int | None):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            what = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
            raise RunStopped(
                f"{what} could not be saved in {self.directory}: {_reason(error)}; {self._kept(step)}; "
                "mend the disk or free space on it, and --resume"
            ) from error

    def _kept(self, step: int | None) -> str:
        try:
            names = [path.name for path in self.directory.iterdir() if (path / checksums.NAME).exists()]
        except OSError as error:
            return f"those before it cannot be read at the moment ({error.strerror or error})"
        good = [int(name) for name in names if name.isdigit() and int(name) != step]
        return f"the one of step {max(good)} is intact" if good else "there is none before it"


def load_run(run: str | Path, checkpoint: str = "best") -> tuple[Model, int]:
    """Load the model of a run's checkpoint with merged adapters; returns it and its step.

    Args:
      run: a run directory.
      checkpoint: "best" by held-out score, "latest", or a step.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    config = read_config(run)
    directory, name = checkpoint_directory(dataclasses.replace(config, output=str(run))), config.model.path
    adapters, frozen_dtype = lora.configured(config.model.lora), config.model.frozen_dtype
    with (
        Checkpoints(directory, read_only=True)
        if directory.is_dir()
        else contextlib.nullcontext() as checkpoints
    ):
        steps = checkpoints.steps() if checkpoints else []
        if not steps:
            raise UserError(f"{run}: no complete checkpoint in it yet")
        known = {"best": checkpoints.best(), "latest": checkpoints.latest()} | {str(s): s for s in steps}
        if checkpoint not in known:
            raise UserError(f"{run}: no checkpoint {checkpoint!r}; there are {', '.join(known)}")
        model_config, tokenizer, eos_ids = load_config_and_tokenizer(
            name, config.model.init == "weights", config.model.template_arguments
        )
        step = known[checkpoint]
        trained = (
            lora.abstract_params(model_config, adapters)
            if adapters is not None
            else decoder.abstract_params(model_config)
        )
        freezes = lora.freezes_tower(config.model, model_config)
        if freezes:
            del trained["vision"]
        params = checkpoints.restore_params(step, placed(model_config, trained))
    if adapters is not None:
        base = load_weights(name, frozen_dtype, current_shardings(model_config))
        params = lora.merge_adapters(lora.with_adapters(lora.Frozen(base, adapters.scale), params))
    if freezes:
        whole = load_weights(name, frozen_dtype, current_shardings(model_config))
        params = {**params, "vision": whole["vision"]}
    return Model(model_config, params, tokenizer, eos_ids), step


def load_model_or_run(name: str) -> Model:
    """Load a model by its name, or the best checkpoint of a run directory."""
    if (Path(name) / "run.json").is_file():
        return load_run(name)[0]
    return load_model(name)


@contextlib.contextmanager
def _one_line(what: str):
    """Turn exceptions of libraries into one-line errors, except those about a lost process or device."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of Orbax, TensorStore or the file system
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _somewhere(abstract: PyTree) -> PyTree:
    """Set a device where there is no sharding: Orbax would restore to the saved devices, which may not exist."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)  # noqa: E731
    return jax.tree.map(place, abstract)
