"""Numerical intrinsic feedback of RetroAgent: what a reflection's subtask score is worth (arXiv 2603.08561, eq. 3-6).

After an episode the agent says which subtasks it completed (the potential phi) and whether it succeeded (c). Only what
lies above the best group success ever seen on the task is rewarded. Alphabet: `B` episodes, `K` tasks, `G` groups.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, check_same_shape

REFLECTION_RULES = ("consistency", "eq3", "r_int")


def subtask_potential(completed, total, success, *, parsed=None, binary=False):
    """The grounded potential phi of an episode: the share of subtasks that its reflection calls completed.

    As in the released code the outcome comes first: a success has 1, whatever was written. A failure whose reflection
    cannot be read has 0.

    Args:
      completed: subtasks called completed, `[B]`.
      total: subtasks listed, a number or `[B]`; 0 gives 0.
      success: whether the episode truly succeeded, bool or 0/1, `[B]`.
      parsed: bool `[B]`, whether the reflection could be read; None for all.
      binary: static, phi is the success alone.

    Returns:
      `[B]` in [0, 1].

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(completed=completed, success=success)
    success = jnp.asarray(success) != 0
    if binary:
        return accurate(success)
    total = accurate(total)
    share = jnp.where(total > 0, accurate(completed) / jnp.where(total > 0, total, 1.0), 0.0)
    if parsed is not None:
        check_same_shape(completed=completed, parsed=parsed)
        share = jnp.where(jnp.asarray(parsed), share, 0.0)
    return jnp.where(success, 1.0, jnp.clip(share, 0.0, 1.0))


def capability_reward(phi, baseline):
    """The capability-evolution reward `R_int = max(0, phi - Phi_x)` (arXiv 2603.08561, eq. 5).

    The ablation "progress-guided" is `capability_reward(success, baseline)`. Among the members of a group it then tells
    successes from failures as the extrinsic reward does, and normalising by the group removes it altogether.

    The released code can centre the reward, which is `dr_grpo_advantages(reward, group, singleton="zero")`.

    Args:
      phi: potential in [0, 1], `[B]` (`subtask_potential`).
      baseline: Phi_x of each episode's task, *before* `update_baseline` takes the episode in, `[B]`.

    Returns:
      `[B]` in [0, 1], gradients stopped.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(phi=phi, baseline=baseline)
    return jax.lax.stop_gradient(jnp.maximum(accurate(phi) - accurate(baseline), 0.0))


def update_baseline(baseline, task, group_success):
    """The historical baseline `Phi_x <- max(Phi_x, mean success of the group)` (arXiv 2603.08561, eq. 6).

    It starts at 0 and never falls. It is built from true success, phi from subtasks: a failed episode of phi = 0.75
    keeps earning until three quarters of a group have succeeded.

    Args:
      baseline: Phi of the tasks, `[K]`.
      task: int `[G]` in 0..K-1, the task of each group; one that comes twice takes the larger mean. What is out of
        range changes nothing.
      group_success: mean of true success in the group, in [0, 1], `[G]`.

    Returns:
      `[K]`.

    Raises:
      ValueError: shapes other than `[K]`, `[G]`, `[G]`.
    """
    check_same_shape(task=task, group_success=group_success)
    baseline, task = accurate(baseline), jnp.asarray(task)
    if baseline.ndim != 1 or task.ndim != 1:
        raise ValueError(f"baseline and task must be [K] and [G], got {baseline.shape} and {task.shape}")
    task = jnp.where(task < 0, baseline.size, task)  # a negative index would count from the end
    return baseline.at[task].max(jnp.asarray(group_success, baseline.dtype), mode="drop")


def reflection_reward(predicted, success, intrinsic=None, *, rule="consistency", scale=10.0):
    """What a reflection that was itself sampled is paid (arXiv 2603.08561, eq. 3, and the released code).

    Three rules are in use. "eq3", as printed: `R_ext 1{c = I}`, where R_ext is 0 for a failure, so that only a success
    that was predicted pays. "consistency": a right prediction pays either way; the released code computes this one and
    only logs it. "r_int": the episode's intrinsic reward, on which the released code trains.

    Args:
      predicted: c, whether the reflection calls the episode a success, bool or 0/1, `[B]`.
      success: I, bool or 0/1, `[B]`.
      intrinsic: R_int, `[B]`; needed by "r_int" alone.
      rule: static, one of the above.
      scale: reward of a success, may be traced; not used by "r_int".

    Returns:
      `[B]`, gradients stopped.

    Raises:
      ValueError: unknown rule, different shapes, or "r_int" without `intrinsic`.
    """
    if rule not in REFLECTION_RULES:
        raise ValueError(f"rule must be one of {REFLECTION_RULES}, got {rule!r}")
    check_same_shape(predicted=predicted, success=success)
    if rule == "r_int":
        if intrinsic is None:
            raise ValueError("intrinsic must be an array [B] with rule 'r_int', got None")
        check_same_shape(success=success, intrinsic=intrinsic)
        return jax.lax.stop_gradient(accurate(intrinsic))
    won = jnp.asarray(success) != 0
    right = (jnp.asarray(predicted) != 0) == won
    paid = right if rule == "consistency" else right & won
    return jax.lax.stop_gradient(jnp.where(paid, accurate(scale), 0.0))
