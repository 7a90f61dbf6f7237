"""Inputs that the objective tests share. Axis letters: P prompts, K responses, T tokens."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np

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


def in_float64(test):
    """Run a test with 64-bit floats, so that an identity can be held to 1e-9."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


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


def run(objective, stats, scored):
    """(loss, metrics, gradient [P,K,T] in logp).

    Not jitted: all objectives share the compiled operations of a shape, where each jit would take a second.
    """
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(stats, scored)
    return jax.device_get((loss, metrics, gradient.logp))


def put(array, where, value):
    """A copy of a numpy array with `value` at the index `where`."""
    array = np.array(array)
    array[where] = value
    return array
