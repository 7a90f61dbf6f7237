"""Reading and writing Hugging Face model directories: safetensors, configs and tokenizer files."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpo_jax import images
from lpo_jax.errors import UserError
from lpo_jax.images import ImageProcessor
from lpo_jax.models import tensors
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.parameters import Parameter, named
from lpo_jax.types import Json, Tokenizer

SHARD_BYTES = 5_000_000_000
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD = named("unembed").hf  # of all families
# Rotary frequencies, which old versions of transformers saved. They follow from the config and are ignored, as newer
# versions do.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_COMPARED = 1 << 24  # values of the head and the embedding that are compared at once
_FLOATS = ("F32", "BF16", "F16")
_SAFETENSORS_NAME = {"float32": "F32", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class HfDirectory:
    """A local directory with `config.json` and, to read parameters, `*.safetensors`."""

    path: Path
    config: ModelConfig

    @classmethod
    def open(cls, path: Path, weights: bool = True) -> "HfDirectory":
        """Read the config, and check whether the weights contain a separate output head.

        Args:
          path: the directory.
          weights: False relies on `tie_word_embeddings` alone, as does a directory without all of its weights.

        Raises:
          UserError: a file cannot be read, or the model is not supported.
        """
        where = path / "config.json"
        values = _read_json(where)
        processor = ImageProcessor.from_directory(path) if "vision_config" in values else None
        config = ModelConfig.from_hf(values, str(where), processor)
        embedding = named("embed").hf_name(config, 0)
        if weights and config.tie_embeddings and _has_own_head(path, embedding):
            warnings.warn(
                f"{path}: tie_word_embeddings is true, but {_HEAD} differs from {embedding}; both are used",
                stacklevel=2,
            )
            config = dataclasses.replace(config, tie_embeddings=False)
        return cls(path, config)

    def tokenizer(self) -> Tokenizer | None:
        from lpo_jax.models import tokenizer

        return tokenizer.from_directory(self.path)

    def eos_ids(self) -> list[int | str]:
        """Return the end tokens of generation_config.json and config.json, in that order, as ids or texts."""
        ids = []
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).exists():
                eos = _read_json(self.path / name).get("eos_token_id")
                ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        return ids

    def params(self, dtype: str = "float32", shardings: Params | None = None) -> Params:
        """Read the parameter tree; arguments as in `tensors.read_params`.

        Raises:
          UserError: there are no weights, a file is damaged, or a tensor is missing, unexpected or of a wrong shape.
        """
        with contextlib.ExitStack() as stack:
            files = _open_weights(self.path, stack)
            expected = tensors.file_names(self.config, "hf")
            spare = {name for name in files if _ROTARY_BUFFER.fullmatch(name)}
            spare |= {_HEAD} if self.config.tie_embeddings else set()  # equal to the embedding, see `open`
            found = {}
            for name in files.keys() - spare:
                view = files[name].get_slice(name)
                found[name] = tuple(view.get_shape())
                if (stored := view.get_dtype()) not in _FLOATS:
                    have = ", ".join(_FLOATS)
                    raise UserError(f"{self.path}: {name} is stored as {stored}; only {have} are read")
            tensors.check_names(str(self.path), expected, found)

            def read(parameter: Parameter, layer: int, index: tensors.Index) -> np.ndarray:
                name = parameter.hf_name(self.config, layer)
                return files[name].get_slice(name)[index]

            return tensors.read_params(self.config, read, dtype, shardings)


def _weight_paths(path: Path) -> list[Path]:
    """Return the safetensors files of a directory in transformers' order of precedence: one file before shards."""
    single, index = path / _WEIGHTS, path / _INDEX
    if single.exists():
        if index.exists():
            warnings.warn(
                f"{path}: {_WEIGHTS} is read, as transformers does, and {_INDEX} is not; remove the one that is old",
                stacklevel=2,
            )
        return [single]
    if not index.exists():
        return []
    weight_map = _read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: weight_map names no files of this directory; download the index again")
    return [path / name for name in sorted(names)]


def _open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Json]:
    """Open all weights; return the file of each tensor by the tensor's name."""
    from safetensors import SafetensorError, safe_open

    paths = _weight_paths(path)
    if not paths:
        hint = "download them, or train from --model.init=random"
        if any(path.glob("*.safetensors")):
            hint = f"its .safetensors files need {_INDEX}; download that too"
        elif any(path.glob("*.bin")):
            hint = "convert its .bin files"
        raise UserError(f"{path}: no weights ({_WEIGHTS} or its index); {hint}")
    files: dict[str, Json] = {}
    origin: dict[str, str] = {}
    for part in paths:
        if not part.exists():
            raise UserError(f"{part}: the index names this file, but it is missing; download it again")
        try:
            file = stack.enter_context(safe_open(part, "numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{part}: not a whole safetensors file ({error}); get it again") from None
        names = file.keys()
        for name in names:
            if name in files:
                raise UserError(
                    f"{path}: tensor {name} is in {origin[name]} and in {part.name}; download the model again"
                )
            files[name], origin[name] = file, part.name
    return files


def _has_own_head(path: Path, embedding_name: str) -> bool:
    """Return whether the weights contain a head that differs from the embedding; False if weights are missing."""
    paths = _weight_paths(path)
    if not paths or not all(part.exists() for part in paths):
        return False
    with contextlib.ExitStack() as stack:
        files = _open_weights(path, stack)
        if _HEAD not in files or embedding_name not in files:
            return False
        head, embedding = (files[name].get_slice(name) for name in (_HEAD, embedding_name))
        shape = tuple(head.get_shape())
        if shape != tuple(embedding.get_shape()):
            return True
        rows = max(1, _COMPARED // math.prod(shape[1:]))
        blocks = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
        same = (np.array_equal(*(x[block].astype(np.float32) for x in (head, embedding))) for block in blocks)
        return not all(same)


def save_hf(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    *,
    eos_ids: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that transformers, vLLM and `load_model` can read.

    The write is atomic: files are written to a temporary directory beside `path`, which is renamed at the end. Host
    memory is needed for one tensor at a time.

    Args:
      path: the directory; it must not exist or must be empty.
      config: the model's config.
      params: the parameters, layers stacked.
      tokenizer: a transformers tokenizer, or None to write none.
      dtype: "float32" or "bfloat16"; None keeps the dtype of the parameters.
      eos_ids: every id that ends a response; if empty, the tokenizer's.
      shard_bytes: the largest size of a file.

    Raises:
      UserError: `path` exists or cannot be written, or the dtype is unknown.
    """
    path = Path(path).expanduser().absolute()
    if dtype is not None and dtype not in tensors.DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(tensors.DTYPES)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty directory; name another place or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None
    try:
        saved = _write_weights(beside, config, params, tensors.DTYPES.get(dtype), shard_bytes)
        write_configs(beside, config, saved, tokenizer, eos_ids)
        if tokenizer is not None:
            from lpo_jax.models.tokenizer import save_tokenizer

            save_tokenizer(tokenizer, beside)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # mkdtemp's directory is private
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write_weights(
    path: Path, config: ModelConfig, params: Params, dtype: np.dtype | None, limit: int
) -> str:
    """Write safetensors files of at most `limit` bytes each, tensor by tensor; return the name of the dtype."""
    shards: list[list] = [[]]
    used = total = 0
    for item in tensors.file_tensors(config, params, dtype):
        size = math.prod(item[1]) * item[2].itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += size
        total += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        part = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"model{part}.safetensors"
        _write_shard(path / name, shard)
        weight_map |= {item[0]: name for item in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / "model.safetensors.index.json", index)
    return shards[0][0][2].name


def _write_shard(path: Path, shard: list) -> None:
    # The library's writer needs the whole shard in memory. The format is a JSON header followed by the bytes.
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in shard:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAME[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, fetch in shard:
            file.write(fetch().reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_configs(
    path: Path, config: ModelConfig, dtype: str, tokenizer: Tokenizer | None, eos_ids: Sequence[int] = ()
) -> None:
    """Write config.json and generation_config.json; arguments as in `save_hf`."""
    from importlib.metadata import version

    special = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if eos_ids:
        special["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    common = {k: v for k, v in special.items() if v is not None}
    common["transformers_version"] = version("transformers")
    dtypes = {"torch_dtype": dtype, "dtype": dtype}  # v4's key and v5's
    _write_json(path / "config.json", config.to_hf() | dtypes | common)
    _write_json(path / "generation_config.json", common)
    if config.vision is not None:
        _write_json(path / images.FILE, config.vision.processor.to_json())


def _read_json(path: Path) -> dict[str, Json]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a Hugging Face model directory?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Json]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
