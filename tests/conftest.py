"""Fixtures that all tests share: tiny models and tasks, and a common compilation cache.

The environment variables are set before jax is imported. What fixtures alone need is imported in them: the workers of
pytest start after their parent has imported this file.
"""

import functools
import gc
import itertools
import os
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling dominates the time of the suite, and tiny programs gain nothing from optimisation. `make test-isa` runs the
# numeric tests with all optimisations, as a run has them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Keep the flags of the caller, such as --xla_cpu_max_isa (`make test-isa`).
os.environ.setdefault("XLA_FLAGS", "")
if "--xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# A program that is split for several compiling threads takes a seventh more processor time, and the workers keep all
# cores busy.
if "codegen_split" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# The older emitters of the CPU backend compile the same program in a third of the time.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and "fusion_emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Recording the traceback of every operation takes 7% of the processor time of tests.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Many tests compile the same programs. Later tests and other workers read them from disk: 2 ms for a program
# of one operation, which takes 13 ms to compile.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lpo_jax_test_programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from lpo_jax.parallel.compiler_flags import add_compiler_flags

add_compiler_flags()  # as the commands do

import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import tiny.py

pytest_plugins = ["margins"]
TESTS = itertools.count()
PROGRAMS = itertools.count()


@functools.lru_cache(maxsize=1)
def lowering_context(thread, number, make=mlir.make_ir_context):
    """Make the MLIR context in which jax lowers a hundred programs of a thread, rather than one for each program.

    It takes 6 ms to load all dialects into a context, a third of the time of a program of one operation. A context
    keeps the constants of its programs, so that it is replaced after some of them, and is not safe to share between
    threads.
    """
    return make()


mlir.make_ir_context = lambda: lowering_context(threading.get_ident(), next(PROGRAMS) // 100)


def pytest_collection_modifyitems(items):
    """Begin with the directories whose files take longest, so that the workers end at the same time.

    A worker runs whole files. Every third file is one that waits for other processes, while there are such files.
    """
    files = dict.fromkeys(item.path for item in items)
    waiting = [file for file in files if file.parent.name in ("rewards", "launch")]
    short = lambda file: file.parent.name not in ("training", "parallel", "sampling")  # noqa: E731
    computing = sorted(files.keys() - waiting, key=lambda file: (short(file), file))
    place = {file: i / 2 for i, file in enumerate(computing)} | {file: i for i, file in enumerate(waiting)}
    items.sort(key=lambda item: (place[item.path], item.path))


def pytest_collection_finish():
    """Keep the garbage collector from walking through all imported modules again and again while jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish():
    """Leave what is alive to the end of the process, instead of walking through it five times, as pytest does."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_config():
    from tiny import CONFIG

    return CONFIG


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    from tiny import random_params

    # Scale the weights so that logits differ by nats: a nearly uniform distribution would hide mistakes.
    return jax.device_put(random_params(tiny_config, scale=3))


@pytest.fixture(scope="session")
def run_params(tiny_params):
    """The parameters of `tiny_model`."""
    from tiny import RUN_CONFIG

    return tiny_params | {"layers": jax.tree.map(lambda x: x[: RUN_CONFIG.num_layers], tiny_params["layers"])}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, run_params):
    """A Hugging Face directory with a random model of one layer and a tokenizer of single characters."""
    from tiny import RUN_CONFIG, character_tokenizer

    from lpo_jax.models.hf import save_hf

    path = tmp_path_factory.mktemp("model") / "tiny"
    save_hf(path, RUN_CONFIG, run_params, character_tokenizer())
    return path


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    """A task file whose rewards differ between the responses of a random model."""
    from tiny import VERIFIER

    path = tmp_path_factory.mktemp("task") / "parity.py"
    path.write_text(VERIFIER)
    return path


@pytest.fixture
def run_config(tmp_path, tiny_model, tiny_task):
    """Return a function that makes the plain values of a config that trains in seconds.

    Its keyword arguments name sections: they update the keys of a section, but replace `model`, `task` and `objective`.
    """
    from tiny import run_values

    def make(output="run", **sections):
        values = run_values(tmp_path / output, tiny_model, tiny_task)
        for section, keys in sections.items():
            whole = section in ("model", "task", "objective")
            values[section] = keys if whole else {**values.get(section, {}), **keys}
        return values

    return make


@pytest.fixture
def no_plots(monkeypatch):
    """Skip the plots and the report at the end of a run: drawing them takes longer than a short run."""
    from whole_runs import skip_plots

    skip_plots(monkeypatch)


@pytest.fixture
def one_layout(monkeypatch):
    """Run padded groups: the shapes of packed rows depend on sampled lengths, and each needs another program."""
    from whole_runs import pad_groups

    pad_groups(monkeypatch)


@pytest.fixture(autouse=True)
def same_numbers(request):
    """Reset the `rng` of the test's module, so that its numbers do not depend on the tests that ran before."""
    if hasattr(request.module, "rng"):
        request.module.rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_programs():
    """Drop compiled programs before they exhaust the 65,530 memory maps of a process, at which jax crashes.

    Counting 40,000 of them takes the kernel 30 ms, so that only every tenth test does.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()
        gc.collect()
