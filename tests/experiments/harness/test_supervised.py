"""Supervised steps in one scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.experiments.harness.supervised import cached, fit


def test_fit_finds_a_minimum_and_gives_every_step_a_key():
    loss = lambda x, key: (x - 2) ** 2 + 0 * jax.random.normal(key)  # noqa: E731
    found = fit(jax.random.key(0), jnp.float32(0), loss, steps=200, optimizer=optax.adam(0.1))
    np.testing.assert_allclose(found, 2, atol=1e-2)
    noisy = lambda x, key: x * jnp.sign(jax.random.normal(key))  # noqa: E731
    walk = lambda i: fit(jax.random.key(i), jnp.float32(0), noisy, steps=50, optimizer=optax.adam(0.1))  # noqa: E731
    walked = [float(walk(i)) for i in (0, 1)]
    assert walked[0] != walked[1]
    assert max(map(abs, walked)) < 4.9  # 5 if all keys were the same


def test_a_start_is_kept_under_its_settings(tmp_path):
    made = lambda number: lambda: {"a": (jnp.arange(3.0), jnp.int32(number))}  # noqa: E731
    first = cached("toy", {"steps": 3}, made(1), tmp_path)
    again = cached("toy", {"steps": 3}, made(2), tmp_path)  # not made again
    assert jax.tree.structure(first) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert again["a"][1] == 1 and again["a"][1].dtype == np.int32
    assert cached("toy", {"steps": 4}, made(2), tmp_path)["a"][1] == 2
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob("*.tmp.npz"))
