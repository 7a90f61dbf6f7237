"""Test the paper's configs: each one loads, can train, and reads data in the format of the hub."""

import json
from pathlib import Path

import PIL.Image
import pytest

from lpo_jax import tasks
from lpo_jax.config import load_config
from lpo_jax.tasks import records
from lpo_jax.training.check import check_config

ROOT = Path(__file__).parents[2]

# Model, prompts per round and per minibatch, response tokens, steps, task: from the paper's appendix D.3.
PAPER = {
    "countdown_4b": ("Qwen/Qwen3-4B-Base", 128, 64, 1024, 130, "countdown"),
    "math_1p7b": ("Qwen/Qwen3-1.7B-Base", 256, 128, 4096, 800, "math"),
    "math_8b": ("Qwen/Qwen3-8B-Base", 256, 128, 4096, 500, "math"),
    "polaris_14b": ("Qwen/Qwen3-14B-Base", 256, 128, 4096, 200, "math"),
    "geometry_3b_vl": ("Qwen/Qwen2.5-VL-3B-Instruct", 128, 64, 1024, 200, "geometry3k"),
    "code_1p7b": ("Qwen/Qwen3-1.7B-Base", 256, 128, 4096, 450, "code"),
}


def countdown(index):
    return {"target": index + 6, "nums": [index + 1, 2, 3]}


def mathematics(index):
    return {"problem": f"What is {index} + 1?", "answer": str(index + 1)}


def code(index):
    tests = json.dumps({"inputs": [f"{index}\n"], "outputs": [f"{index + 1}\n"]})
    prompt = [{"role": "system", "content": "..."}, {"role": "user", "content": f"Add 1 to {index}."}]
    return {"ability": "code", "prompt": prompt, "reward_model": {"style": "rule", "ground_truth": tests}}


def geometry(index):
    return {"problem": f"<image>Find {index}.", "answer": str(index), "images": ["x.png"]}


ROWS = {"countdown": countdown, "math": mathematics, "code": code, "geometry3k": geometry}


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    objective = check_config(config)
    training, optimizer = config.training, config.optimizer
    minibatch = training.prompts_per_step // training.updates_per_step
    shape = (
        training.prompts_per_step,
        minibatch,
        config.sampling.max_tokens,
        training.steps,
        config.task["name"],
    )
    assert (config.model.path.removeprefix("hf:"), *shape) == PAPER[name]
    assert (config.sampling.num_responses, config.sampling.temperature) == (8, 1.0)
    assert config.evaluation.temperature == 0.6
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.weight_decay) == (
        1e-6,
        0.9,
        0.999,
        0.1,
    )
    assert objective.name == "lpo-forward" and config.objective["epsilon"] == 0.2
    assert config.output == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_headers(name):
    header = (ROOT / "configs" / f"{name}.yaml").read_text().partition("output:")[0]
    assert "arXiv 2605.06139" in header and "planned on:" in header
    assert f"lpo train configs/{name}.yaml" in header and f"lpo eval runs/{name} --suite" in header


@pytest.mark.parametrize("name", PAPER)
def test_data(name, tmp_path, monkeypatch):
    options = dict(load_config(ROOT / "configs" / f"{name}.yaml").task)
    kind = options.pop("name")
    asked, rows = [], options.get("train_size", 40) + options.get("heldout_size", 0)

    def from_hub(source, split):
        asked.append(source)
        first = 0 if split == "train" else 3000  # problems of the other split
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps(ROWS[kind](first + index)) for index in range(rows)))
        return [path]

    PIL.Image.new("L", (40, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(records, "_from_hub", from_hub)
    monkeypatch.setenv("LPO_CACHE", str(tmp_path / "cache"))
    task = tasks.get(kind, **options)
    assert set(asked) == {options[key] for key in ("path", "heldout") if key in options}
    assert len(task.train) == options.get("train_size", rows)
    assert len(task.heldout) == options.get("heldout_size", rows)
    assert task.prompt(task.train[0])
