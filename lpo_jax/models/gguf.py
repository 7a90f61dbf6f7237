"""Reading GGUF files: the metadata, and the weights, which are dequantised tensor by tensor.

The header is parsed here, because the reader of the `gguf` package takes seconds for the 100,000 strings of a
vocabulary. The package is used for dequantisation.

Supported are versions 2 and 3, little-endian, and the architectures llama (SmolLM2, Llama, Mistral), qwen2 and qwen3.
"""

import dataclasses
import math
import re
import struct
from pathlib import Path

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models import tensors
from lpo_jax.models.config import FAMILY_SWITCHES, ModelConfig, RopeScaling
from lpo_jax.models.decoder import Params
from lpo_jax.models.parameters import Parameter, named
from lpo_jax.types import Json, Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# A GGUF file contains one or two end tokens; these are the others of the families' generation_config.json.
_END_TOKENS = {
    "llama": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "qwen2": ("<|im_end|>", "<|endoftext|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # of a string, before its bytes
_DEQUANTISED = 1 << 18  # values that are dequantised at once, so that all temporaries stay in the CPU cache


@dataclasses.dataclass(frozen=True)
class _Stored:
    file: Path  # the file with the tensor, which may be a part of a split model
    kind: int  # ggml's number for the quantisation
    shape: tuple[int, ...]  # rows first
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open GGUF file, or all parts of a split one. The metadata is in memory; tensors are read on demand."""

    path: Path
    metadata: dict[str, Json]
    stored: dict[str, _Stored]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the headers of the file and, if it is the first part of a split model, of the other parts.

        Raises:
          UserError: the file is not a GGUF file, is cut short or has an unknown version or architecture, or a part is
            missing.
        """
        file = cls(path, *_read_file(path))
        _add_parts(path, file.metadata, file.stored)
        if (family := file.metadata.get("general.architecture")) not in ARCHITECTURES:
            have = ", ".join(ARCHITECTURES)
            raise UserError(f"{path}: architecture {family!r} is not supported; have {have}")
        return file

    @property
    def config(self) -> ModelConfig:
        """The model's config, from the metadata. The vocabulary's size and tied embeddings follow from the tensors."""
        family = self.metadata["general.architecture"]

        def get(key, default=None):
            value = self.metadata.get(f"{family}.{key}", default)
            if value is None:
                raise UserError(f"{self.path}: {family}.{key} is missing from the metadata")
            if isinstance(value, list):  # one number per layer
                if len(set(value)) != 1:
                    raise UserError(f"{self.path}: {family}.{key} differs between layers; not supported")
                value = value[0]
            # The float32 value of 0.00001 is 9.99999975e-06 in float64; the shortest decimal is what was meant.
            return float(str(np.float32(value))) if isinstance(value, float) else value

        heads, width = get("attention.head_count"), get("embedding_length")
        head_width = get("attention.key_length", width // heads)
        for key, expected in (
            ("attention.value_length", head_width),
            ("rope.dimension_count", head_width),
            ("expert_count", 0),
        ):
            if (value := get(key, expected)) != expected:
                raise UserError(f"{self.path}: {family}.{key} = {value} is not supported, only {expected}")
        window = get("attention.sliding_window", 0)
        if window and family != "llama":
            raise UserError(f"{self.path}: {family} with a sliding window is not supported")
        embedding, head = named("embed").gguf, named("unembed").gguf
        if embedding not in self.stored:
            raise UserError(f"{self.path}: tensor {embedding} is missing; is this a whole model?")
        return ModelConfig(
            family="mistral" if window else family,
            vocab_size=self.stored[embedding].shape[0],
            width=width,
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_width=head_width,
            ffn_width=get("feed_forward_length"),
            max_positions=get("context_length"),
            rope_theta=float(get("rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(get),
            norm_eps=get("attention.layer_norm_rms_epsilon"),
            tie_embeddings=head not in self.stored,
            sliding_window=window or None,
            **FAMILY_SWITCHES.get(family, {}),
        )

    def tokenizer(self) -> Tokenizer:
        from lpo_jax.models import tokenizer

        return tokenizer.from_gguf(self.metadata, str(self.path))

    def eos_ids(self) -> tuple[int, ...]:
        """Return the end-token ids in the file, then the others of its family that are in its vocabulary."""
        named = (self.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        tokens = tokens[: self.config.vocab_size]
        family = (tokens.index(t) for t in _END_TOKENS[self.metadata["general.architecture"]] if t in tokens)
        return tuple(dict.fromkeys(i for i in (*named, *family) if i is not None))

    def params(self, dtype: str = "float32", shardings: Params | None = None) -> Params:
        """Read the parameter tree; arguments as in `tensors.read_params`.

        Raises:
          UserError: a tensor is missing or unexpected, or has a wrong shape or an unsupported quantisation.
        """
        config = self.config
        found = {name: t.shape for name, t in self.stored.items() if name != "rope_freqs.weight"}
        tensors.check_names(str(self.path), tensors.file_names(config, "gguf"), found)
        interleaved = self.metadata["general.architecture"] == "llama"

        def read(parameter: Parameter, layer: int, index: tensors.Index) -> np.ndarray:
            x = self.read(parameter.gguf.format(layer))
            if interleaved and parameter.rotated:
                # llama.cpp rotates neighbouring rows, which alternate between the two halves of a head.
                x = x.reshape(-1, config.head_width // 2, 2, config.width).swapaxes(1, 2)
            return x.reshape(tensors.file_shape(config, parameter))[index]

        return tensors.read_params(config, read, dtype, shardings)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, dequantised to float32, rows first."""
        import gguf

        stored = self.stored[name]
        kind = gguf.GGMLQuantizationType(stored.kind)
        data = np.asarray(np.memmap(stored.file, np.uint8, "r", offset=stored.start, shape=(stored.size,)))
        block, block_size = gguf.GGML_QUANT_SIZES[kind]
        step = max(_DEQUANTISED // block, 1)
        values = np.empty((stored.size // block_size, block), np.float32)
        try:
            # Given a matrix, the package takes 16 rows at a time; most of the time is then spent between its calls.
            for start in range(0, len(values), step):
                blocks = data[start * block_size : (start + step) * block_size]
                values[start : start + step] = gguf.quants.dequantize(blocks, kind).reshape(-1, block)
            return values.reshape(stored.shape)
        except NotImplementedError:
            raise UserError(f"{self.path}: {name} is stored as {kind.name}; it cannot be read") from None

    def _rope_scaling(self, get) -> RopeScaling | None:
        kind = get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise UserError(f"{self.path}: rope scaling {kind!r} is not supported; have none, linear, llama3")
        if "rope_freqs.weight" in self.stored:
            return self._llama3_scaling(self.read("rope_freqs.weight"), float(get("rope.freq_base", 10000.0)))
        factor = float(get("rope.scaling.factor", 0.0))
        return RopeScaling("linear", factor) if kind == "linear" and factor else None

    def _llama3_scaling(self, divisors: np.ndarray, theta: float) -> RopeScaling | None:
        """Recover Llama 3's rescaling from the N/2 divisors of the frequencies in the file."""
        if np.all(divisors == 1):
            return None
        s = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)  # as in every Llama 3.1 to 3.3
        wavelength = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
        smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        smooth = np.clip(smooth, 0, 1)
        if not np.allclose(divisors, 1 / ((1 - smooth) / s.factor + smooth), rtol=1e-4):
            raise UserError(f"{self.path}: rope_freqs.weight is not Llama 3's rescaling; not supported")
        return s


def _read_file(path: Path) -> tuple[dict[str, Json], dict[str, _Stored]]:
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return _read_header(path, memoryview(data))  # type: ignore[arg-type]


def _add_parts(path: Path, metadata: dict[str, Json], stored: dict[str, _Stored]) -> None:
    """Add the tensors of the other parts of a model that llama.cpp has split."""
    count = metadata.get("split.count", 0)
    if count <= 1:
        return
    name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if metadata.get("split.no", 0) != 0 or not name or int(name[2]) != count:
        raise UserError(
            f"{path}: is part {metadata.get('split.no', 0) + 1} of {count} of a split model; name its first part, "
            f"...-00001-of-{count:05}.gguf, with all the others beside it"
        )
    for number in range(1, count):
        part = path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part.exists():
            raise UserError(f"{path}: part {number + 1} of {count}, {part.name}, is missing; download it")
        about, more = _read_file(part)
        if (about.get("split.no"), about.get("split.count")) != (number, count):
            raise UserError(f"{part}: is not part {number + 1} of {count} of {path.name}; download it again")
        if twice := [tensor for tensor in more if tensor in stored]:
            raise UserError(f"{part}: tensor {twice[0]} is in another part too; download the model again")
        stored.update(more)
    if len(stored) != (expected := metadata.get("split.tensors.count", len(stored))):
        raise UserError(
            f"{path}: its {count} parts hold {len(stored)} of {expected} tensors; download them again"
        )


def _read_header(path: Path, data: memoryview) -> tuple[dict[str, Json], dict[str, _Stored]]:
    at = 0
    cut = UserError(f"{path}: the GGUF file is cut short; download it again")

    def take(form: str):
        nonlocal at
        at += (size := struct.calcsize(form))
        if at > len(data):
            raise cut
        return struct.unpack_from(form, data, at - size)

    def text() -> str:
        nonlocal at
        start = at + _LENGTH.size
        if start > len(data):
            raise cut
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise cut
        return str(data[start:at], "utf-8", "replace")

    def value(kind: int):
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            item, count = take("<IQ")
            if count > len(data):
                raise cut
            if item in _SCALARS:
                return list(take(f"<{count}{_SCALARS[item]}"))
            return [value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise UserError(f"{path}: unknown kind of metadata {kind}; the GGUF file is damaged")
        return take("<" + _SCALARS[kind])[0]

    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file")
    _, version, num_tensors, num_values = take("<4sIQQ")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not supported; have 2 and 3, little-endian")
    metadata = {}
    for _ in range(num_values):
        key = text()
        metadata[key] = value(take("<I")[0])
    infos = []
    for _ in range(num_tensors):
        name = text()
        (rank,) = take("<I")
        infos.append((name, take(f"<{rank}Q")[::-1], *take("<IQ")))
    align = metadata.get("general.alignment", 32)
    stored = _locate_tensors(path, infos, math.ceil(at / align) * align)
    if any(tensor.start + tensor.size > len(data) for tensor in stored.values()):
        raise cut
    return metadata, stored


def _locate_tensors(
    path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], base: int
) -> dict[str, _Stored]:
    """The position of every tensor in the file, from `(name, shape, kind, offset after base)` of each."""
    import gguf

    stored: dict[str, _Stored] = {}
    for name, shape, kind, offset in infos:
        if kind not in gguf.GGML_QUANT_SIZES:
            raise UserError(f"{path}: {name} is quantised in an unknown way ({kind}); update gguf")
        if name in stored:
            raise UserError(f"{path}: holds tensor {name} twice; download it again")
        block, block_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        stored[name] = _Stored(path, kind, shape, base + offset, math.prod(shape) // block * block_size)
    return stored
