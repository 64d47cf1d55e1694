"""Rules of selection for sparse attention, the paper's and what it is compared with, and what selecting costs.

`flash_prefill.py` compares them; the rules are those of FlashPrefill (arXiv 2603.06199) and its V2 (arXiv 2608.19758).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    block_energy,
    block_sparse_attention,
    compact_index,
    dense_mask,
    density,
    flash_prefill_packed,
    keep_forced,
    keep_top_k,
    keep_top_p,
    mean_pool,
    packed_energy,
    select_blocks,
    select_packed,
    window_mask,
)

PAPER_ALPHA = 0.1  # V2's for all models; v1 has 0.08 to 0.22
WINDOW = 2  # blocks up to the diagonal one, which all rules but the windows read in any case


class Rule(NamedTuple):
    """A rule of selection with one number.

    Attributes:
      settings: the field of a configuration that holds the numbers.
      keep: `keep(number)`, another rule on the scores than the threshold; None where the number is alpha.
      packed: V2's scores, one list for all query heads of a key head.
      row_normalised: every row's scores are a softmax of its own, so that no row hides another.
      corrected: blocks left out count by their mean keys and values (V2).
      causal: V2 with a list for every position: what a position reads depends on no later one.
      scale: size of the rule's blocks in units of the configuration's; the paper's rule has three.
    """

    settings: str = "alpha"
    keep: Callable | None = None
    packed: bool = False
    row_normalised: bool = False
    corrected: bool = False
    causal: bool = False
    scale: float = 1


RULES: dict[str, Rule] = {
    "max": Rule(),
    "max by row": Rule(row_normalised=True),
    "v2": Rule(packed=True),
    "v2 corrected": Rule(packed=True, corrected=True),
    "top-k": Rule("top_k", lambda share: functools.partial(keep_top_k, share=share)),
    "top-p": Rule("top_p", lambda mass: functools.partial(keep_top_p, mass=mass)),
    "window": Rule("window", lambda blocks: keep_forced),
}
NETWORK_RULES = RULES | {
    "v2 causal": Rule(packed=True, causal=True),
    "max, half blocks": Rule(scale=0.5),
    "max, double blocks": Rule(scale=2),
}


def kept_blocks(rule: Rule, q, k, number, *, block: int, sink: int = 1):
    """bool `[HQ, n, n]`: the blocks of keys that each block of queries reads; `number` may be traced.

    A tile of V2 has as many packed rows as make up a block of positions, so its lists are those of `[n, n]` too.
    """
    group, kbar = q.shape[1] // k.shape[1], mean_pool(k, block)
    choice = dict(
        alpha=number if rule.keep is None else 0.0,
        block_size=block,
        sink_blocks=sink,
        window_blocks=number if rule.settings == "window" else WINDOW,
        row_normalised=rule.row_normalised,
    )
    keep = rule.keep and rule.keep(number)
    if rule.packed:
        cfg = PackedPrefillConfig(tile_rows=group * block, last_full_tiles=0, **choice)
        mask = select_packed(packed_energy(q, kbar, cfg), cfg, group=group, length=q.shape[0], keep=keep)
        return jnp.repeat(mask, group, axis=0)
    cfg = FlashPrefillConfig(last_full_blocks=0, **choice)  # whole last blocks would hide errors at the end
    return select_blocks(block_energy(q, kbar, cfg), cfg, keep=keep)


def chosen_share(mask, sink: int):
    """Of the blocks that are visible and not read in any case, the share that a mask `[..., n, n]` reads."""
    free = dense_mask(mask.shape[-1]) & ~window_mask(mask.shape[-1], sink, WINDOW)
    return density(mask & free, free)


def attend(q, k, v, mask, *, block: int, corrected: bool = False):
    """Attention `[S, HQ, D]` over the blocks of `mask`, and over the means of the others where it is corrected."""
    means = dict(kbar=mean_pool(k, block), vbar=mean_pool(v, block)) if corrected else {}
    return block_sparse_attention(q, k, v, compact_index(mask, mask.shape[-1]), block_size=block, **means)[0]


def attend_row_by_row(q, k, v, number, *, block: int, sink: int):
    """V2 with a tile a position, read in chunks against one cache of keys: (out `[S, HQ, D]`, density)."""
    cfg = PackedPrefillConfig(
        alpha=number, block_size=block, tile_rows=q.shape[1] // k.shape[1], sink_blocks=sink, window_blocks=WINDOW,
        last_full_tiles=0,
    )  # fmt: skip
    rows = 4 * block

    def read(start):
        some = jax.lax.dynamic_slice_in_dim(q, start, rows)
        how = dict(prefix=start, correction=False, implementation="reference")  # no loop pays for tiles this small
        out, stats = flash_prefill_packed(some, k, v, cfg, **how)
        return out, stats.density

    starts = jnp.arange(0, q.shape[0], rows)
    out, densities = jax.lax.map(read, starts)
    return out.reshape(q.shape), jnp.average(densities, weights=starts / block + 2.5)  # 2.5: mean of 1, 2, 3, 4 blocks


# --- What selecting costs -------------------------------------------------------------------------------------------


def sorts_of_selection(rule: Rule, *, block: int = 128, width: int = 128, length: int = 16384) -> int:
    """How many sorts there are in scoring, selecting and compacting for one head; traced, not run."""
    shape = jax.ShapeDtypeStruct((length, 1, width), jnp.float32)

    def select(q, k):
        return compact_index(kept_blocks(rule, q, k, 0.5, block=block), length // block)

    return str(jax.make_jaxpr(select)(shape, shape)).count(" sort[")


def selection_cost(block: int = 128, width: int = 128, length: int = 16384) -> tuple[float, float]:
    """Arithmetic of mean keys, scores, threshold and compaction for one head in bfloat16, lowered, not run.

    In units of 1 / (2 block) of dense causal attention's 2 length^2 width: (over the blocks that a tile sees, over the
    whole map, as the definition forms it).
    """
    n, spec = length // block, lambda tokens: jax.ShapeDtypeStruct((tokens, 1, width), jnp.bfloat16)

    def count(function, *shapes):
        cost = jax.jit(function).lower(*shapes).cost_analysis()
        return cost["flops"] + cost.get("transcendentals", 0)

    def whole_map(q, k):  # without loops, whose trips the count does not know
        cfg = FlashPrefillConfig(alpha=PAPER_ALPHA, block_size=block)
        energy = block_energy(q, mean_pool(k, block), cfg, implementation="reference")
        return compact_index(select_blocks(energy, cfg), n)

    def tile(blocks):
        """Of one tile that sees so many blocks; linear in their number, but for rounding."""
        cfg = PackedPrefillConfig(alpha=PAPER_ALPHA, block_size=block, tile_rows=block)
        prefix = (blocks - 1) * block

        def select(q, kbar):
            energy = packed_energy(q, kbar, cfg, prefix=prefix, implementation="reference")
            return compact_index(select_packed(energy, cfg, group=1, length=block, prefix=prefix), blocks)

        return count(select, spec(block), spec(blocks))

    causal = n * (tile(1) + tile(n)) / 2 + count(lambda k: mean_pool(k, block), spec(length))
    unit = length**2 * width / block
    return causal / unit, count(whole_map, spec(length), spec(length)) / unit


# --- Rules at equal density -----------------------------------------------------------------------------------------

WIDEST = 0.35  # density between two settings across which a curve may be read


def at_share(x: np.ndarray, y: np.ndarray, share: Any) -> np.ndarray:
    """y where x is `share`, `[seeds]`, on lines between the settings of x and y `[seeds, settings]`.

    NaN outside of x, and where the settings beside the share are more than WIDEST apart.
    """
    found = []
    for xs, ys, at in zip(x, y, np.broadcast_to(share, x.shape[0]), strict=True):
        order = np.argsort(xs, kind="stable")
        xs, ys = xs[order], ys[order]
        right = np.clip(np.searchsorted(xs, at), 1, xs.size - 1)
        near = xs[0] <= at <= xs[-1] and xs[right] - xs[right - 1] <= WIDEST
        found.append(np.interp(at, xs, ys) if near else np.nan)
    return np.array(found)
