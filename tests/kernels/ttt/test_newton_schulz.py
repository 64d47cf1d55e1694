"""Newton-Schulz: where singular values end, scale, zero, gradients; golden values are in `test_golden.py`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollax.kernels.ttt import FIXED5, MUON5, newton_schulz


@pytest.mark.parametrize(("coeffs", "lowest", "highest"), [(MUON5, 0.95, 1.15), (FIXED5, 0.6, 1.25)])
@pytest.mark.parametrize("shape", [(16, 12), (12, 16)])
def test_singular_values_end_near_one(coeffs, lowest, highest, shape):
    g = jax.random.normal(jax.random.key(0), (3, *shape))
    out = newton_schulz(g, coeffs=coeffs)
    values = np.linalg.svd(out, compute_uv=False)
    assert np.all((values > lowest) & (values < highest))
    u, _, vt = np.linalg.svd(np.asarray(g), full_matrices=False)
    across = u.mT @ np.asarray(out) @ vt.mT  # the same singular vectors: diagonal
    np.testing.assert_allclose(across, across * np.eye(12), atol=1e-4)


def test_scale_does_not_matter_but_zero_stays():
    g = jax.random.normal(jax.random.key(1), (6, 9))
    np.testing.assert_allclose(newton_schulz(1e3 * g), newton_schulz(g), rtol=1e-4, atol=1e-5)
    value, gradient = jax.value_and_grad(lambda g: newton_schulz(g).sum())(jnp.zeros((6, 9)))
    # Near zero the map is linear: every step multiplies by its first coefficient, after the division by eps.
    np.testing.assert_allclose(gradient, np.prod([a for a, _, _ in MUON5]) / 1e-7, rtol=1e-4)
    assert value == 0


# Golden gradients have taller matrices.
@pytest.mark.parametrize("shape", [(3, 5), pytest.param((5, 3), marks=pytest.mark.slow), (2, 4, 4)])
def test_gradients_are_finite_differences(shape):
    with jax.enable_x64(True):
        g = jax.random.normal(jax.random.key(2), shape)
        check_grads(jax.jit(newton_schulz), (g,), 1, ["rev"], 1e-6, 1e-6, eps=1e-6)
        check_grads(jax.jit(partial(newton_schulz, coeffs=FIXED5)), (g,), 1, ["rev"], 1e-6, 1e-6, eps=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"g must be \[..., m, n\], got \(3,\)"):
        newton_schulz(jnp.zeros(3))
    with pytest.raises(ValueError, match="coeffs must be triples"):
        newton_schulz(jnp.zeros((3, 3)), coeffs=((1, 2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": np.zeros((3, 3), np.int32)}, "g must be floating point, got int32"),
        ({"dtype": "int32"}, "dtype must be floating point, got int32"),
        ({"eps": -1.0}, "eps must be at least 0 and static, got -1.0"),
    ],
)
def test_types_and_eps(change, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(**{"g": np.zeros((3, 3), np.float32)} | change)
    with pytest.raises(ValueError, match=r"eps must be at least 0 and static, got .*float32\[\]"):
        jax.eval_shape(lambda eps: newton_schulz(jnp.zeros((3, 3)), eps=eps), 1e-7)


def test_norms_beyond_the_squares_of_float16():
    g = 1000 * jnp.eye(3, dtype=jnp.float16)
    np.testing.assert_allclose(newton_schulz(g), newton_schulz(g.astype(jnp.float32)), atol=0.03)
