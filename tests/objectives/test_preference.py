"""Preference losses: fixed points, gradients' signs, and the conventions of the libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import dpo_loss, ipo_loss, kto_loss, kto_reference_point


def test_dpo():
    chosen, rejected = jnp.array([1.0, 0.0, 5000.0]), jnp.array([0.0, 0.0, -5000.0])
    loss = dpo_loss(chosen, rejected, 0.5)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-0.5)), np.log(2), 0], rtol=1e-6)
    assert np.all(np.isfinite(dpo_loss(rejected, chosen, 0.5)))
    smoothed = dpo_loss(chosen, rejected, 0.5, label_smoothing=0.2)
    np.testing.assert_allclose(smoothed, 0.8 * loss + 0.2 * dpo_loss(rejected, chosen, 0.5), rtol=1e-6)
    # cDPO is least where the margin's odds are those of the labels.
    margin = jnp.log(0.8 / 0.2) / 0.5
    gradient = jax.grad(lambda x: dpo_loss(x, 0.0, 0.5, label_smoothing=0.2))(margin)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_ipo():
    np.testing.assert_allclose(ipo_loss(jnp.array([7.0]), jnp.array([2.0]), 0.1), [0.0], atol=1e-6)
    by_token = ipo_loss(jnp.array([14.0]), jnp.array([6.0]), 0.1, lengths=(jnp.array([2]), jnp.array([3])))
    np.testing.assert_allclose(by_token, [0.0], atol=1e-6)
    assert np.isfinite(ipo_loss(jnp.array([0.0]), jnp.array([0.0]), 0.1, lengths=(jnp.array([0]), jnp.array([0])))[0])


def test_kto():
    assert kto_reference_point(jnp.array([-3.0, 1.0])) == 0
    z0 = kto_reference_point(jnp.array([3.0, 1.0]))
    assert z0 == 2 and jax.grad(kto_reference_point)(jnp.array(1.0)) == 0
    score, good = jnp.array([2.0, 2.0, 4.0, 4.0]), jnp.array([True, False, True, False])
    loss = kto_loss(score, good, z0, 1.0, desirable_weight=2.0)
    gate = 1 / (1 + np.exp(2.0))
    np.testing.assert_allclose(loss, [1.0, 0.5, 2 * gate, 1 - gate], rtol=1e-6)
    gradient = jax.grad(lambda s: kto_loss(s, good, z0).sum())(score)
    np.testing.assert_array_equal(np.sign(gradient), [-1, 1, -1, 1])


def test_bad_input():
    with pytest.raises(ValueError, match=r"chosen, rejected must have one shape"):
        dpo_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"chosen, rejected must have one shape"):
        ipo_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1/2\), got 1.5"):
        dpo_loss(jnp.zeros(3), jnp.zeros(3), label_smoothing=1.5)
    with pytest.raises(ValueError, match="chosen, chosen_length, rejected_length must have one shape"):
        ipo_loss(jnp.zeros(3), jnp.zeros(3), lengths=(jnp.ones(3), jnp.ones((3, 1))))
    with pytest.raises(ValueError, match="score, desirable must have one shape"):
        kto_loss(jnp.zeros(3), jnp.zeros((3, 1)), 0.0)
    with pytest.raises(ValueError, match=r"z0 must be a scalar, got shape \(3, 1\)"):
        kto_loss(jnp.zeros(3), jnp.zeros(3), jnp.zeros((3, 1)))
