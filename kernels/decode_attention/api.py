"""Attention of one query a row over a cache of keys and values: the public function and the choice of implementation.

A decoding step reads the cache once and does little else, so what counts is that it reads no slot twice and none that
is empty. On TPUs and Hopper GPUs it is the block-sparse operator of `flash_prefill`: the query heads of a key head are
the rows of its only tile, and the list holds the blocks up to the row's length. Long caches of few rows are cut into
parts that are attended to side by side and merged by their normalisers (flash decoding, arXiv 2311.01282).
"""

import jax
import jax.numpy as jnp

from rollax.kernels import backends, flash_prefill
from rollax.kernels.decode_attention import xla
from rollax.kernels.decode_attention.reference import reference
from rollax.kernels.flash_prefill.api import attend, scale_of

TILE = {"pallas_tpu": 16, "interpret": 16, "pallas_mgpu": 64}  # rows of the smallest tile in every dtype
BLOCKS = (512, 256, 128, 64, 32, 16)  # keys of a block: the largest that divides the cache
MASKED = 128  # the smallest of them under a mask, whose entries lie side by side
PROGRAMS = {"pallas_tpu": 2, "interpret": 2, "pallas_mgpu": 256}  # walks that keep a whole chip busy
PART = 2048  # keys: shorter parts would spend more on merging than they gain


def block_of(slots: int, least: int = BLOCKS[-1]) -> int:
    """Keys of a block of the kernels, at least so many, for a cache of so many slots; 0 where none divides it."""
    return next((block for block in BLOCKS if block >= least and slots % block == 0), 0)


def parts_of(slots: int, rows: int, programs: int) -> int:
    """Into how many equal parts a cache is cut: enough for `programs` walks, each of `PART` keys at least."""
    parts = 1
    while rows * parts < programs and slots % (2 * parts * PART) == 0:
        parts *= 2
    return parts


def by_kernel(q, k, v, length, mask, scale: float, implementation: str):
    """(out `[B, H, d]`, lse `[B, H]`) by the block-sparse operator; length int32 `[B]`, at most S.

    mask: None, or bool `[B, S]`, which replaces positions: all rows of a tile are queries of one row of the batch.
    """
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    g = H // K
    tile = -(-g // TILE[implementation]) * TILE[implementation]
    parts = parts_of(S, B * K, PROGRAMS[implementation])
    keys = S // parts
    block = block_of(keys)
    # A part is a key head of its own: cutting the cache is a reshape, since its slots lie side by side.
    heads = B * K * parts
    inside = jnp.clip(length[:, None] - jnp.arange(parts) * keys, 0, keys)
    inside = jnp.broadcast_to(inside[:, None], (B, K, parts)).reshape(heads)
    count = (-(-inside // block))[:, None]
    index = jnp.minimum(jnp.arange(keys // block), jnp.maximum(count - 1, 0))[:, None]
    rows = jnp.pad(q.reshape(B, K, 1, g, d), ((0, 0), (0, 0), (0, 0), (0, tile - g), (0, 0)))
    rows = jnp.broadcast_to(rows, (B, K, parts, tile, d)).reshape(heads, tile, d)
    if mask is not None:
        mask = (mask & (jnp.arange(S) < length[:, None])).reshape(B, 1, parts, keys)
        mask = jnp.broadcast_to(mask, (B, K, parts, keys)).reshape(heads, 1, keys)
    out, lse = attend(
        rows,
        *(x.reshape(heads, keys, d) for x in (k, v)),
        *(index.astype(jnp.int32), count.astype(jnp.int32), inside - 1, inside, mask),
        tile=tile,
        block=block,
        group=tile,  # all rows stand at one position, the last
        scale=scale,
        implementation=implementation,
    )
    out, lse = (x.reshape(B, K, parts, tile, *x.shape[2:])[:, :, :, :g] for x in (out, lse))
    if parts == 1:
        return out.reshape(B, H, d), lse.reshape(B, H)
    some = lse > -jnp.inf
    total = jax.nn.logsumexp(jnp.where(some, lse, xla.HIDDEN), axis=2, keepdims=True)
    weights = jnp.where(some, jnp.exp(lse - total), 0)
    merged = jnp.sum(weights[..., None] * out, axis=2).astype(q.dtype)
    return merged.reshape(B, H, d), jnp.where(some.any(2), total[:, :, 0], -jnp.inf).reshape(B, H)


def last_keys(k, v, length, mask, window: int):
    """The `window` keys before each row's length, as a cache of their own: `(k, v, length, mask)`."""
    start = jnp.maximum(length - window, 0)
    cut = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, window, axis=-2))
    if mask is not None:
        mask = cut(mask[..., None], start)[..., 0]
    return cut(k, start), cut(v, start), length - start, mask


def decode_attention(
    q,
    k,
    v,
    length,
    *,
    mask=None,
    window=None,
    scale=None,
    return_lse=False,
    implementation=None,
    explain=False,
):
    """Softmax attention of one query a row over the first `length` keys of the row's cache, heads grouped.

    Args:
      q: `[B, H, d]`, already rotated; k, v: `[B, K, S, d]`, H a multiple of K; head h reads key head h // (H // K).
      length: integers `[B]` or one for all rows, may be traced: keys in use, the query's own included; beyond S it
        counts as S, below 0 as 0. Slots beyond it, and masked ones, weigh 0 but are read as numbers: NaN or inf in
        them can reach results and gradients (hiding them would cost a pass over the cache).
      mask: bool `[B, S]`, further keys to hide where False, such as padding.
      window: see no more than that many of the last keys, static; they are copied out of the cache first.
      scale: of the logits, static; None for d ** -0.5.
      return_lse: return the log-normalisers too, by which results over parts of a cache can be merged.
      implementation: see `rollax.kernels.backends.resolve`. "xla" walks rows and heads one by one on a CPU; where the
        batch is sharded, use it inside `shard_map`.
      explain: print which implementation runs, and why.
    Returns:
      out `[B, H, d]` in q's dtype, 0 in a row that sees no key; with `return_lse` (out, lse `[B, H]`), nats, float32
      at least, -inf in such a row. Sums are in float32 at least. Differentiable in q, k and v.
    Raises:
      ValueError: shapes or dtypes that do not fit, a window below 1, a scale that is traced or not positive, an
        implementation that cannot take them.
    """
    q, k, v, length = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(length)
    if q.ndim != 3:
        raise ValueError(f"q must be [B, H, d], got {q.shape}")
    B, H, d = q.shape
    if k.ndim != 4 or k.shape != v.shape or k.shape[0] != B or k.shape[3] != d:
        raise ValueError(f"k and v must be one [{B}, K, S, {d}], got {k.shape} and {v.shape}")
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"q's heads must be a multiple of k's, got {H} and {k.shape[1]}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}, {k.dtype} and {v.dtype}")
    if length.shape not in ((), (B,)) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"length must be an integer or integers [{B}], got {length.dtype}{list(length.shape)}")
    if mask is not None and (mask.shape != (B, k.shape[2]) or mask.dtype != bool):
        raise ValueError(f"mask must be bool [{B}, {k.shape[2]}], got {mask.dtype}{list(mask.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    chosen = choose(implementation, q, k, mask, window, explain)
    length = jnp.clip(jnp.broadcast_to(length, (B,)).astype(jnp.int32), 0, k.shape[2])
    if window is not None and window < k.shape[2]:
        k, v, length, mask = last_keys(k, v, length, mask, window)
    scale = scale_of(scale, d)
    if not k.size:  # no row, or none that sees a key
        wide = jnp.promote_types(q.dtype, jnp.float32)
        out, lse = jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, wide)
        return (out, lse) if return_lse else out
    q, k, v, length, *masks = backends.alike(q, k, v, length, *(() if mask is None else (mask,)))
    mask = masks[0] if masks else None
    if chosen == "reference":
        visible = jnp.arange(k.shape[2]) < length[:, None]
        out, lse = reference(q, k, v, visible if mask is None else visible & mask, scale)
    elif chosen == "xla":
        out, lse = xla.attend(q, k, v, length, mask, scale)
    else:
        out, lse = by_kernel(q, k, v, length, mask, scale, chosen)
    return (out, lse) if return_lse else out


def choose(implementation, q, k, mask, window, explain) -> str:
    """The implementation, see `rollax.kernels.backends.resolve`."""
    slots = k.shape[2] if window is None else min(window, k.shape[2])
    least = BLOCKS[-1] if mask is None else MASKED
    block = block_of(slots, least)

    def ask(kernels):
        if not block:
            return f"the cache must have a multiple of {least} slots{' under a mask' * (mask is not None)}, got {slots}"
        return kernels.refusal(q.dtype, k.dtype, q.shape[-1], max(TILE.values()), block)

    return backends.choose("decode_attention", flash_prefill.__package__, implementation, ask, explain=explain)
