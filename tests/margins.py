"""A pytest plugin that measures how far each numeric comparison is from its bound.

A comparison that only just passes is fragile: another CPU rounds differently, and the test fails there. For every
comparison that passes, this plugin therefore records a margin: the allowed difference divided by the actual one, at the
array element where this quotient is smallest. Equal values have an infinite margin. A test with a margin below
`--margin` fails, and the smallest margins are listed at the end of the run.

The plugin observes np.testing.assert_allclose (which chex.assert_trees_all_close calls), np.testing.assert_array_less
(the left side is a difference, the right side its bound), np.allclose, jnp.allclose and pytest.approx. A statistical
test compares a p value by assert_array_less, with the bound on the left side.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

SHOWN = 10


class Comparison(NamedTuple):
    """One passed comparison, at the element that is closest to its bound."""

    margin: float
    allowed: float
    difference: float
    test: str
    place: str  # file:line


_of_test: dict[str, tuple[float, float, float]] = {}  # place -> the running test's closest comparison there
_directory = Path()  # of the running test
_of_session = pytest.StashKey[list[Comparison]]()


def _observe(difference, allowed):
    """Record the element closest to its bound, for a comparison that has passed, unless all elements are equal."""
    difference, allowed = np.broadcast_arrays(np.abs(difference), allowed)
    apart = np.isfinite(difference) & np.isfinite(allowed) & (difference > 0)
    if not apart.any():
        return
    difference, allowed = difference[apart], allowed[apart]
    closest = (allowed / difference).argmin()
    frame = sys._getframe(1)
    while frame and (
        frame.f_code.co_filename == __file__ or Path(frame.f_code.co_filename).parent != _directory
    ):
        frame = frame.f_back
    if frame is None:
        return  # the comparison was made inside a library, not by the test
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    allowed, difference = float(allowed[closest]), float(difference[closest])
    found = (allowed / difference, allowed, difference)
    _of_test[place] = min(found, _of_test.get(place, found))


def _numbers(x):
    x = np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)


def _observe_close(actual, desired, rtol, atol):
    with np.errstate(all="ignore"):
        actual, desired = _numbers(actual), _numbers(desired)
        _observe(actual - desired, atol + rtol * np.abs(desired))


def _observing_close(original, rtol, atol):
    @functools.wraps(original)
    def wrapped(actual, desired, rtol=rtol, atol=atol, **options):
        __tracebackhide__ = True
        result = original(actual, desired, rtol=rtol, atol=atol, **options)
        if result is None or bool(result):
            _observe_close(actual, desired, rtol, atol)
        return result

    return wrapped


def _observing_less(original):
    @functools.wraps(original)
    def wrapped(x, y, **options):
        __tracebackhide__ = True
        original(x, y, **options)
        _observe(np.maximum(_numbers(x), 0), _numbers(y))

    return wrapped


def _observing_approx(original):
    def wrapped(self, actual):
        result = original(self, actual)
        if result and np.ndim(actual) == 0 and isinstance(self.expected, (int, float, np.number)):
            _observe(float(actual) - float(self.expected), float(self.tolerance))
        return result

    return wrapped


def pytest_addoption(parser):
    parser.addoption(
        "--margin",
        type=float,
        default=3.0,
        help="fail tests with a smaller margin (default 3; 0 disables the check)",
    )


def pytest_configure(config):
    config.stash[_of_session] = []
    np.testing.assert_allclose = _observing_close(np.testing.assert_allclose, 1e-7, 0)
    np.testing.assert_array_less = _observing_less(np.testing.assert_array_less)
    np.allclose = _observing_close(np.allclose, 1e-5, 1e-8)
    jnp.allclose = _observing_close(jnp.allclose, 1e-5, 1e-8)
    scalar = type(pytest.approx(1.0))  # sequences, mappings and arrays use it for their elements
    scalar.__eq__ = _observing_approx(scalar.__eq__)


def pytest_runtest_setup(item):
    global _directory
    _directory = item.path.parent
    _of_test.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    found = sorted((*values, place) for place, values in _of_test.items())
    # Stored on the report, because reports are sent to the controller of pytest-xdist.
    item.user_properties.extend(("margin", values) for values in found)
    if found and found[0][0] < item.config.getoption("margin"):
        margin, allowed, difference, place = found[0]
        message = f"{place}: {difference:.3g} of {allowed:.3g} allowed, a margin of {margin:.2f}; see tests/margins.py"
        pytest.fail(message, pytrace=False)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report, config):
    if report.when == "call":
        found = (
            Comparison(*c[:3], report.nodeid, c[3]) for name, c in report.user_properties if name == "margin"
        )
        config.stash[_of_session].extend(found)


def pytest_terminal_summary(terminalreporter, config):
    found = sorted(config.stash[_of_session])
    if not found:
        return
    below = sum(c.margin < config.getoption("margin") for c in found)
    terminalreporter.section("smallest margins (allowed / actual difference)")
    for c in found[: max(below, SHOWN)]:
        terminalreporter.line(f"{c.margin:10.3g}  {c.difference:.3g} of {c.allowed:.3g}  {c.place}  {c.test}")
