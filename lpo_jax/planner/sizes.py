"""The parameters of a model by their role, and the arithmetic of a vision tower."""

import dataclasses
import math

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import VISION, declared

# Forward passes of a trained tower in an update: one before the microbatches and, after them, those of its two nested
# rematerialisations; the backward pass counts as two more.
TRAINED_PASSES = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The number of parameters of a model by their role."""

    layers: int  # matrices of all layers of the decoder
    head: int  # the output matrix
    embed: int  # the input table where it is not the output matrix
    other: int  # norms and biases of the decoder
    tower: int  # all parameters of the vision tower

    @classmethod
    def of(cls, m: ModelConfig) -> "Sizes":
        found = {"matrix": 0, "embedding": 0, "norm": 0, "bias": 0, "tower": 0}
        for parameter in declared(m):
            role = "tower" if parameter.branch[:1] == VISION else parameter.kind
            found[role] += math.prod(parameter.shape(m))
        head = m.vocab_size * m.width
        other = found["norm"] + found["bias"]
        return cls(found["matrix"], head, found["embedding"] - head, other, found["tower"])

    @property
    def decoder(self) -> int:
        """All parameters but those of the tower."""
        return self.layers + self.head + self.embed + self.other

    @property
    def total(self) -> int:
        return self.decoder + self.tower


@dataclasses.dataclass(frozen=True)
class TowerWork:
    """The work of a forward pass of the vision tower over one image.

    Attributes:
      tokens: of the image.
      patches: of the image.
      flops: of matrix products and attention.
      width: numbers per patch that a layer computes besides the scores of attention.
      outputs: numbers that the decoder receives, with DeepStack features.
    """

    tokens: int
    patches: int
    flops: float
    width: int
    outputs: int

    @classmethod
    def of(cls, m: ModelConfig, tokens: int) -> "TowerWork":
        """Return the work of an image of so many tokens, of a vision model."""
        vision, merge = m.vision, m.vision.processor.merge_size**2
        patches = merge * tokens
        matrices = {"patch": 0, "token": 0}
        for p in declared(m):
            if p.branch[:1] == VISION and p.kind == "matrix":
                of_patches = p.name == "v_patch" or "layers" in p.branch
                # An image is the same in all frames of a patch.
                frames = vision.processor.temporal_patch_size if p.name == "v_patch" else 1
                matrices["patch" if of_patches else "token"] += math.prod(p.shape(m)) // frames
        full = len(vision.full_layers) if vision.window else vision.depth
        keys = full * patches + (vision.depth - full) * vision.window_patches
        flops = 2.0 * (matrices["patch"] * patches + matrices["token"] * tokens)
        flops += 4.0 * vision.width * keys * patches
        width = 6 * vision.width + 3 * vision.ffn_width
        return cls(tokens, patches, flops, width, (1 + len(vision.deepstack)) * tokens * m.width)
