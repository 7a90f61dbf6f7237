"""Sampling: draws follow the distribution, tokens do not depend on the batch, and log-probs agree with scoring."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from precision import FORWARD_ROUNDING
from tiny import character_tokenizer
from tokenizers import processors

from lpo_jax.errors import UserError
from lpo_jax.models import decoder
from lpo_jax.models.text import ModelTokenizer
from lpo_jax.planner.hlo import collectives, parse_hlo
from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest, Sampling, kv_cache
from lpo_jax.sampling.padding import bucket, pad_prompts
from lpo_jax.sampling.text import encode, prompt_ids, response_text

P, K, T = 4, 3, 12
PROMPTS = [[5], [9, 30, 11, 7, 8, 40, 3], [12, 13, 14], [20, 21, 22, 23, 24]]
EOS = (1, 17)  # two end tokens

# Each distribution and each number of rows is a program of its own.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def sample(one_layer):
    config, params = one_layer
    sampler = Sampler(config, EOS, decode=lambda ids: "".join(chr(97 + i % 26) for i in ids))
    weights = sampler.prepare(params)

    def run(prompts=PROMPTS, ids=None, budgets=None, at_least=0, **options):
        ids = np.arange(len(prompts)) if ids is None else ids
        batch = PromptBatch(*pad_prompts(prompts, 64), np.array(ids))
        request = SampleRequest(**{"num_responses": K, "max_tokens": T, "seed": 3, "step": 2} | options)
        return sampler(weights, batch, request, budgets=budgets, at_least=at_least)

    return run


@pytest.fixture(scope="module")
def plain_logits(one_layer):
    """Return a function that computes the logits of every token of responses, without a KV cache.

    It takes (prompt, response) pairs. All are computed by one program: attention is causal, so that the padding behind
    a row changes nothing.
    """
    config, params = one_layer
    logits = jax.jit(functools.partial(decoder.logits, config))

    def run(*rows):
        ids = np.zeros((P * K, 24), np.int32)
        for row, (prompt, response) in zip(ids, rows, strict=False):
            row[: len(prompt) + len(response)] = prompt + response
        found = np.asarray(logits(params, ids))
        return [x[len(p) - 1 : len(p) + len(r) - 1] for x, (p, r) in zip(found, rows, strict=False)]

    return run


def log_softmax(logits):
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def entropy_of(logits):
    """Entropies `[R]` of softmax(logits) `[R, V]`, removed tokens left out."""
    return scipy.special.entr(scipy.special.softmax(logits, axis=-1)).sum(-1)


def test_response_text_keeps_special_tokens_but_ends_and_padding_at_its_end():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    tag, close = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    pad, end, unknown = 0, 1, 2
    digits = tokenizer.encode("35", add_special_tokens=False)
    text = lambda ids, eos=(end,): response_text(tokenizer, ids, eos)  # noqa: E731
    assert text([tag, *digits, close, end]) == text([tag, *digits, close]) == "<answer>35</answer>"
    assert text([*digits, close, end], (end, close)) == "35"  # a model may have several end tokens
    assert text([*digits, pad, unknown, *digits, end, pad, pad]) == "35<pad><unk>35"
    assert text([end]) == text([]) == ""


@pytest.mark.parametrize("temperature", [1.0, slow(0.6)])
def test_log_probs_equal_teacher_forced_ones(sample, plain_logits, temperature):
    got = sample(distribution=Sampling(temperature))
    at = list(np.ndindex(P, K))
    logits = plain_logits(*((PROMPTS[p], got.ids(p, k)) for p, k in at))
    for (p, k), row in zip(at, logits, strict=True):
        want = log_softmax(row / temperature)[np.arange(len(row)), got.ids(p, k)]
        chex.assert_trees_all_close(got.log_probs[p, k, : got.lengths[p, k]], want, atol=2e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.8, top_p=0.5), slow(Sampling(top_k=3)), slow(Sampling(min_p=0.2))]
)
def test_truncated_log_probs_are_those_of_what_was_sampled_from(sample, plain_logits, sampling):
    got = sample(distribution=sampling)
    responses = [got.ids(p, 0) for p in range(P)]
    logits = plain_logits(*zip(PROMPTS, responses, strict=True))
    # One array for all, so that the operations have one shape.
    whole = np.zeros((P * T, logits[0].shape[-1]), np.float32)
    whole[: sum(map(len, logits))] = np.concatenate(logits)
    ends = np.cumsum([len(ids) for ids in responses])
    for p, (ids, kept) in enumerate(zip(responses, np.split(np.asarray(sampling.logits(whole)), ends))):
        want = log_softmax(kept)[np.arange(len(ids)), ids]
        assert np.isfinite(want).all()
        chex.assert_trees_all_close(got.log_probs[p, 0, : len(ids)], want, atol=5e-4)
        chex.assert_trees_all_close(got.entropies[p, 0, : len(ids)], entropy_of(kept), atol=2e-3)
        assert not got.entropies[p, 0, len(ids) :].any()


def test_a_row_is_the_same_alone_and_in_any_batch(sample):
    together = sample(ids=[10, 11, 12, 13])
    for p, prompt in enumerate(PROMPTS):
        alone = sample([prompt], ids=[10 + p])
        for k in range(K):
            assert alone.ids(0, k) == together.ids(p, k)
    order = [2, 0, 3, 1]
    shuffled = sample([PROMPTS[p] for p in order], ids=[10 + p for p in order])
    for at, p in enumerate(order):
        assert [shuffled.ids(at, k) for k in range(K)] == [together.ids(p, k) for k in range(K)]
    more = sample(ids=[10, 11, 12, 13], num_responses=16)
    assert more.ids(1, 1) == together.ids(1, 1)


def test_cache_growth_and_chunks_change_nothing(sample, monkeypatch):
    whole = sample()
    monkeypatch.setattr(kv_cache, "FIRST_TOKENS", 2)
    for other in (sample(), sample(stop=("never to be seen",))):
        np.testing.assert_array_equal(whole.tokens, other.tokens)
        np.testing.assert_allclose(whole.log_probs, other.log_probs, atol=2 * FORWARD_ROUNDING)


def test_seed_step_prompt_and_k_each_matter(sample):
    base = sample().tokens
    assert (sample(seed=4).tokens != base).any() and (sample(step=3).tokens != base).any()
    assert (sample(ids=[7, 8, 9, 6]).tokens != base).any()
    same = sample([PROMPTS[1]] * P)
    assert len({tuple(same.ids(p, k)) for p in range(P) for k in range(K)}) == P * K


def test_every_end_token_ends_and_is_kept(sample):
    got = sample(num_responses=16)
    ended_by = {got.ids(p, k)[-1] for p in range(P) for k in range(16) if got.finished[p, k]}
    assert ended_by == set(EOS)
    for p in range(P):
        for k in range(16):
            ids = got.ids(p, k)
            assert not set(EOS) & set(ids[:-1])
            assert got.finished[p, k] == (ids[-1] in EOS) and (got.finished[p, k] or len(ids) == T)
    assert (got.tokens[~got.mask] == 0).all() and (got.log_probs[~got.mask] == 0).all()


def test_stop_string_keeps_the_token_that_completes_it(sample, monkeypatch):
    text = lambda ids: "".join(chr(97 + i % 26) for i in ids)  # noqa: E731
    free, stopped = sample(num_responses=16), sample(num_responses=16, stop=("q", "ab"))
    hits = 0
    for p in range(P):
        for k in range(16):
            ids, full = stopped.ids(p, k), free.ids(p, k)
            assert full[: len(ids)] == ids
            met = [n for n in range(1, len(full) + 1) if "q" in text(full[:n]) or "ab" in text(full[:n])]
            assert len(ids) == (met[0] if met else len(full))
            hits += bool(met)
            assert stopped.finished[p, k] == (bool(met) or free.finished[p, k])
    assert hits > 5


def test_empty_and_padding_rows_are_not_sampled(sample):
    whole = sample()
    got = sample(budgets=np.array([[T], [0], [T], [0]]) * np.ones((1, K), int), at_least=7)
    assert got.tokens.shape[:2] == (P, K)
    assert [got.ids(p, k) for p in (0, 2) for k in range(K)] == [
        whole.ids(p, k) for p in (0, 2) for k in range(K)
    ]
    assert (got.lengths[[1, 3]] == 0).all() and (got.lengths[[0, 2]] > 0).all() and not got.finished[1].any()


def test_greedy_takes_the_most_probable_token(sample, plain_logits):
    got = sample(distribution=Sampling(0.0), num_responses=1)
    ids = got.ids(1, 0)
    (logits,) = plain_logits((PROMPTS[1], ids))
    assert logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize(
    "sampling",
    [Sampling(min_p=0.3), *(slow(x) for x in (Sampling(), Sampling(0.7, top_k=5), Sampling(top_p=0.5)))],
)
def test_draws_follow_the_distribution(sampling):
    """Frequencies of 40,000 draws from 600 tokens (three blocks of the inverse CDF, the last one ragged)."""
    logits = jnp.asarray(1.5 * np.random.default_rng(0).normal(size=600), jnp.float32)
    n = 40_000
    keys = jax.random.split(jax.random.key(1), n)
    tokens, log_probs, entropies = jax.jit(sampling.draw)(keys, jnp.broadcast_to(logits, (n, 600)))
    kept = np.asarray(jax.jit(sampling.logits)(logits[None])[0])
    want = scipy.special.softmax(kept)
    counts = np.bincount(np.asarray(tokens), minlength=600)
    assert (counts[want == 0] == 0).all()
    deviation = (counts / n - want) / np.sqrt(np.maximum(want * (1 - want), 1e-9) / n)
    # 3e-4: the chance that any of 600 frequencies is 5 deviations off.
    np.testing.assert_array_less(3e-4, 600 * 2 * scipy.stats.norm.sf(np.abs(deviation).max()))
    chex.assert_trees_all_close(log_probs, np.log(want[tokens]), atol=1e-5)
    chex.assert_trees_all_close(entropies, np.full(n, entropy_of(kept), np.float32), atol=3e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda p: jnp.isfinite(Sampling(top_p=p).logits(logits))[0].tolist()  # noqa: E731
    assert kept(0.4) == [True, False, False, False]
    assert kept(0.6) == [True, True, False, False]
    assert kept(0.9) == [True, True, True, False]
    assert jnp.isfinite(Sampling(top_p=1e-6).logits(logits)).sum() == 1


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_a_sort(top_k, top_p):
    """With equal logits (they are rounded), with logits of either sign and far from 0, and after top-k."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(40, 300)) * rng.choice([0.1, 1, 30], (40, 1)), 1).astype(np.float32)
    logits += rng.choice([-200, 0, 200], (40, 1)).astype(np.float32)
    kept = np.isfinite(Sampling(top_k=top_k, top_p=top_p).logits(jnp.asarray(logits)))
    for row, got in zip(np.asarray(Sampling(top_k=top_k).logits(jnp.asarray(logits)), np.float64), kept):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        above = np.array([probabilities[row > x].sum() for x in row])  # of the tokens that precede x
        at_least = np.array([probabilities[row >= x].sum() for x in row])
        clear = (abs(above - top_p) > 1e-5) & (abs(at_least - top_p) > 1e-5)  # float32 decides the others
        assert clear.mean() > 0.4
        np.testing.assert_array_equal(got[clear], ((above < top_p) & np.isfinite(row))[clear])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_buckets_are_few():
    assert [bucket(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert bucket(3, 5) == 5
    assert len({bucket(n, 4096) for n in range(1, 4097)}) == 9


def test_generate_texts(tiny_model):
    import lpo_jax

    model = lpo_jax.load_model(str(tiny_model))
    prompts = ["say xx1", "say 23", "say xx1"]
    got = model.generate(prompts, num_responses=2, max_tokens=8, seed=5)
    assert got.tokens.shape[:2] == (3, 2) and len(got.texts) == 3 and got.finished.shape == (3, 2)
    assert got.texts[0][0] == response_text(model.tokenizer, got.ids(0, 0), model.eos_ids)
    assert got.texts[0] != got.texts[2]  # a repeated prompt gets other responses
    alone = model.generate(prompts[1:2], num_responses=2, max_tokens=8, seed=5)
    assert alone.texts[0] == got.texts[1]
    with pytest.raises(UserError, match="prompt 0 has 200 tokens"):
        model.generate(["x" * 200])
    with pytest.raises(UserError, match="list of at least one"):
        model.generate("a text")
    with pytest.raises(UserError, match="no chat template"):
        model.generate([[{"role": "user", "content": "hi"}]])


def test_prompt_ids_tell_duplicates_apart():
    ids = prompt_ids([[1, 2], [3], [1, 2]])
    assert len(set(ids.tolist())) == 3
    assert prompt_ids([[3]])[0] == ids[1]


def test_every_prompt_has_one_beginning():
    """The tokenizer puts <end> before raw text, as Llama's does, and its chat template does the same."""
    own = character_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 1)]
    )
    own.chat_template = (
        "<end>{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = ModelTokenizer(own, "tiny", len(own))
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}
    for prompt, text in (("hi", "hi"), ([user], "hi>"), ([user, assistant], "hi>so")):
        ids = encode(tokenizer, prompt)
        assert ids[0] == 1 and ids.count(1) == 1 and tokenizer.decode(ids[1:]) == text


def test_a_draw_does_not_gather_a_split_vocabulary():
    """The vocabulary of Qwen3 over eight devices: its blocks divide over them."""
    R, V = 16, 151936
    axis = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(axis, jax.sharding.PartitionSpec(None, "tensor"))
    logits = jax.ShapeDtypeStruct((R, V), jnp.float32, sharding=split)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), R))
    program = jax.jit(Sampling().draw).lower(keys, logits).compile().as_text()
    assert max(c.bytes for c in collectives(parse_hlo(program))) < 4 * R * V / 32
