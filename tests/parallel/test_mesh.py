"""The choice of a run's mesh, and meshes that are refused."""

import dataclasses

import jax
import pytest

from lpo_jax.config import MeshSection
from lpo_jax.errors import UserError
from lpo_jax.parallel.mesh import MeshSizes, ModelSizes, arrange, build_mesh, choose_mesh

# 1.7B parameters: 27 GB of state, 7 GB of float32 weights.
MODEL = ModelSizes(num_heads=16, num_kv_heads=8, num_params=1_720_567_808)
GB = 1e9


def sizes(devices, prompts, memory, model=MODEL, weight_bytes=2, **given):
    chosen = choose_mesh(MeshSection(**given), devices, model, prompts, memory, weight_bytes)
    return dataclasses.astuple(chosen)


@pytest.mark.parametrize(
    "devices, prompts, memory, expected",
    [
        (8, 64, None, (8, 1, 1, 1)),  # no limit known: prompts alone
        (8, 64, 95 * GB, (8, 1, 1, 1)),  # the state fits on one device
        (16, 128, 16 * GB, (4, 4, 1, 1)),  # 27 GB in parts of at most 8
        (256, 128, 16 * GB, (64, 2, 2, 1)),  # more devices than prompts: two compute one prompt
        (8, 64, 2 * GB, (1, 8, 1, 8)),  # nothing fits: as small as it gets, in training and in decoding
        (8, 64, 6 * GB, (1, 8, 1, 2)),  # half the weights fit while sampling
        (1, 7, None, (1, 1, 1, 1)),
        (8, 2, None, (2, 1, 4, 1)),
        (8, 3, None, (1, 1, 8, 1)),
    ],
)
def test_derived(devices, prompts, memory, expected):
    assert sizes(devices, prompts, memory) == expected


def test_a_derived_mesh_leaves_devices_idle_rather_than_fail():
    model = dataclasses.replace(MODEL, num_heads=9, num_kv_heads=3)
    assert sizes(8, 2, None, model) == (2, 1, 3, 1)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"tensor": 2}, (2, 2, 2, 1)),
        ({"tensor": 4}, (2, 1, 4, 1)),
        ({"data": 2}, (2, 4, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"data": 2, "fsdp": 1}, (2, 1, 4, 1)),
        ({"data": 2, "decode_tensor": 4}, (2, 4, 1, 4)),
    ],
)
def test_what_is_not_given_is_derived(given, expected):
    assert sizes(8, 64, 16 * GB, **given) == expected


@pytest.mark.parametrize(
    "given, prompts, says",
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, 6, "3 x 1 x 1 = 3, but there are 8 devices"),
        ({"data": 16}, 16, "16 x 1 x 1 = 16, but there are 8"),
        ({"tensor": 3}, 4, "but there are 8 devices"),
        ({"data": 8}, 12, "data x fsdp = 8 does not divide the 12 prompts of a minibatch"),
        ({"data": 8}, 12, "training.prompts_per_step"),
        ({"data": 8, "decode_tensor": 3}, 8, "mesh.decode_tensor = 3: must divide the 8 devices"),
    ],
)
def test_refused(given, prompts, says):
    with pytest.raises(UserError) as refused:
        sizes(8, prompts, None, **given)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("what, heads", [("9 query", (9, 3)), ("3 key/value", (12, 3))])
def test_heads_that_the_tensor_axis_does_not_divide(what, heads):
    model = dataclasses.replace(MODEL, num_heads=heads[0], num_kv_heads=heads[1])
    with pytest.raises(
        UserError, match=f"mesh.tensor = 2: does not divide the model's {what} heads; use 1 or"
    ):
        sizes(8, 64, None, model, tensor=2)


def test_only_data_crosses_from_slice_to_slice():
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int = 0
        platform: str = "cpu"
        device_kind: str = "cpu"

    devices = [Device(i, i // 4) for i in range(8)]
    arranged = arrange(MeshSizes(4, 1, 2), devices)
    assert arranged.shape == (4, 1, 2)
    assert [{d.slice_index for d in part.flat} for part in arranged] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data = 1: does not divide into the 2 slices"):
        arrange(MeshSizes(1, 8, 1), devices)


def test_the_devices_are_used_in_order():
    assert list(build_mesh(MeshSizes(3, 1, 2)).devices.flat) == jax.devices()[:6]
