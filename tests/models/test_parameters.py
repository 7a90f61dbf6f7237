"""A parameter is declared once, and the rest is derived: a norm, a matrix and an attention switch are added here.

The additions stand in for edits of two files each: the declaration in `models/parameters.py` (the switch: a field in
`models/config.py`), and the use in `models/decoder.py`.
"""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from lpo_jax.config import OptimizerConfig
from lpo_jax.models import decoder, lora, parameters, tensors
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import Parameter
from lpo_jax.models.placement import param_shardings
from lpo_jax.models.quantize import quantise_layer
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.parallel.mesh import MeshSizes, build_mesh
from lpo_jax.planner.setting import Sizes
from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest
from lpo_jax.training.memory import kept_bytes
from lpo_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    query_scale: float = 1.0


def _layer(name, kind, dims, stem):
    hf, gguf = f"model.layers.{{}}.{stem}.weight", f"blk.{{}}.{stem}.weight"
    return Parameter(name, kind, dims, hf, gguf, present=lambda config: isinstance(config, Config))


ADDED = (_layer("extra_norm", "norm", "D", "extra_norm"), _layer("w_extra", "matrix", "D->HN", "extra"))


class Block(decoder.Block):
    """A block with scaled queries and a second output projection, of a normed and projected residual stream."""

    def __call__(self, x, rope, context, kv=None):
        def scaled(config, q, *rest):
            return context(config, config.query_scale * q, *rest)

        x, kv = super().__call__(x, rope, scaled, kv)
        extra = self._product("rd,dhn->rhn", self._norm(x, "extra_norm"), "w_extra")
        return x + self._product("rhn,hnd->rd", extra, "wo"), kv


@pytest.fixture
def extended(monkeypatch, tiny_config):
    monkeypatch.setattr(parameters, "DECLARATIONS", (*parameters.DECLARATIONS, *ADDED))
    monkeypatch.setattr(decoder, "Block", Block)
    config = Config(**vars(tiny_config), query_scale=3.0)
    return config, jax.tree.map(lambda p: 3 * p, decoder.init_params(config, jax.random.key(0)))


@pytest.mark.slow
def test_training_and_sampling_use_the_additions(extended):
    """All three attention contexts apply the switch: the sampler and the trainer give the same log-probs."""
    config, params = extended
    prompts, lengths = np.array([[5, 6, 7, 8], [9, 4, 0, 0]], np.int32), np.array([4, 2])
    sampler = Sampler(config, eos_ids=(1,))
    batch = PromptBatch(prompts, lengths, np.arange(2, dtype=np.uint32))
    got = sampler(sampler.prepare(params), batch, SampleRequest(3, max_tokens=6))
    logp = {}
    for scale in (3.0, 1.0):
        runner = ModelRunner(dataclasses.replace(config, query_scale=scale))
        logp[scale] = score(runner, params, Groups(prompts, lengths, got.tokens)).logp
    np.testing.assert_allclose(np.where(got.mask, logp[3.0], 0), got.log_probs, atol=1e-4)
    assert np.abs(np.where(got.mask, logp[1.0] - logp[3.0], 0)).max() > 1e-2
    gradient = jax.jit(jax.grad(lambda p: decoder.logits(config, p, prompts).std()))(params)
    assert all(np.abs(gradient["layers"][p.name]).max() > 0 for p in ADDED)


def test_weight_decay_lora_and_int8_know_the_additions(extended):
    pytest.importorskip("qwix")
    config, params = extended
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 7)
    zero = jax.tree.map(np.zeros_like, params)
    moved, _, _ = optimizer.apply(zero, optimizer.init(params), params)
    chex.assert_trees_all_close(moved["layers"]["w_extra"], 0.5 * params["layers"]["w_extra"])
    chex.assert_trees_all_equal(moved["layers"]["extra_norm"], params["layers"]["extra_norm"])

    adapters = lora.Lora(rank=3, alpha=6.0)
    adapters.check(config)
    shapes = jax.tree.map(lambda x: x.shape, lora.abstract_params(config, adapters))["layers"]["w_extra"]
    assert shapes == {"a": (2, 32, 3), "b": (2, 3, 4, 8)}

    layer = quantise_layer(jax.tree.map(lambda x: x[0], params["layers"]))
    assert layer["w_extra"].array.scale.shape == (1, 4, 8) and layer["extra_norm"].shape == (32,)


def test_files_placement_and_estimates_know_the_additions(extended, tiny_config):
    config, params = extended
    files = {name: fetch() for name, _, _, fetch in tensors.file_tensors(config, params, None)}
    assert {name: x.shape for name, x in files.items()} == tensors.file_names(config, "hf")
    assert files["model.layers.1.extra.weight"].shape == (32, 32)
    read = lambda parameter, layer, index: files[parameter.hf.format(layer)][index]  # noqa: E731
    chex.assert_trees_all_equal(tensors.read_params(config, read), params)

    placed = param_shardings(config, build_mesh(MeshSizes(2, 2, 2)))["layers"]
    assert placed["w_extra"].shard_shape((2, 32, 4, 8)) == (2, 16, 2, 8)
    assert placed["extra_norm"].shard_shape((2, 32)) == (2, 16)

    assert Sizes.of(config).total == sum(x.size for x in jax.tree.leaves(params))
    before, after = vars(Sizes.of(tiny_config)), vars(Sizes.of(config))
    more = {key: after[key] - before[key] for key in before}
    assert more == {"layers": 2 * 32 * 32, "head": 0, "embed": 0, "other": 2 * 32, "tower": 0}
    assert kept_bytes(config, 10, "float32") - kept_bytes(tiny_config, 10, "float32") == 2 * 10 * 32 * 4
