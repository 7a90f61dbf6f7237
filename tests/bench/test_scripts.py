"""The scripts in `benchmarks/` that need no peer and no accelerator run to their JSON line, on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHAPES = "--prompts=2 --responses=4 --prompt-tokens=8 --tokens=8 --repeats=1"
COMMANDS = {
    "uneven.py": f"{SHAPES} --sampling.max_rows=4",
    "products.py": SHAPES,
    "tail.py": "--prompts=2 --responses=4 --prompt-tokens=8 --typical=1 --steps=2 --updates=1",
    "tail.py, simulated": "--shards=2 --prompts=4 --responses=2 --prompt-tokens=8 --typical=4 --steps=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_prints_one_json_line(name, tiny_model, tmp_path):
    script = ROOT / "benchmarks" / name.split(",")[0]
    command = [sys.executable, str(script), f"--model={tiny_model}", *COMMANDS[name].split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if name == "tail.py":
        assert result["staleness_max"] == 1 and result["compiled_while_timed"] == 0
