"""Causal sliding-window attention with an exact window and memory linear in the sequence's length."""

import jax.numpy as jnp

from rollax.kernels import backends
from rollax.kernels.backends import product


def sliding_window_attention(
    q, k, v, *, window, segment_ids=None, scale=None, implementation=None, impl=None, explain=False
):
    """Every query sees itself and the `window - 1` tokens before it, of its own segment.

    Args:
      q: `[B, H, L, d]`.
      k, v: `[B, HK, L, d]`, HK a divisor of H; head h reads head h // (H // HK).
      window: tokens, the query's own included; static.
      segment_ids: integers `[B, L]`; tokens of different segments do not see each other. Negative ones are padding,
        whose outputs are zero. A segment's tokens must be consecutive.
      scale: of the scores; None for d ** -0.5.
      implementation: "reference" holds scores of `[L, L]`, "xla" (None) of `[L, 2 window]`. `impl` is the same.
      explain: print which and why.
    Returns:
      `[B, H, L, d]` in q's dtype.
    Raises:
      ValueError: shapes that do not fit, a window below 1.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, L, d], got {q.shape}")
    B, H, L, d = q.shape
    if k.shape != v.shape or k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (B, L, d) or H % k.shape[1]:
        raise ValueError(f"k and v must be [{B}, a divisor of {H}, {L}, {d}], got {k.shape} and {v.shape}")
    if not window >= 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if segment_ids is not None and jnp.shape(segment_ids) != (B, L):
        raise ValueError(f"segment_ids must be [{B}, {L}], got {jnp.shape(segment_ids)}")
    chosen = backends.resolve("sliding_window_attention", backends.named(implementation, impl), {}, explain=explain)
    if L == 0:
        return q
    ids = jnp.zeros((B, L), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    if segment_ids is not None:  # what padding holds must reach neither an output nor a gradient
        q, k, v = (jnp.where((ids >= 0)[:, None, :, None], x, 0) for x in (q, k, v))
    q = q.reshape(B, k.shape[1], -1, L, d)
    attend = dense if chosen == "reference" else banded
    out = attend(q, k, v, ids, min(window, L), d**-0.5 if scale is None else scale)
    return out.reshape(B, H, L, d)


def softmax_of(scores, seen, v, spec, dtype):
    """Softmax over the last axis of the scores that are seen, times v; rows that see nothing are zero."""
    scores = jnp.where(seen, scores, -1e30)
    p = jnp.where(seen, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    p = (p / jnp.where(total > 0, total, 1)).astype(v.dtype)
    return product(spec, p, v).astype(dtype)


def visible(query_at, key_at, query_ids, key_ids, window):
    """Positions and segments to a mask, query axis before key axis."""
    age = query_at[..., :, None] - key_at[..., None, :]
    return (
        (age >= 0) & (age < window) & (query_ids[..., :, None] == key_ids[..., None, :]) & (key_ids >= 0)[..., None, :]
    )


def dense(q, k, v, ids, window, scale):
    """The definition: a mask of `[L, L]`. q `[B, HK, g, L, d]`, k, v `[B, HK, L, d]`."""
    at = jnp.arange(q.shape[3])
    seen = visible(at, at, ids, ids, window)[:, None, None]
    scores = scale * product("bhgqd,bhkd->bhgqk", q, k)
    return softmax_of(scores, seen, v, "bhgqk,bhkd->bhgqd", q.dtype)


def banded(q, k, v, ids, window, scale):
    """Blocks of `window` queries against the keys of their own block and of the one before."""
    L, W = q.shape[3], window
    n = -(-L // W)

    def blocks(x, axis, fill=0):
        widths = [(0, n * W - L if i == axis else 0) for i in range(x.ndim)]
        padded = jnp.pad(x, widths, constant_values=fill)
        return padded.reshape(*x.shape[:axis], n, W, *x.shape[axis + 1 :])

    def with_previous(x, axis, fill=0):
        """`[n, W]` at axis and axis + 1 to `[n, 2 W]`: the block before, then the block."""
        first = jnp.full_like(jnp.take(x, jnp.arange(1), axis), fill)
        before = jnp.concatenate([first, jnp.take(x, jnp.arange(n - 1), axis)], axis)
        return jnp.concatenate([before, x], axis + 1)

    q, k, v, ids = blocks(q, 3), blocks(k, 2), blocks(v, 2), blocks(ids, 1, -1)
    k, v, key_ids = with_previous(k, 2), with_previous(v, 2), with_previous(ids, 1, -1)
    seen = visible(jnp.arange(W, 2 * W), jnp.arange(2 * W), ids, key_ids, W)[:, None, None]
    scores = scale * product("bhgnqd,bhnkd->bhgnqk", q, k)
    out = softmax_of(scores, seen, v, "bhgnqk,bhnkd->bhgnqd", q.dtype)
    return out.reshape(*out.shape[:3], n * W, -1)[..., :L, :]
