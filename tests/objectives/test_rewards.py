"""Reward shaping, dynamic sampling and pass@k (against counting subsets)."""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import dynamic_sampling_mask, overlong_penalty, pass_at_k


def test_overlong():
    length = jnp.array([0, 24, 26, 32, 40])
    np.testing.assert_allclose(overlong_penalty(length, 32, 8), [0, 0, -0.25, -1, -1])
    np.testing.assert_allclose(overlong_penalty(length, 32, 8, floor=None), [0, 0, -0.25, -1, -2])


def test_dynamic_sampling():
    score, ids = jnp.array([1.0, 0.0, 1.0, 1.0, 0.1, 0.1, 0.1]), jnp.array([0, 0, 1, 1, 2, 2, 2])
    keep = jax.jit(lambda s: dynamic_sampling_mask(s, ids, num_groups=3))(score)
    np.testing.assert_array_equal(keep, [1, 1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_pass_at_k(k):
    n, c = 16, np.arange(17)
    expected = [1 - comb(n - i, k) / comb(n, k) for i in c]
    np.testing.assert_allclose(jax.jit(lambda c: pass_at_k(c, n, k))(c), expected, rtol=1e-5, atol=1e-6)
    many = pass_at_k(jnp.array([3]), jnp.array([2000]), k)
    np.testing.assert_allclose(many, [1 - comb(1997, k) / comb(2000, k)], rtol=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"k must be in 1\.\.num_samples, got k=5 and num_samples=4"):
        pass_at_k(jnp.array([1]), 4, 5)
    with pytest.raises(ValueError, match="k must be"):
        pass_at_k(jnp.array([1]), 4, 0)


def test_impossible_numbers():
    with pytest.raises(ValueError, match="cache must be positive, got 0"):
        overlong_penalty(jnp.array([10]), 32, 0)
    with pytest.raises(ValueError, match=r"k must be in 1..num_samples, got k=5"):
        pass_at_k(2, np.int64(3), 5)
    with pytest.raises(ValueError, match="num_correct must be at most num_samples=3, got 4"):
        pass_at_k(4, 3, 2)
