"""Runs on several hosts: every process executes the same Python program on the same values and shares its arrays.

Each process drives its own devices. A decision that depends on the host is made in the first process and sent to the
others (`on_first`). Work that is divided among the processes (`share`) is collected again (`gather`). Only the first
process writes files, except for checkpoints, which all processes write together. If one process stops, all others stop
within `HEARTBEAT` seconds, whatever they are waiting for.
"""

import atexit
import contextlib
import glob
import importlib.util
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the client's key-value store has no public name

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.parallel import gpus
from lpo_jax.parallel.compiler_flags import add_compiler_flags
from lpo_jax.parallel.presence import SILENCE, Presence
from lpo_jax.types import Json

# Variables that start a job by hand: the address of the first process, the number of processes, and this one's index.
BY_HAND = ("LPO_COORDINATOR", "LPO_NUM_PROCESSES", "LPO_PROCESS_ID")
HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as lost

T = TypeVar("T")

_watchers: list[Callable[[str], None]] = []
_presence: Presence | None = None  # of this process; None in a job of one process


def connect() -> None:
    """Connect the processes of this job, if there are several. Call this before any device is used.

    The job is described by the variables in `BY_HAND`, or detected by JAX on Cloud TPU, under Slurm's `srun` and under
    Open MPI's `mpirun`. In all other cases this does nothing.

    Raises:
      UserError: a variable is missing or invalid, or the first process cannot be reached.
    """
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    if jax.distributed.is_initialized() or not (given or _in_cluster()):
        return
    arguments = _by_hand(given) if given else {}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"many hosts: {reason}; to start them by hand set {', '.join(BY_HAND)}") from None
    _announce()


def phase(name: str) -> None:
    """Set what this process is doing, such as "verifying". The other processes report it if this one ends."""
    if _presence is not None:
        _presence.phase = name
    for show in _watchers:
        show(name)


@contextlib.contextmanager
def watch_phases(show: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of each phase that begins."""
    _watchers.append(show)
    try:
        yield
    finally:
        _watchers.remove(show)


def require_devices() -> None:
    """Initialise the devices. Call this after `start` and before long work begins.

    Raises:
      UserError: the platform named by JAX_PLATFORMS is not available, or the driver of its GPUs is too old.
    """
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if not platforms or {"cuda", "gpu"} & set(platforms.split(",")):
        gpus.prepare()
    add_compiler_flags()
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError for a platform whose plugin is missing
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = str(error).strip().partition("\n")[0].partition(" (set ")[0] or "it is not installed"
        jax.config.update("jax_platforms", "")  # let JAX choose
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise UserError(
            f"JAX_PLATFORMS = {wanted}: cannot be used here ({reason[:200]}); available is {found}: set it to that, or "
            "unset it"
        ) from None


def many() -> bool:
    """Return whether this job has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is the first, which makes decisions and writes files."""
    return not many() or jax.process_index() == 0


def share(n: int) -> slice:
    """Return this process's part of n items. The parts are contiguous and in the order of the processes."""
    if not many():
        return slice(0, n)
    i, count = jax.process_index(), jax.process_count()
    return slice(n * i // count, n * (i + 1) // count)


def gather(value: T) -> list[T]:
    """Collect one picklable value from every process, in process order. All processes must call this together."""
    if not many():
        return [value]
    from jax.experimental import multihost_utils

    sent = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(sent.size)).reshape(-1)
    padded = np.pad(sent, (0, int(sizes.max()) - sent.size))
    received = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(received, sizes)]


def gather_lists(shares: list[T]) -> list[T]:
    """Concatenate the lists of all processes, each of which holds the results of its own `share`."""
    return [item for part in gather(shares) for item in part]


def on_first(function: Callable[[], T]) -> T:
    """Run `function` in the first process only, and return its result or raise its `UserError` in all processes."""
    if not many():
        return function()
    outcome: tuple[T | None, str | None] | None = None
    if is_first():
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
    result, mistake = gather(outcome)[0]
    if mistake is not None:
        raise UserError(mistake)
    return result


def to_host(tree: T) -> T:
    """Copy every array of a tree, complete, to numpy in every process."""
    if not many():
        return jax.device_get(tree)
    whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
    return jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(tree))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context manager that ends this process at once if its body raises, so that the other processes can stop too.

    The reason is printed and sent to the other processes. If this process only raised the exception, it would wait for
    the others in its exit handlers while they wait for it in their next collective.
    """
    try:
        yield
    except Exception as error:
        if not many():
            raise
        if not isinstance(error, UserError | RunStopped | jax.errors.JaxRuntimeError):
            traceback.print_exc()
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        print(
            f"lpo: process {jax.process_index()} of {jax.process_count()} stops: {reason} "
            "(if another process died, its own output says why; start all of them again with --resume)",
            file=sys.stderr,
        )
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        if _presence is not None:
            if isinstance(error, jax.errors.JaxRuntimeError):
                # The error may be a consequence of another process's death; wait until that death is detected.
                time.sleep(SILENCE + 2)
            _presence.leave(reason)
        os._exit(2 if isinstance(error, UserError) else 1)


def _announce() -> None:
    """Start to exchange heartbeats with the other processes, if there are any."""
    global _presence
    client = getattr(distributed.global_state, "client", None)
    if client is None or not many():
        return
    _presence = Presence(client, jax.process_index(), jax.process_count())
    _presence.start()
    atexit.register(_presence.leave)  # runs before JAX's own exit handler, which leaves the job


class Silent:
    """Stands in for a writer or a progress display in processes that write and display nothing.

    Args:
      of: the class that it stands in for. Its methods do nothing here, and other names raise `AttributeError`.
    """

    def __init__(self, of: type):
        self._of = of

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        getattr(self._of, name)
        return lambda *args, **kwargs: None


def _by_hand(given: dict[str, str]) -> dict[str, Json]:
    if missing := [name for name in BY_HAND if name not in given]:
        raise UserError(
            f"{', '.join(given)} is set but not {', '.join(missing)}; set all three, or none for one process"
        )
    coordinator, *numbers = (given[name] for name in BY_HAND)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"LPO_COORDINATOR = {coordinator!r}: expected host:port of the first process")
    if not all(number.isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise UserError(
            f"LPO_PROCESS_ID = {numbers[1]!r} of LPO_NUM_PROCESSES = {numbers[0]!r}: expected 0, 1, ... below their "
            "number"
        )
    count, index = map(int, numbers)
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def _in_cluster() -> bool:
    """Return whether a launcher started several processes, or this is a Cloud TPU machine, which may be one of many."""
    if any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    on_cpu = os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and not on_cpu
