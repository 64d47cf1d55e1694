"""Whole episodes of a script, such as an expert or a demonstrator: what a supervised start imitates.

A script sees the environment's state, hidden facts included; whatever reads its episodes sees observations and actions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rollax.envs.environment import Environment, Step


class ScriptedEpisode(NamedTuple):
    """K turns; nothing counts after the end.

    Attributes:
      observation: what was acted on, `[K, ...]`.
      action: `[K, ...]`.
      mask: bool `[K]`, the turn belongs to the episode.
      step: what came of each turn, `[K, ...]`.
      state: the last state.
    """

    observation: Any
    action: jax.Array
    mask: jax.Array
    step: Step
    state: Any


def scripted_episode(key: jax.Array, environment: Environment, act: Callable, **start: Any) -> ScriptedEpisode:
    """One episode from reset to its end; `vmap` it over keys.

    Args:
      environment: with a `TokenSpec`, whose `max_turns` is K; its states freeze when an episode has ended.
      act: `act(key, state) -> action`, for example `environment.expert`.
      **start: of `environment.reset`, beside the key.
    """
    reset_key, act_key, step_key = jax.random.split(key, 3)
    state, observation = environment.reset(reset_key, **start)

    def turn(carry, index):
        state, observation, alive = carry
        action = act(jax.random.fold_in(act_key, index), state)
        state, step = environment.step(jax.random.fold_in(step_key, index), state, action)
        goes_on = alive & ~(step.terminated | step.truncated)
        return (state, step.observation, goes_on), (observation, action, alive, step)

    carry = (state, observation, jnp.ones((), bool))
    (state, *_), kept = jax.lax.scan(turn, carry, jnp.arange(environment.spec.max_turns))
    return ScriptedEpisode(*kept, state)
