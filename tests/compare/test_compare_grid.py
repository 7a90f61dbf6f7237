"""The grid: its cells, what pairs them, and errors before the first run."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lpo_jax.commands.main import main
from lpo_jax.compare.grid import cell_base_config, make_grid, warm_config
from lpo_jax.config import load_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.runs.directory import RunDirectory

GRID = {
    "rules": ["grpo", "maxrl"],
    "methods": [{"name": "grpo", "label": "pg"}, "lpo-forward"],
    "seeds": [3, 5],
}


@pytest.fixture
def compared(run_config):
    """The values of a config with a grid; keyword arguments change it."""

    def make(**changes):
        values = run_config(compare=GRID | changes)
        del values["objective"]
        return values

    return make


def test_the_grid_is_the_product_of_rules_methods_and_seeds(compared):
    grid = make_grid(parse_config(compared()))
    assert [(c.rule, c.method, c.seed) for c in grid.cells] == [
        (rule, method, seed)
        for rule in ("grpo", "maxrl")
        for method in ("pg", "lpo-forward")
        for seed in (3, 5)
    ]
    assert grid.cells[0].name == "grpo-pg-seed3"
    assert grid.against == ("pg",)  # the first
    assert len({cell.config.output for cell in grid.cells}) == 8


def test_cells_of_a_seed_differ_only_in_objective_and_output(compared):
    cells = make_grid(parse_config(compared())).cells
    plain = {
        dataclasses.replace(c.config, output="", objective={}, seed=0).to_dict().__repr__() for c in cells
    }
    assert len(plain) == 1
    for cell in cells:
        assert cell.config.seed == cell.seed
        assert cell.config.objective["temperature"] == cell.rule
    names = {cell.method: cell.config.objective["name"] for cell in cells}
    assert names == {"pg": "grpo", "lpo-forward": "lpo-forward"}


def test_cells_start_from_the_common_warm_start(compared):
    config = parse_config(compared() | {"warm_start": {"steps": 7}})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init="random"))
    warm, start = warm_config(config), cell_base_config(config)
    assert warm.warm_start.steps == 7 and warm.model == config.model
    assert start.warm_start.steps == 0 and start.model.init == "weights"
    assert start.model.path == f"{warm.output}/hf"
    without = dataclasses.replace(config, warm_start=dataclasses.replace(config.warm_start, steps=0))
    assert (
        cell_base_config(without).model == config.model
    )  # without a warm start, cells start from the model itself


def test_numbers_are_rules_and_methods_keep_their_options(compared):
    methods = [{"name": "lpo-forward", "score": "sum"}, {"name": "lpo-forward", "label": "mean"}]
    cells = make_grid(parse_config(compared(rules=[0.5], methods=methods, seeds=[0]))).cells
    assert [cell.name for cell in cells] == ["0.5-lpo-forward-seed0", "0.5-mean-seed0"]
    assert cells[0].config.objective == {"name": "lpo-forward", "score": "sum", "temperature": 0.5}


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"methods": ["lpo-foward"]}, "unknown method 'lpo-foward'; did you mean 'lpo-forward'?"),
        ({"rules": ["gpro"]}, "did you mean 'grpo'?"),
        ({"rules": [0.0]}, "a positive number, got 0.0"),
        ({"rules": []}, "compare.rules is empty"),
        ({"methods": []}, "compare.methods is empty"),
        ({"seeds": []}, "compare.seeds is empty"),
        ({"seeds": [1, 1]}, "compare.seeds: 1 occurs twice"),
        ({"rules": ["grpo", "grpo"]}, "compare.rules: grpo occurs twice"),
        (
            {"methods": ["grpo", {"name": "grpo", "centre": "loo"}]},
            "grpo occurs twice; give the methods different labels",
        ),
        ({"methods": [{"name": "lpo-forward", "temperature": 1}]}, "the temperature is set by compare.rules"),
        ({"methods": ["mpo"]}, "mpo has no temperature"),
        ({"methods": [{"label": "x"}]}, "unknown method None"),
        ({"methods": [{"name": "grpo", "label": "a/b"}]}, "label 'a/b' becomes part of file names"),
        ({"against": ["forward"]}, "compare.against: no method 'forward'; did you mean 'lpo-forward'?"),
        (
            {"methods": [{"name": "grpo", "epsilon": 1}]},
            "cell grpo-grpo-seed3: objective: grpo: unknown option 'epsilon'",
        ),
        ({"workers": 0}, "compare.workers"),
        ({"rule": ["grpo"]}, "unknown key 'compare.rule'; did you mean 'rules'?"),
    ],
)
def test_an_invalid_grid_is_a_one_line_error(compared, changes, says):
    with pytest.raises(UserError) as refused:
        make_grid(parse_config(compared(**changes)))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_an_objective_outside_the_grid_is_an_error(compared):
    with pytest.raises(UserError, match=r"lpo compare takes its methods from compare\.methods"):
        make_grid(parse_config(compared() | {"objective": "grpo"}))


def test_a_checkpoint_directory_is_an_error(compared):
    with pytest.raises(UserError, match=r"checkpoint\.directory: each cell of a comparison has its own"):
        make_grid(parse_config(compared() | {"checkpoint": {"directory": "elsewhere"}}))


def test_a_directory_with_another_run_is_an_error_before_the_first_run(compared):
    config = parse_config(compared())
    cell = make_grid(config).cells[-1]
    other = dataclasses.replace(cell.config, objective={"name": "lpo-reverse"})
    with RunDirectory(other, "train", resume=False) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match=r"cannot resume with objective\.name = 'lpo-forward'"):
        make_grid(config)


def test_a_started_cell_with_its_resolved_behaviour_can_be_resumed(compared):
    config = parse_config(compared())
    cell = make_grid(config).cells[0]
    training = dataclasses.replace(cell.config.training, behaviour="sampled")
    with RunDirectory(dataclasses.replace(cell.config, training=training), "train", resume=False) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert len(make_grid(config).cells) == 8


def test_the_command_prints_one_line_errors(compared, tmp_path, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(compared(methods=["lpo-foward"])))
    assert main(["compare", str(path)]) == 2
    assert "did you mean 'lpo-forward'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_shipped_grid_is_valid():
    config = load_config(Path(__file__).parents[2] / "configs" / "compare_countdown_micro.yaml")
    grid = make_grid(config)
    assert len(grid.cells) == 75 and grid.against == ("pg", "forward-onpolicy")
