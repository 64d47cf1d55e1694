"""Hidden facts: how often names agree, what a lesson does to a choice, and which tasks look alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import draw_facts, draw_lesson, task_embeddings
from rollax.envs.hidden_clusters import IS_FIRST, IS_SECOND, NO_LESSON, NOT_FIRST, NOT_SECOND, follow


def test_names_share_the_facts_of_their_cluster():
    facts = jax.jit(jax.vmap(lambda key: draw_facts(key, 16, 8)))(jax.random.split(jax.random.key(0), 200))
    facts = jax.tree.map(np.asarray, facts)
    np.testing.assert_array_equal([np.bincount(row, minlength=8) for row in facts.cluster], 8)

    def agreement(fact):
        """Share of pairs of names of one cluster that agree."""
        together = facts.cluster[:, :, None] == facts.cluster[:, None, :]
        together &= ~np.eye(64, dtype=bool)
        return (fact[:, :, None] == fact[:, None, :])[together].mean()

    # Both true to the cluster, or not and equal by chance: 0.85^2 + (1 - 0.85^2) / n.
    assert abs(agreement(facts.first) - (0.7225 + 0.2775 / 16)) < 0.02
    assert abs(agreement(facts.second) - (0.7225 + 0.2775 / 8)) < 0.02
    assert facts.first.min() == 0 and facts.first.max() == 15 and facts.second.max() == 7


def test_follow_obeys_three_times_in_four():
    @jax.jit
    @jax.vmap
    def choices(key, lesson):
        return jax.vmap(lambda key: follow(key, lesson, IS_FIRST, jnp.arange(16) < 12, 0.75))(
            jax.random.split(key, 4000)
        )

    lessons = [[IS_FIRST + 3, 0], [0, NOT_FIRST + 3], [0, 0], [IS_SECOND + 3, NOT_SECOND + 3]]
    chosen = np.asarray(choices(jax.random.split(jax.random.key(0), 4), jnp.asarray(lessons)))
    share = np.stack([np.bincount(row, minlength=12) / row.size for row in chosen])
    assert share.shape == (4, 12)
    assert abs(share[0, 3] - (0.75 + 0.25 / 12)) < 0.03
    assert abs(share[1, 3] - 0.25 / 12) < 0.01 and np.all(np.delete(share[1], 3) > 0.06)
    assert np.abs(share[2:] - 1 / 12).max() < 0.025  # the other kind's lessons say nothing about this one


def test_follow_with_everything_denied():
    lesson = jnp.asarray([NOT_SECOND, NOT_SECOND + 1])
    chosen = jax.vmap(lambda key: follow(key, lesson, IS_SECOND, jnp.arange(8) < 2, 1.0))(
        jax.random.split(jax.random.key(0), 64)
    )
    assert set(np.asarray(chosen).tolist()) == {0, 1}


def test_random_lessons():
    drawn = np.asarray(jax.vmap(lambda key: draw_lesson(key, 12, 5))(jax.random.split(jax.random.key(0), 4000)))
    place, appliance = drawn.T
    assert abs((drawn == NO_LESSON).mean() - 0.5) < 0.03
    said = set(place[place != NO_LESSON].tolist())
    assert said == {*range(IS_FIRST, IS_FIRST + 12), *range(NOT_FIRST, NOT_FIRST + 12)}
    said = set(appliance[appliance != NO_LESSON].tolist())
    assert said == {*range(IS_SECOND, IS_SECOND + 5), *range(NOT_SECOND, NOT_SECOND + 5)}


def test_embeddings_are_near_within_a_cluster():
    facts, name = draw_facts(jax.random.key(7), 12, 5), jnp.arange(256) % 64
    vectors = np.asarray(task_embeddings(jax.random.key(0), facts, name))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
    cosine, name = vectors @ vectors.T, np.asarray(name)
    cluster = np.asarray(facts.cluster)[name]
    other = ~np.eye(256, dtype=bool)
    same_name = (name[:, None] == name) & other
    same_cluster = (cluster[:, None] == cluster) & (name[:, None] != name)
    assert abs(cosine[same_name].mean() - 1.25 / 1.34) < 0.03  # parts of squared lengths 1, 0.25 and 0.09
    assert abs(cosine[same_cluster].mean() - 1 / 1.34) < 0.06
    assert (cosine[same_cluster] > 0.4).mean() > 0.95
    assert (cosine[cluster[:, None] != cluster] > 0.4).mean() < 0.2


def test_a_traced_level_draws_the_same_world():
    traced = jax.jit(draw_facts)(jax.random.key(0), 12, 5)
    for a, b in zip(traced, draw_facts(jax.random.key(0), 12, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    true_to_cluster = draw_facts(jax.random.key(0), 12, 5, 0.0)
    for cluster in range(8):
        assert len(set(np.asarray(true_to_cluster.first)[np.asarray(true_to_cluster.cluster) == cluster].tolist())) == 1


def test_bad_arguments():
    for arguments, message in (
        ((1, 5), "num_first must be 2 to 16, got 1"),
        ((12, 9), "num_second must be 2 to 8, got 9"),
        ((12, 5, 1.5), r"deviation must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_facts(jax.random.key(0), *arguments)
