"""Losses of value functions: the critic's regression, and V_0's ranking beside soft labels."""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, check_same_shape, concrete, ratio_or_zero
from rollax.objectives.reduction import masked_mean


def value_loss(value, target, old_value=None, clip=None):
    """Half the squared error of a critic, `(V - target)^2 / 2`; clipped as in PPO's code where `clip` is given.

    Clipped it is the larger of that and the same of `old_value + clip(V - old_value, -clip, clip)`, so that a step
    cannot gain by moving V further than `clip` (arXiv 2005.12729; verl and TRL have it on, with 0.5 and 0.2).

    Args:
      value, target: `[...]`; the target's gradient is stopped.
      old_value: V when the rollout was made, `[...]`, needed for clipping.
      clip: positive, may be traced; None for no clipping.

    Returns:
      loss `[...]`, float32 or wider.

    Raises:
      ValueError: different shapes, a concrete `clip` that is not positive, or `clip` without `old_value`.
    """
    check_same_shape(value=value, target=target)
    value, target = accurate(value), jax.lax.stop_gradient(accurate(target))
    loss = 0.5 * jnp.square(value - target)
    if clip is None:
        return loss
    if old_value is None:
        raise ValueError("old_value: expected the values of the rollout when clip is given, got None")
    if (known := concrete(clip)) is not None and not np.all(known > 0):
        raise ValueError(f"clip must be positive, got {clip}")
    check_same_shape(value=value, old_value=old_value)
    old_value = jax.lax.stop_gradient(accurate(old_value))
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return jnp.maximum(loss, 0.5 * jnp.square(clipped - target))


def explained_variance(value, target, mask):
    """`1 - Var(target - V) / Var(target)` over the mask: 1 for a perfect critic, 0 for a constant one, below for worse.

    VAPO (arXiv 2504.05118) pre-trains its critic until this and the loss stand still.

    Args:
      value, target: `[...]`.
      mask: `[...]`, bool or 0/1.

    Returns:
      `[]`; 0 where the target does not vary.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(value=value, target=target, mask=mask)
    target = accurate(target)
    error = target - accurate(value)
    variance = lambda x: masked_mean(jnp.square(x - masked_mean(x, mask)), mask)  # noqa: E731
    total = variance(target)
    return jnp.where(total > 0, 1 - ratio_or_zero(variance(error), total), 0.0)


def pair_index(targets, mask=None):
    """Pairs (successful query, failed query) of one context; the rarer class is cycled until every query is used.

    Args:
      targets: pass rates in [0, 1], `[Q]`; a query counts as successful from 0.5 on.
      mask: bool `[Q]`, which queries count; None for all.

    Returns:
      int32 `[Q, 2]`: max(successes, failures) pairs in the order of the queries, then rows of -1. Nothing but -1 where
      all queries are of one class. jit and vmap.

    Raises:
      ValueError: targets that are not `[Q]`, or a mask of another shape.
    """
    targets = jnp.asarray(targets)
    if targets.ndim != 1:
        raise ValueError(f"targets must be [Q], got {targets.shape}")
    counts = jnp.ones(targets.shape, bool) if mask is None else jnp.asarray(mask, bool)
    check_same_shape(targets=targets, mask=counts)
    good, bad = counts & (targets >= 0.5), counts & (targets < 0.5)
    goods, bads = good.sum(), bad.sum()
    pair = jnp.arange(targets.shape[0])
    # A stable sort puts the members of a class first, in their order.
    first = [jnp.argsort(~which, stable=True)[pair % jnp.maximum(which.sum(), 1)] for which in (good, bad)]
    valid = (pair < jnp.maximum(goods, bads)) & (goods > 0) & (bads > 0)
    return jnp.where(valid[:, None], jnp.stack(first, axis=-1), -1).astype(jnp.int32)


def v0_loss(logits, targets, pair_index, *, alpha=0.25, hard=False, mask=None):
    """V_0 (arXiv 2602.03584): `alpha * ranking + (1 - alpha) * cross-entropy` over the queries of one context.

    Ranking is `-log sigmoid(s_good - s_bad)`, s the logit of success: what the context alone says about the policy
    cancels in the difference. The cross-entropy alone can be lowered by reading nothing but the context's mean.

    Args:
      logits: `[Q]`, log-odds of success, or `[Q, 2]`, logits of (failure, success): only their difference counts.
      targets: pass rates in [0, 1], `[Q]`.
      pair_index: int `[P, 2]` of (good, bad) queries; rows below 0 are skipped, and without pairs the ranking is 0.
      alpha: may be traced; 1 for the ranking alone, 0 for the cross-entropy alone.
      hard: static; targets rounded to 0 or 1 (from 0.5 on) in the cross-entropy. That is what the released trainer
        minimises, whatever its options say.
      mask: bool `[Q]`, queries of the cross-entropy; None for all.

    Returns:
      `[]`, float32 or wider, nats. Several contexts: `vmap`.

    Raises:
      ValueError: shapes that do not fit, or concrete targets outside [0, 1].
    """
    logits, targets, pair_index = accurate(logits), accurate(targets), jnp.asarray(pair_index)
    if targets.ndim != 1 or logits.shape not in (targets.shape, (*targets.shape, 2)):
        raise ValueError(f"logits must be [Q] or [Q, 2] and targets [Q], got {logits.shape} and {targets.shape}")
    if pair_index.ndim != 2 or pair_index.shape[1] != 2 or not jnp.issubdtype(pair_index.dtype, jnp.integer):
        raise ValueError(f"pair_index must be int [P, 2], got {pair_index.dtype} {pair_index.shape}")
    if (known := concrete(targets)) is not None and not np.all((known >= 0) & (known <= 1)):
        raise ValueError(f"targets must lie in [0, 1], got {known.min()} to {known.max()}")
    counts = jnp.ones(targets.shape, bool) if mask is None else jnp.asarray(mask, bool)
    check_same_shape(targets=targets, mask=counts)
    margin = logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0]
    paired = (pair_index >= 0).all(axis=1)
    good, bad = margin[pair_index[:, 0]], margin[pair_index[:, 1]]
    ranking = masked_mean(-jax.nn.log_sigmoid(good - bad), paired)
    wanted = (targets >= 0.5).astype(margin.dtype) if hard else targets
    cross_entropy = masked_mean(
        -wanted * jax.nn.log_sigmoid(margin) - (1 - wanted) * jax.nn.log_sigmoid(-margin), counts
    )
    return alpha * ranking + (1 - alpha) * cross_entropy
