"""Metric names, metric and sample files, the progress line, tables and plots: everything that a run displays or writes.

`import lpo_jax.reporting` imports neither jax nor matplotlib.
"""

from lpo_jax.reporting.metric_names import is_timing, validation_metrics
from lpo_jax.reporting.plots import diagnostics, learning_curves, save_plots
from lpo_jax.reporting.progress import ProgressDisplay
from lpo_jax.reporting.tables import batch_table, before_after_table, group_panel, sample_panel
from lpo_jax.reporting.text import console, duration, percent, sanitise
from lpo_jax.reporting.writers import RunWriter, read_metrics

__all__ = [
    "ProgressDisplay",
    "RunWriter",
    "batch_table",
    "before_after_table",
    "console",
    "diagnostics",
    "duration",
    "group_panel",
    "is_timing",
    "learning_curves",
    "percent",
    "read_metrics",
    "sample_panel",
    "sanitise",
    "save_plots",
    "validation_metrics",
]
