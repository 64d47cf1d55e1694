"""Reductions: from a loss per token to a number, with the denominator said out loud.

Libraries differ here more than anywhere else (DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783): the same loss under
another mode is another objective. A denominator of the global batch makes the parts of a split batch add up.
"""

import jax.numpy as jnp

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def accurate(x):
    """At least float32: a sum over half-precision numbers loses them."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked(x, mask):
    """`x * mask`, zero where the mask is, whatever `x` is there (NaN included)."""
    mask = jnp.asarray(mask)
    x = accurate(x)
    return jnp.where(mask != 0, x, 0.0) * mask.astype(x.dtype)


def ratio_or_zero(total, count):
    """`total / count`, 0 with a zero gradient where nothing was counted."""
    counted = count > 0
    return jnp.where(counted, total / jnp.where(counted, count, 1), 0.0)


def masked_mean(x, mask, axis=None):
    """Mean of `x` over the masked elements; 0 where there are none.

    Args:
      x: `[...]`.
      mask: `[...]` or broadcastable to it, bool or 0/1.
      axis: axis or axes to reduce; None for all.
    """
    mask = jnp.broadcast_to(jnp.asarray(mask), jnp.shape(x))
    kept = masked(x, mask)
    return ratio_or_zero(kept.sum(axis), mask.astype(kept.dtype).sum(axis))


def per_token(x, like, name="advantage"):
    """`x` with trailing axes of length one, so that its leading axes meet those of `like`: `[B]` serves `[B, T]`.

    Raises:
      ValueError: the shapes do not broadcast that way.
    """
    x, shape = jnp.asarray(x), jnp.shape(like)
    fits = x.ndim <= len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=False))
    if not fits:
        raise ValueError(f"{name} must broadcast along the leading axes of {shape}, got {x.shape}")
    return x.reshape(x.shape + (1,) * (len(shape) - x.ndim))


def _mode(mode):
    known = mode.replace("-", "_") if isinstance(mode, str) else mode
    if known not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    return known


def denominator(mask, mode, *, max_length=None):
    """What `aggregate` divides by when it is not told; compute it on the *global* batch and hand it to every part.

    Args:
      mask: `[B, T]`, bool or 0/1.
      mode: as in `aggregate`.
      max_length: only for "seq_mean_token_sum_norm", the constant length; None for T.

    Returns:
      float `[]`: the tokens ("token_mean"), the rows that hold a token ("seq_mean_token_mean", "seq_mean_token_sum"), or
      those rows times the constant length ("seq_mean_token_sum_norm").
    """
    mode = _mode(mode)
    mask = accurate(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask must be [B, T], got {mask.shape}")
    if mode == "token_mean":
        return mask.sum()
    rows = (mask != 0).any(axis=1).sum().astype(mask.dtype)
    if mode == "seq_mean_token_sum_norm":
        return rows * (mask.shape[1] if max_length is None else max_length)
    return rows


def aggregate(loss, mask, mode, *, norm=None):
    """Reduce a loss per token to a scalar.

    | mode | sum | divided by `norm`, by default |
    |---|---|---|
    | token_mean (DAPO; TRL "dapo", "cispo", "bnpo") | sum m l | sum m |
    | seq_mean_token_mean (GRPO; TRL "grpo", "sapo") | sum_i (sum_t m l / sum_t m) | rows holding a token |
    | seq_mean_token_sum (TRL "luspo") | sum m l | rows holding a token |
    | seq_mean_token_sum_norm (Dr. GRPO) | sum m l | rows holding a token x T |

    `norm` is in every mode the *whole* denominator, so that `sum(aggregate(part, ..., norm=denominator(all)))` equals
    `aggregate(all)` however a batch is split into rows. The defaults are those of verl 0.9 (whose hyphenated names are
    understood too). TRL also counts empty rows: `norm=B`, or `B * max_length` for its "dr_grpo". verl before 0.9 divided
    seq_mean_token_sum_norm by the width alone: `norm=T`.

    Args:
      loss: `[B, T]`; whatever stands where the mask is zero is ignored.
      mask: `[B, T]`, bool or 0/1.
      mode: one of the above.
      norm: positive scalar, may be traced; None for the default.

    Returns:
      `[]`, float32 or wider. An empty mask gives 0 with zero gradients.

    Raises:
      ValueError: unknown mode, or shapes that are not both `[B, T]`.
    """
    mode = _mode(mode)
    loss, mask = jnp.asarray(loss), jnp.asarray(mask)
    if loss.ndim != 2 or loss.shape != mask.shape:
        raise ValueError(f"loss and mask must have one shape [B, T], got {loss.shape} and {mask.shape}")
    rows = masked(loss, mask).sum(axis=1)
    if mode == "seq_mean_token_mean":
        rows = ratio_or_zero(rows, mask.astype(rows.dtype).sum(axis=1))
    return ratio_or_zero(rows.sum(), denominator(mask, mode) if norm is None else jnp.asarray(norm))
