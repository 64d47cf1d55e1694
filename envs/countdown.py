"""Countdown: reach a target from given numbers with + - * / and brackets, any valid expression counts.

The task of TinyZero (and of the television game), with its rule that every number is used exactly once. The verifier
runs on
device: a fixed-size shunting-yard machine with exact rational arithmetic, so that reward needs no host.
"""

from itertools import combinations_with_replacement
from math import comb
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
    decode,
    draw_from_split,
    is_held_out,
    join,
    literal,
    question_answer,
    write_integer,
)

VOCAB = (*CHARACTERS, *"+-*/()=,")
PLUS, MINUS, TIMES, DIVIDE, OPEN, CLOSE = (VOCAB.index(character) for character in "+-*/()")
# A literal saturates here: far above every given number, far below the overflow of int32 on the next digit.
LARGEST_LITERAL = 10**7
# With more sets of numbers than these, neither side of the split can be empty but by a miracle.
FEW_SETS = 10_000


class CountdownState(NamedTuple):
    """One puzzle with n numbers.

    Attributes:
      numbers: int32 `[n]`, positive, as shown.
      target: int32 `[]`, positive.
      solution: one solution, ids `[max_action - 1]` and length; there may be others.
    """

    numbers: jax.Array
    target: jax.Array
    solution: Tokens


class Evaluation(NamedTuple):
    """What the machine found.

    Attributes:
      numerator, denominator: int32 `[]`, the exact value where all flags allow one; unreduced, of either sign.
      well_formed: bool `[]`, an expression of literals without leading zeros, binary + - * / and brackets.
      uses_each_number: bool `[]`, its literals are the given numbers, each exactly once.
      divides_by_zero: bool `[]`, somewhere inside.
    """

    numerator: jax.Array
    denominator: jax.Array
    well_formed: jax.Array
    uses_each_number: jax.Array
    divides_by_zero: jax.Array


def countdown(
    num_numbers: int = 4, max_number: int = 99, max_target: int = 999, *, max_action: int | None = None, split="train"
) -> Environment:
    """Puzzles "19,36,55,7=65"; the reply is an expression such as "55+36-19-7" with each number exactly once.

    Puzzles are made by joining random pairs of numbers with a random operation until one is left, keeping every
    intermediate value a positive integer up to `max_target`, so each has a solution; replies may pass through fractions
    and negative numbers.

    Args:
      num_numbers: n, 2 to 6.
      max_number: numbers are uniform in `[1, max_number]`; `max_number ** n` must fit int32, which keeps the verifier
        exact.
      max_target: at least `max_number`.
      max_action: A, the most tokens of a reply with its stop; default (and least): every fully bracketed solution fits.
      split: "train", "held_out" (a fifth of the sets of numbers, whatever their order) or "all".

    Returns:
      The environment. Reward 1 if the reply is well formed, uses each number exactly once and equals the target; else
      0.
      Info, float32: `correct`, `well_formed`, `uses_each_number`, `divides_by_zero`, and `value`, what the expression
      equals (0 where the other flags leave it undefined).

    Raises:
      ValueError: sizes out of range, an unknown split, or one without any set of numbers.
    """
    if not 2 <= num_numbers <= 6:
        raise ValueError(f"num_numbers must be 2 to 6, got {num_numbers}")
    if max_number < 2 or max_number**num_numbers >= 2**31:
        raise ValueError(f"max_number ** num_numbers must be below 2**31 (and max_number >= 2), got {max_number}")
    if not max_number <= max_target < 10**6:
        raise ValueError(f"max_target must be at least max_number={max_number} and below 10**6, got {max_target}")
    check_split(split)
    if split != "all" and comb(max_number + num_numbers - 1, num_numbers) <= FEW_SETS:
        sets = np.asarray(list(combinations_with_replacement(range(1, max_number + 1), num_numbers)), np.int32)
        with jax.ensure_compile_time_eval():  # also where the environment is made inside jit
            sides = np.asarray(is_held_out(sets))
        if not (sides == (split == "held_out")).any():
            raise ValueError(f"split={split!r} has no set of numbers, got {num_numbers=} and {max_number=}")
    digits = len(str(max_number))
    # n literals, n - 1 operations, a pair of brackets around each but the last.
    solution_width = num_numbers * digits + (num_numbers - 1) + 2 * (num_numbers - 2)
    max_action = solution_width + 1 if max_action is None else max_action
    if max_action <= solution_width:
        raise ValueError(f"max_action must be at least {solution_width + 1}, got {max_action}")
    target_digits = len(str(max_target))
    spec = TokenSpec(
        vocab=VOCAB,
        max_observation=num_numbers * digits + num_numbers + target_digits,
        max_action=max_action,
        max_turns=1,
        stop_ids=(STOP,),
        pad_id=PAD,
    )

    def draw(key):
        number_key, solution_key = jax.random.split(key)

        def draw_numbers(key):
            return jax.random.randint(key, (num_numbers,), 1, max_number + 1, jnp.int32)

        numbers = draw_from_split(number_key, draw_numbers, is_held_out, split)
        target, solution = _make_solution(solution_key, numbers, digits, max_target, max_action - 1)
        return CountdownState(numbers, target, solution)

    def prompt(state):
        pieces = []
        for i in range(num_numbers):
            pieces += [write_integer(state.numbers[i], digits), literal("," if i < num_numbers - 1 else "=", VOCAB)]
        return join([*pieces, write_integer(state.target, target_digits)], spec.max_observation)

    def grade(key, state, action):
        del key
        length, _ = cut_turn(action, action == STOP)
        found = evaluate(action, length, state.numbers)
        valid = found.well_formed & found.uses_each_number & ~found.divides_by_zero
        denominator = jnp.where(valid, found.denominator, 1)
        # Compared by division, since target * denominator could leave int32.
        equal = (found.numerator % denominator == 0) & (found.numerator // denominator == state.target)
        correct = (valid & equal).astype(jnp.float32)
        value = found.numerator.astype(jnp.float32) / denominator.astype(jnp.float32)
        info = {
            "correct": correct,
            "well_formed": found.well_formed.astype(jnp.float32),
            "uses_each_number": found.uses_each_number.astype(jnp.float32),
            "divides_by_zero": found.divides_by_zero.astype(jnp.float32),
            "value": jnp.where(valid, value, 0.0),
        }
        return correct, info

    def expert(key, state):
        del key
        stop = Tokens(jnp.asarray([STOP], jnp.int32), jnp.int32(1))
        return join([state.solution, stop], max_action).ids

    def render(state):
        numbers = " ".join(map(str, np.asarray(state.numbers)))
        return f"{numbers} -> {int(state.target)}  (for example {decode(*state.solution, VOCAB)})"

    return question_answer(draw, prompt, grade, spec, render=render, expert=expert)


class _Machine(NamedTuple):
    numerators: jax.Array  # stack [A + 1]
    denominators: jax.Array
    num_values: jax.Array
    operations: jax.Array  # stack [A + 1] of ids
    num_operations: jax.Array
    used: jax.Array  # [n]
    expects_operand: jax.Array
    in_literal: jax.Array
    finished: jax.Array
    malformed: jax.Array
    foreign: jax.Array  # a literal that is not among the unused numbers
    divides_by_zero: jax.Array


def evaluate(action: jax.Array, length: jax.Array, numbers: jax.Array) -> Evaluation:
    """Parse and evaluate an expression: shunting-yard (Dijkstra 1961) as a scan over tokens, exact rationals in int32.

    The value is exact where each number is used exactly once: with n numbers up to M every numerator is at most M^n (by
    induction over the expression, M >= 2) and every denominator at most M^(n-1). Elsewhere int32 may wrap, harmlessly.

    Args:
      action: ids of `VOCAB`, `[A]`.
      length: how many of them count, int32 `[]`.
      numbers: int32 `[n]`, those to be used.

    Returns:
      The evaluation; anything else than a full expression (an empty reply, a sign in front, "=") is not well formed.
    """
    size = action.shape[0] + 1
    empty, zero, no = jnp.zeros(size, jnp.int32), jnp.int32(0), jnp.asarray(False)
    machine = _Machine(
        empty, empty, zero, empty, zero, jnp.zeros(numbers.shape, bool), jnp.asarray(True), no, no, no, no, no
    )
    # One more token closes the last literal and empties the stacks; -1 is no token of the vocabulary.
    tokens = jnp.where(jnp.arange(size) < length, jnp.append(action, -1), -1)
    is_end = jnp.arange(size) == length

    def body(machine, inputs):
        token, is_end = inputs
        advanced = _advance(machine, token, is_end, numbers)
        return jax.tree.map(lambda new, old: jnp.where(machine.finished, old, new), advanced, machine), None

    machine, _ = jax.lax.scan(body, machine, (tokens, is_end))
    return Evaluation(
        numerator=machine.numerators[0],
        denominator=machine.denominators[0],
        well_formed=machine.finished & ~machine.malformed,
        uses_each_number=machine.used.all() & ~machine.foreign,
        divides_by_zero=machine.divides_by_zero,
    )


def _advance(machine, token, is_end, numbers):
    is_digit = (token >= ZERO) & (token < ZERO + 10)
    is_operation = (token == PLUS) | (token == MINUS) | (token == TIMES) | (token == DIVIDE)
    is_open, is_close = token == OPEN, token == CLOSE
    known = is_digit | is_operation | is_open | is_close | is_end
    machine = _close_literal(machine, ~is_digit & machine.in_literal, numbers)

    starts = is_digit & ~machine.in_literal
    # Operands and opening brackets go where an operand is expected, everything else where not.
    misplaced = jnp.where(starts | is_open, ~machine.expects_operand, ~is_digit & machine.expects_operand)
    malformed = machine.malformed | ~known | misplaced

    # A digit starts a literal or lengthens the one on top of the stack.
    top = jnp.where(starts, machine.num_values, machine.num_values - 1)
    before = jnp.where(starts, 0, machine.numerators[top])
    malformed |= is_digit & ~starts & (before == 0)  # leading zero
    literal_value = jnp.minimum(before * 10 + token - ZERO, LARGEST_LITERAL)
    at = jnp.where(is_digit, top, machine.numerators.shape[0])
    machine = machine._replace(
        numerators=machine.numerators.at[at].set(literal_value, mode="drop"),
        denominators=machine.denominators.at[at].set(1, mode="drop"),
        num_values=machine.num_values + starts,
        in_literal=is_digit,
        malformed=malformed,
    )

    # What binds at least as tightly is applied first. Between brackets the stack holds at most one + or - under one
    # * or /, so two reductions are enough.
    precedence = jnp.where(is_operation, _precedence(token), jnp.where(is_close | is_end, 1, 3))
    for _ in range(2):
        machine = _reduce(machine, precedence)

    # A closing bracket needs its opening one on top; the end needs an empty stack.
    last = jnp.maximum(machine.num_operations - 1, 0)
    open_on_top = (machine.num_operations > 0) & (machine.operations[last] == OPEN)
    unbalanced = (is_close & ~open_on_top) | (is_end & (machine.num_operations > 0))
    pushes, pops = is_operation | is_open, is_close & open_on_top
    at = jnp.where(pushes, machine.num_operations, machine.operations.shape[0])
    return machine._replace(
        operations=machine.operations.at[at].set(token, mode="drop"),
        num_operations=machine.num_operations + pushes - pops,
        expects_operand=is_operation | is_open,
        finished=is_end,
        malformed=machine.malformed | unbalanced,
    )


def _close_literal(machine, closes, numbers):
    value = machine.numerators[jnp.maximum(machine.num_values - 1, 0)]
    free = (numbers == value) & ~machine.used
    first = jnp.arange(numbers.shape[0]) == jnp.argmax(free)
    return machine._replace(
        used=machine.used | (closes & free & first), foreign=machine.foreign | (closes & ~free.any())
    )


def _precedence(operation):
    return jnp.where((operation == TIMES) | (operation == DIVIDE), 2, jnp.where(operation == OPEN, 0, 1))


def _reduce(machine, precedence):
    last = jnp.maximum(machine.num_operations - 1, 0)
    operation = machine.operations[last]
    applies = (machine.num_operations > 0) & (machine.num_values > 1) & (_precedence(operation) >= precedence)
    # An opening bracket has precedence 0 and stays.
    left, right = jnp.maximum(machine.num_values - 2, 0), jnp.maximum(machine.num_values - 1, 0)
    a, b = machine.numerators[left], machine.denominators[left]
    c, d = machine.numerators[right], machine.denominators[right]
    numerator = jnp.select(
        [operation == PLUS, operation == MINUS, operation == TIMES], [a * d + c * b, a * d - c * b, a * c], a * d
    )
    denominator = jnp.where(operation == DIVIDE, b * c, b * d)
    at = jnp.where(applies, left, machine.numerators.shape[0])
    return machine._replace(
        numerators=machine.numerators.at[at].set(numerator, mode="drop"),
        denominators=machine.denominators.at[at].set(denominator, mode="drop"),
        num_values=machine.num_values - applies,
        num_operations=machine.num_operations - applies,
        divides_by_zero=machine.divides_by_zero | (applies & (operation == DIVIDE) & (c == 0)),
    )


def _make_solution(key, numbers, digits, max_target, width):
    """Join random pairs until one value is left; returns it and its expression, brackets around all but the last."""
    values = list(numbers)
    texts = [write_integer(number, digits) for number in numbers]
    while len(values) > 1:
        key, pair_key, operation_key = jax.random.split(key, 3)
        order = jax.random.permutation(pair_key, len(values))
        stacked = jnp.stack(values)[order]
        ids = jnp.stack([jnp.pad(text.ids, (0, width - text.ids.shape[0])) for text in texts])[order]
        lengths = jnp.stack([text.length for text in texts])[order]
        # The larger of the pair comes first, so that the difference is no less than zero.
        swap = stacked[0] < stacked[1]
        first, second = jnp.where(swap, 1, 0), jnp.where(swap, 0, 1)
        a, b = stacked[first], stacked[second]
        results = jnp.stack([a + b, a - b, a * b, a // b])
        # One always qualifies: the difference where a > b, the quotient where a = b.
        allowed = (results > 0) & (results <= max_target) & jnp.asarray([True, True, True, False]).at[3].set(a % b == 0)
        chosen = jax.random.categorical(operation_key, jnp.where(allowed, 0.0, -jnp.inf))
        operation = Tokens((PLUS + chosen)[None].astype(jnp.int32), jnp.int32(1))
        text = [Tokens(ids[first], lengths[first]), operation, Tokens(ids[second], lengths[second])]
        if len(values) > 2:
            text = [literal("(", VOCAB), *text, literal(")", VOCAB)]
        values = [results[chosen], *stacked[2:]]
        texts = [join(text, width), *(Tokens(ids[i], lengths[i]) for i in range(2, len(values) + 1))]
    return values[0], texts[0]
