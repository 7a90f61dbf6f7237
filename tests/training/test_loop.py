"""Whole runs of the real training loop on a tiny model: resumes, kills, equivalences and failures."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import yaml
from tiny import run_values

from lpo_jax import objectives
from lpo_jax.config import parse_config
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.models import runner
from lpo_jax.reporting import RunWriter, is_timing, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.signals import Interrupted
from lpo_jax.sampling import decode as sampling
from lpo_jax.sampling import kv_cache
from lpo_jax.training import learner, loop, optimizer, step
from lpo_jax.training import sft as training_sft
from lpo_jax.training.loop import train
from lpo_jax.training.session import Session
from lpo_jax.training.sft import sft

pytestmark = pytest.mark.usefixtures("no_plots")  # except in the reference run, which is made before any test

# A large epsilon makes Adam smooth in the gradient, so that rounding errors do not grow over several steps.
SMOOTH = {"learning_rate": 1e-2, "eps": 1e-1}


def learned(config):
    """Read the results that must not depend on interruptions: parameters, metrics and rollouts."""
    run = Path(config["output"])
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(run)]
    rollouts = {
        f"{folder}/{p.name}": p.read_text()
        for folder in ("rollouts", "validation")
        for p in (run / folder).iterdir()
    }
    return load_run(run, "latest")[0].params, [row for row in rows if len(row) > 1], rollouts


def assert_same_run(one, other):
    chex.assert_trees_all_equal(one[0], other[0])
    assert one[1] == other[1]
    assert one[2] == other[2]


def start(config, path, *arguments):
    """Start `lpo train` in a new process."""
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lpo_jax.commands.main", "train", str(path), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for_step(config, number, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if Path(config["output"], "rollouts", f"{number}.jsonl").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {number}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model, tiny_task):
    """The results and plots of an uninterrupted run of four steps."""
    values = run_values(tmp_path_factory.mktemp("reference") / "run", tiny_model, tiny_task)
    train(parse_config(values))
    return *learned(values), sorted(path.name for path in Path(values["output"], "plots").iterdir())


def test_learns_and_leaves_a_complete_record(reference):
    params, metrics, rollouts, plots = reference
    assert plots == ["diagnostics.png", "learning_curves.png"]
    steps = [row for row in metrics if "critic/score/mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["critic/score/mean"] > steps[0]["critic/score/mean"] + 0.1
    np.testing.assert_array_less(max(row["lpo/logp_gap_max"] for row in steps), 2e-4)
    np.testing.assert_array_less(max(abs(row["lpo/coef_sum"]) for row in steps), 1e-5)
    evaluations = [row for row in metrics if "val-core/python/acc/pass@1" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    responses = [json.loads(line) for line in rollouts["rollouts/3.jsonl"].splitlines()]
    assert len(responses) == 16
    for group in range(4):
        rows = responses[4 * group : 4 * group + 4]
        assert len({row["input"] for row in rows}) == 1 and [row["k"] for row in rows] == [0, 1, 2, 3]
        assert sum(row["target"] for row in rows) == pytest.approx(1, abs=1e-5)
        assert sum(row["policy"] for row in rows) == pytest.approx(1, abs=1e-5)
        assert sum(row["coefficient"] for row in rows) == pytest.approx(0, abs=1e-5)
        best = max(rows, key=lambda row: row["score"])
        assert best["target"] == max(row["target"] for row in rows)


def test_resume_is_exact(reference, run_config):
    train(parse_config(run_config(training={"steps": 2})))
    config = run_config(training={"steps": 4})
    train(parse_config(config), resume=True)
    assert_same_run(learned(config), reference)


def test_moments_on_the_host_change_nothing(reference, run_config):
    """Nor does a resume, which reads them to the memory of the device first."""
    for steps in (2, 4):
        config = run_config(training={"steps": steps}, optimizer={"state": "host"})
        train(parse_config(config), resume=steps == 4)
    assert_same_run(learned(config), reference)


def test_resume_is_exact_with_8_bits_and_rounded_moments(run_config, one_layout):
    sections = {"sampling": {"kv_dtype": "int8"}, "optimizer": {"state": "bfloat16"}}
    ends = []
    for output, stops in (("whole", (3,)), ("parts", (1, 3))):
        for steps in stops:
            config = run_config(output, training={"steps": steps}, evaluation={"every": 0}, **sections)
            train(parse_config(config), resume=steps > stops[0])
        ends.append(learned(config))
    chex.assert_trees_all_equal(ends[0][0], ends[1][0])
    steps = [[row for row in end[1] if "training/global_step" in row] for end in ends]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    of_training = [{name: text for name, text in end[2].items() if "rollouts" in name} for end in ends]
    assert of_training[0] == of_training[1]


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))],
)
def test_killed_run_goes_on_exactly(reference, run_config, tmp_path, number):
    config = run_config(training={"save_plots": False})
    process = start(config, tmp_path / "config.yaml")
    wait_for_step(config, 1, process)
    time.sleep(random.random())
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    if number != signal.SIGKILL and "finished" not in output:
        assert "--resume" in output or "lpo export" in output  # stopped by the signal, or already done
        assert process.returncode == (130 if "--resume" in output else 0), output
    again = start(config, tmp_path / "config.yaml", "--resume")
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert_same_run(learned(config), reference)


def test_half_written_checkpoint_is_not_resumed_from(reference, run_config):
    train(parse_config(run_config(training={"steps": 2})))
    checkpoints = Path(run_config()["output"]) / "checkpoints"
    (checkpoints / "3.orbax-checkpoint-tmp-1").mkdir()
    (checkpoints / "3.orbax-checkpoint-tmp-1" / "state").write_text("half of it")
    config = run_config()
    train(parse_config(config), resume=True)
    assert_same_run(learned(config), reference)


def test_finished_run_resumes_to_its_report(run_config, one_layout, capsys):
    config = run_config(training={"steps": 1}, evaluation={"problems": 2})
    train(parse_config(config))
    before = learned(config)
    train(parse_config(config), resume=True)
    assert_same_run(learned(config), before)
    assert "lpo export" in capsys.readouterr().out


def test_best_checkpoint_is_kept(run_config, one_layout):
    config = run_config(training={"steps": 4}, checkpoint={"every": 1, "keep": 1}, evaluation={"every": 1})
    train(parse_config(config))
    scores = {
        row["step"]: row["val-core/python/acc/pass@1"]
        for row in read_metrics(config["output"])
        if "val-core/python/acc/pass@1" in row and row["step"] > 0
    }
    model, best = load_run(config["output"], "best")
    assert scores[best] == max(scores.values())
    assert load_run(config["output"], "latest")[1] == 4
    chex.assert_tree_all_finite(model.params)


def best(config):
    """Load a run's best checkpoint; returns its step and parameters."""
    model, step = load_run(config["output"], "best")
    return step, model.params


@pytest.mark.parametrize("moment", ["while it samples", "as its row is written"])
def test_best_checkpoint_survives_sigterm_in_its_evaluation(run_config, one_layout, monkeypatch, moment):
    """The step is saved before or after its evaluation; in both cases its score is kept."""
    sections = {"training": {"steps": 3}, "checkpoint": {"every": 0, "keep": 1}, "evaluation": {"every": 1}}
    whole, parts = (run_config(name, **sections) for name in ("whole", "parts"))
    evaluate, write, signals = Session.evaluate, RunWriter.write, []

    def second_is_best(self, *arguments):
        step = len(list(Path(self.config.output, "rollouts").glob("*.jsonl")))
        if signals and moment == "while it samples" and step == 2:
            os.kill(os.getpid(), signals.pop())
        of = evaluate(self, *arguments)
        score = of.summary["score"] | {"mean": float(step == 2)}
        return dataclasses.replace(of, summary=of.summary | {"score": score})

    def write_signalled(self, step, row):
        write(self, step, row)
        if signals and moment == "as its row is written" and step == 2 and "timing_s/testing" in row:
            os.kill(os.getpid(), signals.pop())

    monkeypatch.setattr(Session, "evaluate", second_is_best)
    monkeypatch.setattr(RunWriter, "write", write_signalled)
    train(parse_config(whole))
    signals.append(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(parse_config(parts))
    assert not signals and load_run(parts["output"], "latest")[1] == 2
    train(parse_config(parts), resume=True)
    assert_same_run(learned(parts), learned(whole))
    assert best(parts)[0] == best(whole)[0] == 2
    chex.assert_trees_all_equal(best(parts)[1], best(whole)[1])


class Killed(BaseException):
    """Ends a run like kill -9: nothing is saved."""


def test_a_kill_after_the_warm_start_keeps_the_cold_model(run_config, one_layout, monkeypatch, capsys):
    """The resumed run repeats the evaluation at step 0, but keeps that of the cold model, which is also at step 0."""
    sections = {"warm_start": {"steps": 2, "batch_size": 8, "only_below": 0.9}, "training": {"steps": 1}}
    whole, parts = (run_config(name, **sections, evaluation={"problems": 2}) for name in ("whole", "parts"))
    train(parse_config(whole))
    table = evaluations(capsys)
    write, seen = RunWriter.write, []

    def killed(self, step, row):
        write(self, step, row)
        seen.extend(name for name in row if name.endswith("pass@1"))
        if len(seen) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunWriter, "write", killed)
        train(parse_config(parts))
    train(parse_config(parts), resume=True)
    assert_same_run(learned(parts), learned(whole))
    assert evaluations(capsys) == table and len(table) == 3


def evaluations(capsys):
    """Return the printed rows of the table of evaluations at the end of a run."""
    starts = ("cold model", "before", "after")
    return [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(starts)]


@pytest.mark.slow
def test_no_drift_at_learning_rate_zero(run_config, tiny_params):
    config = run_config(
        optimizer={"learning_rate": 0.0}, training={"steps": 20}, evaluation={"every": 0, "problems": 1}
    )
    train(parse_config(config))
    params, metrics, _ = learned(config)
    chex.assert_trees_all_equal(params, jax.tree.map(np.asarray, tiny_params))
    steps = [row for row in metrics if "lpo/logp_gap_max" in row]
    assert len(steps) == 20
    np.testing.assert_array_less(max(row["lpo/logp_gap_max"] for row in steps), 2e-4)
    np.testing.assert_array_less(max(row["lpo/score_abs_max"] for row in steps), 2e-4)


@pytest.mark.slow
def test_lpo_reverse_on_policy_is_grpo(run_config):
    """With one update per round both methods have the same learning curve up to rounding (the LPO paper, E.4)."""
    curves = {}
    for name in ("lpo-reverse", "grpo"):
        config = run_config(
            output=name, objective={"name": name}, training={"updates_per_step": 1}, optimizer=SMOOTH
        )
        train(parse_config(config))
        curves[name] = learned(config)
    rewards = [[row.get("critic/score/mean") for row in metrics] for _, metrics, _ in curves.values()]
    assert rewards[0] == rewards[1]
    chex.assert_trees_all_close(curves["grpo"][0], curves["lpo-reverse"][0], rtol=1e-4, atol=1e-6)


# Required options of methods, and settings that keep their additional programs few and small.
SETTINGS = {
    "fapo": {"judge": "flawed"},
    "capo-credit": {"judge": "wrong_steps"},
    "scaf-grpo": {"hint_after": 0},
    "ghpo": {"hint_fractions": [0.5]},
    "grpo-vps": {"segments": 2, "cue": "="},
    "brpo": {"budgets": 2, "summaries": 2, "summary_tokens": 2, "cue": "="},
    "srpo": {"reprompt": "{solution}"},
    # A random model is much less confident than a trained one: with the papers' limits there is no signal.
    "gtpo": {"entropy_limit": 10.0},
    "empo": {"entropy_threshold": 10.0},
    "capo-calibration": {"ppl_correct_max": 1e6},
}
# Every test run includes methods with a state, with hooks or with further model outputs, and one method of each family.
# The others, which differ only in array operations or compile large programs (longer prompts, a teacher), take minutes
# in all: `pytest -m slow`.
ALWAYS = [
    "lpo-forward",
    "grpo",
    "dr-grpo",
    "gspo",
    "tpo",
    "earl",
    "vas",
    "dapo",
]
ALWAYS += ["remax", "capo-credit", "scaf-grpo"]


def by_weight(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Methods whose control or hooks have a state that does not depend on the length of the run.
STATEFUL = ["riskpo", "poise", "flowrl", "r2vpo", "pipo", "vas", "fg-expo"]


@pytest.fixture
def method_config(run_config, tiny_task):
    """Make the config of a short run of a method, with one held-out problem and a checkpoint at the end only."""

    def make(name, output, steps):
        options = {"name": name, **SETTINGS.get(name, {})}
        if "judge" in options:
            options["judge"] = f"{tiny_task}:{options['judge']}"
        return run_config(
            output=output,
            objective=options,
            training={"steps": steps, "save_rollouts": False},
            evaluation={"problems": 1, "every": 0},
            checkpoint={"every": 0, "keep": 1},
        )

    return make


@pytest.mark.parametrize("name", by_weight(objectives.names()))
def test_every_method_trains_resumes_and_reports(method_config, one_layout, tiny_params, name):
    """Methods with a state are resumed after two steps; `test_resume_is_exact` covers the others."""
    method, config = objectives.get(name), method_config(name, "run", 3)
    if method.control or method.hooks or "ref_logp" in method.needs:
        train(parse_config(method_config(name, "run", 2)))
    train(parse_config(config), resume=True)
    params = load_run(config["output"], "latest")[0].params
    rows = [row for row in read_metrics(config["output"]) if "actor/pg_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["actor/pg_loss"]) and row["actor/grad_norm"] >= 0 for row in rows)
    assert max(row["actor/grad_norm"] for row in rows) > 0
    assert all(row["lpo/skipped_updates"] == 0 for row in rows)
    assert float(np.abs(params["layers"]["wq"] - tiny_params["layers"]["wq"]).max()) > 1e-4


@pytest.mark.parametrize("name", by_weight(STATEFUL))
def test_state_of_a_method_survives_a_resume(method_config, one_layout, name):
    constant = {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0, "schedule": "constant"}}
    whole = method_config(name, "whole", 4) | constant
    train(parse_config(whole))
    for steps in (2, 4):
        parts = method_config(name, "parts", steps) | constant
        train(parse_config(parts), resume=steps == 4)
    ends = [load_run(config["output"], "latest")[0].params for config in (whole, parts)]
    chex.assert_trees_all_equal(*ends)


@pytest.mark.slow
def test_reference_stays_where_the_run_began(method_config):
    """The penalty is 0 at the first update, when the policy is the reference, and positive later."""
    for coefficient in (0.0, 0.1):
        config = method_config("grpo", f"kl{coefficient}", 3)
        config["objective"]["kl_coef"] = coefficient
        config["training"]["updates_per_step"] = 1
        train(parse_config(config))
        rows = [row for row in read_metrics(config["output"]) if "actor/pg_loss" in row]
        assert ("actor/kl_loss" in rows[-1]) == (coefficient > 0)
        if coefficient:
            assert rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6)  # the initial policy
            assert rows[-1]["actor/kl_loss"] > 0


@pytest.mark.slow
def test_memory_and_scoring_settings_do_not_change_what_is_learned(run_config):
    ends = []
    for number, settings in enumerate(
        [{}, {"behaviour": "rescored"}, {"remat": False, "token_budget": 4096}]
    ):
        config = run_config(
            output=str(number), training=settings, optimizer=SMOOTH, evaluation={"problems": 1}
        )
        train(parse_config(config))
        params, metrics, _ = learned(config)
        ends.append(params)
        gaps = [row["lpo/logp_gap_max"] for row in metrics if "lpo/logp_gap_max" in row]
        assert max(gaps) > 0
        np.testing.assert_array_less(max(gaps), 2e-4)
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(ends[0], ends[2], rtol=1e-4, atol=1e-5)


def rates_of(config):
    return [row["actor/lr"] for row in read_metrics(config["output"]) if "actor/lr" in row]


DECAYING = {"schedule": "linear", "learning_rate": 1e-2, "final_fraction": 0.1, "weight_decay": 0.0}


def test_replayed_updates_count_in_the_schedule(method_config, one_layout, monkeypatch):
    """The learning rate falls with every update, including replayed ones, until the last step of the run."""
    config = method_config("pipo", "run", 4)
    config["optimizer"] = DECAYING
    counts = []
    used = optimizer.Optimizer.rate_used
    monkeypatch.setattr(
        optimizer.Optimizer,
        "rate_used",
        lambda self, state: counts.append(optimizer.applied_updates(state)) or used(self, state),
    )
    train(parse_config(config))
    rates, updates = rates_of(config), np.diff([0, *counts])
    assert set(updates) == {2, 3}  # steps of two updates, some of which replay a batch
    expected = [1e-2 * (1 - 0.9 * (count - 1) / 12) for count in counts]  # of 4 x 3 updates at most
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_an_extended_run_keeps_its_schedule(method_config, one_layout, monkeypatch):
    """After the end of the schedule the learning rate stays at its final value, and `progress` at 1."""
    first, longer = (method_config("lpo-forward", "run", steps) for steps in (2, 4))
    first["optimizer"] = longer["optimizer"] = DECAYING
    train(parse_config(first))
    seen, make_batch = [], loop.make_batch
    monkeypatch.setattr(loop, "make_batch", lambda *a: seen.append(a[2]) or make_batch(*a))
    train(parse_config(longer), resume=True)
    assert seen == [1, 1]
    rates = rates_of(longer)
    assert rates == sorted(rates, reverse=True) and rates[2:] == pytest.approx([1e-3, 1e-3])


def test_steps_beyond_a_schedule_that_ends_at_0_are_refused(run_config):
    def check(steps, **settings):
        values = run_config(training={"steps": steps}, optimizer={"schedule": "cosine"} | settings)
        loop.check_extension(parse_config(values), schedule_steps=4)

    check(4), check(3), check(8, schedule="constant"), check(8, final_fraction=0.1)
    with pytest.raises(
        UserError, match=r"cannot resume with training.steps = 8: .* after the 4 steps"
    ) as error:
        check(8)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_bfloat16_trains(run_config):
    config = run_config(training={"steps": 2})
    config["model"]["dtype"] = "bfloat16"
    train(parse_config(config))
    params, metrics, _ = learned(config)
    assert params["embed"].dtype == np.float32  # master weights
    gaps = [row["lpo/logp_gap_max"] for row in metrics if "lpo/logp_gap_max" in row]
    assert max(gaps) > 1e-4
    np.testing.assert_array_less(max(gaps), 0.5)


def test_ragged_prompts_compile_a_stated_number_of_programs(run_config, monkeypatch):
    """There is one program per padded size: one for prompts, one for responses and a few for packed rows."""
    for module, name, static, donated, most in (
        (step, "update", (0, 1), (2,), 6),
        (runner, "score", (0,), (), 6),
        (kv_cache, "prefill", (0, 1, 2, 3), (), 1),
        (sampling, "decode", (0,), (5,), 1),
    ):
        counted = chex.assert_max_traces(getattr(module, name).__wrapped__, n=most)
        jitted = jax.jit(counted, static_argnums=static, donate_argnums=donated)
        monkeypatch.setattr(module, name, jitted)
        if module in (step, runner):
            monkeypatch.setattr(learner, name, jitted)
    train(parse_config(run_config(evaluation={"problems": 8})))


class NotFinite(objectives.get("grpo").__class__):
    """A method whose gradient is always NaN."""

    def __call__(self, stats, scored):
        loss, metrics = super().__call__(stats, scored)
        return loss * float("nan"), metrics


def test_stops_after_several_gradients_that_are_not_finite(run_config, one_layout, tiny_params, monkeypatch):
    broken = NotFinite(**vars(objectives.get("grpo")))
    monkeypatch.setattr(loop, "check_config", lambda config: broken)
    config = run_config(training={"max_skipped_updates": 4}, checkpoint={"every": 1})
    with pytest.raises(RunStopped, match="the last 4 gradients were not finite"):
        train(parse_config(config))
    rows = [row for row in read_metrics(config["output"]) if "lpo/skipped_updates" in row]
    assert [row["lpo/skipped_updates"] for row in rows] == [2, 2]
    chex.assert_trees_all_equal(load_run(config["output"], "latest")[0].params, tiny_params)


def test_failing_verifier_masks_its_sample(run_config, one_layout, tmp_path, tiny_task):
    """Responses whose verifier hangs, dies or raises are masked and counted; they are not scored 0."""
    task = tmp_path / "failing.py"
    failing = """
import os, time

def verify(response, row):
    first = response[:1] or "?"
    if first in "0123456789":
        time.sleep(60)
    if first in "+-*=":
        os._exit(3)
    if first in "abcdefghijklm":
        raise ValueError("no idea")
    return Verdict(len(set(response)) / 6, "wrong")
"""
    task.write_text(tiny_task.read_text() + failing)
    config = run_config(
        task={"name": "python", "file": str(task)},
        rewards={"workers": 2, "timeout": 0.3},
        training={"steps": 1},
        sampling={"num_responses": 8},
        evaluation={"problems": 1},
    )
    train(parse_config(config))
    _, metrics, rollouts = learned(config)
    rows = [json.loads(line) for line in rollouts["rollouts/1.jsonl"].splitlines()]
    masked = [row for row in rows if row["outcome"] == "infrastructure"]
    reasons = " ".join(row["parts"]["reason"] for row in masked)
    assert "wall-clock limit" in reasons and "died" in reasons and "ValueError: no idea" in reasons
    assert all(
        row["target"] == row["policy"] == row["coefficient"] == 0 and not row["valid"] for row in masked
    )
    row = next(row for row in metrics if "actor/pg_loss" in row)
    assert row["reward/outcome/infrastructure"] == pytest.approx(len(masked) / len(rows))
    assert row["lpo/masked_response_frac"] == pytest.approx(len(masked) / len(rows))
    assert row["critic/score/min"] > 0  # masked responses do not count as 0


@pytest.mark.slow
def test_warm_start_then_rl(run_config, capsys):
    warm = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "only_below": 0.9}
    config = run_config(warm_start=warm, training={"steps": 1})
    train(parse_config(config))
    rows = read_metrics(Path(config["output"]) / "warm_start")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] / 2
    output = capsys.readouterr().out
    assert "warm-started with 6 supervised steps" in output
    assert "cold model" in output and "before" in output and "after 1 steps" in output


def test_rl_does_not_begin_with_the_rows_just_taught(run_config, one_layout, monkeypatch):
    """Of 24 rows, two supervised updates of 4 use 8, and the first four steps of 4 prompts sample the other 16."""
    taught, asked = [], []
    batch, record = training_sft.supervised_batch, loop.make_batch
    monkeypatch.setattr(
        training_sft,
        "supervised_batch",
        lambda session, rows: taught.extend(row["n"] for row in rows) or batch(session, rows),
    )
    monkeypatch.setattr(
        loop, "make_batch", lambda rollouts, *args: asked.extend(rollouts.ids) or record(rollouts, *args)
    )
    warm = {"steps": 2, "batch_size": 4, "only_below": 1.0}
    train(parse_config(run_config(warm_start=warm, training={"steps": 4}, evaluation={"every": 0})))
    assert len(taught) == 8 and sorted(taught + asked) == list(range(24))


def test_no_warm_start_where_the_cold_model_succeeds(run_config, capsys):
    warm = {"steps": 6, "batch_size": 8, "only_below": 0.0}
    config = run_config(warm_start=warm, training={"steps": 0})
    train(parse_config(config))
    assert not (Path(config["output"]) / "warm_start").exists()
    assert "no warm start" in capsys.readouterr().out


def test_sft_learns_and_resumes_exactly(run_config, one_layout):
    def config(output, steps):
        warm = {"steps": steps, "batch_size": 8, "learning_rate": 1e-2}
        return run_config(output=output, warm_start=warm, evaluation={"every": 0, "problems": 2})

    whole = config("whole", 4)
    sft(parse_config(whole))
    losses = [row["train/loss"] for row in read_metrics(whole["output"]) if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    sft(parse_config(config("parts", 2)))
    sft(parse_config(config("parts", 4)), resume=True)
    chex.assert_trees_all_equal(
        *(load_run(config(name, 4)["output"], "latest")[0].params for name in ("whole", "parts"))
    )


@pytest.mark.parametrize(
    ("section", "keys", "difference"),
    [
        ("training", {"prompts_per_step": 8}, "training.prompts_per_step = 8; the run was started with 4"),
        ("sampling", {"num_responses": 2}, "sampling.num_responses = 2; the run was started with 4"),
        ("objective", {"name": "grpo"}, "objective.name = 'grpo'; the run was started with 'lpo-forward'"),
    ],
)
def test_changed_settings_are_refused_by_name(run_config, section, keys, difference):
    train(parse_config(run_config(training={"steps": 0}, evaluation={"problems": 1})))
    before = sorted(Path(run_config()["output"]).rglob("*"))
    with pytest.raises(UserError, match=f"cannot resume with {difference}"):
        train(parse_config(run_config(**{section: keys})), resume=True)
    assert sorted(Path(run_config()["output"]).rglob("*")) == before


def test_another_run_is_not_overwritten(run_config):
    config = run_config(training={"steps": 0}, evaluation={"problems": 1})
    train(parse_config(config))
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        train(parse_config(config))


@pytest.mark.slow
def test_full_disk_keeps_the_checkpoint_before(run_config, tmp_path):
    """A save that exceeds the file-size limit stops the run; the previous checkpoint is intact."""
    config = run_config(training={"steps": 2}, evaluation={"every": 0, "problems": 1})
    train(parse_config(config))
    good = learned(config)[0]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(run_config(training={"steps": 4}, evaluation={"problems": 1}))
    )
    limited = (
        "import resource, sys; from lpo_jax.commands.main import main; import lpo_jax.runs.checkpoint as c\n"
        "save = c.Checkpoints.save\n"
        "def full(*args, **kwargs):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return save(*args, **kwargs)\n"
        "c.Checkpoints.save = full\n"
        f"sys.exit(main(['train', {str(tmp_path / 'config.yaml')!r}, '--resume']))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be saved" in done.stderr and "the one of step 2 is intact" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("lpo: ")
    assert load_run(config["output"], "latest")[1] == 2
    chex.assert_trees_all_equal(load_run(config["output"], "latest")[0].params, good)
