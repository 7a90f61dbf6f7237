"""The config of a vision tower, and how it is read from and written to Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.images import ImageProcessor
from lpo_jax.models.fields import Fields
from lpo_jax.types import Json

VISION_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
_ACTIVATIONS = {"qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and switches of a vision tower.

    Attributes:
      depth: layers of the tower.
      width: of its hidden states.
      num_heads: attention heads.
      ffn_width: of the feed-forward layers.
      image_token, video_token: ids of the placeholders in prompts, which are never sampled.
      start_token, end_token: ids that the chat template writes around an image.
      processor: cuts images into patches.
      window: side of the attention windows in pixels; 0: every layer attends to the whole image.
      full_layers: layers that attend to the whole image although there are windows.
      num_positions: rows of the learned table of positions, a square number; 0: there is no table.
      deepstack: layers whose outputs are added to the first layers of the decoder.
    """

    depth: int
    width: int
    num_heads: int
    ffn_width: int
    image_token: int
    video_token: int
    start_token: int
    end_token: int
    processor: ImageProcessor
    window: int = 0
    full_layers: tuple[int, ...] = ()
    num_positions: int = 0
    deepstack: tuple[int, ...] = ()

    @property
    def head_width(self) -> int:
        """The width of an attention head."""
        return self.width // self.num_heads

    @property
    def window_patches(self) -> int:
        """The number of patches of a whole window."""
        side = (
            self.window // self.processor.merge_size // self.processor.patch_size * self.processor.merge_size
        )
        return side**2


def read_vision(
    hf: Mapping[str, Json], family: str, width: int, processor: ImageProcessor, where: str
) -> VisionConfig:
    """Read the tower from a `config.json`.

    Args:
      hf: the parsed file.
      family: its `model_type`, one of `VISION_FAMILIES`.
      width: D of the decoder.
      processor: of the same directory.
      where: the name of the file, for messages.

    Raises:
      UserError: a field is missing or of a wrong type, or the file and the processor disagree.
    """
    values = hf.get("vision_config")
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: vision_config is missing; is this the config of a vision model?")
    fields = Fields(values, {}, f"{where}: vision_config")
    tokens = Fields(hf, {}, where)
    if (act := values.get("hidden_act", _ACTIVATIONS[family])) != _ACTIVATIONS[family]:
        raise UserError(
            f"{where}: vision_config.hidden_act {act!r} is not supported; only {_ACTIVATIONS[family]} is"
        )
    own = {
        "out_hidden_size": width,
        "patch_size": processor.patch_size,
        "spatial_merge_size": processor.merge_size,
        "temporal_patch_size": processor.temporal_patch_size,
    }
    for key, expected in own.items():
        if (value := fields.integer(key)) != expected:
            other = "hidden_size of the decoder" if key == "out_hidden_size" else "the image processor's"
            raise UserError(
                f"{where}: vision_config.{key} = {value}, but {other} is {expected}; get the files again"
            )
    if values.get("in_channels", values.get("in_chans", 3)) != 3:
        raise UserError(f"{where}: vision_config: only images of 3 colours are supported")
    config = VisionConfig(
        depth=fields.integer("depth"),
        width=fields.integer("hidden_size"),
        num_heads=fields.integer("num_heads"),
        ffn_width=fields.integer("intermediate_size"),
        image_token=_token(tokens, "image_token_id"),
        video_token=_token(tokens, "video_token_id"),
        start_token=_token(tokens, "vision_start_token_id"),
        end_token=_token(tokens, "vision_end_token_id"),
        processor=processor,
        **_switches(fields, family),
    )
    if config.width % config.num_heads or config.head_width % 4:
        raise UserError(
            f"{where}: vision_config: hidden_size / num_heads = {config.width} / {config.num_heads} must be a multiple "
            "of 4 for rotary embeddings of rows and columns"
        )
    return config


def _switches(fields: Fields, family: str) -> dict[str, Json]:
    def layers(key: str) -> tuple[int, ...]:
        found = fields.get(key)
        if not isinstance(found, list | tuple) or not all(
            type(layer) is int and 0 <= layer < fields.integer("depth") for layer in found
        ):
            raise UserError(f"{fields.where}: {key} must list layers of the tower, got {found!r}")
        return tuple(found)

    if family == "qwen2_5_vl":
        return {"window": fields.integer("window_size"), "full_layers": layers("fullatt_block_indexes")}
    positions = fields.integer("num_position_embeddings")
    if int(positions**0.5) ** 2 != positions:
        raise UserError(f"{fields.where}: num_position_embeddings = {positions} is not a square number")
    deepstack = layers("deepstack_visual_indexes")
    if list(deepstack) != sorted(set(deepstack)):
        raise UserError(f"{fields.where}: deepstack_visual_indexes must ascend, got {list(deepstack)}")
    return {"num_positions": positions, "deepstack": deepstack}


def _token(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise UserError(f"{fields.where}: {name} must be the id of a token, got {value!r}")
    return value


def vision_to_hf(config: VisionConfig, family: str, width: int) -> dict[str, Json]:
    """Return the fields of the tower in a `config.json`; `read_vision` restores the config from them.

    Args:
      width: D of the decoder.
    """
    vision: dict[str, Json] = {
        "model_type": f"{family}_vision" if family == "qwen3_vl" else family,
        "depth": config.depth,
        "hidden_size": config.width,
        "num_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "out_hidden_size": width,
        "hidden_act": _ACTIVATIONS[family],
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": config.processor.patch_size,
        "spatial_merge_size": config.processor.merge_size,
        "temporal_patch_size": config.processor.temporal_patch_size,
    }
    if family == "qwen2_5_vl":
        vision |= {"window_size": config.window, "fullatt_block_indexes": list(config.full_layers)}
    else:
        vision["num_position_embeddings"] = config.num_positions
        vision["deepstack_visual_indexes"] = list(config.deepstack)
    return {
        "vision_config": vision,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.start_token,
        "vision_end_token_id": config.end_token,
    }
