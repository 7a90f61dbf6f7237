"""Topologies by name: which are parsed, which are refused, and the messages."""

import re
from importlib import resources

import pytest

from lpo_jax.config import override_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.parallel import gpus
from lpo_jax.planner import topology
from lpo_jax.planner.plan import attention_of


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [
        ("v5p:4x4x4", (4, 4, 4), 64),
        ("v5e:8x16", (8, 16), 128),
        ("V6E:1x1", (1, 1), 1),
        ("h100:8", (8,), 8),
        ("2x b200:8", (8,), 16),
        ("4X A100:4", (4,), 16),
    ],
)
def test_parse(name, shape, devices):
    parsed = topology.parse_topology(name)
    assert (parsed.shape, parsed.num_devices, parsed.name) == (shape, devices, name.lower())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p", "write chip:shape"),
        ("v5p:4x", "write chip:shape"),
        ("v9:4x4", "known: v5e, v5p, v6e, a100, h100, h200, b200"),
        ("h10:8", "did you mean 'h100'"),
        ("v5p:4x4", "needs 3 numbers"),
        ("v5e:4x4x4", "needs 2 numbers"),
        ("h100:2x4", "needs 1 numbers"),
        ("h100:16", "a host has at most 8; write '2x h100:8'"),
        ("0x h100:8", "0 slices"),
        ("2x v5e:4x4", "one slice of TPUs"),
        ("v5e:32x32", "a pod has at most 256"),
        ("v5e:0x4", "0 devices"),
    ],
)
def test_what_is_not_a_topology_is_said_in_one_line(name, says):
    with pytest.raises(UserError, match=says) as error:
        topology.parse_topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chip", "demanded", "dtype", "expected"),
    [
        ("v6e", "auto", "bfloat16", "pallas"),
        ("h100", "auto", "bfloat16", "cudnn"),
        ("h100", "auto", "float32", "triton"),
        ("h100", "plain", "bfloat16", "plain"),
    ],
)
def test_the_attention_that_a_chip_has(run_config, tiny_config, chip, demanded, dtype, expected):
    config = override_config(
        parse_config(run_config()), [f"--model.attention={demanded}", f"--model.dtype={dtype}"]
    )
    assert attention_of(config, topology.CHIPS[chip], tiny_config) == expected


@pytest.mark.parametrize(
    ("chip", "demanded", "reason"),
    [
        ("h100", "pallas", "h100 is not a TPU; set auto"),
        ("v6e", "triton", "v6e is not a GPU; set auto"),
        ("h100", "cudnn", "it has no attention in float32; set triton, or auto"),
    ],
)
def test_attention_that_a_chip_does_not_have(run_config, tiny_config, chip, demanded, reason):
    config = override_config(
        parse_config(run_config()), [f"--model.attention={demanded}", "--model.dtype=float32"]
    )
    with pytest.raises(UserError, match=rf"^model\.attention={demanded}: {reason}$"):
        attention_of(config, topology.CHIPS[chip], tiny_config)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lpo_jax\[plan\]'"):
        topology.tpu_devices(topology.parse_topology("v5e:2x2"))


def test_without_the_cuda_plugin_the_extra_and_the_estimate_are_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lpo_jax\[plan-gpu\]', or give --estimate") as error:
        topology.open_compiler(topology.parse_topology("2x h100:8"))
    assert "\n" not in str(error.value)


def test_every_gpu_has_a_description_of_its_memory():
    for chip in topology.CHIPS.values():
        if chip.kind == "gpu":
            text = (resources.files("lpo_jax.planner") / "gpus" / f"{chip.name}.txtpb").read_text()
            memory = int(re.search(r"device_memory_size: (\d+)", text)[1])
            assert chip.memory == gpus.MEMORY_SHARE * memory


def test_a_ring_between_hosts_has_an_adapter_for_each_of_its_devices_on_a_host():
    h100 = topology.CHIPS["h100"]
    assert h100.link_rate(8, 1) == h100.link
    assert h100.link_rate(2, 2) == h100.network
    assert h100.link_rate(8, 2) == 4 * h100.network
    assert h100.link_rate(32, 2) == h100.link  # as fast as the ring inside a host


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_chips_by_the_names_that_jax_has_for_them(kind, name):
    assert topology.chip_of(kind) is topology.CHIPS[name]
    assert topology.chip_of("NVIDIA GeForce RTX 4090") is topology.chip_of("cpu") is None


def test_a_ring_uses_both_directions_of_a_torus_axis():
    assert topology.CHIPS["v5e"].ring == 2 * topology.CHIPS["v5e"].link
    assert topology.CHIPS["h100"].ring == topology.CHIPS["h100"].link
