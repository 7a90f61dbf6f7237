"""Progress display of a run: a live display on a terminal, one plain line per step elsewhere.

with ProgressDisplay(total=200) as progress:
    progress.phase("sampling")
    ...
    progress.update(step, metrics)
    progress.log("checkpoint saved")
"""

import collections
import math
import statistics
import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lpo_jax.reporting.text import console as default_console
from lpo_jax.reporting.text import duration, percent

# The displayed metrics: name, label, format. Metrics that are missing in a step are not displayed.
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("critic/score/mean", "reward", "{:.3f}".format),
    ("reward/pass_rate", "pass", percent),
    ("response_length/clip_ratio", "cut", percent),
    ("lpo/degenerate_group_frac", "no signal", percent),
    ("train/loss", "loss", "{:.3f}".format),
    ("actor/entropy", "entropy", "{:.2f}".format),
    ("actor/grad_norm", "grad", "{:.2g}".format),
    ("perf/throughput", "tok/s", "{:,.0f}".format),
)


class ProgressDisplay:
    """Display the step, the time left, the main metrics, skipped updates and the last evaluation.

    Args:
        total: number of steps of the whole run.
        start: number of steps already done, in a resumed run.
        console: where to print; `reporting.console()` if None. Plain lines are printed if it is not a terminal.
        clock: returns the time in seconds; replaced in tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self.console = console or default_console()
        self._clock = clock
        self._step = start
        self._phase = self._task = self._compiling = ""
        self._compile_seconds = 0.0
        self._shown: dict[str, str] = {}
        self._evaluation = ""
        self._skipped = 0
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._since = clock()
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        # Live redraws from a thread, so the time left is updated during a step.
        self._live = (
            Live(self, console=self.console, auto_refresh=True, refresh_per_second=2) if terminal else None
        )

    def __enter__(self):
        self._since = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception):
        self._phase = self._task = ""
        if self._live:
            self._live.stop()  # keeps the last lines and restores the cursor

    def phase(self, name: str) -> None:
        """Set the name of the current phase ("sampling", "saving"), which the live display shows."""
        self._phase = name

    def during(self, task: str) -> None:
        """Set what the next phases are part of, such as "evaluating", until the next `update`."""
        self._task = task

    def compiling(self, name: str, seconds: float) -> None:
        """Show which program is being compiled; "" when it is done. The estimate of the time left excludes the seconds.

        Args:
            name: of the program.
            seconds: time that it took to get here since the last call.
        """
        self._compiling = name
        self._compile_seconds += seconds

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Display a finished step. Call it once per step; step 0 displays an evaluation before training.

        Args:
            step: the finished step.
            metrics: the row of metrics of the step.
        """
        now = self._clock()
        if step > self._step:
            working = max(now - self._since - self._compile_seconds, 0.0)
            self._durations.append(working / (step - self._step))
        self._since, self._step, self._phase, self._task, self._compile_seconds = now, step, "", "", 0.0
        shown = {label: show(metrics[name]) for name, label, show in _SHOWN if _is_number(metrics.get(name))}
        if shown or not _evaluation(
            step, metrics
        ):  # the row of an evaluation does not hide those of the step
            self._shown = shown
        skipped = metrics.get("lpo/skipped_updates", 0)
        self._skipped += int(skipped) if _is_number(skipped) else 0
        self._evaluation = _evaluation(step, metrics) or self._evaluation
        if not self._live:
            self._print_line(shown, _evaluation(step, metrics))

    def log(self, *messages) -> None:
        """Print messages above the live display: text without markup, or rich renderables such as tables."""
        for message in messages:
            self.console.print(Text(message) if isinstance(message, str) else message, soft_wrap=True)

    def seconds_left(self) -> float:
        """Estimate the remaining time in seconds; NaN before the first step is finished.

        The estimate is the median time of the last 20 steps, without compilations, times the number of steps left,
        minus the time since the last step. The median makes it robust against steps with an evaluation.
        """
        if self._step >= self.total:
            return 0.0
        if not self._durations:
            return math.nan
        typical = statistics.median(self._durations)
        used = min(self._clock() - self._since, typical)
        return typical * (self.total - self._step) - used

    def _facts(self, shown: Mapping[str, str]) -> list[str]:
        facts = [f"{label} {value}" for label, value in shown.items()]
        if self._skipped:
            facts.append(f"skipped updates {self._skipped}")
        return facts

    def _print_line(self, shown: Mapping[str, str], evaluation: str) -> None:
        head = f"step {self._step}/{self.total}"
        took = [f"{self._durations[-1]:.1f} s/step"] if self._durations else []
        line = [
            head,
            *self._facts(shown),
            *[evaluation][: bool(evaluation)],
            *took,
            f"left {duration(self.seconds_left())}",
        ]
        self.console.print(Text("  ".join(line)), soft_wrap=True)

    def __rich__(self) -> Group:
        now = ": ".join(filter(None, (self._task, self._phase)))
        now += f" (compiling {self._compiling})" if self._compiling else ""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._step}/{self.total}", "bold"),
            ProgressBar(total=max(self.total, 1), completed=self._step, width=30),
            Text(f"{duration(self.seconds_left())} left", "cyan"),
            Text(f"{now} {duration(self._clock() - self._since)}" if now else "", "dim"),
        )
        lines = [" · ".join(self._facts(self._shown)), self._evaluation]
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line))


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)


def _evaluation(step: int, metrics: Mapping[str, float]) -> str:
    """Format a held-out evaluation as `held-out pass@1 13.5% pass@4 50.0% reward 0.21 (step 20)`; "" for other rows."""
    scores, rewards = {}, []
    for name, value in metrics.items():
        if name.startswith("val-core/") and "/acc/pass@" in name and _is_number(value):
            scores[name.rsplit("/", 1)[1]] = value
        if name.startswith("val-aux/") and "/reward/mean@" in name and _is_number(value):
            rewards.append(f"reward {value:.3g}")
    if not scores:
        return ""
    ordered = sorted(scores.items(), key=lambda item: int(item[0].split("@")[1]))
    passes = (f"{name} {percent(value)}" for name, value in ordered)
    return f"held-out {' '.join([*passes, *rewards])} (step {step})"
