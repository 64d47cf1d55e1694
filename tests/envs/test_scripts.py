"""Scripted episodes against a loop in Python over the same keys."""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs import household, persona_chat, scripted_episode


def loop(key, environment, act, **start):
    """Turn by turn, until the end."""
    reset_key, act_key, step_key = jax.random.split(key, 3)
    state, observation = environment.reset(reset_key, **start)
    step = jax.jit(environment.step)
    for i in range(environment.spec.max_turns):
        action = act(jax.random.fold_in(act_key, i), state)
        after, result = step(jax.random.fold_in(step_key, i), state, action)
        yield observation, action, result, after
        if result.terminated | result.truncated:
            return
        state, observation = after, result.observation


def check(environment, act, key, **start):
    episode = jax.jit(lambda key: scripted_episode(key, environment, act, **start))(key)
    turns = list(loop(key, environment, jax.jit(act), **start))
    kept = jax.tree.map(lambda *rows: jnp.stack(rows), *[turn[:3] for turn in turns])
    np.testing.assert_array_equal(episode.mask, np.arange(environment.spec.max_turns) < len(turns))
    found = jax.tree.map(lambda x: x[: len(turns)], (episode.observation, episode.action, episode.step))
    for a, b in zip(jax.tree.leaves((found, episode.state)), jax.tree.leaves((kept, turns[-1][3])), strict=True):
        np.testing.assert_array_equal(a, b)
    return len(turns)


def test_an_episode_is_the_loop_and_stops_where_it_ends():
    environment = household()
    assert check(environment, environment.expert, jax.random.key(0)) == 4
    assert check(environment, lambda key, state: jnp.asarray([0]), jax.random.key(0), lesson=jnp.asarray([3, 0])) == 5
    environment = persona_chat()
    assert {check(environment, environment.demonstrate, jax.random.key(i), persona=2) for i in range(4)} <= {1, 2}
