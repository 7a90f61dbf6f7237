"""Validation of configs: values out of range, non-finite numbers, duplicate keys and files that are not YAML."""

import pytest
import yaml

from lpo_jax.config import FREE_FORM, describe_options, load_config, override_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.yaml_text import dump_yaml, parse_yaml

PLAIN = {"output": "x", "model": {"path": "y"}, "task": "countdown"}
KEYS = [key for key, _, _ in describe_options() if key not in FREE_FORM]
TRACKERS = ("tracking.wandb", "tracking.trackio")


def refusal(function, *arguments):
    with pytest.raises(UserError) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "Infinity", "-inf", "1e999", "''", "'  '"])
def test_no_key_accepts_a_non_finite_number_or_an_empty_string(value):
    config = parse_config(PLAIN)
    taken = []
    for key in KEYS:
        try:
            override_config(config, [f"--{key}={value}"])
        except UserError as error:
            assert key.rpartition(".")[2] in str(error) and "\n" not in str(error)
        else:
            taken.append(key)
    # String-valued keys accept "nan": it may be the name of a directory, a model, a part of a verdict or a project.
    texts = {"output", "model.path", "checkpoint.directory", "evaluation.score", *TRACKERS}
    assert set(taken) <= (texts if value not in ("''", "'  '") else set())


@pytest.mark.parametrize(
    "key", ["sampling.stop", "model.lora.targets", "compare.rules", "compare.methods", "compare.against"]
)
def test_no_list_of_strings_accepts_an_empty_string(key):
    assert key in refusal(override_config, parse_config(PLAIN), [f"--{key}=[a, '']"])


@pytest.mark.parametrize(
    "override, key",
    [
        ("--objective.temperature=.nan", "objective.temperature"),
        ("--objective.clip={low: .inf}", "objective.clip.low"),
        ("--task.heldout_fraction=.nan", "task.heldout_fraction"),
        ("--compare.methods=[{name: dapo, clip_high: .inf}]", "compare.methods.0.clip_high"),
    ],
)
def test_options_of_tasks_and_methods_are_finite(override, key):
    assert f"{key}: should be a finite number" in refusal(override_config, parse_config(PLAIN), [override])


@pytest.mark.parametrize("section", FREE_FORM)
def test_a_blank_name_is_missing(section):
    assert f"{section}.name is missing" in refusal(
        override_config, parse_config(PLAIN), [f"--{section}.name=' '"]
    )


DUPLICATES = {
    "a section": (
        "output: x\nsampling: {num_responses: 4}\ntraining: {steps: 1}\nsampling: {max_tokens: 6}\n",
        "sampling",
        4,
        2,
    ),
    "a key of a section": ("training:\n  steps: 1\n  remat: true\n  steps: 2\n", "steps", 4, 2),
    "a key of a list's mapping": (
        "compare:\n  methods:\n    - name: a\n      clip: 1\n      clip: 2\n",
        "clip",
        5,
        4,
    ),
    "in quotes and without": ("seed: 1\n'seed': 2\n", "seed", 2, 1),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_a_duplicate_key_is_refused_with_both_lines(tmp_path, case):
    text, key, second, first = DUPLICATES[case]
    error = refusal(load_config, write(tmp_path, text))
    assert f"line {second}: the key {key!r} is already set in line {first}" in error


def test_a_key_may_occur_in_two_sections_and_override_a_merged_one(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}\n"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


NOT_YAML = {
    "an impossible date": "output: 2024-13-45\n",
    "a key that is a list": "? [a]\n: 1\n",
    "an unknown tag": "output: !!python/object:os.system x\n",
    "a control character": "output: \x07\n",
    "nesting": "output: " + "[" * 1000 + "]" * 1000 + "\n",
    "an unclosed bracket": "output: [1\n",
    "nothing": "",
    "a text": "just words",
    "a list": "- a\n",
}


@pytest.mark.parametrize("case", NOT_YAML)
def test_a_file_that_is_no_config_gives_a_one_line_error(tmp_path, case):
    assert str(tmp_path / "c.yaml") in refusal(load_config, write(tmp_path, NOT_YAML[case]))


@pytest.mark.parametrize("value", ["2024-13-45", "[1", "{a: 1, b: 2"])
def test_an_override_that_is_not_yaml_gives_a_one_line_error(value):
    assert "not valid YAML" in refusal(override_config, parse_config(PLAIN), [f"--seed={value}"])


def test_a_resolved_config_survives_a_round_trip():
    values = parse_config(PLAIN | {"sampling": {"stop": ["1e5", "nan", "2024-01-01", "\u2028"]}}).to_dict()
    assert parse_yaml(dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml(values)) == values
