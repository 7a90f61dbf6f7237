"""Hugging Face directories: read, written and read again; and errors in a directory."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_params

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models import ModelConfig, load_config_and_tokenizer
from lpo_jax.models.decoder import abstract_params
from lpo_jax.models.hf import save_hf

TEXT_FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "mistral"]
FAMILIES = [*TEXT_FAMILIES, "qwen2_5_vl", "qwen3_vl"]
WEIGHTS = "model.safetensors"


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_out_in_is_bitwise(name, golden, tmp_path):
    first = load_model(golden / name)
    first.save(tmp_path / "out")
    second = load_model(tmp_path / "out")
    assert second.config == first.config
    assert second.eos_ids == first.eos_ids
    assert_same_bits(first.params, second.params)
    stored, written = load_file(golden / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert stored.keys() == written.keys()
    for key, x in stored.items():
        np.testing.assert_array_equal(x.astype(np.float32), written[key], key)


@pytest.mark.parametrize("name", FAMILIES)
def test_tree_is_the_decoder_s(name, golden):
    model = load_model(golden / name, dtype="bfloat16")
    expected = abstract_params(model.config, jnp.bfloat16)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    shapes = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), model.params, expected)
    assert all(jax.tree.leaves(shapes))


def test_bfloat16_file_is_written_back_bit_by_bit(golden, tmp_path):
    stored = load_file(golden / "mistral" / WEIGHTS)
    assert stored["model.norm.weight"].dtype == ml_dtypes.bfloat16
    for dtype in ("float32", "bfloat16"):  # the way through float32 loses nothing
        load_model(golden / "mistral", dtype).save(tmp_path / dtype, dtype="bfloat16")
        written = load_file(tmp_path / dtype / WEIGHTS)
        assert all(written[key].tobytes() == x.tobytes() for key, x in stored.items())
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_float16_file_loads(llama, golden, deviation):
    half = {key: x.astype(np.float16) for key, x in load_file(llama / WEIGHTS).items()}
    save_file(half, llama / WEIGHTS)
    model = load_model(llama)
    assert model.params["embed"].dtype == jnp.float32
    np.testing.assert_array_equal(model.params["embed"], half["model.embed_tokens.weight"].astype(np.float32))
    assert 0 < deviation(model, "llama") < 0.1


def test_shards(golden, tmp_path):
    model = load_model(golden / "llama")
    out = tmp_path / "out"
    save_hf(out, model.config, model.params, eos_ids=model.eos_ids, shard_bytes=20_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert set(index["weight_map"].values()) == set(shards)
    assert all(load_file(out / file).keys() >= {name} for name, file in index["weight_map"].items())
    assert_same_bits(load_model(out).params, model.params)
    (out / shards[1]).unlink()
    with pytest.raises(UserError, match=f"{shards[1]}.*missing"):
        load_model(out)


def test_tied_model_whose_file_also_holds_the_head(golden, tmp_path):
    load_model(golden / "qwen3").save(tmp_path / "out")
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, tmp_path / "out" / WEIGHTS)
    assert_same_bits(load_model(tmp_path / "out").params, load_model(golden / "qwen3").params)


def test_a_head_that_differs_is_used_whatever_the_config_says(golden, tmp_path):
    model = load_model(golden / "llama")
    model.save(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings is true, but lm_head.weight differs"):
        again = load_model(tmp_path / "out")
    assert again.config == model.config and not again.config.tie_embeddings
    assert_same_bits(again.params, model.params)
    with pytest.warns(UserWarning, match="differs"):  # what sizes a run is what is loaded
        assert load_config_and_tokenizer(tmp_path / "out")[0] == model.config
    again.save(tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"] is False
    # Without its weights a directory is what its config says.
    (tmp_path / "out" / WEIGHTS).unlink()
    assert load_config_and_tokenizer(tmp_path / "out")[0].tie_embeddings


def test_one_file_goes_before_an_index_as_in_transformers(llama, tmp_path):
    model = load_model(llama)
    other = jax.tree.map(lambda p: p + 1, model.params)
    save_hf(tmp_path / "old", model.config, other, shard_bytes=20_000)
    for path in (tmp_path / "old").glob("model*"):
        path.rename(llama / path.name)
    with pytest.warns(UserWarning, match="model.safetensors is read, as transformers does"):
        assert_same_bits(load_model(llama).params, model.params)


def test_an_index_that_is_broken_or_missing(llama, tmp_path):
    model = load_model(llama)
    save_hf(tmp_path / "out", model.config, model.params, shard_bytes=20_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    twice = load_file(shards[1]) | {NORM: np.zeros(32, np.float32)}
    save_file(twice, shards[1])
    with pytest.raises(
        UserError, match=f"tensor .* is in {shards[0].name} and in|tensor {NORM} is in .* and in"
    ):
        load_model(tmp_path / "out")
    for weight_map in (None, [], {}, {"a": 3}, {"a": "../model.safetensors"}):
        edit_json(index, weight_map=weight_map)
        with pytest.raises(UserError, match=r"index.json: weight_map names no files of this directory"):
            load_model(tmp_path / "out")
    index.unlink()
    with pytest.raises(UserError, match=r"its .safetensors files need model.safetensors.index.json"):
        load_model(tmp_path / "out")


def test_end_ids_are_the_union_of_both_configs(llama):
    edit_json(llama / "config.json", eos_token_id=5)
    edit_json(llama / "generation_config.json", eos_token_id=[7, 5, 9])
    assert load_model(llama).eos_ids == (7, 5, 9)
    edit_json(llama / "generation_config.json", eos_token_id=...)
    assert load_model(llama).eos_ids == (5,)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_config_there_and_back(name, golden):
    original = json.loads((golden / name / "config.json").read_text())
    config = ModelConfig.from_hf(original)
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    # transformers v4 reads one pair of keys, v5 the other; each must do alone.
    without = lambda *keys: {k: v for k, v in written.items() if k not in keys}  # noqa: E731
    assert ModelConfig.from_hf(without("rope_parameters")) == config
    assert ModelConfig.from_hf(without("rope_theta", "rope_scaling")) == config
    assert written["architectures"] == original["architectures"]
    for key in written.keys() & original.keys() - {"rope_parameters"}:
        assert written[key] == original[key], key
    for key in ("rope_type", "rope_theta", "factor"):
        assert written["rope_parameters"].get(key) == original["rope_parameters"].get(key)


def spoil_weights(change):
    def spoil(path):
        weights = load_file(path / WEIGHTS)
        change(weights)
        save_file(weights, path / WEIGHTS)

    return spoil


def cut(keep):
    def spoil(path):
        data = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return spoil


NORM = "model.layers.1.input_layernorm.weight"
SPOILT = {
    "missing tensor": (spoil_weights(lambda w: w.pop(NORM)), f"llama: tensor {NORM} is missing"),
    "unexpected tensor": (spoil_weights(lambda w: w.update(spare=w[NORM])), "unexpected tensor spare"),
    "a buffer of no rotary embedding": (
        spoil_weights(lambda w: w.update({"model.x.rotary_emb.inv_freq": w[NORM]})),
        "unexpected tensor model.x.rotary_emb.inv_freq",
    ),
    "a head of another shape beside a tied embedding": (
        lambda p: (
            edit_json(p / "config.json", tie_word_embeddings=True),
            spoil_weights(lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1].copy()}))(p),
        ),
        r"lm_head.weight has shape \(63, 32\), its config says \(64, 32\)",
    ),
    "wrong shape": (
        spoil_weights(lambda w: w.update({NORM: w[NORM][:-1].copy()})),
        rf"{NORM} has shape \(31,\), its config says \(32,\)",
    ),
    "integer weights": (
        spoil_weights(lambda w: w.update({NORM: w[NORM].astype(np.int8)})),
        f"{NORM} is stored as I8",
    ),
    "cut in the data": (cut(0.9), f"{WEIGHTS}: not a whole safetensors file"),
    "cut in the header": (cut(0.01), f"{WEIGHTS}: not a whole safetensors file"),
    "empty file": (cut(0), f"{WEIGHTS}: not a whole safetensors file"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "no weights.*; download them"),
    "only .bin": (
        lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"),
        "no weights.*; convert its .bin files",
    ),
    "config is not JSON": (
        lambda p: (p / "config.json").write_text("{"),
        "config.json: not readable as JSON",
    ),
    "config is a list": (
        lambda p: (p / "config.json").write_text("[]"),
        "config.json: expected a JSON object",
    ),
    "other family": (
        lambda p: edit_json(p / "config.json", model_type="gpt_neox"),
        "config.json: model family 'gpt_neox' is not supported; have llama, mistral, qwen2, qwen3",
    ),
    "no family": (lambda p: edit_json(p / "config.json", model_type=...), "model family None"),
    "config without a size": (
        lambda p: edit_json(p / "config.json", hidden_size=...),
        "config.json: hidden_size is missing",
    ),
    "quantized": (
        lambda p: edit_json(p / "config.json", quantization_config={"bits": 4}),
        "config.json: quantized",
    ),
    "unknown rope": (
        lambda p: edit_json(p / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "config.json: rope scaling 'yarn'",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_directory_is_one_clear_line(case, llama):
    spoil, message = SPOILT[case]
    spoil(llama)
    with pytest.raises(UserError, match=message) as error:
        load_model(llama)
    assert "\n" not in str(error.value) and "llama" in str(error.value)


def test_unknown_dtype(golden, tmp_path):
    with pytest.raises(UserError, match="dtype 'float16' is not supported; have float32, bfloat16"):
        load_model(golden / "llama", dtype="float16")
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_model(golden / "llama").save(tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_save_does_not_overwrite(golden, tmp_path):
    model = load_model(golden / "llama")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).exists()
    (tmp_path / "file").write_text("")
    for taken in ("empty", "file"):
        with pytest.raises(UserError, match=f"{taken}: exists and is not an empty directory"):
            model.save(tmp_path / taken)
    with pytest.raises(UserError, match="cannot be written"):
        model.save(tmp_path / "file" / "below")


def test_an_interrupted_save_leaves_nothing(golden, tmp_path):
    class Unwilling:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, path):
            raise KeyboardInterrupt

    model = load_model(golden / "llama")
    model.tokenizer = Unwilling()
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sharded_load(golden):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    model = load_model(golden / "llama")
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, spec()), model.params)
    shardings["layers"]["w_up"] = jax.sharding.NamedSharding(mesh, spec(None, None, "x"))
    sharded = load_model(golden / "llama", shardings=shardings)
    assert sharded.params["layers"]["w_up"].sharding.spec == spec(None, None, "x")
    assert_same_bits(sharded.params, model.params)


def test_memory_is_one_model_and_one_tensor(tmp_path):
    config = ModelConfig("llama", 2000, 128, 6, 4, 2, 32, 1024, 64)
    params = random_params(config)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(x.nbytes for x in (params["embed"], params["layers"]["w_up"][0]))
    assert size > 10 * largest
    slack = largest  # bookkeeping; far below the model

    def peak(work):
        tracemalloc.start()
        work()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    load_model_warm = lambda: load_model(tmp_path / "m")  # noqa: E731
    save_hf(tmp_path / "m", config, params)
    load_model_warm()  # imports
    assert peak(load_model_warm) < size + largest + slack
    assert peak(lambda: save_hf(tmp_path / "again", config, params)) < 2 * largest + slack


def test_updates_write_to_loaded_weights_in_place(golden):
    params = load_model(golden / "llama").params
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)]
    after = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)] == before


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_what_save_writes(name, golden, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the [oracle] extra")
    import transformers

    load_model(golden / name).save(tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    data = np.load(golden / name / "logits.npz")
    with torch.no_grad():
        tokens, mask = (torch.tensor(data[key]).long() for key in ("tokens", "mask"))
        logits = model(tokens, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(logits[data["mask"]], data["logits"][data["mask"]], atol=1e-5)
