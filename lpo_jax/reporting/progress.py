"""The progress of a run: a live line on a terminal, one plain line a step in a log file.

with Progress(total=200) as progress:
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

# What the line shows: metric, label, format. A metric that a step did not report is left out.
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("critic/rewards/mean", "reward", "{:.3f}".format),
    ("reward/pass_rate", "pass", percent),
    ("train/loss", "loss", "{:.3f}".format),
    ("actor/entropy", "entropy", "{:.2f}".format),
    ("perf/throughput", "tok/s", "{:,.0f}".format),
)


class Progress:
    """Shows step of total, time left, the main metrics, skipped updates and the last evaluation.

    Args:
        total: steps of the whole run.
        start: steps already done (a resumed run).
        console: where to print; `reporting.console()` when None. What is no terminal gets plain lines.
        clock: seconds, for tests.
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
        self._phase = ""
        self._shown: dict[str, str] = {}
        self._evaluation = ""
        self._skipped = 0
        self._durations = collections.deque(maxlen=20)
        self._since = clock()
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        # Live redraws from a thread, so the time left runs on while a step computes.
        self._live = (
            Live(self, console=self.console, auto_refresh=True, refresh_per_second=2) if terminal else None
        )

    def __enter__(self):
        self._since = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception):
        self._phase = ""
        if self._live:
            self._live.stop()  # leaves the last line standing and gives the cursor back

    def phase(self, name: str) -> None:
        """Names what the run is doing now ("compiling", "sampling"), so that a long wait has a culprit."""
        self._phase = name

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a finished step. Call it once a step; with step 0 it shows an evaluation before training."""
        now = self._clock()
        if step > self._step:
            self._durations.append((now - self._since) / (step - self._step))
        self._since, self._step, self._phase = now, step, ""
        self._shown = {
            label: show(metrics[name]) for name, label, show in _SHOWN if _is_number(metrics.get(name))
        }
        skipped = metrics.get("lpo/skipped_updates", 0)
        self._skipped += int(skipped) if _is_number(skipped) else 0
        self._evaluation = _evaluation(step, metrics) or self._evaluation
        if not self._live:
            self._print_line()

    def log(self, *messages) -> None:
        """Prints above the line: text as it stands (no markup), or rich renderables such as tables."""
        for message in messages:
            self.console.print(Text(message) if isinstance(message, str) else message, soft_wrap=True)

    def seconds_left(self) -> float:
        """Median time of the last 20 steps (so that a compile or an evaluation does not mislead) times the
        steps left, less what the step in progress has used. NaN before the first step is done."""
        if self._step >= self.total:
            return 0.0
        if not self._durations:
            return math.nan
        typical = statistics.median(self._durations)
        used = min(self._clock() - self._since, typical)
        return typical * (self.total - self._step) - used

    def _facts(self) -> list[str]:
        facts = [f"{label} {value}" for label, value in self._shown.items()]
        if self._skipped:
            facts.append(f"skipped updates {self._skipped}")
        return facts

    def _print_line(self) -> None:
        head = f"step {self._step}/{self.total}"
        took = [f"{self._durations[-1]:.1f} s/step"] if self._durations else []
        evaluation = [self._evaluation] if self._evaluation else []
        line = [head, *self._facts(), *evaluation, *took, f"left {duration(self.seconds_left())}"]
        self.console.print(Text("  ".join(line)), soft_wrap=True)

    def __rich__(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._step}/{self.total}", "bold"),
            ProgressBar(total=max(self.total, 1), completed=self._step, width=30),
            Text(f"{duration(self.seconds_left())} left", "cyan"),
            Text(f"{self._phase} {duration(self._clock() - self._since)}" if self._phase else "", "dim"),
        )
        lines = [" · ".join(self._facts()), self._evaluation]
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line))


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)


def _evaluation(step: int, metrics: Mapping[str, float]) -> str:
    """`eval pass@1 13.5% pass@4 50.0% (step 20)` from the row's val-core metrics, or ""."""
    scores = {
        name.rsplit("/", 1)[1]: value
        for name, value in metrics.items()
        if name.startswith("val-core/") and "/acc/pass@" in name and _is_number(value)
    }
    if not scores:
        return ""
    ordered = sorted(scores.items(), key=lambda item: int(item[0].split("@")[1]))
    return "eval " + " ".join(f"{name} {percent(value)}" for name, value in ordered) + f" (step {step})"
