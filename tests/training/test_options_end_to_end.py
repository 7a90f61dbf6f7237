"""Options whose effect is visible only in a whole run."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpo_jax import load_model
from lpo_jax.config import parse_config
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training import learner
from lpo_jax.training.loop import train

# With its usual eps, Adam amplifies a gradient that is only rounding error to its sign.
SMOOTH = {"learning_rate": 1e-2, "eps": 1.0, "weight_decay": 0.0}


def texts(run):
    return {
        path.stem: [json.loads(line)["output"] for line in path.read_text().splitlines()]
        for path in (Path(run) / "rollouts").glob("*.jsonl")
    }


def test_checkpoints_elsewhere_are_found_by_resume_and_by_load_run(
    run_config, one_layout, tmp_path, no_plots
):
    elsewhere = {"checkpoint": {"every": 1, "directory": str(tmp_path / "elsewhere")}}
    ends = []
    for output, sections, stops in (("whole", {}, (2,)), ("parts", elsewhere, (1, 2))):
        for steps in stops:
            evaluation = {"every": 0, "problems": 4}
            values = run_config(output, training={"steps": steps}, evaluation=evaluation, **sections)
            train(parse_config(values), resume=steps > stops[0])
        ends.append(load_run(values["output"], "latest"))
    assert not (tmp_path / "parts" / "checkpoints").exists() and (tmp_path / "elsewhere").is_dir()
    assert ends[0][1] == ends[1][1] == 2
    chex.assert_trees_all_equal(ends[0][0].params, ends[1][0].params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "updates", "behaviour"),
    [
        ({"name": "lpo-forward"}, 1, "sampled"),
        # Scored are both minibatches by the behaviour policy or the reference, and the second one before its update.
        ({"name": "lpo-forward", "degenerate": "mask"}, 2, "rescored"),
        ({"name": "grpo", "degenerate": "mask", "kl_coef": 0.1}, 2, "sampled"),
    ],
)
def test_updates_of_what_has_a_signal_equal_those_of_everything(
    run_config, no_plots, monkeypatch, objective, updates, behaviour
):
    """Responses of one token often have equal rewards in a group."""
    ends, shares, scored, score = {}, {}, {}, learner.score
    for way in ("signal", "all"):
        training = {"steps": 1, "updates_per_step": updates, "pull_back": way, "behaviour": behaviour}
        sections = {"sampling": {"max_tokens": 1}, "evaluation": {"every": 0, "problems": 4}}
        values = run_config(way, training=training, optimizer=SMOOTH, objective=objective, **sections)
        seen = scored[way] = []

        def counted(runner, params, groups, seen=seen):
            seen.append(groups.layout.num_tokens)
            return score(runner, params, groups)

        monkeypatch.setattr(learner, "score", counted)
        train(parse_config(values))
        rows = [row for row in read_metrics(values["output"]) if "perf/signal_fraction" in row]
        shares[way] = [row["perf/signal_fraction"] for row in rows]
        ends[way] = texts(values["output"]), load_run(values["output"], "latest")[0].params
    assert shares["all"] == [1] and 0 < shares["signal"][0] < 1
    if updates == 1:
        assert not scored["all"]
    else:
        assert len(scored["signal"]) == len(scored["all"]) == 3
        assert 0 < sum(scored["signal"]) < sum(scored["all"])
    assert ends["signal"][0] == ends["all"][0]
    chex.assert_trees_all_close(ends["signal"][1], ends["all"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fewer_rows_at_once_sample_the_same(run_config, no_plots):
    ends = []
    for output, max_rows in (("all", 0), ("few", 6)):
        values = run_config(output, sampling={"max_rows": max_rows}, training={"steps": 2}, optimizer=SMOOTH)
        train(parse_config(values))
        ends.append((texts(values["output"]), load_run(values["output"], "latest")[0].params))
    assert ends[0][0] == ends[1][0]
    chex.assert_trees_all_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"rank": 2, "targets": ["wq"]}])
def test_a_head_that_the_config_denies_is_trained_and_exported(
    lora, run_config, tiny_model, tmp_path, no_plots, one_layout
):
    path = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = np.ascontiguousarray(weights["model.embed_tokens.weight"][::-1])
    save_file(weights, path / "model.safetensors")
    values = run_config(
        model={"path": str(path), "lora": lora},
        training={"steps": 1, "updates_per_step": 1},
        evaluation={"every": 0, "problems": 4},
        optimizer={"weight_decay": 0.1},
    )
    with pytest.warns(UserWarning, match="tie_word_embeddings is true, but lm_head.weight differs"):
        train(parse_config(values))
        model = load_run(values["output"], "latest")[0]
    assert not model.config.tie_embeddings
    moved = np.abs(np.asarray(model.params["unembed"]) - weights["lm_head.weight"]).max()
    assert (moved == 0) if lora else (0 < moved < 0.1)
    model.save(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    chex.assert_trees_all_equal(load_model(tmp_path / "hf").params, model.params)


@pytest.mark.parametrize("wanted", [False, True])
def test_plots_are_drawn_where_they_are_wanted(run_config, one_layout, wanted, monkeypatch):
    drawn = []
    monkeypatch.setattr("lpo_jax.reporting.save_plots", lambda run: drawn.append(run) or [])
    values = run_config(training={"steps": 1, "save_plots": wanted})
    train(parse_config(values))
    assert bool(drawn) is Path(values["output"], "report.html").exists() is wanted


@pytest.mark.slow
def test_the_base_of_adapters_is_stored_as_asked(run_config, run_params, no_plots):
    values = run_config(training={"steps": 1})
    values["model"] |= {"dtype": "float32", "lora": {"rank": 2, "targets": ["wq"], "base_dtype": "bfloat16"}}
    train(parse_config(values))
    params = load_run(values["output"], "latest")[0].params
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), run_params)
    kept = lambda tree: jax.tree.map(lambda p: np.asarray(p, np.float32), tree)  # noqa: E731
    found, expected = kept(params), kept(rounded)
    assert (found["layers"]["wq"] != expected["layers"]["wq"]).any()
    found["layers"].pop("wq"), expected["layers"].pop("wq")
    chex.assert_trees_all_equal(found, expected)
