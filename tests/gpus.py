"""GPUs to compile for that need not be present."""

from importlib import resources

import pytest
from jax.experimental import topologies


def h100(devices: int):
    """H100s to compile for; the test is skipped without the extra [plan-gpu]."""
    pytest.importorskip("jax_cuda12_plugin", reason="the extra [plan-gpu] is not installed")
    described = resources.files("lpo_jax.planner") / "gpus" / "h100.txtpb"
    return topologies.get_topology_desc(
        "h100", platform="cuda", target_config=described.read_text(), topology=f"1x1x{devices}"
    ).devices
