"""The config of a decoder, and how it is read from and written to Hugging Face's `config.json`.

One frozen record covers Llama (SmolLM2, Llama 3.x), Qwen2/2.5, Qwen3 and Mistral. A family is a set of switches
(attention bias, norm on queries and keys, sliding window, rope scaling), not a module of its own.
"""

import dataclasses
import math
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.types import Json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Fields of `ModelConfig` that all models of a family share.
FAMILY_SWITCHES: Mapping[str, Mapping[str, Json]] = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies: that of Llama 3 (`rope_type: llama3`) or position interpolation (`linear`)."""

    kind: str  # "llama3" | "linear"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. The letters name axes, as in `lpo_jax.models.parameters`."""

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
    sliding_window: int | None = None  # Mistral 7B v0.1: a query attends to this many keys, itself included

    @classmethod
    def from_hf(cls, hf: Mapping[str, Json], where: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face `config.json`, with the rope settings of transformers v4 or v5.

        Args:
          hf: the parsed file.
          where: the name of the file, for messages.

        Raises:
          UserError: the family, or this variant of it, is not computed exactly by this decoder.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{where}: model family {family!r} is not supported; have {', '.join(FAMILIES)}")
        fields = _Fields(hf, {**_DEFAULTS, **_FAMILY_DEFAULTS[family]}, where)
        if (activation := fields.get("hidden_act")) != "silu":
            raise UserError(f"{where}: hidden_act {activation!r} is not supported; only silu is")
        if hf.get("mlp_bias") or (family in ("llama", "mistral", "qwen3") and hf.get("attention_bias")):
            raise UserError(f"{where}: a {family} with attention or MLP bias is not supported")
        for key, meaning in _UNSUPPORTED.items():
            if hf.get(key):
                raise UserError(f"{where}: {meaning} ({key}) are not supported; use the original model")
        width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", otherwise=heads)
        head_width = fields.integer("head_dim", otherwise=None if family == "qwen3" else width // heads)
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_key_value_heads = {kv_heads}{fields.origin('num_key_value_heads')} does not divide "
                f"num_attention_heads = {heads}"
            )
        if head_width < 2 or head_width % 2:
            raise UserError(
                f"{where}: head_dim = {head_width}{fields.origin('head_dim')} is odd; rotary embeddings need pairs"
            )
        max_positions = fields.integer("max_position_embeddings")
        theta, scaling = _rope(fields, max_positions)
        return cls(
            family=family,
            vocab_size=fields.integer("vocab_size"),
            width=width,
            num_layers=(num_layers := fields.integer("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_width=head_width,
            ffn_width=fields.integer("intermediate_size"),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=fields.number("rms_norm_eps"),
            tie_embeddings=fields.boolean("tie_word_embeddings"),
            sliding_window=_sliding_window(fields, family, num_layers),
            **FAMILY_SWITCHES.get(family, {}),
        )

    def to_hf(self) -> dict[str, Json]:
        """Return the `config.json` that transformers and vLLM read; `from_hf` restores this config from it.

        Rotary settings are written twice: as `rope_theta` and `rope_scaling` for transformers v4, and as
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


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_UNSUPPORTED = {
    "quantization_config": "quantized Hugging Face weights",
    "transformers_weights": "weights in files of another name",
}

# Defaults of transformers' config classes for fields that are missing from config.json. The sizes of a model have none
# here, because a file without them does not describe a model. None: the value follows from another field.
_DEFAULTS: Mapping[str, Json] = {
    "hidden_act": "silu",
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_FAMILY_DEFAULTS: Mapping[str, Mapping[str, Json]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of a `config.json` and their defaults. Values of a wrong type are refused, as in transformers."""

    values: Mapping[str, Json]
    defaults: Mapping[str, Json]
    where: str

    def get(self, key: str) -> Json:
        """Return the value of a field, or its default."""
        if key not in self.values and key not in self.defaults:
            raise UserError(f"{self.where}: {key} is missing; is this the config of a language model?")
        return self.values.get(key, self.defaults.get(key))

    def integer(self, key: str, otherwise: int | None = None) -> int:
        """Return a positive integer; `otherwise` replaces null in fields that may be null."""
        value = self.get(key)
        if value is None and otherwise is not None:
            return otherwise
        if type(value) is not int or value < 1:
            raise self._refused(key, value, "a positive integer")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refused(key, value, "a positive number")
        return value

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self._refused(key, value, "true or false")
        return value

    def origin(self, key: str) -> str:
        """Return a remark for messages about a value that the file does not contain."""
        return "" if key in self.values else " (the family's default; the file has none)"

    def _refused(self, key: str, value: object, expected: str) -> UserError:
        return UserError(f"{self.where}: {key} must be {expected}, got {value!r}")


def _rope(fields: _Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Read the base of the rotary frequencies and their rescaling, in transformers' order of precedence."""
    hf, where = fields.values, fields.where
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]  # one set of parameters for each type of layer; other types are refused
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(
            f"{where}: rope settings {str(rope)[:80]} are not supported; expected one flat object"
        )
    defaults = {"rope_theta": fields.get("rope_theta"), "original_max_position_embeddings": max_positions}
    rope = _Fields(rope, defaults, f"{where}: rope settings")
    if (part := rope.values.get("partial_rotary_factor", hf.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor = {part} is not supported; only 1 is")
    theta = float(rope.number("rope_theta"))
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; have default, linear, llama3")
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [key for key in needed if key not in rope.values]:
        raise UserError(
            f"{where}: rope scaling {kind!r} lacks {', '.join(missing)}; take the config.json of the original model"
        )
    numbers = [float(rope.number(key)) for key in needed]
    if kind == "linear":
        return theta, RopeScaling("linear", *numbers)  # type: ignore[arg-type]
    length = rope.integer("original_max_position_embeddings")
    return theta, RopeScaling("llama3", *numbers, length)  # type: ignore[arg-type, call-arg]


def _sliding_window(fields: _Fields, family: str, num_layers: int) -> int | None:
    """Return the number of keys that a query attends to, itself included; None: all."""
    if family == "llama":
        return None
    window = fields.get("sliding_window")
    if family == "mistral":  # a config without the key has the window of Mistral 7B v0.1
        return None if window is None else fields.integer("sliding_window")
    if (types := fields.values.get("layer_types")) is not None:
        sliding = any(kind != "full_attention" for kind in types)
    else:
        used = fields.boolean("use_sliding_window") and window is not None
        sliding = used and num_layers > fields.get("max_window_layers")
    if sliding:
        raise UserError(
            f"{fields.where}: {family} with a sliding window in some of its layers is not supported"
        )
    return None
