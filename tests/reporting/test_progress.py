"""The progress display on a terminal and in a log file."""

import io
import os
import re
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from lpo_jax.reporting import ProgressDisplay, batch_table
from lpo_jax.reporting import console as make_console


class Clock:
    """A clock that only advances when the test sets it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def _plain():
    out = io.StringIO()
    return out, make_console(file=out)


def _terminal(width=100):
    out = io.StringIO()
    return out, Console(file=out, force_terminal=True, width=width, color_system=None)


STEP = {
    "critic/score/mean": 0.4123,
    "reward/pass_rate": 0.3125,
    "response_length/clip_ratio": 0.125,
    "lpo/degenerate_group_frac": 0.25,
    "actor/entropy": 1.02,
    "actor/grad_norm": 1.5,
    "perf/throughput": 1234.5,
    "lpo/skipped_updates": 0,
}


def test_log_file_gets_one_plain_line_per_step():
    out, console = _plain()
    clock = Clock()
    with ProgressDisplay(total=10, console=console, clock=clock) as progress:
        scores = {"val-core/countdown/acc/pass@1": 0.135, "val-core/countdown/acc/pass@4": 0.5}
        progress.update(0, scores | {"val-aux/countdown/reward/mean@8": 0.21})
        for step in (1, 2):
            progress.phase("sampling")
            clock.now += 14.0
            progress.update(step, STEP)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert lines[0] == "step 0/10  held-out pass@1 13.5% pass@4 50.0% reward 0.21 (step 0)  left ?"
    assert lines[2] == (
        "step 2/10  reward 0.412  pass 31.2%  cut 12.5%  no signal 25.0%  entropy 1.02  grad 1.5  tok/s 1,234"
        "  14.0 s/step  left 1m 52s"
    )


def test_messages_are_printed_without_markup():
    out, console = _plain()
    with ProgressDisplay(total=1, console=console) as progress:
        progress.log("checkpoint [bold]saved[/bold] in " + "x" * 200, batch_table([("rows", 64, "all")]))
    assert "checkpoint [bold]saved[/bold] in " + "x" * 200 + "\n" in out.getvalue()
    assert "rows" in out.getvalue()


def test_missing_and_nonfinite_metrics_are_omitted():
    out, console = _plain()
    with ProgressDisplay(total=2, console=console) as progress:
        progress.update(1, {"actor/entropy": float("nan"), "critic/score/mean": None, "train/loss": 2.5})
    assert "loss 2.500" in out.getvalue()
    assert not re.search("nan|None|entropy|reward", out.getvalue())


def test_skipped_updates_add_up():
    out, console = _plain()
    with ProgressDisplay(total=3, console=console) as progress:
        for step, skipped in ((1, 0), (2, 2), (3, 1)):
            progress.update(step, {"lpo/skipped_updates": skipped})
    lines = out.getvalue().splitlines()
    assert "skipped" not in lines[0]
    assert "skipped updates 2" in lines[1] and "skipped updates 3" in lines[2]


def test_time_left_is_robust_against_one_slow_step():
    clock = Clock()
    progress = ProgressDisplay(total=12, start=2, console=_plain()[1], clock=clock)
    with progress:
        assert progress.seconds_left() != progress.seconds_left()  # NaN before the first step
        for step, seconds in ((3, 60.0), (4, 10.0), (5, 10.0), (6, 10.0)):
            clock.now += seconds
            progress.update(step, {})
        assert progress.seconds_left() == pytest.approx(6 * 10.0)
        clock.now += 4.0
        assert progress.seconds_left() == pytest.approx(56.0)
        clock.now += 400.0  # a slow step counts at most as its typical time
        assert progress.seconds_left() == pytest.approx(50.0)
        progress.update(12, {})
        assert progress.seconds_left() == 0.0


def test_time_left_leaves_compilations_out():
    clock = Clock()
    with ProgressDisplay(total=5, console=_plain()[1], clock=clock) as progress:
        progress.compiling("update", 2.0)  # traced
        clock.now += 40.0
        progress.compiling("", 28.0)
        progress.update(1, {})
        assert progress.seconds_left() == pytest.approx(4 * 10.0)
        clock.now += 10.0
        progress.update(2, {})
        assert progress.seconds_left() == pytest.approx(3 * 10.0)


def test_terminal_shows_bar_phase_and_facts():
    out, console = _terminal(width=120)
    clock = Clock()
    with ProgressDisplay(total=10, console=console, clock=clock) as progress:
        clock.now += 14.0
        progress.update(1, STEP | {"val-core/countdown/acc/pass@1": 0.25})
        progress.during("evaluating")
        progress.phase("sampling")
        progress.compiling("decode_steps", 1.0)
        clock.now += 5.0
        with console.capture() as capture:
            console.print(progress)
        progress.log("a [red]message[/red]")
    bar, facts, evaluation = capture.get().splitlines()[:3]
    assert (
        bar.startswith("step 1/10")
        and "2m 01s left" in bar
        and "evaluating: sampling (compiling decode_steps) 5s" in bar
    )
    assert facts.rstrip() == (
        "reward 0.412 · pass 31.2% · cut 12.5% · no signal 25.0% · entropy 1.02 · grad 1.5 · tok/s 1,234"
    )
    assert evaluation.rstrip() == "held-out pass@1 25.0% (step 1)"
    assert "a [red]message[/red]" in out.getvalue()


def test_narrow_terminal_cuts_the_facts_to_one_line():
    _, console = _terminal(width=30)
    progress = ProgressDisplay(total=10, console=console)
    progress.update(1, STEP)
    with console.capture() as capture:
        console.print(progress)
    lines = capture.get().splitlines()
    assert lines[-1].startswith("reward 0.412") and lines[-1].rstrip().endswith("…")
    assert max(map(len, lines)) <= 30


@pytest.mark.parametrize("terminal", [_plain, _terminal])
def test_exceptions_pass_through_and_the_terminal_is_restored(terminal):
    out, console = terminal()
    with pytest.raises(KeyboardInterrupt), ProgressDisplay(total=3, console=console) as progress:
        progress.update(1, STEP)
        raise KeyboardInterrupt
    if console.is_terminal:
        hide, show = "\x1b[?25l", "\x1b[?25h"
        assert out.getvalue().count(hide) == out.getvalue().count(show) == 1
        assert out.getvalue().rindex(show) > out.getvalue().rindex(hide)
    console.print("after")
    assert out.getvalue().rstrip().endswith("after")


@pytest.mark.parametrize("how", ["a reader that has gone", "a full disk", "closed from the start"])
def test_a_run_continues_when_its_output_is_closed(tmp_path, how):
    program = """
        import sys
        from pathlib import Path
        from lpo_jax.reporting import ProgressDisplay
        with ProgressDisplay(500) as progress:
            for step in range(500):
                progress.update(step + 1, {"train/loss": 1.0})
                progress.log("x" * 200)
        print("this too is dropped")
        Path(sys.argv[1]).write_text("went on")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "end")]
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    out = {"a reader that has gone": writer, "a full disk": full}.get(how)
    if out is None:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(full)
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "went on"
    if out is not None:
        assert re.fullmatch(r"lpo: standard output is gone \(.*\); files are still written\n", done.stderr)
