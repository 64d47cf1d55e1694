"""The loss of RetroAgent's decision policy: clipped PPO with a dual clip and a k3 penalty to the reference.

From arXiv 2603.08561, section 2.4, and the released code, which takes both from verl; the dual clip is that of arXiv
1912.09729. The parts are `clipped_surrogate`, `kl_estimate` and `aggregate`; use those for any other mixture.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, check_same_shape, concrete, per_token
from rollax.objectives.kl import kl_estimate
from rollax.objectives.reduction import aggregate
from rollax.objectives.surrogates import LOG_RATIO_LIMIT, clip_bounds, clip_metrics, clipped_surrogate

KL_LIMIT = 10.0  # nats, the released code's bound on k3, beyond which its gradient is zero


def dual_clip_loss(
    logp,
    old_logp,
    adv,
    mask,
    *,
    clip=(0.2, 0.2),
    dual=3.0,
    ref_logp=None,
    kl=0.01,
    agg="token_mean",
    norm=None,
):
    """PPO's clipped surrogate, bounded for negative advantages, plus `kl` times k3 (arXiv 2603.08561, section 2.4).

    Only `logp` carries a gradient. An entropy bonus is the caller's: it needs the whole distribution.

    Args:
      logp: log-probability of the response tokens, nats, `[R, L]`.
      old_logp: the same of the policy that sampled them, nats, `[R, L]`.
      adv: advantage, `[R]` or `[R, L]`.
      mask: of the response tokens, `[R, L]`, bool or 0/1.
      clip: (low, high): the ratio is clipped to `[1 - low, 1 + high]`; may be traced.
      dual: c > 1, for A < 0 the loss of a token is at most `-c A`; may be traced. None for no such bound.
      ref_logp: of the reference policy, nats, `[R, L]`. None for no penalty.
      kl: weight of the penalty, not negative, may be traced.
      agg: static, a mode of `aggregate`. The paper sums without a length, the released code takes the token mean.
      norm: denominator of `aggregate`, to be handed to the parts of a split batch; None for its default.

    Returns:
      (loss `[]`, metrics). Metrics, all `[]` with gradients stopped: "pg_loss" and "kl" (the two terms, reduced like
      the loss, the second before its weight), "clip_fraction", "dual_clip_fraction", "ppo_kl" and "ratio_max" of
      `clip_metrics`.

    Raises:
      ValueError: shapes that do not fit, a concrete negative clip or kl, a concrete dual of at most 1, or an unknown
        agg.
    """
    arrays = {"logp": logp, "old_logp": old_logp, "mask": mask}
    check_same_shape(**arrays, **({} if ref_logp is None else {"ref_logp": ref_logp}))
    if (known := concrete(kl)) is not None and not np.all(known >= 0):
        raise ValueError(f"kl must not be negative, got {kl}")
    logp = accurate(logp)
    old_logp, adv = jax.lax.stop_gradient((accurate(old_logp), per_token(accurate(adv), logp, "adv")))
    lower, upper = clip_bounds(*clip)
    log_ratio = logp - old_logp
    surrogate = clipped_surrogate(log_ratio, adv, lower, upper, dual_clip=dual)
    pg_loss = loss = aggregate(surrogate, mask, agg, norm=norm)
    penalty = jnp.zeros_like(pg_loss)
    if ref_logp is not None:
        estimate = kl_estimate(
            logp, jax.lax.stop_gradient(ref_logp), "k3", log_ratio_clip=LOG_RATIO_LIMIT, value_clip=KL_LIMIT
        )
        penalty = aggregate(estimate, mask, agg, norm=norm)
        loss = pg_loss + kl * penalty
    clipped = clip_metrics(log_ratio, old_logp, lower, upper, adv, mask, dual_clip=dual)
    metrics = {"pg_loss": pg_loss, "kl": penalty}
    metrics |= {name: clipped[name] for name in ("clip_fraction", "dual_clip_fraction", "ppo_kl", "ratio_max")}
    return loss, jax.lax.stop_gradient(metrics)
