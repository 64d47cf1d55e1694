"""Corrections for a sampler whose probabilities differ from the trainer's (another kernel, precision or age).

With o the trainer's recomputed old log-prob and u the sampler's, weights are made of w = exp(o - u), carry no gradient
and multiply the loss per token *after* clipping. Where the old policy is the sampler itself, the ratio has it already.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, masked, per_token, ratio_or_zero
from rollax.objectives.reduction import masked_mean
from rollax.objectives.surrogates import LOG_RATIO_LIMIT, sequence_log_ratio


def _log_weight(old_log_prob, sampler_log_prob, mask):
    shapes = [jnp.shape(x) for x in (old_log_prob, sampler_log_prob, mask)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"old_log_prob, sampler_log_prob and mask must have one shape [B, T], got {shapes}")
    difference = accurate(old_log_prob) - accurate(sampler_log_prob)
    return jax.lax.stop_gradient(jnp.where(jnp.asarray(mask) != 0, difference, 0.0))


def _sequence_log_weight(log_weight, mask, statistic):
    if statistic not in ("product", "geometric"):
        raise ValueError(f"statistic must be 'product' or 'geometric', got {statistic!r}")
    return sequence_log_ratio(log_weight, mask, "sum" if statistic == "product" else "mean")


def _bounded_exp(x):
    return jnp.exp(jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def truncated_weights(old_log_prob, sampler_log_prob, mask, *, cap=2.0, level="token", normalize=False):
    """Truncated importance sampling: `min(w, cap)` (TIS; verl and slime have cap 2).

    Args:
      old_log_prob, sampler_log_prob: nats, `[B, T]`.
      mask: `[B, T]`, bool or 0/1.
      cap: may be traced.
      level: "token", or "sequence" for the product of the sequence's weights at each of its tokens.
      normalize: static; divide by the mean weight of the batch, over tokens or over the rows holding one (verl's
        batch normalisation).

    Returns:
      `[B, T]`, gradient stopped, 0 outside the mask.

    Raises:
      ValueError: unknown level or different shapes.
    """
    log_weight = _log_weight(old_log_prob, sampler_log_prob, mask)
    if level == "sequence":
        log_weight = sequence_log_ratio(log_weight, mask, "sum")
    elif level != "token":
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    weight = jnp.minimum(_bounded_exp(log_weight), cap)
    if normalize:
        counted = mask if level == "token" else (jnp.asarray(mask) != 0).any(axis=1, keepdims=True)
        weight = ratio_or_zero(weight, masked_mean(weight, counted))
    return masked(jnp.broadcast_to(weight, jnp.shape(mask)), mask)


def icepop_weights(old_log_prob, sampler_log_prob, mask, *, low=0.5, high=5.0):
    """IcePop: w where it lies in `[low, high]`, else 0: tokens on which the engines disagree teach nothing.

    Args:
      old_log_prob, sampler_log_prob, mask: as in `truncated_weights`.
      low, high: 0.5 and 5 are OpenRLHF's and NeMo-RL's; may be traced.

    Returns:
      `[B, T]`, gradient stopped, 0 outside the mask.
    """
    return masked_weights(old_log_prob, sampler_log_prob, mask, low=low, high=high, level="token")


def masked_weights(old_log_prob, sampler_log_prob, mask, *, low=0.0, high=3.0, level="sequence", statistic="product"):
    """Masked importance sampling: w where it lies in `[low, high]`, else 0, at token or sequence level.

    Args:
      old_log_prob, sampler_log_prob, mask: as in `truncated_weights`.
      low, high: (0, 3) with level "sequence" is TRL's default mode, "sequence_mask"; may be traced.
      level: "token" (IcePop's form), or "sequence" for one weight at each token of a sequence.
      statistic: the weight of a sequence, the "product" of its tokens' or their "geometric" mean.

    Returns:
      `[B, T]`, gradient stopped, 0 outside the mask.

    Raises:
      ValueError: unknown level or statistic, or different shapes.
    """
    log_weight = _log_weight(old_log_prob, sampler_log_prob, mask)
    if level == "sequence":
        log_weight = _sequence_log_weight(log_weight, mask, statistic)
    elif level != "token":
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    weight = _bounded_exp(log_weight)
    weight = jnp.where((weight >= low) & (weight <= high), weight, 0.0)
    return masked(jnp.broadcast_to(weight, jnp.shape(mask)), mask)


def sequence_mask(old_log_prob, sampler_log_prob, mask, *, low=0.0, high=3.0, statistic="product"):
    """Which sequences have a ratio trainer/sampler in `[low, high]`; their weight is left to the caller.

    Args:
      old_log_prob, sampler_log_prob, mask: as in `truncated_weights`.
      low, high: (0.999, 1.002) with "geometric" is NeMo-RL's. May be traced. For TRL's see `masked_weights`.
      statistic: "product" of the token ratios, or their "geometric" mean.

    Returns:
      bool `[B, T]`, True on the tokens of the sequences that stay.
    """
    log_weight = _log_weight(old_log_prob, sampler_log_prob, mask)
    ratio = _bounded_exp(_sequence_log_weight(log_weight, mask, statistic))
    return (jnp.asarray(mask) != 0) & (ratio >= low) & (ratio <= high)


def rejection_mask(old_log_prob, sampler_log_prob, mask, *, statistic="k1", level="token", low=None, high=None):
    """Reject tokens or sequences by an estimate of KL(sampler || trainer) (verl's rollout correction).

    Args:
      old_log_prob, sampler_log_prob, mask: as in `truncated_weights`.
      statistic: with d = o - u: "k1" is -d, "k2" d^2 / 2, "k3" e^d - 1 - d.
      level: "token" judges each token, "sequence_mean", "sequence_sum" and "sequence_max" the row.
      low, high: bounds on the statistic, nats; None for none; may be traced. verl states k1's bounds as ratios of
        sampler to trainer: give their logarithms.

    Returns:
      bool `[B, T]`, True on the tokens that stay.

    Raises:
      ValueError: unknown statistic or level.
    """
    d = _log_weight(old_log_prob, sampler_log_prob, mask)
    d = jnp.clip(d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    statistics = {"k1": -d, "k2": 0.5 * jnp.square(d), "k3": jnp.expm1(d) - d}
    if statistic not in statistics:
        raise ValueError(f"statistic must be one of {sorted(statistics)}, got {statistic!r}")
    value = statistics[statistic]
    present = jnp.asarray(mask) != 0
    if level == "sequence_mean":
        value = masked_mean(value, mask, axis=1)[:, None]
    elif level == "sequence_sum":
        value = masked(value, mask).sum(axis=1, keepdims=True)
    elif level == "sequence_max":
        value = jnp.max(jnp.where(present, value, -jnp.inf), axis=1, keepdims=True, initial=-jnp.inf)
    elif level != "token":
        raise ValueError(f"level must be 'token', 'sequence_mean', 'sequence_sum' or 'sequence_max', got {level!r}")
    keep = present
    if low is not None:
        keep = keep & (value >= low)
    if high is not None:
        keep = keep & (value <= high)
    return keep


def opsm_mask(log_prob, old_log_prob, advantage, mask, *, threshold):
    """Off-policy sequence masking (DeepSeek-V3.2): drop sequences with A < 0 that the policy has already left.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B]`.
      mask: `[B, T]`, bool or 0/1.
      threshold: on the mean of `old_log_prob - log_prob` over the sequence, nats; may be traced.

    Returns:
      bool `[B, T]`, True on the tokens of the sequences that stay.
    """
    drift = sequence_log_ratio(_log_weight(old_log_prob, log_prob, mask), mask, "mean")
    return (jnp.asarray(mask) != 0) & ~((per_token(advantage, drift) < 0) & (drift > threshold))
