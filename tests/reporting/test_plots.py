"""Learning curves show the right numbers on the right axes, whatever metrics a run has written."""

import math
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from lpo_jax.evaluation.metrics import summarise
from lpo_jax.reporting import RunWriter, diagnostics, learning_curves, save_plots, validation_metrics


def _rows(steps, **extra):
    return [
        {"step": step, "critic/rewards/mean": 0.01 * step, "actor/entropy": 1.0 - 0.01 * step, **extra}
        for step in range(1, steps + 1)
    ]


def _axes(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def test_only_panels_with_metrics_are_drawn():
    figure = learning_curves(_rows(5))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Reward", "Entropy of the policy"]
    (line,) = _axes(figure, "Reward").get_lines()
    np.testing.assert_allclose(line.get_xydata(), [(step, 0.01 * step) for step in range(1, 6)])
    assert diagnostics(_rows(5)) is None
    assert learning_curves([]) is None


def test_long_runs_show_the_raw_values_and_a_trailing_mean():
    raw, smooth = _axes(learning_curves(_rows(30)), "Reward").get_lines()
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 30
    assert smooth.get_ydata()[-1] == pytest.approx(0.01 * np.mean(range(21, 31)))
    assert smooth.get_ydata()[0] == raw.get_ydata()[0]
    assert smooth.get_linewidth() > raw.get_linewidth()


def test_held_out_scores_have_their_intervals():
    summaries = [summarise(np.random.default_rng(seed).random((20, 4)) < 0.3, ks=[1, 4]) for seed in (0, 1)]
    rows = [
        {"step": step, **validation_metrics("org/countdown", summary | {"score": summary["pass@1"]})}
        for step, summary in zip((0, 10), summaries)
    ]
    axes = _axes(learning_curves(rows), "Held-out org/countdown")
    assert [line.get_label() for line in axes.get_lines()] == ["pass@1", "pass@4"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pass@1", "pass@4"]
    assert len(axes.collections) == 4  # a band and whiskers for each k
    for k, band in zip((1, 4), axes.collections[::2]):
        corners = band.get_paths()[0].vertices[:, 1]
        score = [summary[f"pass@{k}"] for summary in summaries]
        assert corners.min() == pytest.approx(min(s["ci_low"] for s in score))
        assert corners.max() == pytest.approx(max(s["ci_high"] for s in score))


def test_nulls_are_gaps_with_a_mark():
    rows = _rows(4)
    rows[2] |= {"critic/rewards/mean": None, "nonfinite": {"critic/rewards/mean": "nan"}}
    line, marks = _axes(learning_curves(rows), "Reward").get_lines()
    assert list(line.get_xdata()) == [1, 2, 4]
    assert list(marks.get_xdata()) == [3] and marks.get_label() == "not finite"


def test_a_metric_that_was_never_finite_still_has_its_panel():
    rows = [{"step": s, "actor/grad_norm": None, "nonfinite": {"actor/grad_norm": "inf"}} for s in (1, 2)]
    (marks,) = _axes(learning_curves(rows), "Gradient norm").get_lines()
    assert list(marks.get_xdata()) == [1, 2]


def test_last_row_of_a_step_counts():
    rows = [*_rows(2), {"step": 2, "critic/rewards/mean": 0.7}]
    (line,) = _axes(learning_curves(rows), "Reward").get_lines()
    assert list(line.get_ydata()) == [0.01, 0.7]


def test_shares_are_drawn_from_zero_and_gaps_on_a_log_scale():
    rows = [
        {"step": s, "reward/pass_rate": 0.9, "lpo/logp_gap_max": 1e-4, "lpo/logp_gap_mean": 1e-6}
        for s in (1, 2)
    ]
    low, high = _axes(learning_curves(rows), "Pass rate on training prompts").get_ylim()
    assert low <= 0 and 0.9 < high <= 1.02
    gap = "Log-prob gap, sampling to training"
    assert _axes(diagnostics(rows), gap).get_yscale() == "log"
    rows[0]["lpo/logp_gap_mean"] = 0.0  # bitwise equal log-probs: 0 is not on a log scale
    assert _axes(diagnostics(rows), gap).get_yscale() == "linear"


@pytest.mark.parametrize("steps", [1, 40])
def test_files_hold_a_picture(tmp_path, steps):
    before = dict(matplotlib.rcParams)
    with RunWriter(tmp_path) as writer:
        for step in range(1, steps + 1):
            metrics = {"reward/pass_rate": 0.5, "lpo/coef_l1": 0.4, "actor/grad_norm": math.nan}
            writer.write(
                step,
                metrics | {"response_length/mean": 9, "response_length/min": 3, "response_length/max": 14},
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if layout or scaling fails
        paths = save_plots(tmp_path, "a run")
    assert [path.name for path in paths] == ["learning_curves.png", "diagnostics.png"]
    for path in paths:
        image = imread(path)[..., :3]
        assert min(image.shape[:2]) > 400
        ink = (image < 0.9).any(axis=-1)
        assert 0.001 < ink.mean() < 0.3
        colours = np.abs(image - image.mean(axis=-1, keepdims=True)).max(axis=-1)
        assert (colours > 0.2).sum() > 20  # a curve, not only axes and text
    assert dict(matplotlib.rcParams) == before


def test_drawing_does_not_load_pyplot(tmp_path):
    import subprocess
    import sys

    program = (
        "import sys; from lpo_jax.reporting import learning_curves;"
        "learning_curves([{'step': 1, 'actor/entropy': 1.0}]).savefig(sys.argv[1]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"
