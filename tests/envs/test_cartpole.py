"""CartPole against the published equations written out in NumPy, and an expert that balances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import cartpole


def published_step(physics, action):
    """The equations of motion of Barto, Sutton and Anderson without friction, Euler, double precision."""
    x, v, theta, omega = physics
    force = 10.0 if action == 1 else -10.0
    m_pole, m_cart, half, g, dt = 0.1, 1.0, 0.5, 9.8, 0.02
    c, s = np.cos(theta), np.sin(theta)
    alpha = (g * s + c * (-force - m_pole * half * omega**2 * s) / (m_cart + m_pole)) / (
        half * (4 / 3 - m_pole * c**2 / (m_cart + m_pole))
    )
    a = (force + m_pole * half * (omega**2 * s - alpha * c)) / (m_cart + m_pole)
    return np.array([x + dt * v, v + dt * a, theta + dt * omega, omega + dt * alpha])


def test_physics_follow_the_published_equations():
    environment = cartpole()
    step = jax.jit(environment.step)
    rng = np.random.default_rng(0)
    fallen = 0
    for episode in range(5):
        state, observation = environment.reset(jax.random.key(episode))
        assert np.all(np.abs(observation) <= 0.05)
        for t in range(1, 200):
            action = int(rng.integers(2))
            expected = published_step(np.asarray(state.physics, np.float64), action)
            state, result = step(jax.random.key(0), state, action)
            np.testing.assert_allclose(result.observation, expected, rtol=1e-5, atol=1e-6)
            outside = abs(expected[0]) > 2.4 or abs(expected[2]) > 12 * np.pi / 180
            assert bool(result.terminated) == outside and not bool(result.truncated)
            assert float(result.reward) == 1.0 and int(state.time) == t and result.info == {}
            if outside:
                fallen += 1
                break
    assert fallen == 5


def test_expert_balances_until_time_runs_out():
    environment = cartpole(max_steps=500)

    def episode(key):
        def body(state, _):
            state, step = environment.step(key, state, environment.expert(key, state))
            return state, (step.reward, step.terminated, step.truncated)

        return jax.lax.scan(body, environment.reset(key)[0], None, length=500)[1]

    reward, terminated, truncated = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(1), 64))
    assert np.all(reward.sum(1) == 500) and not np.any(terminated)
    assert not np.any(truncated[:, :-1]) and np.all(truncated[:, -1])


def test_falling_in_the_last_step_is_terminated_not_truncated():
    environment = cartpole(max_steps=1)
    state, _ = environment.reset(jax.random.key(0))
    tilted = state._replace(physics=jnp.array([0.0, 0.0, 0.2, 2.0]))
    _, step = environment.step(jax.random.key(0), tilted, 0)
    assert bool(step.terminated) and not bool(step.truncated)
    _, step = environment.step(jax.random.key(0), state, 0)
    assert bool(step.truncated) and not bool(step.terminated)


def test_render_and_bad_arguments():
    environment = cartpole()
    text = environment.render(environment.reset(jax.random.key(0))[0])
    assert len(text.splitlines()) == 3 and "angle" in text and "step 0" in text
    with pytest.raises(ValueError, match="max_steps"):
        cartpole(max_steps=0)


def test_starts_are_uniform_and_independent():
    physics = np.asarray(
        jax.jit(jax.vmap(lambda key: cartpole().reset(key)[1]))(jax.random.split(jax.random.key(3), 20_000))
    )
    quantiles = np.quantile(physics / 0.05, [0.0, 0.25, 0.5, 0.75, 1.0], axis=0)
    np.testing.assert_allclose(quantiles, np.repeat([[-1.0], [-0.5], [0.0], [0.5], [1.0]], 4, axis=1), atol=0.03)
    assert np.abs(physics).max() < 0.05
    np.testing.assert_allclose(np.corrcoef(physics.T), np.eye(4), atol=0.03)
