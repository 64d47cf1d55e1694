"""Block-sparse attention and block energies on TPUs, as Pallas kernels (arXiv 2603.06199, 2608.19758; 2205.14135).

The head-major operator behind the public functions: `forward`, `backward` (dq by query tiles, dk and dv by key blocks)
and `energy`. How the three attention kernels are built:

* One walk (`walk`). A *row* is what owns one output block: a query tile, or a key block in the pass for dk and dv. Its
  list names the blocks to gather. A grid step takes `width` of them at once, since a single 128 x 128 product is
  shorter than the fixed cost of a step. The kernel copies them itself, a step ahead and across rows: as pipelined
  operands, each block costs more scalar work than its product takes.
* No step is wasted. Rows differ in length by orders of magnitude (sinks, full last rows), so the grid is the flat list
  of all steps and its length is dynamic. It is cut into two halves of equal work for chips with two cores.
* Lists are scalars: they live in SMEM, 1 MiB in all. A call takes as many rows as `SMEM_BYTES` hold, in 16 bits where
  block ids fit; a loop over calls does the rest, every call writing its own blocks of the same buffers.
* Masks cost nothing where every query of a step sees every key. Row r stands at offset + r // group, so it sees key t
  iff r >= group * (t - offset): no division. A mask by tiles (mean keys) travels with the queries, a row a tile.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rollax.kernels.backends import alike

LOG2E = 1.0 / math.log(2.0)
MASKED = -1e30  # finite: -inf - -inf would be NaN
FAR = 2**30  # beyond every row of a head
LANES = 128
SMEM_BYTES = 2**19  # lists of one call; half of what the smallest chip has
STEP_LENGTH = 1024  # rows gathered in one step
STEP_SCORES = 2**17  # scores of one step: 512 KiB of float32, of which about four live in VMEM at a time
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
    if repeat * row_bytes(slots, 1, jnp.int32) > SMEM_BYTES:
        return f"the lists of {repeat} heads with {slots} slots each do not fit into {SMEM_BYTES} bytes of SMEM"
    return None


def row_bytes(slots: int, width: int, dtype) -> int:
    """SMEM of one row of a walk: its list, the row number of each step, and six scalars."""
    return slots * jnp.dtype(dtype).itemsize + 4 * (-(-slots // width) + 6)


def quotient(x, n: int):
    """int32 x / n towards zero; a Python int would be int64 here where JAX counts in 64 bits."""
    return lax.div(x, np.int32(n))


def remainder(x, n: int):
    """What `quotient` leaves."""
    return lax.rem(x, np.int32(n))


def each(low, high, body: Callable):
    """`body(i)` for low <= i < high, both int32."""
    lax.fori_loop(low, high, lambda i, _: body(i), None)


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


def shape_like(shape, dtype, array):
    """The type of an output that varies over the mesh axes that the array varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


class Lists(NamedTuple):
    """What a walk visits: for every row a list of blocks and three scalars that its mask needs.

    index: `[rows, slots]`, ascending ids inside the row's head; count: `[rows]`, how many are used.
    base: `[rows]`, added to an id to find the block among all heads' blocks.
    shift, length: int32 `[rows]`, see the kernels.
    """

    index: jax.Array
    count: jax.Array
    base: jax.Array
    shift: jax.Array
    length: jax.Array


class Step(NamedTuple):
    """A grid step inside a kernel.

    ids: local ids of the gathered blocks; used: how many of them count; shift, length: of the row; opens, closes: first
    and last step of an output block.
    """

    ids: list
    used: jax.Array
    shift: jax.Array
    length: jax.Array
    opens: jax.Array
    closes: jax.Array


def schedule(count, *, width: int, repeat: int, slots: int):
    """The flat list of steps of one call.

    Args:
      count: int32 `[rows]`.
    Returns:
      (bounds `[parts + 1]`: first step of each part, which begins with a whole output block; row `[steps]`: the row of
      each step, static size for the longest lists; start `[rows + 1]`: first step of each row).
    """
    rows = count.shape[0]
    steps = jnp.maximum(1, -(-count // width))  # a row without blocks still has an output
    ends = jnp.cumsum(steps, dtype=jnp.int32)
    start = jnp.concatenate([jnp.zeros_like(ends, shape=1), ends])
    ticks = lax.iota(jnp.int32, rows * -(-slots // width))
    row = jnp.minimum(jnp.searchsorted(ends, ticks, side="right", method="compare_all").astype(jnp.int32), rows - 1)
    blocks = rows // repeat
    if blocks == 1:
        return jnp.stack([start[0], start[rows]]), row, start
    opening = start[::repeat]
    middle = jnp.clip(jnp.sum(opening < ends[-1] // 2, dtype=jnp.int32), 1, blocks - 1)  # no part is empty
    return jnp.stack([opening[0], opening[middle], opening[blocks]]), row, start


def walk(
    body: Callable,
    lists: Lists,
    fixed: Sequence[jax.Array],
    gathered: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, int], jnp.dtype]],
    scratch: Sequence[tuple[int, int]],
    *,
    width: int,
    repeat: int,
    flops: int,
    exponentials: int,
    interpret,
    name: str,
):
    """Runs a kernel over the lists of all rows.

    Args:
      body: `body(step, fixed, gathered, outputs, scratch)` on references; `gathered` holds `width` of each array.
      fixed: arrays `[rows // repeat, a, b]`; the kernel sees the block of its row.
      gathered: arrays `[blocks, a, b]`; it sees the next `width` blocks of the list, fetched while the step before ran,
        zeros where the list has ended.
      outputs: shapes `(a, b)` and dtypes of a row's outputs; scratch: shapes of float32 scratch.
      width: blocks gathered in a step; repeat: consecutive rows that share an output block.
      flops, exponentials: of one gathered block, for the cost estimate.
    Returns:
      the outputs `[rows // repeat, a, b]`.
    """
    rows, slots = lists.index.shape
    units = rows // repeat
    budget = SMEM_BYTES // (repeat * row_bytes(slots, width, lists.index.dtype))
    calls = -(-units // min(units, max(1, budget)))
    size = -(-units // calls)  # of a call; the last one starts early, and repeats a few rows, to have as many
    operands = alike(*lists, *fixed, *gathered)
    lists, fixed = Lists(*operands[:5]), operands[5 : 5 + len(fixed)]
    gathered = operands[5 + len(fixed) :]
    if not interpret:  # left to itself, XLA may move all of them into VMEM, where each copy becomes a loop of loads
        gathered = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in gathered]

    def of_row(part, time, bounds, row, start, origin, *_):
        """Beyond the last step of a part that step again, whose blocks are there already."""
        mine = row[jnp.minimum(bounds[part] + time, bounds[part + 1] - 1)]
        return origin[0] + (mine if repeat == 1 else quotient(mine, repeat)), 0, 0

    def kernel(bounds, row, start, origin, index, count, base, shift, length, *refs):
        del origin
        refs = iter(refs)
        take = lambda n: [next(refs) for _ in range(n)]  # noqa: E731
        fixed_refs, sources = take(len(fixed)), take(len(gathered))
        take(len(outputs) if calls > 1 else 0)  # the buffers that the outputs alias
        output_refs, scratch_refs = take(len(outputs)), take(len(scratch))
        copies, (arrived,) = take(len(gathered)), refs
        part, time = pl.program_id(0), pl.program_id(1)
        end, now, half = bounds[part + 1], bounds[part] + time, remainder(time, 2)

        def place(step):
            """(row, address of its first slot in this step, how many count)."""
            mine = row[step]
            done = (step - start[mine]) * width
            return mine, mine * slots + done, jnp.clip(count[mine] - done, 0, width)

        def fetch(step, half):
            mine, address, used = place(step)
            head = base[mine]

            def fetch_one(u):
                block = head + index[address + u].astype(jnp.int32)
                for source, copy in zip(sources, copies, strict=True):
                    pltpu.make_async_copy(source.at[block], copy.at[half, u], arrived.at[half]).start()

            @pl.when(used == width)
            def _():
                for u in range(width):
                    fetch_one(np.int32(u))

            pl.when(used < width)(lambda: each(np.int32(0), used, fetch_one))

        def wait(*part):
            for copy in copies:
                pltpu.make_async_copy(copy.at[part], copy.at[part], arrived.at[half]).wait()

        def clear(u):
            for copy in copies:
                copy[half, u] = jnp.zeros(copy.shape[2:], copy.dtype)

        pl.when(time == 0)(lambda: fetch(now, half))
        pl.when(now + 1 < end)(lambda: fetch(now + 1, 1 - half))
        live, now = now < end, jnp.minimum(now, end - 1)
        mine, address, used = place(now)
        used = jnp.where(live, used, 0)
        first, final = now == start[mine], now + 1 == start[mine + 1]
        if repeat > 1:
            first &= remainder(mine, repeat) == 0
            final &= remainder(mine, repeat) == repeat - 1
        pl.when(used == width)(lambda: wait(half))

        @pl.when((used > 0) & (used < width))
        def _():
            each(np.int32(0), used, lambda u: wait(half, u))
            each(used, np.int32(width), clear)  # masks do not stop NaN in a product

        ids = [index[jnp.minimum(address + u, mine * slots + slots - 1)].astype(jnp.int32) for u in range(width)]
        step = Step(ids, used, shift[mine], length[mine], live & first, live & final)
        body(step, fixed_refs, [copy.at[half] for copy in copies], output_refs, scratch_refs)

    blocked = lambda x, index_map: pl.BlockSpec((1, *x.shape[-2:]), index_map)  # noqa: E731
    shapes = [shape_like((units, *shape), dtype, operands[0]) for shape, dtype in outputs]
    in_specs = [blocked(x, of_row) for x in fixed] + [pl.BlockSpec(memory_space=pltpu.HBM)] * len(gathered)
    buffer_specs = [pl.BlockSpec(memory_space=pl.ANY)] * len(outputs) if calls > 1 else []
    scratch_shapes = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
    scratch_shapes += [pltpu.VMEM((2, width, *x.shape[-2:]), x.dtype) for x in gathered]
    scratch_shapes.append(pltpu.SemaphoreType.DMA((2,)))
    moved = sum(math.prod(x.shape[-2:]) * x.dtype.itemsize for x in gathered)
    still = sum(math.prod(x.shape[-2:]) * x.dtype.itemsize for x in (*fixed, *shapes))
    cost = pl.CostEstimate(
        flops=size * repeat * slots * flops,
        bytes_accessed=size * (repeat * slots * moved + still),
        transcendentals=size * repeat * slots * exponentials,
    )
    prefetched = 9

    def call(origin, buffers):
        mine = Lists(*(lax.dynamic_slice_in_dim(x, origin * repeat, size * repeat) for x in lists))
        bounds, row, start = schedule(mine.count, width=width, repeat=repeat, slots=slots)
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=prefetched,
            grid=(bounds.shape[0] - 1, jnp.max(jnp.diff(bounds))),
            in_specs=in_specs + buffer_specs,
            out_specs=[blocked(x, of_row) for x in shapes],
            scratch_shapes=scratch_shapes,
        )
        run = pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid_spec=grid_spec,
            input_output_aliases={prefetched + len(in_specs) + i: i for i in range(len(buffers))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
            ),
            cost_estimate=cost,
            interpret=interpret,
            name=name,
        )
        scalars = (bounds, row, start, origin[None], mine.index.reshape(-1), *mine[1:])
        return run(*alike(*scalars, *fixed, *gathered, *buffers))

    if calls == 1:
        return call(jnp.int32(0), ())
    buffers = alike(*(jnp.zeros(x.shape, x.dtype) for x in shapes), operands[0])[:-1]
    loop = lambda i, buffers: tuple(call(jnp.minimum(i * size, units - size).astype(jnp.int32), buffers))  # noqa: E731
    return lax.fori_loop(0, calls, loop, buffers)


def gather_width(fixed: int, gathered: int, slots: int) -> int:
    """Blocks of `gathered` rows that one step takes beside a block of `fixed` rows."""
    return max(1, min(slots, STEP_LENGTH // gathered, STEP_SCORES // (fixed * gathered)))


def smallest(index, ids: int):
    """The index, clipped to `ids` ids, in 16 bits where they fit, which halves its SMEM."""
    return jnp.clip(index, 0, ids - 1).astype(jnp.int16 if ids <= 2**15 else jnp.int32)


def positions(ids: Sequence, used, size: int, scale: int):
    """`scale * (ids[u] * size + i)`, rows i of the gathered blocks u, `[1, len(ids) * size]`; FAR where unused."""
    place = lax.broadcasted_iota(jnp.int32, (1, len(ids) * size), 1)
    first = jnp.full(place.shape, ids[0] * size, jnp.int32)
    for u, block in enumerate(ids[1:], 1):
        first = jnp.where(place >= u * size, (block - u) * size, first)
    return jnp.where(place < used * size, scale * (first + place), FAR)


def attend_rows(step: Step, fixed, gathered, outputs, scratch, *, block: int, group: int, scale: float):
    """Forward, a query tile against gathered key blocks.

    Row r sees key t iff r >= group * t - shift and t < length, or, with a mask `[1, keys]` beside q, iff that is 1.
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
            seen = sees_keys(step, tile, block, group, *mask)
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


def sees_keys(step: Step, tile: int, block: int, group: int, mask=None):
    """Boolean `[tile or 1, keys]` of a step over key blocks; mask: a reference to the tile's `[1, 1, keys]`."""
    if mask is not None:
        seen = jnp.concatenate([part_of(mask.at[0], id, block) for id in step.ids], axis=1)
        return (seen > 0) & (lax.broadcasted_iota(jnp.int32, seen.shape, 1) < step.used * block)
    last = jnp.minimum(group * (step.length - 1), FAR - 1)
    need = positions(step.ids, step.used, block, group)
    need = jnp.where(need <= last, need - step.shift, FAR)
    rows = lax.broadcasted_iota(jnp.int32, (tile, need.shape[1]), 0)
    return rows >= need


def keys_visible(step: Step, block: int, group: int):
    """Whether every row of the tile sees every key of the step."""
    last = step.ids[-1] * block + block - 1
    return (step.used == len(step.ids)) & (group * last <= step.shift) & (last < step.length)


def part_of(mask, id, block: int):
    """The entries `[1, block]` of a mask `[1, keys]` for a block of keys."""
    return mask[:, pl.ds(pl.multiple_of(id * block, block), block)]


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
            p = jnp.where(sees_keys(step, tile, block, group, *mask), p, 0.0)
        ds = p * (dot(do_ref[0], v, (1, 1)) - lanes(delta_ref[...], x.shape[1]))
        sum_ref[...] += dot(ds.astype(k.dtype), k, (1, 0))

    dispatch(accumulate, step, None if mask else keys_visible(step, block, group))

    @pl.when(step.closes)
    def _():
        dq_ref[0] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def dkv_rows(step: Step, fixed, gathered, outputs, scratch, *, tile: int, group: int, scale: float):
    """dk and dv of a key block against gathered query tiles, transposed: keys on sublanes, queries on lanes.

    Query row r sees key t of the block iff r >= group * t + shift and t < length. With masks `[1, keys]` of the tiles,
    `shift` is the number of the block.
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
            p = jnp.where(seen_by_tiles(step, block, tile, group, *mask), p, 0.0)
        dv_sum[...] += dot(p.astype(do.dtype), do, (1, 0))
        ds = p * (dot(v_ref[0], do, (1, 1)) - stats[1:])
        dk_sum[...] += dot(ds.astype(q.dtype), q, (1, 0))

    visible = (step.ids[0] * tile >= group * (block - 1) + step.shift) & (step.length >= block)
    dispatch(accumulate, step, None if mask else visible & (step.used == len(step.ids)))

    @pl.when(step.closes)
    def _():
        dk_ref[0] = (dk_sum[...] * scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def seen_by_tiles(step: Step, block: int, tile: int, group: int, mask=None):
    """Boolean `[block, rows]` of a step over query tiles; mask: a reference to their `[width, 1, keys]`."""
    if mask is not None:
        own = [as_column(part_of(mask.at[u], step.shift, block)) for u in range(len(step.ids))]
        seen = jnp.concatenate([jnp.broadcast_to(column, (block, tile)) for column in own], axis=1)
        return (seen > 0) & (lax.broadcasted_iota(jnp.int32, seen.shape, 1) < step.used * tile)
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


def key_lists(
    index_t, count_t, offset, length, *, block: int, group: int, key_heads: int, tiles: int, masked: bool
) -> Lists:
    """The lists of the key blocks; a row is a (key head, key block, query head of it), in this order.

    `shift` = group * (first key of the block - offset), or the number of the block if `masked`: a mask by tiles says
    what is seen. `length` counts the valid keys of the block.
    """
    heads, blocks, slots = index_t.shape
    repeat = heads // key_heads

    def rows(x, *tail):
        x = x.reshape(key_heads, repeat, blocks, *tail)
        return jnp.swapaxes(x, 1, 2).reshape(-1, *tail)

    per_block = lambda x: rows(jnp.broadcast_to(x, (heads, blocks)).astype(jnp.int32))  # noqa: E731
    number = lax.iota(jnp.int32, blocks)
    first = block * number
    return Lists(
        rows(smallest(index_t, tiles), slots),
        rows(jnp.minimum(count_t, slots).astype(jnp.int32)),
        per_block(tiles * lax.iota(jnp.int32, heads)[:, None]),
        per_block(number if masked else group * (first - offset.astype(jnp.int32)[:, None])),
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
    sizes = dict(block=block, group=group, key_heads=HK, tiles=R // tile, masked=mask is not None)
    dk, dv = walk(
        lambda *a: dkv_rows(*a, tile=tile, group=group, scale=scale),
        key_lists(index_t, count_t, offset, length, **sizes),
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

    def kernel(offset_ref, length_ref, q_ref, kbar_ref, sum_ref, max_ref):
        h, i, j = (pl.program_id(axis) for axis in range(3))
        offset, length = offset_ref[h], length_ref[h]
        needed = j <= last_chunk(h, i, offset_ref, length_ref)

        @pl.when(~needed)
        def _():
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            max_ref[...] = jnp.full(max_ref.shape, -jnp.inf, jnp.float32)

        def reduce(t, number, masked: bool):
            x = dot(q_ref[0, t], kbar_ref[0], (1, 1))
            if masked:
                ids = j * wide + lax.broadcasted_iota(jnp.int32, (1, wide), 1)
                need = group * (ids * block + token - offset) - number * tile
                need = jnp.where(ids < visible(offset, length, number), need, FAR)
                rows = lax.broadcasted_iota(jnp.int32, (tile, wide), 0)
                x = jnp.where((rows >= need) & (rows < group * (length - offset) - number * tile), x, MASKED)
            top = jnp.max(x, axis=0, keepdims=True)
            # The difference is scaled, not x: rounded where it is small.
            total = jnp.sum(jnp.exp2((x - top) * (scale * LOG2E)), axis=0, keepdims=True)
            some = top > MASKED / 2
            sum_ref[0, t : t + 1, :] = jnp.where(some, total, 0.0)
            max_ref[0, t : t + 1, :] = jnp.where(some, top * (scale * LOG2E), -jnp.inf)

        for t in range(high):
            number = i * high + t
            last = (j + 1) * wide - 1
            full = (last < visible(offset, length, number)) & (group * (length - offset) >= (number + 1) * tile)
            full &= number * tile >= group * (last * block + token - offset)
            pl.when(needed & full)(partial(reduce, t, number, False))
            pl.when(needed & ~full)(partial(reduce, t, number, True))

    operands = alike(*bounds, q.reshape(H, tiles, tile, D), kbar.astype(q.dtype))
    results = pl.BlockSpec((1, high, wide), lambda h, i, j, *_: (h, i, j))
    result = shape_like((H, tiles, n), jnp.float32, operands[0])
    size = q.dtype.itemsize
    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=(result, result),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(H, pl.cdiv(tiles, high), pl.cdiv(n, wide)),
                in_specs=[
                    pl.BlockSpec((1, high, tile, D), lambda h, i, j, *_: (h, i, 0, 0)),
                    pl.BlockSpec((1, wide, D), of_keys),
                ],
                out_specs=(results, results),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=H * R * n * D,  # about half the pairs are causal
                bytes_accessed=size * H * (R * D + pl.cdiv(tiles, high) * n * D // 2) + 8 * H * tiles * n,
                transcendentals=H * R * n // 2,
            ),
            interpret=interpret,
            name="block_energy",
        )(*operands)
    )
