"""Losses on answers that people preferred: DPO, its label-smoothed form, IPO and KTO.

All of them see an answer only through S, the sum over its tokens of `log_prob - ref_log_prob`, which
`sequence_log_ratio(..., mode="sum")` computes.
"""

import jax
import jax.numpy as jnp

from rollax.objectives.arrays import accurate, check_same_shape, concrete


def dpo_loss(chosen, rejected, beta=0.1, *, label_smoothing=0.0):
    """DPO (arXiv 2305.18290): `-log sigmoid(beta (S_w - S_l))`; smoothed (cDPO), a mix with the swapped pair.

    Args:
      chosen, rejected: S of the preferred and of the other answer, nats, `[B]`.
      beta: strength of the pull to the reference, may be traced.
      label_smoothing: share of wrong labels assumed, in [0, 1/2), may be traced.

    Returns:
      loss `[B]`.

    Raises:
      ValueError: different shapes, or a concrete label_smoothing outside its range.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    known = concrete(label_smoothing)
    if known is not None and not 0 <= known < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 1/2), got {label_smoothing}")
    margin = beta * (accurate(chosen) - accurate(rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def ipo_loss(chosen, rejected, beta=0.1, *, lengths=None):
    """IPO (arXiv 2310.12036): `(S_w - S_l - 1 / (2 beta))^2`.

    Args:
      chosen, rejected: S of the preferred and of the other answer, nats, `[B]`.
      beta: may be traced.
      lengths: None for sums (the paper, OpenRLHF); `(chosen, rejected)`, tokens `[B]` each, to divide every S by its
        length first (TRL).

    Returns:
      loss `[B]`.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = accurate(chosen), accurate(rejected)
    if lengths is not None:
        check_same_shape(chosen=chosen, chosen_length=lengths[0], rejected_length=lengths[1])
        chosen, rejected = (s / jnp.maximum(n, 1) for s, n in zip((chosen, rejected), lengths, strict=True))
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto_reference_point(mismatched):
    """KTO's z0 (arXiv 2402.01306, section 4.2): `max(0, mean S)` over mismatched prompt-answer pairs, gradient stopped.

    Args:
      mismatched: S of answers under other prompts, nats, `[B]`. TRL shifts the answers of the batch by one prompt, so
        that B >= 2; on several devices average the means before the maximum.
    """
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(accurate(mismatched)), 0.0))


def kto_loss(score, desirable, z0, beta=0.1, *, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (arXiv 2402.01306, eq. 8): `w (1 - sigmoid(+-beta (S - z0)))`, plus for desirable answers.

    Args:
      score: S, nats, `[B]`.
      desirable: bool `[B]`.
      z0: the reference point, `[]`, of `kto_reference_point`.
      beta, desirable_weight, undesirable_weight: may be traced.

    Returns:
      loss `[B]`.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(score=score, desirable=desirable)
    if jnp.ndim(z0):
        raise ValueError(f"z0 must be a scalar, got shape {jnp.shape(z0)}")
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (accurate(score) - z0))
