"""KL estimators: what they are in expectation, as values and as gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import kl_estimate, ratio_weighted_kl

LOGITS, REF = jnp.array([0.3, -1.0, 0.8, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.0]))


def true_kl(logits):
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - REF))


def expected(logits, kind):
    """Mean of the estimator over tokens of the policy, whose sampling carries no gradient."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * kl_estimate(log_p, REF, kind))


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_unbiased_values(kind):
    np.testing.assert_allclose(expected(LOGITS, kind), true_kl(LOGITS), rtol=1e-5)


def test_gradients_in_expectation():
    true = jax.grad(true_kl)(LOGITS)
    for kind in ("k2", "k1+", "k3+"):
        np.testing.assert_allclose(jax.grad(expected)(LOGITS, kind), true, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(LOGITS, "k1"), 0, atol=1e-6)
    forward = jax.grad(lambda x: -jnp.sum(jnp.exp(REF) * jax.nn.log_softmax(x)))(LOGITS)
    np.testing.assert_allclose(jax.grad(expected)(LOGITS, "k3"), forward, rtol=1e-4, atol=1e-6)


def test_ratio_weighting_is_unbiased_off_policy():
    old = jax.nn.log_softmax(jnp.array([0.0, 0.5, 0.2, -1.0]))

    def loss(logits):
        return jnp.sum(jnp.exp(old) * ratio_weighted_kl(jax.nn.log_softmax(logits), old, REF))

    np.testing.assert_allclose(loss(LOGITS), true_kl(LOGITS), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(LOGITS), jax.grad(true_kl)(LOGITS), rtol=1e-4, atol=1e-6)


def test_clips_and_abs():
    new, ref = jnp.array([-30.0, -1.0]), jnp.array([-1.0, -30.0])
    np.testing.assert_allclose(kl_estimate(new, ref, "k3", log_ratio_clip=20.0, value_clip=10.0), [10, 10])
    np.testing.assert_allclose(kl_estimate(new, ref, "abs"), [29, 29])
    gradient = jax.grad(lambda x: kl_estimate(x, ref, "abs").sum())
    np.testing.assert_array_equal(gradient(jnp.array([-1.0, -31.0])), [0, -1])
    close = kl_estimate(jnp.float32(-1.0), jnp.float32(-1.0001), "k3")  # 5e-9, below the rounding of e^d
    np.testing.assert_allclose(close, 0.5 * 1e-8, rtol=2e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be one of"):
        kl_estimate(LOGITS, REF, "k4")


@pytest.mark.parametrize("kind", ["k3", "k3+"])
def test_far_references_stay_finite(kind):
    new, ref = jnp.array([-200.0, -1.0]), jnp.array([-1.0, -200.0])
    for clip in (None, 10.0):
        value, slope = jax.value_and_grad(lambda x, c=clip: kl_estimate(x, ref, kind, value_clip=c).sum())(new)
        assert np.isfinite(value) and np.all(np.isfinite(slope))
    np.testing.assert_allclose(ratio_weighted_kl(new, new, ref, kind, log_ratio_clip=None, value_clip=10.0), [10, 10])


def test_far_ratios_stay_finite():
    for new, old, ref in ((-200.0, -0.1, -0.1), (-0.1, -200.0, -0.1), (-0.1, -0.1, -200.0)):
        value, slope = jax.value_and_grad(lambda x, old=old, ref=ref: ratio_weighted_kl(x, old, ref))(new)
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope)
    with pytest.raises(ValueError, match=r"log_prob, ref_log_prob must have one shape"):
        kl_estimate(jnp.zeros((3, 1)), jnp.zeros(4))
