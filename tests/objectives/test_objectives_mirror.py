"""The neural mirror map of GBMPO (METHODS 4.4 item 19)."""

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from objective_cases import in_float64, on_host, small

from lpo_jax import objectives as O
from lpo_jax.objectives import mirror

divergence, slope = on_host(mirror.map_divergence), on_host(mirror.map_slope)
by_q = jax.grad(lambda q, parameters, q0: mirror.map_divergence(parameters, jnp.log(q), jnp.log(q0)))
in_q = on_host(jax.vmap(by_q, (0, None, 0)))
N = 64


@st.composite
def maps(draw):
    """Parameters of any size, some or all of them 0."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scale, share = draw(st.sampled_from([1e-4, 0.01, 1.0, 4.0])), draw(st.sampled_from([0.0, 0.3, 1.0]))
    return scale * rng.random(mirror.SIZE) * (rng.random(mirror.SIZE) < share)


def probabilities(low=1e-6):
    return hnp.arrays(np.float64, N, elements=st.floats(low, 1))


def naive(parameters, q, q0):
    """The public code's expression: primitives, integrated and subtracted, in long double."""
    parameters, q, q0 = (np.longdouble(x) for x in (parameters, q, q0))
    v, w, b = parameters[:378].reshape(3, 126)
    a, c = parameters[378:]
    shift = np.longdouble("1e-3")
    units = (
        (lambda u: u**3, lambda u: u**4 / 4),
        (lambda u: u**2, lambda u: u**3 / 3),
        (np.sqrt, lambda u: 2 * u * np.sqrt(u) / 3),
        (np.cbrt, lambda u: 3 * u * np.cbrt(u) / 4),
        (lambda u: np.log(u + shift), lambda u: (u + shift) * np.log(u + shift) - (u + shift)),
        (np.exp, np.exp),
    )
    total = a / 2 * (q - q0) ** 2 + c * (q * np.log(q / q0) - (q - q0))
    for j in range(126):
        act, primitive = units[j // 21]
        u, u0 = w[j] * q + b[j], w[j] * q0 + b[j]
        total = total + v[j] * ((primitive(u) - primitive(u0)) / w[j] - act(u0) * (q - q0))
    return total


@in_float64
def test_against_the_public_expression():
    rng = np.random.default_rng(0)
    q, q0 = rng.uniform(1e-3, 1, (2, N))
    for scale in (0.01, 1.0, 5.0):
        parameters = rng.uniform(0.01, 1, mirror.SIZE) * scale
        got = divergence(parameters, np.log(q), np.log(q0))
        np.testing.assert_allclose(got, naive(parameters, q, q0).astype(float), rtol=1e-8)


def test_float32_is_exact_where_the_public_expression_is_rounding():
    """Neighbouring probabilities under a drawn map: relative error small, where subtraction would leave nothing."""
    parameters = np.array(mirror.initial_map(42))
    log_q = np.log(np.linspace(0.05, 0.9, N)).astype(np.float32)
    log_q0 = (log_q + np.float32(0.01)).astype(np.float32)
    expected = naive(parameters, np.exp(np.float64(log_q)), np.exp(np.float64(log_q0))).astype(float)
    got = divergence(parameters.astype(np.float32), log_q, log_q0)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert (got > 0).all()


@hypothesis.given(maps(), probabilities(), probabilities())
@small
@in_float64
def test_item_19_never_negative_and_0_at_home(parameters, q, q0):
    D = divergence(parameters, np.log(q), np.log(q0))
    assert (D >= 0).all()
    np.testing.assert_array_equal(divergence(parameters, np.log(q), np.log(q)), 0)
    chex.assert_tree_all_finite(D)


@hypothesis.given(maps(), probabilities())
@small
@in_float64
def test_item_19_h_is_convex(parameters, q):
    """h' never falls, and rises where the map has an a."""
    q = np.sort(q)
    h = slope(parameters, np.log(q))
    np.testing.assert_array_less(-np.diff(h), 1e-9 * (1 + np.abs(h[1:])))
    steep = slope(np.append(parameters[:-2], [1.0, 0.0]), np.log(q))
    assert (np.diff(steep) >= (1 - 1e-6) * np.diff(q) - 1e-9 * (1 + np.abs(steep[1:]))).all()


@hypothesis.given(probabilities(), probabilities(), st.floats(0.1, 5))
@small
@in_float64
def test_item_19_a_alone_and_c_alone(q, q0, scale):
    """a: half of ProbL2. c: the generalised KL q log(q / q0) - q + q0."""
    only = np.zeros(mirror.SIZE)
    only[-2] = scale
    np.testing.assert_allclose(
        divergence(only, np.log(q), np.log(q0)), scale * (q - q0) ** 2 / 2, rtol=1e-6, atol=1e-14
    )
    only[-2:] = 0, scale
    expected = scale * (q * np.log(q / q0) - (q - q0))
    np.testing.assert_allclose(divergence(only, np.log(q), np.log(q0)), expected, rtol=1e-6, atol=1e-13)


@hypothesis.given(maps(), probabilities(1e-3), probabilities(1e-3))
@small
@in_float64
def test_its_slope_is_the_difference_of_slopes(parameters, q, q0):
    """dD / dq = h'(q) - h'(q0): by the rule, and by finite differences of the value."""
    got = in_q(q, parameters, q0)
    np.testing.assert_allclose(
        got, slope(parameters, np.log(q)) - slope(parameters, np.log(q0)), rtol=1e-9, atol=1e-9
    )
    step = 1e-6
    up, down = (divergence(parameters, np.log(q + s), np.log(q0)) for s in (step, -step))
    # sqrt, cbrt and log bend sharply where a unit is near 0.
    np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=2e-2, atol=1e-3)


def test_extremes_are_finite():
    for scale in (0.0, 0.01, 5.0):
        for log_q, log_q0 in ((-1e4, 0.0), (0.0, -1e4), (-1e4, -1e4), (0.0, 0.0)):
            args = (
                np.full(mirror.SIZE, scale, np.float32),
                np.full(N, log_q, np.float32),
                np.full(N, log_q0, np.float32),
            )
            D = divergence(*args)
            assert np.isfinite(D).all() and (D >= 0).all()
            assert (D == 0).all() == (scale == 0 or log_q == log_q0)


def test_the_drawn_map():
    parameters = np.array(mirror.initial_map(42))
    assert parameters.shape == (380,) and (parameters >= 0).all() and parameters.max() < 0.01
    assert mirror.initial_map(42) == mirror.initial_map(42) != mirror.initial_map(43)
    assert mirror.map_problem(mirror.initial_map(42)) is None and mirror.map_problem(()) is None
    assert O.get("gbmpo-mirror", mirror=mirror.initial_map(42)) != O.get("gbmpo-mirror", mirror_seed=42)


class JitTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_jitted_or_not(self):
        q = np.log(np.float32([[0.2, 0.9], [1e-12, 1.0]]))
        parameters = np.float32(mirror.initial_map(1))
        got = self.variant(mirror.map_divergence)(parameters, q, q[::-1])
        np.testing.assert_allclose(got, divergence(parameters, q, q[::-1]), rtol=1e-5)


def test_memory_does_not_grow_with_the_units():
    """An array of tokens x 126 units would be the largest of the whole step."""
    log_q = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda q: mirror.map_divergence(jnp.ones(mirror.SIZE), q, q - 0.1).sum()))
    assert f.lower(log_q).compile().memory_analysis().temp_size_in_bytes < 20 * 4 * 64 * 1024
