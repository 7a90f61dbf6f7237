"""Files are read directly into sharded arrays, and a process reads only the parts of its own devices."""

import jax
import numpy as np
import pytest

from lpo_jax.models import decoder, parameters, tensors
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.placement import param_shardings
from lpo_jax.parallel.mesh import MeshSizes, build_mesh

CONFIG = ModelConfig("qwen2", 48, 16, 3, 4, 2, 8, 24, 64, qkv_bias=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from lpo_jax.models.hf import save_hf

    params = decoder.init_params(CONFIG, jax.random.key(1))
    params = jax.tree.map(lambda p: p + np.arange(p.size, dtype=np.float32).reshape(p.shape) / p.size, params)
    path = tmp_path_factory.mktemp("sharded") / "model"
    save_hf(path, CONFIG, params)
    return path, params


class Reader:
    """Stands in for the files of a model: returns parts and counts their bytes."""

    def __init__(self, params):
        self.files = {name: fetch() for name, _, _, fetch in tensors.file_tensors(CONFIG, params, None)}
        self.bytes = 0

    def __call__(self, parameter, layer, index):
        part = self.files[parameter.hf.format(layer)][index]
        self.bytes += part.nbytes
        return part


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_every_part_is_read_once(saved, shape):
    params = saved[1]
    shardings = param_shardings(CONFIG, build_mesh(MeshSizes(*shape)))
    reader = Reader(params)
    loaded = tensors.read_params(CONFIG, reader, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda p: p.sharding, loaded) == shardings
    assert reader.bytes == sum(p.nbytes for p in jax.tree.leaves(params))


def test_a_host_reads_only_what_its_devices_get(saved, monkeypatch):
    """One of two hosts with four devices each: the parts of four of the eight devices are requested."""
    params = saved[1]
    shardings = param_shardings(CONFIG, build_mesh(MeshSizes(1, 8, 1)))
    mine = jax.devices()[:4]

    def of_this_host(shape, sharding, part):
        places = sharding.addressable_devices_indices_map(shape)
        return [part(places[device]) for device in mine]

    monkeypatch.setattr(jax, "make_array_from_callback", of_this_host)
    reader = Reader(params)
    tensors.read_params(CONFIG, reader, shardings=shardings)
    expected = sum(
        p.nbytes // (1 if s.is_fully_replicated else 2)
        for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings))
    )
    assert reader.bytes == expected < 0.52 * sum(p.nbytes for p in jax.tree.leaves(params))


def test_an_axis_folded_behind_another_is_cut_after_reading(saved):
    """Heads are rows of a file; a part of a head is read with the whole head."""
    wq = parameters.named("wq")
    whole = np.asarray(saved[1]["layers"]["wq"][1])
    reader = Reader(saved[1])
    index = (slice(4, 8), slice(1, 3), slice(2, 5))
    part = tensors.from_file(CONFIG, wq, lambda rows: reader(wq, 1, rows), index)
    np.testing.assert_array_equal(part, whole[index])
    assert reader.bytes == 2 * CONFIG.head_width * 4 * 4  # two heads of eight rows, four columns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_model_with_shardings(saved, dtype):
    shardings = param_shardings(CONFIG, build_mesh(MeshSizes(2, 2, 2)))
    whole, split = load_model_weights(saved[0], dtype), load_model_weights(saved[0], dtype, shardings)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert split["layers"]["wq"].addressable_shards[0].data.shape == (3, 8, 2, 8)


def load_model_weights(path, dtype, shardings=None):
    from lpo_jax.models.hf import HfDirectory

    return HfDirectory.open(path).params(dtype, shardings)
