"""Band: the ratio interval that an f-divergence trust region leaves to the sampled token (BandPO, arXiv 2603.04918).

The divergence over the whole vocabulary is smallest when all other tokens are scaled by one factor, so the interval is
found on two outcomes, the token against the rest: `p f(r) + (1 - p) f((1 - r p) / (1 - p)) = delta`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import check_log_prob, check_same_shape, concrete, promoted


class Divergence(NamedTuple):
    """An f-divergence `sum_v old(v) f(new(v) / old(v))`, with f convex and f(1) = 0.

    Attributes:
      f: `f(u, t)` at the ratio u >= 0, elementwise, t = u - 1. Near zero only u has correct digits, near one only t.
      limit_at_one: `limit_at_one(delta)`, the lower bound in the limit p -> 1; None to take the solver's own value at
        the largest p below one.
      bounds: `bounds(outcome, delta) -> (lower, upper)` in closed form; None for the generic solver.
      binary: `binary(old, new)`, the divergence of two outcomes where `p f(r)` would overflow; None for the definition.
    """

    f: Callable
    limit_at_one: Callable | None = None
    bounds: Callable | None = None
    binary: Callable | None = None


class Outcome(NamedTuple):
    """One outcome of two: its probability `p`, that of the other one `q = 1 - p`, and their logarithms."""

    p: jax.Array
    log_p: jax.Array
    q: jax.Array
    log_q: jax.Array


def _log_limit(dtype):
    """The largest |log p| for which p, 1/p and delta/p are ordinary numbers of this type."""
    return 80.0 if jnp.finfo(dtype).bits <= 32 else 700.0


def _outcome(log_prob):
    limit = _log_limit(log_prob.dtype)
    low, high = jnp.asarray(-limit, log_prob.dtype), jnp.asarray(-math.exp(-limit), log_prob.dtype)
    log_p = jax.lax.clamp(
        low, log_prob, high
    )  # selects its gradient; that of `clip` is 0 * inf = NaN beyond the limits
    p, q = jnp.exp(log_p), -jnp.expm1(log_p)
    log_q = jnp.where(p < 0.5, jnp.log1p(-p), jnp.log(q))
    return Outcome(p, log_p, q, log_q)


# --- Kullback-Leibler: Newton on the shift of the token's logit ------------------------------------------------------


def _kl_logit_shift(outcome, delta, newton_steps):
    """The u >= 0 with `log(1 + p (e^u - 1)) - p u = delta`: how far the outcome's logit may rise.

    The left side is KL(old || new) when the logit of the outcome rises by u. It is convex in u, so Newton descends to
    the root without a bracket. The start is the smaller of the parabola at u = 0 and the asymptote at infinity; for
    p < 1/2 one fixed-point step takes over, which contracts by old/new probability, just where Newton would be slow.
    """
    p, log_p, q, _ = outcome
    u = jnp.minimum(jnp.sqrt(2 * delta / p / q), (delta - log_p) / q)
    gain = delta + p * u
    fixed_point = jnp.logaddexp(0.0, gain + jnp.log(-jnp.expm1(-gain)) - log_p)
    u = jax.lax.optimization_barrier(jnp.where(p < 0.5, jnp.minimum(u, fixed_point), u))
    for _ in range(newton_steps):
        decay = jnp.exp(-u)
        # For p < 1/2 the divergence grows out of expm1(u), which overflows for large u; for p > 1/2 every term of the
        # other form is of the size of q.
        grown = jnp.where(u < 30.0, jnp.log1p(p * jnp.expm1(jnp.minimum(u, 30.0))), u + jnp.log(p + q * decay)) - p * u
        shrunk = q * u + jnp.log1p(q * jnp.expm1(-u))
        value = jnp.where(p < 0.5, grown, shrunk)
        slope = -p * q * jnp.expm1(-u) / (p + q * decay)
        u = u - (value - delta) / slope
    return u


def _kl_bounds(outcome, delta, newton_steps):
    p, log_p, q, log_q = outcome
    delta = jnp.minimum(delta, _log_limit(delta.dtype))  # a ratio of e^-delta below that is zero in any case
    up = _kl_logit_shift(outcome, delta, newton_steps)
    down = _kl_logit_shift(Outcome(q, log_q, p, log_p), delta, newton_steps)  # the token falls as the rest rises
    up, down = jax.lax.optimization_barrier((up, down))
    upper = jnp.where(p < 0.5, 1 / (p + q * jnp.exp(-up)), 1 / (1 + q * jnp.expm1(-up)))
    lower = 1 / (1 + q * jnp.expm1(down))
    return lower, upper


# --- Closed forms ----------------------------------------------------------------------------------------------------


def _symmetric_bounds(spread):
    """`1 -+ spread`; what is left of the lower one by rounding alone is saturation."""
    return jnp.where(spread < 1 - 8 * jnp.finfo(spread.dtype).eps, 1 - spread, 0.0), 1 + spread


def _tv_bounds(outcome, delta):
    return _symmetric_bounds(delta / outcome.p)


def _chi2_bounds(outcome, delta):
    return _symmetric_bounds(jnp.sqrt(delta * outcome.q / outcome.p))


def _chi2_binary(old, new):
    """`(r - 1)^2 p / q`, the root taken first and a large r scaled in the exponent: r^2 alone overflows."""
    log_ratio, log_scale = new.log_p - old.log_p, 0.5 * (old.log_p - old.log_q)
    near = jnp.expm1(jnp.minimum(log_ratio, 1.0)) * jnp.exp(log_scale)
    far = jnp.exp(jnp.maximum(log_ratio, 1.0) + log_scale) - jnp.exp(log_scale)
    return jnp.square(jnp.where(log_ratio < 1, near, far))


# --- Any f: bisection on log r ---------------------------------------------------------------------------------------


def _two_outcomes(f, old, log_ratio, new_q):
    """`p f(r) + (1 - p) f(rest)` at the log ratio of the token; `new_q` is what the rest then has."""
    t = jnp.expm1(log_ratio)
    # The ratio of the rest: from the token's move where that was small, from `new_q` where the rest nearly vanished.
    small = old.p * jnp.abs(t) < 0.5 * old.q
    rest_t = -old.p * jnp.where(small, t, 0.0) / old.q
    rest_u = jnp.where(small, 1.0, new_q / old.q)
    rest_u, rest_t = jnp.where(small, 1 + rest_t, rest_u), jnp.where(small, rest_t, rest_u - 1)
    return old.p * f(jnp.exp(log_ratio), t) + old.q * f(rest_u, rest_t)


def _bisect(f, outcome, delta, end):
    """The log ratio between 0 (inside the ball) and `end` at which the divergence is delta; `end` where it is not.

    `end` itself is never evaluated: f may be infinite or undefined there, and a saturated bound converges to it.
    """
    steps = 40 if jnp.finfo(delta.dtype).bits <= 32 else 64  # beyond the last bit of the widest bracket

    def halve(_, bracket):
        inside, outside = bracket
        middle = 0.5 * (inside + outside)
        new_q = -jnp.expm1(jnp.minimum(outcome.log_p + middle, 0.0))
        fits = _two_outcomes(f, outcome, middle, new_q) <= delta
        return jnp.where(fits, middle, inside), jnp.where(fits, outside, middle)

    inside, outside = jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(end), end))
    return jnp.where(outside == end, end, inside)


def _generic_bounds(f, outcome, delta):
    shape = jnp.broadcast_shapes(outcome.p.shape, delta.shape)
    outcome = Outcome(*(jnp.broadcast_to(x, shape) for x in outcome))
    delta = jnp.broadcast_to(delta, shape)
    upper = jnp.exp(_bisect(f, outcome, delta, -outcome.log_p))
    floor = jnp.full(shape, -_log_limit(delta.dtype), delta.dtype)
    log_lower = _bisect(f, outcome, delta, floor)
    return jnp.where(log_lower == floor, 0.0, jnp.exp(log_lower)), upper


# --- The table -------------------------------------------------------------------------------------------------------


def _log(u, t):
    return jnp.where(jnp.abs(t) < 0.5, jnp.log1p(jnp.where(jnp.abs(t) < 0.5, t, 0.0)), jnp.log(u))


def _u_log_u(u, t):
    return jnp.where(u > 0, u * _log(jnp.where(u > 0, u, 1.0), t), 0.0)


_DIVERGENCES = {
    "kl": Divergence(lambda u, t: t - _log(u, t), lambda delta: jnp.exp(-delta)),
    "tv": Divergence(lambda u, t: 0.5 * jnp.abs(t), lambda delta: jnp.maximum(1 - delta, 0.0), _tv_bounds),
    "chi2": Divergence(lambda u, t: jnp.square(t), jnp.ones_like, _chi2_bounds, _chi2_binary),
    "rkl": Divergence(lambda u, t: _u_log_u(u, t) - t, jnp.ones_like),
    "neyman": Divergence(
        lambda u, t: t * (t / u), lambda delta: 1 / (1 + delta), binary=lambda old, new: _chi2_binary(new, old)
    ),
    "hellinger": Divergence(
        lambda u, t: jnp.square(t / (1 + jnp.sqrt(u))), lambda delta: jnp.square(jnp.maximum(1 - 0.5 * delta, 0.0))
    ),
    "js": Divergence(lambda u, t: 0.5 * (_u_log_u(u, t) - (1 + u) * jnp.log1p(0.5 * t))),
}


def register_divergence(name, f, limit_at_one=None):
    """Make a divergence of your own known under a name (the built-in ones cannot be replaced).

    Args:
      name: a new name; registering the same function and limit again is harmless.
      f: `f(u)`, elementwise over ratios u >= 0, convex, f(1) = 0 and, best, f'(1) = 0. It may be infinite at 0. Its
        bounds come from bisection, which asks f only inside (0, 1/p) and at the complementary ratio.
      limit_at_one: lower bound in the limit p -> 1, a number or `limit_at_one(delta)`; None for the solver's value.

    Raises:
      ValueError: f is not callable, or the name already stands for another divergence, or for this one with another
        limit (compiled functions may hold it).
    """

    def of_ratio(u, t):
        del t
        return f(u)

    def constant_limit(delta):
        return jnp.full_like(delta, limit_at_one)

    if not callable(f):
        raise ValueError(f"f must be a function of the ratio, got {f!r}")
    of_ratio.given = (f, limit_at_one)
    if name in _DIVERGENCES:
        if getattr(_DIVERGENCES[name].f, "given", None) != of_ratio.given:
            raise ValueError(f"name must be new, {name!r} already stands for another divergence")
        return
    given = limit_at_one is None or callable(limit_at_one)
    _DIVERGENCES[name] = Divergence(of_ratio, limit_at_one if given else constant_limit)


def _divergence(name):
    if name not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {sorted(_DIVERGENCES)}, got {name!r}")
    return _DIVERGENCES[name]


def _check_delta(delta):
    known = concrete(delta)
    if known is not None and not np.all(known >= 0):
        raise ValueError(f"delta must not be negative, got {delta}")


def _check_solver(upper_max, newton_steps):
    known = concrete(upper_max)
    if known is not None and not np.all(known >= 1):
        raise ValueError(f"upper_max must be at least 1, got {upper_max}")
    if newton_steps < 1:
        raise ValueError(f"newton_steps must be at least 1, got {newton_steps}")


# --- Public functions ------------------------------------------------------------------------------------------------


def band_bounds(log_prob, delta, divergence="kl", *, upper_max=jnp.inf, newton_steps=12):
    """Ratio interval that keeps a token inside an f-divergence ball (BandPO, arXiv 2603.04918, Theorem 1).

    Args:
      log_prob: log-probability of the sampled token under the old policy, nats, `[...]`. Clipped so that p and 1 - p
        stay above e^-80 (float32) or e^-700 (float64): p = 0 and p = 1 give the limits, finite.
      delta: radius of the ball, `[]` or broadcastable to `[...]`, may be traced. Nats for "kl", "rkl" and "js",
        dimensionless for the others. Zero (or a traced negative number) leaves no room: both bounds are 1.
      divergence: "kl" (old || new), "rkl" (new || old), "tv", "chi2" (Pearson), "neyman", "hellinger" (2 - 2 BC),
        "js", or a name given to `register_divergence`.
      upper_max: cap on the upper bound, >= 1 (the paper's runs use 10), may be traced; then 1 where it is below.
      newton_steps: Newton steps of "kl". Five reach float64 rounding for every p in [1e-12, 1 - 1e-7] and delta in
        [1e-6, 50], so a training loop may ask for fewer. The others are closed forms or bisect to the last bit.

    Returns:
      (lower, upper) with `0 <= lower <= 1 <= upper <= min(1/p, upper_max)`, both `[...]`, float32 or wider, gradients
      stopped.

    Raises:
      ValueError: unknown divergence, fewer than one Newton step, or concretely a negative delta, an upper_max below 1
        or a log_prob above 1e-6.
    """
    check_log_prob("log_prob", log_prob)
    _check_delta(delta)
    _check_solver(upper_max, newton_steps)
    entry = _divergence(divergence)
    log_prob, delta = jax.lax.stop_gradient(promoted(log_prob, delta))
    # Without barriers XLA's CPU fusions compute the outcome and Newton's start again in every use: four times slower.
    outcome = jax.lax.optimization_barrier(_outcome(log_prob))
    radius = jnp.where(delta > 0, delta, 1.0)  # Newton divides by zero at the root r = 1

    if divergence == "kl":
        lower, upper = _kl_bounds(outcome, radius, newton_steps)
    elif entry.bounds is not None:
        lower, upper = entry.bounds(outcome, radius)
    else:
        lower, upper = _generic_bounds(entry.f, outcome, radius)
    if entry.limit_at_one is not None:
        lower = jnp.where(log_prob >= 0, entry.limit_at_one(radius), lower)
    upper = jnp.minimum(upper, jnp.where(log_prob >= 0, 1.0, 1 / outcome.p))

    lower = jnp.where(delta > 0, jnp.clip(lower, 0.0, 1.0), 1.0)
    upper = jnp.where(delta > 0, jnp.maximum(upper, 1.0), 1.0)
    upper = jnp.minimum(upper, jnp.maximum(jnp.asarray(upper_max, upper.dtype), 1.0))
    return jax.lax.stop_gradient((lower, upper))


def relax_bounds(lower, upper, epsilon_low=0.2, epsilon_high=0.28):
    """Union of an interval with the fixed one `[1 - epsilon_low, 1 + epsilon_high]` (BandPO's relaxation).

    Args:
      lower, upper: `[...]`, of `band_bounds` or another rule.
      epsilon_low, epsilon_high: Clip-Higher's numbers (DAPO, arXiv 2503.14476), may be traced.

    Returns:
      (lower, upper), `[...]`.
    """
    return jnp.minimum(lower, 1 - epsilon_low), jnp.maximum(upper, 1 + epsilon_high)


def binary_divergence(old_log_prob, new_log_prob, divergence="kl"):
    """Divergence between old and new policy on two outcomes, the sampled token and the rest.

    It bounds the divergence over the whole vocabulary from below, and `r <= U(p, delta)` if and only if it is at most
    delta (for r > 1; likewise below): the mask of DPPO (arXiv 2602.04879).

    Args:
      old_log_prob, new_log_prob: of the sampled token, nats, `[...]`, clipped as in `band_bounds` (scalars serve all).
      divergence: as in `band_bounds`.

    Returns:
      `[...]`, >= 0, float32 or wider, differentiable.

    Raises:
      ValueError: unknown divergence, different shapes or a concrete log-probability above 1e-6.
    """
    check_log_prob("old_log_prob", old_log_prob)
    check_log_prob("new_log_prob", new_log_prob)
    if jnp.ndim(old_log_prob) and jnp.ndim(new_log_prob):
        check_same_shape(old_log_prob=old_log_prob, new_log_prob=new_log_prob)
    entry = _divergence(divergence)
    old, new = (_outcome(x) for x in promoted(old_log_prob, new_log_prob))
    if entry.binary is not None:
        return entry.binary(old, new)
    return _two_outcomes(entry.f, old, new.log_p - old.log_p, new.q)
