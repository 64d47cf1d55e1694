"""CartPole: keep a pole upright on a cart by pushing left or right (Barto, Sutton and Anderson 1983).

Constants, Euler integration and limits of Gymnasium's CartPole-v1: 20 ms a step, reward 1 a step, 500 steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import ControlSpec, Environment, Step

GRAVITY = 9.8  # m/s^2
CART_MASS, POLE_MASS = 1.0, 0.1  # kg
HALF_POLE = 0.5  # m, from the pivot to the centre of mass
FORCE = 10.0  # N
TIME_STEP = 0.02  # s
POSITION_LIMIT = 2.4  # m
ANGLE_LIMIT = math.radians(12.0)
START = 0.05  # every component of the physics starts uniform in +-0.05


class CartPoleState(NamedTuple):
    """`physics` float32 `[4]`: position (m), velocity (m/s), angle (rad, 0 upright), angular velocity (rad/s).

    `time` int32 `[]`: steps taken.
    """

    physics: jax.Array
    time: jax.Array


def cartpole(max_steps: int = 500) -> Environment:
    """CartPole-v1: the observation is the float32 `[4]` physics, actions are 0 (push left) and 1 (push right).

    Terminated where the cart leaves +-2.4 m or the pole +-12 degrees; truncated after `max_steps` steps otherwise. The
    step that ends an episode still pays 1, as in Gymnasium.

    Raises:
      ValueError: `max_steps` below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")

    def reset(key):
        # Hashing is most of what a step with auto-reset costs: two words are split into four numbers of 16 bits.
        words = jax.random.bits(key, (2,), jnp.uint32)
        halves = jnp.concatenate([words >> 16, words & 0xFFFF]).astype(jnp.float32)
        physics = START * (2.0**-15 * (halves + 0.5) - 1.0)
        return CartPoleState(physics, jnp.int32(0)), physics

    def step(key, state, action):
        del key  # the physics is deterministic
        physics = _integrate(state.physics, jnp.where(action == 1, FORCE, -FORCE))
        time = state.time + 1
        terminated = (jnp.abs(physics[0]) > POSITION_LIMIT) | (jnp.abs(physics[2]) > ANGLE_LIMIT)
        truncated = (time >= max_steps) & ~terminated
        return CartPoleState(physics, time), Step(physics, jnp.float32(1.0), terminated, truncated, {})

    return Environment(reset, step, ControlSpec((4,), 2, max_steps), render, expert)


def expert(key: jax.Array, state: CartPoleState) -> jax.Array:
    """Push to the side the pole falls to, with a slow pull of the cart back to the middle: int32 `[]`."""
    del key
    position, velocity, angle, angular_velocity = state.physics
    return (angle + 0.3 * angular_velocity + 0.02 * position + 0.05 * velocity > 0).astype(jnp.int32)


def render(state: CartPoleState) -> str:
    """The cart on its track, how the pole leans, and the numbers."""
    position, velocity, angle, angular_velocity = np.asarray(state.physics, np.float64)
    width = 49
    track = ["-"] * width
    column = round((position / POSITION_LIMIT + 1) / 2 * (width - 1))
    track[min(max(column, 0), width - 1)] = "█"
    lean = "|" if abs(angle) < math.radians(1) else "/" if angle > 0 else "\\"
    pole = " " * min(max(column + round(angle / ANGLE_LIMIT), 0), width - 1) + lean
    numbers = (
        f"step {int(state.time)}  x {position:+.2f} m  v {velocity:+.2f} m/s  "
        f"angle {math.degrees(angle):+.1f} deg  {math.degrees(angular_velocity):+.0f} deg/s"
    )
    return "\n".join([pole, "".join(track), numbers])


def _integrate(physics, force):
    position, velocity, angle, angular_velocity = physics
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    total_mass = CART_MASS + POLE_MASS
    push = (force + POLE_MASS * HALF_POLE * angular_velocity**2 * sin) / total_mass
    angular_acceleration = (GRAVITY * sin - cos * push) / (HALF_POLE * (4 / 3 - POLE_MASS * cos**2 / total_mass))
    acceleration = push - POLE_MASS * HALF_POLE * angular_acceleration * cos / total_mass
    # Explicit Euler: positions move with the velocities before this step.
    return jnp.stack(
        [
            position + TIME_STEP * velocity,
            velocity + TIME_STEP * acceleration,
            angle + TIME_STEP * angular_velocity,
            angular_velocity + TIME_STEP * angular_acceleration,
        ]
    )
