"""Which key blocks a tile of queries reads: mean keys, scores, the max-based threshold, forced blocks, index lists.

FlashPrefill (arXiv 2603.06199, "v1": a tile is one block of one query head) and FlashPrefill V2 (arXiv 2608.19758,
"packed": a tile is `tile_rows` packed rows, the query heads of one key head interleaved, after a prefix). Letters: `S`
tokens, `HQ` query heads, `HK` key heads, `D` width, `n` key blocks, `T` tiles of queries, `i` a tile, `j` a block. All
of it is plain jnp on arrays of at most `[H, T, n]`, without a sort outside of the baselines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Keep = Callable[[jax.Array, jax.Array], jax.Array]  # (score, visible) to bool, all [..., T, n]


class BlockEnergy(NamedTuple):
    """What a tile's rows give a mean key: `sum` of 2^(x - max), and `max` of x over the rows that see the block.

    x = scale * log2(e) * <q, mean key>; `max` is -inf and `sum` 0 where no row sees the block. `[H, T, n]`,
    float32 at least. V2's sums make up for the rounding of `max`, see `packed_energy`.
    """

    sum: jax.Array
    max: jax.Array


class BlockIndex(NamedTuple):
    """The selected blocks of each tile: `index` int32 `[H, T, slots]` ascending, `count` int32 `[H, T]` of them used.

    Unused slots repeat the last used id (0 if there is none). `overflow` bool `[]`: some tile had more than `slots`.
    """

    index: jax.Array
    count: jax.Array
    overflow: jax.Array


def check_number(name: str, value, low, high=None) -> None:
    """Raises ValueError unless it is one number and low <= value <= high; traced numbers pass."""
    if jnp.ndim(value):
        raise ValueError(f"{name} must be one number, got an array of shape {jnp.shape(value)}")
    if isinstance(value, jax.core.Tracer):
        return
    value = np.asarray(value)  # comparing a jax.Array inside jit would be traced
    if not (value >= low and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_power_of_two(name: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")


@dataclass(frozen=True, kw_only=True)
class FlashPrefillConfig:
    """Selection of v1; sinks, window and last blocks are counted in blocks (arXiv 2603.06199).

    Attributes:
      alpha: a block is kept at alpha times the best score of its tile: 0 keeps all, 1 the best; may be traced. The
        authors take 0.08 to 0.22, by model; there is no default.
      block_size: tokens of a block, a power of two.
      sink_blocks: first blocks, always kept.
      window_blocks: last blocks up to the diagonal one, which counts, always kept.
      last_full_blocks: last query blocks, which keep all.
      min_budget: so many of the best blocks are kept whatever their score (a top-k).
      mask_padding: rows beyond the length are not scored. False is the behaviour of the authors' code, in which the
        zero rows that fill the last block flatten its scores.
      row_normalised: each row's scores are a softmax over the blocks it sees, so that a row with large logits does not
        hide the others of its tile; the paper has one reference for the whole tile.
    """

    alpha: float
    block_size: int = 128
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_blocks: int = 2
    min_budget: int = 0
    mask_padding: bool = True
    row_normalised: bool = False

    def __post_init__(self):
        check_number("alpha", self.alpha, 0, 1)
        check_power_of_two("block_size", self.block_size)
        check_number("window_blocks", self.window_blocks, 1)
        for name in ("sink_blocks", "last_full_blocks", "min_budget"):
            check_number(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class PackedPrefillConfig:
    """Selection of V2 (arXiv 2608.19758): one list for all query heads of a key head, tiles of packed rows.

    Attributes:
      alpha: as in `FlashPrefillConfig`; the authors take 0.1.
      block_size: tokens of a key block, a power of two.
      tile_rows: packed rows of a tile, a power of two; a tile spans `tile_rows` / (HQ / HK) positions.
      sink_blocks, window_blocks: as in `FlashPrefillConfig`, the window counted from the tile's first row.
      last_full_tiles: last tiles, which keep all.
      min_sparse_queries: no more queries than this and all blocks are kept.
      row_normalised: as in `FlashPrefillConfig`.
    """

    alpha: float
    block_size: int = 128
    tile_rows: int = 128
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_tiles: int = 2
    min_sparse_queries: int = 0
    row_normalised: bool = False

    def __post_init__(self):
        check_number("alpha", self.alpha, 0, 1)
        check_power_of_two("block_size", self.block_size)
        check_power_of_two("tile_rows", self.tile_rows)
        check_number("window_blocks", self.window_blocks, 1)
        for name in ("sink_blocks", "last_full_tiles", "min_sparse_queries"):
            check_number(name, getattr(self, name), 0)


def mean_pool(x, block_size: int, length=None):
    """Means of blocks of tokens: `[S, H, D]` to `[ceil(S / block_size), H, D]`, float32 at least; differentiable.

    Args:
      length: valid tokens, may be traced; the rest counts for nothing, and a block without any has mean 0. None for S.
    """
    check_power_of_two("block_size", block_size)
    S, H, D = x.shape
    n = -(-S // block_size)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    length = S if length is None else length
    x = jnp.where(jnp.arange(S)[:, None, None] < length, x.astype(wide), 0)
    x = jnp.pad(x, ((0, n * block_size - S), (0, 0), (0, 0))).reshape(n, block_size, H, D)
    valid = jnp.clip(length - jnp.arange(n) * block_size, 1, block_size)
    return x.sum(1) / valid[:, None, None].astype(wide)


def score(energy: BlockEnergy):
    """`[H, T, n]`: s = sum * 2^(max - largest max of the tile), all rows of a tile under one reference, 0 if unseen."""
    seen = energy.max > -jnp.inf
    top = jnp.max(jnp.where(seen, energy.max, -1e30), axis=-1, keepdims=True)
    return energy.sum * jnp.exp2(jnp.where(seen, energy.max - top, -jnp.inf))


def keep_max(score, visible, *, alpha):
    """The blocks with at least alpha times the best score of their tile (arXiv 2603.06199); ties are kept."""
    return score >= alpha * jnp.max(jnp.where(visible, score, 0), axis=-1, keepdims=True)


def keep_top_k(score, visible, *, share):
    """Baseline: the best blocks of each tile, as many as ceil(share * visible blocks), by a sort."""
    rank = jnp.argsort(jnp.argsort(jnp.where(visible, -score, jnp.inf), axis=-1), axis=-1)
    return rank < jnp.ceil(share * visible.sum(-1, keepdims=True) - 1e-4)  # .15 of 100 is 15 in float32 too


def keep_top_p(score, visible, *, mass):
    """Baseline: the fewest best blocks that hold `mass` of the tile's summed score, by a sort (FlexPrefill's rule)."""
    p = jnp.where(visible, score, 0)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    return jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1) < mass


def keep_forced(score, visible):
    """Baseline: nothing beyond the forced blocks, that is sinks and a sliding window."""
    return jnp.zeros(score.shape, bool)


def window_mask(n: int, sink_blocks: int, window_blocks: int):
    """bool `[n, n]`: the first blocks, and the last ones up to the diagonal one."""
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    return (j <= i) & ((j < sink_blocks) | (j > i - window_blocks))


def dense_mask(n: int):
    """bool `[n, n]`: every block up to the diagonal one."""
    return window_mask(n, 0, n)


def choose(score, visible, forced, keep: Keep, budget: int = 0):
    """bool `[..., T, n]`: visible and (kept by score, or forced, or among the `budget` best)."""
    chosen = keep(score, visible) | forced
    if budget:
        best = jax.lax.top_k(jnp.where(visible, score, -1), min(budget, score.shape[-1]))[1]
        chosen |= jnp.any(jnp.arange(score.shape[-1]) == best[..., None], axis=-2)
    return visible & chosen


def select_blocks(energy: BlockEnergy, cfg: FlashPrefillConfig, *, n_valid=None, keep: Keep | None = None):
    """v1's selection, bool `[HQ, n, n]`: the blocks that each query block reads (arXiv 2603.06199).

    Args:
      n_valid: blocks that hold valid tokens, may be traced; tiles beyond it read nothing. None for n.
      keep: another rule on the same scores, such as `partial(keep_top_k, share=0.1)`; None for `keep_max` at cfg.alpha.
    """
    n = energy.sum.shape[-1]
    n_valid = n if n_valid is None else n_valid
    i = jnp.arange(n)[:, None]
    visible = jnp.broadcast_to(dense_mask(n) & (i < n_valid), energy.sum.shape)
    forced = window_mask(n, cfg.sink_blocks, cfg.window_blocks) | (i >= n_valid - cfg.last_full_blocks)
    return choose(score(energy), visible, forced, keep or threshold(cfg), cfg.min_budget)


def threshold(cfg: FlashPrefillConfig | PackedPrefillConfig) -> Keep:
    return lambda score, visible: keep_max(score, visible, alpha=cfg.alpha)


def packed_spans(tiles: int, tile_rows: int, group: int, prefix, length):
    """(first, last) position of each tile of packed rows, int32 `[T]` each; last < first where it has no valid row."""
    first = jnp.arange(tiles) * tile_rows
    last = jnp.minimum(first + tile_rows, length * group) - 1
    return prefix + first // group, jnp.where(last < first, -1, prefix + last // group)


def packed_visible(tiles: int, n: int, cfg: PackedPrefillConfig, *, group: int, prefix=0, length):
    """bool `[T, n]`: the blocks that some row of the tile sees, wholly or in part."""
    first, last = packed_spans(tiles, cfg.tile_rows, group, prefix, length)
    return (jnp.arange(n) <= last[:, None] // cfg.block_size) & (last >= first)[:, None]


def select_packed(
    energy: BlockEnergy, cfg: PackedPrefillConfig, *, group: int, length, prefix=0, keep: Keep | None = None
):
    """V2's selection, bool `[HK, T, n]`: the blocks that each tile of packed rows reads (arXiv 2608.19758).

    Args:
      group: query heads of a key head, HQ / HK.
      length: valid queries; may be traced.
      prefix: keys before the first query; may be traced.
      keep: another rule on the same scores, see `select_blocks`.
    """
    tiles, n = energy.sum.shape[-2:]
    first, _ = packed_spans(tiles, cfg.tile_rows, group, prefix, length)
    visible = jnp.broadcast_to(
        packed_visible(tiles, n, cfg, group=group, prefix=prefix, length=length), energy.sum.shape
    )
    j = jnp.arange(n)
    used = -(-length * group // cfg.tile_rows)
    whole = (jnp.arange(tiles) >= used - cfg.last_full_tiles) | (length <= cfg.min_sparse_queries)
    forced = (j < cfg.sink_blocks) | (j > first[:, None] // cfg.block_size - cfg.window_blocks) | whole[:, None]
    return choose(score(energy), visible, forced, keep or threshold(cfg))


def compact_index(mask, slots: int) -> BlockIndex:
    """The index lists of a mask `[..., T, n]`, ascending, by a cumulative sum and a scatter.

    Raises:
      ValueError: slots outside [1, n].
    """
    n = mask.shape[-1]
    if not 1 <= slots <= n:
        raise ValueError(f"slots must be in [1, {n}] (the number of key blocks), got {slots}")
    rows = mask.reshape(-1, n)
    position = jnp.where(rows, jnp.cumsum(rows, axis=-1, dtype=jnp.int32) - 1, slots)
    j = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), rows.shape)
    index = jnp.zeros((rows.shape[0], slots), jnp.int32)
    index = index.at[jnp.arange(rows.shape[0])[:, None], position].set(j, mode="drop", unique_indices=False)
    wanted = rows.sum(-1, dtype=jnp.int32)
    count = jnp.minimum(wanted, slots)
    # Ascending ids: the largest of the used ones is the last.
    used = jnp.arange(slots) < count[:, None]
    index = jnp.where(used, index, jnp.max(jnp.where(used, index, 0), axis=-1, keepdims=True))
    return BlockIndex(index.reshape(*mask.shape[:-1], slots), count.reshape(mask.shape[:-1]), jnp.any(wanted > slots))


def index_mask(index, count, n: int):
    """bool `[..., T, n]`: the mask of index lists, the inverse of `compact_index` where nothing overflowed."""
    slots = index.shape[-1]
    flat = index.reshape(-1, slots)
    used = jnp.arange(slots) < count.reshape(-1, 1)
    rows = jnp.arange(flat.shape[0])[:, None]
    mask = jnp.zeros((flat.shape[0], n), bool).at[rows, jnp.where(used, flat, n)].set(True, mode="drop")
    return mask.reshape(*index.shape[:-1], n)


def transpose_index(index: BlockIndex, slots: int | None = None, *, blocks: int | None = None) -> BlockIndex:
    """The tiles that read each key block, `[H, blocks, slots]`: what the backward pass walks.

    Args:
      slots: None for the number of tiles, which is always enough.
      blocks: number of key blocks; None for the number of tiles (v1). Packed lists need theirs: an index does not say
        how many there are, and ids beyond the number given are lost.
    Raises:
      ValueError: lists of more slots than blocks.
    """
    tiles, listed = index.index.shape[-2:]
    blocks = tiles if blocks is None else blocks
    if blocks < listed:
        raise ValueError(f"blocks must be at least the {listed} slots of a list, got {blocks}")
    mask = index_mask(index.index, index.count, blocks)
    return compact_index(jnp.swapaxes(mask, -1, -2), tiles if slots is None else slots)


def density(selected, visible=None):
    """Selected blocks over visible ones, float32 `[]`.

    Args:
      selected: mask bool `[..., T, n]` or `BlockIndex`.
      visible: mask `[..., T, n]` that broadcasts to the selected one along all axes but the last; None for the causal
        `[n, n]` of v1. Packed lists need theirs: an index does not say how many blocks there are, and is taken for one
        of v1.
    Raises:
      ValueError: no `visible` for a mask of more tiles than blocks or fewer, or for an index of more slots than tiles;
        a `visible` of another number of blocks than the mask, or of fewer than the slots of the index.
    """
    listed = isinstance(selected, BlockIndex)
    count = selected.count if listed else selected.sum(-1)
    tiles, blocks = count.shape[-1], (selected.index if listed else selected).shape[-1]
    if visible is None:
        if blocks > tiles or (blocks < tiles and not listed):
            raise ValueError(f"visible must be given where tiles and blocks are not as many, got {tiles} and {blocks}")
        visible = dense_mask(tiles)
    if visible.shape[-1] < blocks or (visible.shape[-1] > blocks and not listed):
        most = "at least " if listed else ""
        raise ValueError(f"visible must have {most}{blocks} blocks, got {visible.shape[-1]}")
    seen = jnp.broadcast_to(visible.sum(-1), count.shape)
    return count.sum(dtype=jnp.float32) / jnp.maximum(seen.sum(dtype=jnp.float32), 1)
