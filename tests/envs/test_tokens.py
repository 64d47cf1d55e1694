"""The pieces token environments are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs.environment import Tokens
from rollax.envs.tokens import CHARACTERS, PAD, cut_turn, decode, draw_from_split, is_held_out, join, write_integer


def test_integers_are_written_as_python_writes_them():
    numbers = [0, 1, 9, 10, 100, 123456789, 999999999, 1005, -1, -10, -999999999]
    vocab = (*CHARACTERS, "-")
    ids, lengths = jax.jit(jax.vmap(lambda n: write_integer(n, 10, minus=12)))(jnp.asarray(numbers))
    assert [decode(i, n, vocab) for i, n in zip(ids, lengths, strict=True)] == [str(n) for n in numbers]
    assert decode(*write_integer(jnp.int32(7), 1), vocab) == "7"


def test_join_concatenates_what_counts_and_drops_what_overflows():
    pieces = [Tokens(jnp.asarray([5, 6, 7]), jnp.int32(2)), Tokens(jnp.asarray([8]), jnp.int32(0))]
    pieces.append(Tokens(jnp.asarray([9, 3]), jnp.int32(2)))
    ids, length = join(pieces, 6)
    np.testing.assert_array_equal(ids, [5, 6, 9, 3, PAD, PAD])
    assert int(length) == 4
    np.testing.assert_array_equal(join(pieces, 3).ids, [5, 6, 9])


@pytest.mark.parametrize(
    ("stop", "expected"), [([0, 0, 0], (3, False)), ([0, 1, 1], (1, True)), ([1, 0, 0], (0, True))]
)
def test_turns_are_cut_at_the_first_stop(stop, expected):
    length, stopped = cut_turn(jnp.zeros(3, jnp.int32), jnp.asarray(stop, bool))
    assert (int(length), bool(stopped)) == expected


def test_split_keeps_the_law_and_is_deterministic():
    def draw(key):
        return jax.random.randint(key, (2,), 0, 50)

    def draws(split):
        keys = jax.random.split(jax.random.key(0), 5000)
        return np.asarray(jax.jit(jax.vmap(lambda key: draw_from_split(key, draw, is_held_out, split)))(keys))

    train, held_out = draws("train"), draws("held_out")
    assert not {tuple(sorted(x)) for x in train} & {tuple(sorted(x)) for x in held_out}
    for values in (train, held_out):
        assert abs(values.mean() - 24.5) < 1.5  # the law is left alone but for the split
    np.testing.assert_array_equal(train, draws("train"))


def test_hash_is_fixed_for_ever():
    # Data sets that were held out must stay so: a change of the hash would leak them into training.
    out = np.flatnonzero(np.asarray(is_held_out(jnp.arange(60)[:, None])))
    np.testing.assert_array_equal(out, [11, 13, 21, 25, 27, 28, 35, 38, 45, 47, 49, 51, 52, 53, 54, 55, 56, 57])
