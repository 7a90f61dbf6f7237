"""A run directory: who may write to it, what it was started with, and how a signal ends it."""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import yaml
from etils import epath

from lpo_jax.config import Config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.reporting.writers import cannot_write, write_atomically
from lpo_jax.rewards.user_code import file_hash, split_reference
from lpo_jax.scale import hosts

PACKAGES = ("lpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

# What a start leaves whose first files did not fit on the disk: no run yet, so that it may be started again.
LEFTOVERS = (".lock", "run.json.tmp", "run.json", "config.yaml.tmp")

# A resumed run must sample and learn what the uninterrupted one would have; these settings decide that.
# Others (steps, evaluation, checkpoints, workers, token budget) may change between two starts.
_BOTH = ("seed", "model", "task", "sampling", "optimizer")
_ROUND = ("training.prompts_per_step", "training.updates_per_step", "training.behaviour")
_FITNESS = tuple(f"evaluation.{key}" for key in ("problems", "num_responses", "temperature", "top_p"))
_SEARCH = ("meta.population", "meta.sigma", "meta.decay", "meta.alpha")
FIXED = {
    "train": (*_BOTH, "objective", "warm_start", *_ROUND),
    "sft": (*_BOTH, "warm_start.batch_size", "warm_start.learning_rate"),
    "meta": (*_BOTH, "objective", "warm_start", *_ROUND, "training.steps", *_FITNESS, *_SEARCH),
    "compare": (*_BOTH, "warm_start", *_ROUND, "training.steps", "evaluation"),
}


class RunDirectory:
    """`config.output`, written to by this process alone; of a job of many hosts, by its first.

    Making one only checks, so that a mistake found while the model loads leaves nothing behind; entering it
    creates config.yaml (resolved), run.json (versions, devices) and the lock.

    Raises:
      UserError: it holds another run and `resume` is off, a resume would change what the run computes, or
        another process is writing to it.
    """

    def __init__(self, config: Config, kind: str, resume: bool):
        self.path = Path(config.output)
        self.config, self.kind = config, kind
        self.checkpoints = checkpoint_directory(config)
        self.resumed = hosts.on_first(lambda: self._look(resume))

    def _look(self, resume: bool) -> bool:
        """Whether the directory holds a run, which may be continued."""
        # A start that failed before its first row or checkpoint leaves only its settings: no run yet.
        # (Of a comparison: before its warm start, or its first cell.)
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
        return held

    def __enter__(self):
        hosts.on_first(self._open)
        return self

    def __exit__(self, *_):
        if hosts.first():
            self._lock.close()

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held while the run goes on
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing to this run") from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        about = {"kind": self.kind, "user_files": user_files(self.config), **_surroundings()}
        self._write("run.json", json.dumps(about, indent=2) + "\n")
        self._write("config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))

    def note(self, **facts: Any) -> None:
        """Adds to run.json what was only known once the run was under way."""
        if not hosts.first():
            return
        known = json.loads((self.path / "run.json").read_text())
        self._write("run.json", json.dumps(known | facts, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all: config.yaml is what tells a run from any other directory."""
        try:
            write_atomically(self.path / name, text.encode())
        except OSError as error:
            raise cannot_write(self.path / name, error) from None

    def _check_unchanged(self, kind: str) -> None:
        record = self.path / "run.json"
        about = json.loads(record.read_text()) if record.exists() else {}
        held = about.get("kind", kind)
        if held != kind:
            raise UserError(
                f"{self.path}: holds an `lpo {held}` run; `lpo {kind} --resume` cannot continue it"
            )
        before = about.get("user_files", {})
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
    """The hashes of the files with which a user says how a run asks, judges and learns: by what the config names.

    These are Python files in the sections `task` and `objective` (`file.py` and `file.py:function`), and all files in
    `objective`. A task's data are not among them: they have a hash of their own (`Task.content_hash`), which is that
    of the rows. What a file imports is not covered.
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
    """Where a run's checkpoints are: in its own directory, or where the config says.

    Raises:
      UserError: a gs:// path that this machine cannot reach.
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
    except Exception as error:  # of several libraries, for the network, the credentials or the bucket
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"checkpoint.directory = {named}: cannot be used ({reason}); log in with `gcloud auth "
            "application-default login`, or give this machine's service account the right to write there"
        ) from None
    return epath.Path(named)


def read_config(run: str | Path) -> Config:
    """The resolved config a run directory was started with."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run directory (no config.yaml in it)")
    return parse_config(yaml.safe_load(path.read_text()), str(path))


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, raised where nothing is half done. Like KeyboardInterrupt no `Exception`, so that no
    library takes it for an error of its own."""


class Signals:
    """Turns SIGTERM and SIGINT into `Interrupted`.

    At once in the phases that change nothing (sampling, verifying, evaluating); at the end of a `deferred`
    block in those that do. With many hosts only where all of them ask each other (`agree`), since one that
    stopped by itself would leave the others waiting. A second signal ends the process in the usual hard way.
    """

    def __init__(self):
        self._waiting = self._deferred = False
        self._many = hosts.many()

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self):
        """A block that is finished before a signal is obeyed."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._waiting and not self._many:
            raise Interrupted

    def agree(self) -> None:
        """Obeys a signal that any host has got. All hosts call this together, between two steps."""
        if self._many and any(hosts.gather(self._waiting)):
            raise Interrupted

    def _handle(self, number, frame):
        for again, handler in self._before.items():
            signal.signal(again, handler)
        self._waiting = True
        if not self._deferred and not self._many:
            raise Interrupted


def any_child(directory: Path | epath.Path, but: Collection[str] = ()) -> bool:
    """Whether a directory exists and holds anything, or anything but files of these names."""
    return directory.is_dir() and any(child.name not in but for child in directory.iterdir())


def _surroundings() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
    return {"python": platform.python_version(), "versions": versions, "devices": devices}


def _at(values: dict, dotted: str):
    for part in dotted.split("."):
        values = values[part]
    return values


def differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) wherever two trees of settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new
