"""Scripted episodes against a loop in Python over the same keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import household, persona_chat, scripted_episode


def loop(key, environment, act, **start):
    """Turn by turn, until the end."""
    reset_key, act_key, step_key = jax.random.split(key, 3)
    state, observation = jax.jit(environment.reset)(reset_key, **start)
    step = jax.jit(environment.step)
    for i in range(environment.spec.max_turns):
        action = act(jax.random.fold_in(act_key, i), state)
        after, result = step(jax.random.fold_in(step_key, i), state, action)
        yield observation, action, result, after
        if result.terminated | result.truncated:
            return
        state, observation = after, result.observation


def check(environment, act, seeds, **start):
    """The lengths of the episodes."""
    run, lengths = jax.jit(lambda key: scripted_episode(key, environment, act, **start)), []
    for key in map(jax.random.key, seeds):
        episode = jax.device_get(run(key))
        turns = list(loop(key, environment, jax.jit(act), **start))
        kept = jax.tree.map(lambda *rows: np.stack(rows), *[turn[:3] for turn in turns])
        np.testing.assert_array_equal(episode.mask, np.arange(environment.spec.max_turns) < len(turns))
        found = [x[: len(turns)] for x in jax.tree.leaves((episode.observation, episode.action, episode.step))]
        found += jax.tree.leaves(episode.state)
        for a, b in zip(found, jax.tree.leaves((kept, turns[-1][3])), strict=True):
            np.testing.assert_array_equal(a, b)
        lengths.append(len(turns))
    return lengths


def test_an_episode_is_the_loop_and_stops_where_it_ends():
    environment = household()
    assert check(environment, environment.expert, [0]) == [4]
    assert check(environment, lambda key, state: jnp.asarray([0]), [0], lesson=jnp.asarray([3, 0])) == [5]


@pytest.mark.slow  # as above, of another environment
def test_a_session_is_the_loop_and_stops_where_it_ends():
    environment = persona_chat()
    assert set(check(environment, environment.demonstrate, range(4), persona=2)) <= {1, 2}
