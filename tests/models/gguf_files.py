"""Writes a GGUF file from a Hugging Face directory, as llama.cpp's converter does."""

import gguf
import numpy as np
from safetensors.numpy import load_file

from lpo_jax.models.hf import HfDirectory
from lpo_jax.models.parameters import declared


def interleave(x: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key matrix as llama.cpp does: the two halves of a head alternate."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, directory, *, kind="F32", tokenizer=None, skip=(), extra=None, split=0, **metadata):
    """Write a GGUF file.

    Keys of `metadata` have `__` instead of the dot and override those of the config; None omits a key. `split` is the
    number of tensors in a part of a split model; 0 writes one file.
    """
    source = HfDirectory.open(directory)
    config = source.config
    weights = load_file(directory / "model.safetensors")
    arch = "llama" if config.family == "mistral" else config.family
    keys = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "feed_forward_length": config.ffn_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "rope.freq_base": config.rope_theta,
        "attention.sliding_window": config.sliding_window,
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for key, value in (tokenizer or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for parameter in declared(config):
        for layer in range(config.num_layers if parameter.in_layers else 1):
            name = parameter.gguf.format(layer)
            x = weights[parameter.hf.format(layer)].astype(np.float32)
            if arch == "llama" and parameter.rotated:
                x = interleave(x, len(x) // config.head_width)
            fits = x.ndim == 2 and x.shape[1] % 32 == 0
            to = gguf.GGMLQuantizationType[kind if fits else "F32"]
            if name not in skip:
                writer.add_tensor(name, gguf.quants.quantize(x, to), raw_dtype=to)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
