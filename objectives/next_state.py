"""What the next state says of a turn: votes of a judge, who is trained on, which hint is taken (arXiv 2603.10165).

The evaluative half of OpenClaw-RL, with the details of its released code: a judge that sees a response and what it led
to votes +1, -1 or 0, m times. Alphabet: `B` turns, `m` votes, `M` hints of a turn, `S` sessions, `T` turns of one.
"""

import jax.numpy as jnp

from rollax.objectives.arrays import accurate, check_same_shape
from rollax.objectives.reduction import masked_mean


def majority_vote(votes, valid):
    """The most frequent of the votes +1, -1 and 0: the reward of a turn in the personal track.

    Args:
      votes: int `[B, m]`, each +1, -1 or 0.
      valid: bool `[B, m]`, the vote could be read.

    Returns:
      float `[B]`; 0 where two values share the first place, or where no vote is valid.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(votes=votes, valid=valid)
    votes, valid = jnp.asarray(votes), jnp.asarray(valid, bool)
    up, down, neutral = (jnp.sum(valid & (votes == value), axis=-1) for value in (1, -1, 0))
    wins = accurate(up > jnp.maximum(down, neutral))
    return wins - (down > jnp.maximum(up, neutral))


def mean_vote(votes, valid):
    """The mean of the valid votes: the step reward of the general track.

    Args:
      votes: `[..., m]`, +1 or -1 where valid.
      valid: bool `[..., m]`.

    Returns:
      float `[...]`, 0 where no vote is valid.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(votes=votes, valid=valid)
    return masked_mean(accurate(votes), jnp.asarray(valid, bool), axis=-1)


def session_mask(reward, has_next, turns):
    """Which turns are trained on: those with a next state and a reward, and at least one of a session.

    A turn whose reward is 0 is taken too while its session has given no other, in the order of the turns. Its advantage
    is 0, so that only a divergence to a reference sees it; the released code does it and so does this.

    Args:
      reward: `[S, T]`, of `majority_vote`.
      has_next: bool `[S, T]`, the user or a tool answered; the last turn of a session that ends in silence has none.
      turns: int `[S]`, turns that the session has.

    Returns:
      bool `[S, T]`.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_same_shape(reward=reward, has_next=has_next)
    if jnp.ndim(reward) != 2 or jnp.shape(turns) != jnp.shape(reward)[:1]:
        raise ValueError(f"reward must be [S, T] and turns [S], got shapes {jnp.shape(reward)} and {jnp.shape(turns)}")
    reward = jnp.asarray(reward)
    answered = jnp.asarray(has_next, bool) & (jnp.arange(reward.shape[1]) < jnp.asarray(turns)[:, None])
    # The first answered turn always trains, by its reward or by the rule; after it only rewards count.
    first = answered & (jnp.cumsum(answered, axis=1) == 1)
    return answered & ((reward != 0) | first)


def select_longest(score, length, min_length):
    """The hint that OpenClaw-RL's first version takes of a turn: the longest of the accepted, the first of equals.

    Args:
      score: int `[B, M]`, +1 where the judge found a useful hint.
      length: int `[B, M]`, in whatever unit `min_length` has: characters in the released code, else tokens.
      min_length: a hint must be longer than this, 10 characters there; may be traced.

    Returns:
      int32 `[B]`, its index, -1 where there is none.

    Raises:
      ValueError: different shapes.
    """
    check_same_shape(score=score, length=length)
    length = jnp.asarray(length)
    accepted = (jnp.asarray(score) == 1) & (length > min_length)
    longest = jnp.argmax(jnp.where(accepted, length, -1), axis=-1)
    return jnp.where(accepted.any(axis=-1), longest, -1).astype(jnp.int32)
