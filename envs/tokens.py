"""What token environments share: turns cut at a stop id, integers as characters, exact match, a held-out split.

Alphabet: `T` tokens of an observation, `A` tokens of an action, `W` width of a padded piece.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Step, Tokens, TokenSpec

PAD, STOP, ZERO = 0, 1, 2
# Every character vocabulary starts with these twelve, so digit d has the id ZERO + d.
CHARACTERS = ("<pad>", "<stop>", *"0123456789")
SPLITS = ("all", "train", "held_out")


def question_answer(
    draw: Callable[[jax.Array], Any],
    prompt: Callable[[Any], Tokens],
    grade: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    spec: TokenSpec,
    **optional: Callable | None,
) -> Environment:
    """A single-turn environment: one question, one answer, one reward, and the episode has terminated.

    Args:
      draw: `draw(key) -> state`, the question as arrays.
      prompt: `prompt(state) -> Tokens(ids[T], length)`.
      grade: `grade(key, state, action[A]) -> (reward float32 [], info)`, exact, on device.
      spec: its `max_action` is A and is checked against every action.
      **optional: `render`, `expert`, `demonstrate` of `Environment`.

    Raises:
      ValueError: while tracing a step, if the action is not `[A]`.
    """

    def reset(key):
        state = draw(key)
        return state, prompt(state)

    def step(key, state, action):
        if jnp.shape(action) != (spec.max_action,):
            raise ValueError(f"action must have the shape {(spec.max_action,)}, got {jnp.shape(action)}")
        reward, info = grade(key, state, action)
        silence = Tokens(jnp.full(spec.max_observation, spec.pad_id, jnp.int32), jnp.int32(0))
        return state, Step(silence, reward, jnp.asarray(True), jnp.asarray(False), info)

    return Environment(reset, step, spec, **optional)


def cut_turn(action: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens before the first stop token of a turn.

    Args:
      action: ids `[A]`.
      stop: bool `[A]`, which of them stop.

    Returns:
      (length int32 `[]` without the stop token, whether there was one, bool `[]`).
    """
    stopped = stop.any()
    return jnp.where(stopped, jnp.argmax(stop), action.shape[0]).astype(jnp.int32), stopped


def match(action: jax.Array, length: jax.Array, answer: Tokens) -> tuple[jax.Array, jax.Array]:
    """Exact match, and the share of right characters for a shaped reward.

    Args:
      action: ids `[A]`, of which `length` count.
      answer: the right ids, `[W]` with W <= A, of which `answer.length` count (at least one).

    Returns:
      (exact, share), float32 `[]`: share is right positions over the longer of the two lengths, 1 iff exact.
    """
    right = (action[: answer.ids.shape[0]] == answer.ids) & (
        jnp.arange(answer.ids.shape[0]) < jnp.minimum(length, answer.length)
    )
    count, longest = right.sum(), jnp.maximum(length, answer.length)
    return (count == longest).astype(jnp.float32), count / longest.astype(jnp.float32)


def write_integer(number: jax.Array, width: int, minus: int = PAD) -> Tokens:
    """A decimal integer without leading zeros, `[width]`, after the id `minus` where it is negative.

    The caller makes sure that the number (and its sign) fits; `width` may be up to ten.
    """
    powers = jnp.asarray([10**i for i in reversed(range(min(width, 10)))], jnp.int32)
    digits = jnp.abs(number) // powers % 10
    # Index of the first significant digit; a zero keeps its last digit.
    start = jnp.minimum(jnp.argmax(jnp.append(digits, 1) != 0), digits.shape[0] - 1)
    sign = Tokens(jnp.asarray([minus], jnp.int32), (number < 0).astype(jnp.int32))
    shifted = jnp.roll(digits + ZERO, -start).astype(jnp.int32)
    return join([sign, Tokens(shifted, (digits.shape[0] - start).astype(jnp.int32))], width)


def join(pieces: Sequence[Tokens], width: int) -> Tokens:
    """Pieces of text one after the other, padded to `[width]`; what would not fit is dropped."""
    ids, length = jnp.full(width, PAD, jnp.int32), jnp.int32(0)
    for piece in pieces:
        within = jnp.arange(piece.ids.shape[0])
        ids = ids.at[jnp.where(within < piece.length, length + within, width)].set(piece.ids, mode="drop")
        length = length + piece.length
    return Tokens(ids, length)


def literal(text: str, vocab: Sequence[str]) -> Tokens:
    """A fixed string, one id a character."""
    return Tokens(jnp.asarray([vocab.index(character) for character in text], jnp.int32), jnp.int32(len(text)))


def decode(ids: Any, length: Any, vocab: Sequence[str]) -> str:
    """Text of the first `length` ids, on the host, for people."""
    return "".join(vocab[int(i)] for i in np.asarray(ids)[: int(length)])


def is_held_out(values: jax.Array, tags: jax.Array | int = 0) -> jax.Array:
    """Whether an instance belongs to the fifth that is held out, bool `[...]`.

    The order of the values plays no part, so that `a + b` and `b + a` share a side. Each (value, tag) pair goes
    through a 32-bit mixing hash (xor-shift-multiply, the "lowbias32" constants) before the sum and once after: a
    plain linear combination modulo five would hold out whole residue classes.

    Args:
      values: non-negative int32 `[..., n]`.
      tags: what role each value plays (an operation, say), broadcast with them.
    """
    pairs = jnp.asarray(values).astype(jnp.uint32) + jnp.asarray(tags).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return _mix(_mix(pairs + jnp.uint32(1)).sum(-1, dtype=jnp.uint32)) % 5 == 0


def draw_from_split(
    key: jax.Array, draw: Callable[[jax.Array], Any], held_out: Callable[[Any], jax.Array], split: str
) -> Any:
    """Draw until the instance falls on the right side of the split, so each side keeps the law of `draw`.

    Args:
      draw: `draw(key) -> instance`; must be able to produce instances of either side.
      held_out: `held_out(instance) -> bool []`.
      split: "all", "train" (four fifths) or "held_out".
    """
    if split == "all":
        return draw(key)

    def wrong_side(carry):
        return held_out(carry[1]) != (split == "held_out")

    def again(carry):
        attempt, _ = carry
        return attempt + 1, draw(jax.random.fold_in(key, attempt))

    return jax.lax.while_loop(wrong_side, again, again((jnp.int32(0), None)))[1]


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "all", "train" or "held_out"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def _mix(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
