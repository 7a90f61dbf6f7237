"""GPUs to compile for that need not be present."""

import pytest

from lpo_jax.planner.topology import gpu_devices, parse_topology


def h100(devices: int):
    """H100s to compile for; the test is skipped without the extra [plan-gpu]."""
    pytest.importorskip("jax_cuda12_plugin", reason="the extra [plan-gpu] is not installed")
    return gpu_devices(parse_topology(f"h100:{devices}"))
