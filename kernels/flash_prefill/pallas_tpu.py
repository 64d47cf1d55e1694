"""Block-sparse attention and block energies on TPUs, as Pallas kernels (arXiv 2603.06199, 2608.19758; 2205.14135).

The head-major operator behind the public functions: `forward`, `backward` (dq by query tiles, dk and dv by key blocks)
and `energy`. The attention kernels are what a step of `pallas_tpu_walk.walk` does with the blocks that it has gathered.

Masks cost nothing where every query of a step sees every key. Row r stands at offset + r // group, so it sees key t
iff r >= group * (t - offset): no division. A mask by tiles (mean keys) travels with the queries, a row a tile.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rollax.kernels.backends import alike
from rollax.kernels.flash_prefill.pallas_tpu_walk import (
    SMEM_BYTES,
    STEP_SCORES,
    Lists,
    Step,
    gather_width,
    lists_fit,
    quotient,
    shape_like,
    smallest,
    walk,
)
from rollax.kernels.flash_prefill.reference import PARTS, below_top, energy_in_bits, exact_sum

LOG2E = 1.0 / math.log(2.0)
MASKED = -1e30  # finite: -inf - -inf would be NaN
FAR = 2**30  # beyond every row of a head
LANES = 128
BLOCK_BYTES = 2**19  # a tile of queries or a block of keys; `energy` holds 16 of them
ENERGY_TILES, ENERGY_BLOCKS = 8, 256  # query tiles and key blocks of a step of `energy`


def refusal(q_dtype, k_dtype, head_width: int, tile: int, block: int, *, slots: int = 1, repeat: int = 1) -> str | None:
    """Why the kernels cannot take a call, None if they can.

    Args:
      q_dtype, k_dtype: of the queries, and of the keys and values.
      head_width: D.
      tile, block: rows of a query tile, keys of a block.
      slots: the most blocks in a list (for gradients also the most tiles in a list of the transposed index).
      repeat: query heads of a key/value head.
    """
    q_dtype, k_dtype = jnp.dtype(q_dtype), jnp.dtype(k_dtype)
    if q_dtype != k_dtype:
        return f"queries and keys must have one dtype, got {q_dtype} and {k_dtype}"
    if q_dtype not in (jnp.float32, jnp.bfloat16):
        return f"the dtype must be float32 or bfloat16, got {q_dtype}"
    if not 1 <= head_width <= 256:
        return f"the head width must be at most 256, got {head_width}"
    rows = 32 // q_dtype.itemsize  # of a native tile: 8 for float32, 16 for bfloat16
    for name, size in (("tile", tile), ("block", block)):
        if size % rows:
            return f"{name} must be a multiple of {rows} for {q_dtype}, got {size}"
        if size * head_width * q_dtype.itemsize > BLOCK_BYTES:
            return f"{name} must have at most {BLOCK_BYTES} bytes, got {size} rows of {head_width} {q_dtype}"
    if tile * block > 2 * STEP_SCORES:
        return f"tile * block must be at most {2 * STEP_SCORES} scores, got {tile} * {block}"
    if not lists_fit(slots, repeat):
        return f"the lists of {repeat} heads with {slots} slots each do not fit into {SMEM_BYTES} bytes of SMEM"
    return None


def dot(a, b, contract: tuple[int, int]):
    """Product of two matrices over the given axes, float32 exact to float32 and bfloat16 in one pass of the unit."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def lanes(x, width: int):
    """Lane-replicated statistics `[rows, 128]` as `[rows, width]`: whole registers are reused, not broadcast."""
    if width % LANES == 0:
        return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)
    return x[:, :width] if width < LANES else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def diagonal(rows: int):
    """Boolean `[rows, rows]`; with it a masked sum turns a column into a row and back without a transpose."""
    return lax.broadcasted_iota(jnp.int32, (rows, rows), 0) == lax.broadcasted_iota(jnp.int32, (rows, rows), 1)


def as_row(column):
    """`[rows, n >= 1]`, lanes alike, to `[1, rows]`."""
    rows = column.shape[0]
    square = jnp.broadcast_to(column[:, :1], (rows, rows))
    return jnp.sum(jnp.where(diagonal(rows), square, 0.0), axis=0, keepdims=True)


def as_column(row):
    """`[1, rows]` to `[rows, 1]`."""
    rows = row.shape[1]
    square = jnp.broadcast_to(row, (rows, rows))
    return jnp.sum(jnp.where(diagonal(rows), square, 0.0), axis=1, keepdims=True)


def stacked(ref):
    """The gathered blocks of a step, `[width, a, b]`, one below the other."""
    return ref[...].reshape(-1, ref.shape[-1])


def positions(ids: Sequence, used, size: int, scale: int):
    """`scale * (ids[u] * size + i)`, rows i of the gathered blocks u, `[1, len(ids) * size]`; FAR where unused."""
    place = lax.broadcasted_iota(jnp.int32, (1, len(ids) * size), 1)
    first = jnp.full(place.shape, ids[0] * size, jnp.int32)
    for u, block in enumerate(ids[1:], 1):
        first = jnp.where(place >= u * size, (block - u) * size, first)
    return jnp.where(place < used * size, scale * (first + place), FAR)


def attend_rows(step: Step, fixed, gathered, outputs, scratch, *, block: int, group: int, scale: float):
    """Forward, a query tile against gathered key blocks.

    Row r sees key t iff r >= group * t - shift and t < length, or, with the tile's mask beside q, iff that is 1.
    """
    (q_ref, *mask), (k_ref, v_ref) = fixed, gathered
    out_ref, lse_ref = outputs
    top_ref, total_ref, sum_ref = scratch
    tile, width = q_ref.shape[1:]

    @pl.when(step.opens)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def accumulate(masked: bool):
        k, v = stacked(k_ref), stacked(v_ref)
        x = dot(q_ref[0], k, (1, 1)) * (scale * LOG2E)
        if masked:
            seen = mask_of_tile(step, *mask, block) if mask else sees_keys(step, tile, block, group)
            x = jnp.where(seen, x, MASKED)
        top = jnp.maximum(top_ref[...], jnp.max(x, axis=1, keepdims=True))
        p = jnp.exp2(x - lanes(top, x.shape[1]))
        p = jnp.where(seen, p, 0.0) if masked else p
        shrink = jnp.exp2(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = shrink * total_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * lanes(shrink, width) + dot(p.astype(v.dtype), v, (1, 0))

    dispatch(accumulate, step, None if mask else keys_visible(step, block, group))

    @pl.when(step.closes)
    def _():
        total = total_ref[...]
        some = total > 0
        inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
        out_ref[0] = (sum_ref[...] * lanes(inverse, width)).astype(out_ref.dtype)
        lse = jnp.where(some, (top_ref[...] + jnp.log2(jnp.where(some, total, 1.0))) / LOG2E, -jnp.inf)
        lse_ref[0] = as_row(lse)


def mask_of_tile(step: Step, mask, block: int):
    """Boolean `[1, keys]` of a step over key blocks, from the tile's mask `[1, 1, S]`."""
    seen = jnp.concatenate([part_of(mask.at[0], id * block, block) for id in step.ids], axis=1)
    return (seen > 0) & (lax.broadcasted_iota(jnp.int32, seen.shape, 1) < step.used * block)


def masks_of_tiles(step: Step, masks, block: int, tile: int):
    """Boolean `[block, rows]` of a step over query tiles, from their masks `[width, 1, S]`."""
    width = len(step.ids)
    of_tile = [part_of(masks.at[u], step.shift, block) for u in range(width)]
    # Each row of a mask is turned into the columns of its tile by a product with what says which tile a column is in.
    place = lax.broadcasted_iota(jnp.int32, (width, width * tile), 1)
    first = lax.broadcasted_iota(jnp.int32, (width, width * tile), 0) * tile
    own = (place >= first) & (place < first + tile) & (place < step.used * tile)
    return dot(jnp.concatenate(of_tile, axis=0), own.astype(jnp.float32), (0, 0)) > 0.5


def sees_keys(step: Step, tile: int, block: int, group: int):
    """Boolean `[tile, keys]` of a step over key blocks."""
    last = jnp.minimum(group * (step.length - 1), FAR - 1)
    need = positions(step.ids, step.used, block, group)
    need = jnp.where(need <= last, need - step.shift, FAR)
    rows = lax.broadcasted_iota(jnp.int32, (tile, need.shape[1]), 0)
    return rows >= need


def keys_visible(step: Step, block: int, group: int):
    """Whether every row of the tile sees every key of the step."""
    last = step.ids[-1] * block + block - 1
    return (step.used == len(step.ids)) & (group * last <= step.shift) & (last < step.length)


def part_of(mask, first, block: int):
    """The entries `[1, block]` of a mask `[1, S]` for the block of keys that begins at `first`."""
    return mask[:, pl.ds(pl.multiple_of(first, block), block)]


def dispatch(accumulate, step: Step, visible):
    """Runs the form without masks where it is right, which is nowhere if `visible` is None."""
    if visible is None:
        pl.when(step.used > 0)(lambda: accumulate(True))
        return
    pl.when((step.used > 0) & visible)(lambda: accumulate(False))
    pl.when((step.used > 0) & ~visible)(lambda: accumulate(True))


def dq_rows(step: Step, fixed, gathered, outputs, scratch, *, block: int, group: int, scale: float):
    """dq of a query tile. `stats` holds per row the log2-normaliser and rowsum(do * out) - d_lse, `[2, tile]`."""
    (q_ref, do_ref, stats_ref, *mask), (k_ref, v_ref) = fixed, gathered
    (dq_ref,) = outputs
    lse_ref, delta_ref, sum_ref = scratch
    tile = q_ref.shape[1]

    @pl.when(step.opens)
    def _():
        stats = stats_ref[0]
        lse_ref[...] = jnp.broadcast_to(as_column(stats[:1]), lse_ref.shape)
        delta_ref[...] = jnp.broadcast_to(as_column(stats[1:]), delta_ref.shape)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def accumulate(masked: bool):
        k, v = stacked(k_ref), stacked(v_ref)
        x = dot(q_ref[0], k, (1, 1)) * (scale * LOG2E)
        p = jnp.exp2(x - lanes(lse_ref[...], x.shape[1]))
        if masked:
            seen = mask_of_tile(step, *mask, block) if mask else sees_keys(step, tile, block, group)
            p = jnp.where(seen, p, 0.0)
        ds = p * (dot(do_ref[0], v, (1, 1)) - lanes(delta_ref[...], x.shape[1]))
        sum_ref[...] += dot(ds.astype(k.dtype), k, (1, 0))

    dispatch(accumulate, step, None if mask else keys_visible(step, block, group))

    @pl.when(step.closes)
    def _():
        dq_ref[0] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def dkv_rows(step: Step, fixed, gathered, outputs, scratch, *, tile: int, group: int, scale: float):
    """dk and dv of a key block against gathered query tiles, transposed: keys on sublanes, queries on lanes.

    Query row r sees key t of the block iff r >= group * t + shift and t < length, or as the tiles' masks say.
    """
    (k_ref, v_ref), (q_ref, do_ref, stats_ref, *mask) = fixed, gathered
    dk_ref, dv_ref = outputs
    dk_sum, dv_sum = scratch
    block = k_ref.shape[1]

    @pl.when(step.opens)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def accumulate(masked: bool):
        q, do = stacked(q_ref), stacked(do_ref)
        stats = jnp.concatenate([stats_ref[u] for u in range(stats_ref.shape[0])], axis=1)
        x = dot(k_ref[0], q, (1, 1)) * (scale * LOG2E)
        p = jnp.exp2(x - stats[:1])
        if masked:
            seen = masks_of_tiles(step, *mask, block, tile) if mask else seen_by_rows(step, block, tile, group)
            p = jnp.where(seen, p, 0.0)
        dv_sum[...] += dot(p.astype(do.dtype), do, (1, 0))
        ds = p * (dot(v_ref[0], do, (1, 1)) - stats[1:])
        dk_sum[...] += dot(ds.astype(q.dtype), q, (1, 0))

    visible = (step.ids[0] * tile >= group * (block - 1) + step.shift) & (step.length >= block)
    dispatch(accumulate, step, None if mask else visible & (step.used == len(step.ids)))

    @pl.when(step.closes)
    def _():
        dk_ref[0] = (dk_sum[...] * scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def seen_by_rows(step: Step, block: int, tile: int, group: int):
    """Boolean `[block, rows]` of a step over query tiles."""
    at = positions(step.ids, step.used, tile, 1)
    at = jnp.where(at < FAR, at, -FAR)
    key = lax.broadcasted_iota(jnp.int32, (block, at.shape[1]), 0)
    need = jnp.where(key < step.length, group * key + step.shift, FAR)
    return at >= need


def tile_lists(index, count, offset, length, *, tile: int, group: int, key_heads: int, key_blocks: int) -> Lists:
    """The lists of the query tiles, a row a tile: `shift` = group * offset + first row of the tile."""
    heads, tiles, slots = index.shape
    per_tile = lambda x: jnp.broadcast_to(x, (heads, tiles)).reshape(-1).astype(jnp.int32)  # noqa: E731
    head = lax.iota(jnp.int32, heads)[:, None]
    return Lists(
        smallest(index, key_blocks).reshape(-1, slots),
        jnp.minimum(count, slots).reshape(-1).astype(jnp.int32),
        per_tile(head // (heads // key_heads) * key_blocks),
        per_tile(group * offset.astype(jnp.int32)[:, None] + tile * lax.iota(jnp.int32, tiles)),
        per_tile(length[:, None]),
    )


def key_lists(index_t, count_t, offset, length, *, block: int, group: int, key_heads: int, tiles: int) -> Lists:
    """The lists of the key blocks; a row is a (key head, key block, query head of it), in this order.

    `shift` = group * (first key of the block - offset), `length` counts the valid keys of the block.
    """
    heads, blocks, slots = index_t.shape
    repeat = heads // key_heads

    def rows(x, *tail):
        x = x.reshape(key_heads, repeat, blocks, *tail)
        return jnp.swapaxes(x, 1, 2).reshape(-1, *tail)

    per_block = lambda x: rows(jnp.broadcast_to(x, (heads, blocks)).astype(jnp.int32))  # noqa: E731
    first = block * lax.iota(jnp.int32, blocks)
    return Lists(
        rows(smallest(index_t, tiles), slots),
        rows(jnp.minimum(count_t, slots).astype(jnp.int32)),
        per_block(tiles * lax.iota(jnp.int32, heads)[:, None]),
        per_block(group * (first - offset.astype(jnp.int32)[:, None])),
        per_block(length[:, None] - first),
    )


def mask_rows(mask) -> tuple:
    """A mask `[H, T, S]` by tiles as an operand: nothing for None, else float32 `[H * T, 1, S]`."""
    return () if mask is None else (mask.reshape(-1, 1, mask.shape[-1]).astype(jnp.float32),)


def forward(q, k, v, index, count, offset, length, mask=None, *, tile, block, group, scale, interpret=False):
    """Attention of query tiles over the key blocks that their lists name.

    Args:
      q: `[H, R, D]`, R a multiple of `tile`; row r of head h stands at position offset[h] + r // group.
      k, v: `[HK, S, D]`, S a multiple of `block`, HK a divisor of H; head h reads head h // (H // HK).
      index: integers `[H, R // tile, slots]`, ascending key blocks; unused slots repeat the last one.
      count: integers `[H, R // tile]`, how many slots are used.
      offset, length: integers `[H]`: position of row 0, number of valid keys.
      mask: None, or bool `[H, R // tile, S]` in the place of positions: the listed keys that all rows of a tile see.
        Then `block` must be a multiple of 128.
      tile, block, group, scale: static.
      interpret: False, True or `pltpu.InterpretParams`.
    Returns:
      (out `[H, R, D]` in q's dtype, lse float32 `[H, R]`, nats); a row that sees no key has out 0, lse -inf.
    """
    (H, R, D), (HK, S, _) = q.shape, k.shape
    lists = tile_lists(index, count, offset, length, tile=tile, group=group, key_heads=HK, key_blocks=S // block)
    out, lse = walk(
        lambda *a: attend_rows(*a, block=block, group=group, scale=scale),
        lists,
        (q.reshape(-1, tile, D), *mask_rows(mask)),
        (k.reshape(-1, block, D), v.reshape(-1, block, D)),
        [((tile, D), q.dtype), ((1, tile), jnp.float32)],
        [(tile, LANES), (tile, LANES), (tile, D)],
        width=gather_width(tile, block, index.shape[-1]),
        repeat=1,
        flops=4 * tile * block * D,
        exponentials=tile * block,
        interpret=interpret,
        name="block_sparse_attention",
    )
    return out.reshape(H, R, D), lse.reshape(H, R)


def backward(
    q, k, v, out, lse, d_out, d_lse, index, count, index_t, count_t, offset, length, mask=None,
    *, tile, block, group, scale, interpret=False,
):  # fmt: skip
    """Gradients of `forward`; arguments as there.

    Args:
      out, lse: results of `forward`; d_out, d_lse: their cotangents.
      index_t, count_t: integers `[H, S // block, slots_t]`, `[H, S // block]`: the ascending query tiles that use a
        key block, padded likewise.
    Returns:
      (dq, dk, dv) in the dtypes of q, k, v; dk and dv are summed over the query heads of a key head.
    """
    (H, R, D), (HK, S, _) = q.shape, k.shape
    if mask is not None:  # positions do not count: the shift of a key block is its first key
        offset, group = jnp.zeros_like(offset), 1
    seen = lse > -jnp.inf
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A normaliser of +1e30 makes every probability of a row without keys 0.
    stats = jnp.stack([jnp.where(seen, lse * LOG2E, -MASKED), jnp.where(seen, delta, 0.0)], axis=-2)
    stats = jnp.swapaxes(stats.reshape(H, 2, R // tile, tile), 1, 2).reshape(-1, 2, tile)
    queries, d_out = q.reshape(-1, tile, D), d_out.astype(q.dtype).reshape(-1, tile, D)
    keys, values = k.reshape(-1, block, D), v.reshape(-1, block, D)
    (dq,) = walk(
        lambda *a: dq_rows(*a, block=block, group=group, scale=scale),
        tile_lists(index, count, offset, length, tile=tile, group=group, key_heads=HK, key_blocks=S // block),
        (queries, d_out, stats, *mask_rows(mask)),
        (keys, values),
        [((tile, D), q.dtype)],
        [(tile, LANES), (tile, LANES), (tile, D)],
        width=gather_width(tile, block, index.shape[-1]),
        repeat=1,
        flops=6 * tile * block * D,
        exponentials=tile * block,
        interpret=interpret,
        name="block_sparse_attention_dq",
    )
    dk, dv = walk(
        lambda *a: dkv_rows(*a, tile=tile, group=group, scale=scale),
        key_lists(index_t, count_t, offset, length, block=block, group=group, key_heads=HK, tiles=R // tile),
        (keys, values),
        (queries, d_out, stats, *mask_rows(mask)),
        [((block, D), k.dtype), ((block, D), v.dtype)],
        [(block, D), (block, D)],
        width=gather_width(block, tile, index_t.shape[-1]),
        repeat=H // HK,
        flops=8 * tile * block * D,
        exponentials=tile * block,
        interpret=interpret,
        name="block_sparse_attention_dkv",
    )
    return dq.reshape(H, R, D), dk.reshape(HK, S, D), dv.reshape(HK, S, D)


def energy(q, kbar, offset, length, *, tile, block, group, scale, rule, interpret=False):
    """Energy of every (query tile, key block): queries times mean keys, reduced over the rows of a tile.

    With x = scale * log2(e) * <q_r, kbar_j> and the rows r of a tile that may see block j, max = max_r x and
    sum = sum_r 2^(x - max); -inf and 0 where there are none. Rows at positions >= length count never.

    Args:
      q: `[H, R, D]`, R a multiple of `tile`; offset, length: integers `[H]`.
      kbar: mean keys `[HK, n, D]`, rounded to q's dtype (float32 with bfloat16 would cost six passes of the unit).
      rule: "last" (arXiv 2603.06199), a row sees a block whose last key is not in its future; "first" (arXiv
        2608.19758), one whose first key is not in its future, if the tile's last row sees all of it.
      tile, block, group, scale, interpret: as for `forward`.
    Returns:
      (sum, max), float32 `[H, R // tile, n]`.
    Raises:
      ValueError: an unknown rule.
    """
    if rule not in ("last", "first"):
        raise ValueError(f'rule must be "last" or "first", got {rule!r}')
    (H, R, D), (HK, n, _) = q.shape, kbar.shape
    tiles, repeat = R // tile, H // HK
    high, wide = min(tiles, ENERGY_TILES), min(n, ENERGY_BLOCKS)
    exact, to_bits = q.dtype == jnp.float32, scale * LOG2E
    token = block - 1 if rule == "last" else 0  # of a block, that must not lie in a row's future
    bounds = tuple(x.astype(jnp.int32) for x in (offset, length))

    def visible(offset, length, i):
        """How many key blocks, from the first on, some row of tile i may see."""
        last = jnp.minimum(offset + quotient(i * tile + tile - 1, group), length - 1)
        return jnp.maximum(quotient(last + 1, block), 0)

    def last_chunk(h, i, offset, length):
        """The last chunk of key blocks that tiles i * high ... need, at least 0."""
        return quotient(jnp.maximum(visible(offset[h], length[h], (i + 1) * high - 1), 1) - 1, wide)

    def of_keys(h, i, j, offset, length):
        return quotient(h, repeat), jnp.minimum(j, last_chunk(h, i, offset, length)), 0

    def kernel(offset_ref, length_ref, q_ref, kbar_ref, sum_ref, top_ref, *rest_ref):
        h, i, j = (pl.program_id(axis) for axis in range(3))
        offset, length = offset_ref[h], length_ref[h]
        needed = j <= last_chunk(h, i, offset_ref, length_ref)

        @pl.when(~needed)
        def _():
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
            for ref in rest_ref:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

        def reduce(t, number, masked: bool):
            queries, means = q_ref[0, t], kbar_ref[0]
            if exact:  # a float32 rounds a logit of 20 by 1e-6
                of_part = lax.broadcasted_iota(jnp.int32, means.shape, 1) // pl.cdiv(D, PARTS)
                x, low = exact_sum([dot(queries, jnp.where(of_part == p, means, 0), (1, 1)) for p in range(PARTS)])
            else:
                x, low = dot(queries, means, (1, 1)), None
            if masked:
                ids = j * wide + lax.broadcasted_iota(jnp.int32, (1, wide), 1)
                need = group * (ids * block + token - offset) - number * tile
                need = jnp.where(ids < visible(offset, length, number), need, FAR)
                rows = lax.broadcasted_iota(jnp.int32, (tile, wide), 0)
                seen = (rows >= need) & (rows < group * (length - offset) - number * tile)
                x, low = jnp.where(seen, x, MASKED), None if low is None else jnp.where(seen, low, 0)
            # The difference is scaled, not x: rounded where it is small.
            below, top, rest = below_top(x, low, axis=0)
            weights = jnp.exp(below * scale) if exact else jnp.exp2(below * to_bits)
            total = jnp.sum(weights, axis=0, keepdims=True)
            for ref in rest_ref:
                ref[0, t : t + 1, :] = rest
            sum_ref[0, t : t + 1, :] = jnp.where(top > MASKED, total, 0.0)
            top_ref[0, t : t + 1, :] = top

        for t in range(high):
            number = i * high + t
            last = (j + 1) * wide - 1
            full = (last < visible(offset, length, number)) & (group * (length - offset) >= (number + 1) * tile)
            full &= number * tile >= group * (last * block + token - offset)
            pl.when(needed & full)(partial(reduce, t, number, False))
            pl.when(needed & ~full)(partial(reduce, t, number, True))

    operands = alike(*bounds, q.reshape(H, tiles, tile, D), kbar.astype(q.dtype))
    results = pl.BlockSpec((1, high, wide), lambda h, i, j, *_: (h, i, j))
    result, number = shape_like((H, tiles, n), jnp.float32, operands[0]), 3 if exact else 2
    size = q.dtype.itemsize
    total, top, *rest = pl.pallas_call(
        kernel,
        out_shape=(result,) * number,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(H, pl.cdiv(tiles, high), pl.cdiv(n, wide)),
            in_specs=[
                pl.BlockSpec((1, high, tile, D), lambda h, i, j, *_: (h, i, 0, 0)),
                pl.BlockSpec((1, wide, D), of_keys),
            ],
            out_specs=(results,) * number,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=H * R * n * D,  # about half the pairs are causal
            bytes_accessed=size * H * (R * D + pl.cdiv(tiles, high) * n * D // 2) + 4 * number * H * tiles * n,
            transcendentals=H * R * n // 2,
        ),
        interpret=interpret,
        name="block_energy",
    )(*operands)
    return energy_in_bits(total, top, *rest or [jnp.zeros_like(top)], scale=scale, rule=rule)
