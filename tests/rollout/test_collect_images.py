"""Rollouts of prompts with images: the sampler sees them, records refer to them, the verifier does not get them."""

from pathlib import Path

import numpy as np
import pytest
from tiny import random_params

from lpo_jax import tasks
from lpo_jax.config import parse_config
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.rollout.collect import concatenate
from lpo_jax.rollout.environment import open_environment
from lpo_jax.rollout.records import response_records
from lpo_jax.sampling import SampleRequest, Sampling

MICRO = Path(__file__).parents[2] / "configs" / "micro_vision"
REQUEST = SampleRequest(4, 4, Sampling(1.0, 0, 1.0, 0.0), (), 5)


@pytest.fixture(scope="module")
def collected():
    """Rollouts of the same questions with their pictures, and with blank ones."""
    model, tokenizer, eos_ids = load_config_and_tokenizer(MICRO)
    params = random_params(model)
    found = []
    for blank in (False, True):
        options = {"name": "shapes", "train_size": 8, "heldout_size": 2, "blank": blank}
        values = {
            "output": "-",
            "model": {"path": str(MICRO), "init": "random"},
            "task": options,
            "sampling": {"num_responses": 4, "max_tokens": 4, "max_prompt_tokens": 22},
            "training": {"prompts_per_step": 4},
            "rewards": {"workers": 1},
        }
        task = tasks.get(**options)
        with open_environment(parse_config(values), task, model, tokenizer, eos_ids, None) as environment:
            weights = environment.prepare(params)
            rows = list(enumerate(environment.train_rows))
            found.append((environment.collect(weights, rows, REQUEST), task))
    return found


def test_the_sampler_sees_the_pictures(collected):
    (shown, _), (blank, _) = collected
    assert shown.prompts.tolist() == blank.prompts.tolist()
    assert np.abs(shown.responses.log_probs[..., 0] - blank.responses.log_probs[..., 0]).min() > 1e-5
    # The same random numbers, so that most responses to another picture are the same before training.
    assert (shown.responses.tokens != blank.responses.tokens).any()


def test_records_refer_to_the_pictures(collected):
    shown, task = collected[0]
    records = response_records(shown, "train", 0)
    for record in records:
        (image,) = task.train[record["id"]]["images"]
        assert record["images"] == [image.reference()]
        question = task.prompt(task.train[record["id"]]).removeprefix("<image>")
        assert record["input"] == f"<|vision_start|><|image_pad|><|vision_end|>{question}"
        assert record["outcome"] != "infrastructure"
    of_blank = response_records(collected[1][0], "train", 0)
    assert len({record["prompt_id"] for record in records}) == 8
    assert len({record["prompt_id"] for record in of_blank}) <= 4  # one for each question
    assert len({id_ for record in (*records, *of_blank) for id_ in [record["prompt_id"]]}) == 8 + len(
        {record["prompt_id"] for record in of_blank}
    )


def test_images_follow_their_groups(collected):
    shown, blank = collected[0][0], collected[1][0]
    both = concatenate([shown.take([5, 2]), blank.take([0])])
    assert both.images == [shown.images[5], shown.images[2], blank.images[0]]
