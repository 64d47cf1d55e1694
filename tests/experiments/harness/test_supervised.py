"""Supervised steps in one scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.experiments.harness.supervised import fit


def test_fit_finds_a_minimum_and_gives_every_step_a_key():
    loss = lambda x, key: (x - 2) ** 2 + 0 * jax.random.normal(key)  # noqa: E731
    found = fit(jax.random.key(0), jnp.float32(0), loss, steps=200, optimizer=optax.adam(0.1))
    np.testing.assert_allclose(found, 2, atol=1e-2)
    noisy = lambda x, key: x * jnp.sign(jax.random.normal(key))  # noqa: E731
    walk = lambda i: fit(jax.random.key(i), jnp.float32(0), noisy, steps=50, optimizer=optax.adam(0.1))  # noqa: E731
    walked = [float(walk(i)) for i in (0, 1)]
    assert walked[0] != walked[1]
    assert max(map(abs, walked)) < 4.9  # 5 if all keys were the same
