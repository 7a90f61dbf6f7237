"""Remake tests/models/golden/<family>/: tiny random models of every family, saved and run by transformers.

Needs torch (`pip install -e .[oracle]`). Takes a few seconds:

    python scripts/make_golden_logits.py

Each directory holds the files of `save_pretrained` and `logits.npz`: tokens [B, T], mask [B, T] (rows are padded on the
right) and logits [B, T, V], computed by transformers in float32. Norms and biases are random too, so that a test
notices if one is not applied.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden"
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# name: (config, dtype that the file is saved in)
MODELS = {
    "llama": (transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5), torch.float32),
    "llama3": (
        transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
        torch.float32,
    ),
    "qwen2": (transformers.Qwen2Config(**SIZES), torch.float32),
    "qwen3": (transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True), torch.float32),
    "mistral": (transformers.MistralConfig(**SIZES, sliding_window=4), torch.bfloat16),
}


def make(name: str, out: Path) -> None:
    config, dtype = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            center = 1.0 if "norm" in key else 0.0
            p.copy_((center + 0.25 * torch.randn(p.shape)).to(dtype))
    rng = np.random.default_rng(0)
    lengths = np.array([24, 13, 5])
    mask = np.arange(24) < lengths[:, None]
    tokens = np.where(mask, rng.integers(0, config.vocab_size, mask.shape), 0).astype(np.int32)
    with torch.no_grad():
        result = model(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask).long())

    if name == "qwen3":  # as the published ones: two ids end a response, the config knows one
        model.generation_config.eos_token_id = [2, 3]
    shutil.rmtree(out, ignore_errors=True)
    model.to(dtype).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    np.savez_compressed(out / "logits.npz", tokens=tokens, mask=mask, logits=result.logits.numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=GOLDEN, help="directory of the golden files")
    parser.add_argument("names", nargs="*", default=list(MODELS), help="models to remake; default: all")
    args = parser.parse_args()
    for name in args.names:
        make(name, args.out / name)
    print(f"{args.out}: made with transformers {transformers.__version__}, torch {torch.__version__}")
