"""The shape of a decoder, and where it is read from.

One frozen record covers Llama (SmolLM2, Llama 3.x), Qwen2/2.5, Qwen3 and Mistral; a family is a set of
switches (attention bias, norm on queries and keys, window, rope scaling), never a module of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency rescaling (`rope_type: llama3`) or plain position interpolation (`linear`)."""

    kind: str  # "llama3" | "linear"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Axis letters as everywhere: L D H G N F V."""

    family: str
    vocab_size: int  # V
    width: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_width: int  # N
    ffn_width: int  # F
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    sliding_window: int | None = None  # Mistral 7B v0.1: a query sees this many keys, itself included

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads a Hugging Face `config.json` (as a dict; both the v4 and the v5 rope layout).

        Raises:
          UserError: for a family or a variant of one that this decoder does not compute exactly.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{where}: model family {family!r} is not supported; have {', '.join(FAMILIES)}")
        if missing := [key for key in _REQUIRED if hf.get(key) is None]:
            raise UserError(f"{where}: {missing[0]} is missing; is this the config of a language model?")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported; only silu is")
        if hf.get("mlp_bias") or (family in ("llama", "mistral", "qwen3") and hf.get("attention_bias")):
            raise UserError(f"{where}: a {family} with attention or MLP bias is not supported")
        if hf.get("quantization_config"):
            raise UserError(
                f"{where}: quantized Hugging Face weights are not supported; use the original model"
            )
        heads = hf["num_attention_heads"]
        rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
        return cls(
            family=family,
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
            ffn_width=hf["intermediate_size"],
            max_positions=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, where),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(hf, family, where),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read; `from_hf` of it gives this config back.

        Rotary settings stand there twice: `rope_theta` and `rope_scaling` for transformers v4,
        `rope_parameters` for v5.
        """
        scaling = None
        if self.rope_scaling is not None:
            s = self.rope_scaling
            scaling = {"rope_type": s.kind, "factor": s.factor}
            if s.kind == "llama3":
                scaling["low_freq_factor"] = s.low_freq_factor
                scaling["high_freq_factor"] = s.high_freq_factor
                scaling["original_max_position_embeddings"] = s.original_max_positions
        hf = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.ffn_width,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        if self.family != "qwen2":
            hf["attention_bias"] = False
        if self.family == "mistral":
            hf["sliding_window"] = self.sliding_window
        if self.family in ("qwen2", "qwen3"):
            hf |= {"use_sliding_window": False, "sliding_window": None}
        return hf


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UserError(f"{where}: rope scaling {kind!r} is not supported; have default, linear, llama3")


def _sliding_window(hf: Mapping[str, Any], family: str, where: str) -> int | None:
    # A Mistral config that is silent about the window has the one of Mistral 7B v0.1.
    window = hf.get("sliding_window", 4096 if family == "mistral" else None)
    if window is None or (family in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False)):
        return None
    if family == "llama":
        return None
    if family in ("qwen2", "qwen3"):
        raise UserError(
            f"{where}: {family} with use_sliding_window mixes window and full layers; not supported"
        )
    return int(window)
