"""Checkpoints: everything a run needs to go on as if it had never stopped, by Orbax.

One checkpoint holds the train state (parameters, optimizer) and a JSON record: step, random state, data
iterator state, config, data hash, best score so far. Orbax writes to a temporary name and renames, so a
half-written checkpoint is never seen; the latest few and the best by held-out pass@1 are kept.
"""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.models import Model, decoder, load_config_and_tokenizer, load_model, load_weights, lora
from lpo_jax.models.sharding import current_shardings, placed
from lpo_jax.scale import hosts
from lpo_jax.training.run import checkpoint_directory, read_config

SCORE = "pass@1"


class Checkpoints:
    """The checkpoints of one run. With many hosts all of them make one, and save and restore together.

    Raises:
      UserError: several hosts, and not all of them see the directory.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO and WARNING
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed save comes as an exception anyway
        self.directory = epath.Path(directory)
        if hosts.many() and not read_only:
            self._check_shared()
        best = BestN(
            get_metric_fn=lambda metrics: metrics[SCORE], n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=lambda metrics: metrics[SCORE],
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Another error is already on its way up: a failing close must not hide it.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the best held-out pass@1; the latest when none was evaluated."""
        best = self._manager.best_step()
        return self.latest() if best is None else best

    def save(self, step: int, state: Any, record: dict[str, Any], score: float | None = None) -> None:
        """Saves in the background; waits for the save before it. A step that is already saved is left alone.

        Raises:
          RunStopped: the disk would not take it. The checkpoints before it are as good as they were.
        """
        if step in self._manager.all_steps():
            return
        with self._explained(step):
            self._manager.wait_until_finished()
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                metrics=None if score is None else {SCORE: score},
                force=True,
            )

    def wait(self) -> None:
        """Returns when the last save is on the disk, or raises `RunStopped` if it is not."""
        with self._explained(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The train state of a checkpoint, where the abstract one's shardings say, or on the default device."""
        restored = ocp.args.Composite(state=ocp.args.StandardRestore(_somewhere(abstract_state)))
        return self._manager.restore(step, args=restored)["state"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone: the optimizer's arrays are not read."""
        item = {"params": _somewhere(abstract_params)}
        arguments = jax.tree.map(lambda p: ocp.ArrayRestoreArgs(dtype=p.dtype, sharding=p.sharding), item)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
            )
        return restored["params"]

    def _check_shared(self) -> None:
        """Every host writes its part of a checkpoint, so that each must see what the first one made."""
        mark = self.directory / ".seen-by-all-hosts"

        def make() -> None:
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
            good = [s for s in self._manager.all_steps(read=True) if s != step]
            kept = f"the one of step {max(good)} is intact" if good else "there is none before it"
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise RunStopped(
                f"{what} could not be saved in {self.directory}: {reason}; {kept}; free space and --resume"
            ) from error


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
        params = lora.merge(lora.join(lora.Frozen(base, adapters.scale), params))
    return Model(config, params, tokenizer, eos_ids), step


def load_model_or_run(name: str) -> Model:
    """A model by its string, or the best checkpoint of a run directory."""
    if (Path(name) / "run.json").is_file():
        return load_run(name)[0]
    return load_model(name)


def _somewhere(abstract: Any) -> Any:
    """Orbax would restore to the devices that saved, which may not be there any more."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)  # noqa: E731
    return jax.tree.map(place, abstract)
