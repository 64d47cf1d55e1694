"""The readable definition of block-sparse attention: a masked softmax over all keys, `[H, R, S]` in memory.

Arguments as every backend takes them (head-major, padded; see `api.attend`): row r of head h stands at position
offset[h] + r // group, key t is seen by it iff its block is listed for the row's tile, t < length[h] and t <= position.
With `mask`, bool `[H, T, S]`, all rows of tile i see the listed keys t of mask[h, i, t], wherever they stand.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.kernels.backends import product
from rollax.kernels.flash_prefill.selection import index_mask

LOG2_E = float(np.log2(np.e))
NEVER = -1e30  # logit of a key that is not seen: finite, no NaN from inf - inf
PARTS, PART_WIDTH = 4, 32  # of a product in parts: so many, or more where they would be wider


def wide(dtype):
    """What sums are formed in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def row_positions(offset, rows: int, group: int):
    """int32 `[H, R]`."""
    return offset[:, None] + jnp.arange(rows, dtype=jnp.int32) // group


def spread_heads(x, heads: int):
    """`[HK, ...]` to `[H, ...]`: key head of each query head."""
    return jnp.repeat(x, heads // x.shape[0], axis=0)


def forward(q, k, v, index, count, offset, length, mask=None, *, tile, block, group, scale):
    """(out `[H, R, D]` in q's dtype, lse `[H, R]` in nats); a row that sees no key: 0 and -inf."""
    H, R, _ = q.shape
    S = k.shape[1]
    accumulate = wide(q.dtype)
    k, v = (spread_heads(x, H).astype(accumulate) for x in (k, v))
    listed = index_mask(index, count, S // block)
    seen = jnp.repeat(jnp.repeat(listed, tile, axis=1), block, axis=2)
    if mask is None:
        t = jnp.arange(S)
        seen &= (t < length[:, None, None]) & (t <= row_positions(offset, R, group)[..., None])
    else:
        seen &= jnp.repeat(mask, tile, axis=1)
    logits = jnp.einsum("hrd,hsd->hrs", q.astype(accumulate), k, precision="highest") * scale
    any_seen = seen.any(-1)
    # Where no key is seen a constant takes the logits' place, so that no NaN enters the gradient.
    lse = jax.nn.logsumexp(jnp.where(seen, logits, jnp.where(any_seen[..., None], -jnp.inf, 0)), axis=-1)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - lse[..., None], 0)), 0)
    out = jnp.einsum("hrs,hsd->hrd", weights, v, precision="highest")
    return out.astype(q.dtype), jnp.where(any_seen, lse, -jnp.inf)


def backward(q, k, v, out, lse, d_out, d_lse, index, count, index_t, count_t, offset, length, mask=None, **static):
    """(dq, dk, dv) by differentiating the definition."""
    primal = lambda q, k, v: forward(q, k, v, index, count, offset, length, mask, **static)  # noqa: E731
    return jax.vjp(primal, q, k, v)[1]((d_out, d_lse))


def seen_blocks(offset, length, rows: int, n: int, *, tile, block, group, rule):
    """bool `[H, R, n]`: whether a row counts in the energy of a block; `rule` "last" (v1) or "first" (V2)."""
    position = row_positions(offset, rows, group)
    valid = position < length[:, None]
    j = jnp.arange(n)
    if rule == "last":
        return valid[..., None] & (position[..., None] >= j * block + block - 1)
    last = jnp.where(valid, position, -1).reshape(position.shape[0], -1, tile).max(-1)
    active = jnp.repeat((last + 1) // block, tile, axis=1)
    return valid[..., None] & (position[..., None] >= j * block) & (j < active[..., None])


def product_in_parts(equation: str, q, kbar):
    """(x, low): <q, kbar> is x + low. A float32 rounds a logit of 20 by 1e-6, and so would the exponential be.

    Tokens narrower than float32 are themselves rounded by more: one product, low is None.
    """
    if q.dtype.itemsize < 4:
        return product(equation, q, kbar), None
    D = q.shape[-1]
    width = min(PART_WIDTH, -(-D // PARTS))
    parts = [product(equation, q[..., at : at + width], kbar[..., at : at + width]) for at in range(0, D, width)]
    # Computed once: a fusion that forms x again, by a fused multiply-add, would not find its own largest.
    return jax.lax.optimization_barrier(exact_sum(parts))


def exact_sum(parts):
    """(x, low): x is the sum of the arrays rounded, low what the roundings took (Knuth's two-sum)."""
    x, low = parts[0], jnp.zeros_like(parts[0])
    for part in parts[1:]:
        total = x + part
        of_part = total - x
        x, low = total, low + ((x - (total - of_part)) + (part - of_part))
    return x, low


def below_top(x, low, axis: int):
    """(x + low less the largest of them along `axis`, the x and the low of the largest, their axes kept)."""
    top = jnp.max(x, axis=axis, keepdims=True)
    if low is None:
        return x - top, top, jnp.zeros_like(top)
    rest = jnp.max(jnp.where(x == top, low, NEVER), axis=axis, keepdims=True)
    rest = jnp.where(rest > NEVER, rest, 0)
    return (x - top) + (low - rest), top, rest


def energy_in_bits(total, top, rest, *, scale, rule):
    """(sum, max) of `BlockEnergy` from the sums relative to x = top + rest; `[H, T, n]`, top NEVER where none is seen.

    A float32 rounds a max of 20 bits by 1e-6. V2 (`rule` "first") compares the sums of a tile: they take what its
    largest max and their own were rounded by. v1's stay sums relative to x.
    """
    seen, to_bits = top > NEVER, scale * LOG2_E
    bits = jax.lax.optimization_barrier(jnp.where(seen, top * to_bits + rest * to_bits, NEVER))
    if rule == "first":
        best = jnp.argmax(bits, axis=-1, keepdims=True)
        top, rest, rounded = (x - jnp.take_along_axis(x, best, axis=-1) for x in (top, rest, bits))
        total *= jnp.exp2(jnp.where(seen, (top + rest) * to_bits - rounded, 0))
    return total, jnp.where(seen, bits, -jnp.inf)


def energy(q, kbar, offset, length, *, tile, block, group, scale, rule):
    """(sum, max) `[H, T, n]` of `BlockEnergy`."""
    H, R, _ = q.shape
    n = kbar.shape[1]
    x, low = product_in_parts("hrd,hnd->hrn", q, spread_heads(kbar, H))
    seen = seen_blocks(offset, length, R, n, tile=tile, block=block, group=group, rule=rule)
    x, low, seen = jax.tree.map(lambda x: x.reshape(H, R // tile, tile, n), (jnp.where(seen, x, NEVER), low, seen))
    below, top, rest = below_top(x, low, axis=2)
    # The difference is scaled, not x: rounded where it is small.
    total = jnp.where(seen, jnp.exp(below * scale), 0).sum(axis=2)
    return energy_in_bits(total, *jax.tree.map(lambda x: x.squeeze(2), (top, rest)), scale=scale, rule=rule)


def row_energy(q, kbar, offset, length, *, tile, block, group, scale, rule):
    """As `energy`, each row's scores a softmax over the blocks it sees: `sum` holds their sums, `max` 0 where seen."""
    H, R, _ = q.shape
    n = kbar.shape[1]
    accumulate = wide(q.dtype)
    kbar = spread_heads(kbar, H).astype(accumulate)
    x = jnp.einsum("hrd,hnd->hrn", q.astype(accumulate), kbar, precision="highest") * scale
    seen = seen_blocks(offset, length, R, n, tile=tile, block=block, group=group, rule=rule)
    x = jnp.where(seen, x, -jnp.inf)
    top = x.max(axis=-1, keepdims=True)
    weights = jnp.exp(x - jnp.where(top > -jnp.inf, top, 0))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    tiles = lambda x: x.reshape(H, R // tile, tile, n)  # noqa: E731
    return tiles(weights).sum(axis=2), jnp.where(tiles(seen).any(axis=2), 0.0, -jnp.inf).astype(accumulate)
