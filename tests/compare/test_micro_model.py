"""`configs/micro` is up to date with its script, and its tokenizer fits its task."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from lpo_jax import tasks
from lpo_jax.config import load_config, parse_config
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.rollout.encode import encode_prompt, encode_solution, prompt_text
from lpo_jax.training.check import check_config
from lpo_jax.training.model import TrainedModel

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "configs" / "micro"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_micro_model", ROOT / "scripts" / "make_micro_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["micro", "micro_vision"])
def test_the_directories_are_the_output_of_their_script(script, tmp_path, name):
    script.main(tmp_path / name)
    for file in ("tokenizer.json", "preprocessor_config.json"):
        written, committed = tmp_path / name / file, ROOT / "configs" / name / file
        assert written.exists() == committed.exists()
        assert not written.exists() or written.read_text() == committed.read_text()
    assert load_config_and_tokenizer(ROOT / "configs" / "micro_vision")[0] == script.VISION_CONFIG


def test_the_micro_model_is_that_of_its_script(script):
    config, tokenizer, eos_ids = load_config_and_tokenizer(MICRO)
    assert config == script.CONFIG and len(tokenizer) == config.vocab_size
    assert eos_ids == (tokenizer.eos_token_id,) == (1,)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("compare_countdown_micro", {}),
        ("micro_vision", {}),
        ("micro_vision", {"questions": ["dots", "corners", "longest", "angle"]}),
    ],
)
def test_prompts_and_solutions_are_short_and_round_trip(file, changes):
    config = load_config(ROOT / "configs" / f"{file}.yaml")
    check_config(config)
    options = {k: v for k, v in config.task.items() if k != "name"} | {"train_size": 200, "heldout_size": 8}
    task = tasks.get(config.task["name"], **options | changes)
    _, tokenizer, _ = load_config_and_tokenizer(ROOT / config.model.path)
    for row in task.train:
        prompt, solution = encode_prompt(task, tokenizer, row), encode_solution(task, tokenizer, row)
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        assert prompt_text(tokenizer, prompt) == task.prompt(row).replace("<image>", shown)
        assert tokenizer.decode(solution, skip_special_tokens=True) == task.solution(row)
        assert tokenizer.unk_token_id not in prompt + solution
        assert len(prompt) <= config.sampling.max_prompt_tokens
        assert len(solution) <= config.sampling.max_tokens


def test_weights_are_drawn_from_the_seed(run_config):
    model_config, _, _ = load_config_and_tokenizer(MICRO)
    config = parse_config(run_config(model={"path": str(MICRO), "init": "random"}))

    def drawn(seed):
        return TrainedModel(dataclasses.replace(config, seed=seed), model_config).load_params()

    first, again, other = drawn(0), drawn(0), drawn(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])
