"""Sort digits: "314159=" is answered by "113459"; exact match on device, characters are tokens.

The classic algorithmic toy task; harder than it looks for a decoder, and every answer is checked exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Tokens, TokenSpec
from rollax.envs.tokens import (
    CHARACTERS,
    PAD,
    STOP,
    ZERO,
    check_split,
    cut_turn,
    draw_from_split,
    is_held_out,
    match,
    question_answer,
)

VOCAB = (*CHARACTERS, "=")


class SortingState(NamedTuple):
    """`digits` int32 `[n]`, as given."""

    digits: jax.Array


def sorting(num_digits: int = 6, *, split: str = "train") -> Environment:
    """Sort `num_digits` random digits in ascending order.

    Args:
      num_digits: n.
      split: "train", "held_out" or "all". A fifth of the *answers* is held out: no order of the same digits is seen in
        training.

    Returns:
      The environment. Reward 1 for the exact answer, else 0. Info, float32: `correct`; `digit_share`, right digits over
      the longer of answer and reply; `stopped`, the reply ended itself.

    Raises:
      ValueError: fewer than two digits or an unknown split.
    """
    if num_digits < 2:
        raise ValueError(f"num_digits must be at least 2, got {num_digits}")
    check_split(split)
    spec = TokenSpec(
        vocab=VOCAB,
        max_observation=num_digits + 1,
        max_action=num_digits + 1,
        max_turns=1,
        stop_ids=(STOP,),
        pad_id=PAD,
    )

    def draw(key):
        def draw_digits(key):
            return SortingState(jax.random.randint(key, (num_digits,), 0, 10, jnp.int32))

        return draw_from_split(key, draw_digits, held_out, split)

    def prompt(state):
        ids = jnp.append(state.digits + ZERO, VOCAB.index("="))
        return Tokens(ids.astype(jnp.int32), jnp.int32(num_digits + 1))

    def answer(state):
        return Tokens(jnp.sort(state.digits) + ZERO, jnp.int32(num_digits))

    def grade(key, state, action):
        del key
        length, stopped = cut_turn(action, action == STOP)
        exact, share = match(action, length, answer(state))
        return exact, {"correct": exact, "digit_share": share, "stopped": stopped.astype(jnp.float32)}

    def expert(key, state):
        del key
        return jnp.append(answer(state).ids, STOP).astype(jnp.int32)

    def render(state):
        digits = np.asarray(state.digits)
        return "".join(map(str, digits)) + "=" + "".join(map(str, np.sort(digits)))

    return question_answer(draw, prompt, grade, spec, render=render, expert=expert)


def held_out(state: SortingState) -> jax.Array:
    """Whether this set of digits is in the held-out fifth, whatever its order."""
    return is_held_out(state.digits)
