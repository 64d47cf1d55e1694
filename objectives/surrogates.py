"""Policy losses per token: clipped, masked, soft and sequence-level surrogates of the policy gradient.

PPO (arXiv 1707.06347) and its descendants differ only in how they limit the ratio new/old; each limit is a function
here. Losses are to be minimised and come out per token, `[B, T]`; `reduction.aggregate` makes a number of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, check_log_prob, check_same_shape, concrete, masked, per_token
from rollax.objectives.band import binary_divergence
from rollax.objectives.reduction import masked_mean

LOG_RATIO_LIMIT = 20.0  # nats, the bound that verl and BandPO put on a log-ratio before the exponential


def _clip(x, lower, upper):
    """`clip` whose gradient is one on the bounds too, so that L = U = 1 leaves an on-policy gradient whole."""
    return jnp.where(x > upper, upper, jnp.where(x < lower, lower, x))


def _ratio(log_ratio):
    return jnp.exp(_clip(accurate(log_ratio), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def sequence_log_ratio(log_ratio, mask, mode="mean"):
    """Log-ratio of whole sequences, spread over their tokens.

    Args:
      log_ratio: log new/old of the tokens, nats, `[B, T]`.
      mask: `[B, T]`, bool or 0/1.
      mode: "mean" for the geometric mean of the ratios (GSPO, arXiv 2507.18071), "sum" for the sequence's ratio (RLOO
        as in TRL; DPO's and KTO's S when the old policy is the reference).

    Returns:
      `[B, 1]`, to be broadcast over T; 0 for an empty row.

    Raises:
      ValueError: unknown mode or different shapes.
    """
    check_same_shape(log_ratio=log_ratio, mask=mask)
    if mode == "mean":
        return masked_mean(log_ratio, mask, axis=-1)[:, None]
    if mode == "sum":
        return masked(log_ratio, mask).sum(axis=-1, keepdims=True)
    raise ValueError(f"mode must be 'mean' or 'sum', got {mode!r}")


def _check_epsilons(**epsilons):
    for name, x in epsilons.items():
        if (known := concrete(x)) is not None and not np.all(known >= 0):
            raise ValueError(f"{name} must not be negative, got {x}")


def clip_bounds(epsilon_low=0.2, epsilon_high=None):
    """The fixed interval of PPO, `[1 - epsilon, 1 + epsilon]`; with two numbers Clip-Higher (DAPO, arXiv 2503.14476).

    Args:
      epsilon_low: how far the ratio may fall.
      epsilon_high: how far it may rise; None for `epsilon_low`. DAPO uses 0.2 and 0.28.

    Raises:
      ValueError: a concrete negative or NaN epsilon.
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    _check_epsilons(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return 1 - epsilon_low, 1 + epsilon_high


def dcpo_bounds(old_log_prob, epsilon_low=0.16, epsilon_high=0.2, *, upper_max=10.0):
    """The probability-dependent interval of DCPO's dynamic adaptive clipping (as an arm in arXiv 2603.04918).

    `1/2 + sqrt(max(1 - 4 epsilon_low / p, 0)) / 2` and `1/2 + sqrt(1 + 4 epsilon_high / p) / 2`.

    Args:
      old_log_prob: nats, `[...]`.
      epsilon_low, epsilon_high, upper_max: numbers, may be traced.

    Returns:
      (lower, upper), `[...]`, gradients stopped.

    Raises:
      ValueError: a concrete log-probability above 1e-6 or a concrete negative epsilon.
    """
    check_log_prob("old_log_prob", old_log_prob)
    _check_epsilons(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    old_log_prob = jax.lax.stop_gradient(accurate(old_log_prob))
    inverse = jnp.exp(jnp.minimum(-old_log_prob, 80.0))  # 1/p, finite
    lower = 0.5 + 0.5 * jnp.sqrt(jnp.maximum(1 - 4 * epsilon_low * inverse, 0.0))
    upper = 0.5 + 0.5 * jnp.sqrt(1 + 4 * epsilon_high * inverse)
    return lower, jnp.minimum(upper, upper_max)


def clipped_surrogate(log_ratio, advantage, lower, upper, *, dual_clip=None, ratio_cap=None):
    """PPO's clipped surrogate with any interval (arXiv 1707.06347, eq. 7): `-min(r A, clip(r, lower, upper) A)`.

    With `clip_bounds` it is PPO, GRPO and DAPO, with `dcpo_bounds` DCPO, with `band_bounds` BandPO.

    Args:
      log_ratio: log new/old, nats, `[...]`, clipped to +-20.
      advantage: `[...]`, or along its leading axes (`[B]` for `[B, T]`).
      lower, upper: numbers, or arrays like `advantage`; may be traced.
      dual_clip: c > 1: for A < 0 the loss is at most `-c A` (arXiv 1912.09729). On in verl (3) and BandPO (10), off in
        slime, OpenRLHF and Tunix.
      ratio_cap: the ratio itself is cut here before the minimum, for either sign of A (TRL's `delta`, INTELLECT-2).

    Returns:
      loss `[...]`, float32 or wider.

    Raises:
      ValueError: shapes that do not fit, or a concrete `dual_clip` of at most 1.
    """
    ratio = _ratio(log_ratio)
    advantage, lower, upper = (
        per_token(x, ratio, name) for x, name in ((advantage, "advantage"), (lower, "lower"), (upper, "upper"))
    )
    clipped = -advantage * _clip(ratio, lower, upper)
    if ratio_cap is not None:
        ratio = jnp.where(ratio > ratio_cap, ratio_cap, ratio)
    loss = jnp.maximum(-advantage * ratio, clipped)
    if dual_clip is None:
        return loss
    if (c := concrete(dual_clip)) is not None and not np.all(c > 1):
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)


def clip_metrics(log_ratio, old_log_prob, lower, upper, advantage, mask, bins=(0.2, 0.4, 0.6, 0.8), *, dual_clip=None):
    """What a clipped surrogate did to a batch.

    Two fractions are in use and both are here: *clipped* tokens, on which the minimum chose the clipped branch and the
    gradient is zero, and tokens *outside* the interval, whatever the sign of their advantage.

    Args:
      log_ratio, old_log_prob: nats, `[B, T]`.
      lower, upper, advantage: as in `clipped_surrogate`.
      mask: `[B, T]`, bool or 0/1.
      bins: rising edges of the old probability; K edges make K + 1 bins.
      dual_clip: as in `clipped_surrogate`.

    Returns:
      dict of float arrays, gradients stopped.
      `[]`: "clip_fraction" = "clip_fraction_up" (A > 0, above the interval) + "clip_fraction_down" (A < 0, below);
      "outside_fraction" = "outside_fraction_up" + "outside_fraction_down"; "dual_clip_fraction"; "ppo_kl" (mean of
      -log ratio: k1 of old || new, nats); "ratio_mean"; "ratio_max".
      `[K + 1]`: "clip_count_by_prob", "outside_up_count_by_prob", "outside_down_count_by_prob", "token_count_by_prob".
    """
    check_same_shape(log_ratio=log_ratio, old_log_prob=old_log_prob, mask=mask)
    log_ratio, old_log_prob = jax.lax.stop_gradient((accurate(log_ratio), accurate(old_log_prob)))
    log_ratio = _clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    advantage, lower, upper = (
        jax.lax.stop_gradient(per_token(x, ratio, name))
        for x, name in ((advantage, "advantage"), (lower, "lower"), (upper, "upper"))
    )
    above, below = ratio > upper, ratio < lower
    clipped_up, clipped_down = above & (advantage > 0), below & (advantage < 0)
    dual = jnp.zeros_like(above) if dual_clip is None else (advantage < 0) & (ratio > dual_clip)

    edges = jnp.asarray(bins, ratio.dtype)
    bin_ids = jnp.sum(jnp.exp(old_log_prob)[..., None] >= edges, axis=-1).ravel()

    def count(event):
        return jax.ops.segment_sum(masked(event, mask).ravel(), bin_ids, num_segments=len(bins) + 1)

    return {
        "clip_fraction": masked_mean(clipped_up | clipped_down, mask),
        "clip_fraction_up": masked_mean(clipped_up, mask),
        "clip_fraction_down": masked_mean(clipped_down, mask),
        "outside_fraction": masked_mean(above | below, mask),
        "outside_fraction_up": masked_mean(above, mask),
        "outside_fraction_down": masked_mean(below, mask),
        "dual_clip_fraction": masked_mean(dual, mask),
        "ppo_kl": masked_mean(-log_ratio, mask),
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": jnp.max(jnp.where(jnp.asarray(mask) != 0, ratio, 0.0), initial=0.0),
        "clip_count_by_prob": count(clipped_up | clipped_down),
        "outside_up_count_by_prob": count(above),
        "outside_down_count_by_prob": count(below),
        "token_count_by_prob": count(jnp.ones_like(above)),
    }


def dppo_mask(log_prob, old_log_prob, advantage, delta, divergence="kl"):
    """Which tokens keep their gradient under DPPO (arXiv 2602.04879): not those that go on leaving the ball.

    A token is dropped when the divergence on two outcomes exceeds delta and its advantage pushes it further: the
    gradient of `clipped_surrogate` inside `band_bounds`, without solving for the bounds.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B, T]` or `[B]`; zero counts as negative, as in verl (its loss is zero in any case).
      delta: radius, may be traced.
      divergence: as in `band_bounds`; the paper has "kl" and "tv".

    Returns:
      bool `[B, T]`, True to keep.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    log_prob, old_log_prob = jax.lax.stop_gradient((accurate(log_prob), accurate(old_log_prob)))
    advantage = per_token(advantage, log_prob)
    leaving = jnp.where(advantage > 0, log_prob > old_log_prob, log_prob < old_log_prob)
    return ~(leaving & (binary_divergence(old_log_prob, log_prob, divergence) > delta))


def masked_surrogate(log_prob, old_log_prob, advantage, keep_mask, *, ratio_cap=20.0):
    """Importance-weighted policy gradient on the kept tokens: `-sg(min(r, ratio_cap)) A log_prob` (DPPO's form).

    Its value is not that of PPO's surrogate; its gradient is, where the ratio is below the cap.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B, T]` or `[B]`.
      keep_mask: `[B, T]`, of `dppo_mask` or another rule.
      ratio_cap: may be traced; `jnp.inf` for none.

    Returns:
      loss `[B, T]`.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, keep_mask=keep_mask)
    log_prob = accurate(log_prob)
    weight = jax.lax.stop_gradient(jnp.minimum(_ratio(log_prob - old_log_prob), ratio_cap))
    return -weight * per_token(advantage, log_prob) * masked(log_prob, keep_mask)


def policy_gradient(log_prob, advantage):
    """REINFORCE, also GPG (arXiv 2504.02546): `-A log_prob`, `[B, T]` with advantage `[B, T]` or `[B]`."""
    log_prob = accurate(log_prob)
    return -per_token(advantage, log_prob) * log_prob


def cispo_surrogate(log_prob, old_log_prob, advantage, *, epsilon_high, epsilon_low=None, epsilon_high_is="offset"):
    """CISPO (arXiv 2506.13585): clip the importance weight, not the update: `-sg(clip(r)) A log_prob`.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B, T]` or `[B]`.
      epsilon_high: see `epsilon_high_is`.
      epsilon_low: the lower bound is `1 - epsilon_low`; None for no lower bound, as in the paper.
      epsilon_high_is: "offset": the upper bound is `1 + epsilon_high` (verl, slime; about 4 there). "bound": it is
        `epsilon_high` itself (TRL; 5 there).

    Returns:
      loss `[B, T]`.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    if epsilon_high_is not in ("offset", "bound"):
        raise ValueError(f"epsilon_high_is must be 'offset' or 'bound', got {epsilon_high_is!r}")
    log_prob = accurate(log_prob)
    upper = 1 + epsilon_high if epsilon_high_is == "offset" else epsilon_high
    lower = 0.0 if epsilon_low is None else 1 - epsilon_low
    weight = jax.lax.stop_gradient(_clip(_ratio(log_prob - old_log_prob), lower, upper))
    return -weight * per_token(advantage, log_prob) * log_prob


def gspo_surrogate(
    log_prob, old_log_prob, advantage, mask, *, epsilon_low=3e-4, epsilon_high=4e-4, form="sequence", dual_clip=None
):
    """GSPO (arXiv 2507.18071): one clipped ratio a sequence, the geometric mean of its tokens' ratios.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B]`, or `[B, T]` with form "token".
      mask: `[B, T]`, bool or 0/1.
      epsilon_low, epsilon_high: as in `clip_bounds`, may be traced.
      form: "sequence": the ratio of the whole (TRL, slime). "token": `sg(s_i) exp(log_prob - sg(log_prob))`, which
        gives each token the gradient of its own advantage (verl). The same value and gradient where the advantage is
        constant over a sequence.
      dual_clip: as in `clipped_surrogate`.

    Returns:
      loss `[B, T]`, constant over a sequence unless the advantages vary. GSPO reduces it by seq_mean_token_mean.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, mask=mask)
    log_prob = accurate(log_prob)
    log_ratio = sequence_log_ratio(log_prob - old_log_prob, mask)
    if form == "token":
        log_ratio = jax.lax.stop_gradient(log_ratio) + masked(log_prob - jax.lax.stop_gradient(log_prob), mask)
    elif form != "sequence":
        raise ValueError(f"form must be 'sequence' or 'token', got {form!r}")
    log_ratio = jnp.broadcast_to(log_ratio, log_prob.shape)
    lower, upper = clip_bounds(epsilon_low, epsilon_high)
    # A geometric mean beyond e^10 is a broken batch; the bound keeps its gradient out (verl).
    return clipped_surrogate(_clip(log_ratio, -LOG_RATIO_LIMIT, 10.0), advantage, lower, upper, dual_clip=dual_clip)


def gmpo_surrogate(log_prob, old_log_prob, advantage, mask, *, clip_low=0.4, clip_high=0.4):
    """GMPO (arXiv 2507.20673): the geometric mean of ratios that were clipped one by one, pessimistically.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B]`: one a sequence.
      mask: `[B, T]`, bool or 0/1.
      clip_low, clip_high: log-ratios are clipped to `[-clip_low, clip_high]`, may be traced.

    Returns:
      loss `[B, T]`, constant over a sequence: `-s_i A_i`. Reduce it by seq_mean_token_mean.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, mask=mask)
    log_ratio = accurate(log_prob) - old_log_prob
    advantage = per_token(advantage, log_ratio)
    if advantage.shape[1:] not in ((), (1,)):
        raise ValueError(f"advantage must be [B], one a sequence, got {advantage.shape}")
    sign = jnp.sign(advantage)
    clipped = sign * jnp.minimum(sign * log_ratio, sign * _clip(log_ratio, -clip_low, clip_high))
    ratio = _ratio(sequence_log_ratio(clipped, mask))  # the pessimistic side has no bound of its own
    return jnp.broadcast_to(-advantage * ratio, log_ratio.shape)


def sapo_surrogate(log_ratio, advantage, *, tau_positive=1.0, tau_negative=1.05):
    """SAPO (arXiv 2511.20347): a sigmoid gate in the place of the clip, `-(4 / tau) sigmoid(tau (r - 1)) A`.

    Its gradient is PPO's at r = 1 and fades smoothly on both sides.

    Args:
      log_ratio: nats, `[B, T]`, clipped to +-20.
      advantage: `[B, T]` or `[B]`.
      tau_positive, tau_negative: temperature for A > 0 and for A <= 0, may be traced.

    Returns:
      loss `[B, T]`. SAPO reduces it by seq_mean_token_mean.
    """
    ratio = _ratio(log_ratio)
    advantage = per_token(advantage, ratio)
    tau = jnp.where(advantage > 0, tau_positive, tau_negative)
    return -advantage * (4 / tau) * jax.nn.sigmoid(tau * (ratio - 1))


def vespo_surrogate(
    log_prob, old_log_prob, advantage, mask, *, k_positive=2.0, lam_positive=3.0, k_negative=3.0, lam_negative=2.0
):
    """VESPO as in TRL: REINFORCE weighted by a gamma-shaped kernel of the sequence ratio w, `w^k e^{lam (1 - w)}`.

    The weight is 1 at w = 1 and vanishes for sequences that the policy has left, on either side.

    Args:
      log_prob, old_log_prob: nats, `[B, T]`.
      advantage: `[B, T]` or `[B]`.
      mask: `[B, T]`, bool or 0/1.
      k_positive, lam_positive, k_negative, lam_negative: for A >= 0 and for A < 0, may be traced.

    Returns:
      loss `[B, T]`.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, mask=mask)
    log_prob = accurate(log_prob)
    advantage = per_token(advantage, log_prob)
    log_w = _clip(sequence_log_ratio(log_prob - old_log_prob, mask, "sum"), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k = jnp.where(advantage >= 0, k_positive, k_negative)
    lam = jnp.where(advantage >= 0, lam_positive, lam_negative)
    weight = jax.lax.stop_gradient(jnp.exp(k * log_w + lam * (1 - jnp.exp(log_w))))
    return -weight * advantage * log_prob
