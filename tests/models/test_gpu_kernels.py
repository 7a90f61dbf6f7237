"""Kernels for GPUs against their plain twins in the Pallas interpreter; the merge of sources against autodiff."""

import dataclasses
import functools
import math
import os
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import h100
from kernel_cases import PLAIN, compile_for, normal, rng, values_and_gradients

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models.attention import Causal, attend_pages, shared_prefix_attention
from lpo_jax.models.eight_bits import Quantised, store, stored_dtype
from lpo_jax.models.kernels import choice, triton, triton_pages, union
from lpo_jax.planner import hlo
from lpo_jax.training.session import open_session

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def small_blocks(monkeypatch):
    """Small blocks, so that short rows have several."""
    monkeypatch.setattr(triton, "QUERIES", 16)
    monkeypatch.setattr(triton, "KEYS", 16)


def shared_prefix_case(P, K, S, T, H=4, G=2, N=16):
    """Queries, keys and values of ragged prompts with their responses, the prompts' lengths, and the real tokens."""
    X = S + K * T
    lengths = jnp.array([S, 1, S // 2])[:P]
    real = jnp.concatenate([jnp.arange(S) < lengths[:, None], jnp.ones((P, K * T), bool)], axis=1)
    return (normal(P, X, H, N), normal(P, X, G, N), normal(P, X, G, N)), lengths, real[..., None, None]


@pytest.mark.parametrize(
    "sizes, window",
    [slow((2, 20, 17), None), ((1, 7, 140), 9), slow((2, 20, 17), 9), slow((1, 7, 140), None)],
)
def test_the_merge_of_sources_has_the_gradient_of_plain_attention(sizes, window):
    """The backward pass of each source receives the merged output and the merged log-sum-exp."""
    K, S, T = sizes
    qkv, lengths, real = shared_prefix_case(3, K, S, T)
    merged = lambda *qkv: union.shared_prefix(PLAIN, *qkv, lengths, S, K, window)  # noqa: E731
    plain = lambda *qkv: shared_prefix_attention(*qkv, lengths, S, K, window, "plain")  # noqa: E731
    chex.assert_trees_all_close(
        values_and_gradients(merged, real, *qkv), values_and_gradients(plain, real, *qkv), atol=1e-5
    )


@pytest.mark.parametrize(
    "sizes, window, heads, width",
    [
        ((2, 20, 17), 9, (3, 3), 12),
        slow((2, 20, 17), None, (4, 2), 16),
        slow((3, 7, 70), 9, (6, 2), 24),
        slow((1, 40, 6), None, (4, 1), 16),
    ],
)
def test_shared_prefix(small_blocks, sizes, window, heads, width):
    """Ragged prompts, grouped heads, widths that are no power of two, and rows that are no multiple of a block."""
    K, S, T = sizes
    qkv, lengths, real = shared_prefix_case(3, K, S, T, *heads, width)

    def run(choice):
        function = lambda *qkv: shared_prefix_attention(*qkv, lengths, S, K, window, choice)  # noqa: E731
        return values_and_gradients(function, real, *qkv)

    chex.assert_trees_all_close(run("interpret_triton"), run("plain"), atol=1e-5)


@pytest.mark.slow
def test_shared_prefix_in_bfloat16(small_blocks):
    """Products of bfloat16 and sums of float32, against the plain products of the same numbers in float32."""
    qkv, lengths, real = shared_prefix_case(3, 2, 20, 17)
    narrow = [x.astype(jnp.bfloat16) for x in qkv]
    wide = [x.astype(jnp.float32) for x in narrow]

    def run(choice, qkv):
        function = lambda *qkv: shared_prefix_attention(*qkv, lengths, 20, 2, None, choice)  # noqa: E731
        return values_and_gradients(function, real, *qkv)

    kernel, plain = run("interpret_triton", narrow), run("plain", wide)
    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    for x, y in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain)):
        assert size(x.astype(jnp.float32) - y) <= 2e-2 * max(1.0, size(y))


def test_any_interval_of_keys(small_blocks):
    """The kernel and its twin on bounds of all kinds, a query without keys among them; also with a foreign residual."""
    B, X, Y, H, G, N = 2, 37, 50, 4, 2, 16
    first = rng.integers(0, Y, (B, X)).astype(np.int32)
    stop = np.minimum(first + rng.integers(0, 30, (B, X)).astype(np.int32), Y)
    stop[0, 3] = first[0, 3]
    source = union.KeySource(normal(B, Y, G, N), normal(B, Y, G, N), first, stop, causal=False)
    q, d_out, out, lse = (
        normal(B, X, H, N),
        normal(B, X, H, N),
        normal(B, X, H, N),
        np.asarray(normal(B, X, H)) + 5,
    )
    kernel = triton.kernel(interpret=True)
    chex.assert_trees_all_close(
        jax.jit(kernel.forward)(q, source), jax.jit(PLAIN.forward)(q, source), atol=1e-5, rtol=1e-6
    )
    chex.assert_trees_all_close(
        jax.jit(kernel.backward)(q, source, out, lse, d_out),
        jax.jit(PLAIN.backward)(q, source, out, lse, d_out),
        atol=1e-5,
    )


def test_causal(small_blocks, tiny_config):
    """Padding on either side, a row without any token, rows longer than a block, a window."""
    (H, G), X = (4, 2), 40
    q, k, v = normal(4, X, H, 16), normal(4, X, G, 16), normal(4, X, G, 16)
    index = jnp.arange(X)
    first, last = jnp.array([[0], [0], [31], [0]]), jnp.array([[X], [5], [X], [0]])
    valid = (first <= index) & (index < last)
    rows = Causal(valid, jnp.maximum(index - first, 0))
    config = dataclasses.replace(tiny_config, sliding_window=9)
    run = lambda choice: values_and_gradients(  # noqa: E731
        lambda *qkv: rows.replace(attention=choice)(config, *qkv)[0], valid[..., None, None], q, k, v
    )
    chex.assert_trees_all_close(run("interpret_triton"), run("plain"), atol=1e-5)


def test_rows_that_may_begin_with_padding_are_not_for_cudnn(tiny_config):
    """cuDNN counts keys from the start of a row; the Pallas kernels take these rows."""
    q, valid = jnp.zeros((1, 16, 4, 16), jnp.bfloat16), jnp.ones((1, 16), bool)
    rows = Causal(valid, jnp.zeros((1, 16), jnp.int32), attention="cudnn")
    program = str(jax.make_jaxpr(lambda q: rows(tiny_config, q, q, q)[0])(q))
    assert program.count("pallas_call[") == 1


Z, X, M = 40, 8, 7  # pages, tokens of a page, pages of the longest row


FEW, SPLIT, WHOLE = (1, 1, 12, 1 << 15), (30, 6, 16, 16 * 4 * 4), (512, 2, 16, 1 << 15)


@pytest.mark.parametrize(
    "stored, sizes",
    [
        ("compute", WHOLE),
        ("int8", SPLIT),
        slow("fp8", FEW),
        *(slow("compute", sizes) for sizes in (SPLIT, FEW)),
        *(slow("int8", sizes) for sizes in (WHOLE, FEW)),
        *(slow("fp8", sizes) for sizes in (WHOLE, SPLIT)),
    ],
)
def test_keys_in_pages(monkeypatch, stored, sizes):
    """Pages in any order, read whole or in parts; several splits of a row's keys; a row without keys."""
    programs, heads, width, block_bytes = sizes
    monkeypatch.setattr(triton_pages, "PROGRAMS", programs)
    monkeypatch.setattr(triton_pages, "BLOCK_BYTES", block_bytes)
    triton_pages.attend_pages.clear_cache()
    monkeypatch.setattr(triton_pages, "QUERIES", 16)
    B, G, C, I = 5, 2, 3, heads  # with six heads there are two blocks of queries
    table = rng.permutation(Z)[: B * M].reshape(B, M)
    table[1, 5:], table[2, 3:], table[-1] = Z, -7, 10**6  # numbers that stand for no page
    q, pool = normal(B, G, C, I, width), normal(Z, 2, G, width, X)
    pool = store(pool, stored_dtype(stored, pool.dtype), 3)
    stop = jnp.array([M * X, 40, 17, 1, 0])
    start = jnp.array([[0, 49, 50], [3, 39, 11], [5, 5, 6], [-7, 0, 0], [0, 0, 0]])
    arrays = q, pool, jnp.asarray(table, jnp.int32), start, stop
    kernel = jax.jit(lambda *x: attend_pages(*x, "interpret_triton"))(*arrays)
    plain = jax.jit(lambda *x: attend_pages(*x, "plain"))(*arrays)
    some = lambda tree: jax.tree.map(lambda x: x[:-1], tree)  # noqa: E731
    chex.assert_trees_all_close(some(kernel), some(plain), atol=1e-5)
    nothing = jax.tree.map(lambda x: x[-1], kernel)
    chex.assert_trees_all_close(nothing[0], jnp.zeros_like(nothing[0]))
    assert (nothing[1] == plain[1][-1]).all()


def test_only_pages_with_keys_are_read():
    """Pages before a row's first and behind its last key, and those of other rows, may contain anything."""
    triton_pages.attend_pages.clear_cache()
    q, pool = normal(3, 1, 1, 1, 16), normal(Z, 2, 1, 16, X)
    table = jnp.asarray(rng.permutation(Z)[: 3 * M].reshape(3, M))
    start, stop = jnp.array([[26], [0], [0]]), jnp.array([44, 0, 9])
    needed = jnp.concatenate([table[0, 3:6], table[2, :2]])
    pool = jnp.where(jnp.isin(jnp.arange(Z), needed)[:, None, None, None, None], pool, jnp.nan)
    out, lse = attend_pages(q, pool, table, start, stop, "interpret_triton")
    assert jnp.isfinite(out).all() and jnp.isfinite(lse).all()


@pytest.mark.parametrize("programs, M, splits", [(512, 33, 1), (64, 33, 4), (64, 3, 3), (2, 100, 16)])
def test_few_rows_are_split(programs, M, splits):
    assert triton_pages.number_of_splits(programs, M) == splits


@pytest.fixture
def on_gpu(monkeypatch):
    """Returns a function that lets the process have a GPU of a kind and a compute capability."""

    def have(kind, capability):
        device = types.SimpleNamespace(
            device_kind=kind, compute_capability=capability, memory_stats=lambda: {}
        )
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    return have


@pytest.mark.parametrize(
    "device, form, expected, reason",
    [
        (("NVIDIA H100", "9.0"), (jnp.bfloat16, 128, None), "cudnn", "cuDNN, and Pallas kernels"),
        (("NVIDIA B200", "10.0"), (jnp.bfloat16, 64, None), "cudnn", "cuDNN, and Pallas kernels"),
        (("NVIDIA H100", "9.0"), (jnp.float32, 128, None), "triton", "no attention in float32"),
        (("NVIDIA H100", "9.0"), (jnp.bfloat16, 128, 4096), "triton", "no sliding window"),
        (("NVIDIA H100", "9.0"), (jnp.bfloat16, 132, None), "triton", "not of 132"),
        (("Tesla T4", "7.5"), (jnp.bfloat16, 128, None), "plain", "Tesla T4 has compute capability 7.5"),
        (("AMD MI300X", "gfx942"), (jnp.bfloat16, 128, None), "plain", "AMD MI300X is not an NVIDIA GPU"),
    ],
)
def test_auto_on_a_gpu(on_gpu, device, form, expected, reason):
    on_gpu(*device)
    name, why = choice.chosen("auto", *form)
    assert name == expected and reason in why and "\n" not in why
    assert choice.uses_kernels("auto") == (expected != "plain")


@pytest.mark.parametrize(
    ("demanded", "gpu", "reason"),
    [
        ("cudnn", False, "there is no GPU here; auto takes kernels"),
        ("triton", False, "there is no GPU here; auto takes kernels"),
        ("cudnn", True, "it has no attention in float32; set triton, or auto"),
    ],
)
def test_kernels_that_cannot_be_had(run_config, on_gpu, demanded, gpu, reason):
    values = run_config()
    values["model"] = {**values["model"], "attention": demanded}
    if gpu:
        on_gpu("NVIDIA H100", "9.0")
    session = open_session(parse_config(values))
    with pytest.raises(UserError, match=rf"^model\.attention={demanded}: .*{reason}") as error, session:
        pass
    assert "\n" not in str(error.value)


shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731


@pytest.fixture
def optimised():
    """The compiler as a run has it."""
    name = "jax_disable_most_optimizations"
    before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


def compile_shared_prefix(devices, row, lengths, S, K, window=None, choice="cudnn"):
    """Compiles the forward pass, and forward and backward pass together."""
    score = lambda q, k, v, lengths: shared_prefix_attention(q, k, v, lengths, S, K, window, choice)  # noqa: E731

    def update(q, k, v, lengths, d_out):
        return jax.vjp(lambda *qkv: score(*qkv, lengths), q, k, v)[1](d_out)

    return compile_for(devices, score, *row, lengths), compile_for(devices, update, *row, lengths, row[0])


@pytest.mark.slow
def test_shared_prefix_of_a_large_model_compiled_for_h100(optimised):
    """A layer of Qwen3-4B over 1,024 + 8 x 2,048 tokens: by cuDNN, in little memory, without a matrix of scores."""
    S, K, T = 1024, 8, 2048
    row = [shape(1, S + K * T, heads, 128) for heads in (32, 8, 8)]
    programs = compile_shared_prefix(h100(1), row, shape(1, dtype=jnp.int32), S, K)
    for program, calls in zip(programs, (3, 6)):
        memory, text = program.memory_analysis(), program.as_text()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        print(f"temporaries: {memory.temp_size_in_bytes / moved:.2f} of inputs and outputs")
        assert memory.temp_size_in_bytes <= 1.3 * moved
        assert text.count('custom_call_target="__cudnn$fmha') == calls
        arrays = (array for i in hlo.parse_hlo(text).walk() for array in i[0].arrays)
        assert max(math.prod(array.dims) for array in arrays) <= (S + K * T) * 32 * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice, devices, heads, width, dtype, window",
    [
        ("cudnn", 4, (16, 8), 128, jnp.bfloat16, None),
        ("cudnn", 1, (9, 3), 64, jnp.bfloat16, None),
        ("triton", 4, (8, 4), 64, jnp.bfloat16, None),
        ("triton", 1, (8, 2), 128, jnp.bfloat16, 100),
        ("triton", 1, (4, 2), 128, jnp.float32, None),
        ("triton", 1, (4, 2), 80, jnp.bfloat16, None),
        ("triton", 1, (80, 2), 256, jnp.bfloat16, None),
    ],
)
def test_compiles_for_h100(choice, devices, heads, width, dtype, window):
    """Forward, backward and decode are kernels, also where each device of a mesh runs its rows and heads."""
    P, S, K, T = 2, 200, 2, 300
    H, G = heads
    row = [shape(P, S + K * T, n, width, dtype=dtype) for n in (H, G, G)]
    programs = compile_shared_prefix(h100(devices), row, shape(P, dtype=jnp.int32), S, K, window, choice)
    name, per_source = {"cudnn": ("__cudnn$fmha", 1), "triton": ("__gpu$xla.gpu.triton", 2)}[choice]
    for program, calls in zip(programs, (3, 3 + 3 * per_source)):
        assert program.as_text().count(f'custom_call_target="{name}') == calls

    q = shape(P, G, K, H // G, width, dtype=dtype)
    bounds = shape(P, 9, dtype=jnp.int32), shape(P, K, dtype=jnp.int32), shape(P, dtype=jnp.int32)
    step = functools.partial(attend_pages, attention=choice)
    for kv_dtype in ("compute", "int8", "fp8"):
        numbers = shape(16, 2, G, width, 128, dtype=stored_dtype(kv_dtype, dtype))
        scale = shape(16, 2, G, 1, 128, dtype=jnp.float32)
        pool = numbers if kv_dtype == "compute" else Quantised(numbers, scale)
        program = compile_for(h100(devices), step, q, pool, *bounds)
        assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton') == 1
