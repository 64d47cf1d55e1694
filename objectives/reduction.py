"""Reductions: from a loss per token to a number, with the denominator said out loud.

Libraries differ here more than anywhere else (DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783): the same loss under
another mode is another objective. A denominator of the global batch makes the parts of a split batch add up.
"""

import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, concrete, masked, ratio_or_zero

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


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
      float `[]`: the tokens ("token_mean"), the rows that hold a token ("seq_mean_token_mean", "seq_mean_token_sum"),
      or those rows times the constant length ("seq_mean_token_sum_norm").
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
    `aggregate(all)` however a batch is split into parts by rows. The defaults are those of verl 0.9 (whose hyphenated
    names are understood too). TRL counts empty rows as well: `norm=B`, or `B * max_length` for its "dr_grpo". Older
    verl divided seq_mean_token_sum_norm by the width alone: `norm=T`.

    Args:
      loss: `[B, T]`; whatever stands where the mask is zero is ignored.
      mask: `[B, T]`, bool or 0/1.
      mode: one of the above.
      norm: scalar, may be traced; None for the default. Zero (the denominator of an empty batch) gives 0.

    Returns:
      `[]`, float32 or wider. An empty mask gives 0 with zero gradients.

    Raises:
      ValueError: unknown mode, shapes that are not both `[B, T]`, or a concrete `norm` below 0.
    """
    known = None if norm is None else concrete(norm)
    if known is not None and not np.all(known >= 0):
        raise ValueError(f"norm must not be negative, got {norm}")
    mode = _mode(mode)
    loss, mask = jnp.asarray(loss), jnp.asarray(mask)
    if loss.ndim != 2 or loss.shape != mask.shape:
        raise ValueError(f"loss and mask must have one shape [B, T], got {loss.shape} and {mask.shape}")
    rows = masked(loss, mask).sum(axis=1)
    if mode == "seq_mean_token_mean":
        tokens = mask.astype(rows.dtype).sum(axis=1)
        rows = ratio_or_zero(rows, tokens)
        norm = (tokens != 0).sum().astype(rows.dtype) if norm is None else norm  # `denominator`, without a second pass
    return ratio_or_zero(rows.sum(), denominator(mask, mode) if norm is None else jnp.asarray(norm))
