"""Sorting: the expert, wrong replies, and a split by the set of digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import decode, sorting
from rollax.envs.sorting import SortingState, held_out
from rollax.envs.tokens import STOP, ZERO


@pytest.fixture(scope="module")
def played():
    environment = sorting(6)

    def one(key):
        state, observation = environment.reset(key)
        action = environment.expert(key, state)
        return state, observation, action, environment.step(key, state, action)[1]

    return environment, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 500))


def test_expert_sorts(played):
    environment, (state, observation, action, step) = played
    assert np.all(np.asarray(step.reward) == 1) and np.all(np.asarray(step.terminated))
    assert set(step.info) == {"correct", "digit_share", "stopped"}
    np.testing.assert_array_equal(action[:, :6] - ZERO, np.sort(state.digits, axis=-1))
    for i in range(10):
        text = decode(observation.ids[i], observation.length[i], environment.spec.vocab)
        assert text == "".join(map(str, np.asarray(state.digits[i]))) + "="
        assert environment.render(jax.tree.map(lambda x, i=i: x[i], state)).startswith(text)


def test_wrong_replies(played):
    environment, _ = played
    step = jax.jit(environment.step)
    state = SortingState(jnp.asarray([3, 1, 4, 1, 5, 9]))

    def grade(digits):
        return step(jax.random.key(0), state, jnp.asarray([*(d + ZERO for d in digits), *[STOP] * (7 - len(digits))]))[
            1
        ]

    assert float(grade([1, 1, 3, 4, 5, 9]).reward) == 1
    for digits, right in [([3, 1, 4, 1, 5, 9], 3), ([1, 1, 3, 4, 5], 5), ([9, 5, 4, 3, 1, 1], 0), ([], 0)]:
        result = grade(digits)
        assert float(result.reward) == 0
        np.testing.assert_allclose(result.info["digit_share"], right / 6, rtol=1e-6)
    too_long = grade([1, 1, 3, 4, 5, 9, 9])
    assert float(too_long.reward) == 0 and float(too_long.info["stopped"]) == 0


def test_split_by_the_set_of_digits(played):
    side_of = jax.jit(jax.vmap(held_out))
    _, (state, *_) = played
    assert not np.any(side_of(state))
    state, _ = jax.jit(jax.vmap(sorting(6, split="held_out").reset))(jax.random.split(jax.random.key(1), 300))
    assert np.all(side_of(state))
    sets = np.asarray(list(itertools.combinations_with_replacement(range(10), 6)))
    out = np.asarray(side_of(SortingState(jnp.asarray(sets))))
    assert abs(out.mean() - 0.2) < 0.03
    shuffled = np.random.default_rng(0).permuted(sets, axis=1)
    np.testing.assert_array_equal(side_of(SortingState(jnp.asarray(shuffled))), out)
    # Even the smallest task has both sides.
    pairs = jnp.asarray(list(itertools.combinations_with_replacement(range(10), 2)))
    assert 0 < np.asarray(side_of(SortingState(pairs))).sum() < 55


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_digits"):
        sorting(1)
    with pytest.raises(ValueError, match="split"):
        sorting(split="test")
