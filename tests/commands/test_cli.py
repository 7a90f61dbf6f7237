"""Test the command line: every user error prints one line and exits with status 2 before work begins."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lpo_jax import objectives
from lpo_jax.commands.main import COMMANDS, main
from lpo_jax.config import describe_options, load_config
from lpo_jax.runs.signals import Interrupted


@pytest.fixture
def config_file(tmp_path, run_config):
    def write(**sections):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(run_config(**sections)))
        return str(path)

    return write


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command, checks that it ends with a user error, and returns the error line."""

    def run(*arguments):
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("lpo: ") and "Traceback" not in lines[0]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--trainin.steps=3", "unknown key 'trainin'; did you mean 'training'?"),
        ("--training.step=3", "unknown key 'training.step'; did you mean 'steps'?"),
        ("--training.steps=many", "training.steps: input should be a valid integer"),
        ("--training.steps=-1", "training.steps: input should be greater than or equal to 0"),
        ("--model.dtype=fp8", "model.dtype: input should be 'float32' or 'bfloat16'"),
        ("--training.updates_per_step=3", "training.prompts_per_step = 4 does not divide"),
        ("--sampling.num_responses=1", "needs at least 2"),
        ("--sampling.top_p=0.9", "training needs temperature > 0 and top_k, top_p and min_p off"),
        ("--sampling.temperature=0", "training needs temperature > 0"),
        ("--objective.name=lpo-foward", "did you mean 'lpo-forward'?"),
        ("--objective.clip=hrad", "did you mean 'hard'?"),
        ("--objective.gamma=1", "unknown option 'gamma'"),
        ("--task.name=coutdown", "did you mean 'countdown'?"),
        ("--task.fil=x", "fil"),
        ("--task.file=missing.py", "missing.py"),
        ("--model.path=no/such/place", "no/such/place"),
        ("--sampling.max_prompt_tokens=5", "such rows); raise the limit or set sampling.overlong_prompts"),
        ("--sampling.max_tokens=500", "is more than the 128 positions"),
        ("--training.prompts_per_step=32", "is more than the 24 training rows"),
        ("--evaluation.ks=[8]", "pass@k needs k <= 4 samples"),
        ("--warm_start.batch_size=99", None),
        ("nonsense", "write it as --section.key=value"),
    ],
)
def test_mistakes_in_a_config(config_file, fails, tmp_path, override, says):
    path = config_file()
    if says is None:
        line = fails("train", path, override, "--warm_start.steps=1")
        assert "warm_start.batch_size = 99 is more than the 24 training rows" in line
    else:
        assert says in fails("train", path, override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "sft", "meta", "compare"])
def test_run_stopped_by_a_signal_exits_with_130(config_file, capsys, monkeypatch, command):
    def stopped(config, *, resume):
        raise Interrupted

    module = (
        "compare.command" if command == "compare" else f"training.{'loop' if command == 'train' else command}"
    )
    monkeypatch.setattr(f"lpo_jax.{module}.{command}", stopped)
    path = config_file()
    arguments = [command, path, "--seed=1", "--evaluation.ks=[1, 2]"]
    assert main(arguments) == 130  # launchers interpret 0 as a finished job
    again = capsys.readouterr().out.split("Resume with: ")[1]
    assert shlex.split(again) == ["lpo", *arguments, "--resume"]  # a shell reads it as it was given


def test_mistakes_in_a_config_file(fails, tmp_path):
    path = tmp_path / "config.yaml"
    assert "no such file" in fails("train", str(path))
    path.write_text("a: [1, 2")
    assert "not valid YAML" in fails("train", str(path))
    path.write_text("just text")
    assert "expected sections" in fails("train", str(path))
    path.write_text("output: x\nmodel: {path: y}\n")
    assert "task.name is missing" in fails("train", str(path))
    path.write_text("model: {path: y}\ntask: countdown\n")
    assert "output is missing" in fails("train", str(path))


def test_mistakes_in_a_model_directory(config_file, fails, tmp_path, tiny_model):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = config_file(model={"path": str(model)})
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fails("train", path)
    weights.unlink()
    assert str(model) in fails("train", path)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"model_type": "mamba"}))
    assert "'mamba'" in fails("train", path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"answer": 3}', "question"),
        ("{}", "jsonl:2: the row is empty"),
        ('{"question": "2 + 2 = "}', "answer"),
        ("not json", "jsonl:2: not JSON"),
    ],
)
def test_mistakes_in_a_data_file(config_file, fails, tmp_path, line, says):
    data = tmp_path / "data.jsonl"
    task = {"name": "jsonl", "path": str(data), "prompt": "{question}", "verifier": "arithmetic"}
    data.write_text('{"question": "1 + 1 = ", "answer": 2}\n' + line + "\n")
    message = fails("train", config_file(task=task))
    assert says in message and str(data) in message


def test_failed_start_can_be_started_again(config_file, fails, no_plots, tmp_path, tiny_model):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = config_file(
        model={"path": str(model)}, training={"steps": 0}, evaluation={"problems": 4}, checkpoint={"every": 0}
    )
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    fails("train", path)
    weights.write_bytes(whole)
    assert main(["train", path]) == 0


def test_foreign_output_directory_is_left_alone(config_file, fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert "is not empty and holds no run" in fails("train", config_file())
    assert "is not empty and holds no run" in fails("train", config_file(), "--resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_overlong_prompts_can_be_dropped(config_file, no_plots, capsys):
    path = config_file(
        sampling={"max_prompt_tokens": 10, "overlong_prompts": "drop"},
        training={"steps": 0, "prompts_per_step": 2},
        evaluation={"problems": 2},
    )
    assert main(["train", path]) == 0
    assert "dropped for their length" in capsys.readouterr().out


def test_train_then_eval_export_and_sample(config_file, one_layout, capsys, tmp_path, fails):
    path, run, out = config_file(training={"steps": 1}), str(tmp_path / "run"), str(tmp_path / "hf")
    assert main(["train", path]) == 0
    printed = capsys.readouterr().out
    assert "prompts per step" in printed and "lpo export" in printed
    plots = sorted(path.name for path in (tmp_path / "run" / "plots").iterdir())
    assert plots == ["diagnostics.png", "learning_curves.png"]
    for name in ("config.yaml", "run.json", "metrics.jsonl", "rollouts/1.jsonl", f"plots/{plots[1]}"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["data"]["content_hash"]) == 64

    assert main(["eval", run, "--checkpoint", "latest", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    during = [row["val-core/python/acc/pass@1"] for row in rows if "val-core/python/acc/pass@1" in row]
    assert summary["pass@1"]["mean"] == during[-1]  # same problems and same random numbers
    assert main(["eval", path, "--evaluation.problems=4"]) == 0
    assert "pass@1" in capsys.readouterr().out
    suite = tmp_path / "suite.yaml"
    task = load_config(path).task
    suite.write_text(yaml.safe_dump([{"name": "mine", "k": 4, "task": task}]))
    sizes = ["--problems=3", "--batch=4", "--max-tokens=6", "--json", "--out", str(tmp_path / "suite")]
    assert main(["eval", run, "--suite", str(suite), "--checkpoint=latest", *sizes]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert "step 1" in summary["model"] and summary["benchmarks"]["mine"]["samples"] == 12

    assert main(["export", run, out]) == 0
    capsys.readouterr()
    assert out in fails("export", run, out)
    for model in (run, out):
        assert (
            main(["sample", model, "say xx1", "--max-tokens", "6", "-n", "4", "--seed", "3", "--json"]) == 0
        )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == lines[4:] and lines[0]["prompt"] == "say xx1"


def test_exported_model_has_the_trained_weights(config_file, one_layout, no_plots, tmp_path):
    import lpo_jax
    from lpo_jax.runs.checkpoint import load_run

    assert main(["train", config_file(training={"steps": 1}, evaluation={"problems": 4})]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--checkpoint", "latest"]) == 0
    trained = load_run(tmp_path / "run", "latest")[0].params
    exported = lpo_jax.load_model(str(tmp_path / "hf")).params
    np.testing.assert_array_equal(trained["layers"]["wq"], exported["layers"]["wq"])


def test_mistakes_in_a_run_directory(fails, tmp_path):
    assert "not a run directory" in fails("export", str(tmp_path), str(tmp_path / "out"))
    assert "not a run directory" in fails("eval", str(tmp_path))


def test_methods(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in listed] == list(objectives.names())
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in objectives.names())


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lpo {command} ")
    lists_config_keys = all(f"--{key}=" in printed for key, _, _ in describe_options())
    without = ("show", "report", "watch", "diff", "sample", "export", "methods", "simplex")
    assert lists_config_keys == (command not in without)


def test_parsing_imports_no_heavy_package():
    heavy = {"jax", "numpy", "pydantic", "rich", "transformers", "yaml"}
    code = (
        "import sys; from lpo_jax.commands.main import make_parser; make_parser().format_help(); "
        f"print(*{heavy} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


def test_importing_starts_no_accelerator():
    code = (
        "import lpo_jax, lpo_jax.commands.main, lpo_jax.config, lpo_jax.objectives, jax; "
        "from jax._src import xla_bridge; sys.exit(bool(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", "import sys; " + code]).returncode == 0


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_are_valid(path):
    from lpo_jax import tasks
    from lpo_jax.training.check import check_config

    config = load_config(path)
    check_config(config)
    options = dict(config.task)
    if not str(options.get("path")).startswith("hf:"):  # tested in tests/launch/test_paper_configs.py
        assert tasks.get(options.pop("name"), **options).train


def test_scientific_notation_is_a_number(config_file):
    assert load_config(config_file(), ["--optimizer.learning_rate=1e-6"]).optimizer.learning_rate == 1e-6
    assert load_config(config_file(), ["--objective.epsilon=2e-1"]).objective["epsilon"] == 0.2
