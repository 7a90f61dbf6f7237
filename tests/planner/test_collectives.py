"""Reading the collectives of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lpo_jax.parallel.sharding import AXES
from lpo_jax.planner.hlo import collectives, parse_hlo


def test_a_scan_over_sharded_weights_gathers_inside_its_loop():
    mesh = jax.make_mesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def program(x, stack):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
        return y.sum()

    weights = jax.device_put(np.ones((5, 16, 16), np.float32), split)
    x = jax.device_put(np.ones((64, 16), np.float32), rows)
    found = collectives(parse_hlo(jax.jit(program).lower(x, weights).compile().as_text()))
    gathers = [c for c in found if c.kind == "all-gather"]
    assert [(c.bytes, c.devices, c.in_loop, c.times) for c in gathers] == [(16 * 16 * 4, 8, 1, 5)]
    assert [c.in_loop for c in found if c.kind == "all-reduce"] == [0]


TEXT = """HloModule jit_f, is_scheduled=true

%wrapped (p: bf16[8,4]) -> bf16[1,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs = bf16[1,4]{1,0} reduce-scatter(%p), replica_groups=[2,8]<=[16], dimensions={0}
}

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %a = (bf16[8,4]{1,0}, bf16[64,4]{1,0:T(8,128)}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %b = bf16[64,4]{1,0} all-gather-done(%a)
  %c = ((bf16[8,4]), bf16[1,4], u32[]) async-start(%y), calls=%wrapped
}

ENTRY %main (p0: f32[2]) -> f32[2] {
  %w = (s32[], bf16[8,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %p = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1}}
  %r = (f32[3]{0}, pred[4]{0}) all-reduce(%s, %u), to_apply=%sum, metadata={op_name="jit(f)/add"}
}
"""


def test_asynchronous_and_combined_operations():
    a, b, c, d = collectives(parse_hlo(TEXT))
    assert (a.kind, a.shape, a.bytes, a.devices, a.in_loop, a.times) == (
        "all-gather",
        "bf16[64,4]",
        512,
        4,
        1,
        12,
    )
    assert (b.kind, b.bytes, b.devices, b.times) == ("reduce-scatter", 8, 8, 12)
    assert (c.kind, c.shape, c.devices, c.in_loop) == ("collective-permute", "f32[2]", 0, 0)
    assert (d.kind, d.bytes, d.source, d.times) == ("all-reduce", 3 * 4 + 4, "jit(f)/add", 1)


def test_turns_that_the_compiler_left_to_the_condition():
    unstated = TEXT.replace(', backend_config={"known_trip_count":{"n":"12"}}', "")
    text = unstated.replace("%body (arg", CONDITION)
    assert [c.times for c in collectives(parse_hlo(text))] == [7, 7, 1, 1]


CONDITION = """%cond (arg.1: (s32[], bf16[8,4])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (arg"""


def test_groups_and_the_hosts_that_they_are_on():
    """The three forms in which groups of sixteen devices on two hosts are printed, some with permuted axes."""
    mesh = "mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0))"
    for groups, first, hosts in [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3), 1),
        ("[2,8]<=[16]", tuple(range(8)), 1),
        ("[8,2]<=[2,8]T(1,0)", (0, 8), 2),
        (mesh + " {'a'}", tuple(range(8)), 1),
        (mesh + " {'b'}", (0, 8), 2),
        ("mesh['a'=2,'b'=8] {'b':(2)4}", (0, 1, 2, 3), 1),
        ("mesh['a'=2,'b'=8] {'a', 'b':(1)2}", (0, 4, 8, 12), 2),
    ]:
        text = f"ENTRY %main (p: f32[2]) -> f32[2] {{\n  %r = f32[2] all-reduce(%p), replica_groups={groups}\n}}\n"
        (found,) = collectives(parse_hlo(text))
        assert (found.group, found.devices, found.hosts(8)) == (first, len(first), hosts), groups
