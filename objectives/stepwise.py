"""Step-wise advantages: an outcome, a judge's votes on every step, and a baseline per step index (arXiv 2603.10165).

OpenClaw-RL's track for general agents, as in its released code: the states of two trajectories cannot be matched, so
their steps are compared by index. Alphabet: `G` tasks, `N` trajectories of a task, `T` steps, `m` votes.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, check_same_shape, masked, ratio_or_zero
from rollax.objectives.next_state import mean_vote

BUCKETS = ("step", "task")
CONSTANT = 1e-12  # a variance up to this is that of equal rewards, as in the released code


def step_reward(outcome, votes, valid, coef=1.0):
    """`R_t = o + coef * mean vote`: a trajectory's outcome on each step, plus what the judge says of the step.

    Args:
      outcome: `[G, N]`, -1 or +1.
      votes: `[G, N, T, m]`, +1 or -1 where valid.
      valid: bool `[G, N, T, m]`.
      coef: may be traced; 1 in the paper, 0 for the outcome alone.

    Returns:
      `[G, N, T]`.

    Raises:
      ValueError: shapes that do not fit.
    """
    if jnp.ndim(votes) != 4 or jnp.shape(outcome) != jnp.shape(votes)[:2]:
        raise ValueError(
            f"outcome must be [G, N] and votes [G, N, T, m], got shapes {jnp.shape(outcome)} and {jnp.shape(votes)}"
        )
    return accurate(outcome)[..., None] + coef * mean_vote(votes, valid)


def step_index_advantage(reward, valid, eps=1e-6, *, bucket="step"):
    """`(R - mean) / (std + eps)` over the trajectories of a task at the same step, population std.

    A bucket of one keeps its raw reward. A bucket whose rewards are all equal is dropped; where that leaves nothing,
    the first bucket (in the order of tasks, trajectories and steps) stays, with advantages of 0.

    Args:
      reward: `[G, N, T]`, of `step_reward`.
      valid: bool `[G, N, T]`, the step was made.
      eps: may be traced.
      bucket: static; "step": (task, step index). "task": all steps of a task together.

    Returns:
      (advantage `[G, N, T]`, 0 where not kept, gradients stopped; kept bool `[G, N, T]`).

    Raises:
      ValueError: shapes that are not both `[G, N, T]`, or an unknown bucket.
    """
    if bucket not in BUCKETS:
        raise ValueError(f"bucket must be one of {BUCKETS}, got {bucket!r}")
    check_same_shape(reward=reward, valid=valid)
    if jnp.ndim(reward) != 3:
        raise ValueError(f"reward must be [G, N, T], got {jnp.shape(reward)}")
    reward, valid = jax.lax.stop_gradient(accurate(reward)), jnp.asarray(valid, bool)
    axes = (1,) if bucket == "step" else (1, 2)
    size = valid.sum(axis=axes, keepdims=True)
    deviation = reward - ratio_or_zero(masked(reward, valid).sum(axis=axes, keepdims=True), size)
    variance = ratio_or_zero(masked(jnp.square(deviation), valid).sum(axis=axes, keepdims=True), size)
    largest = jnp.max(jnp.where(valid, reward, -jnp.inf), axis=axes, keepdims=True)
    smallest = jnp.min(jnp.where(valid, reward, jnp.inf), axis=axes, keepdims=True)
    constant = (largest == smallest) | (variance <= CONSTANT)
    # Exactly 0 in constant buckets, where rounding would be divided by eps.
    advantage = jnp.where(constant, 0.0, deviation / (jnp.sqrt(jnp.where(constant, 1.0, variance)) + eps))
    advantage = jnp.where(size == 1, reward, advantage)
    kept = valid & ((size == 1) | ~constant)
    first = (jnp.cumsum(valid.ravel()) == 1).reshape(valid.shape) & valid
    rescued = valid & first.any(axis=axes, keepdims=True)
    kept = jnp.where(kept.any(), kept, rescued)
    return jnp.where(kept, advantage, 0.0), kept
