"""Peak rates of this machine, measured in the same run as the benchmark that is compared with them."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Width of the square matrix product, and number of elements copied. Both are large enough for full speed; on an
# accelerator a smaller product or copy takes little longer than its launch.
WIDTH, COPIED = 4096, 1 << 26
ACCELERATOR_WIDTH, ACCELERATOR_COPIED = 8192, 1 << 29


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates of one device.

    Attributes:
      matrix_flops: FLOP/s of a large matrix product in the dtype of the benchmark.
      copy_bytes: bytes/s of a large copy, counting reads and writes.
    """

    matrix_flops: float
    copy_bytes: float

    @classmethod
    def measure(cls, dtype: DTypeLike, repeats: int = 5) -> "Machine":
        """Measure the rates: the medians of `repeats` timed calls after one untimed call.

        The operands are random, because accelerators multiply constants faster than real data.
        """
        on_cpu = jax.default_backend() == "cpu"
        width, copied = (WIDTH, COPIED) if on_cpu else (ACCELERATOR_WIDTH, ACCELERATOR_COPIED)
        a = jax.random.normal(jax.random.key(0), (width, width), dtype)
        precision = "float32" if a.dtype == jnp.float32 else "default"
        product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision))
        x = jnp.ones((copied,), jnp.float32)
        copy = jax.jit(lambda x, by: x + by)
        return cls(
            2 * width**3 / median(lambda: product(a, a), repeats),
            2 * x.nbytes / median(lambda: copy(x, 1.0), repeats),
        )


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock seconds that a call of `function` takes, including the computation of its result."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def median(function: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `repeats` calls, after one uncounted call."""
    seconds(function)
    return statistics.median(seconds(function) for _ in range(repeats))


def alternate(function: Callable[[], object], repeats: int, dtype: DTypeLike) -> tuple[list[float], Machine]:
    """Time calls of a function and measure the machine before, between and after them.

    The rates of a shared machine change from minute to minute, so the measurements alternate.

    Returns:
      The seconds of each of `repeats` calls, and the median rates of the machine.
    """
    machines, times = [Machine.measure(dtype)], []
    for _ in range(repeats):
        times.append(seconds(function))
        machines.append(Machine.measure(dtype))
    rates = zip(*map(dataclasses.astuple, machines))
    return times, Machine(*map(statistics.median, rates))


def peak_memory() -> int:
    """Return the peak memory in bytes: of the device if it counts them, otherwise of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
