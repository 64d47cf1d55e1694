"""Compiled environments behind the interface of those that run on the host."""

import jax
import numpy as np
import pytest

from rollax.envs import cartpole, on_host, persona_chat
from rollax.envs.persona_chat import EOS, PAD


def test_rows_are_those_of_the_compiled_environment():
    """The steps of `vmap`, numpy all over; the expert pleases each user at once."""
    env = persona_chat(0.5, max_turns=3)
    host, keys = on_host(env), jax.random.split(jax.random.key(0), 4)
    state, observation = host.reset(keys)
    start, first = jax.jit(jax.vmap(env.reset))(keys)
    np.testing.assert_array_equal(observation.ids, first.ids)
    action = np.full((4, env.spec.max_action), EOS, np.int32)
    action[1:] = host.expert(keys, state)[1:]
    alive = np.array([True, True, False, True])
    state, step = host.step(keys, state, action, alive)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(step))
    np.testing.assert_array_equal(step.reward, [0, 1, 0, 1])
    np.testing.assert_array_equal(step.terminated, [False, True, False, True])
    _, wanted = jax.jit(jax.vmap(env.step))(keys, start, action)
    for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x[alive], np.asarray(y)[alive])


def test_rows_that_are_over_are_silent():
    host, keys = on_host(persona_chat(0.5, max_turns=3)), jax.random.split(jax.random.key(0), 3)
    state, _ = host.reset(keys)
    _, step = host.step(keys, state, np.full((3, host.spec.max_action), EOS, np.int32), np.array([True, False, False]))
    assert (step.observation.ids[1:] == PAD).all() and (step.observation.length == [10, 0, 0]).all()
    assert not any(np.any(x[1:]) for x in (step.reward, step.terminated, step.truncated, *step.info.values()))


def test_bad_input():
    with pytest.raises(ValueError, match=r"env: expected a token environment, got one with the spec ControlSpec"):
        on_host(cartpole())
