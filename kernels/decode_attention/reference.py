"""The readable definition: all scores of every row at once, then a softmax over the keys that it may see."""

import jax
import jax.numpy as jnp


def reference(q, k, v, visible, scale):
    """Attention of one query a row and head over a cache.

    Args:
      q: `[B, H, d]`; k, v: `[B, K, S, d]`, head h reads key head h // (H // K).
      visible: bool `[B, S]`.
    Returns:
      (out `[B, H, d]` in q's dtype, lse `[B, H]` in nats, float32 at least); 0 and -inf in a row that sees nothing.
    """
    (B, H, d), K = q.shape, k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(B, K, H // K, d)
    # No fewer bits in a float32 product than float32 has, on any platform.
    precision = "highest" if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=wide, precision=precision) * scale
    seen = visible[:, None, None]
    scores = jnp.where(seen, scores, -1e30)  # finite, so that no gradient is NaN
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, v.astype(wide), precision=precision).astype(q.dtype)
    some = visible.any(-1)[:, None]
    return out.reshape(B, H, d), jnp.where(some, lse.reshape(B, H), -jnp.inf)
