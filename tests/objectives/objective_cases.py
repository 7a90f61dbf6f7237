"""Inputs that the objective tests share. Axis letters: P prompts, K responses, T tokens."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from precision import in_float64  # noqa: F401

from lpo_jax import objectives as O

# Fixed shapes and few examples: each new shape is a compile, and CI has two cores.
small = hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)

P = 3
K = 5

# One of every method, and of every option that changes the gradient's form.
OBJECTIVES = {
    "lpo-forward": O.get("lpo-forward"),
    "lpo-forward/ppo/sum": O.get("lpo-forward", clip="ppo", score="sum", temperature="dr-grpo"),
    "lpo-forward/joint": O.get("lpo-forward", clip="joint", temperature="maxrl"),
    "lpo-reverse/none": O.get("lpo-reverse", clip="none", temperature=0.5),
    "lpo-reverse/mask": O.get("lpo-reverse", degenerate="mask", ddof=1),
    "lpo-forward-onpolicy": O.get("lpo-forward-onpolicy"),
    "lpo-pointwise": O.get("lpo-pointwise"),
    "grpo": O.get("grpo"),
    "grpo/token-mean": O.get("grpo", aggregation="token-mean", epsilon_high=0.28),
    "dr-grpo": O.get("dr-grpo", max_tokens=16),
    "maxrl": O.get("maxrl", aggregation="seq-mean-token-sum"),
}


def on_host(f, **jit_options):
    """`f` jitted, its result in numpy: one compile a shape, where op by op it would be dozens."""
    jitted = jax.jit(f, **jit_options)
    return lambda *args, **kwargs: jax.device_get(jitted(*args, **kwargs))


log_probs = on_host(O.listwise_log_probs)
target_log_probs = on_host(O.target_log_probs)
temperature = on_host(O.temperature, static_argnames=("rule", "ddof", "floor"))
coefficients = on_host(O.Divergence.coefficients, static_argnums=0)
autodiff_coefficients = on_host(O.Divergence.autodiff_coefficients, static_argnums=0)
value = on_host(O.Divergence.value, static_argnums=0)


def _floats(low, high):
    return st.floats(low, high, allow_nan=False, width=32)


@st.composite
def groups(draw, spread=3.0):
    """(rewards, scores, anchor), each [P,K] float64: rewards in [0,1], often tied; scores within +-spread."""
    shape = (P, K)
    binary = st.sampled_from([0.0, 1.0])
    rewards = draw(hnp.arrays(np.float64, shape, elements=draw(st.sampled_from([binary, _floats(0, 1)]))))
    scores, anchor = (
        draw(hnp.arrays(np.float64, shape, elements=_floats(-spread, spread))) for _ in range(2)
    )
    return rewards, scores, anchor


def batch(seed=0, K=4, T=6, off=0.1, dtype=np.float32, anchor=False):
    """A ragged batch [P,K,T]: group 0 has mixed rewards, group 1 a fraction, group 2 (the last) all equal.

    `off` is the scale of the log-ratio to the behaviour policy; 0 is on-policy.
    """
    rng = np.random.default_rng(seed)
    behaviour = -rng.exponential(1.0, (P, K, T))
    lengths = rng.integers(1, T + 1, (P, K))
    lengths[0, 0] = T
    mask = np.arange(T) < lengths[..., None]
    rewards = np.stack([np.arange(K) % 2, rng.random(K), np.full(K, 0.1)])
    arrays = [behaviour + off * rng.standard_normal((P, K, T)), behaviour]
    arrays.append(behaviour + off * rng.standard_normal((P, K, T)))
    logp, behaviour, anchor_logp = (a.astype(dtype) for a in arrays)
    scored = O.Scored(behaviour, rewards.astype(dtype), mask, anchor_logp if anchor else None)
    return O.TokenStats(logp), scored


# The axes of every field that is not None in a full batch; what is not named here has none.
AXES = {
    **dict.fromkeys(("rewards", "valid", "passed", "malformed", "truncated", "clusters", "flawed"), "PK"),
    **dict.fromkeys(("baseline", "prompt_confidence", "weight"), "P"),
    **dict.fromkeys(("logp", "entropy", "ref_logp", "collision", "hidden_norm"), "PKT"),
    **dict.fromkeys(("behaviour_logp", "mask", "anchor_logp", "token_ids", "credit", "sampler_logp"), "PKT"),
    **{"top_logp": "PKTJ", "features": "PKF"},
}
TEACHER_AXES = {"ids": "PKTJ", "logp": "PKTJ", "entropy": "PKT", "valid": "PK"}


def all_but(names, *heavy):
    """Parameters of a test; those that are heavy, or repeat a mechanism, are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in heavy else name for name in names]


def some(names, *default):
    """Parameters of a test of one property of many methods: `default`, and the others marked slow.

    The default ones differ most in their mechanisms, and each method has some property that is tested by default.
    """
    assert set(default) <= set(names), set(default) - set(names)
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


def full_batch(seed=0, K=4, T=6, J=3, off=0.1, dtype=np.float32, objective=None):
    """As `batch`, with every field that any method looks at, and the first state of `objective`'s control.

    Group 0 has a pass and a failure, flawed and cut responses, and two answers that agree. Without an objective
    `control` is None.
    """
    stats, scored = batch(seed, K, T, off, dtype, anchor=True)
    rng = np.random.default_rng(seed + 1000)
    tokens, responses = (P, K, T), (P, K)

    def floats(shape):
        return rng.random(shape).astype(dtype)

    def top():
        return np.log(rng.dirichlet(np.ones(J + 1), tokens)[..., :J]).astype(dtype)

    passed = scored.rewards > 0.5
    stats = stats.replace(
        entropy=floats(tokens),
        ref_logp=scored.behaviour_logp + off * rng.standard_normal(tokens).astype(dtype),
        top_logp=top(),
        collision=floats(tokens),
        hidden_norm=1 + floats(tokens),
    )
    scored = scored.replace(
        valid=np.ones(responses, bool),
        passed=passed,
        malformed=~passed & (rng.random(responses) < 0.5),
        truncated=~passed & (np.arange(K) == 0),
        token_ids=rng.integers(0, 3, tokens).astype(np.int32),
        clusters=rng.integers(-1, 2, responses).astype(np.int32),
        baseline=floats((P, 1)),
        flawed=passed & (np.arange(K) == 1),
        credit=floats(tokens),
        prompt_confidence=floats((P,)),
        features=floats((P, K, 5)),
        teacher=O.Teacher(rng.integers(0, 9, (*tokens, J)).astype(np.int32), top(), floats(tokens), ~passed),
        weight=0.5 + floats((P,)),
        progress=np.asarray(0.25, dtype),
        sampler_logp=(scored.behaviour_logp + off * rng.standard_normal(tokens)).astype(dtype),
        control=None if objective is None else jax.device_get(objective.init_control()),
    )
    return stats, scored


def padded(stats, scored, prompts=1, responses=2, tokens=3, garbage=np.nan):
    """The same batch with more prompts, responses and tokens, and garbage at every place without a token."""
    sizes = {"P": prompts, "K": responses, "T": tokens}
    mask = np.pad(scored.mask, ((0, prompts), (0, responses), (0, tokens)))

    def pad(name, x, axes):
        if x is None or not axes:
            return x
        x = np.asarray(x)
        fill = garbage if np.issubdtype(x.dtype, np.floating) else name not in ("mask", "valid")
        x = np.pad(x, [(0, sizes.get(a, 0)) for a in axes + "?" * (x.ndim - len(axes))], constant_values=fill)
        if "T" not in axes or name == "mask":
            return x
        return np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 3)), x, np.asarray(fill, x.dtype))

    def each(record, axes):
        return record.replace(**{name: pad(name, x, axes.get(name, "")) for name, x in vars(record).items()})

    teacher = None if scored.teacher is None else each(scored.teacher, TEACHER_AXES)
    return each(stats, AXES), each(scored.replace(teacher=None), AXES).replace(teacher=teacher)


def run(objective, stats, scored):
    """(loss, metrics, gradient [P,K,T] in logp).

    Not jitted: all objectives share the compiled operations of a shape, where each jit would take a second. That holds
    for the shape of `batch` and `full_batch` alone; `run_jitted` is for others.
    """
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(stats, scored)
    return jax.device_get((loss, metrics, gradient.logp))


@functools.partial(jax.jit, static_argnums=0)
def _jitted(objective, stats, scored):
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(stats, scored)
    return loss, metrics, gradient.logp


def run_jitted(objective, stats, scored):
    """As `run`, in one program for each objective and shape."""
    return jax.device_get(_jitted(objective, stats, scored))


def put(array, where, value):
    """A copy of a numpy array with `value` at the index `where`."""
    array = np.array(array)
    array[where] = value
    return array
