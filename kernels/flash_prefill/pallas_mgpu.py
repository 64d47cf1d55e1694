"""Block-sparse attention on Hopper GPUs: Pallas kernels for its Mosaic GPU back end.

A thread block takes some rows of one tile (or some keys of one block). Its last warpgroup, the producer, walks the
index list and copies what the list names into a ring of buffers in shared memory; each of the others, the consumers,
holds 64 of the rows (keys) in registers and multiplies them with what arrives. The flash recurrence in base 2
(arXiv 2205.14135; arXiv 2407.08608 for warp specialisation) over the block lists of FlashPrefill (arXiv 2603.06199).

Shapes, as in every back end of this folder: q `[H, R, D]`, row r of head h at position `offset[h] + r // group`;
k, v `[HK, S, D]`, head h reads `h // (H // HK)`; index `[H, R // tile, slots]` and count `[H, R // tile]` name the key
blocks of a tile in ascending order, index_t and count_t the tiles of a key block; key t is seen by a row iff
`t < length[h]` and t is not past the row's position, or, with a mask `[H, R // tile, S]`, iff that says so of its tile.
"""

import inspect
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.backends import counts_in_64_bits, hopper_refusal
from rollax.kernels.mosaic_gpu import matrix, transposed

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # logit of a pair that may not attend: finite, lest a row that has seen nothing yields NaN
LOWEST = -5e29  # where the running maximum starts: 2^(HIDDEN - LOWEST) is 0
ROWS = 64  # rows that a warpgroup multiplies at once
MAX_TILE = 512  # the energies keep a whole tile of queries in shared memory
STAGES = 2  # buffers in a ring
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # of 504 a lane for one producer and two consumers

LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def refusal(q_dtype, k_dtype, head_width, tile, block, *, slots=1, repeat=1) -> str | None:
    """Why the kernels cannot take this call, None if they can.

    Args:
      q_dtype, k_dtype: of q and of k, v; head_width: D; tile: packed rows of a tile; block: keys of a block.
      slots, repeat: any, since lists stay in device memory.
    """
    if reason := hopper_refusal():
        return reason
    if reason := counts_in_64_bits():
        return reason
    if q_dtype != k_dtype or q_dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs q, k, v all bfloat16 or all float16, got {jnp.dtype(q_dtype)} and {jnp.dtype(k_dtype)}"
    if head_width not in (64, 128):
        return f"needs heads of width 64 or 128, got {head_width}"
    if tile % ROWS or block % ROWS:
        return f"needs tile and block multiples of {ROWS}, got {tile} and {block}"
    if tile > MAX_TILE:
        return f"needs tiles of at most {MAX_TILE} rows, got {tile}"
    return None


def check_scale(scale):
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


class Static(NamedTuple):
    """What a kernel is compiled for.

    tile: rows of a query tile; block: keys of a key block; scale: of the logits; heads: query heads of a key head;
    consumers: warpgroups that share the rows or keys of a thread block; by_tile: whether a mask by tiles, not a row's
    last key, says which keys are seen; interpretable: see `forward`.
    """

    tile: int
    block: int
    scale: float
    heads: int
    consumers: int
    by_tile: bool = False
    interpretable: bool = False


def load(ref, layout):
    """A vector from shared or global memory; jax 0.10 wants an index too."""
    return plgpu.load(ref, *LOAD_INDEX, layout=layout, optimized=False)


def product(left, right, meanwhile=None):
    """left @ right, both in shared memory, into float32 registers; `meanwhile()` runs once the product is under way."""

    def multiply(total):
        plgpu.wgmma(total, left, right)
        if meanwhile is not None:
            meanwhile()
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def operand(x, dtype, staging):
    """x, in registers, as a left operand: rounded, and moved to the shared memory `staging` unless that is None.

    Registers are the faster place; the GPU interpreter only multiplies what lies in shared memory.
    """
    if staging is None:
        return x.astype(dtype)
    staging[...] = x.astype(dtype)
    plgpu.commit_smem()
    return staging


def accumulate(total, left, right, interpretable):
    """total + left @ right; total in registers. The interpreter has no product that starts from a given total."""
    if interpretable:
        return total + product(left, right)
    return pl.run_state(lambda total_ref: plgpu.wgmma(total_ref, left, right))(plgpu.ACC.init(total))


def zeros(*shape, layout):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def along(x, shape, axis):
    """x `[shape[axis]]` repeated along the other axis."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def hide(x, last_key, first_key, hidden, key_axis):
    """Logits x, `hidden` in the place of keys past `last_key` (int32, one a row); x's first key is `first_key`."""
    keys = plgpu.broadcasted_iota(jnp.int32, x.shape, key_axis, layout=plgpu.Layout.WGMMA)
    return jnp.where(keys + first_key <= along(last_key, x.shape, 1 - key_axis), x, hidden)


def hider(seen, h, i, here, static):
    """A function (x, first key of x, hidden) that hides what the rows `here` of tile i do not see.

    seen: see `what_is_seen`.
    """
    if static.by_tile:

        def hide_by_tile(x, first_key, hidden):
            listed = load(seen.at[h, i, pl.ds(first_key, x.shape[1])], PER_COLUMN)
            return jnp.where(along(listed, x.shape, 1) > 0, x, hidden)

        return hide_by_tile
    last_key = load(seen.at[h, here], PER_ROW)
    return lambda x, first_key, hidden: hide(x, last_key, first_key, hidden, key_axis=1)


def hide_from_keys(x, seen, h, first_row, first_key, static):
    """Logits x `[keys, rows]`, hidden where a row does not see a key."""
    if static.by_tile:
        listed = load(seen.at[h, lax.div(first_row, static.tile), pl.ds(first_key, x.shape[0])], PER_ROW)
        return jnp.where(along(listed, x.shape, 0) > 0, x, HIDDEN)
    last_key = load(seen.at[h, pl.ds(first_row, x.shape[1])], PER_COLUMN)
    return hide(x, last_key, first_key, HIDDEN, key_axis=0)


def produce(first, last, sources, buffers, full, consumed):
    """Copies `sources(n)` for n in [first, last) into the rings `buffers`; n counts from 0 over the kernel's life.

    Sources and buffers are tuples of groups; what is in one group arrives, and is consumed, under one barrier.
    """

    def step(n, _):
        slot = lax.rem(n, STAGES)
        for group, rings, filled, free in zip(sources(n), buffers, full, consumed, strict=True):
            pl.when(n >= STAGES)(partial(plgpu.barrier_wait, free.at[slot]))
            for source, ring in zip(group, rings, strict=True):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], filled.at[slot])
        return ()

    lax.fori_loop(first, last, step, ())


def fetch(*copies):
    """Starts copies (source, destination, barrier) into shared memory and waits for them."""
    for copy in copies:
        plgpu.copy_gmem_to_smem(*copy)
    for _, _, barrier in copies:
        plgpu.barrier_wait(barrier)


def store(*copies):
    """Copies (value in registers, shared memory, destination) out and waits."""
    for value, staging, _ in copies:
        staging[...] = value
    plgpu.commit_smem()
    for _, staging, destination in copies:
        plgpu.copy_smem_to_gmem(staging, destination)
    plgpu.wait_smem_to_gmem(0)


def specialise(consumers, producer, consumer):
    """Runs `producer()` in the last warpgroup and `consumer(w)` in each of the others."""
    w = lax.axis_index("warpgroup")
    trade = consumers == 2  # with one consumer there are registers enough for both

    @pl.when(w < consumers)
    def _():
        if trade:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consumer(w)

    @pl.when(w == consumers)
    def _():
        if trade:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        producer()


def launch(kernel, results, buffers, static, **grid):
    """A function of the kernel's inputs; `grid` names and counts its steps, the last axis fastest."""
    return plgpu.kernel(
        partial(kernel, static=static),
        out_type=results,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=static.consumers + 1,
        thread_name="warpgroup",
        scratch_types=[buffers],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def ring_barriers(groups, consumers, size=1):
    """(filled, consumed) barriers of so many groups of `size` rings."""
    filled = plgpu.Barrier(num_arrivals=size, num_barriers=STAGES)
    return (filled,) * groups, (plgpu.Barrier(num_arrivals=consumers, num_barriers=STAGES),) * groups


def own_rows(q, static):
    """(head, first row) of this step of the grid, with late rows first.

    Under a causal mask these have the longest lists, and would otherwise be the tail of the launch.
    """
    size = static.consumers * ROWS
    return lax.axis_index("head"), (q.shape[1] // size - 1 - lax.axis_index("part")) * size


def listed_keys(index, h, first_row, kv_buffers, static):
    """(the rows' tile, steps a block, function from step to its first key)."""
    keys = kv_buffers[0].shape[1]
    i, chunks = lax.div(first_row, static.tile), static.block // keys

    def first_key(n):
        return index[h, i, lax.div(n, chunks)] * static.block + lax.rem(n, chunks) * keys

    return i, chunks, first_key


def produce_keys(k, v, h, steps, first_key, buffers, full, consumed, static):
    """The producer of k and v."""
    head, keys = lax.div(h, static.heads), buffers[0].shape[1]

    def sources(n):
        here = pl.ds(first_key(n), keys)
        return (k.at[head, here],), (v.at[head, here],)

    produce(0, steps, sources, [(buffer,) for buffer in buffers], full, consumed)


def at_once(size):
    """Of `size` rows or keys, how many a step of a kernel takes."""
    return 2 * ROWS if size % (2 * ROWS) == 0 else ROWS


def consumers_of(size):
    """Warpgroups that share `size` rows or keys."""
    return at_once(size) // ROWS


def last_visible(R, offset, length, group):
    """The last key that each row sees, int32 `[H, R]`; negative where it sees none."""
    return jnp.minimum(offset[:, None] + jnp.arange(R, dtype=jnp.int32) // group, length[:, None] - 1)


def full_blocks(index, count, offset, length, mask, *, tile, block, group):
    """How many blocks at the head of each tile's list are seen whole, `[H, R // tile]`; under a mask none counts."""
    if mask is not None:
        return jnp.zeros_like(count)
    first_position = offset[:, None] + jnp.arange(count.shape[1], dtype=jnp.int32) * tile // group
    end = jnp.minimum(first_position + 1, length[:, None])
    listed = jnp.arange(index.shape[-1]) < count[..., None]
    return jnp.sum(listed & ((index + 1) * block <= end[..., None]), axis=-1, dtype=jnp.int32)


def masked_tiles(index_t, count_t, offset, length, mask, *, tile, block, group):
    """How many tiles at the head of each key block's list may not see it whole, `[H, S // block]`."""
    if mask is not None:
        return count_t
    end = (jnp.arange(count_t.shape[1], dtype=jnp.int32) + 1) * block
    first_position = offset[:, None, None] + index_t * tile // group
    listed = jnp.arange(index_t.shape[-1]) < count_t[..., None]
    hidden = (first_position + 1 < end[:, None]) | (end[:, None] > length[:, None, None])
    return jnp.sum(listed & hidden, axis=-1, dtype=jnp.int32)


def forward_kernel(q, k, v, index, count, full, seen, out, lse, buffers, *, static):
    """One step of the grid: `consumers * ROWS` rows of a tile against the key blocks of its list, `keys` at a time."""
    q_buffer, kv_buffers, lse_buffer, staging, q_ready, kv_full, kv_consumed, turn = buffers
    h, first_row = own_rows(q, static)
    i, chunks, first_key = listed_keys(index, h, first_row, kv_buffers, static)
    steps = count[h, i] * chunks
    to_bits = static.scale * LOG2E

    def take_turns():
        # While one consumer multiplies, the other takes exponentials (arXiv 2407.08608, section 3.1).
        if static.consumers == 2:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def consumer(w):
        here = pl.ds(first_row + w * ROWS, ROWS)
        q_own = q_buffer.at[w]
        own_staging = staging.at[w] if static.interpretable else None
        fetch((q.at[h, here], q_own, q_ready.at[w]))
        hide_own = hider(seen, h, i, here, static)

        def step(n, carry, masked):
            total, mass, top = carry
            slot = lax.rem(n, STAGES)
            plgpu.barrier_wait(kv_full[0].at[slot])
            x = product(q_own, transposed(kv_buffers[0].at[slot]), take_turns)
            plgpu.barrier_arrive(kv_consumed[0].at[slot])
            if masked:
                x = hide_own(x, first_key(n), HIDDEN / to_bits)
            # The scale is applied to the maximum and within the exponent, where it costs no operation of its own.
            new_top = jnp.maximum(top, x.max(axis=1) * to_bits)
            p = jnp.exp2(x * to_bits - along(new_top, x.shape, 0))
            shrink = jnp.exp2(top - new_top)
            mass = mass * shrink + p.sum(axis=1)
            total = total * along(shrink, total.shape, 0)
            plgpu.barrier_wait(kv_full[1].at[slot])
            take_turns()
            total = accumulate(total, operand(p, v.dtype, own_staging), kv_buffers[1].at[slot], static.interpretable)
            plgpu.barrier_arrive(kv_consumed[1].at[slot])
            return total, mass, new_top

        none = zeros(ROWS, layout=PER_ROW)
        start = (zeros(ROWS, q.shape[-1], layout=plgpu.Layout.WGMMA), none, none + LOWEST)
        unmasked = full[h, i] * chunks
        pl.when(w == 1)(take_turns)
        carry = lax.fori_loop(0, unmasked, partial(step, masked=False), start)
        total, mass, top = lax.fori_loop(unmasked, steps, partial(step, masked=True), carry)
        pl.when(w == 0)(take_turns)
        any_seen = mass > 0.0
        mass = jnp.where(any_seen, mass, 1.0)
        log_mass = jnp.where(any_seen, (top + jnp.log2(mass)) / LOG2E, -jnp.inf)
        mean = total * along(1.0 / mass, total.shape, 0)
        store((mean.astype(q.dtype), q_own, out.at[h, here]), (log_mass, lse_buffer.at[w], lse.at[h, here]))

    producer = partial(produce_keys, k, v, h, steps, first_key, kv_buffers, kv_full, kv_consumed, static)
    specialise(static.consumers, producer, consumer)


def what_is_seen(R, offset, length, mask, group):
    """The operand that tells which keys are seen: a mask by tiles as int32, or the last key of each row."""
    return last_visible(R, offset, length, group) if mask is None else mask.astype(jnp.int32)


def forward(q, k, v, index, count, offset, length, mask=None, *, tile, block, group, scale, interpretable=False):
    """Attention over the listed key blocks.

    Args:
      q, k, v, index, count, offset, length, tile, block, group: as at the head of this file; bfloat16 or float16.
      mask: None, or bool `[H, R // tile, S]` in the place of positions: the listed keys that all rows of a tile see.
      scale: multiplies q.k.
      interpretable: keep to what the GPU interpreter can run; the same function, slower on hardware.
    Returns:
      (out `[H, R, D]` in q's dtype, lse float32 `[H, R]` in nats); a row that sees no key: 0 and -inf.
    """
    check_scale(scale)
    H, R, D = q.shape
    static = Static(tile, block, scale, H // k.shape[0], consumers_of(tile), mask is not None, interpretable)
    keys = at_once(block)
    sizes = dict(tile=tile, block=block, group=group)
    full = full_blocks(index, count, offset, length, mask, **sizes)
    buffers = (
        matrix(q.dtype, static.consumers, ROWS, D),
        (matrix(q.dtype, STAGES, keys, D),) * 2,
        plgpu.SMEM((static.consumers, ROWS), jnp.float32),
        matrix(q.dtype, static.consumers, ROWS, keys) if interpretable else None,
        plgpu.Barrier(num_barriers=static.consumers),
        *ring_barriers(2, static.consumers),
        plgpu.Barrier(num_arrivals=static.consumers),
    )
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((H, R), jnp.float32))
    kernel = launch(forward_kernel, results, buffers, static, head=H, part=R // (static.consumers * ROWS))
    return kernel(q, k, v, index, count, full, what_is_seen(R, offset, length, mask, group))


def dq_kernel(q, d_out, lse, delta, k, v, index, count, full, seen, dq, buffers, *, static):
    """One step of the grid: the gradient of `consumers * ROWS` rows, walking the same list as the forward kernel."""
    row_buffers, statistics, kv_buffers, staging, row_ready, kv_full, kv_consumed = buffers
    h, first_row = own_rows(q, static)
    i, chunks, first_key = listed_keys(index, h, first_row, kv_buffers, static)
    steps = count[h, i] * chunks

    def consumer(w):
        here = pl.ds(first_row + w * ROWS, ROWS)
        buffers = [buffer.at[w] for buffer in (*row_buffers, *statistics)]
        sources = [x.at[h, here] for x in (q, d_out, lse, delta)]
        fetch(*zip(sources, buffers, [barrier.at[w] for barrier in row_ready], strict=True))
        q_own, d_out_own, lse_own, delta_own = buffers
        own_staging = staging.at[w] if static.interpretable else None
        log_mass, shift = load(lse_own, PER_ROW), load(delta_own, PER_ROW)
        hide_own = hider(seen, h, i, here, static)

        def step(n, total, masked):
            slot = lax.rem(n, STAGES)
            keys, values = (buffer.at[slot] for buffer in kv_buffers)
            plgpu.barrier_wait(kv_full[0].at[slot])
            x = product(q_own, transposed(keys)) * (static.scale * LOG2E)
            if masked:
                x = hide_own(x, first_key(n), HIDDEN)
            p = jnp.exp2(x - along(log_mass, x.shape, 0))
            plgpu.barrier_wait(kv_full[1].at[slot])
            ds = p * accumulate(along(-shift, x.shape, 0), d_out_own, transposed(values), static.interpretable)
            plgpu.barrier_arrive(kv_consumed[1].at[slot])
            total = accumulate(total, operand(ds, q.dtype, own_staging), keys, static.interpretable)
            plgpu.barrier_arrive(kv_consumed[0].at[slot])
            return total

        unmasked = full[h, i] * chunks
        total = zeros(ROWS, q.shape[-1], layout=plgpu.Layout.WGMMA)
        total = lax.fori_loop(0, unmasked, partial(step, masked=False), total)
        total = lax.fori_loop(unmasked, steps, partial(step, masked=True), total)
        store(((total * static.scale).astype(q.dtype), q_own, dq.at[h, here]))

    producer = partial(produce_keys, k, v, h, steps, first_key, kv_buffers, kv_full, kv_consumed, static)
    specialise(static.consumers, producer, consumer)


def dkv_kernel(q, d_out, lse, delta, k, v, index, count, masked, seen, dk, dv, buffers, *, static):
    """One step of the grid: the gradients of `consumers * ROWS` keys, from the tiles that use them, over their heads.

    Works on transposed scores (keys by rows), so that the keys' sums stay in the registers of one warpgroup.
    """
    key_buffers, row_buffers, staging, key_ready, row_full, row_consumed = buffers
    # Heads innermost and early blocks first: sinks have by far the longest lists.
    first_key, kv_head = lax.axis_index("part") * (static.consumers * ROWS), lax.axis_index("kv_head")
    j, heads = lax.div(first_key, static.block), static.heads
    chunks = static.tile // ROWS

    def first_row(h, n):
        return index[h, j, lax.div(n, chunks)] * static.tile + lax.rem(n, chunks) * ROWS

    def producer():
        def of_head(g, done):
            h = kv_head * heads + g
            last = done + count[h, j] * chunks

            def sources(n):
                here = pl.ds(first_row(h, n - done), ROWS)
                return (q.at[h, here], lse.at[h, here]), (d_out.at[h, here], delta.at[h, here])

            produce(done, last, sources, row_buffers, row_full, row_consumed)
            return last

        lax.fori_loop(0, heads, of_head, jnp.int32(0))

    def consumer(w):
        own = first_key + w * ROWS
        here = pl.ds(own, ROWS)
        k_own, v_own = (buffer.at[w] for buffer in key_buffers)
        own_staging = staging.at[w] if static.interpretable else None
        fetch((k.at[kv_head, here], k_own, key_ready[0].at[w]), (v.at[kv_head, here], v_own, key_ready[1].at[w]))

        def of_head(g, carry):
            h = kv_head * heads + g
            done, totals = carry

            def step(n, totals, masked):
                dk_total, dv_total = totals
                slot = lax.rem(n, STAGES)
                (rows, lse_rows), (d_rows, delta_rows) = ([ring.at[slot] for ring in rings] for rings in row_buffers)
                plgpu.barrier_wait(row_full[0].at[slot])
                x = product(k_own, transposed(rows)) * (static.scale * LOG2E)
                if masked:
                    x = hide_from_keys(x, seen, h, first_row(h, n - done), own, static)
                p = jnp.exp2(x - along(load(lse_rows, PER_COLUMN), x.shape, 1))
                plgpu.barrier_wait(row_full[1].at[slot])
                dv_total = accumulate(dv_total, operand(p, q.dtype, own_staging), d_rows, static.interpretable)
                # The product starts from -delta, which frees delta's registers: without that some would spill.
                ds = along(-load(delta_rows, PER_COLUMN), x.shape, 1)
                ds = p * accumulate(ds, v_own, transposed(d_rows), static.interpretable)
                plgpu.barrier_arrive(row_consumed[1].at[slot])
                dk_total = accumulate(dk_total, operand(ds, q.dtype, own_staging), rows, static.interpretable)
                plgpu.barrier_arrive(row_consumed[0].at[slot])
                return dk_total, dv_total

            last = done + count[h, j] * chunks
            middle = done + masked[h, j] * chunks
            totals = lax.fori_loop(done, middle, partial(step, masked=True), totals)
            return last, lax.fori_loop(middle, last, partial(step, masked=False), totals)

        start = zeros(ROWS, k.shape[-1], layout=plgpu.Layout.WGMMA)
        _, (dk_total, dv_total) = lax.fori_loop(0, heads, of_head, (jnp.int32(0), (start, start)))
        store(
            ((dk_total * static.scale).astype(k.dtype), k_own, dk.at[kv_head, here]),
            (dv_total.astype(v.dtype), v_own, dv.at[kv_head, here]),
        )

    specialise(static.consumers, producer, consumer)


def backward(
    q,
    k,
    v,
    out,
    lse,
    d_out,
    d_lse,
    index,
    count,
    index_t,
    count_t,
    offset,
    length,
    mask=None,
    *,
    tile,
    block,
    group,
    scale,
    interpretable=False,
):
    """Gradients of `forward` in q, k, v for cotangents d_out `[H, R, D]` and d_lse `[H, R]`.

    With P the weights: dP = d_out v^T and dS = P (dP - (rowsum(d_out out) - d_lse)); dk and dv are summed over the
    heads of a key head inside the kernel, in float32.

    Returns:
      (dq `[H, R, D]`, dk `[HK, S, D]`, dv `[HK, S, D]`) in q's dtype.
    """
    check_scale(scale)
    H, R, D = q.shape
    HK, S, _ = k.shape
    dtype = q.dtype
    seen = lse > -jnp.inf
    # In base 2, as the kernels take it. For a row without keys 2^(x - 1e30) = 0 weighs every pair away.
    log_mass = jnp.where(seen, lse * LOG2E, -HIDDEN)
    products = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = jnp.where(seen, products - d_lse, 0.0)
    d_out = d_out.astype(dtype)
    seen_keys = what_is_seen(R, offset, length, mask, group)
    sizes = dict(tile=tile, block=block, group=group)

    static = Static(tile, block, scale, H // HK, consumers_of(tile), mask is not None, interpretable)
    keys = at_once(block)
    buffers = (
        (matrix(dtype, static.consumers, ROWS, D),) * 2,
        (plgpu.SMEM((static.consumers, ROWS), jnp.float32),) * 2,
        (matrix(dtype, STAGES, keys, D),) * 2,
        matrix(dtype, static.consumers, ROWS, keys) if interpretable else None,
        (plgpu.Barrier(num_barriers=static.consumers),) * 4,
        *ring_barriers(2, static.consumers),
    )
    result = jax.ShapeDtypeStruct(q.shape, dtype)
    kernel = launch(dq_kernel, result, buffers, static, head=H, part=R // (static.consumers * ROWS))
    full = full_blocks(index, count, offset, length, mask, **sizes)
    dq = kernel(q, d_out, log_mass, delta, k, v, index, count, full, seen_keys)

    static = static._replace(consumers=consumers_of(block))
    buffers = (
        (matrix(dtype, static.consumers, ROWS, D),) * 2,
        ((matrix(dtype, STAGES, ROWS, D), plgpu.SMEM((STAGES, ROWS), jnp.float32)),) * 2,
        matrix(dtype, static.consumers, ROWS, ROWS) if interpretable else None,
        (plgpu.Barrier(num_barriers=static.consumers),) * 2,
        *ring_barriers(2, static.consumers, size=2),
    )
    results = (jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype))
    kernel = launch(dkv_kernel, results, buffers, static, part=S // (static.consumers * ROWS), kv_head=HK)
    masked = masked_tiles(index_t, count_t, offset, length, mask, **sizes)
    dk, dv = kernel(q, d_out, log_mass, delta, k, v, index_t, count_t, masked, seen_keys)
    return dq, dk, dv


def energy_kernel(q, kbar, by_all, by_any, last_blocks, sums, tops, buffers, *, static):
    """One step of the grid: the rows of a tile against the mean keys that some of them see, `2 * ROWS` at a time.

    Works on transposed scores (blocks by rows), so that a block's sum stays in the registers of one warpgroup.
    """
    q_buffer, kbar_buffer, sum_buffer, top_buffer, q_ready, kbar_full, kbar_consumed = buffers
    h, i = lax.axis_index("head"), lax.axis_index("tile")
    parts, rows, _ = q_buffer.shape
    unmasked, steps = lax.div(by_all[h, i], 2 * ROWS), lax.div(by_any[h, i] + 2 * ROWS - 1, 2 * ROWS)
    to_bits = static.scale * LOG2E

    def rows_of(c):
        return pl.ds(i * static.tile + c * rows, rows)

    def producer():
        for c in range(parts):
            plgpu.copy_gmem_to_smem(q.at[h, rows_of(c)], q_buffer.at[c], q_ready)

        def sources(n):
            return ((kbar.at[lax.div(h, static.heads), pl.ds(n * 2 * ROWS, 2 * ROWS)],),)

        produce(0, steps, sources, ((kbar_buffer,),), (kbar_full,), (kbar_consumed,))

    def consumer(w):
        def step(n, _, masked):
            slot = lax.rem(n, STAGES)
            first_block = (2 * n + w) * ROWS
            mean_keys = kbar_buffer.at[slot, pl.ds(w * ROWS, ROWS)]

            def of_part(c, carry):
                top, mass = carry
                x = product(mean_keys, transposed(q_buffer.at[c]))
                if masked:
                    last_block = load(last_blocks.at[h, rows_of(c)], PER_COLUMN)
                    x = hide(x, last_block, first_block, HIDDEN / to_bits, key_axis=0)
                new_top = jnp.maximum(top, x.max(axis=1) * to_bits)
                p = jnp.exp2(x * to_bits - along(new_top, x.shape, 0))
                return new_top, mass * jnp.exp2(top - new_top) + p.sum(axis=1)

            plgpu.barrier_wait(kbar_full.at[slot])
            none = zeros(ROWS, layout=PER_ROW)
            top, mass = lax.fori_loop(0, parts, of_part, (none + LOWEST, none))
            plgpu.barrier_arrive(kbar_consumed.at[slot])
            here = pl.ds(first_block, ROWS)
            store((mass, sum_buffer.at[w], sums.at[h, i, here]), (top, top_buffer.at[w], tops.at[h, i, here]))
            return ()

        plgpu.barrier_wait(q_ready)
        lax.fori_loop(0, unmasked, partial(step, masked=False), ())
        lax.fori_loop(unmasked, steps, partial(step, masked=True), ())

    specialise(static.consumers, producer, consumer)


def energy(q, kbar, offset, length, *, tile, block, group, scale, rule):
    """Energies of all (tile, key block) pairs from mean keys (arXiv 2603.06199; rule "first": arXiv 2608.19758).

    Args:
      q, offset, length, tile, block, group, scale: as in `forward`; rows at positions from `length` on do not count.
      kbar: mean keys `[HK, n, D]`, rounded to q's dtype.
      rule: "last" (a row sees a block once it stands at the block's last key or later) or "first" (at its first key or
        later, of the blocks that the tile's last counting row sees whole).
    Returns:
      (sum, max), float32 `[H, R // tile, n]`: max is the largest x = scale log2(e) <q_row, kbar_j> over the rows that
      see block j, sum that of 2^(x - max); -inf and 0 where none does.
    """
    check_scale(scale)
    H, R, D = q.shape
    HK, n, _ = kbar.shape
    rows = at_once(tile)
    pad = -n % (2 * ROWS)
    kbar = jnp.pad(kbar.astype(q.dtype), ((0, 0), (0, pad), (0, 0)))
    last_blocks = last_visible_block(R, offset, length, tile=tile, block=block, group=group, rule=rule)
    of_tile = last_blocks.reshape(H, R // tile, tile)
    # How many blocks all and any of a tile's rows see.
    by_all, by_any = (jnp.clip(x + 1, 0, n) for x in (jnp.min(of_tile, axis=-1), jnp.max(of_tile, axis=-1)))
    static = Static(tile, block, scale, H // HK, consumers=2)
    buffers = (
        matrix(q.dtype, tile // rows, rows, D),
        matrix(q.dtype, STAGES, 2 * ROWS, D),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=tile // rows),
        *(barriers for (barriers,) in ring_barriers(1, 2)),
    )
    results = (jax.ShapeDtypeStruct((H, R // tile, n + pad), jnp.float32),) * 2
    sums, tops = launch(energy_kernel, results, buffers, static, head=H, tile=R // tile)(
        q, kbar, by_all, by_any, last_blocks
    )
    # Beyond a tile's last visible block the kernel wrote nothing, or the mark of a row without blocks.
    seen = jnp.arange(n) < by_any[..., None]
    return jnp.where(seen, sums[..., :n], 0.0), jnp.where(seen, tops[..., :n], -jnp.inf)


def last_visible_block(R, offset, length, *, tile, block, group, rule):
    """The last block whose energy each row counts in, int32 `[H, R]`; -1 where there is none."""
    position = offset[:, None] + jnp.arange(R, dtype=jnp.int32) // group
    length = length[:, None]
    if rule == "last":
        last = (position + 1) // block - 1
    else:
        tile_end = offset[:, None] + ((jnp.arange(R, dtype=jnp.int32) // tile + 1) * tile - 1) // group
        whole = (jnp.minimum(tile_end, length - 1) + 1) // block
        last = jnp.minimum(position // block, whole - 1)
    return jnp.where(position < length, last, -1)
