"""Advantages: group baselines of RL on language models, and generalised advantage estimation for tokens and control.

Groups are given by `group_ids`, int `[B]` in 0..num_groups-1, in any order and of any sizes; for rewards `[P, G]`
flatten them and take `group_ids = jnp.repeat(jnp.arange(P), G)`.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, concrete, masked, ratio_or_zero
from rollax.objectives.reduction import masked_mean


def _group_count(reward, group_ids, num_groups):
    """Checks what can be checked at trace time; B groups are always enough."""
    if jnp.ndim(reward) != 1 or jnp.shape(reward) != jnp.shape(group_ids):
        raise ValueError(f"reward and group_ids must be [B], got {jnp.shape(reward)} and {jnp.shape(group_ids)}")
    count = jnp.shape(reward)[0] if num_groups is None else num_groups
    known = concrete(group_ids)
    if known is not None and known.size and (known.min() < 0 or known.max() >= count):
        raise ValueError(f"group_ids must lie in 0..{count - 1}, got {known.min()}..{known.max()}")
    return count


def _group_statistics(reward, group_ids, num_groups):
    """Per row: size, mean and unbiased standard deviation of its group, and whether all of the group is equal."""
    reward = accurate(reward)
    group_ids = jnp.asarray(group_ids)
    count = _group_count(reward, group_ids, num_groups)

    def over_group(x, reduce=jax.ops.segment_sum):
        return reduce(x, group_ids, num_segments=count)[group_ids]

    size = over_group(jnp.ones_like(reward))
    mean = over_group(reward) / size
    variance = over_group(jnp.square(reward - mean)) / jnp.maximum(size - 1, 1)
    constant = over_group(reward, jax.ops.segment_max) == over_group(reward, jax.ops.segment_min)
    std = jnp.where(constant, 0.0, jnp.sqrt(jnp.where(constant, 1.0, variance)))
    return size, mean, std, constant


def group_is_constant(reward, group_ids, *, num_groups=None):
    """Whether all rewards of a row's group are equal ("dead": no gradient from a group baseline), bool `[B]`."""
    return _group_statistics(reward, group_ids, num_groups)[3]


def _deviation(reward, group_ids, num_groups, singleton):
    """`(R - group mean, std, size)`; exactly 0 in constant groups, where rounding would be divided by the epsilon."""
    if singleton not in ("zero", "reward"):
        raise ValueError(f"singleton must be 'zero' or 'reward', got {singleton!r}")
    reward = accurate(reward)
    size, mean, std, constant = _group_statistics(reward, group_ids, num_groups)
    deviation = jnp.where(constant, 0.0, reward - mean)
    if singleton == "reward":
        deviation = jnp.where(size == 1, reward, deviation)
        std = jnp.where(size == 1, 1.0, std)
    return deviation, std, size


def grpo_advantages(reward, group_ids, *, num_groups=None, epsilon=1e-6, scale_by_std=True, singleton="zero"):
    """GRPO (arXiv 2402.03300): `(R - mean) / (std + epsilon)` within the group, unbiased std.

    Args:
      reward: of whole episodes, `[B]`.
      group_ids: int `[B]`, see the module.
      num_groups: static number of groups; None for B.
      epsilon: 1e-6 in verl, Tunix and slime, 1e-4 in TRL, 1e-9 in OpenRLHF, absent in the paper; may be traced.
      scale_by_std: static; False is Dr. GRPO (arXiv 2503.20783).
      singleton: what a group of one gets: "zero" (TRL, Tunix), or its "reward", as if mean were 0 and std 1 (verl).

    Returns:
      `[B]`, float32 or wider. Constant groups get exactly 0.

    Raises:
      ValueError: shapes other than `[B]`, or concrete ids out of range.
    """
    deviation, std, _ = _deviation(reward, group_ids, num_groups, singleton)
    if not scale_by_std:
        return deviation
    # A constant group has deviation and std 0: with epsilon 0 that is 0 / 0.
    return deviation / jnp.where(std > 0, std + epsilon, 1.0)


def dr_grpo_advantages(reward, group_ids, *, num_groups=None, singleton="zero"):
    """Dr. GRPO (arXiv 2503.20783): `R - mean` of the group; arguments and result as in `grpo_advantages`."""
    return grpo_advantages(reward, group_ids, num_groups=num_groups, scale_by_std=False, singleton=singleton)


def rloo_advantages(reward, group_ids, *, num_groups=None, singleton="zero"):
    """RLOO (arXiv 2402.14740): R minus the mean of the *others* of the group, `G / (G - 1) (R - mean)`.

    Arguments and result as in `grpo_advantages`; for a group of one "zero" is TRL's and Tunix's rule, "reward" verl's.
    """
    deviation, _, size = _deviation(reward, group_ids, num_groups, singleton)
    return deviation * size / jnp.maximum(size - 1, 1)


def reinforce_rewards(reward, group_ids, *, num_groups=None):
    """REINFORCE without a baseline: the reward itself, `[B]`; the groups are checked and not used."""
    _group_count(reward, group_ids, num_groups)
    return accurate(reward)


# Group advantages by name, all called as `f(reward [B], group_ids [B], *, num_groups=None) -> [B]`.
ADVANTAGES = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce": reinforce_rewards,
}


def whiten(x, mask, *, shift_mean=True, epsilon=1e-8):
    """Zero mean and unit variance over the masked elements: `(x - mean) / sqrt(var + epsilon)`, unbiased variance.

    Args:
      x: `[...]`.
      mask: `[...]`, bool or 0/1.
      shift_mean: static; False puts the mean back after scaling.
      epsilon: inside the root, as in verl.

    Returns:
      `[...]`; elements outside the mask are transformed too. A single element has variance 0.
    """
    x = accurate(x)
    count = jnp.asarray(mask).astype(x.dtype).sum()
    mean = masked_mean(x, mask)
    variance = ratio_or_zero(masked(jnp.square(x - mean), mask).sum(), count - 1)
    white = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return white if shift_mean else white + mean


def discounted_returns(reward, mask, discount=1.0):
    """`G_t = r_t + discount G_{t+1}` over the own tokens of each row.

    Args:
      reward: per token, `[B, T]` (an episode's reward stands on its last own token).
      mask: `[B, T]`, bool or 0/1. A masked position (a tool's tokens, padding) takes no part: it neither pays nor
        discounts.
      discount: may be traced.

    Returns:
      `[B, T]`, 0 outside the mask. As an advantage it is REINFORCE without a baseline.

    Raises:
      ValueError: different shapes.
    """
    _check_tokens(reward, mask)
    own = jnp.asarray(mask) != 0
    # Where the mask is zero, the step is the identity.
    pays, keeps = jnp.where(own, accurate(reward), 0.0), jnp.where(own, discount, 1.0)

    def step(later, column):
        pay, keep = column
        here = pay + keep * later
        return here, here

    dtype = jnp.result_type(pays, keeps)
    columns = (pays.T.astype(dtype), keeps.T.astype(dtype))
    _, returns = jax.lax.scan(step, jnp.zeros(own.shape[0], dtype), columns, reverse=True)
    return masked(returns.T, mask)


def reinforce_plus_plus_advantages(reward, mask, discount=1.0):
    """REINFORCE++ (arXiv 2501.03262): `discounted_returns`, whitened over the tokens of the batch.

    Args:
      reward, mask, discount: as in `discounted_returns`.

    Returns:
      `[B, T]`, 0 outside the mask.
    """
    return masked(whiten(discounted_returns(reward, mask, discount), mask), mask)


def reinforce_plus_plus_baseline_advantages(reward, group_ids, mask, *, num_groups=None, singleton="zero"):
    """REINFORCE++-baseline (arXiv 2501.03262): R minus the group's mean, whitened over the tokens of the batch.

    Args:
      reward, group_ids, num_groups, singleton: as in `grpo_advantages`.
      mask: `[B, T]`, bool or 0/1.

    Returns:
      `[B, T]`, 0 outside the mask.
    """
    deviation, _, _ = _deviation(reward, group_ids, num_groups, singleton)
    return masked(whiten(jnp.broadcast_to(deviation[:, None], jnp.shape(mask)), mask), mask)


def _check_tokens(*arrays):
    shapes = [jnp.shape(x) for x in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"rewards, values and mask must have one shape [B, T], got {shapes}")


def gae(reward, value, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation over tokens (arXiv 1506.02438), the value behind the last token being 0.

    `d_t = r_t + discount V_{t+1} - V_t`, `A_t = d_t + discount lam A_{t+1}`. A masked position (a tool's tokens,
    padding) hands V and A of its right neighbour on unchanged: the next own token is the successor (verl, Tunix).

    Args:
      reward, value: per token, `[B, T]`.
      mask: `[B, T]`, bool or 0/1.
      discount: may be traced.
      lam: scalar or `[B]`, one a sequence; may be traced.

    Returns:
      (advantage, return), `[B, T]`, return = advantage + value. At masked positions the advantage is what was handed
      on. Whitening, where wanted, is `whiten`.

    Raises:
      ValueError: different shapes.
    """
    _check_tokens(reward, value, mask)
    reward, value = accurate(reward), accurate(value)

    def step(carry, column):
        next_value, next_advantage = carry
        r, v, own = column
        advantage = r + discount * next_value - v + discount * lam * next_advantage
        advantage = jnp.where(own, advantage, next_advantage)
        return (jnp.where(own, v, next_value), advantage), advantage

    zeros = jnp.zeros(value.shape[0], jnp.result_type(reward, value, lam, discount))
    _, advantage = jax.lax.scan(
        step, (zeros, zeros), jax.tree.map(jnp.transpose, (reward, value, jnp.asarray(mask) != 0)), reverse=True
    )
    return advantage.T, advantage.T + value


def vapo_lambda(length, alpha=0.05):
    """VAPO's length-adaptive lambda (arXiv 2504.05118): `1 - 1 / (alpha n)`, with `alpha n` held at 1 or above.

    Args:
      length: own tokens n of each sequence, `[B]`.
      alpha: may be traced.
    """
    return 1 - 1 / jnp.maximum(alpha * accurate(length), 1.0)


def vapo_gae(reward, value, mask, discount=1.0, *, alpha=0.05):
    """VAPO's decoupled GAE (arXiv 2504.05118): the policy with a lambda by length, the critic's target with lambda 1.

    Args:
      reward, value, mask, discount: as in `gae`.
      alpha: of `vapo_lambda`.

    Returns:
      (advantage, return), `[B, T]`.
    """
    length = accurate(mask).sum(axis=1)
    advantage, _ = gae(reward, value, mask, discount, vapo_lambda(length, alpha))
    _, target = gae(reward, value, mask, discount, 1.0)
    return advantage, target


def gae_time_major(reward, value, next_value, terminated, truncated, discount=0.99, lam=0.95):
    """Generalised advantage estimation for vectorised control environments (arXiv 1506.02438).

    Termination ends the return; truncation only cuts the sum and bootstraps on the value of the final observation
    (arXiv 1712.00378), which is why the next value is an argument and not a shifted `value`.

    Args:
      reward, value: `[T, N]`.
      next_value: V of the observation that the step led to, *before* any automatic reset, `[T, N]`.
      terminated, truncated: bool `[T, N]`.
      discount, lam: may be traced.

    Returns:
      (advantage, return), `[T, N]`.

    Raises:
      ValueError: different shapes.
    """
    shapes = [jnp.shape(x) for x in (reward, value, next_value, terminated, truncated)]
    if len(set(shapes)) > 1:
        raise ValueError(f"all arrays must have one shape [T, N], got {shapes}")
    reward, value, next_value = accurate(reward), accurate(value), accurate(next_value)
    terminated = jnp.asarray(terminated, bool)
    residual = reward + discount * jnp.where(terminated, 0.0, next_value) - value
    goes_on = jnp.where(terminated | jnp.asarray(truncated, bool), 0.0, discount * lam)

    def step(later, row):
        d, weight = row
        advantage = d + weight * later
        return advantage, advantage

    zeros = jnp.zeros(residual.shape[1:], jnp.result_type(residual, goes_on))
    _, advantage = jax.lax.scan(step, zeros, (residual, goes_on), reverse=True)
    return advantage, advantage + value
