"""Inject faults into whole runs of a tiny model and check that the results equal an undisturbed run bit for bit.

    python scripts/fault_campaign.py kill [--kills 100] [--seed 0]
    python scripts/fault_campaign.py flip [--flips 1000]
    sudo python scripts/fault_campaign.py disk

kill  Runs with a warm start are ended by SIGKILL or SIGTERM at a random moment of a random phase (warm start,
      sampling, learning, evaluation, or writing one kind of file) and resumed, several times each. The comparison
      covers metrics, responses, the train state of the latest checkpoint, the parameters of the best one, and the table
      of evaluations.
flip  Single bits of every file of a checkpoint are flipped, and files are truncated and removed. Each damage must cause
      a one-line error that names the intact checkpoint.
disk  Runs write to a small ext4 file system, which becomes full, read-only or dead (every access fails and unsynced
      data is lost) just before one kind of file is written. The run must end within 10 s with one line that begins
      with "lpo:", and must resume when the disk is repaired. Needs root and loop devices.

The exit status is 1 if any case fails. `tests/training/test_faults.py` runs a small part of each.
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for tiny.py

# The functions that mark the start of a phase or of a write: (module, attribute).
PHASES = {
    "warm start": ("lpo_jax.training.sft", "supervised_step"),
    "sampling": ("lpo_jax.training.loop", "sample_round"),
    "learning": ("lpo_jax.training.loop", "make_batch"),
    "evaluation": ("lpo_jax.training.session", "Session.evaluate"),
}
WRITES = {
    "settings": ("lpo_jax.runs.directory", "write_file"),
    "responses": ("lpo_jax.reporting.writers", "RunWriter.write_samples"),
    "metrics": ("lpo_jax.reporting.writers", "RunWriter.write"),
    "events": ("lpo_jax.reporting.writers", "RunWriter._write_events"),
    "scores": ("lpo_jax.runs.checkpoint", "Checkpoints._note_score"),
    "checkpoint": ("lpo_jax.runs.checkpoint", "Checkpoints.save"),
    "sealing": ("lpo_jax.runs.checksums", "seal"),
    "plots": ("lpo_jax.reporting.plots", "learning_curves"),
}
LONGEST = 0.5  # maximum seconds from the start of a phase to the signal
FAULTS = ("full", "read-only", "dead")
EXT4_SHUTDOWN, NO_FLUSH = 0x8004587D, (2).to_bytes(4, "little")


def make_model(folder: pathlib.Path) -> None:
    """Write a tiny model and a task; run in a child process, because the parent must not start jax before it forks."""
    import jax
    from tiny import CONFIG, VERIFIER, character_tokenizer

    from lpo_jax.models.decoder import init_params
    from lpo_jax.models.hf import save_hf

    params = jax.tree.map(lambda p: 3 * p, init_params(CONFIG, jax.random.key(0)))
    save_hf(folder / "model", CONFIG, params, character_tokenizer())
    (folder / "task.py").write_text(VERIFIER)


def write_config(folder: pathlib.Path, output: pathlib.Path, plots: bool) -> pathlib.Path:
    """Write the config of a run with a warm start and six steps, of which two checkpoints are kept at the least."""
    import yaml
    from tiny import run_values

    values = run_values(output, folder / "model", folder / "task.py")
    values["warm_start"] = {"steps": 3, "batch_size": 8, "learning_rate": 5e-3, "only_below": 0.9}
    values["optimizer"]["learning_rate"] = 2e-2
    values["training"] |= {"steps": 6, "save_plots": plots}
    values["evaluation"] = {"every": 1, "problems": 8, "num_responses": 4}
    values["checkpoint"] = {"every": 2, "keep": 2}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def at_start_of(phase: str, call) -> None:
    """Run `call(phase)` in this process whenever the phase begins."""
    import importlib

    module, name = (PHASES | WRITES)[phase]
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        call(phase)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def run_lpo(
    arguments: list[str], log: pathlib.Path, announce: pathlib.Path | None = None, fault=None
) -> None:
    """Run `lpo` in a child process with its output in a file. It announces its phases, or injects a fault in one."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if announce is not None:
        pipe = os.open(announce, os.O_WRONLY)

        def announce_phase(phase: str) -> None:
            with contextlib.suppress(BrokenPipeError):  # the reader stops after the chosen phase
                os.write(pipe, f"{phase}\n".encode())

        for phase in PHASES | WRITES:
            at_start_of(phase, announce_phase)
    if fault is not None:
        phase, number, kind, disk = fault
        left = [number]

        def strike(_: str) -> None:
            left[0] -= 1
            if left[0] == 0:
                disk.strike(kind)

        at_start_of(phase, strike)
    from lpo_jax.commands.main import main

    sys.exit(main(arguments))


def digest(output: pathlib.Path, log: pathlib.Path, found) -> None:
    """Send, from a child process, the results of a finished run that faults must not change."""
    import jax
    import orbax.checkpoint as ocp

    from lpo_jax.reporting import is_timing, read_metrics
    from lpo_jax.runs.checkpoint import Checkpoints
    from lpo_jax.runs.checksums import damage

    def rows(run):
        kept = [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(run)]
        return [row for row in kept if len(row) > 1]

    def arrays(step, part):
        tree = ocp.PyTreeCheckpointHandler().restore(output / "checkpoints" / str(step) / "state")
        whole = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree[part] if part else tree):
            whole.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        return whole.hexdigest()

    with Checkpoints(output / "checkpoints", read_only=True) as checkpoints:
        latest, best = checkpoints.latest(), checkpoints.best()
        record = checkpoints.record(latest)
        broken = {step: damage(output / "checkpoints" / str(step)) for step in checkpoints.steps()}
    labels = (" cold model", " before", " after")
    table = [line for line in log.read_text().splitlines() if line.startswith(labels)]
    found.send(
        {
            "metrics": rows(output),
            "warm start": rows(output / "warm_start"),
            "responses": {
                f"{folder}/{path.name}": path.read_text()
                for folder in ("rollouts", "validation")
                for path in sorted((output / folder).iterdir())
            },
            "latest": (latest, arrays(latest, None)),
            "record": {name: record[name] for name in ("step", "data", "hooks", "skipped")},
            "best": (best, arrays(best, "params")),
            "broken": {step: problem for step, problem in broken.items() if problem},
            "table": table,
        }
    )


class Campaign:
    """A folder with a model, and child processes forked from a server that has already imported all modules."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        cache = os.path.join(tempfile.gettempdir(), "lpo_jax_test_programs")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lpo_jax.training.loop", "lpo_jax.reporting.plots"])
        self.call(make_model, folder)

    def call(self, function, *arguments, **keywords) -> int:
        """Run a function in a child process and return the exit status."""
        process = self.start(function, *arguments, **keywords)
        process.join()
        return process.exitcode

    def start(self, function, *arguments, **keywords):
        process = self.context.Process(target=function, args=arguments, kwargs=keywords)
        process.start()
        return process

    def digest(self, output: pathlib.Path, log: pathlib.Path) -> dict | None:
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.start(digest, output, log, sender)
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            return None
        finally:
            process.join()

    def reference(self, plots: bool = False) -> dict:
        """Run without faults and return the results."""
        output = self.folder / "reference"
        config, log = write_config(self.folder, output, plots), self.folder / "reference.log"
        if self.call(run_lpo, ["train", str(config)], log):
            sys.exit(f"the undisturbed run fails:\n{log.read_text()}")
        found = self.digest(output, log)
        steps, best = found["latest"][0], found["best"][0]
        print(f"undisturbed: {steps} steps, best {best}, {len(found['metrics'])} rows", flush=True)
        return found


def differences(found: dict | None, expected: dict) -> list[str]:
    """Return the names of the results that differ from those of the undisturbed run."""
    if found is None:
        return ["the run cannot be read"]
    return [name for name in expected if found[name] != expected[name]]


def wait_for(pipe: pathlib.Path, phase: str, number: int) -> bool:
    """Wait until the phase has begun `number` times; return False if the process ends before."""
    with open(pipe) as lines:
        for line in lines:
            number -= line.strip() == phase
            if number == 0:
                return True
    return False


def kill_once(campaign: Campaign, config: pathlib.Path, log: pathlib.Path, chance: random.Random):
    """Kill a run at a random moment; return (phase, signal), or None if it finished before, and any problem."""
    phase = chance.choice([*PHASES, *WRITES])
    number = 1 if phase in ("settings", "plots") else chance.randint(1, 4)
    how = chance.choice([signal.SIGKILL, signal.SIGTERM])
    pipe = log.with_suffix(".pipe")
    if not pipe.exists():
        os.mkfifo(pipe)
    process = campaign.start(
        run_lpo, ["train", str(config), *resume(config.with_suffix(""))], log, announce=pipe
    )
    if wait_for(pipe, phase, number):
        time.sleep(chance.uniform(0, LONGEST if phase in PHASES else 0.05))
    alive = process.is_alive()
    try:
        os.kill(process.pid, how)
    except ProcessLookupError:  # the process has already finished
        alive = False
    process.join(120)
    text = log.read_text()
    wrong = None
    if process.exitcode is None:
        wrong = "the process does not end"
        process.kill()
    elif process.exitcode not in (0, 130, -how) or "Traceback" in text:
        wrong = f"exit status {process.exitcode}: {text[-2000:]}"
    killed = alive and "lpo export" not in text
    return ((phase, how.name) if killed else None), wrong


def kill(campaign: Campaign, kills: int, seed: int) -> bool:
    """Kill runs `kills` times in total; each is killed one to four times, then resumed to its end and compared."""
    expected, chance = campaign.reference(), random.Random(seed)
    done, bad, runs = collections.Counter(), 0, 0
    while sum(done.values()) < kills:
        output, log, moments = campaign.folder / f"run{runs}", campaign.folder / f"run{runs}.log", []
        config = write_config(campaign.folder, output, False)
        problems = []
        for _ in range(chance.randint(1, 4)):
            moment, wrong = kill_once(campaign, config, log, chance)
            if wrong:
                problems.append(wrong)
            if moment:
                moments.append(moment)
                done[moment] += 1
        if campaign.call(run_lpo, ["train", str(config), *resume(output)], log):
            problems.append(f"cannot be resumed: {log.read_text()[-2000:]}")
        problems += differences(campaign.digest(output, log), expected)
        summary = ", ".join(" ".join(moment) for moment in moments) or "finished"
        print(f"run {runs}: {summary}: {problems or 'equal'}", flush=True)
        bad, runs = bad + bool(problems), runs + 1
        if not problems:
            shutil.rmtree(output)
    for moment, count in sorted(done.items()):
        print(f"{count:4} {' '.join(moment)}")
    print(f"{sum(done.values())} kills in {runs} runs, of which {bad} differ")
    return not bad


def resume(output: pathlib.Path) -> list[str]:
    """Return --resume if a start without it would refuse the directory."""
    rows, checkpoints = output / "metrics.jsonl", output / "checkpoints"
    begun = rows.exists() and rows.stat().st_size > 0
    return ["--resume"] if begun or (checkpoints.exists() and any(checkpoints.iterdir())) else []


def flip(campaign: Campaign, flips: int, seed: int) -> bool:
    """Damage each file of the newest checkpoint in many ways, one at a time."""
    campaign.reference()
    return campaign.call(flip_in, campaign.folder / "reference", flips, seed) == 0


def flip_in(run: pathlib.Path, flips: int, seed: int) -> None:
    """Damage the newest checkpoint of a finished run in a child process; another one is intact."""
    from lpo_jax.errors import UserError
    from lpo_jax.runs.checkpoint import Checkpoints, load_run

    chance, silent, count = random.Random(seed), [], 0
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        newest, before = checkpoints.latest(), checkpoints.steps()[-2]
    folder = run / "checkpoints" / str(newest)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        held = path.read_bytes()
        bits = chance.sample(range(8 * len(held)), min(8 * len(held), max(1, flips // len(files))))
        damaged = [held[: b // 8] + bytes([held[b // 8] ^ 1 << b % 8]) + held[b // 8 + 1 :] for b in bits]
        for data in [*damaged, held[:-1], held[: len(held) // 2], held + b"\0", None]:
            path.unlink() if data is None else path.write_bytes(data)
            count += 1
            try:
                load_run(run, "latest")
            except UserError as error:
                if f"the checkpoint of step {before} is intact" not in str(error) or "\n" in str(error):
                    silent.append(f"{path}: the error is {error}")
            else:
                silent.append(f"{path}: was restored")
        path.write_bytes(held)
    load_run(run, "latest")
    print(f"{count} damages of {len(files)} files; {len(silent)} did not cause the expected error")
    print("\n".join(silent[:20]))
    sys.exit(bool(silent))


class Disk:
    """A small ext4 file system in a file, mounted in the private mount namespace of this process."""

    def __init__(self, folder: pathlib.Path):
        self.image, self.root = folder / "disk.img", folder / "disk"
        self.root.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.root], check=True)

    def strike(self, kind: str) -> None:
        if kind == "read-only":  # as after a file system error
            subprocess.run(["mount", "-o", "remount,abort", self.root], check=False, capture_output=True)
        elif kind == "dead":
            opened = os.open(self.root, os.O_RDONLY)
            fcntl.ioctl(opened, EXT4_SHUTDOWN, NO_FLUSH)
        else:
            with open(self.root / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 512)
        (self.image.parent / "struck").write_text(str(time.monotonic()))

    def repair(self, kind: str) -> None:
        if kind == "full":
            (self.root / "ballast").unlink()
            return
        for _ in range(50):  # a verifier process may still be running
            if subprocess.run(["umount", self.root], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        self.mount()


def disk(campaign: Campaign, writes: list[str]) -> bool:
    """Test each fault before each kind of write, at the first call and at a later one."""
    disk, bad = Disk(campaign.folder), 0
    expected = campaign.reference(plots=True)
    numbers = {write: (1,) if write == "plots" else (1, 4) for write in writes}
    cases = [(write, number, kind) for write in writes for number in numbers[write] for kind in FAULTS]
    for case, (write, number, kind) in enumerate(cases):
        output, log = disk.root / f"run{case}", campaign.folder / f"run{case}.log"
        config = campaign.folder / f"run{case}.yaml"
        write_config(campaign.folder, campaign.folder / f"run{case}", True)
        arguments, struck = ["train", str(config), f"--output={output}"], campaign.folder / "struck"
        struck.unlink(missing_ok=True)
        status = campaign.call(run_lpo, arguments, log, fault=(write, number, kind, disk))
        seconds = time.monotonic() - float(struck.read_text()) if struck.exists() else None
        text = log.read_text()
        errors = [line for line in text.splitlines() if line.startswith("lpo: ")]
        problems = []
        if seconds is None:
            problems.append("the disk never failed")
        elif seconds > 10:
            problems.append(f"ended after {seconds:.0f} s")
        if status not in (1, 2) or len(errors) != 1 or "Traceback" in text or "Error:" in text:
            problems.append(f"exit status {status}: {text[-3000:]}")
        if seconds is not None:
            disk.repair(kind)
        if campaign.call(run_lpo, [*arguments, *resume(output)], log):
            problems.append(f"cannot be resumed: {log.read_text()[-2000:]}")
        problems += differences(campaign.digest(output, log), expected)
        print(
            f"{kind}, {write} {number}: {seconds or 0:.1f} s, {errors[:1]}: {problems or 'resumed, equal'}",
            flush=True,
        )
        bad += bool(problems)
        shutil.rmtree(output)
    print(f"{len(cases)} cases, {bad} failed")
    return not bad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "flip", "disk"))
    parser.add_argument("--kills", type=int, default=100, help="number of kills in total (100)")
    parser.add_argument("--flips", type=int, default=1000, help="number of flipped bits in total (1000)")
    parser.add_argument("--writes", nargs="+", choices=WRITES, default=list(WRITES), help="kinds (all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and bits (0)")
    options = parser.parse_args()
    if options.what == "disk" and os.environ.get("LPO_OWN_MOUNTS") != "1":
        os.environ["LPO_OWN_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--propagation=private", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(pathlib.Path(folder))
        if options.what == "kill":
            good = kill(campaign, options.kills, options.seed)
        elif options.what == "flip":
            good = flip(campaign, options.flips, options.seed)
        else:
            good = disk(campaign, options.writes)
            subprocess.run(["umount", pathlib.Path(folder) / "disk"], check=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
