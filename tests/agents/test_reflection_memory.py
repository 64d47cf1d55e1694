"""RetroAgent's memory: the released code's selections, the order of updates, ties, a full memory, the table's identity.

golden/retroagent.npz holds what the authors' memory made of random embeddings, in float64 (arXiv 2603.08561); the other
expected values are worked out here by hand or by a loop in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.reflection_memory import (
    MODES,
    Memory,
    TableMemory,
    add_lessons,
    add_to_table,
    cosine,
    init_memory,
    init_table,
    lesson_slots,
    prune,
    retrieve,
    retrieve_sampled,
    simutil_scores,
    table_retrieve,
    table_scores,
    update_utility,
)
from rollax.tests.support import GOLDEN as FOLDER
from rollax.tests.support import compiled

GOLDEN = dict(np.load(FOLDER / "retroagent.npz"))
scores_of = compiled(simutil_scores, static_argnames=("mode", "source"))
best_of = compiled(retrieve, static_argnames="k")
sample_of = compiled(retrieve_sampled, static_argnames="k")
best_of_table = compiled(table_retrieve, static_argnames="k")
update = compiled(update_utility)
add = compiled(add_lessons)
add_table = compiled(add_to_table)
pruned = compiled(prune)


def case(name):
    return {k.removeprefix(name): v for k, v in GOLDEN.items() if k.startswith(name)}


def full_memory(emb, utility, count, success=None, lesson=None, birth=None):
    """A memory in which every place holds a lesson."""
    C = len(utility)
    real = np.float64 if jax.config.jax_enable_x64 else np.float32
    return Memory(
        emb=np.asarray(emb, real),
        lesson=np.arange(C, dtype=np.int32)[:, None] if lesson is None else np.asarray(lesson, np.int32),
        utility=np.asarray(utility, real),
        count=np.asarray(count, np.int32),
        success=np.zeros(C, bool) if success is None else np.asarray(success, bool),
        used=np.ones(C, bool),
        birth=np.arange(C, dtype=np.int32) if birth is None else np.asarray(birth, np.int32),
    )


# --- The released code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_scores_and_selections_of_the_released_code(number):
    c = case(f"simutil{number}_")
    with jax.enable_x64(True):
        mem = full_memory(c["memory_emb"], c["utility"], c["count"], c["is_success"])
        np.testing.assert_allclose(cosine(c["query_emb"], mem.emb), c["relevance"], atol=1e-9)
        numbers = dict(alpha=c["alpha"], kappa=c["kappa"])
        only_utility = scores_of(c["query_emb"], mem, alpha=0.0, kappa=c["kappa"], threshold=-1.0)
        np.testing.assert_allclose(only_utility, np.tile(c["ucb_utility"], (len(only_utility), 1)), atol=1e-9)
        for mode in MODES:
            name = "relevance_only" if mode == "relevance" else mode
            for source in ("both", "success", "failure"):
                scores = scores_of(c["query_emb"], mem, mode=mode, source=source, **numbers)
                if source == "both":
                    np.testing.assert_allclose(scores, c[f"score_{name}"], atol=1e-9)
                index, valid = best_of(scores, int(c["topk"]))
                np.testing.assert_array_equal(index, c[f"selected_{name}_{source}"])
                np.testing.assert_array_equal(valid, index >= 0)


@pytest.mark.parametrize("number", range(2))
def test_utilities_of_the_released_code(number):
    """After every single update, and after the whole sequence at once."""
    c = case(f"ema{number}_")
    C = len(c["utility0"])
    with jax.enable_x64(True):
        start = mem = full_memory(np.eye(C), c["utility0"], c["count0"])
        one = np.ones(1, bool)
        for i, (entry, outcome) in enumerate(zip(c["entry"], c["outcome"], strict=True)):
            mem = update(mem, np.array([entry]), np.array([outcome]), one, c["beta"])
            np.testing.assert_allclose(mem.utility, c["utility_after"][i], atol=1e-9)
            np.testing.assert_array_equal(mem.count, c["count_after"][i])
        at_once = update(start, c["entry"], c["outcome"], np.ones(len(c["entry"]), bool), c["beta"])
        np.testing.assert_allclose(at_once.utility, c["utility_after"][-1], atol=1e-9)
        np.testing.assert_array_equal(at_once.count, c["count_after"][-1])


def test_writing_of_the_released_code():
    """One lesson at a time, and all at once: 30 lessons of four tasks, two of which are near each other."""
    c = case("add0_")
    with jax.enable_x64(True):
        np.testing.assert_allclose(cosine(c["task_emb"], c["task_emb"]), c["task_cos"], atol=1e-9)
        start = mem = init_memory(16, c["task_emb"].shape[1], 1)
        new = c["task_emb"][c["task"]], c["lesson"][:, None], c["is_success"], np.ones(30, bool)
        for i, size in enumerate(c["size_after"]):
            mem = add(mem, *(x[i : i + 1] for x in new), beta=c["beta"])
            assert mem.used.sum() == size
        at_once = add(start, *new, beta=c["beta"])
        jax.tree.map(np.testing.assert_array_equal, mem, at_once)
    size = int(c["size_after"][-1])
    for name in ("utility", "count", "success", "lesson"):
        golden = c["final_is_success" if name == "success" else f"final_{name}"]
        np.testing.assert_allclose(np.squeeze(getattr(mem, name)[:size]), golden, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(mem.emb[:size], c["task_emb"][c["final_task"]])
    np.testing.assert_array_equal(mem.birth[:size], np.arange(size))


# --- Retrieval ------------------------------------------------------------------------------------------------------


def test_an_empty_memory_returns_nothing():
    mem = init_memory(5, 3, 2)
    for mode in MODES:
        scores = scores_of(np.ones((2, 3)), mem, mode=mode)
        assert not np.isnan(scores).any() and (scores == -np.inf).all()
        index, valid = best_of(scores, 3)
        assert (index == -1).all() and not valid.any()
    index, valid = sample_of(jax.random.key(0), scores, 2)
    assert (index == -1).all() and not valid.any()
    table = init_table(4, 3)
    assert (compiled(table_scores)(np.ones((2, 4)), table) == -np.inf).all()
    index, valid = best_of_table(np.ones((2, 4)), table, 2)
    assert (index == -1).all() and not valid.any()


def test_one_lesson_has_no_bonus():
    """ln(1) = 0: the score is that of the greedy rule."""
    mem = add(init_memory(5, 3, 1), np.ones((1, 3)), np.ones((1, 1), int), np.ones(1, bool), np.ones(1, bool))
    score = scores_of(np.ones((1, 3)), mem)[0]
    np.testing.assert_allclose(score, [0.7 + 0.3 * 0.5] + [-np.inf] * 4, rtol=1e-6)


def test_fewer_than_k_lessons_survive():
    scores = np.array([[0.5, -np.inf, 0.9], [-np.inf] * 3])
    index, valid = best_of(scores, 5)
    np.testing.assert_array_equal(index, [[2, 0, -1, -1, -1], [-1] * 5])
    np.testing.assert_array_equal(valid, index >= 0)
    assert index.dtype == np.int32


def test_ties_go_to_the_oldest():
    scores = np.array([[1.0, 2.0, 1.0, 2.0, 2.0]])
    np.testing.assert_array_equal(best_of(scores, 5)[0], [[1, 3, 4, 0, 2]])
    birth = np.array([9, 8, 3, 7, 11])
    np.testing.assert_array_equal(best_of(scores, 5, birth=birth)[0], [[3, 1, 4, 2, 0]])
    # By similarity alone the first lesson of a task is used for ever, however bad.
    mem = full_memory(np.ones((3, 2)), [0.0, 1.0, 1.0], [99, 1, 1])
    assert best_of(scores_of(np.ones((1, 2)), mem, mode="relevance"), 1)[0] == 0
    assert best_of(scores_of(np.ones((1, 2)), mem, mode="greedy"), 1)[0] == 1


def test_modes_are_numbers_of_one_formula():
    """What lets every rule of a sweep share one program."""
    rng = np.random.default_rng(0)
    mem = full_memory(rng.normal(size=(12, 4)), rng.uniform(size=12), rng.integers(1, 20, 12))
    query = rng.normal(size=(5, 4))
    numbers = np.array([[0.7, 1.0], [0.7, 0.0], [1.0, 1.0]])
    together = jax.jit(jax.vmap(lambda x: simutil_scores(query, mem, alpha=x[0], kappa=x[1])))(numbers)
    for mode, scores in zip(MODES, together, strict=True):
        np.testing.assert_allclose(scores, scores_of(query, mem, mode=mode), rtol=1e-5)


def test_the_bonus_is_for_what_was_seldom_used():
    mem = full_memory(np.ones((3, 2)), [0.6, 0.5, 0.5], [50, 1, 10])
    ucb = scores_of(np.ones((1, 2)), mem)[0]
    assert ucb[1] > ucb[2] > ucb[0]
    np.testing.assert_allclose(
        ucb, 0.7 + 0.3 * (np.array([0.6, 0.5, 0.5]) + np.sqrt(np.log(61) / np.array([50, 1, 10]))), rtol=1e-6
    )
    greedy = scores_of(np.ones((1, 2)), mem, mode="greedy")[0]
    assert greedy[0] > greedy[1] == greedy[2]


def test_embeddings_may_have_any_length_or_none():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    between = compiled(cosine)
    np.testing.assert_allclose(between(a, b), between(10 * a, 0.1 * b), atol=1e-6)
    np.testing.assert_array_equal(between(np.zeros((1, 4)), b), np.zeros((1, 5)))


def test_sampling_follows_the_softmax():
    scores = np.tile([[1.0, 0.0, -np.inf, 0.5]], (20_000, 1))
    index, valid = sample_of(jax.random.key(0), scores, 2, temperature=0.5)
    assert valid.all() and (index != 2).all() and (index[:, 0] != index[:, 1]).all()
    p = np.exp(np.array([1, 0, -np.inf, 0.5]) / 0.5)
    p /= p.sum()
    first = np.bincount(index[:, 0], minlength=4) / len(index)
    np.testing.assert_allclose(first, p, atol=4 * np.sqrt(0.25 / len(index)))
    second = sum(p[i] * p / (1 - p[i]) * (np.arange(4) != i) for i in (0, 1, 3))  # one after the other
    np.testing.assert_allclose(np.bincount(index[:, 1], minlength=4) / len(index), second, atol=0.015)
    cold, _ = sample_of(jax.random.key(1), scores[:50], 3, temperature=1e-4)
    np.testing.assert_array_equal(cold, np.tile([0, 3, 1], (50, 1)))


def test_half_of_a_group_gets_a_lesson():
    np.testing.assert_array_equal(lesson_slots(8), [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(lesson_slots(3, 0.0), [0, 0, 0])
    np.testing.assert_array_equal(lesson_slots(3, 1.0), [1, 1, 1])
    shares = jax.vmap(lambda share: lesson_slots(4, share))(jnp.array([0.0, 0.25, 0.5, 1.0]))
    np.testing.assert_array_equal(shares.sum(axis=1), [0, 1, 2, 4])


# --- Utility --------------------------------------------------------------------------------------------------------


def test_half_a_group_moves_its_lesson_in_the_order_of_the_rollouts():
    """The closed form `u (1 - b)^k + b sum_j (1 - b)^(k - j) I_j`, and the count of 1 + N / 2 after one group."""
    mem = full_memory(np.eye(3), [0.5, 0.5, 0.5], [1, 1, 1])
    ones = np.ones(4, bool)
    late = update(mem, np.full(4, 1), np.array([0.0, 0.0, 1.0, 1.0]), ones, 0.1)
    early = update(mem, np.full(4, 1), np.array([1.0, 1.0, 0.0, 0.0]), ones, 0.1)
    closed = 0.5 * 0.9**4 + 0.1 * (0.9**1 + 0.9**0)
    assert float(late.utility[1]) == pytest.approx(closed, rel=1e-6) and late.utility[1] > early.utility[1]
    np.testing.assert_array_equal(late.count, [1, 5, 1])
    np.testing.assert_array_equal(np.asarray(late.utility)[[0, 2]], 0.5)


def test_updates_that_are_not_valid_change_nothing():
    mem = full_memory(np.eye(3), [0.3, 0.5, 0.7], [1, 2, 3])
    index, outcome = np.array([0, -1, 2, 3]), np.array([1.0, 1.0, 1.0, np.nan])
    after = update(mem, index, outcome, np.array([False, True, True, False]), 0.5)
    np.testing.assert_allclose(after.utility, [0.3, 0.5, 0.85], rtol=1e-6)
    np.testing.assert_array_equal(after.count, [1, 2, 4])
    whole = update(mem, np.array([0, 0]), np.array([0.2, 0.9]), np.ones(2, bool), 1.0)  # beta 1: the last outcome
    np.testing.assert_allclose(whole.utility, [0.9, 0.5, 0.7], rtol=1e-6)


# --- Writing --------------------------------------------------------------------------------------------------------


def written(capacity, emb, lesson, mem=None, **options):
    B = len(lesson)
    mem = init_memory(capacity, 2, 1) if mem is None else mem
    return add(mem, np.asarray(emb, float), np.asarray(lesson)[:, None], np.zeros(B, bool), np.ones(B, bool), **options)


def test_a_full_memory_gives_up_its_least_useful_lesson():
    mem = written(3, np.eye(2)[[0, 0, 0]], [1, 2, 3])
    mem = mem._replace(utility=np.float32([0.9, 0.2, 0.2]))
    mem = written(3, np.eye(2)[[1]], [4], mem)
    np.testing.assert_array_equal(mem.lesson[:, 0], [1, 4, 3])  # of equals the oldest
    np.testing.assert_allclose(mem.utility, [0.9, 0.5, 0.2])
    np.testing.assert_array_equal(mem.birth, [0, 3, 2])
    mem = written(3, np.eye(2)[[1, 1]], [5, 6], mem._replace(utility=np.float32([0.1, 0.5, 0.2])))
    np.testing.assert_array_equal(mem.lesson[:, 0], [5, 4, 6])
    # The place says nothing about age any more; birth does.
    tied = scores_of(
        np.array([[0.0, 1.0]]), mem._replace(utility=np.full(3, 0.5, np.float32)), threshold=-1.0, mode="relevance"
    )
    assert best_of(tied, 1, birth=mem.birth)[0] == 1


def test_lessons_merge_by_text_and_similar_task():
    near, far = [1.0, 0.1], [0.0, 1.0]
    mem = written(6, [[1, 0], near, far, [1, 0]], [7, 7, 7, 8])
    np.testing.assert_array_equal(mem.lesson[:, 0], [7, 7, 8, 0, 0, 0])
    np.testing.assert_array_equal(mem.count, [2, 1, 1, 0, 0, 0])
    apart = written(6, [[1, 0], near, far, [1, 0]], [7, 7, 7, 8], merge_cos=1.1)
    assert apart.used.sum() == 4
    # A lesson that is written again moves towards 1/2.
    again = written(6, [near], [7], mem._replace(utility=np.float32([1, *mem.utility[1:]])), beta=0.2)
    assert float(again.utility[0]) == pytest.approx(0.9) and again.count[0] == 3


def test_lessons_that_are_not_valid_are_not_written():
    mem = add(init_memory(4, 2, 1), np.ones((3, 2)), np.arange(3)[:, None], np.ones(3), np.array([0, 1, 0]))
    np.testing.assert_array_equal(mem.used, [1, 0, 0, 0])
    np.testing.assert_array_equal(mem.lesson[:, 0], [1, 0, 0, 0])
    nothing = add(init_memory(4, 2, 1), np.ones((3, 2)), np.arange(3)[:, None], np.ones(3), np.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, nothing, init_memory(4, 2, 1))


def test_pruning_keeps_the_best_of_every_task():
    emb = np.eye(2)[[0, 0, 0, 1, 1]]
    mem = full_memory(emb, [0.4, 0.9, 0.4, 0.1, 0.0], [5, 6, 7, 8, 9], birth=[3, 1, 0, 4, 2])
    kept = pruned(mem, 2)
    np.testing.assert_array_equal(kept.used, [0, 1, 1, 1, 1])  # of equals the oldest
    np.testing.assert_allclose(kept.utility[kept.used], 0.9 * np.array([0.9, 0.4, 0.1, 0.0]), rtol=1e-6)
    np.testing.assert_array_equal(kept.count, [0, 1, 1, 1, 1])
    counts = jax.jit(jax.vmap(lambda keep: prune(mem, keep).used.sum()))(np.array([1, 2, 3]))
    np.testing.assert_array_equal(counts, [2, 4, 5])
    assert written(5, np.eye(2)[[1]], [9], kept).used.all()  # into the place that was left


class ListMemory:
    """The same memory as a Python list, oldest first, of [task, lesson, utility, count, success]."""

    def __init__(self, capacity, task_cos):
        self.capacity, self.cos, self.entries = capacity, task_cos, []

    def write(self, task, lesson, success):
        for entry in self.entries:
            if entry[1] == lesson and self.cos[entry[0], task] > 0.85:
                entry[2], entry[3] = 0.95 * entry[2] + 0.05 * 0.5, entry[3] + 1
                return
        if len(self.entries) == self.capacity:
            self.entries.remove(min(self.entries, key=lambda entry: entry[2]))  # min takes the oldest of equals
        self.entries.append([task, lesson, 0.5, 1, success])

    def use(self, age, outcome):
        entry = self.entries[age]
        entry[2], entry[3] = 0.95 * entry[2] + 0.05 * outcome, entry[3] + 1

    def prune(self, keep):
        kept = []
        for task in {entry[0] for entry in self.entries}:
            own = [entry for entry in self.entries if entry[0] == task]
            kept += sorted(own, key=lambda entry: -entry[2])[:keep]
        self.entries = [[*entry[:2], 0.9 * entry[2], 1, entry[4]] for entry in self.entries if entry in kept]


def test_a_random_history_is_that_of_a_list():
    """Writing, use and pruning with seven places, two tasks near each other, and many a lesson that must give way."""
    rng = np.random.default_rng(0)
    task_emb = rng.normal(size=(5, 4))
    task_emb[1] = task_emb[0] + 0.05 * task_emb[1]
    evicted = merged = 0
    with jax.enable_x64(True):
        expected, mem = ListMemory(7, np.asarray(cosine(task_emb, task_emb))), init_memory(7, 4, 1)

        def by_age():
            places = [int(i) for i in np.argsort(mem.birth) if mem.used[i]]
            task = [int(np.argmin(np.abs(task_emb - np.asarray(mem.emb[i])).sum(axis=1))) for i in places]
            columns = (np.asarray(x)[places] for x in (mem.lesson[:, 0], mem.utility, mem.count, mem.success))
            return np.array(places), np.column_stack([task, *columns])

        for step in range(20):
            task, lesson = rng.integers(0, 5, 4), rng.integers(0, 6, 4)
            success, valid = rng.random(4) < 0.5, rng.random(4) < 0.8
            for i in np.flatnonzero(valid):
                newest, size = expected.entries[-1:], len(expected.entries)
                expected.write(task[i], lesson[i], success[i])
                merged += expected.entries[-1:] == newest
                evicted += expected.entries[-1:] != newest and size == 7
            mem = add(mem, task_emb[task], lesson[:, None], success, valid)
            if step == 12:
                expected.prune(2)
                mem = pruned(mem, 2)
            places, entries = by_age()
            np.testing.assert_allclose(entries, np.array(expected.entries, float), atol=1e-12)
            age, outcome = rng.integers(0, len(places), 3), rng.integers(0, 2, 3)
            for one in zip(age, outcome, strict=True):
                expected.use(*one)
            mem = update(mem, places[age], outcome, np.ones(3, bool))
    assert merged > 3 and evicted > 5


# --- The table ------------------------------------------------------------------------------------------------------


def random_table(seed, tasks=6, lessons=7, share=0.5):
    """Many equal utilities and counts, so that ties are common."""
    rng = np.random.default_rng(seed)
    shape = tasks, lessons
    return TableMemory(
        utility=np.float32(rng.integers(0, 3, shape) / 2),
        count=rng.integers(1, 3, shape).astype(np.int32),
        success=rng.random(shape) < 0.5,
        used=rng.random(shape) < share,
        birth=rng.permutation(tasks * lessons).reshape(shape).astype(np.int32),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["both", "failure"])
def test_one_pass_retrieves_what_all_scores_would(mode, source):
    relevance = np.random.default_rng(3).choice([0.2, 0.5, 0.9, 1.0], (8, 6))
    options = dict(mode=mode, source=source)
    scores_of_table, best = (
        compiled(functools.partial(f, **options)) for f in (table_scores, functools.partial(table_retrieve, k=3))
    )
    for seed in range(4):
        table = random_table(seed, share=(0.05, 0.3, 0.8, 1.0)[seed])
        scores = scores_of_table(relevance, table)
        index, valid = best_of(scores, 3, birth=table.birth.ravel())
        fast = best(relevance, table)
        np.testing.assert_array_equal(fast[0], index)
        np.testing.assert_array_equal(fast[1], valid)


def test_a_table_is_a_memory_whose_places_are_known():
    """The same events told to both: written, retrieved, judged, pruned."""
    tasks, lessons, B = 4, 5, 12
    rng = np.random.default_rng(5)
    emb = np.linalg.qr(rng.normal(size=(tasks, tasks)))[0].astype(np.float32)  # no two tasks are near
    mem, table = init_memory(tasks * lessons, tasks, 1), init_table(tasks, lessons)
    place = lambda mem, i: np.argmax(mem.emb[i] @ emb.T, -1) * lessons + mem.lesson[i, 0]  # noqa: E731
    for _ in range(4):
        task, lesson = rng.integers(0, tasks, B), rng.integers(0, lessons, B)
        won, valid = rng.random(B) < 0.5, rng.random(B) < 0.7
        mem = add(mem, emb[task], lesson[:, None], won, valid)
        table = add_table(table, task, lesson, won, valid)
        query = rng.integers(0, tasks, 6)
        slot, found = best_of(scores_of(emb[query], mem, threshold=-1.0), 2, birth=mem.birth)
        spot, same = best_of_table(emb[query] @ emb.T, table, 2, threshold=-1.0)
        np.testing.assert_array_equal(found, same)
        np.testing.assert_array_equal(place(mem, slot), spot)
        outcome = rng.random(12) < 0.5
        mem = update(mem, slot.ravel(), outcome, found.ravel(), 0.2)
        table = update(table, spot.ravel(), outcome, same.ravel(), 0.2)
    for name in ("utility", "count", "success"):
        there = np.asarray(getattr(table, name)).ravel()
        for i in np.flatnonzero(mem.used):
            assert float(there[place(mem, i)]) == pytest.approx(float(getattr(mem, name)[i]), abs=1e-5), name
    assert table.used.sum() == mem.used.sum()
    order = [int(place(mem, i)) for i in np.argsort(np.where(mem.used, mem.birth, 10**6))[: int(mem.used.sum())]]
    births = np.where(table.used, table.birth, 10**6).ravel()
    np.testing.assert_array_equal(np.argsort(births)[: len(order)], order)
    fewer, fewer_table = pruned(mem, 2), pruned(table, 2)
    assert sorted(int(place(mem, i)) for i in np.flatnonzero(fewer.used)) == list(np.flatnonzero(fewer_table.used))


def test_configurations_are_one_program():
    """Alpha, kappa and the threshold of several runs, each with a table of its own."""
    tables = jax.tree.map(lambda *x: np.stack(x), *(random_table(seed) for seed in range(3)))
    numbers = np.array([[0.7, 1.0, 0.4], [0.3, 0.0, 0.6], [1.0, 0.1, 0.0]])
    relevance = np.float32(np.random.default_rng(6).uniform(size=(4, 6)))

    def iteration(table, x):
        index, valid = table_retrieve(relevance, table, 2, alpha=x[0], kappa=x[1], threshold=x[2])
        table = update_utility(table, index.ravel(), jnp.ones(8), valid.ravel(), beta=x[0])
        return index, add_to_table(table, jnp.arange(4), jnp.arange(4), jnp.ones(4), jnp.ones(4), beta=x[1])

    together = jax.jit(jax.vmap(iteration))(tables, numbers)
    one = jax.jit(iteration)
    for i in range(3):
        alone = one(jax.tree.map(lambda x, i=i: x[i], tables), numbers[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, alone)


def test_memories_of_several_runs():
    rng = np.random.default_rng(7)
    emb, lesson = rng.normal(size=(3, 5, 2)), rng.integers(0, 2, (3, 5, 1))
    valid, start = np.ones(5, bool), init_memory(4, 2, 1)

    def run(emb, lesson):
        mem = add_lessons(start, emb, lesson, valid, valid)
        index, found = retrieve(simutil_scores(emb, mem), 1, birth=mem.birth)
        return update_utility(mem, index[:, 0], jnp.ones(5), found[:, 0])

    together, alone = compiled(jax.vmap(run))(emb, lesson), compiled(run)
    for i in range(3):
        expected = alone(emb[i], lesson[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), together, expected)


def test_nothing_carries_a_gradient():
    mem = full_memory(np.eye(2), [0.4, 0.6], [1, 2])
    ones = jnp.ones(2, bool)
    through = [
        lambda x: jnp.where((s := simutil_scores(x * jnp.eye(2), mem)) > -jnp.inf, s, 0.0).sum(),
        lambda x: update_utility(mem, jnp.arange(2), x * jnp.ones(2), ones).utility.sum(),
        lambda x: add_lessons(mem, x * jnp.eye(2), jnp.ones((2, 1), int), ones, ones).emb.sum(),
    ]
    for f in through:
        assert jax.jit(jax.grad(f))(1.0) == 0


# --- Bad input ------------------------------------------------------------------------------------------------------

MEM = init_memory(4, 3, 2)
TABLE = init_table(4, 3)
ONES = np.ones(2, bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: init_memory(0, 3, 2), "capacity: expected at least 1, got 0"),
        (lambda: init_table(4, 0), "lessons: expected at least 1, got 0"),
        (lambda: simutil_scores(np.ones((1, 3)), MEM, alpha=1.5), "alpha: expected 0 to 1, got 1.5"),
        (lambda: simutil_scores(np.ones((1, 3)), MEM, alpha=-0.1), "alpha: expected 0 to 1, got -0.1"),
        (lambda: simutil_scores(np.ones((1, 3)), MEM, kappa=-1.0), "kappa: expected at least 0, got -1.0"),
        (lambda: simutil_scores(np.ones((1, 3)), MEM, mode="ucb1"), r"mode: expected one of \('ucb', .* got 'ucb1'"),
        (lambda: simutil_scores(np.ones((1, 3)), MEM, source="won"), r"source: expected one of .* got 'won'"),
        (lambda: simutil_scores(np.ones((1, 4)), MEM), r"query: expected shape \(1, 3\), got \(1, 4\)"),
        (lambda: simutil_scores(np.ones(3), MEM), r"query: expected \[Q, D\], got \(3,\)"),
        (lambda: retrieve(np.ones((1, 4)), 0), "k: expected at least 1, got 0"),
        (lambda: retrieve(np.ones(4), 1), r"scores: expected \[Q, C\], got \(4,\)"),
        (lambda: retrieve(np.ones((1, 4)), 1, birth=np.ones(3)), r"birth: expected shape \(4,\), got \(3,\)"),
        (lambda: retrieve_sampled(jax.random.key(0), np.ones((1, 4)), 1, temperature=0.0), "temperature: .* got 0.0"),
        (lambda: lesson_slots(7), "group_size: expected .* got 7"),
        (lambda: lesson_slots(8, 1.5), "share: expected 0 to 1, got 1.5"),
        (
            lambda: update_utility(MEM, np.zeros(2, int), np.ones(3), ONES),
            r"outcome: expected shape \(2,\), got \(3,\)",
        ),
        (lambda: update_utility(MEM, np.zeros(2, int), ONES, ONES, beta=2.0), "beta: expected 0 to 1, got 2.0"),
        (lambda: update_utility(MEM, np.zeros((2, 1), int), ONES, ONES), r"index: expected \[B\], got \(2, 1\)"),
        (lambda: add_lessons(MEM, np.ones((2, 2)), np.ones((2, 2)), ONES, ONES), r"emb: expected shape \(2, 3\)"),
        (lambda: add_lessons(MEM, np.ones((2, 3)), np.ones((2, 1)), ONES, ONES), r"lesson: expected shape \(2, 2\)"),
        (lambda: prune(MEM, 0), "keep_per_task: expected at least 1, got 0"),
        (lambda: prune(MEM, 1, 1.1), "decay: expected 0 to 1, got 1.1"),
        (lambda: table_scores(np.ones((2, 3)), TABLE), r"relevance: expected shape \(2, 4\), got \(2, 3\)"),
        (lambda: table_retrieve(np.ones((2, 4)), TABLE, 4), "k: expected 1 to 3, got 4"),
        (lambda: table_retrieve(np.ones((2, 4)), TABLE, mode="max"), "mode: expected one of"),
        (
            lambda: add_to_table(TABLE, np.zeros(2, int), np.zeros(3, int), ONES, ONES),
            r"lesson: expected shape \(2,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
