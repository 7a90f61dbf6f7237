"""GGUF files, written here from the golden models as llama.cpp's converter would."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from gguf_files import interleave, write_gguf
from safetensors.numpy import load_file

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models.config import RopeScaling
from lpo_jax.models.gguf import GgufFile
from lpo_jax.models.hf import HfDirectory

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [chr(ord("!") + i) for i in range(60)]
    + ["<|im_end|>", "<|endoftext|>", "<a>", "<b>"],
    "tokenizer.ggml.token_type": [1] * 60 + [3] * 4,
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": 60,
}


def write(golden, tmp_path, name, **options):
    return write_gguf(tmp_path / f"{name}.gguf", golden / name, tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_equal_transformers(name, golden, tmp_path, deviation):
    path = write(golden, tmp_path, name)
    model = load_model(path)
    assert model.config == HfDirectory.open(golden / name).config
    np.testing.assert_array_less(deviation(model, name), 1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors_are_the_package_s(kind, golden, tmp_path):
    model = load_model(write(golden, tmp_path, "llama", kind=kind))
    weights = load_file(golden / "llama" / "model.safetensors")
    to = gguf.GGMLQuantizationType[kind]
    rounded = lambda x: gguf.quants.dequantize(gguf.quants.quantize(x, to), to)  # noqa: E731
    embed = rounded(weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.params["embed"], embed)
    assert np.abs(embed - weights["model.embed_tokens.weight"]).max() > 0
    # q keeps its quantisation blocks in llama.cpp's order of rows
    q = rounded(interleave(weights["model.layers.1.self_attn.q_proj.weight"], 4))
    q = q.reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(4, 8, 32)
    np.testing.assert_array_equal(model.params["layers"]["wq"][1], q.transpose(2, 0, 1))


def test_gguf_and_hf_give_the_same_bits(golden, tmp_path):
    ours = load_model(write(golden, tmp_path, "llama"), "bfloat16")
    ours.save(tmp_path / "hf")
    again, direct = load_model(tmp_path / "hf", "bfloat16"), load_model(golden / "llama", "bfloat16")
    for x, y, z in zip(*(jax.tree.leaves(m.params) for m in (ours, again, direct))):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes() == np.asarray(z).tobytes()
    assert again.eos_ids == ours.eos_ids == (60,)
    assert again.tokenizer("*+!").input_ids == ours.tokenizer("*+!").input_ids == [9, 10, 0]


def test_end_ids_of_qwen_are_two(golden, tmp_path):
    assert load_model(write(golden, tmp_path, "qwen3")).eos_ids == (60, 61)


def divisors(scaling, theta, head_width):
    """The rope_freqs.weight of convert_hf_to_gguf: the divisor of each frequency."""
    out = []
    for i in range(0, head_width, 2):
        wavelength = 2 * np.pi * theta ** (i / head_width)
        if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
            out.append(1.0)
        elif wavelength > scaling.original_max_positions / scaling.low_freq_factor:
            out.append(scaling.factor)
        else:
            smooth = scaling.original_max_positions / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            out.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rescaling_is_found_again(factor, golden, tmp_path):
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    file = GgufFile.open(write(golden, tmp_path, "llama"))
    assert file._llama3_scaling(divisors(scaling, 500000.0, 64), 500000.0) == scaling
    assert file._llama3_scaling(np.ones(32), 500000.0) is None
    other = dataclasses.replace(scaling, original_max_positions=4096)
    with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3's"):
        file._llama3_scaling(divisors(other, 500000.0, 64), 500000.0)


def test_rope_freqs_are_read_from_the_file(golden, tmp_path):
    # The golden model's original length is 32, which no published Llama has: it must not pass silently.
    scaling = HfDirectory.open(golden / "llama3").config.rope_scaling
    freqs = {"rope_freqs.weight": divisors(scaling, 100.0, 8)}
    with pytest.raises(UserError, match=r"rope_freqs.weight"):
        load_model(write(golden, tmp_path, "llama3", extra=freqs))


def test_linear_rescaling(golden, tmp_path):
    path = write(golden, tmp_path, "llama", rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert GgufFile.open(path).config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"rope__dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported, only 8"),
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"skip": ("token_embd.weight",)}, "token_embd.weight is missing"),
        (
            {"skip": ("blk.1.attn_q.weight", "blk.0.attn_q.weight")},
            "blk.0.attn_q.weight and 1 more is missing",
        ),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(32)}}, "unexpected tensor blk.0.attn_q.bias"),
        (
            {"feed_forward_length": 47},
            r"blk.0.ffn_gate.weight has shape \(48, 32\), its config says \(47, 32\)",
        ),
    ],
)
def test_a_file_that_cannot_be_exact_is_refused(options, message, golden, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_model(write(golden, tmp_path, "llama", **options))
    assert "llama.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_split_model_is_read_whole_or_refused(golden, tmp_path):
    whole = load_model(write(golden, tmp_path, "llama"))
    write(golden, tmp_path, "llama", split=8)
    first, second, third = parts = sorted(tmp_path.glob("llama-*.gguf"))
    assert [part.name for part in parts] == [f"llama-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    model = load_model(first)
    assert model.config == whole.config
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(UserError, match="is part 2 of 3 of a split model; name its first part"):
        load_model(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="is part 1 of 3 of a split model; name its first part"):
        load_model(renamed)
    renamed.rename(first)
    held = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(UserError, match=r"00002-of-00003.gguf: is not part 2 of 3"):
        load_model(first)
    second.write_bytes(held)
    third.unlink()
    with pytest.raises(UserError, match=r"part 3 of 3, llama-00003-of-00003.gguf, is missing"):
        load_model(first)


def test_a_tensor_that_stands_twice_is_refused(golden, tmp_path):
    path = write(golden, tmp_path, "llama")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.1.attn_k.weight"))
    with pytest.raises(UserError, match=r"holds tensor blk.1.attn_k.weight twice"):
        load_model(path)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba' is not supported; have llama, qwen2, qwen3"):
        load_model(tmp_path / "a.gguf")


def test_cut_files(golden, tmp_path):
    path = write(golden, tmp_path, "llama")
    data = path.read_bytes()
    assert GgufFile.open(path).stored
    # The last tensor is padded to the alignment; a cut inside of it must show as well.
    for end in [*range(24, 2000, 97), len(data) // 2, len(data) - 200]:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="cut short; download it again"):
            load_model(path)
    for start in (b"", b"GGU", b"not a model at all", b"GGUF\x01\0\0\0" + data[8:]):
        path.write_bytes(start)
        with pytest.raises(UserError, match=r"llama.gguf"):
            load_model(path)


def test_metadata_is_what_the_package_reads(golden, tmp_path):
    path = write(golden, tmp_path, "mistral", kind="Q8_0")
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert ours.stored.keys() == {t.name for t in theirs.tensors}
    for t in theirs.tensors:
        np.testing.assert_array_equal(ours.read(t.name), gguf.quants.dequantize(t.data, t.tensor_type))
