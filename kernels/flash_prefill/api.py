"""FlashPrefill (arXiv 2603.06199) and FlashPrefill V2 (arXiv 2608.19758): sparse causal attention for long prompts.

    cfg = FlashPrefillConfig(alpha=0.1)
    out, stats = flash_prefill(q, k, v, cfg)  # [S, HQ, D]; vmap over a batch

One internal operator, `attend`, serves both versions, dense attention, windows and decoding: rows of queries against
listed blocks of keys, head-major. `reference.py` is its definition, the other modules its backends.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.kernels import backends
from rollax.kernels.flash_prefill import selection
from rollax.kernels.flash_prefill.selection import (
    BlockEnergy,
    BlockIndex,
    FlashPrefillConfig,
    PackedPrefillConfig,
    check_number,
    check_power_of_two,
    compact_index,
    index_mask,
    mean_pool,
    select_blocks,
    select_packed,
    transpose_index,
)

MEANS_AT_ONCE = 128  # the most keys of a block of mean keys; TPU kernels need multiples of it


class PrefillStats(NamedTuple):
    """`density` float32 `[]`: selected blocks over visible ones; `overflow` bool `[]`: the slots did not hold them."""

    density: jax.Array
    overflow: jax.Array


class Plan(NamedTuple):
    """What is static of a call of `attend`. `implementation`: a name that `backends.resolve` returned."""

    tile: int
    block: int
    group: int
    scale: float
    implementation: str


# The internal operator: backends behind custom_vjp, custom_vmap.


def choose(operator: str, implementation, q, k, *, tile, block, lists=1, correction=False, by_row=False, explain=False):
    """The implementation for `[S, H, D]` q and k, see `rollax.kernels.backends.resolve`.

    lists: the longest list of blocks or tiles that there can be; correction, by_row: whether there are blocks of mean
    keys and row-normalised energies, which no kernel has.
    """

    def ask(kernels):
        how = dict(slots=lists, repeat=q.shape[1] // k.shape[1])
        refusals = (
            kernels.refusal(q.dtype, k.dtype, q.shape[-1], tile, size, **how)
            for size in ((block, MEANS_AT_ONCE) if correction else (block,))
        )
        return next(filter(None, refusals), None)

    besides = ["row-normalised energies"] * by_row
    return backends.choose(operator, __package__, implementation, ask, explain=explain, besides=besides)


def folded(function):
    """`function` of arrays with a leading axis of heads, so that vmap lengthens that axis: backends see no batch."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(axis_size, batched, *args):
        args = [x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip(args, batched, strict=True)]
        outputs = call(*(x.reshape(-1, *x.shape[2:]) for x in args))
        outputs = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return call


def call_backend(name: str, plan: Plan, *args, **static):
    """A backend's function; inside `shard_map` its results vary as its arguments do, which not all kernels say."""
    module, more = backends.backend(__package__, plan.implementation)
    sizes = dict(tile=plan.tile, block=plan.block, group=plan.group, scale=plan.scale)
    args = backends.alike(*args)
    leaves, tree = jax.tree.flatten(folded(partial(getattr(module, name), **sizes, **static, **more))(*args))
    return tree.unflatten(backends.alike(args[0], *leaves)[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_planned(plan: Plan, q, k, v, *listed):
    return call_backend("forward", plan, q, k, v, *listed)


def attend_forward(plan, q, k, v, *listed):
    out, lse = attend_planned(plan, q, k, v, *listed)
    return (out, lse), (q, k, v, out, lse, *listed)


def attend_backward(plan, saved, cotangents):
    q, k, v, out, lse, index, count, *rest = saved
    lists = transpose_index(BlockIndex(index, count, jnp.zeros((), bool)), blocks=k.shape[1] // plan.block)
    arrays = (q, k, v, out, lse, *cotangents, index, count, lists.index, lists.count, *rest)
    return (*call_backend("backward", plan, *arrays), None, None, *(None for _ in rest))


attend_planned.defvjp(attend_forward, attend_backward)


def attend(q, k, v, index, count, offset, length, mask=None, *, tile, block, group=1, scale, implementation):
    """Attention of rows over the keys of listed blocks; the operator behind everything here. No checks.

    Args:
      q: `[H, R, D]`, R a multiple of `tile`; row r of head h stands at position offset[h] + r // group.
      k, v: `[HK, S, D]`, S a multiple of `block`; head h reads key head h // (H // HK).
      index: int32 `[H, R // tile, slots]`, ascending ids of key blocks; unused slots repeat the last used one.
      count: int32 `[H, R // tile]`, slots in use; may be 0.
      offset, length: int32 `[H]`: position of row 0, number of valid keys; may be traced. Key t is seen by a row iff
        its block is listed, t < length and t <= the row's position.
      mask: None, or bool `[H, R // tile, S]` that replaces positions: the listed keys that all rows of a tile see.
      scale: of the logits; static as `tile`, `block` and `group` are.
      implementation: a name that `backends.resolve` returned.
    Returns:
      out `[H, R, D]` in q's dtype, lse `[H, R]` in nats, float32 (float64 where q is, outside of kernels); 0 and -inf
      in a row that sees no key. Differentiable in q, k, v through both.
    """
    masks = () if mask is None else (mask,)
    arrays = backends.alike(q, k, v, index, count, offset, length, *masks)
    return attend_planned(Plan(tile, block, group, scale, implementation), *arrays)


# Layout.


def head_major(x, multiple: int):
    """`[S, H, D]` to `[H, S', D]`, S' the next multiple, filled with zeros."""
    return jnp.pad(jnp.swapaxes(x, 0, 1), ((0, 0), (0, -x.shape[0] % multiple), (0, 0)))


def valid_tokens(x, length):
    """`[S, H, D]` with zeros beyond the length: a weight of 0 does not hide NaN in what is padding."""
    return jnp.where(jnp.arange(x.shape[0])[:, None, None] < length, x, 0)


def pack(q, heads: int, multiple: int):
    """`[S, HQ, D]` to `[HK, S', D]`: row p of key head h is head h * g + p % g at position p // g, g = HQ / HK."""
    S, HQ, D = q.shape
    rows = jnp.swapaxes(q.reshape(S, heads, HQ // heads, D), 0, 1).reshape(heads, -1, D)
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple), (0, 0)))


def unpack(x, S: int, group: int):
    """`[HK, S', ...]` to `[S, HK * group, ...]`, the inverse of `pack`."""
    heads = x.shape[0]
    x = x[:, : S * group].reshape(heads, S, group, *x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape(S, heads * group, *x.shape[3:])


def hide_padding(out, lse, length):
    """0 and -inf in rows `[S, ...]` beyond the length."""
    row = jnp.arange(out.shape[0])[:, None]
    return jnp.where((row < length)[..., None], out, 0), jnp.where(row < length, lse, -jnp.inf)


def check_qkv(q, k, v, *, same_length: bool = True) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [tokens, heads, width] (vmap over a batch), got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {k.shape} and {v.shape}")
    if k.dtype != v.dtype:
        raise ValueError(f"k and v must have one dtype, got {k.dtype} and {v.dtype}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have one width, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    if same_length and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have as many tokens, got {q.shape[0]} and {k.shape[0]}")
    if min(q.shape + k.shape) < 1:
        raise ValueError(f"q and k must not be empty, got {q.shape} and {k.shape}")


def check_config(cfg, kind: type) -> None:
    """Raises TypeError for a configuration of the other version."""
    if not isinstance(cfg, kind):
        raise TypeError(f"cfg must be a {kind.__name__}, got a {type(cfg).__name__}")


def check_count(name: str, value, most: int) -> None:
    """Raises ValueError unless it is an integer in [0, most]; traced values need only be integers."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer, got {value}")
    check_number(name, value, 0, most)


def scale_of(scale: float | None, width: int) -> float:
    """The scale of the logits; 1 / sqrt(width) for None."""
    if scale is None:
        return width**-0.5
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(f"scale must be static, got a traced {scale.dtype}{list(scale.shape)}")
    if jnp.ndim(scale) or not float(scale) > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return float(scale)


# Zero-order mean correction.


class Means(NamedTuple):
    """The arguments of `attend` for the correction: mean keys are keys like others, in blocks of their own.

    kbar, vbar: `[HK, n', D]`; listed: index, count, offset, length and mask, which takes the place of positions.
    """

    kbar: jax.Array
    vbar: jax.Array
    listed: tuple


def mean_blocks(q, kbar, vbar, mask, plan: Plan) -> tuple[Means, Plan]:
    """The pass over mean keys `[HK, n, D]` and values for the blocks of `mask`, bool `[H, R // tile, n]`."""
    H, n = q.shape[0], kbar.shape[1]
    parts = -(-n // MEANS_AT_ONCE)
    block = -(-n // parts) if plan.implementation in ("reference", "xla") else MEANS_AT_ONCE
    kbar, vbar = (jnp.pad(x.astype(q.dtype), ((0, 0), (0, -n % block), (0, 0))) for x in (kbar, vbar))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -n % block)))
    some = mask.reshape(*mask.shape[:2], -1, block).any(-1)
    lists, unused = compact_index(some, some.shape[-1]), jnp.zeros(H, jnp.int32)
    return Means(kbar, vbar, (lists.index, lists.count, unused, unused, mask)), plan._replace(block=block)


def merge(out_a, lse_a, out_b, lse_b):
    """Softmax attention over the union of two disjoint sets of keys from that over each; -inf for an empty set."""
    lse_a, lse_b = (jnp.where(x > -jnp.inf, x, -1e30) for x in (lse_a, lse_b.astype(lse_a.dtype)))
    lse = jnp.logaddexp(lse_a, lse_b)
    weighted = lambda out, part: out.astype(lse.dtype) * jnp.exp(part - lse)[..., None]  # noqa: E731
    some = lse > -1e29
    return (weighted(out_a, lse_a) + weighted(out_b, lse_b)).astype(out_a.dtype), jnp.where(some, lse, -jnp.inf)


def attend_corrected_by_parts(plans, q, k, v, means: Means, *listed):
    """Attention over the keys of `listed` and, as `block` copies each, over the means; arguments as for `attend`."""
    plan, of_means = plans
    out, lse = attend(q, k, v, *listed, **plan._asdict())
    mean_out, mean_lse = attend(q, means.kbar, means.vbar, *means.listed, **of_means._asdict())
    return merge(out, lse, mean_out, mean_lse + math.log(plan.block))


# One softmax over both sets: its output and normaliser are all that either backward pass needs.
attend_corrected = jax.custom_vjp(attend_corrected_by_parts, nondiff_argnums=(0,))


def attend_corrected_forward(plans, q, k, v, means, *listed):
    out, lse = attend_corrected_by_parts(plans, q, k, v, means, *listed)
    return (out, lse), (q, k, v, means, out, lse, listed)


def attend_corrected_backward(plans, saved, cotangents):
    (plan, of_means), (q, k, v, means, out, lse, listed) = plans, saved
    dq, dk, dv, *_ = attend_backward(plan, (q, k, v, out, lse, *listed), cotangents)
    of_copy = (q, means.kbar, means.vbar, out, lse - math.log(plan.block), *means.listed)
    more, dkbar, dvbar, *_ = attend_backward(of_means, of_copy, cotangents)
    return dq + more, dk, dv, Means(dkbar, dvbar, (None,) * len(means.listed)), *(None for _ in listed)


attend_corrected.defvjp(attend_corrected_forward, attend_corrected_backward)


def corrected_blocks(mask, first_position, block: int):
    """bool `[H, T, n]`: the blocks left out of `mask` that the tile's first row, `[T]`, sees whole."""
    return ~mask & (jnp.arange(mask.shape[-1]) < first_position[:, None] // block)


# Public functions.


def block_energy(
    q, kbar, cfg: FlashPrefillConfig, *, scale=None, length=None, implementation=None, explain=False
) -> BlockEnergy:
    """v1's energies of each query block and mean key, float32 `[HQ, n, n]`; no gradient (arXiv 2603.06199).

    Row r sees block j iff the block's last token is at r or before.

    Args:
      q: `[S, HQ, D]`.
      kbar: `[n, HK, D]`, from `mean_pool` at cfg.block_size.
      scale: of the logits; None for 1 / sqrt(D).
      length: valid tokens, may be traced; None for S.
      implementation, explain: see `rollax.kernels.backends.resolve`.
    Raises:
      ValueError: shapes that do not fit; an implementation that cannot take them.
    """
    S, HQ, D = q.shape
    B, n = cfg.block_size, -(-S // cfg.block_size)
    if kbar.ndim != 3 or kbar.shape[0] != n or kbar.shape[2] != D or HQ % kbar.shape[1]:
        raise ValueError(f"kbar must be [{n}, HK, {D}] with {HQ} a multiple of HK, got {kbar.shape}")
    length = S if length is None else length
    check_count("length", length, S)
    if not cfg.mask_padding:
        q = jnp.where(jnp.arange(S)[:, None, None] < length, q, 0)
        length = -(-length // B) * B
    return energy_of(
        "block_energy",
        head_major(q, B),
        jnp.swapaxes(kbar, 0, 1),
        jnp.zeros((), jnp.int32),
        length,
        Plan(B, B, 1, scale_of(scale, D), implementation),
        cfg.row_normalised,
        "last",
        explain,
    )


def energy_of(operator, q, kbar, offset, length, plan: Plan, row_normalised, rule, explain) -> BlockEnergy:
    """Energies of head-major, padded rows under `plan`, whose implementation is as the caller gave it."""
    q, kbar = jax.lax.stop_gradient((q, kbar.astype(q.dtype)))  # means are rounded as the authors' are
    name, wanted = "row_energy" if row_normalised else "energy", plan.implementation
    if row_normalised and wanted in backends.IMPLEMENTATIONS and wanted not in ("reference", "xla"):
        wanted = "xla"  # an ablation, with no kernel of its own; what is named is for the attention
        if explain:
            print(f"{operator}: xla (row-normalised energies have no kernel)")
            explain = False
    chosen = choose(operator, wanted, q, q, tile=plan.tile, block=plan.block, explain=explain)
    H = q.shape[0]
    ends = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (H,)) for x in (offset, length))
    return BlockEnergy(*call_backend(name, plan._replace(implementation=chosen), q, kbar, *ends, rule=rule))


def block_sparse_attention(
    q,
    k,
    v,
    index: BlockIndex,
    *,
    block_size,
    scale=None,
    length=None,
    kbar=None,
    vbar=None,
    implementation=None,
    explain=False,
):
    """Causal attention of each query block over its listed key blocks (v1's pass 4, arXiv 2603.06199).

    Args:
      q: `[S, HQ, D]`; k, v: `[S, HK, D]`, HQ a multiple of HK.
      index: lists of `[HQ, n, slots]`, n = ceil(S / block_size), from `compact_index`; the caller looks at overflow.
      scale: of the logits, static; None for 1 / sqrt(D).
      length: valid tokens, may be traced; None for S. Rows beyond it give 0 and -inf.
      kbar, vbar: `[n, HK, D]` from `mean_pool` of k and v: adds every block that is not listed and wholly visible to
        the tile's first row by its means (zero-order correction, arXiv 2608.19758); differentiable too.
      implementation, explain: see `rollax.kernels.backends.resolve`.
    Returns:
      (out `[S, HQ, D]` in q's dtype, lse `[S, HQ]` in nats, float32 at least). Sums are in float32 at least.
    Raises:
      ValueError: shapes that do not fit; an implementation that cannot take them.
    """
    check_qkv(q, k, v)
    check_power_of_two("block_size", block_size)
    S, HQ, D = q.shape
    B, n = block_size, -(-S // block_size)
    if index.index.ndim != 3 or index.index.shape[:2] != (HQ, n) or index.count.shape != (HQ, n):
        shapes = f"{index.index.shape} and {index.count.shape}"
        raise ValueError(f"index must be [{HQ}, {n}, slots] with count [{HQ}, {n}], got {shapes}")
    if (kbar is None) != (vbar is None):
        raise ValueError("kbar and vbar must be given together")
    length = S if length is None else length
    check_count("length", length, S)
    how = dict(tile=B, block=B, lists=n, correction=kbar is not None, explain=explain)
    chosen = choose("block_sparse_attention", implementation, q, k, **how)
    rows, means = head_major(valid_tokens(q, length), B), None
    if kbar is not None:
        for name, x in (("kbar", kbar), ("vbar", vbar)):
            if x.shape != (n, *k.shape[1:]):
                raise ValueError(f"{name} must be {(n, *k.shape[1:])}, got {x.shape}")
        means = (jnp.swapaxes(kbar, 0, 1), jnp.swapaxes(vbar, 0, 1), jnp.arange(n) * B)
    ends = (jnp.zeros((), jnp.int32), length)
    plan = Plan(B, B, 1, scale_of(scale, D), chosen)
    keys, values = (head_major(valid_tokens(x, length), B) for x in (k, v))
    out, lse = attend_lists(rows, keys, values, index, ends, means, plan)
    return hide_padding(jnp.swapaxes(out, 0, 1)[:S], jnp.swapaxes(lse, 0, 1)[:S], length)


def attend_lists(q, k, v, index: BlockIndex, ends, means, plan: Plan):
    """`attend` for one offset and length of all heads, with the correction where `means` is given.

    Args:
      ends: (offset, length), scalars.
      means: None, or (kbar `[HK, n, D]`, vbar, position `[T]` of each tile's first row).
    """
    H = q.shape[0]
    listed = (index.index, index.count, *(jnp.broadcast_to(jnp.asarray(x, jnp.int32), (H,)) for x in ends))
    if means is None:
        return attend(q, k, v, *listed, **plan._asdict())
    kbar, vbar, first = means
    mask = corrected_blocks(index_mask(index.index, index.count, kbar.shape[1]), first, plan.block)
    means, of_means = mean_blocks(q, kbar, vbar, mask, plan)
    # The definition's backward pass differentiates its own forward pass: it takes the two sets one by one.
    call = attend_corrected_by_parts if plan.implementation == "reference" else attend_corrected
    arrays, tree = jax.tree.flatten((q, k, v, means, *listed))
    return call((plan, of_means), *tree.unflatten(backends.alike(*arrays)))


def or_dense(index: BlockIndex, visible, attend_to: Callable, arrays, dense_on_overflow: bool):
    """`attend_to(index, arrays)`, with the lists of all `visible` blocks where the index overflowed and it is asked.

    A `lax.cond`: under vmap both are computed. `arrays` is the tree of all that `attend_to` depends on.
    """
    n = visible.shape[-1]
    if not dense_on_overflow or index.index.shape[-1] == n:
        return attend_to(index, arrays)
    # Where vmap makes a cond a select, its operands must vary over the same mesh axes as its predicate.
    leaves, tree = jax.tree.flatten((index, visible, arrays))
    index, visible, arrays = jax.tree.unflatten(tree, backends.alike(*leaves))
    dense = lambda: attend_to(compact_index(visible, n), arrays)  # noqa: E731
    return jax.lax.cond(index.overflow, dense, lambda: attend_to(index, arrays))


def flash_prefill(
    q,
    k,
    v,
    cfg: FlashPrefillConfig,
    *,
    slots=None,
    length=None,
    scale=None,
    correction=False,
    dense_on_overflow=False,
    implementation=None,
    explain=False,
):
    """FlashPrefill, version 1: score mean keys, keep the blocks above the threshold, attend to them (arXiv 2603.06199).

    The selection of a query block depends on all its rows; the output of a row never depends on later blocks. No
    gradient flows through the selection.

    Args:
      q: `[S, HQ, D]`; k, v: `[S, HK, D]`, HQ a multiple of HK.
      slots: the most blocks that a list holds, static; None for all. Fewer save memory, and may overflow.
      length: valid tokens, may be traced; None for S. Rows beyond it give 0.
      scale: of the logits, static; None for 1 / sqrt(D).
      correction: add the blocks left out by their means (V2's zero-order correction).
      dense_on_overflow: take dense attention, in all tiles, where the slots of any overflowed, so that a later tile
        then changes earlier outputs; otherwise a list keeps its first blocks.
      implementation, explain: see `rollax.kernels.backends.resolve`.
    Returns:
      (out `[S, HQ, D]` in q's dtype, `PrefillStats`).
    Raises:
      ValueError: shapes that do not fit, slots or length out of range, an implementation that cannot take them.
      TypeError: another `cfg`.
    """
    check_config(cfg, FlashPrefillConfig)
    check_qkv(q, k, v)
    S, B = q.shape[0], cfg.block_size
    n = -(-S // B)
    length = S if length is None else length
    check_count("length", length, S)
    how = dict(tile=B, block=B, lists=n, correction=correction, by_row=cfg.row_normalised, explain=explain)
    chosen = choose("flash_prefill", implementation, q, k, **how)
    kbar = mean_pool(k, B, length)
    energy = block_energy(q, kbar, cfg, scale=scale, length=length, implementation=chosen)
    n_valid = -(-length // B)
    mask = select_blocks(energy, cfg, n_valid=n_valid)
    visible = jnp.broadcast_to(selection.dense_mask(n) & (jnp.arange(n)[:, None] < n_valid), mask.shape)
    index = compact_index(mask, n if slots is None else slots)
    means = dict(kbar=kbar, vbar=mean_pool(v, B, length)) if correction else {}

    def attend_to(index, arrays):
        *qkv, length, means = arrays
        how = dict(block_size=B, scale=scale, length=length, implementation=chosen)
        return block_sparse_attention(*qkv, index, **how, **means)[0]

    out = or_dense(index, visible, attend_to, (q, k, v, length, means), dense_on_overflow)
    return out, PrefillStats(selection.density(mask, visible), index.overflow)


def flash_prefill_varlen(q, k, v, cu_seqlens, cfg: FlashPrefillConfig, *, max_seqlen: int, **options):
    """`flash_prefill` of each of B sequences that lie side by side, as one batch padded to the longest.

    Args:
      q: `[tokens, HQ, D]`; k, v: `[tokens, HK, D]`.
      cu_seqlens: integers `[B + 1]`, ascending, may be traced: sequence b is the tokens from cu_seqlens[b] on and below
        cu_seqlens[b + 1]. Other tokens give 0.
      max_seqlen: tokens of the longest sequence, static. Memory is that of B sequences of this length.
      options: of `flash_prefill`, all but `length`.
    Returns:
      (out `[tokens, HQ, D]` in q's dtype, `PrefillStats` of `[B]`). A sequence beyond max_seqlen, which only a traced
      one can be, is cut there and counts as an overflow.
    Raises:
      ValueError: as `flash_prefill`; a cu_seqlens of another shape or dtype, or outside of these bounds.
    """
    check_qkv(q, k, v)
    cu_seqlens = jnp.asarray(cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.size < 2 or not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(f"cu_seqlens must be integers [B + 1], got {cu_seqlens.dtype}{list(cu_seqlens.shape)}")
    check_number("max_seqlen", max_seqlen, 1)
    lengths, tokens = jnp.diff(cu_seqlens), len(q)
    if not isinstance(lengths, jax.core.Tracer):
        check_number("cu_seqlens[0]", cu_seqlens[0], 0)
        check_number("cu_seqlens[-1]", cu_seqlens[-1], 0, tokens)
        check_number("the shortest sequence of cu_seqlens", lengths.min(), 0)
        check_number("the longest sequence of cu_seqlens", lengths.max(), 0, max_seqlen)
    place = jnp.arange(max_seqlen)
    rows = jnp.where(place < lengths[:, None], cu_seqlens[:-1, None] + place, tokens)
    padded = (jnp.asarray(x).at[rows].get(mode="fill", fill_value=0) for x in (q, k, v))
    prefill = lambda q, k, v, length: flash_prefill(q, k, v, cfg, length=length, **options)  # noqa: E731
    out, stats = jax.vmap(prefill)(*padded, jnp.minimum(lengths, max_seqlen))
    stats = stats._replace(overflow=stats.overflow | (lengths > max_seqlen))
    return jnp.zeros_like(q).at[rows].set(out, mode="drop"), stats


def packed_energy(
    q, kbar, cfg: PackedPrefillConfig, *, prefix=0, length=None, scale=None, implementation=None, explain=False
) -> BlockEnergy:
    """V2's energies of each tile of packed rows and mean key, float32 `[HK, T, n]`; no gradient (arXiv 2608.19758).

    A block is scored if the tile's last row sees it whole; of its rows, those that see the block's first token count.
    The sums make up for what float32 rounds `max` by: the relative error of a block's `score` is that of the products,
    1e-6 for logits up to 5 and 1e-5 for logits of 60 (float32; narrower tokens are rounded by more).

    Args:
      q: `[S, HQ, D]`; kbar: `[n, HK, D]` of all keys, from `mean_pool` at cfg.block_size.
      prefix: keys before the first query; length: valid queries, None for S. Both may be traced.
      scale: of the logits; None for 1 / sqrt(D).
      implementation, explain: see `rollax.kernels.backends.resolve`.
    Raises:
      ValueError: shapes that do not fit; an implementation that cannot take them.
    """
    if q.ndim != 3 or kbar.ndim != 3 or kbar.shape[2] != q.shape[2] or q.shape[1] % kbar.shape[1]:
        raise ValueError(
            f"q must be [S, HQ, D] and kbar [n, HK, D], HQ a multiple of HK, got {q.shape} and {kbar.shape}"
        )
    S, HQ, D = q.shape
    heads = kbar.shape[1]
    rows = pack(q, heads, cfg.tile_rows)
    plan = Plan(cfg.tile_rows, cfg.block_size, HQ // heads, scale_of(scale, D), implementation)
    length = prefix + (S if length is None else length)
    return energy_of(
        "packed_energy", rows, jnp.swapaxes(kbar, 0, 1), prefix, length, plan, cfg.row_normalised, "first", explain
    )


def flash_prefill_packed(
    q,
    k,
    v,
    cfg: PackedPrefillConfig,
    *,
    prefix=0,
    correction=True,
    slots=None,
    length=None,
    scale=None,
    dense_on_overflow=False,
    implementation=None,
    explain=False,
):
    """FlashPrefill V2: one list for the query heads of a key head, after a prefix (arXiv 2608.19758).

    Query s stands at position prefix + s, so that a prompt can be read in chunks against one cache of keys. The
    selection of a tile depends on all its rows; the output of a row never depends on keys after the tile's last row.

    Args:
      q: `[S, HQ, D]`; k, v: `[SK, HK, D]`, SK at least prefix + length, HQ a multiple of HK.
      prefix: keys before the first query, may be traced.
      correction: add the blocks left out by their mean keys and values; differentiable too.
      slots, scale, dense_on_overflow: as in `flash_prefill`.
      length: valid queries, may be traced; None for S. Rows beyond it give 0.
      implementation, explain: see `rollax.kernels.backends.resolve`.
    Returns:
      (out `[S, HQ, D]` in q's dtype, `PrefillStats`).
    Raises:
      ValueError: shapes that do not fit, slots, prefix or length out of range, an implementation that cannot take them.
      TypeError: another `cfg`.
    """
    check_config(cfg, PackedPrefillConfig)
    check_qkv(q, k, v, same_length=False)
    (S, HQ, D), (SK, HK, _) = q.shape, k.shape
    B, group = cfg.block_size, HQ // HK
    length = S if length is None else length
    check_count("length", length, S)
    tokens = 0 if isinstance(length, jax.core.Tracer) else int(length)
    if tokens > SK:
        raise ValueError(f"k must hold the prefix and the {tokens} tokens of q, got {SK}")
    check_count("prefix", prefix, SK - tokens)
    tiles, n = -(-S * group // cfg.tile_rows), -(-SK // B)
    how = dict(tile=cfg.tile_rows, block=B, lists=max(tiles, n), explain=explain)
    how |= dict(correction=correction, by_row=cfg.row_normalised)
    chosen = choose("flash_prefill_packed", implementation, q, k, **how)
    kbar = mean_pool(k, B, prefix + length)
    energy = packed_energy(q, kbar, cfg, prefix=prefix, length=length, scale=scale, implementation=chosen)
    span = dict(group=group, prefix=prefix, length=length)
    mask = select_packed(energy, cfg, **span)
    visible = jnp.broadcast_to(selection.packed_visible(tiles, n, cfg, **span), mask.shape)
    index = compact_index(mask, n if slots is None else slots)
    means = None
    if correction:
        first = selection.packed_spans(tiles, cfg.tile_rows, group, prefix, length)[0]
        means = (jnp.swapaxes(kbar, 0, 1), jnp.swapaxes(mean_pool(v, B, prefix + length), 0, 1), first)
    rows = pack(valid_tokens(q, length), HK, cfg.tile_rows)
    keys, values = (head_major(valid_tokens(x, prefix + length), B) for x in (k, v))
    plan = Plan(cfg.tile_rows, B, group, scale_of(scale, D), chosen)

    def attend_to(index, arrays):
        qkv, ends, means = arrays
        return attend_lists(*qkv, index, ends, means, plan)

    arrays = ((rows, keys, values), (prefix, prefix + length), means)
    out, lse = or_dense(index, visible, attend_to, arrays, dense_on_overflow)
    out, _ = hide_padding(unpack(out, S, group), unpack(lse, S, group), length)
    return out, PrefillStats(selection.density(mask, visible), index.overflow)


def masked_attention(operator, q, k, v, mask, slots, block_size, scale, length, implementation, explain):
    """`block_sparse_attention` under one mask `[n, n]` for all heads."""
    index = compact_index(mask, slots)
    heads = q.shape[1]
    every = BlockIndex(*(jnp.broadcast_to(x, (heads, *x.shape)) for x in index[:2]), index.overflow)
    lists = dict(tile=block_size, block=block_size, lists=mask.shape[0])
    chosen = choose(operator, implementation, q, k, **lists, explain=explain)
    how = dict(block_size=block_size, scale=scale, length=length, implementation=chosen)
    return block_sparse_attention(q, k, v, every, **how)


def dense_attention(q, k, v, *, block_size=128, scale=None, length=None, implementation=None, explain=False):
    """Causal flash attention with the same kernels: every list is full.

    Arguments, results and errors as in `block_sparse_attention`.
    """
    check_qkv(q, k, v)
    check_power_of_two("block_size", block_size)
    n = -(-q.shape[0] // block_size)
    mask = selection.dense_mask(n)
    return masked_attention("dense_attention", q, k, v, mask, n, block_size, scale, length, implementation, explain)


def window_attention(
    q,
    k,
    v,
    *,
    sink_blocks=2,
    window_blocks=4,
    block_size=128,
    scale=None,
    length=None,
    implementation=None,
    explain=False,
):
    """The baseline of a sliding window with sinks, in blocks; see `block_sparse_attention`."""
    check_qkv(q, k, v)
    check_power_of_two("block_size", block_size)
    check_number("sink_blocks", sink_blocks, 0)
    check_number("window_blocks", window_blocks, 1)
    n = -(-q.shape[0] // block_size)
    mask, slots = selection.window_mask(n, sink_blocks, window_blocks), min(n, sink_blocks + window_blocks)
    return masked_attention(
        "window_attention", q, k, v, mask, slots, block_size, scale, length, implementation, explain
    )
