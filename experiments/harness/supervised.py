"""Supervised steps in one scan: what gives a small model its start before reinforcement learning.

A start that takes minutes is kept on disk, under the settings that it came from.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "bases"


def fit(key: jax.Array, params: Any, loss: Callable, *, steps: int, optimizer: optax.GradientTransformation) -> Any:
    """Parameters after `steps` steps on `loss(params, key)`, each with a key of its own."""

    def step(carry, index):
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, index))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1, steps + 1))
    return params


def cached(name: str, wanted: dict[str, Any], make: Callable[[], Any], folder: Path = CACHE) -> Any:
    """`make()`, jitted, or what an earlier call with the same name and settings kept on disk.

    Args:
      name: what the file's name begins with.
      wanted: all settings that `make` depends on, fit for JSON; the version of JAX is added.
      make: gives a tree of arrays.

    Returns:
      The tree, NumPy arrays.
    """
    settings = json.dumps(wanted | {"jax": jax.__version__}, sort_keys=True)
    file = folder / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"
    leaves, tree = jax.tree.flatten(jax.eval_shape(make))
    if file.is_file():
        with np.load(file) as saved:
            return jax.tree.unflatten(tree, [saved[str(i)] for i in range(len(leaves))])
    made = jax.device_get(jax.jit(make)())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp.npz")
    np.savez(partial, **{str(i): x for i, x in enumerate(jax.tree.leaves(made))})
    partial.replace(file)  # whole or not at all
    return made
