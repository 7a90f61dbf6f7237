"""Checkpoints of plain arrays: damage is detected, failed saves are reported, and the best one is kept."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lpo_jax.errors import RunStopped, UserError
from lpo_jax.runs import checksums
from lpo_jax.runs.checkpoint import SCORES, Checkpoints


def state_of(step):
    return {"params": {"w": jnp.arange(64.0) + step, "b": jnp.full(3, step, jnp.float32)}}


ABSTRACT = jax.eval_shape(lambda: state_of(0))


def save(directory, *steps, scores=(), keep=2):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"step": step}, dict(scores).get(step))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    save(directory, 1, 2)
    return directory


@pytest.fixture
def copy(two, tmp_path):
    subprocess.run(["cp", "-r", two, tmp_path / "checkpoints"], check=True)
    return tmp_path / "checkpoints"


READS = {
    "record": lambda checkpoints: checkpoints.record(2),
    "state": lambda checkpoints: checkpoints.restore(2, ABSTRACT),
    "parameters": lambda checkpoints: checkpoints.restore_params(2, ABSTRACT["params"]),
}


@pytest.mark.parametrize("part", READS)
def test_an_intact_checkpoint_is_read(two, part):
    with Checkpoints(two, read_only=True) as checkpoints:
        found = READS[part](checkpoints)
    if part == "record":
        assert found == {"step": 2}
    else:
        jax.tree.map(
            np.testing.assert_array_equal, found, state_of(2) if part == "state" else state_of(2)["params"]
        )


def refusal(directory, part="state"):
    with Checkpoints(directory, read_only=True) as checkpoints, pytest.raises(UserError) as refused:
        READS[part](checkpoints)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_flipped_bit_in_any_file_is_refused(copy):
    files = sorted(path for path in (copy / "2").rglob("*") if path.is_file())
    assert checksums.NAME in {path.name for path in files} and len(files) > 8
    chance = np.random.default_rng(0)
    for number, path in enumerate(files):
        held = path.read_bytes()
        for bit in chance.integers(0, 8 * len(held), 4):
            data = bytearray(held)
            data[bit // 8] ^= 1 << int(bit % 8)
            path.write_bytes(data)
            said = refusal(copy, list(READS)[number % len(READS)])
            assert f"the checkpoint of step 2 is damaged: {path.relative_to(copy / '2')}" in said or (
                path.name == checksums.NAME or "is missing" in said
            )
            assert "the checkpoint of step 1 is intact" in said and f"mv {copy}/2 {copy}/2.damaged" in said
        path.write_bytes(held)
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.record(2) == {"step": 2}


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", checksums.NAME])
@pytest.mark.parametrize("harm", ["removed", "cut", "emptied", "lengthened"])
def test_other_damage_is_refused(copy, name, harm):
    path = copy / "2" / name
    held = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes({"cut": held[: len(held) // 2], "emptied": b"", "lengthened": held + b"\n"}[harm])
    assert "is damaged: " in refusal(copy)


def test_files_that_are_not_listed_are_refused(copy):
    (copy / "2" / "state" / "d" / "stray").write_text("")
    assert "state/d/stray is not listed in checksums.sha256" in refusal(copy)


def test_the_damaged_one_is_moved_as_the_message_says(copy):
    (copy / "2" / "_CHECKPOINT_METADATA").write_text("{")
    command = refusal(copy).rpartition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.record(checkpoints.latest()) == {"step": 1}
        checkpoints.save(2, state_of(2), {"step": 2})
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.record(2) == {"step": 2}


def test_no_intact_checkpoint(copy):
    for step in (1, 2):
        (copy / str(step) / checksums.NAME).unlink()
    assert "no other checkpoint is intact" in refusal(copy)


def test_what_cannot_be_restored_is_one_line(two):
    other = {"params": {"w": jax.ShapeDtypeStruct((9, 9), jnp.float32)}}
    with (
        Checkpoints(two, read_only=True) as checkpoints,
        pytest.raises(UserError, match="cannot be read") as refused,
    ):
        checkpoints.restore(2, other)
    assert "\n" not in str(refused.value)


def test_the_list_is_in_the_format_of_sha256sum(two):
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", checksums.NAME], cwd=two / "2")
    assert done.returncode == 0


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """All files, the checksums and all folders are synced before the rename; the parent folder is synced after it."""
    events = []
    sync, rename = checksums._sync, os.rename
    monkeypatch.setattr(checksums, "_sync", lambda path: (events.append(str(path)), sync(path)))
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    temporary = f"{directory}/1.orbax-checkpoint-tmp"
    files = {str(path.relative_to(directory / "1")) for path in (directory / "1").rglob("*")} | {"."}
    synced = {os.path.relpath(path, temporary) for path in events if path.startswith(temporary)}
    assert files == synced
    assert events[-1] == str(directory) and rename is os.rename


def test_object_stores_get_their_mark_last(tmp_path, monkeypatch):
    """Object stores cannot rename: a commit file marks a complete checkpoint, and checksums are written before it."""
    monkeypatch.setattr(checksums, "temporary_path", lambda directory: checksums.SealedObjects)
    directory = tmp_path / "checkpoints"
    save(directory, 1, 2)
    mark, listed = directory / "2" / "commit_success.txt", directory / "2" / checksums.NAME
    assert mark.stat().st_mtime_ns >= listed.stat().st_mtime_ns
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.record(2) == {"step": 2}
        jax.tree.map(
            np.testing.assert_array_equal,
            checkpoints.restore_params(2, ABSTRACT["params"]),
            state_of(2)["params"],
        )
    mark.unlink()
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["create", "seal", "_sync", "write_checked"])
def test_a_save_that_fails_is_one_line_at_once(tmp_path, monkeypatch, capfd, where, number):
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    started = time.monotonic()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    async def fail_later(*_):
        fail()

    with monkeypatch.context() as patch:
        if where == "create":
            patch.setattr(checksums.SealedDirectory, "create", fail_later)
        else:
            patch.setattr(checksums, where, fail)
        with pytest.raises(RunStopped) as stopped:
            save(directory, 2, scores={2: 0.5})
    said = str(stopped.value)
    assert os.strerror(number) in said and "the one of step 1 is intact" in said and "\n" not in said
    # At exit the process waits for Orbax's threads; idle threads of asyncio's executors end at once.
    while any(not thread.name.startswith(("MainThread", "asyncio_")) for thread in threading.enumerate()):
        assert time.monotonic() - started < 10, threading.enumerate()
        time.sleep(0.01)
    assert capfd.readouterr().err == ""
    save(directory, 2, scores={2: 0.5})
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert (
            checkpoints.steps() == [1, 2] and checkpoints.best() == 2 and checkpoints.record(2) == {"step": 2}
        )


def test_a_failed_save_is_noticed_before_the_next_one(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(checksums, "seal", fail)
    with (
        pytest.raises(RunStopped, match="could not be saved"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(1, state_of(1), {"step": 1})
        ended = time.monotonic() + 10
        while time.monotonic() < ended:
            checkpoints.check()
            time.sleep(0.01)
        raise AssertionError("no error within 10 s")


def test_an_error_on_its_way_is_not_hidden_by_a_failing_save(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(checksums, "seal", fail)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state_of(1), {"step": 1})
        1 / 0  # noqa: B018


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_the_best_is_kept_though_scored_after_it_was_saved(tmp_path):
    """SIGTERM during an evaluation saves the step without its score; the resumed run adds the score."""
    directory = tmp_path / "checkpoints"
    save(directory, 1, scores={1: 0.1}, keep=1)
    save(directory, 2, keep=1)
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.best() == 1
        assert not checkpoints.save(2, state_of(2), {"step": 2}, 0.7)
        assert checkpoints.best() == 2
    save(directory, 3, 4, scores={3: 0.5, 4: 0.7}, keep=1)
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.best() == 2  # of equal scores the earliest wins, even in an interrupted run
        assert checkpoints.record(2) == {"step": 2}


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    save(tmp_path / "checkpoints", 1, 2, scores={1: 0.1, 2: float("nan")})
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best() == 1


def test_damaged_scores_are_refused(copy):
    path = epath.Path(copy / SCORES)
    checksums.write_checked(path, '{"1": 0.25}')
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.best() == 1
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(UserError, match=f"{SCORES}: is damaged"):
        Checkpoints(copy, read_only=True)


TWO = """
import sys
import jax, jax.numpy as jnp, numpy as np
from lpo_jax.errors import UserError
from lpo_jax.parallel import hosts
from lpo_jax.runs.checkpoint import Checkpoints

hosts.connect()
mesh = jax.make_mesh((4,), ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
state = lambda step: {"params": {"w": jax.make_array_from_callback((8,), place, lambda i: np.arange(8.0)[i] + step)}}
directory = sys.argv[1]
with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step}, 1 / step)
    assert checkpoints.best() == 1
hosts.on_first(lambda: open(f"{directory}/2/record/metadata", "a").write(" "))
with Checkpoints(directory) as checkpoints:
    found = checkpoints.restore(1, state(0))
    for shard in found["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] + 1)
    try:
        checkpoints.record(2)
    except UserError as error:
        assert "record/metadata differs" in str(error) and "step 1 is intact" in str(error), error
        print("refused")
"""


@pytest.mark.slow
def test_two_processes_save_and_check_together(tmp_path):
    """The first process lists the files of both; each checks its share of them, and both report the damage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, tmp_path / "checkpoints"],
            env=os.environ
            | flags
            | {"LPO_COORDINATOR": address, "LPO_NUM_PROCESSES": "2", "LPO_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert all("refused" in output for output in outputs), outputs
    listed = (tmp_path / "checkpoints" / "1" / checksums.NAME).read_text()
    assert "ocdbt.process_0/" in listed and "ocdbt.process_1/" in listed
