"""Losses of value functions: V_0's golden numbers and gradient, pairs, the clipped critic, explained variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives.value_losses import explained_variance, pair_index, v0_loss, value_loss
from rollax.tests.support import GOLDEN


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "v05.npz") as file:
        return dict(file)


def test_v0_golden(golden):
    with jax.enable_x64(True):
        logits, targets = jnp.asarray(golden["v0_logits"]), jnp.asarray(golden["v0_targets"])
        pairs = pair_index(targets)
        for name, how in {
            "pair": {"alpha": 1.0},
            "ce_soft": {"alpha": 0.0},
            "ce_hard": {"alpha": 0.0, "hard": True},
            "combined_025": {},
        }.items():
            for given in (logits, logits[:, 1] - logits[:, 0]):
                np.testing.assert_allclose(v0_loss(given, targets, pairs, **how), golden[f"v0_loss_{name}"], rtol=1e-12)
        gradient = jax.grad(v0_loss)(logits, targets, pairs)
        np.testing.assert_allclose(gradient, golden["v0_loss_combined_grad"], atol=1e-12)


def test_what_the_context_says_cancels_in_the_ranking():
    margin, targets = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([0.9, 0.2, 0.6, 0.4])
    pairs = pair_index(targets)
    ranking = v0_loss(margin, targets, pairs, alpha=1.0)
    np.testing.assert_allclose(v0_loss(margin + 5.0, targets, pairs, alpha=1.0), ranking, rtol=1e-6)
    gradient = jax.grad(v0_loss)(margin, targets, pairs, alpha=1.0)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-6)
    np.testing.assert_array_equal(np.sign(gradient), [-1, 1, -1, 1])


def test_pairs_cycle_the_rarer_class():
    targets = jnp.array([0.1, 0.9, 0.0, 0.5, 0.4, 0.3])
    expected = [[1, 0], [3, 2], [1, 4], [3, 5], [-1, -1], [-1, -1]]
    np.testing.assert_array_equal(pair_index(targets), expected)
    np.testing.assert_array_equal(jax.jit(pair_index)(1 - 0.99 * targets)[:4, 1], [1, 1, 1, 1])
    masked = pair_index(targets, jnp.array([True, True, False, False, True, True]))
    np.testing.assert_array_equal(masked, [[1, 0], [1, 4], [1, 5], [-1, -1], [-1, -1], [-1, -1]])
    rows = jnp.stack([targets, 1 - targets])
    np.testing.assert_array_equal(jax.vmap(pair_index)(rows)[1], pair_index(1 - targets))


@pytest.mark.parametrize("targets", [jnp.full(4, 0.7), jnp.full(4, 0.2)])
def test_queries_of_one_class_have_no_ranking(targets):
    pairs, margin = pair_index(targets), jnp.array([0.3, -1.0, 2.0, 0.1])
    assert (pairs == -1).all()
    assert v0_loss(margin, targets, pairs, alpha=1.0) == 0
    loss, gradient = jax.value_and_grad(v0_loss)(margin, targets, pairs)
    np.testing.assert_allclose(loss, 0.75 * v0_loss(margin, targets, pairs, alpha=0.0), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_masked_queries_do_not_count():
    margin, targets = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([0.9, 0.2, 0.6, 0.4])
    mask = jnp.array([True, True, False, True])
    kept = np.array([0, 1, 3])
    expected = v0_loss(margin[kept], targets[kept], pair_index(targets[kept]))
    np.testing.assert_allclose(v0_loss(margin, targets, pair_index(targets, mask), mask=mask), expected, rtol=1e-6)
    gradient = jax.grad(v0_loss)(margin, targets, pair_index(targets, mask), mask=mask)
    assert gradient[2] == 0 and (gradient[kept] != 0).all()


def test_value_loss():
    value, target, old = jnp.array([1.0, 1.0, -2.0]), jnp.array([0.0, 3.0, -1.0]), jnp.array([0.5, 0.9, -1.0])
    np.testing.assert_allclose(value_loss(value, target), [0.5, 2.0, 0.5])
    # Moved .5 and .1 with clip .2: the first would be 0.7^2 / 2, which is less; the third is held at -1.2.
    np.testing.assert_allclose(value_loss(value, target, old, 0.2), [0.5, 2.0, 0.5])
    overshoot = jnp.array([2.9, 0.0])
    loss = lambda v: value_loss(v, jnp.array([3.0, 3.0]), jnp.zeros(2), 0.2)  # noqa: E731
    np.testing.assert_allclose(loss(overshoot), [0.5 * 2.8**2, 0.5 * 3.0**2], rtol=1e-6)
    gradient = jax.grad(lambda v: loss(v).sum())(overshoot)
    np.testing.assert_allclose(gradient, [0.0, -3.0])  # beyond the clip nothing pulls further
    assert not jax.grad(lambda t: value_loss(value, t).sum())(target).any()


def test_explained_variance():
    target, mask = jnp.array([[0.0, 1.0, 2.0, jnp.inf]]), jnp.array([[1, 1, 1, 0]])
    value = jnp.array([[0.0, 1.0, 2.0, jnp.nan]])
    assert explained_variance(value, target, mask) == 1
    np.testing.assert_allclose(explained_variance(jnp.full((1, 4), 7.0), target, mask), 0, atol=1e-6)
    np.testing.assert_allclose(explained_variance(-value, target, mask), -3, rtol=1e-6)
    assert explained_variance(value, jnp.ones((1, 4)), mask) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="value, target must have one shape"):
        value_loss(jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        value_loss(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), 0.0)
    with pytest.raises(ValueError, match="old_value: expected the values of the rollout"):
        value_loss(jnp.zeros(3), jnp.zeros(3), clip=0.2)
    with pytest.raises(ValueError, match=r"targets must be \[Q\], got \(2, 2\)"):
        pair_index(jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"logits must be \[Q\] or \[Q, 2\] and targets \[Q\], got \(3, 3\)"):
        v0_loss(jnp.zeros((3, 3)), jnp.zeros(3), jnp.zeros((1, 2), int))
    with pytest.raises(ValueError, match=r"pair_index must be int \[P, 2\], got float32 \(1, 2\)"):
        v0_loss(jnp.zeros(3), jnp.zeros(3), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\], got 0.0 to 1.5"):
        v0_loss(jnp.zeros(2), jnp.array([0.0, 1.5]), jnp.zeros((1, 2), int))
