"""Records of responses: texts of tokens, the budget of token lists, and identities of prompts."""

import numpy as np
from test_hooks import collected
from tiny import character_tokenizer

from lpo_jax.rollout.records import TokenTexts, evaluation_records, response_records, token_records

TEXTS = TokenTexts(character_tokenizer())


class Pieces:
    """A tokenizer that drops the space of a text's first token, as SentencePiece models do."""

    def decode(self, ids, skip_special_tokens):
        return "".join(["▁the", "▁cat", "s"][i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_texts_of_tokens_keep_their_spaces():
    texts = TokenTexts(Pieces())
    assert [texts[i] for i in (0, 1, 2)] == [" the", " cat", "s"]


def test_lists_of_tokens_end_with_the_budget():
    rollouts = collected([3, 4, 5], [[0, 1], [1, 0], [1, 1]])  # two tokens each
    records = token_records(rollouts, TEXTS, {"token_gate": np.ones((3, 2, 6), bool)}, budget=8)
    assert [len(record) for record in records] == [4, 4, 4, 4, 0, 0]
    assert records[1] == {
        "token_text": ["r", "1"],
        "token_logp": [-0.5, -0.5],
        "token_entropy": [0.5, 0.5],
        "token_gate": [1, 1],
    }


def test_prompts_have_the_same_identity_everywhere():
    rollouts = collected([3, 4], [[0, 1], [1, 0]])
    trained = response_records(rollouts, "train", 7)
    assert [record["id"] for record in trained] == [3, 3, 4, 4]
    assert len({record["prompt_id"] for record in trained}) == 2
    assert trained[0]["behaviour_step"] == 7 and trained[0]["logp"] == -0.5 and trained[0]["gts"] == "g3"
    held = evaluation_records([rollouts.take([1]), rollouts.take([0])], TEXTS, "step", 8)
    assert [record["prompt_id"] for record in held[::2]] == [trained[2]["prompt_id"], trained[0]["prompt_id"]]
    assert held[0]["token_text"] == ["r", "0"] and held[0]["phase"] == "step"
