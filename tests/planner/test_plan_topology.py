"""Topologies by name: which are parsed, which are refused, and the messages."""

import pytest

from lpo_jax.errors import UserError
from lpo_jax.planner import topology


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [("v5p:4x4x4", (4, 4, 4), 64), ("v5e:8x16", (8, 16), 128), ("V6E:1x1", (1, 1), 1), ("h100:8", (8,), 8)],
)
def test_parse(name, shape, devices):
    parsed = topology.parse_topology(name)
    assert (parsed.shape, parsed.num_devices, parsed.name) == (shape, devices, name.lower())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p", "write chip:shape"),
        ("v5p:4x", "write chip:shape"),
        ("v9:4x4", "known: v5e, v5p, v6e, a100, h100, h200"),
        ("h10:8", "did you mean 'h100'"),
        ("v5p:4x4", "needs 3 numbers"),
        ("v5e:4x4x4", "needs 2 numbers"),
        ("h100:2x4", "needs 1 numbers"),
        ("h100:16", "a host has at most 8"),
        ("v5e:32x32", "a pod has at most 256"),
        ("v5e:0x4", "0 devices"),
    ],
)
def test_what_is_not_a_topology_is_said_in_one_line(name, says):
    with pytest.raises(UserError, match=says) as error:
        topology.parse_topology(name)
    assert "\n" not in str(error.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lpo_jax\[plan\]'"):
        topology.tpu_devices(topology.parse_topology("v5e:2x2"))


def test_a_ring_uses_both_directions_of_a_torus_axis():
    assert topology.CHIPS["v5e"].ring == 2 * topology.CHIPS["v5e"].link
    assert topology.CHIPS["h100"].ring == topology.CHIPS["h100"].link
