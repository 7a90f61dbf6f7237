"""A run directory: who may write to it, what it was started with, and how a signal ends it."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
from etils import epath

from lpo_jax.config import Config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.files import LOCK, lock_directory, write_file
from lpo_jax.json_lines import read_object
from lpo_jax.parallel import hosts
from lpo_jax.rewards.user_code import file_hash, split_reference
from lpo_jax.types import Json, PyTree
from lpo_jax.yaml_text import dump_yaml, read_yaml

PACKAGES = ("lpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

# Files of a start whose first files did not fit on the disk. They are no run yet, so that it may be started again.
LEFTOVERS = (LOCK, "run.json.tmp", "run.json", "config.yaml.tmp")
SAVED = "checkpoints"  # in run.json: the first step saved, and where
VERIFIER_FAILED = "verifier_failed"  # in run.json: the last start ended because of its verifier

# A resumed run must compute the same as an uninterrupted one, so that these settings must not change between starts.
# Others (steps, evaluation, checkpoints, workers, token budget) may change.
_BOTH = ("seed", "model", "task", "sampling", "optimizer")
_SCORE = "evaluation.score"  # positions compare it with earlier ones
_ROUND = ("training.prompts_per_step", "training.updates_per_step", "training.behaviour")
_FITNESS = tuple(f"evaluation.{key}" for key in ("problems", "num_responses", "temperature", "top_p"))
_SEARCH = ("meta.population", "meta.sigma", "meta.decay", "meta.alpha")
FIXED = {
    "train": (*_BOTH, "objective", "warm_start", *_ROUND, _SCORE),
    "sft": (*_BOTH, _SCORE, "warm_start.batch_size", "warm_start.learning_rate"),
    "meta": (*_BOTH, "objective", "warm_start", *_ROUND, "training.steps", *_FITNESS, *_SEARCH),
    "compare": (*_BOTH, "warm_start", *_ROUND, "training.steps", "evaluation"),
}


class RunDirectory:
    """`config.output`, to which only this process writes (in a job of many hosts, the first one).

    The constructor only checks, so that a mistake found while the model loads leaves no files. Entering creates
    config.yaml (resolved), run.json (versions, devices) and the lock.

    Raises:
      UserError: it holds another run and `resume` is False, a resume would change what the run computes, or another
        process is writing to it.
    """

    def __init__(self, config: Config, kind: str, resume: bool):
        self.path = Path(config.output)
        self.config, self.kind, self._resume = config, kind, resume
        self.checkpoints = checkpoint_directory(config)
        self.resumed = hosts.on_first(lambda: self._look(resume))

    def _look(self, resume: bool) -> bool:
        """Return whether the directory holds a run to continue."""
        # A start that failed before its first row or checkpoint (of a comparison: before its warm start or first cell)
        # leaves only its settings, which are no run yet.
        rows = self.path / "metrics.jsonl"
        folders = (self.checkpoints, self.path / "warm", self.path / "cells")
        held = (rows.exists() and rows.stat().st_size > 0) or any(any_child(folder) for folder in folders)
        if held and not resume:
            raise UserError(
                f"{self.path}: holds a run already; continue it with --resume, or set another --output=..."
            )
        settings = (self.path / "config.yaml").exists()
        if not held and any_child(self.path, but=LEFTOVERS) and not settings:
            raise UserError(f"{self.path}: is not empty and holds no run; set another --output=...")
        if held and settings:
            self._check_unchanged(self.kind)
        if held and not any_child(self.checkpoints):
            self.require_no_checkpoint()
        return held

    def __enter__(self):
        hosts.on_first(self._open)
        return self

    def __exit__(self, *_):
        if hosts.is_first():
            self._lock.close()

    def _open(self) -> None:
        self._lock = lock_directory(self.path, "run")
        try:
            # Another process may have used the directory since the first look.
            self.resumed = self._look(self._resume)
        except UserError:
            self._lock.close()
            raise
        about = {"kind": self.kind, "user_files": user_files(self.config), **_surroundings()}
        if self.resumed and SAVED in (noted := self._noted()):
            about[SAVED] = noted[SAVED]
        write_file(self.path / "run.json", json.dumps(about, indent=2) + "\n")
        write_file(self.path / "config.yaml", dump_yaml(self.config.to_dict()))

    def note(self, **facts: Json) -> None:
        """Add facts to run.json that are known only after the start."""
        if not hosts.is_first():
            return
        write_file(self.path / "run.json", json.dumps(self._noted() | facts, indent=2) + "\n")

    def note_saved(self, step: int) -> None:
        """Record that a checkpoint is complete, so that a resume that cannot find it does not begin again."""
        self.note(**{SAVED: {"step": step, "directory": str(self.checkpoints)}})

    def require_no_checkpoint(self) -> None:
        """Check that the run has saved no checkpoint; called if none is found.

        Raises:
          UserError: it has saved one. Continuing would begin again and drop all records.
        """
        if saved := self._noted().get(SAVED):
            raise UserError(
                f"{self.path}: there is no checkpoint in {self.checkpoints}, but this run has saved step "
                f"{saved['step']} in {saved['directory']}; make that directory available, or set checkpoint.directory "
                "to where it is now, or start a new run with another --output=..."
            )

    def _noted(self) -> dict[str, Json]:
        """Read run.json; empty if it does not exist.

        Raises:
          UserError: it is damaged.
        """
        path = self.path / "run.json"
        return read_object(path, "remove it, and --resume writes a new one") if path.exists() else {}

    def _check_unchanged(self, kind: str) -> None:
        about = self._noted()
        held = about.get("kind", kind)
        if held != kind:
            raise UserError(
                f"{self.path}: holds an `lpo {held}` run; `lpo {kind} --resume` cannot continue it"
            )
        # A verifier that failed on every response has to be repaired, which changes its file.
        before = {} if about.get(VERIFIER_FAILED) else about.get("user_files", {})
        for file, digest in user_files(self.config).items():
            if before.get(file, digest) != digest:
                raise UserError(
                    f"{self.path}: cannot resume: {file} has changed since the run was started; restore it, or start "
                    "a new run with another --output=..."
                )
        before, now = read_config(self.path).to_dict(), self.config.to_dict()
        for dotted in FIXED[kind]:
            old, new = _at(before, dotted), _at(now, dotted)
            for key, was, becomes in differences(dotted, old, new):
                raise UserError(
                    f"{self.path}: cannot resume with {key} = {becomes!r}; the run was started with {was!r}"
                )


def user_files(config: Config) -> dict[str, str]:
    """Hash the user's files that define prompts, verifiers and objectives; returns hashes by the name in the config.

    These are Python files in the sections `task` and `objective` (`file.py` and `file.py:function`), and all files in
    `objective`. A task's data are not included, because its rows have a hash of their own (`Task.content_hash`). Files
    that a file imports are not covered.
    """
    hashes = {}
    for section in (config.task, config.objective):
        for value in section.values():
            if not isinstance(value, str):
                continue
            reference = split_reference(value)
            path = reference[0] if reference else value
            if path.endswith(".py") or section is config.objective:
                hashes[value] = file_hash(path)
    return {value: digest for value, digest in hashes.items() if digest}


def checkpoint_directory(config: Config) -> epath.Path:
    """Return the directory of a run's checkpoints: in the run directory, or as configured.

    Raises:
      UserError: this machine cannot access a gs:// path.
    """
    named = config.checkpoint.directory
    if named == "auto":
        return epath.Path(os.path.abspath(config.output)) / "checkpoints"
    if not named.startswith("gs://"):
        return epath.Path(os.path.abspath(named))
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"checkpoint.directory = {named}: gs:// needs gcsfs; pip install 'lpo_jax[tpu]'")
    for noisy in ("gcsfs", "google.auth", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        import google.auth

        google.auth.default()
        epath.Path(named).exists()
    except Exception as error:  # of several libraries, about the network, credentials or the bucket
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"checkpoint.directory = {named}: cannot be used ({reason}); log in with `gcloud auth "
            "application-default login`, or give this machine's service account the right to write there"
        ) from None
    return epath.Path(named)


def read_config(run: str | Path) -> Config:
    """Read the resolved config of a run directory."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run directory (no config.yaml in it)")
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: is damaged (it holds no settings); write it anew from the config that started the run"
        )
    return parse_config(values, str(path))


def any_child(directory: Path | epath.Path, but: Collection[str] = ()) -> bool:
    """Return whether a directory exists and has any entries, except those named in `but`."""
    return directory.is_dir() and any(child.name not in but for child in directory.iterdir())


def _surroundings() -> dict[str, Json]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
    return {"python": platform.python_version(), "versions": versions, "devices": devices}


def _at(values: dict, dotted: str):
    for part in dotted.split("."):
        values = values[part]
    return values


def differences(key: str, old: PyTree, new: PyTree) -> Iterator[tuple[str, PyTree, PyTree]]:
    """Yield (dotted key, old, new) for every difference between two trees of settings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new
