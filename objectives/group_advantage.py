"""Returns and group advantages of episodes whose training rows are single steps: RetroAgent's, GiGPO's, reflections'.

From RetroAgent (arXiv 2603.08561, section 2.4's returns, and the released code where it differs) and its baseline GiGPO
(arXiv 2505.10978). Alphabet: `B` episodes, `T` steps of an episode, `R` rows (all steps of all episodes), `L` tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.advantages import (
    _group_count,
    _group_statistics,
    discounted_returns,
    grpo_advantages,
    reinforce_plus_plus_advantages,
)
from rollax.objectives.arrays import accurate, check_same_shape, concrete, masked
from rollax.objectives.reduction import masked_mean

NORMS = ("std", "std_floor", "batch", "none")
GIGPO_NORMS = ("mean", "mean_std")


def discounted_reward_to_go(reward, active, gamma):
    """`g_t = r_t + gamma g_{t+1}` over the steps of each episode, as the released code credits them.

    A reward on the last step is worth `gamma^(T_i - 1 - t)` of itself at step t, so a short episode is worth more.

    Args:
      reward: of the steps, `[B, T]`: the environment's, and on the last step whatever the episode earned as a whole
        (`R_ext + w R_int`).
      active: bool `[B, T]`, which steps were made.
      gamma: discount of one step, may be traced. RetroAgent: 0.95.

    Returns:
      `[B, T]`, 0 where inactive.

    Raises:
      ValueError: different shapes.
    """
    return discounted_returns(reward, active, gamma)


def uniform_return(reward, length, gamma):
    """RetroAgent's return as printed: `G = sum_{t < T_i} gamma^t R = R (1 - gamma^T_i) / (1 - gamma)` for every step.

    It grows with the length of the episode, so that of two successes the longer one wins; the released code uses
    `discounted_reward_to_go`.

    Args:
      reward: `R_ext + R_int` of the episodes, `[B]`.
      length: T_i, steps, `[B]`.
      gamma: may be traced; 1 gives `R T_i`.

    Returns:
      `[B]`.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(reward=reward, length=length)
    reward, length, gamma = accurate(reward), accurate(length), accurate(gamma)
    one = gamma == 1
    other = jnp.where(one, 0.5, gamma)
    return reward * jnp.where(one, length, (1 - jnp.power(other, length)) / (1 - other))


def _dense_ids(*keys):
    """One id in 0..R-1 for every different tuple of keys, int32 `[R]`; any ids may come in, hashes too."""
    keys = [jnp.asarray(key) for key in keys]
    order = jnp.lexsort(keys[::-1])
    changes = [jnp.diff(key[order], prepend=key[order][:1]) != 0 for key in keys]
    ranks = jnp.cumsum(jnp.stack(changes).any(axis=0)).astype(jnp.int32)
    return jnp.zeros_like(ranks).at[order].set(ranks)


def _statistics(row, group, num_groups, traj):
    """Per row: mean and unbiased std of its group, (0, 1) in a group of one, and which rows made the statistics."""
    position = jnp.arange(row.size)
    counted, chosen, speaker = jnp.ones(row.shape, bool), group, position
    if traj is not None:
        ids = _dense_ids(group, traj)
        counted = jax.ops.segment_min(position, ids, num_segments=row.size)[ids] == position
        # The rows that do not count form a group of their own; one that counts speaks for its group.
        chosen = jnp.where(counted, group, num_groups)
        speaker = jnp.zeros(num_groups, position.dtype).at[chosen].set(position, mode="drop")[group]
    size, mean, std, constant = (x[speaker] for x in _group_statistics(row, chosen, num_groups + 1))
    mean = jnp.where(constant, row[speaker], mean)  # exact, where rounding would be divided by the epsilon
    return jnp.where(size == 1, 0.0, mean), jnp.where(size == 1, 1.0, std), counted


def group_advantage(row, group, num_groups, *, traj=None, norm="std", floor=0.0, eps=1e-6):
    """Advantage of step rows over their group, `(row - mean) / scale` (arXiv 2603.08561, section 2.4).

    A group whose rewards are all small gets advantages as large as any other under "std": in a group that failed as a
    whole, a little intrinsic reward counts like a success elsewhere. The other norms are remedies.

    Args:
      row: return of each row, `[R]`.
      group: int `[R]` in 0..num_groups-1, the task's group of rollouts, in any order.
      num_groups: static.
      traj: int `[R]`, the episode of each row, unique within its group at least. None: all rows enter mean and std, so
        long episodes weigh more (the released code). Given: one row an episode does, the first (the paper).
      norm: static. "std": the group's unbiased std + eps. "std_floor": that plus `floor`. "batch": the unbiased std of
        `row - mean` over all that enters the statistics, + eps. "none": 1.
      floor: in units of the return, may be traced. 0.3 is a good one for successes worth 10.
      eps: may be traced.

    Returns:
      `[R]`, gradients stopped. A group of one has mean 0 and std 1, as in verl: its return stays, over `1 + eps`.

    Raises:
      ValueError: unknown norm, a concrete negative floor, shapes other than `[R]`, concrete ids out of range.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if (known := concrete(floor)) is not None and not np.all(known >= 0):
        raise ValueError(f"floor must not be negative, got {floor}")
    row, group = jax.lax.stop_gradient(accurate(row)), jnp.asarray(group)
    _group_count(row, group, num_groups)
    if traj is not None:
        check_same_shape(row=row, traj=traj)
    mean, std, counted = _statistics(row, group, num_groups, traj)
    deviation = row - mean
    if norm == "none":
        return deviation
    if norm == "batch":
        size = counted.sum()
        spread = masked(jnp.square(deviation - masked_mean(deviation, counted)), counted).sum()
        std = jnp.where(size > 1, jnp.sqrt(spread / jnp.maximum(size - 1, 1)), 1.0)
    scale = std + (floor if norm == "std_floor" else 0.0) + eps
    return deviation / jnp.where(scale > 0, scale, 1.0)


def gigpo_advantage(row, step_return, group, anchor, *, weight=1.0, norm="mean", eps=1e-6):
    """GiGPO (arXiv 2505.10978): the group's advantage plus `weight` times that among rows of one observation.

    Args:
      row: return of the row's episode, `[R]`.
      step_return: discounted return from this step on, `[R]` (`discounted_reward_to_go`).
      group: int `[R]`, any ids.
      anchor: int `[R]`, the observation that the step was taken in, any ids (a hash); it counts within a group.
      weight: of the second part, may be traced.
      norm: static; "mean": the deviations, "mean_std": each over its unbiased std + eps.
      eps: may be traced.

    Returns:
      `[R]`, gradients stopped. A group of one keeps its return; an observation seen once adds 0.

    Raises:
      ValueError: unknown norm or different shapes.
    """
    if norm not in GIGPO_NORMS:
        raise ValueError(f"norm must be one of {GIGPO_NORMS}, got {norm!r}")
    check_same_shape(row=row, step_return=step_return, group=group, anchor=anchor)
    row, step_return = jax.lax.stop_gradient((accurate(row), accurate(step_return)))
    options = dict(scale_by_std=norm == "mean_std", epsilon=eps)
    episodes = grpo_advantages(row, _dense_ids(group), singleton="reward", **options)
    return episodes + weight * grpo_advantages(step_return, _dense_ids(group, anchor), **options)


def reflection_advantage(token_reward, mask):
    """RetroAgent's advantage of a reflection's tokens: the return to go, whitened over the batch (REINFORCE++).

    Args:
      token_reward: `[R, L]`, the reward of each reflection on its last token.
      mask: `[R, L]`, bool or 0/1.

    Returns:
      `[R, L]`, 0 outside the mask, gradients stopped.

    Raises:
      ValueError: different shapes.
    """
    return jax.lax.stop_gradient(reinforce_plus_plus_advantages(token_reward, mask))
