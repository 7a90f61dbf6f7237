"""Many hosts, one program: every process runs the same Python on the same numbers, and the arrays are shared.

Each process drives its own devices. What is decided on a host is decided on the first and told to the others
(`on_first`), or is the same everywhere; what is worked on in shares is put together again (`gather`). Only the
first process writes files; checkpoints are written by all of them. A process that has to stop takes the others
with it: each hears of it within `HEARTBEAT` seconds, wherever it waits.
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
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client's store has no public name

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.parallel.presence import SILENCE, Presence

# Started by hand: the first process's address, how many there are, and which one this is.
BY_HAND = ("LPO_COORDINATOR", "LPO_NUM_PROCESSES", "LPO_PROCESS_ID")
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as gone

_presence: Presence | None = None  # of this process, in a job of several


def start() -> None:
    """Joins the processes of this job, if there are several. Call it before anything touches a device.

    By hand through the variables `BY_HAND`; on Cloud TPU, under Slurm's `srun` and Open MPI's `mpirun` as jax
    detects it. Elsewhere nothing happens.

    Raises:
      UserError: a variable is missing or makes no sense, or the first process cannot be reached.
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
    """Says what this process is doing (`verifying`), for the others to report should it end."""
    if _presence is not None:
        _presence.phase = name


def require_devices() -> None:
    """Opens the devices. Call it before long work begins, and after `start`.

    Raises:
      UserError: the platform that JAX_PLATFORMS names is not here.
    """
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError for a platform whose plugin is missing
        wanted = jax.config.jax_platforms
        reason = str(error).strip().partition("\n")[0].partition(" (set ")[0] or "it is not installed"
        jax.config.update("jax_platforms", "")  # what jax would take by itself
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise UserError(
            f"JAX_PLATFORMS = {wanted}: cannot be used here ({reason[:200]}); available is {found}: set it to that, or "
            "not at all"
        ) from None


def many() -> bool:
    """Whether this job has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that decides and writes."""
    return not many() or jax.process_index() == 0


def share(n: int) -> slice:
    """This process's part of n things; the parts are contiguous and in the order of the processes."""
    if not many():
        return slice(0, n)
    i, count = jax.process_index(), jax.process_count()
    return slice(n * i // count, n * (i + 1) // count)


def gather(value: Any) -> list[Any]:
    """What every process gives (anything that pickles), in their order; all must call this together."""
    if not many():
        return [value]
    from jax.experimental import multihost_utils

    sent = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(sent.size)).reshape(-1)
    padded = np.pad(sent, (0, int(sizes.max()) - sent.size))
    received = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(received, sizes)]


def join(shares: list[Any]) -> list[Any]:
    """The lists of all processes, each holding those of its own `share`, as one."""
    return [item for part in gather(shares) for item in part]


def on_first(function: Callable[[], Any]) -> Any:
    """Runs `function` in the first process; its result, or the `UserError` it raised, comes out in all."""
    if not many():
        return function()
    outcome = None
    if first():
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
    result, mistake = gather(outcome)[0]
    if mistake is not None:
        raise UserError(mistake)
    return result


def to_host(tree: Any) -> Any:
    """The whole arrays of a tree as numpy, in every process."""
    if not many():
        return jax.device_get(tree)
    whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
    return jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(tree))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave together: where one cannot go on, it says why and ends at once.

    A process that only raised would wait for the others at its exit, and they for it in their next step.
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
                time.sleep(
                    SILENCE + 2
                )  # it may be all that is left of another process, which is then known of
            _presence.leave(reason)
        os._exit(2 if isinstance(error, UserError) else 1)


def _announce() -> None:
    """Lets the other processes know of this one, if there are any."""
    global _presence
    client = getattr(distributed.global_state, "client", None)
    if client is None or not many():
        return
    _presence = Presence(client, jax.process_index(), jax.process_count())
    _presence.start()
    atexit.register(_presence.leave)  # before jax leaves the job, which it does in its own exit handler


class Silent:
    """In the place of a writer or a progress line, in processes that write and show nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _by_hand(given: dict[str, str]) -> dict[str, Any]:
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
    """Whether something has started several of us, or we are on a Cloud TPU machine, which may be one of many."""
    if (
        int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    ):
        return True
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and not _on_cpu()


def _on_cpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
