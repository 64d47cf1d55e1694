"""Mismatch corrections by hand on three rows: a mild one, a broken one, an empty one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import (
    icepop_weights,
    masked_weights,
    opsm_mask,
    rejection_mask,
    sequence_mask,
    truncated_weights,
)

W = jnp.array([[1.1, 0.9, 1.0, 7.0], [8.0, 0.1, 1.5, 1.0], [3.0, 3.0, 3.0, 3.0]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
SAMPLER = jnp.full((3, 4), -9.0).at[0, 3].set(-jnp.inf)  # what stands behind the mask is ignored
OLD = SAMPLER + jnp.log(W)
LOGS = (OLD, SAMPLER, MASK)


def test_truncated():
    np.testing.assert_allclose(truncated_weights(*LOGS), [[1.1, 0.9, 1, 0], [2, 0.1, 1.5, 1], [0, 0, 0, 0]], rtol=1e-5)
    sequence = truncated_weights(*LOGS, level="sequence", cap=1.1)
    np.testing.assert_allclose(sequence, [[0.99] * 3 + [0], [1.1] * 4, [0] * 4], rtol=1e-5)
    token = truncated_weights(*LOGS, normalize=True)
    np.testing.assert_allclose(token.sum() / MASK.sum(), 1, rtol=1e-6)
    sequence = truncated_weights(*LOGS, level="sequence", cap=1.1, normalize=True)
    np.testing.assert_allclose(sequence[:2, 0].mean(), 1, rtol=1e-6)


def test_icepop():
    np.testing.assert_allclose(icepop_weights(*LOGS), [[1.1, 0.9, 1, 0], [0, 0, 1.5, 1], [0] * 4], rtol=1e-5)


def test_sequence_mask():
    keep = sequence_mask(*LOGS, high=1.15)
    np.testing.assert_array_equal(keep, [[1, 1, 1, 0], [0] * 4, [0] * 4])
    keep = sequence_mask(*LOGS, low=0.999, high=1.1, statistic="geometric")  # 0.99^(1/3) and 1.2^(1/4)
    np.testing.assert_array_equal(keep, [[0] * 4, [1] * 4, [0] * 4])


def test_masked_weights_by_geometric_mean():
    weight = masked_weights(*LOGS, low=0.999, high=1.1, statistic="geometric")
    np.testing.assert_allclose(weight, [[0] * 4, [1.2**0.25] * 4, [0] * 4], rtol=1e-5)


def test_rejection():
    np.testing.assert_array_equal(
        rejection_mask(*LOGS, low=np.log(0.5), high=np.log(2)), [[1, 1, 1, 0], [0, 0, 1, 1], [0] * 4]
    )
    for level, high in (("sequence_mean", 0.1), ("sequence_sum", 0.1), ("sequence_max", 0.1)):
        keep = rejection_mask(*LOGS, statistic="k3", level=level, high=high)
        np.testing.assert_array_equal(keep, [[1, 1, 1, 0], [0] * 4, [0] * 4])
    k2 = 0.5 * np.log([1.1, 0.9, 1.0]) ** 2
    for level, edge in (("sequence_mean", k2.mean()), ("sequence_sum", k2.sum()), ("sequence_max", k2.max())):
        for factor, kept in ((1.01, 3), (0.99, 0)):
            keep = rejection_mask(*LOGS, statistic="k2", level=level, high=edge * factor)
            assert keep[0].sum() == kept


def test_opsm():
    advantage = jnp.array([-1.0, -1.0, 1.0])
    new = OLD - jnp.array([[0.1], [0.5], [0.5]])
    keep = opsm_mask(new, OLD, advantage, jnp.ones_like(MASK).at[0, 3].set(0), threshold=0.2)
    np.testing.assert_array_equal(keep, [[1, 1, 1, 0], [0] * 4, [1] * 4])
    keep = opsm_mask(new, OLD, -advantage, MASK, threshold=0.2)
    np.testing.assert_array_equal(keep, MASK)


def test_no_gradient_and_jit():
    gradient = jax.jit(jax.grad(lambda x: truncated_weights(x, SAMPLER, MASK).sum() + icepop_weights(*LOGS).sum()))(OLD)
    assert np.all(np.asarray(gradient) == 0)


def test_bad_input():
    with pytest.raises(ValueError, match="level must be 'token' or 'sequence', got 'row'"):
        truncated_weights(*LOGS, level="row")
    with pytest.raises(ValueError, match="statistic must be 'product' or 'geometric'"):
        sequence_mask(*LOGS, statistic="mean")
    with pytest.raises(ValueError, match="statistic must be one of"):
        rejection_mask(*LOGS, statistic="k4")
    with pytest.raises(ValueError, match="level must be 'token', 'sequence_mean'"):
        rejection_mask(*LOGS, level="row")
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        icepop_weights(OLD, SAMPLER, MASK[:, :2])


def test_masked_weights_keep_the_weight_inside():
    old = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.9]]))
    sampler = jnp.log(jnp.array([[0.4, 0.5], [0.3, 0.4]]))
    mask = jnp.ones((2, 2))
    by_sequence = masked_weights(old, sampler, mask)
    np.testing.assert_allclose(by_sequence, [[1.25, 1.25], [0, 0]], rtol=1e-6)  # 6.75 is above 3
    by_token = masked_weights(old, sampler, mask, level="token", high=2.5)
    np.testing.assert_allclose(by_token, [[1.25, 1.0], [0, 2.25]], rtol=1e-6)
    keep = sequence_mask(old, sampler, mask)
    weight = truncated_weights(old, sampler, mask, cap=jnp.inf, level="sequence")
    np.testing.assert_allclose(by_sequence, jnp.where(keep, weight, 0), rtol=1e-6)
