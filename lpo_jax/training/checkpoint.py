"""Checkpoints: everything a run needs to go on as if it had never stopped, by Orbax.

One checkpoint holds the train state (parameters, optimizer) and a JSON record: step, random state, data
iterator state, config, data hash, best score so far. Orbax writes to a temporary name and renames, so a
half-written checkpoint is never seen; the latest few and the best by held-out pass@1 are kept.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lpo_jax.errors import RunStopped, UserError

SCORE = "pass@1"


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO and WARNING
        self.directory = Path(directory).absolute()
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
        """The train state (or any subtree that `abstract_state` names), placed as it says."""
        restored = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=restored)["state"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone: the optimizer's arrays are not read."""
        path = self.directory / str(step) / "state"
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={"params": abstract_params},
                    restore_args=jax.tree.map(
                        lambda p: ocp.ArrayRestoreArgs(dtype=p.dtype, sharding=getattr(p, "sharding", None)),
                        {"params": abstract_params},
                    ),
                    partial_restore=True,
                ),
            )
        return restored["params"]

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


def open_for_reading(run: str | Path) -> Checkpoints:
    """The checkpoints of a run directory, for `eval`, `export` and loading a model.

    Raises:
      UserError: no such run, or nothing saved in it yet.
    """
    directory = Path(run) / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{run}: not a run directory (no checkpoints in it)")
    checkpoints = Checkpoints(directory, read_only=True)
    if checkpoints.latest() is None:
        raise UserError(f"{run}: no complete checkpoint in it yet")
    return checkpoints
