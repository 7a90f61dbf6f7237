"""The code verifier runs programs on a problem's tests in a sandbox.

See `sandbox.py` for what the sandbox protects against.
"""

import time
from collections.abc import Mapping, Sequence

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import sandbox as sandboxes
from lpo_jax.rewards.answers import last_program
from lpo_jax.rewards.code_tests import ProblemTests, read_tests
from lpo_jax.rewards.packages import check_package_names
from lpo_jax.rewards.same import same_output, same_result
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor, infrastructure
from lpo_jax.types import Json

_MEMORY_MB = 1024
# Seconds between the end of the last test and the pool's limit, for starting and ending the sandbox.
_MARGIN = 2.0


def code_verifier(
    *,
    score: str = "fraction",
    time_limit: float = 4.0,
    total_limit: float = 8.0,
    memory_mb: int = _MEMORY_MB,
    max_tests: int = 0,
    sandbox: str = "bubblewrap",
    packages: Sequence[str] = (),
) -> Verifier:
    """Build the code verifier. Examples have `tests` in one of the formats of `code_tests.read_tests`.

    The program is the last ```` ```python ```` block of the response. A block that is never closed ends with the text.
    A fence inside a multi-line string, such as a docstring, does not close the block. The program passes a test if it
    exits with status 0 and prints the expected output, or if its function returns the expected value; see `same.py` for
    how these are compared. The verdict is `timeout` if one test, or all tests together, took too long.

    Args:
      score: the reward: "fraction", the fraction of the tests that pass, as in the paper; or "binary", 1 if all pass.
      time_limit: processor time for one test, in seconds. The wall-clock limit is three times as long.
      total_limit: wall-clock time for all tests, in seconds. Tests that do not finish in it count as failed. A run
        derives the default from `rewards.timeout`.
      memory_mb: limit on the program's address space, in MB.
      max_tests: number of tests used, from the first; 0 uses all.
      sandbox: "bubblewrap" or "weak". A run accepts "weak" only with `rewards.allow_weak_sandbox`.
      packages: installed packages that programs may import in addition to the standard library, such as `[numpy]`.

    Returns:
      A function `(response, example) -> Verdict`. It raises `UserError` if the sandbox does not work here, and
      `ValueError` or `TypeError` for tests that it cannot read.

    Raises:
      UserError: if an option has an invalid value.
    """
    for name, value, known in (
        ("score", score, ("binary", "fraction")),
        ("sandbox", sandbox, sandboxes.KINDS),
    ):
        if value not in known:
            raise UserError(
                f"code: unknown {name} {value!r}{nearest(value, known)}; known: {' and '.join(known)}"
            )
    if not (time_limit > 0 and total_limit > 0 and memory_mb >= 64 and max_tests >= 0):
        raise UserError(
            f"code: time_limit {time_limit}, total_limit {total_limit}, memory_mb {memory_mb}, max_tests {max_tests}: "
            "limits must be positive, and a program needs at least 64 MB"
        )
    packages = check_package_names(packages)
    sandbox_works = False

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        nonlocal sandbox_works
        tests = read_tests(example["tests"], example.get("metadata"))
        program = last_program(response)
        if program is None:
            return Verdict(0.0, "malformed", {"reason": "no ```python block"})
        if not sandbox_works:
            sandboxes.choose_kind(sandbox, allow_weak=sandbox == "weak")
            sandbox_works = True
        try:
            with sandboxes.Sandbox(
                sandbox, program, tests.function, memory_mb=memory_mb, packages=packages
            ) as running:
                return _run_tests(running, tests, score, time_limit, total_limit, max_tests)
        except sandboxes.SandboxFailed as error:
            return infrastructure(f"sandbox: {error}")

    return verify


def _run_tests(
    running: sandboxes.Sandbox,
    tests: ProblemTests,
    score: str,
    time_limit: float,
    total_limit: float,
    max_tests: int,
) -> Verdict:
    """Run the tests in a sandbox and return the verdict; for the options see `code_verifier`."""
    cases = tests.cases[: max_tests or None]
    readings = 1 + tests.wrapped
    passed, reasons, late = [0] * readings, [""] * readings, False
    deadline = time.monotonic() + total_limit
    for index, (given, wanted) in enumerate(cases, 1):
        left = deadline - time.monotonic()
        if left <= 0:
            late = True
            over = f"test {index}: {total_limit:g} s for all tests are over"
            reasons = [reason or over for reason in reasons]
            break
        wall = min(left, sandboxes.PATIENCE * time_limit)
        report = running.run(given, seconds=time_limit, wall_seconds=wall)
        late |= report.status == "timeout"
        for reading, expected in enumerate(tests.readings(wanted)):
            failure = _failure(report, expected, bool(tests.function))
            passed[reading] += not failure
            if failure:
                reasons[reading] = reasons[reading] or f"test {index}: {failure}"
        if score == "binary" and all(reasons):
            break
    best = max(range(readings), key=passed.__getitem__)
    parts: dict[str, float | str] = {"passed": passed[best], "tests": len(cases)}
    if passed[best] == len(cases):
        return Verdict(1.0, "pass", parts)
    reward = passed[best] / len(cases) if score == "fraction" else 0.0
    return Verdict(reward, "timeout" if late else "wrong", parts | {"reason": reasons[best]})


def _failure(report: sandboxes.Report, expected: Json, function: bool) -> str:
    """Return why a test has failed; empty if it has passed."""
    if report.status == "timeout":
        return f"out of time ({report.detail})"
    if report.status != "ok":
        return report.detail
    if function:
        if not report.output:
            return "the function never returned"
        return "" if same_result(report.output, expected) else "wrong result"
    return "" if same_output(report.output.decode(errors="replace"), expected) else "wrong output"


def _confine(options: Mapping[str, Json], allow_weak: bool, timeout: float) -> tuple[dict[str, Json], str]:
    """Set the sandbox and the time limit in the options; see `VerifierSpec.confined`.

    Returns:
      The options, and the kind of sandbox.

    Raises:
      UserError: if no permitted sandbox works here, or `timeout` is too short.
    """
    settled = {"total_limit": timeout - _MARGIN, **options}
    if not 0 < settled["total_limit"] <= timeout - _MARGIN:
        least = max(options.get("total_limit", 0), 1) + _MARGIN
        raise UserError(f"rewards.timeout = {timeout:g}: the code verifier needs at least {least:g} seconds")
    settled["sandbox"] = sandboxes.choose_kind(settled.get("sandbox", "bubblewrap"), allow_weak=allow_weak)
    packages = check_package_names(settled.get("packages", ()))
    sandboxes.check_packages(settled["sandbox"], packages, settled.get("memory_mb", _MEMORY_MB))
    return settled, settled["sandbox"]


DESCRIPTOR = VerifierDescriptor("code", code_verifier, fields=("tests",), confine=_confine)
