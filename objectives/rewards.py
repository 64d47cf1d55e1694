"""Shaping, filtering and scoring of episode rewards.

Overlong shaping and dynamic sampling are DAPO's (arXiv 2503.14476); pass@k is the estimator of arXiv 2107.03374.
"""

import jax.numpy as jnp
import numpy as np

from rollax.objectives.advantages import group_is_constant
from rollax.objectives.arrays import concrete


def overlong_penalty(length, max_length, cache, *, floor=-1.0):
    """Soft penalty for long answers (DAPO, eq. 13): 0, then a slope over the last `cache` tokens down to -1.

    Args:
      length: tokens, `[...]`.
      max_length: Lmax, tokens.
      cache: width of the slope, tokens, positive.
      floor: the least value. -1 is the paper's and OpenRLHF's; None (verl, Tunix) goes on falling behind Lmax.

    Returns:
      `[...]`, <= 0, to be added to the reward.

    Raises:
      ValueError: a concrete cache that is not positive.
    """
    known = concrete(cache)
    if known is not None and not np.all(known > 0):
        raise ValueError(f"cache must be positive, got {cache}")
    penalty = jnp.minimum((max_length - cache - jnp.asarray(length)) / cache, 0.0)
    return penalty if floor is None else jnp.maximum(penalty, floor)


def dynamic_sampling_mask(score, group_ids, *, num_groups=None):
    """Which rollouts dynamic sampling keeps (DAPO, eq. 11): those of groups that are not all equal.

    Args:
      score: the metric that is compared (accuracy, or reward), `[B]`.
      group_ids, num_groups: as in `grpo_advantages`.

    Returns:
      bool `[B]`.
    """
    return ~group_is_constant(score, group_ids, num_groups=num_groups)


def pass_at_k(num_correct, num_samples, k):
    """Unbiased estimate that at least one of k samples is right: `1 - C(n - c, k) / C(n, k)` (arXiv 2107.03374).

    Args:
      num_correct: c, int `[...]`.
      num_samples: n >= k, int `[...]` or scalar.
      k: static int >= 1.

    Returns:
      float32 `[...]` (float64 where enabled).

    Raises:
      ValueError: k < 1, or concretely num_samples below k or num_correct.
    """
    n, c = concrete(num_samples), concrete(num_correct)
    if k < 1 or (n is not None and np.any(n < k)):
        raise ValueError(f"k must be in 1..num_samples, got k={k} and num_samples={num_samples}")
    if n is not None and c is not None and np.any(c > n):
        raise ValueError(f"num_correct must be at most num_samples={num_samples}, got {num_correct}")
    drawn = jnp.arange(k)
    wrong = jnp.asarray(num_samples - num_correct)[..., None] - drawn
    left = jnp.asarray(num_samples)[..., None] - drawn
    return 1 - jnp.prod(wrong / jnp.maximum(left, 1), axis=-1)  # passes through 0 where fewer than k are wrong
