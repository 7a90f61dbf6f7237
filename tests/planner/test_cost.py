"""Costs read from program texts, against XLA's cost analysis and against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo

# One batched product as a TPU program has it: the batch is a spatial axis that padding and dilation keep apart.
TPU_TEXT = """HloModule jit_f

%fused (p.0: bf16[3,8,16], p.1: bf16[3,32,16]) -> bf16[3,8,32] {
  %p.0 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[3,32,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0oi->0bf
}

%body (p: (s32[], bf16[3,8,16], bf16[3,32,16])) -> (s32[], bf16[3,8,16], bf16[3,32,16]) {
  %p = (s32[]{:T(128)}, bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %a = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %b = bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=2
  %fusion.1 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}) tuple(%i, %a, %b)
}

%condition (p.9: (s32[], bf16[3,8,16], bf16[3,32,16])) -> pred[] {
  %p.9 = (s32[]{:T(128)}, bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.9), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (x: (s32[], bf16[3,8,16], bf16[3,32,16])) -> (s32[], bf16[3,8,16], bf16[3,32,16]) {
  %x = (s32[]{:T(128)}, bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}) while(%x), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_batched_product_of_a_tpu_program_in_a_loop():
    cost = program_cost(parse_hlo(TPU_TEXT))
    assert cost.flops == 5 * 2 * 3 * 8 * 16 * 32
    # The input and the result lie in main memory, the other input, S(1), does not.
    assert cost.bytes == 5 * 2 * (3 * 8 * 16 + 3 * 8 * 32)
    assert program_cost(parse_hlo(TPU_TEXT), loops_once=True).flops == cost.flops / 5
    by_data = TPU_TEXT.replace("compare(%j, %n), direction=LT", "and(%j, %n)")
    assert program_cost(parse_hlo(by_data)).flops == cost.flops / 5
    assert program_cost(parse_hlo(by_data, open_iterations=16)).flops == cost.flops / 5 * 16


# Weights on their way into a chip's fast memory: a copy names where it goes first, a slice where it comes from.
PREFETCH = """HloModule jit_f

ENTRY %main (x: bf16[64,32], y: s8[4096]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %y = s8[4096]{0:T(1024)} parameter(1)
  %copy-start = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((s8[4096]{0:T(1024)}), s8[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[0:1024]}
  ROOT %slice-done = s8[1024]{0:T(1024)S(1)} slice-done(%slice-start)
}
"""


def test_what_is_fetched_ahead_is_read_once():
    assert program_cost(parse_hlo(PREFETCH)).bytes == 2 * 64 * 32 + 1024


# One layer of a stack of four goes into a product, and another input as it is: each by way of a fusion of its own.
NESTED = """HloModule jit_f

%layer (p.0: bf16[4,8,16], p.1: s32[]) -> bf16[8,16] {
  %p.0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %layer.1 = bf16[8,16]{1,0} bitcast(%slice)
}

%same (p.2: bf16[32,16]) -> bf16[32,16] {
  ROOT %p.2 = bf16[32,16]{1,0} parameter(0)
}

%fused (p.3: bf16[4,8,16], p.4: s32[], p.5: bf16[32,16]) -> bf16[8,32] {
  %p.3 = bf16[4,8,16]{2,1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = bf16[32,16]{1,0} parameter(2)
  %left = bf16[8,16]{1,0} fusion(%p.3, %p.4), kind=kLoop, calls=%layer
  %right = bf16[32,16]{1,0} fusion(%p.5), kind=kLoop, calls=%same
  ROOT %convolution = bf16[8,32]{1,0} convolution(%left, %right), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[4,8,16], n: s32[], y: bf16[32,16]) -> bf16[8,32] {
  %x = bf16[4,8,16]{2,1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %y = bf16[32,16]{1,0} parameter(2)
  ROOT %fusion = bf16[8,32]{1,0} fusion(%x, %n, %y), kind=kOutput, calls=%fused
}
"""


def test_fusions_in_fusions_read_what_they_take():
    cost = program_cost(parse_hlo(NESTED))
    assert cost.flops == 2 * 8 * 16 * 32
    assert cost.bytes == 2 * (8 * 16 + 32 * 16 + 8 * 32)


L, B, D = 6, 8, 32


@pytest.fixture(scope="module")
def gradient():
    """The compiled gradient of L layers under `lax.scan`, each rematerialised."""

    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, weights)[0].sum()

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((L, D, D), (B, D)))
    return jax.jit(jax.grad(loss)).lower(*shapes).compile()


def test_arithmetic_of_a_scan_by_hand(gradient):
    # Forward, once more before the backward pass, and the two products of that.
    assert program_cost(parse_hlo(gradient.as_text())).flops == 4 * L * 2 * B * D * D


def test_with_loops_counted_once_xla_agrees(gradient):
    ours = program_cost(parse_hlo(gradient.as_text()), loops_once=True)
    theirs = gradient.cost_analysis()
    assert ours.flops == 4 * 2 * B * D * D
    assert 0.8 * theirs["flops"] < ours.flops <= theirs["flops"]  # which counts element-wise operations too


# Products of a GPU program: in a fusion for Triton, and by cuBLAS, which states the contracted axes in another way.
GPU_TEXT = """HloModule jit_f

%fused (p.0: bf16[8,16], p.1: bf16[16,32]) -> bf16[8,32] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %p.1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,16], w: bf16[16,32], v: bf16[32,64]) -> (bf16[8,64], s8[4]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %v = bf16[32,64]{1,0} parameter(2)
  %y = bf16[8,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
  %attended = bf16[8,16]{1,0} custom-call(%x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %z = (bf16[8,64]{1,0}, s8[4]{0}) custom-call(%y, %v), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501


def test_products_of_a_gpu_program_one_after_another():
    first, second = 2 * 8 * 16 * 32, 2 * 8 * 32 * 64
    read, written = 2 * (8 * 16 + 16 * 32), 2 * 8 * 32
    cost = program_cost(parse_hlo(GPU_TEXT), seconds=lambda flops, moved: max(flops, 20 * moved))
    attended = 2 * 2 * 8 * 16  # its input, which is two operands, and its result
    assert (cost.flops, cost.launches, cost.kernels) == (first + second, 3, attended)
    assert cost.bytes - attended == read + 2 * written + 2 * (32 * 64 + 8 * 64) + 4
    # The first kernel is limited by memory, and the second one by arithmetic or memory, whichever takes longer.
    assert cost.busy == max(first, 20 * (read + written)) + max(
        second, 20 * (cost.bytes - attended - read - written)
    )
