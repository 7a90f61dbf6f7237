"""`config.json` read as the config classes of transformers read it: defaults, nulls, rope settings, refusals."""

import json

import pytest
import transformers

from lpo_jax.errors import UserError
from lpo_jax.models import ModelConfig
from lpo_jax.models.config import RopeScaling

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
# Sizes for which the defaults of every family divide: 32 key-value heads among others.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": 48,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def theirs(family, **fields):
    """The config.json as read by the family's config class of transformers, converted to `ModelConfig`."""
    c = CLASSES[family](**json.loads(json.dumps(fields)))
    rope = c.rope_parameters
    scaling = None
    if rope["rope_type"] == "linear":
        scaling = RopeScaling("linear", rope["factor"])
    elif rope["rope_type"] == "llama3":
        length = rope["original_max_position_embeddings"]
        scaling = RopeScaling(
            "llama3", rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length
        )
    return ModelConfig(
        family=family,
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_width=getattr(c, "head_dim", c.hidden_size // c.num_attention_heads),
        ffn_width=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        norm_eps=c.rms_norm_eps,
        tie_embeddings=c.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=c.sliding_window if family == "mistral" else None,
    )


SAID = {
    "nothing": {},
    "every field": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 7,
    },
    "key-value heads null": {"num_key_value_heads": None},
    "window null": {"sliding_window": None},
    "window from a later layer": {"use_sliding_window": True, "max_window_layers": 2},
    "an integer as theta": {"rope_theta": 1000000},
    "no rescaling": {"rope_scaling": None, "rope_parameters": None},
    "theta of the parameters": {
        "rope_theta": 5.0,
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"},
    },
    "theta beside the parameters": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}},
    "no theta": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "the old name of the type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "both layouts at odds": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0},
    },
    "llama3 without a length": {"max_position_embeddings": 4096, "rope_scaling": LLAMA3},
    "llama3 with a length": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1024}},
    "llama3 with a length elsewhere": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 512},
}


# transformers 5 refuses the last one of Mistral, and version 4 takes it as we do.
@pytest.mark.parametrize(
    ("family", "said"),
    [(f, s) for f in CLASSES for s in SAID if (f, s) != ("mistral", "key-value heads null")],
)
def test_fields_and_defaults_are_those_of_transformers(family, said):
    fields = SIZES | SAID[said]
    assert ModelConfig.from_hf({"model_type": family, **fields}) == theirs(family, **fields)


def test_layers_share_the_rope_settings_that_stand_under_their_type():
    fields = SIZES | {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
        "layer_types": ["full_attention"] * 2,
    }
    assert CLASSES["qwen3"](**fields).rope_parameters["full_attention"]["rope_theta"] == 7.0
    assert ModelConfig.from_hf({"model_type": "qwen3", **fields}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"vocab_size": ...}, "vocab_size is missing"),
        ("llama", {"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ("llama", {"hidden_size": "1024"}, "hidden_size must be a positive integer, got '1024'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps must be a positive number, got None"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ("llama", {"head_dim": 7}, "head_dim = 7 is odd"),
        (
            "llama",
            {"num_key_value_heads": 5},
            "num_key_value_heads = 5 does not divide num_attention_heads = 32",
        ),
        (
            "qwen3",
            {"num_attention_heads": 16},
            r"num_key_value_heads = 32 \(the family's default; the file has none\) does not divide",
        ),
        ("qwen3", {"head_dim": None}, "head_dim must be a positive integer, got None"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks factor"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope scaling 'llama3' lacks low_freq_factor, high_freq_factor; take the config.json of the original",
        ),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": None}}, "factor must be a positive number, got None"),
        ("llama", {"rope_scaling": "linear"}, "rope settings linear are not supported"),
        ("llama", {"rope_theta": None}, "rope_theta must be a positive number, got None"),
        (
            "llama",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}},
            "rope settings .* are not supported; expected one flat object",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "sliding window in some of its layers",
        ),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window in some"),
        ("llama", {"transformers_weights": "other.safetensors"}, "weights in files of another name"),
    ],
)
def test_what_transformers_would_not_take_is_one_line(family, fields, message):
    said = {k: v for k, v in ({"model_type": family} | SIZES | fields).items() if v is not ...}
    with pytest.raises(UserError, match=f"^here.json: .*{message}") as error:
        ModelConfig.from_hf(said, "here.json")
    assert "\n" not in str(error.value)
