"""Environments that run on the host, outside of jit, with the token-level protocol of the others, N at once.

The compiled ones are pure functions; a game that lives in a Python object is not, and no program can hold it. What
plays them is `agents.host_rollout`: the same policy, and a step of all N between two calls of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rollax.envs.environment import Environment, Step, Tokens, TokenSpec


class HostEnvironment(NamedTuple):
    """N environments of tokens on the host; all arrays are numpy's, with N rows.

    Attributes:
      reset: `reset(keys [N]) -> (state, Tokens(ids int32 [N, T], length int32 [N]))`; equal keys, equal starts.
      step: `step(keys [N], state, action int32 [N, A], alive bool [N]) -> (state, Step)`, each field with N rows. Rows
        that are not alive are over: no tokens, reward, flags and info 0. The old state may not be used again, as games
        change in place.
      spec: as of the compiled environments.
      expert: `expert(keys, state) -> action int32 [N, A]`; None where none is known.
      release: `release(state)`, when the episodes are done with: what is costly to make serves the next reset.
    """

    reset: Callable[[jax.Array], tuple[Any, Tokens]]
    step: Callable[[jax.Array, Any, np.ndarray, np.ndarray], tuple[Any, Step]]
    spec: TokenSpec
    expert: Callable[[jax.Array, Any], np.ndarray] | None = None
    release: Callable[[Any], None] = lambda state: None


def on_host(env: Environment) -> HostEnvironment:
    """A compiled token environment behind the interface of the others; its episodes are the same to the last bit.

    Raises:
      ValueError: an environment without a `TokenSpec`.
    """
    if not isinstance(env.spec, TokenSpec):
        raise ValueError(f"env: expected a token environment, got one with the spec {env.spec!r}")
    reset_rows, step_rows = jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))
    expert = env.expert and jax.jit(jax.vmap(env.expert))

    def reset(keys):
        state, observation = reset_rows(keys)
        return state, jax.device_get(observation)

    def step(keys, state, action, alive):
        state, step = step_rows(keys, state, action)
        return state, silence(jax.device_get(step), alive, env.spec.pad_id)

    return HostEnvironment(reset, step, env.spec, expert and (lambda keys, state: np.asarray(expert(keys, state))))


def silence(step: Step, alive: np.ndarray, pad_id: int) -> Step:
    """The step without what rows that are over would say."""

    def keep(x, blank=0):
        return np.where(alive.reshape(-1, *(1,) * (x.ndim - 1)), x, np.asarray(blank, x.dtype))

    ids, length = step.observation
    return Step(Tokens(keep(ids, pad_id), keep(length)), *jax.tree.map(keep, tuple(step[1:])))
