"""What every language policy is here: a bundle of pure functions over a plain tree of arrays.

`agents.transformer` and `agents.tabular` build one; `agents.generation` and `agents.rollout` know only this file.
Padding is said by positions: a negative position marks a slot that holds no token, in prompts and in the cache alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LanguageModel(NamedTuple):
    """Functions of one model. Alphabet: `B` batch, `T` tokens, `S` cache slots, `D` width, `V` vocabulary.

    Attributes:
      init: `init(key) -> params`, a plain tree (dicts, tuples, arrays).
      apply: `apply(params, tokens[B, T], positions[B, T], cache=None) -> (logits[B, T, V], cache)`.
        Without a cache, plain causal attention over the T slots; the returned cache is None. With one, the T tokens
        go to the next T slots and see all the slots before them. A slot is visible iff its position is >= 0 and it is
        not later in slot order; the position numbers themselves feed the position encoding only.
      init_cache: `init_cache(batch, slots, dtype=None) -> cache`, empty. Its array leaves have the batch as leading
        axis, except scalars (the fill index), which all rows share.
      hidden: `hidden(params, tokens, positions, cache=None) -> (hidden[B, T, D], cache)`, the input of the output
        head; None where there is no such thing (a table).
      head: `head(params) -> [D, V]`, so that `logits = hidden @ head`; None as above.
      axes: a tree like params, each leaf a tuple of logical axis names (`agents.sharding`).
      vocab_size: V.
    """

    init: Callable[..., Any]
    apply: Callable[..., tuple[Any, Any]]
    init_cache: Callable[..., Any]
    hidden: Callable[..., tuple[Any, Any]] | None
    head: Callable[..., Any] | None
    axes: Any
    vocab_size: int


def repeat_rows(cache: Any, times: int) -> Any:
    """Each row of a cache `times` times in a row, `[B, ...] -> [B * times, ...]`: one prompt, many samples."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, cache)
