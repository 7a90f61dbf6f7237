"""A small part of scripts/fault_campaign.py: whole runs with real kills, flipped bits and failing disks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fault_campaign.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def campaign(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kills_at_random_moments():
    assert "of which 0 differ" in campaign("kill", "--kills", "6")


def test_flipped_bits_of_a_runs_checkpoint():
    assert "; 0 did not cause the expected error" in campaign("flip", "--flips", "300")


def test_a_failing_disk():
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    assert "12 cases, 0 failed" in campaign("disk", "--writes", "checkpoint", "metrics")
