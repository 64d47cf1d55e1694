"""The readable definition: all scores of every row at once, then a softmax over the keys that it may see."""

import jax
import jax.numpy as jnp

from rollax.kernels.backends import product


def reference(q, k, v, visible, scale):
    """Attention of one query a row and head over a cache.

    Args:
      q: `[B, H, d]`; k, v: `[B, K, S, d]`, head h reads key head h // (H // K).
      visible: bool `[B, S]`.
    Returns:
      (out `[B, H, d]` in q's dtype, lse `[B, H]` in nats, float32 at least); 0 and -inf in a row that sees nothing.
    """
    (B, H, d), K = q.shape, k.shape[1]
    grouped = q.reshape(B, K, H // K, d)
    scores = product("bkgd,bksd->bkgs", grouped, k) * scale
    seen = visible[:, None, None]
    scores = jnp.where(seen, scores, -1e30)  # finite, so that no gradient is NaN
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
    out = product("bkgs,bksd->bkgd", weights, v).astype(q.dtype)
    some = visible.any(-1)[:, None]
    return out.reshape(B, H, d), jnp.where(some, lse.reshape(B, H), -jnp.inf)
