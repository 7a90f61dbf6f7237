"""Checkpoints: everything a run needs to go on as if it had never stopped, by Orbax.

One checkpoint holds the train state (parameters, optimizer), a JSON record (step, random state, data iterator
state, hooks, best score so far) and the checksums of its files. Orbax writes to a temporary name, which becomes a
checkpoint only when all of it is on the disk; the latest few and the best by held-out pass@1 are kept. The scores
are in a file beside the checkpoints, because a step may be saved before it is evaluated.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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

SCORES = "scores.json"


class Checkpoints:
    """The checkpoints of one run. With many hosts all of them make one, and save and restore together.

    Raises:
      UserError: the directory cannot be read or written, or several hosts do not all see it.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, read_only: bool = False):
        # Orbax narrates every save, and logs the traceback of each of its threads that fails; what went wrong
        # comes as an exception anyway.
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
            # Else the threads that write wait five minutes for the one that could not create the directory.
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
            with contextlib.suppress(Exception):  # it waits once more for the save whose failure is known
                self._manager.close()
            if kind is None:  # else another error is already on its way up, which this one must not hide
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
        """Step of the checkpoint with the best held-out pass@1, the earliest of equals; the latest when none was
        evaluated."""
        best = self._best_of(self.steps())
        return self.latest() if best is None else best

    def save(self, step: int, state: Any, record: dict[str, Any], score: float | None = None) -> bool:
        """Saves in the background; waits for the save before it. Returns whether there was anything to save.

        A step that is already saved is left alone, but for its score: it may have been saved before it was
        evaluated.

        Raises:
          RunStopped: the disk would not take it. The checkpoints before it are as good as they were.
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
        """Returns when the last save is on the disk, or raises `RunStopped` if it is not."""
        with self._explained(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def check(self) -> None:
        """Raises `RunStopped` if the save that goes on in the background has failed by now."""
        if not self._manager.is_saving_in_progress():  # else it would be waited for
            self.wait()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint.

        Raises (as `restore` and `restore_params` do):
          UserError: the checkpoint is damaged or cannot be read.
        """
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
                "record"
            ]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The train state of a checkpoint, where the abstract one's shardings say, or on the default device."""
        restored = ocp.args.Composite(state=ocp.args.StandardRestore(_somewhere(abstract_state)))
        with self._reading(step):
            return self._manager.restore(step, args=restored)["state"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone: the optimizer's arrays are not read."""
        item = {"params": _somewhere(abstract_params)}
        arguments = jax.tree.map(lambda p: ocp.ArrayRestoreArgs(dtype=p.dtype, sharding=p.sharding), item)
        with self._reading(step):
            restored = ocp.PyTreeCheckpointHandler().restore(
                self._path(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
            )
            return restored["params"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which checkpoints to keep: the latest few, and the best."""
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
        """Compares a checkpoint with its checksums, once.

        Raises:
          UserError: it is damaged; the message names the newest intact one before it, or else after it.
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
        """Every host writes its part of a checkpoint, so that each must see what the first one made."""
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
    """The model of a run's checkpoint, adapters merged, and the step it was saved at.

    Args:
      run: a run directory.
      checkpoint: "best" by held-out pass@1, "latest", or a step.

    Raises:
      UserError: no such run or checkpoint.
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
        config, tokenizer, eos_ids = load_config_and_tokenizer(
            name, config.model.init == "weights", config.model.template_arguments
        )
        step = known[checkpoint]
        trained = (
            lora.abstract_params(config, adapters)
            if adapters is not None
            else decoder.abstract_params(config)
        )
        params = checkpoints.restore_params(step, placed(config, trained))
    if adapters is not None:
        base = load_weights(name, frozen_dtype, current_shardings(config))
        params = lora.merge_adapters(lora.with_adapters(lora.Frozen(base, adapters.scale), params))
    return Model(config, params, tokenizer, eos_ids), step


def load_model_or_run(name: str) -> Model:
    """A model by its string, or the best checkpoint of a run directory."""
    if (Path(name) / "run.json").is_file():
        return load_run(name)[0]
    return load_model(name)


@contextlib.contextmanager
def _one_line(what: str):
    """Turns what a library raises about a file into one line; a lost process or device stays what it is."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of Orbax, TensorStore or the file system, for whatever a damaged file holds
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _somewhere(abstract: Any) -> Any:
    """Orbax would restore to the devices that saved, which may not be there any more."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)  # noqa: E731
    return jax.tree.map(place, abstract)
