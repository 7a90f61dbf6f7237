"""The config of a decoder, and how it is read from and written to Hugging Face's `config.json`.

One frozen record covers Llama (SmolLM2, Llama 3.x), Qwen2/2.5, Qwen3, Mistral, and the decoders of Qwen2.5-VL and
Qwen3-VL. A family is a set of switches (attention bias, norm on queries and keys, sliding window, rope scaling), not a
module of its own.
"""

import dataclasses
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.images import ImageProcessor
from lpo_jax.models.fields import Fields
from lpo_jax.models.vision_config import VISION_FAMILIES, VisionConfig, read_vision, vision_to_hf
from lpo_jax.types import Json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *VISION_FAMILIES)
# Fields of `ModelConfig` that all models of a family share.
FAMILY_SWITCHES: Mapping[str, Mapping[str, Json]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen2_5_vl": {"qkv_bias": True},
    "qwen3_vl": {"qk_norm": True, "mrope_interleaved": True},
}


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
    vision: VisionConfig | None = None  # the tower of a vision model
    # Rotary frequencies that turn with the time, row and column of an image's token. Their order is by blocks, or
    # interleaved (Qwen3-VL).
    mrope: tuple[int, ...] = ()
    mrope_interleaved: bool = False

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """The ids that have no probability in a response: the placeholders of images and videos."""
        return () if self.vision is None else (self.vision.image_token, self.vision.video_token)

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Json], where: str = "config.json", processor: ImageProcessor | None = None
    ) -> "ModelConfig":
        """Read a Hugging Face `config.json`, with the rope settings of transformers v4 or v5.

        Args:
          hf: the parsed file.
          where: the name of the file, for messages.
          processor: of the same directory, which vision models have.

        Raises:
          UserError: the family, or this variant of it, is not computed exactly by this decoder.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{where}: model family {family!r} is not supported; have {', '.join(FAMILIES)}")
        whole, sees = hf, family in VISION_FAMILIES
        hf = _text_fields(hf) if sees else hf
        fields = Fields(hf, {**_DEFAULTS, **_FAMILY_DEFAULTS[family]}, where)
        if (activation := fields.get("hidden_act")) != "silu":
            raise UserError(f"{where}: hidden_act {activation!r} is not supported; only silu is")
        if hf.get("mlp_bias") or (
            family in ("llama", "mistral", "qwen3", "qwen3_vl") and hf.get("attention_bias")
        ):
            raise UserError(f"{where}: a {family} with attention or MLP bias is not supported")
        for key, meaning in _UNSUPPORTED.items():
            if hf.get(key):
                raise UserError(f"{where}: {meaning} ({key}) are not supported; use the original model")
        width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", otherwise=heads)
        head_width = fields.integer(
            "head_dim", otherwise=None if family in ("qwen3", "qwen3_vl") else width // heads
        )
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
            vision=read_vision(whole, family, width, processor or ImageProcessor(), where) if sees else None,
            mrope=_mrope(fields, head_width) if sees else (),
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
        if self.family not in ("qwen2", "qwen2_5_vl"):
            hf["attention_bias"] = False
        if self.family == "mistral":
            hf["sliding_window"] = self.sliding_window
        if self.family in ("qwen2", "qwen3", "qwen2_5_vl"):
            hf |= {"use_sliding_window": False, "sliding_window": None}
        return hf if self.vision is None else self._with_vision(hf)

    def _with_vision(self, hf: dict[str, Json]) -> dict[str, Json]:
        """Return the `config.json` of a vision model from the fields of its decoder, in the form of published files."""
        sections: dict[str, Json] = {"mrope_section": list(self.mrope)}
        if self.mrope_interleaved:
            sections["mrope_interleaved"] = True
        hf["rope_parameters"] |= sections
        hf["rope_scaling"] = {"rope_type": "default", "type": "default", **sections}
        vision = vision_to_hf(self.vision, self.family, self.width)
        if self.family == "qwen2_5_vl":  # flat, as transformers v4 reads it
            return hf | vision
        outside = ("architectures", "model_type", "tie_word_embeddings")
        text = {key: value for key, value in hf.items() if key not in outside} | {
            "model_type": "qwen3_vl_text"
        }
        return {key: hf[key] for key in outside} | {"text_config": text} | vision


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
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
    "qwen2_5_vl": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_window_layers": 80,
    },
    "qwen3_vl": {"num_key_value_heads": 32, "rope_theta": 5e5, "head_dim": 128},
}


def _text_fields(hf: Mapping[str, Json]) -> dict[str, Json]:
    """Return the decoder's fields of a vision model's file, which are nested or, in older files, at the top."""
    text = hf.get("text_config")
    text = dict(text) if isinstance(text, Mapping) else {k: v for k, v in hf.items() if k != "vision_config"}
    if "tie_word_embeddings" in hf:
        text["tie_word_embeddings"] = hf["tie_word_embeddings"]
    return text


def _mrope(fields: Fields, head_width: int) -> tuple[int, ...]:
    """Return the number of rotary frequencies that turn with the time, the row and the column."""
    rope = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    sections = rope.get("mrope_section")
    if not isinstance(sections, list | tuple) or len(sections) != 3 or sum(sections) != head_width // 2:
        raise UserError(
            f"{fields.where}: mrope_section must be three numbers with the sum head_dim / 2 = {head_width // 2}, got "
            f"{sections!r}"
        )
    return tuple(sections)


def _rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
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
    rope = Fields(rope, defaults, f"{where}: rope settings")
    if (part := rope.values.get("partial_rotary_factor", hf.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor = {part} is not supported; only 1 is")
    theta = float(rope.number("rope_theta"))
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind in ("default", "mrope"):  # the sections of mrope are read by `_mrope`
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


def _sliding_window(fields: Fields, family: str, num_layers: int) -> int | None:
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
