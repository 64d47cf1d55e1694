"""Names whose hidden cluster decides two facts about them: what is learned of one name helps with its like.

The bench of RetroAgent (arXiv 2603.08561) at the size of a table: each name has a first fact (where it is, which word
finds it) and a second (which appliance it needs, which filter narrows it), and a lesson states or denies one of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_NAMES, NUM_CLUSTERS = 64, 8
# The vocabulary has room for the hardest level, so that one program serves all of them.
MAX_FIRST, MAX_SECOND = 16, 8
LEVELS = {"easy": (8, 4), "medium": (12, 5), "hard": (16, 8)}
# Lesson codes: 0 says nothing, then one code for each statement.
NO_LESSON = 0
IS_FIRST = 1  # IS_FIRST + x: the first fact is x
NOT_FIRST = IS_FIRST + MAX_FIRST
IS_SECOND = NOT_FIRST + MAX_FIRST
NOT_SECOND = IS_SECOND + MAX_SECOND
NUM_LESSONS = NOT_SECOND + MAX_SECOND
# Of the parts of a unit task embedding: its cluster counts 1, these are the shares of its name and of itself.
NAME_NOISE, TASK_NOISE = 0.5, 0.3


class HiddenFacts(NamedTuple):
    """The truth about 64 names.

    Attributes:
      cluster: int32 `[64]`, eight names to each of 8 clusters.
      first: int32 `[64]`, below `num_first`.
      second: int32 `[64]`, below `num_second`.
      num_first, num_second: int32 `[]`, the size of the level.
    """

    cluster: jax.Array
    first: jax.Array
    second: jax.Array
    num_first: jax.Array
    num_second: jax.Array


def draw_facts(
    key: jax.Array, num_first: int | jax.Array, num_second: int | jax.Array, deviation: float | jax.Array = 0.15
) -> HiddenFacts:
    """A new truth: uniform facts for each cluster, and for each name that deviates facts of its own.

    Args:
      num_first: 2 to 16; may be traced.
      num_second: 2 to 8; may be traced.
      deviation: probability that a name has facts of its own (which may equal the cluster's); may be traced.

    Raises:
      ValueError: concrete numbers out of range.
    """
    check_level(num_first, num_second)
    check_share("deviation", deviation)
    member_key, deviate_key, cluster_key, name_key = jax.random.split(key, 4)
    cluster = jax.random.permutation(member_key, jnp.arange(NUM_NAMES, dtype=jnp.int32) % NUM_CLUSTERS)
    deviates = jax.random.bernoulli(deviate_key, deviation, (NUM_NAMES,))

    def fact(kind, most):
        of_cluster = jax.random.randint(jax.random.fold_in(cluster_key, kind), (NUM_CLUSTERS,), 0, most, jnp.int32)
        of_name = jax.random.randint(jax.random.fold_in(name_key, kind), (NUM_NAMES,), 0, most, jnp.int32)
        return jnp.where(deviates, of_name, of_cluster[cluster])

    return HiddenFacts(
        cluster, fact(0, num_first), fact(1, num_second), *(jnp.int32(x) for x in (num_first, num_second))
    )


def draw_lesson(
    key: jax.Array,
    num_first: int | jax.Array,
    num_second: int | jax.Array,
    *,
    silent: float | jax.Array = 0.5,
    denied: float | jax.Array = 0.5,
) -> jax.Array:
    """Random statements, true or not, int32 `[2]`: one about the first fact and one about the second.

    Args:
      num_first, num_second: the level; may be traced.
      silent: probability, for each slot by itself, of no statement; may be traced.
      denied: probability that a statement is a denial; may be traced.
    """
    silent_key, denied_key, first_key, second_key = jax.random.split(key, 4)
    says = jnp.stack(
        [
            jax.random.randint(first_key, (), 0, num_first, jnp.int32),
            jax.random.randint(second_key, (), 0, num_second, jnp.int32),
        ]
    )
    denies = jax.random.bernoulli(denied_key, denied, (2,))
    base = jnp.where(denies, jnp.asarray([NOT_FIRST, NOT_SECOND]), jnp.asarray([IS_FIRST, IS_SECOND]))
    return jnp.where(jax.random.bernoulli(silent_key, silent, (2,)), NO_LESSON, base + says).astype(jnp.int32)


def follow(key: jax.Array, lesson: jax.Array, is_base: int, possible: jax.Array, obeys: float | jax.Array) -> jax.Array:
    """A choice of one who knows nothing but the lesson, int32 `[]` below n.

    With probability `obeys` a stated fact is taken and a denied one avoided; else, and without a lesson of this kind,
    the choice is uniform. Statements go before denials, and the first slot before the second.

    Args:
      lesson: codes int32 `[2]`.
      is_base: the codes of the kind begin there: n statements, then n denials.
      possible: bool `[n]`, the choices that there are, at least one.
      obeys: may be traced.
    """
    obey_key, choice_key = jax.random.split(key)
    most = possible.shape[0]
    states = (lesson >= is_base) & (lesson < is_base + most)
    stated = (lesson - is_base)[jnp.argmax(states)]
    denied = jnp.any(jnp.arange(most)[:, None] == lesson - is_base - most, axis=-1)
    obedient = jax.random.bernoulli(obey_key, obeys)
    allowed = possible & ~(denied & obedient)
    # Denials may leave no choice at all: then they say nothing.
    allowed = jnp.where(allowed.any(), allowed, possible)
    free = jax.random.categorical(choice_key, jnp.where(allowed, 0.0, -jnp.inf))
    return jnp.where(obedient & states.any(), stated, free).astype(jnp.int32)


def task_embeddings(key: jax.Array, facts: HiddenFacts, name: jax.Array, dim: int = 16) -> jax.Array:
    """Unit vectors in which tasks of a cluster are near: its vector, 0.5 of the name's, 0.3 of the task's, float32.

    Stands for a sentence encoder: names of one cluster have cosines of about 0.75, others about 0.

    Args:
      name: int32 `[P]`, the name of each task.
      dim: D.

    Returns:
      `[P, D]`.
    """
    cluster_key, name_key, task_key = jax.random.split(key, 3)

    def unit(key, number):
        x = jax.random.normal(key, (number, dim))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    vectors = unit(cluster_key, NUM_CLUSTERS)[facts.cluster[name]]
    vectors += NAME_NOISE * unit(name_key, NUM_NAMES)[name] + TASK_NOISE * unit(task_key, name.shape[0])
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def check_level(
    num_first: int | jax.Array, num_second: int | jax.Array, names: tuple[str, str] = ("num_first", "num_second")
) -> None:
    """Raises ValueError, with the arguments' names, unless concrete numbers are 2 to 16 and 2 to 8."""
    for name, value, most in zip(names, (num_first, num_second), (MAX_FIRST, MAX_SECOND), strict=True):
        if not isinstance(value, jax.core.Tracer) and not np.all(
            (np.asarray(value) >= 2) & (np.asarray(value) <= most)
        ):
            raise ValueError(f"{name} must be 2 to {most}, got {value}")


def check_share(name: str, value: float | jax.Array) -> None:
    """Raises ValueError unless a concrete probability is in [0, 1]."""
    if not isinstance(value, jax.core.Tracer) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def shown_lesson(lesson: jax.Array | None) -> jax.Array:
    """The two codes that an observation shows, int32 `[2]`, none for None; ValueError for another shape."""
    if lesson is None:
        return jnp.full(2, NO_LESSON, jnp.int32)
    if jnp.shape(lesson) != (2,):
        raise ValueError(f"lesson must have the shape (2,), got {jnp.shape(lesson)}")
    return jnp.asarray(lesson, jnp.int32)


def check_task(task_id: int | jax.Array, num_tasks: int, world: object) -> None:
    """Raises ValueError where there is no fixed world to take a task from, or a concrete number is not a task's."""
    if world is None:
        raise ValueError(f"task_id must be None without a fixed world, got {task_id}")
    if not isinstance(task_id, jax.core.Tracer) and not np.all(
        (np.asarray(task_id) >= 0) & (np.asarray(task_id) < num_tasks)
    ):
        raise ValueError(f"task_id must be 0 to {num_tasks - 1}, got {task_id}")
