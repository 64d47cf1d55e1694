"""Estimators of the KL divergence to a reference policy from sampled tokens (Schulman's k1, k2, k3).

Used as a loss, the *gradient* counts, not the value: k1's vanishes in expectation, k3's is that of the other direction,
k2's is right on policy. The "+" forms keep one estimator's value and take k2's gradient.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, check_same_shape
from rollax.objectives.surrogates import LOG_RATIO_LIMIT

KINDS = ("k1", "abs", "k2", "k3", "k1+", "k3+")


def kl_estimate(log_prob, ref_log_prob, kind="k3", *, log_ratio_clip=None, value_clip=None):
    """Estimate KL(policy || reference) per token.

    With d = log_prob - ref_log_prob: "k1" d, "abs" |d|, "k2" d^2 / 2, "k3" e^-d - 1 + d; "k1+" and "k3+" have the value
    of k1 and k3 and the gradient of k2.

    Args:
      log_prob, ref_log_prob: of tokens sampled from the policy, nats, `[...]`.
      kind: one of the above. Libraries' names: "k3" is verl's and Tunix's low_var_kl, "k2" their mse.
      log_ratio_clip: d is clipped to +- this in k3; None for -80 alone, which keeps e^-d finite. verl: 20.
      value_clip: k3 is clipped to +- this; None for no clip. verl: 10.

    Returns:
      `[...]`, nats, float32 or wider.

    Raises:
      ValueError: unknown kind or different shapes.
    """
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    d = accurate(log_prob) - accurate(ref_log_prob)
    if kind == "k1":
        return d
    if kind == "abs":
        return d * jnp.sign(d)  # a gradient of 0 at d = 0, where that of `abs` is 1
    k2 = 0.5 * jnp.square(d)
    if kind == "k2":
        return k2
    if kind == "k1+":
        value = d
    else:
        clipped = jnp.maximum(d, -80.0)
        if log_ratio_clip is not None:
            clipped = jnp.clip(clipped, -log_ratio_clip, log_ratio_clip)
        value = jnp.expm1(-clipped) + clipped
        if value_clip is not None:
            value = jnp.clip(value, -value_clip, value_clip)
        if kind == "k3":
            return value
    return jax.lax.stop_gradient(value - k2) + k2


def ratio_weighted_kl(log_prob, old_log_prob, ref_log_prob, kind="k3", *, log_ratio_clip=20.0, value_clip=None):
    """A KL estimate times the ratio new/old, differentiated through both: unbiased off policy too (TRL's default).

    Args:
      log_prob, old_log_prob, ref_log_prob: nats, `[...]`. The log-ratio new/old is clipped to +-20.
      kind, log_ratio_clip, value_clip: as in `kl_estimate`. TRL clips nothing.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: unknown kind or different shapes.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob)
    log_ratio = jnp.clip(accurate(log_prob) - accurate(old_log_prob), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    estimate = kl_estimate(log_prob, ref_log_prob, kind, log_ratio_clip=log_ratio_clip, value_clip=value_clip)
    return jnp.exp(log_ratio) * estimate
