"""Supervised steps in one scan: what gives a small model its start before reinforcement learning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def fit(key: jax.Array, params: Any, loss: Callable, *, steps: int, optimizer: optax.GradientTransformation) -> Any:
    """Parameters after `steps` steps on `loss(params, key)`, each with a key of its own."""

    def step(carry, index):
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, index))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1, steps + 1))
    return params
