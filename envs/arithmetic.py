"""Arithmetic on device: "12+7=" is answered by "19"; several operations, terms and levels, exact match.

The smallest task on which a transformer learns by RL in minutes; characters are tokens, the split is held out by a
hash.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, TokenSpec
from rollax.envs.tokens import (
    CHARACTERS,
    PAD,
    STOP,
    check_split,
    cut_turn,
    decode,
    draw_from_split,
    is_held_out,
    join,
    literal,
    match,
    question_answer,
    write_integer,
)

OPERATIONS = "+-*"
VOCAB = (*CHARACTERS, *OPERATIONS, "=")


class ArithmeticState(NamedTuple):
    """One exercise with K terms.

    Attributes:
      terms: int32 `[K]`, non-negative.
      operations: int32 `[K - 1]`, between the terms, indices into `OPERATIONS`.
      level: int32 `[]`, the most digits of a term.
    """

    terms: jax.Array
    operations: jax.Array
    level: jax.Array


def arithmetic(
    operations: str = "+",
    max_digits: int = 2,
    num_terms: int = 2,
    *,
    split: str = "train",
    level_weights: jax.Array | None = None,
) -> Environment:
    """Exercises such as "12+7=" or "3-4*25=" with the usual precedence; the answer is the exact integer.

    Args:
      operations: those drawn uniformly for each gap, out of "+-*".
      max_digits: terms are uniform in `[0, 10**level - 1]` with level <= max_digits.
      num_terms: K, at least 2.
      split: "train", "held_out" (a fifth of the instances; `a+b` and `b+a` are one) or "all".
      level_weights: `[max_digits]`, unnormalised odds of level 1, 2, ...; may be traced, so that a curriculum moves
        them without recompiling. None: always `max_digits`.

    Returns:
      The environment. Reward 1 for the exact answer, else 0. Info, float32 unless noted: `correct`; `digit_share`,
      right characters over the longer of answer and reply, for a shaped reward; `stopped`, the reply ended itself;
      `level` (int32).

    Raises:
      ValueError: an unknown operation or split, too few terms or digits, numbers that could leave int32, or weights of
        the wrong shape or, where concrete, negative, not finite or all zero.
    """
    if not operations or set(operations) - set(OPERATIONS) or len(set(operations)) < len(operations):
        raise ValueError(f"operations must be different characters out of {OPERATIONS!r}, got {operations!r}")
    if num_terms < 2 or max_digits < 1:
        raise ValueError(f"num_terms must be >= 2 and max_digits >= 1, got {num_terms} and {max_digits}")
    largest_term = 10**max_digits - 1
    largest = max(num_terms * largest_term, largest_term**num_terms if "*" in operations else 0)
    if largest >= 10**9:
        raise ValueError(f"results must stay below 10**9, got {operations=}, {max_digits=}, {num_terms=}")
    if level_weights is not None and jnp.shape(level_weights) != (max_digits,):
        raise ValueError(f"level_weights must have the shape {(max_digits,)}, got {jnp.shape(level_weights)}")
    if level_weights is not None and not isinstance(level_weights, jax.core.Tracer):
        weights = np.asarray(level_weights)
        if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
            raise ValueError(f"level_weights must be finite, non-negative and not all zero, got {weights}")
    check_split(split)

    codes = jnp.asarray([OPERATIONS.index(operation) for operation in operations], jnp.int32)
    answer_width = len(str(largest)) + ("-" in operations)
    minus = VOCAB.index("-")
    spec = TokenSpec(
        vocab=VOCAB,
        max_observation=num_terms * max_digits + num_terms,
        max_action=answer_width + 1,
        max_turns=1,
        stop_ids=(STOP,),
        pad_id=PAD,
    )

    def draw(key):
        level_key, key = jax.random.split(key)
        if level_weights is None:
            level = jnp.int32(max_digits)
        else:
            level = jax.random.categorical(level_key, jnp.log(jnp.asarray(level_weights, jnp.float32))) + 1

        def draw_exercise(key):
            term_key, operation_key = jax.random.split(key)
            terms = jax.random.randint(term_key, (num_terms,), 0, 10**level, jnp.int32)
            chosen = jax.random.randint(operation_key, (num_terms - 1,), 0, len(operations), jnp.int32)
            return ArithmeticState(terms, codes[chosen], level.astype(jnp.int32))

        return draw_from_split(key, draw_exercise, held_out, split)

    def prompt(state):
        pieces = []
        for i in range(num_terms):
            if i:
                pieces.append(literal("+", VOCAB)._replace(ids=VOCAB.index("+") + state.operations[i - 1, None]))
            pieces.append(write_integer(state.terms[i], max_digits))
        return join([*pieces, literal("=", VOCAB)], spec.max_observation)

    def answer(state):
        return write_integer(evaluate(state.terms, state.operations), answer_width, minus)

    def grade(key, state, action):
        del key
        length, stopped = cut_turn(action, action == STOP)
        exact, share = match(action, length, answer(state))
        info = {
            "correct": exact,
            "digit_share": share,
            "stopped": stopped.astype(jnp.float32),
            "level": state.level,
        }
        return exact, info

    def expert(key, state):
        del key
        stop = literal("=", VOCAB)._replace(ids=jnp.asarray([STOP], jnp.int32))
        return join([answer(state), stop], spec.max_action).ids

    def render(state):
        question = decode(*prompt(state), VOCAB)
        return f"{question}{int(evaluate(state.terms, state.operations))}  (level {int(state.level)})"

    return question_answer(draw, prompt, grade, spec, render=render, expert=expert)


def evaluate(terms: jax.Array, operations: jax.Array) -> jax.Array:
    """Value of `terms[0] op[0] terms[1] op[1] ...` with * before + and -, int32 `[]`."""
    total, product = jnp.int32(0), terms[0]
    for i in range(operations.shape[0]):
        term, operation = terms[i + 1], operations[i]
        times = operation == OPERATIONS.index("*")
        total = jnp.where(times, total, total + product)
        opening = jnp.where(operation == OPERATIONS.index("-"), -term, term)
        product = jnp.where(times, product * term, opening)
    return total + product


def held_out(state: ArithmeticState) -> jax.Array:
    """Whether an exercise is in the held-out fifth; a term counts with the operation before it, the order does not."""
    times = OPERATIONS.index("*")
    # The first term has no operation before it: that of a factor where it is one, else a plus.
    first = jnp.where(state.operations[:1] == times, times, OPERATIONS.index("+"))
    return is_held_out(state.terms, jnp.concatenate([first, state.operations]))
