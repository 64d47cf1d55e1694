"""Votes, masks and the longest hint: their rules, and golden arrays of OpenClaw-RL's code (arXiv 2603.10165)."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob
from rollax.tests.support import GOLDEN as FOLDER

GOLDEN = dict(np.load(FOLDER / "openclaw_rl.npz"))


@pytest.mark.parametrize("case", range(3))
def test_majority_of_the_released_code(case):
    votes = GOLDEN[f"vote{case}_votes_9_means_failed"]
    found = jax.jit(ob.majority_vote)(votes.astype(np.int8), votes != 9)
    np.testing.assert_array_equal(found, GOLDEN[f"vote{case}_reward"])


def test_longest_hint_of_the_released_code():
    score, length = GOLDEN["hint0_score_9_means_failed"], GOLDEN["hint0_length_chars"]
    found = jax.jit(ob.select_longest)(score.astype(np.int8), length, 10)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, GOLDEN["hint0_picked_or_minus1"])


def test_session_mask_of_the_released_code():
    arguments = (GOLDEN["session0_score"], GOLDEN["session0_has_next_state"], GOLDEN["session0_turns"])
    found = jax.jit(ob.session_mask)(*arguments)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, GOLDEN["session0_loss_mask"])


def test_step_scores_of_the_released_code():
    for case in range(2):
        votes, steps = GOLDEN[f"step{case}_votes"], GOLDEN[f"step{case}_num_steps"]
        with jax.enable_x64(True):
            made = np.arange(votes.shape[2]) < steps[..., None]
            found = ob.mean_vote(votes, made[..., None] & (votes != 0))
        np.testing.assert_allclose(found, GOLDEN[f"step{case}_prm_score"], rtol=0, atol=1e-12)


def test_majority_by_counting():
    """All 256 ways to cast four votes of +1, -1, 0 or unreadable."""
    votes = np.asarray(list(itertools.product([1, -1, 0, 9], repeat=4)), np.int8)
    expected = []
    for row in votes.tolist():
        (first, most), (_, second) = (collections.Counter(v for v in row if v != 9).most_common(2) + [(0, 0)] * 2)[:2]
        expected.append(first if most > second else 0)
    valid = votes != 9
    np.testing.assert_array_equal(ob.majority_vote(votes, valid), expected)
    # What an unreadable vote says, and the order of the votes, do not matter.
    np.testing.assert_array_equal(ob.majority_vote(np.where(valid, votes, 1)[:, ::-1], valid[:, ::-1]), expected)


def test_ties_and_silence_give_nothing():
    votes = jnp.asarray([[1, -1, 0], [1, -1, 9], [1, 0, 9], [0, -1, 9], [9, 9, 9], [1, 1, -1], [-1, 9, 9]], jnp.int8)
    valid = votes != 9
    assert ob.majority_vote(votes, valid).tolist() == [0, 0, 0, 0, 0, 1, -1]
    mean = ob.mean_vote(votes[jnp.asarray([1, 4, 5, 6])], valid[jnp.asarray([1, 4, 5, 6])])
    np.testing.assert_allclose(mean, [0, 0, 1 / 3, -1], atol=1e-7)
    assert mean.dtype == jnp.float32 and ob.majority_vote(votes, valid).dtype == jnp.float32


def test_session_mask_turn_by_turn():
    rng = np.random.default_rng(0)
    reward, has_next = rng.choice([-1.0, 0, 0, 1], (200, 6)), rng.random((200, 6)) < 0.7
    turns = rng.integers(0, 7, 200)
    expected = np.zeros((200, 6), bool)
    for s in range(200):
        for t in range(turns[s]):
            expected[s, t] = has_next[s, t] and (reward[s, t] != 0 or not expected[s, :t].any())
    mask = ob.session_mask(reward, has_next, turns)
    np.testing.assert_array_equal(mask, expected)
    assert np.any(np.asarray(mask) & (reward == 0))  # the rule acted
    one = jax.vmap(lambda *row: ob.session_mask(*(jnp.asarray(x)[None] for x in row))[0])(reward, has_next, turns)
    np.testing.assert_array_equal(one, expected)


def test_longest_takes_the_first_of_equals_and_the_bound_is_strict():
    score = jnp.asarray([[1, 1, 1], [1, 1, -1], [-1, -1, -1], [1, 1, 1], [9, 1, 1]], jnp.int8)
    length = jnp.asarray([[12, 20, 20], [11, 10, 50], [99, 99, 99], [10, 10, 10], [30, 11, 12]])
    assert ob.select_longest(score, length, 10).tolist() == [1, 0, -1, -1, 2]
    assert ob.select_longest(score, length, jnp.asarray(0)).tolist() == [1, 0, -1, 0, 2]


def test_bad_input():
    votes = jnp.zeros((2, 3), jnp.int8)
    for function in (ob.majority_vote, ob.mean_vote):
        with pytest.raises(ValueError, match=r"votes, valid must have one shape, got \[\(2, 3\), \(2, 2\)\]"):
            function(votes, jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"score, length must have one shape, got \[\(2, 3\), \(3,\)\]"):
        ob.select_longest(votes, jnp.zeros(3), 1)
    with pytest.raises(ValueError, match=r"reward, has_next must have one shape, got \[\(2, 3\), \(2, 2\)\]"):
        ob.session_mask(votes, jnp.ones((2, 2), bool), jnp.ones(2))
    with pytest.raises(ValueError, match=r"turns \[S\], got shapes \(2, 3\) and \(3,\)"):
        ob.session_mask(votes, votes > 0, jnp.ones(3))
