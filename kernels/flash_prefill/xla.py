"""Block-sparse attention in plain jnp: loops over the listed blocks alone, so that time follows their number.

Lists (the key blocks of a tile; in the backward pass also the tiles of a key block) are taken a few at a time, in the
order of their lengths, with a traced trip count; a step multiplies one block for each of them. On a CPU one list at a
time is best: its tiles stay in the cache, and the matrix products run near the speed of large ones.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike, product
from rollax.kernels.flash_prefill.reference import LOG2_E, NEVER, below_top, energy_in_bits, product_in_parts, wide

LOWEST = -5e29  # where a running maximum starts: 2^(NEVER - LOWEST) is 0
UNSEEN = 1e30  # lse of a row without keys in the backward pass: its weights are 0
LISTS_AT_ONCE = 64  # on accelerators
# Rows, and mean keys, that are scored at once: what a CPU's caches hold, or 256 MiB of a device.
SCORED_AT_ONCE = {"cpu": (2**12, 2**5), "device": (2**16, 2**10)}


def by_length(function, count):
    """`function(ids [G])`, arrays of `[G, ...]`, over the ids of all lists, a group of like `count` at a time."""
    lists = count.size
    at_once = 1 if jax.default_backend() == "cpu" else min(LISTS_AT_ONCE, lists)
    order = jnp.argsort(-count.reshape(-1), stable=True).astype(jnp.int32)
    groups = jnp.pad(order, (0, -lists % at_once), mode="edge").reshape(-1, at_once)
    place = jnp.zeros(lists, jnp.int32).at[groups.reshape(-1)].set(jnp.arange(groups.size, dtype=jnp.int32))
    results = jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[place], results)


def walk(step, index, count, start):
    """Carries state through `step(ids [G], used bool [G, 1, 1], state)` for each slot of lists `[G, slots]`."""

    def body(slot, state):
        ids = jax.lax.dynamic_index_in_dim(index, slot, axis=1, keepdims=False)
        return step(ids, (slot < count)[:, None, None], state)

    return jax.lax.fori_loop(0, count.max(), body, start)


def seen_by(mask, offset, length, heads, tiles, *, tile: int, block: int, group: int, total: int):
    """What decides which keys a tile sees: `seen(blocks [G])`, bool `[G, tile or 1, block]`.

    Args:
      mask: None, or bool `[H, T, S]`, see `reference`.
      heads, tiles: int32 `[G]`, the tile of its head; total: T.
    """
    if mask is not None:
        mask = mask.reshape(-1, mask.shape[-1] // block, block)
        return lambda blocks: mask[heads * total + tiles, blocks][:, None]
    limits = row_limits(offset, length, heads, tiles, tile=tile, group=group)[..., None]
    return lambda blocks: (blocks[:, None] * block + jnp.arange(block))[:, None] < limits


def row_limits(offset, length, heads, tiles, *, tile: int, group: int):
    """int32 `[G, tile]`: a row of tile `tiles` `[G]` of head `heads` `[G]` sees the keys below its limit."""
    position = offset[heads][:, None] + (tiles[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)) // group
    return jnp.minimum(position + 1, length[heads][:, None])


def forward(q, k, v, index, count, offset, length, mask=None, *, tile, block, group, scale):
    """See `reference.forward`."""
    (H, R, D), HK = q.shape, k.shape[0]
    T, n = R // tile, k.shape[1] // block
    q_tiles = q.reshape(H * T, tile, D)
    k_blocks, v_blocks = (x.reshape(HK * n, block, D) for x in (k, v))
    lists, counts = index.reshape(H * T, -1), count.reshape(-1)
    dtype = wide(q.dtype)

    def some_tiles(ids):
        heads = ids // T
        rows, first = q_tiles[ids], heads // (H // HK) * n
        seen = seen_by(mask, offset, length, heads, ids % T, tile=tile, block=block, group=group, total=T)

        def step(blocks, used, state):
            top, total, out = state
            keys, values = k_blocks[first + blocks], v_blocks[first + blocks]
            x = jnp.where(used & seen(blocks), product("grd,gsd->grs", rows, keys) * (scale * LOG2_E), NEVER)
            new_top = jnp.maximum(top, x.max(-1))
            p = jnp.exp2(x - new_top[..., None])
            shrink = jnp.exp2(top - new_top)
            out = out * shrink[..., None] + product("grs,gsd->grd", p.astype(v.dtype), values)
            return new_top, total * shrink + p.sum(-1), out

        start = jnp.full_like(rows, LOWEST, dtype)[..., 0], jnp.zeros_like(rows, dtype)[..., 0]
        top, total, out = walk(step, lists[ids], counts[ids], (*start, jnp.zeros_like(rows, dtype)))
        some = total > 0
        total = jnp.where(some, total, 1)
        return (out / total[..., None]).astype(q.dtype), jnp.where(some, (top + jnp.log2(total)) / LOG2_E, -jnp.inf)

    out, lse = by_length(some_tiles, count)
    return out.reshape(q.shape), lse.reshape(H, R)


def backward(
    q, k, v, out, lse, d_out, d_lse, index, count, index_t, count_t, offset, length, mask=None,
    *, tile, block, group, scale,
):  # fmt: skip
    """See `reference.backward`. The weights are formed again from lse, once by tile and once by key block."""
    (H, R, D), HK = q.shape, k.shape[0]
    T, n = R // tile, k.shape[1] // block
    dtype = wide(q.dtype)
    # d logits = P * (d_out v^T - shift)
    shift = jnp.sum(d_out.astype(dtype) * out.astype(dtype), -1) - d_lse.astype(dtype)
    lse = jnp.where(lse > -jnp.inf, lse, UNSEEN).astype(dtype)
    q_tiles, do_tiles = (x.reshape(H * T, tile, D) for x in (q, d_out))
    lse_tiles, shift_tiles = (x.reshape(H * T, tile, 1) for x in (lse, shift))
    k_blocks, v_blocks = (x.reshape(HK * n, block, D) for x in (k, v))
    seen_of = partial(seen_by, mask, offset, length, tile=tile, block=block, group=group, total=T)

    def weights(tiles, keys, values, seen):
        """(P, d logits) `[G, tile, block]` of flat tiles and given keys."""
        x = product("grd,gsd->grs", q_tiles[tiles], keys) * scale
        p = jnp.exp(jnp.where(seen, x, NEVER) - lse_tiles[tiles])
        return p, p * (product("grd,gsd->grs", do_tiles[tiles], values) - shift_tiles[tiles]) * scale

    def some_tiles(ids):
        heads = ids // T
        first = heads // (H // HK) * n
        seen = seen_of(heads, ids % T)

        def step(blocks, used, dq):
            keys, values = k_blocks[first + blocks], v_blocks[first + blocks]
            _, dx = weights(ids, keys, values, used & seen(blocks))
            return dq + product("grs,gsd->grd", dx.astype(k.dtype), keys)

        start = jnp.zeros_like(q_tiles[ids], dtype)
        return walk(step, index.reshape(H * T, -1)[ids], count.reshape(-1)[ids], start)

    def some_blocks(ids):
        heads, blocks = ids // n, ids % n
        own = heads // (H // HK) * n + blocks
        keys, values = k_blocks[own], v_blocks[own]

        def step(tiles, used, state):
            dk, dv = state
            seen = seen_of(heads, tiles)(blocks)
            tiles = heads * T + tiles
            p, dx = weights(tiles, keys, values, used & seen)
            dk += product("grs,grd->gsd", dx.astype(q.dtype), q_tiles[tiles])
            return dk, dv + product("grs,grd->gsd", p.astype(d_out.dtype), do_tiles[tiles])

        start = jnp.zeros_like(keys, dtype), jnp.zeros_like(values, dtype)
        return walk(step, index_t.reshape(H * n, -1)[ids], count_t.reshape(-1)[ids], start)

    dq = by_length(some_tiles, count).reshape(q.shape).astype(q.dtype)
    # The query heads of a key head add up.
    dk, dv = (x.reshape(HK, H // HK, *k.shape[1:]).sum(1) for x in by_length(some_blocks, count_t))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def block_limits(offset, length, head, tiles, *, tile: int, block: int, group: int, rule: str):
    """int32 `[G, tile]`: a row of tile `tiles` `[G]` of `head` sees the blocks below its limit."""
    position = offset[head] + (tiles[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)) // group
    valid = position < length[head]
    limit = (position + 1) // block
    if rule == "first":
        whole = (jnp.where(valid, position, -1).max(1, keepdims=True) + 1) // block
        limit = jnp.minimum(position // block + 1, whole)
    return jnp.where(valid, limit, 0)


def parts(size: int, most: int) -> tuple[int, int]:
    """(number, size) of like parts, none above `most`."""
    number = -(-size // most)
    return number, -(-size // number)


def scored_at_once() -> tuple[int, int]:
    return SCORED_AT_ONCE["cpu" if jax.default_backend() == "cpu" else "device"]


def energy(q, kbar, offset, length, *, tile, scale, rule, **static):
    """See `reference.energy`. Mean keys that no row of a group of tiles sees are not multiplied."""
    (H, R, D), (HK, n, _) = q.shape, kbar.shape
    T = R // tile
    rows, blocks = scored_at_once()
    (groups, high), (chunks, wide) = parts(T, max(1, rows // tile)), parts(n, blocks)
    q = jnp.pad(q, ((0, 0), (0, (groups * high - T) * tile), (0, 0))).reshape(H * groups, high * tile, D)
    kbar = jnp.pad(kbar, ((0, 0), (0, chunks * wide - n), (0, 0))).reshape(HK * chunks, wide, D)

    def of_group(i):
        head, rows = i // groups, q[i]
        tiles = i % groups * high + jnp.arange(high, dtype=jnp.int32)
        limit = jnp.minimum(block_limits(offset, length, head, tiles, tile=tile, rule=rule, **static), n)

        def step(chunk, state):
            x, low = product_in_parts("rd,nd->rn", rows, kbar[head // (H // HK) * chunks + chunk])
            x, low = jax.tree.map(lambda x: x.reshape(high, tile, wide), (x, low))
            seen = chunk * wide + jnp.arange(wide) < limit[..., None]
            below, top, rest = below_top(jnp.where(seen, x, NEVER), low, axis=1)
            # The difference is scaled, not x: rounded where it is small.
            total = jnp.where(seen, jnp.exp(below * scale), 0).sum(1)
            results = total, top.squeeze(1), rest.squeeze(1)
            return tuple(
                jax.lax.dynamic_update_index_in_dim(*pair, chunk, 1) for pair in zip(state, results, strict=True)
            )

        total = jnp.zeros((high, chunks, wide), jnp.promote_types(q.dtype, jnp.float32))
        _, *start = alike(q, total, jnp.full_like(total, NEVER), total)
        return jax.lax.fori_loop(0, -(-limit.max() // wide), step, tuple(start))

    results = jax.lax.map(of_group, jnp.arange(H * groups, dtype=jnp.int32))
    whole = (x.reshape(H, groups * high, chunks * wide)[:, :T, :n] for x in results)
    return energy_in_bits(*whole, scale=scale, rule=rule)


def row_energy(q, kbar, offset, length, *, tile, scale, **static):
    """See `reference.row_energy`."""
    (H, R, D), (HK, n, _) = q.shape, kbar.shape
    T = R // tile
    q_tiles = q.reshape(H * T, tile, D)

    def of_tile(i):
        head = i // T
        seen = jnp.arange(n) < block_limits(offset, length, head, (i % T)[None], tile=tile, **static)[0][:, None]
        x = product("rd,nd->rn", q_tiles[i], kbar[head // (H // HK)])
        top = jnp.where(seen, x, NEVER).max(1, keepdims=True)
        p = jnp.where(seen, jnp.exp((x - top) * scale), 0)
        p = p / jnp.maximum(p.sum(1, keepdims=True), 1)
        return p.sum(0), jnp.where(seen.any(0), 0.0, -jnp.inf).astype(p.dtype)

    rows, blocks = scored_at_once()
    at_once = max(1, min(H * T, rows * blocks // (tile * n)))
    results = jax.lax.map(of_tile, jnp.arange(H * T, dtype=jnp.int32), batch_size=at_once)
    return jax.tree.map(lambda x: x.reshape(H, T, n), results)
