"""What the FlashPrefill studies ask of sparse attention.

Planted heads have a pattern that is known; sequences of associative recall have to be learnt. `flash_prefill.py` and
`flash_prefill_rl.py` use them.
"""

from typing import Any

import jax
import jax.numpy as jnp


def check_bounds(config: Any, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError for a field of a study's configuration, or a value in it, outside (lowest, highest)."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        many = isinstance(value, tuple)
        if value == ():
            raise ValueError(f"{name}: expected at least one value, got none")
        if high == float("inf"):
            said = f"{'values of ' if many else ''}at least {low:g}"
        else:
            said = f"{'values' if many else 'a value'} in [{low:g}, {high:g}]"
        for one in value if many else (value,):
            if not low <= one <= high:
                raise ValueError(f"{name}: expected {said}, got {one:g}")


# --- Planted heads: the pattern is known ----------------------------------------------------------------------------

HEADS = ("vertical", "slash", "blocks", "noisy blocks", "diffuse")
KEY_NOISE = (1.0, 1.0, 0.5, 1.5, 1.0)  # of a key, in lengths of its block's direction
STRENGTH = 6.0  # nats by which a sought block's keys stand out
GROUP = 2  # query heads of the key head


def planted_targets(key, n: int):
    """bool `[heads, n, n]`, what blocks seek: two early anchors; offsets 0, 3, 9; 1 to 8 neighbours, twice; nothing."""
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    start, wide, place = jax.random.uniform(key, (3, n, 1))
    early = max(n // 32, 1)
    vertical = (j == jnp.floor(place[0] * early)) | (j == early + jnp.floor(place[1] * early))
    slash = (i - j == 0) | (i - j == 3) | (i - j == 9)
    start = jnp.floor(start * (i + 1))
    neighbours = (j >= start) & (j <= start + jnp.floor(wide * 8))
    nothing = jnp.zeros((n, n), bool)
    heads = (vertical, slash, neighbours, neighbours, nothing)
    return jnp.stack([jnp.broadcast_to(targets, (n, n)) & (j <= i) for targets in heads])


def planted_head(key, kind, apart=0, *, length: int, block: int, width: int):
    """A key head and its query heads with a planted pattern: q `[S, GROUP, D]`, k and v `[S, 1, D]`.

    Keys of a block share a direction, and values a mean; queries point along the directions of the blocks they seek.

    Args:
      kind: index into HEADS, may be traced.
      apart: 1 for query heads that draw their targets each for itself, 0 for one draw; may be traced.
    """
    target_key, block_key, token_key = jax.random.split(key, 3)
    n, own = length // block, jnp.arange(length) // block
    direction, mean = jax.random.normal(block_key, (2, n, width))
    direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
    of_key, of_value, *of_queries = jax.random.normal(token_key, (2 + GROUP, length, width))
    draws = [jax.random.fold_in(target_key, head * apart) for head in range(GROUP)]
    sought = [planted_targets(draw, n)[kind].astype(jnp.float32) @ direction for draw in draws]
    q = STRENGTH * jnp.stack(sought, axis=1)[own] + 0.5 * jnp.stack(of_queries, axis=1)
    k = width**0.5 * direction[own] + jnp.asarray(KEY_NOISE)[kind] * of_key
    return q, k[:, None], (mean[own] + of_value)[:, None]


def attention_mass(q, k, *, block: int, every: int):
    """True attention of every `every`-th row to each block, `[HQ, R, n]`, of one key head; and those rows `[R]`."""
    rows = jnp.arange(every // 2, q.shape[0], every)
    x = jnp.einsum("rhd,sd->hrs", q[rows], k[:, 0]) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(k.shape[0]) <= rows[:, None], x, -jnp.inf), axis=-1)
    return p.reshape(*p.shape[:2], -1, block).sum(-1), rows


# --- Associative recall: needles in the first half, questions in the second -----------------------------------------

KEYS, VALUES, FILLERS = 32, 16, 64
# Ids: answers, then questions (one a key), fillers, and memories (one a pair of key and value).
QUESTION, FILLER = VALUES, VALUES + KEYS
MEMORY = FILLER + FILLERS
VOCABULARY = MEMORY + KEYS * VALUES


def recall_sequence(key, needle, questions, noise=0.0, apart=0, *, length: int, block: int = 16):
    """Memories in the first half, at random places, each `needle` times in a row; questions in the second.

    Args:
      needle: tokens of a memory. Where fewer than KEYS of them fit, fewer keys are stored.
      questions: how many.
      noise: share of the tokens of memories that hold something else.
      apart: 1 for at most one question in a block of `block` tokens. These four may be traced.
    Returns:
      tokens int32 `[length]`, answers int32 `[length]`, asked bool `[length]`.
    """
    half = length // 2
    slots = half // needle
    place, *fill, hold, ask, want, says = jax.random.uniform(key, (7, half))
    stored = jnp.minimum(slots, KEYS)
    order = jnp.argsort(jnp.where(jnp.arange(half) < slots, place, jnp.inf))[:KEYS]  # the slot of each key
    which = jnp.arange(order.size)
    value = jnp.floor(says[: order.size] * VALUES).astype(jnp.int32)
    owner = jnp.full(half, -1).at[jnp.where(which < stored, order, half)].set(which, mode="drop")
    owner = owner[jnp.arange(half) // needle]
    fillers = FILLER + jnp.floor(jnp.stack(fill) * FILLERS).astype(jnp.int32)
    memory = jnp.where((owner >= 0) & (hold >= noise), MEMORY + owner * VALUES + value[owner], fillers[0])
    lowest = ask.reshape(-1, block).min(axis=1, keepdims=True)  # of each block, the one place that may be asked
    first = (ask == jnp.repeat(lowest, block)) | (jnp.asarray(apart) < 0.5)
    asked = jnp.argsort(jnp.argsort(jnp.where(first, ask, 1.0))) < questions
    wanted = jnp.floor(want * stored).astype(jnp.int32)
    second = jnp.where(asked, QUESTION + wanted, fillers[1])
    blank = jnp.zeros(half, jnp.int32)
    return (
        jnp.concatenate([memory, second]).astype(jnp.int32),
        jnp.concatenate([blank, value[wanted]]),
        jnp.concatenate([blank > 0, asked]),
    )
