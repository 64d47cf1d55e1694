"""A walk over lists of blocks on TPUs: the loop that the attention kernels of `pallas_tpu` are bodies of.

* A *row* is what owns one output block: a query tile, or a key block in the pass for dk and dv. Its list names the
  blocks to gather. A grid step takes `width` of them at once, since a single 128 x 128 product is shorter than the
  fixed cost of a step. The kernel copies them itself, a step ahead and across rows: as pipelined operands, each block
  costs more scalar work than its product takes.
* No step is wasted. Rows differ in length by orders of magnitude (sinks, full last rows), so the grid is the flat list
  of all steps and its length is dynamic. It is cut into two halves of equal work for chips with two cores.
* Lists are scalars: they live in SMEM, 1 MiB in all. A call takes as many rows as `SMEM_BYTES` hold, in 16 bits where
  block ids fit; a loop over calls does the rest, every call writing its own blocks of the same buffers.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rollax.kernels.backends import alike

SMEM_BYTES = 2**19  # lists of one call; half of what the smallest chip has
STEP_LENGTH = 1024  # rows gathered in one step
STEP_SCORES = 2**17  # scores of one step: 512 KiB of float32, of which about four live in VMEM at a time


def row_bytes(slots: int, width: int, dtype) -> int:
    """SMEM of one row of a walk: its list, the row number of each step, and six scalars."""
    return slots * jnp.dtype(dtype).itemsize + 4 * (-(-slots // width) + 6)


def lists_fit(slots: int, repeat: int) -> bool:
    """Whether SMEM holds the lists of an output block: `repeat` rows of at most `slots` blocks, one a step."""
    return repeat * row_bytes(slots, 1, jnp.int32) <= SMEM_BYTES


def quotient(x, n: int):
    """int32 x / n towards zero; a Python int would be int64 here where JAX counts in 64 bits."""
    return lax.div(x, np.int32(n))


def remainder(x, n: int):
    """What `quotient` leaves."""
    return lax.rem(x, np.int32(n))


def each(low, high, body: Callable):
    """`body(i)` for low <= i < high, both int32."""
    lax.fori_loop(low, high, lambda i, _: body(i), None)


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
