"""Band's bounds against high precision, landmarks of the paper, invariances, and the identity with DPPO's mask."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import (
    band_bounds,
    binary_divergence,
    clipped_surrogate,
    dppo_mask,
    masked_surrogate,
    register_divergence,
    relax_bounds,
)
from rollax.tests.support import compiled

DIVERGENCES = ("kl", "rkl", "tv", "chi2", "neyman", "hellinger", "js")
# From the definition, to be evaluated in long doubles: f at the ratio u.
F = {
    "kl": lambda u: u - 1 - np.log(u),
    "rkl": lambda u: u * np.log(u) - u + 1,
    "tv": lambda u: np.abs(u - 1) / 2,
    "chi2": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (u - 1) ** 2 / u,
    "hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    "js": lambda u: (u * np.log(u) - (1 + u) * np.log((1 + u) / 2)) / 2,
}


@functools.cache
def jitted(divergence, dtype=np.float64):
    bounds = jax.jit(functools.partial(band_bounds, divergence=divergence))

    def call(log_p, delta):
        with jax.enable_x64(dtype == np.float64):
            return tuple(np.asarray(x) for x in bounds(np.asarray(log_p, dtype), np.asarray(delta, dtype)))

    return call


def kl_reference(log_p, delta):
    """Bisection on log r in long doubles (64 bits of mantissa) on the definition of the binary KL."""
    log_p = log_p.astype(np.longdouble)
    p, q = np.exp(log_p), -np.expm1(log_p)

    def solve(end):
        inside, outside = np.zeros_like(log_p), end
        for _ in range(150):
            middle = (inside + outside) / 2
            value = -p * middle + q * (np.log(q) - np.log(-np.expm1(log_p + middle)))
            inside, outside = np.where(value <= delta, middle, inside), np.where(value <= delta, outside, middle)
        return np.exp(inside)

    return solve(np.full_like(log_p, -200)), solve(-log_p)


LOG_P = np.concatenate(
    [np.log(np.logspace(-12, np.log10(0.5), 60)), np.log1p(-np.logspace(-7, np.log10(0.5), 60))]
).astype(np.float32)


@pytest.mark.parametrize("delta", [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.3, 1.0, 5.0, 50.0])
def test_kl_in_both_precisions(delta):
    delta = np.float32(delta)
    with np.errstate(divide="ignore"):  # the bracket touches q = 1, where the divergence is infinite
        lower, upper = kl_reference(LOG_P, np.longdouble(delta))
    actual = jitted("kl")(LOG_P, delta)
    np.testing.assert_allclose(actual[0], lower.astype(float), rtol=1e-9, atol=1e-80)
    np.testing.assert_allclose(actual[1], upper.astype(float), rtol=1e-9)
    actual = jitted("kl", np.float32)(LOG_P, delta)
    np.testing.assert_allclose(actual[0], lower.astype(float), rtol=5e-6, atol=1e-12)
    np.testing.assert_allclose(actual[1], upper.astype(float), rtol=5e-6)


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.05, 1.0, 50.0])
def test_five_newton_steps_are_enough(delta):
    with jax.enable_x64(True):
        log_p = jnp.asarray(LOG_P, jnp.float64)
        five, many = (band_bounds(log_p, delta, newton_steps=steps) for steps in (5, 30))
    np.testing.assert_allclose(five, many, rtol=1e-12)


def test_landmarks_of_kl():
    """The figures of the paper's analysis: closed form at 1/2, crossings with fixed clips, limits."""
    bounds = jitted("kl")
    lower, upper = bounds(np.log(0.5), 0.05)
    spread = np.sqrt(1 - np.exp(-0.1))
    np.testing.assert_allclose((lower, upper), (1 - spread, 1 + spread), rtol=1e-12)
    for delta, p, value in [(0.05, 0.00714, 10), (0.05, 0.540, 1.28), (0.05, 0.671, 1.2), (0.02, 0.352, 1.28)]:
        np.testing.assert_allclose(bounds(np.log(p), delta)[1], value, rtol=2e-3)
    for delta, p, value in [(0.05, 0.751, 0.8), (0.05, 0.222, 0.5), (0.02, 0.494, 0.8), (0.1, 0.904, 0.8)]:
        np.testing.assert_allclose(bounds(np.log(p), delta)[0], value, rtol=2e-3)
    p = 1e-9
    np.testing.assert_allclose(bounds(np.log(p), 0.05)[1] * p, 1 - np.exp(-0.05), rtol=1e-6)
    np.testing.assert_allclose(bounds(-1e-12, 0.05), (np.exp(-0.05), 1), rtol=1e-9)
    p, small = np.array([0.1, 0.5, 0.9]), 1e-8
    first_order = np.sqrt(2 * small * (1 - p) / p)
    np.testing.assert_allclose(bounds(np.log(p), small)[1] - 1, first_order, rtol=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_complement_symmetry(divergence):
    """The token's fall is the rise of the rest: `1 - p L(p) = (1 - p) U(1 - p)`."""
    p = np.linspace(0.01, 0.99, 99)
    lower, _ = jitted(divergence)(np.log(p), 0.05)
    _, upper = jitted(divergence)(np.log1p(-p), 0.05)
    np.testing.assert_allclose(1 - p * lower, (1 - p) * upper, rtol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_distribution_in_the_ball_leaves_the_interval(divergence):
    """Over whole vocabularies: random new policies, each with its own divergence as the radius."""
    rng = np.random.default_rng(0)
    old = rng.dirichlet(np.full(5, 0.7), 500) + 1e-9
    old /= old.sum(axis=1, keepdims=True)
    new = old * np.exp(rng.normal(size=old.shape) * rng.uniform(0, 2, (500, 1)))
    new /= new.sum(axis=1, keepdims=True)
    radius = (old * F[divergence](new / old)).sum(axis=1)
    lower, upper = jitted(divergence)(np.log(old[:, 0]), radius)
    ratio = new[:, 0] / old[:, 0]
    assert np.all((lower <= ratio * (1 + 1e-9)) & (ratio <= upper * (1 + 1e-9)))
    assert np.mean(np.minimum(ratio - lower, upper - ratio) < 0.3) > 0.2  # and the interval is not just wide


@pytest.mark.parametrize("divergence", DIVERGENCES)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.floats(-25, -1e-4), st.floats(1e-5, 5.0), st.floats(1.0, 3.0))
def test_ordered_monotone_and_tight(divergence, log_p, delta, growth):
    hypothesis.assume(np.exp(log_p) < 1 - 1e-6)
    lower, upper = jitted(divergence)([log_p, log_p], [delta, delta * growth])
    assert np.all((lower >= 0) & (lower <= 1) & (upper >= 1) & (upper <= np.exp(-log_p) * (1 + 1e-12)))
    assert lower[1] <= lower[0] * (1 + 1e-12)
    assert upper[1] >= upper[0] * (1 - 1e-12)
    with jax.enable_x64(True):
        if upper[0] < np.exp(-log_p) * (1 - 1e-6):
            at_upper = binary_divergence(np.float64(log_p), np.float64(log_p + np.log(upper[0])), divergence)
            np.testing.assert_allclose(at_upper, delta, rtol=1e-6)
        if lower[0] > 1e-6:
            at_lower = binary_divergence(np.float64(log_p), np.float64(log_p + np.log(lower[0])), divergence)
            np.testing.assert_allclose(at_lower, delta, rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_binary_divergence_is_the_definition(divergence):
    rng = np.random.default_rng(1)
    p, q = rng.uniform(1e-4, 1 - 1e-4, (2, 300))
    p, q = p.astype(np.longdouble), q.astype(np.longdouble)
    expected = p * F[divergence](q / p) + (1 - p) * F[divergence]((1 - q) / (1 - p))
    with jax.enable_x64(True):
        actual = binary_divergence(np.log(p).astype(float), np.log(q).astype(float), divergence)
        np.testing.assert_allclose(actual, expected.astype(float), rtol=1e-9, atol=1e-13)
    # A move of a thousandth, where the textbook form has no correct digit left in float32.
    near = (np.log(p) + 1e-3 * rng.choice([-1, 1], 300)).astype(np.float32)
    near, log_p = np.minimum(near, -1e-4), np.log(p).astype(np.float32)
    old, new = np.exp(log_p.astype(np.longdouble)), np.exp(near.astype(np.longdouble))
    expected = old * F[divergence](new / old) + (1 - old) * F[divergence]((1 - new) / (1 - old))
    actual = binary_divergence(log_p, near, divergence)
    np.testing.assert_allclose(actual, expected.astype(float), rtol=2e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_that_of_the_dppo_mask(divergence):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        old = np.log(rng.uniform(0.01, 0.99, (40, 25)))
        new = np.minimum(old + rng.normal(size=old.shape) * 0.7, -1e-3)
        advantage = rng.normal(size=40)

        @compiled
        def gradients(new):
            bounds = band_bounds(old, 0.05, divergence)
            keep = dppo_mask(new, old, advantage, 0.05, divergence)
            band = jax.grad(lambda x: clipped_surrogate(x - old, advantage, *bounds).sum())(new)
            dppo = jax.grad(lambda x: masked_surrogate(x, old, advantage, keep, ratio_cap=jnp.inf).sum())(new)
            return keep, band, dppo

        keep, band, dppo = gradients(new)
    assert 0.05 < np.mean(~keep) < 0.5
    np.testing.assert_allclose(band, dppo, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_edges_are_finite(divergence):
    log_p = jnp.array([-jnp.inf, -200.0, -50.0, -1.0, -1e-3, -1e-12, -1e-30, 0.0])
    for delta in (0.0, 1e-6, 0.05, 3.0, 1e4):
        lower, upper = jitted(divergence, np.float32)(log_p, delta)
        assert np.all(np.isfinite(lower) & np.isfinite(upper))
        assert np.all((lower >= 0) & (lower <= 1) & (upper >= 1))
        assert upper[-1] == 1
        if delta == 0.0:
            assert np.all((lower == 1) & (upper == 1))
    capped = compiled(lambda x: band_bounds(x, 0.05, divergence, upper_max=10.0)[1])(log_p)
    np.testing.assert_allclose(capped, np.minimum(jitted(divergence, np.float32)(log_p, 0.05)[1], 10), rtol=1e-6)
    finite = np.array([-80.0, -1.0, -1e-6], np.float32)
    gradient = compiled(jax.grad(lambda x, d: sum(map(jnp.sum, band_bounds(x, d, divergence))), (0, 1)))
    for delta in (0.0, 0.05):
        assert all(np.all(g == 0) for g in gradient(finite, delta))


def test_limits_at_probability_one():
    expected = {"kl": np.exp(-0.3), "tv": 0.7, "chi2": 1, "rkl": 1, "neyman": 1 / 1.3, "hellinger": 0.85**2}
    for divergence, limit in expected.items():
        np.testing.assert_allclose(band_bounds(0.0, 0.3, divergence), (limit, 1), rtol=1e-6)
    # js has no closed form: r log(2 r / (1 + r)) + log(2 / (1 + r)) + (1 - r) log 2 = 2 delta
    r = float(band_bounds(0.0, 0.3, "js")[0])
    assert abs(r * np.log(2 * r / (1 + r)) + np.log(2 / (1 + r)) + (1 - r) * np.log(2) - 0.6) < 1e-5


def test_traced_delta_jit_and_vmap():
    log_p, delta = jnp.log(jnp.array([1e-4, 0.2, 0.9])), jnp.array([0.0, 0.01, 0.5])
    for divergence in ("kl", "chi2", "js"):
        swept = jax.jit(jax.vmap(lambda d, divergence=divergence: band_bounds(log_p, d, divergence)))(delta)
        looped = [band_bounds(log_p, float(d), divergence) for d in delta]
        np.testing.assert_allclose(swept, np.swapaxes(np.asarray(looped), 0, 1), rtol=2e-6)
    assert np.all(np.asarray(jax.jit(band_bounds)(log_p, -1.0)) == 1)  # a traced negative radius leaves no room


def test_half_precision_is_computed_in_float32():
    lower, upper = band_bounds(jnp.log(jnp.array([0.5], jnp.bfloat16)), jnp.asarray(0.05, jnp.bfloat16))
    assert lower.dtype == upper.dtype == jnp.float32


def test_relax_is_the_union():
    lower, upper = relax_bounds(jnp.array([0.5, 0.95]), jnp.array([3.0, 1.1]), 0.2, 0.28)
    np.testing.assert_allclose(lower, [0.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(upper, [3.0, 1.28], rtol=1e-6)


def alpha_half(u):
    return 2 * (1 - jnp.sqrt(u)) - (1 - u)  # hellinger in other words


def test_registered_divergence():

    def limit(delta):
        return jnp.square(1 - 0.5 * delta)

    register_divergence("alpha_half", alpha_half, limit)
    register_divergence("alpha_half", alpha_half, limit)  # again: harmless
    with pytest.raises(ValueError, match="alpha_half"):  # compiled functions hold the first limit
        register_divergence("alpha_half", alpha_half)
    with pytest.raises(ValueError, match="f must be a function"):
        register_divergence("three", 3)
    p = jnp.log(jnp.array([0.001, 0.3, 0.99, 1.0]))
    with jax.enable_x64(True):
        mine, theirs = (band_bounds(p.astype(jnp.float64), 0.05, name) for name in ("alpha_half", "hellinger"))
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    register_divergence("alpha_half_constant", alpha_half, 0.5)
    assert band_bounds(0.0, 0.05, "alpha_half_constant")[0] == 0.5
    with pytest.raises(ValueError, match="alpha_half"):
        register_divergence("alpha_half", lambda u: (u - 1) ** 2, 1.0)
    with pytest.raises(ValueError, match="kl"):
        register_divergence("kl", alpha_half, 1.0)


def test_bad_input():
    with pytest.raises(ValueError, match="delta must not be negative"):
        band_bounds(-1.0, -0.1)
    with pytest.raises(ValueError, match=r"divergence must be one of .*'kl'.*, got 'renyi'"):
        band_bounds(-1.0, 0.1, "renyi")
    with pytest.raises(ValueError, match=r"log_prob must be log-probabilities .* 0\.5"):
        band_bounds(jnp.array([-1.0, 0.5]), 0.1)
    with pytest.raises(ValueError, match="new_log_prob"):
        binary_divergence(-1.0, 0.5)
    with pytest.raises(ValueError, match="old_log_prob, new_log_prob must have one shape"):
        binary_divergence(-jnp.ones(3), -jnp.ones((3, 1)))
    for options, message in (
        ({"upper_max": 0.5}, "upper_max must be at least 1, got 0.5"),
        ({"newton_steps": 0}, "newton_steps must be at least 1, got 0"),
        ({"delta": float("nan")}, "delta must not be negative, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            band_bounds(-1.0, **({"delta": 0.1} | options))
    upper = jax.jit(lambda cap: band_bounds(-1.0, 0.1, upper_max=cap)[1])(0.5)
    assert upper == 1.0  # traced: clamped
    band_bounds(1e-7, 0.1)  # rounding is forgiven


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_of_distant_policies_is_finite(divergence):
    log_p = jnp.array([-jnp.inf, -100.0, -79.0, -50.0, -1.0, -0.7, -1e-3, 0.0])
    old, new = (x.ravel() for x in jnp.meshgrid(log_p, log_p))
    value, gradient = jax.vmap(jax.value_and_grad(lambda n, o: binary_divergence(o, n, divergence)))(new, old)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))


def test_chi2_of_a_tail_token_does_not_overflow():
    value, slope = jax.value_and_grad(lambda new: binary_divergence(-50.0, new, "chi2"))(-0.7)
    p, q = np.exp(-50.0), np.exp(-0.7)
    np.testing.assert_allclose(value, (q - p) ** 2 / (p * (1 - p)), rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * (q - p) * q / (p * (1 - p)), rtol=1e-5)
