"""Sampling from prompts with images."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import vision_tokenizer

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models.prompt_images import expand
from lpo_jax.sampling import Ahead, PromptBatch, Responses, Sampler, SampleRequest, calls, pages, paging
from lpo_jax.sampling.padding import pad_prompts
from lpo_jax.sampling.text import encode, prompt_ids

GOLDEN = Path(__file__).parents[1] / "models" / "golden"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request, tmp_path_factory):
    folder = shutil.copytree(GOLDEN / request.param, tmp_path_factory.mktemp("models") / request.param)
    vision_tokenizer().save_pretrained(folder)
    return load_model(folder)


# The sampler treats both families alike; where their positions differ, log-probs show it.
one_family = pytest.mark.parametrize(
    "model", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"], indirect=True
)


def asked(text, images=1):
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


def drawn(*sizes):
    rng = np.random.default_rng(sum(map(sum, sizes), 0))
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


PROMPTS = [asked("what is it"), asked("a", 2), "say", asked("which")]
IMAGES = [drawn((56, 90)), drawn((30, 150), (99, 61)), [], drawn((200, 200))]
SETTINGS = {"num_responses": 3, "max_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def generated(model):
    return model.generate(PROMPTS, images=IMAGES, **SETTINGS)


@one_family
def test_log_probs_are_those_of_whole_sequences(model, generated):
    vision = model.config.vision
    rows, images = [], []
    for p, prompt in enumerate(PROMPTS):
        text = prompt if isinstance(prompt, str) else model.tokenizer.render(prompt)
        ids, rest = [], iter(IMAGES[p])
        for token in model.tokenizer.encode(text):
            count = 1
            if token == vision.image_token:
                count = vision.processor.num_tokens(vision.processor.grid(*next(rest).shape[:2]))
            ids += [token] * count
        for k in range(3):
            rows.append((ids, generated.ids(p, k), generated.log_probs[p, k]))
            images.append(IMAGES[p])
    T = max(len(ids) + len(response) for ids, response, _ in rows)
    tokens, mask = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for row, (ids, response, _) in enumerate(rows):
        length = len(ids) + len(response)
        tokens[row, :length], mask[row, :length] = ids + response, True
    logits = np.array(model.logits(tokens, mask, images))
    logits[..., [vision.image_token, vision.video_token]] = -np.inf
    logp = jax.device_get(jax.nn.log_softmax(logits))
    for row, (ids, response, sampled) in enumerate(rows):
        at = len(ids) - 1 + np.arange(len(response))
        np.testing.assert_allclose(logp[row, at, response], sampled[: len(response)], atol=2e-4)


@one_family
def test_responses_do_not_depend_on_other_prompts(model, generated):
    alone = model.generate(PROMPTS[1:2], images=IMAGES[1:2], **SETTINGS)
    assert [alone.ids(0, k) for k in range(3)] == [generated.ids(1, k) for k in range(3)]


@pytest.mark.slow
def test_rows_set_aside_continue_behind_their_images(model, generated, monkeypatch):
    """With the KV cache in pages: set aside and resumed, a row sees its images at the same positions."""
    resumed, prefill = [], paging.PagedBatcher._insert_rows
    monkeypatch.setattr(
        paging.PagedBatcher, "_insert_rows", lambda self, *a: resumed.append(a[0]) or prefill(self, *a)
    )
    monkeypatch.setattr(pages, "PAGE", 4)
    monkeypatch.setattr(calls, "FEWEST", 4)
    small = functools.partial(Sampler, attention="interpret", kv_tokens=92)
    monkeypatch.setattr("lpo_jax.sampling.model.Sampler", small)
    paged = model.generate(PROMPTS, images=IMAGES, **SETTINGS)
    assert resumed
    np.testing.assert_array_equal(paged.tokens, generated.tokens)
    np.testing.assert_allclose(paged.log_probs, generated.log_probs, atol=2e-4)


@one_family
def test_rows_that_go_on_read_their_images_again(model, generated):
    """Rows with tokens of an earlier call are prefilled behind their prompts and images."""
    vision = model.config.vision
    cut = [[vision.processor.patches(image) for image in row] for row in IMAGES]
    ids = [
        expand(vision, encode(model.tokenizer, prompt), [image.grid for image in row])
        for prompt, row in zip(PROMPTS, cut)
    ]
    lengths = np.minimum(generated.lengths, 4)
    begun = np.arange(generated.tokens.shape[-1]) < lengths[..., None]
    kept = [np.where(begun, x, 0) for x in (generated.tokens, generated.log_probs, generated.entropies)]
    ended = generated.finished & (generated.lengths <= 4)
    started = Responses(*kept, begun * 0, lengths, ended, np.zeros(lengths.shape, np.float32))
    sampler = Sampler(model.config, model.eos_ids)
    found = sampler(
        sampler.prepare(model.params),
        PromptBatch(*pad_prompts(ids, 200), prompt_ids(ids, cut), cut),
        SampleRequest(3, 12, seed=3),
        ahead=Ahead(1, np.zeros(len(ids), np.uint32), started),
    )
    np.testing.assert_array_equal(found.tokens, generated.tokens)
    np.testing.assert_allclose(found.log_probs, generated.log_probs, atol=2e-4)


@one_family
def test_images_change_the_responses(model, generated):
    other = model.generate(PROMPTS, images=[[255 - x for x in row] for row in IMAGES], **SETTINGS)
    same = [other.ids(p, k) == generated.ids(p, k) for p in (0, 1, 3) for k in range(3)]
    assert sum(same) <= 1
    assert [other.ids(2, k) for k in range(3)] == [generated.ids(2, k) for k in range(3)]


@one_family
def test_placeholders_are_never_sampled(model):
    vision = model.config.vision
    unembed = np.array(model.params.get("unembed", model.params["embed"]))
    name = "unembed" if "unembed" in model.params else "embed"
    unembed[[vision.image_token, vision.video_token]] *= 20  # by far the largest logits, of either sign
    eager = dataclasses.replace(model, params=model.params | {name: jax.numpy.asarray(unembed)})
    for temperature in (0.0, 1.0):
        found = eager.generate(["say", "why"], temperature=temperature, num_responses=4, max_tokens=16)
        tokens = found.tokens[found.mask]
        assert len(tokens) > 20 and not np.isin(tokens, [vision.image_token, vision.video_token]).any()
        assert np.isfinite(found.log_probs).all() and np.isfinite(found.entropies).all()


@one_family
@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (asked("a"), [], "prompt 0 has 1 image placeholder for 0 images"),
        (asked("a"), drawn((40, 40), (40, 40)), "prompt 0 has 1 image placeholder for 2 images"),
        ("say", drawn((40, 40)), "prompt 0 has 0 image placeholders for 1 image"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "has a video"),
        ("look<|image_pad|>", drawn((40, 40)), "ends with an image"),
        (asked("a"), [b"no image"], "prompt 0: image 0: not an image"),
        pytest.param(asked("a" * 30), drawn((230, 230)), None, marks=pytest.mark.slow),
        (asked("a", 5), drawn(*[(230, 230)] * 5), "has .* tokens; need 1 to"),
    ],
)
def test_prompts_and_images_must_agree(model, prompt, images, message):
    if message is None:
        model.generate([prompt], images=[images], max_tokens=2)
        return
    with pytest.raises(UserError, match=message):
        model.generate([prompt], images=[images], max_tokens=2)


def test_a_text_model_refuses_images(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    vision_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="reads text only"):
        load_model(folder).generate([asked("a")], images=[drawn((40, 40))], max_tokens=2)
