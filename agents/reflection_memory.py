"""RetroAgent's memory of lessons and its retrieval by similarity, utility and an upper confidence bound (SimUtil-UCB).

From arXiv 2603.08561, eq. 8-10 and section 2.5, and the released code. A lesson is a row of int codes (token ids of its
text, or rule codes); tasks are known by embeddings (`Memory`) or by number (`TableMemory`). Alphabet: `C` capacity,
`D` embedding, `W` codes of a lesson, `Q` queries, `K` tasks, `L` different lessons, `B` a batch.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

MODES = ("ucb", "greedy", "relevance")
SOURCES = ("both", "success", "failure")
Number = jax.Array | float
AnyMemory = TypeVar("AnyMemory", "Memory", "TableMemory")

FRESH_UTILITY = 0.5  # of a lesson nobody has used yet; a lesson that is written again moves towards it


class Memory(NamedTuple):
    """C places for lessons.

    Attributes:
      emb: embedding of the task that taught the lesson, any length, `[C, D]`.
      lesson: int32 `[C, W]`.
      utility: moving average of the outcomes under the lesson, in [0, 1], `[C]`.
      count: int32 `[C]`, 1 plus how often it was used or written again.
      success: bool `[C]`, outcome of the episode that taught it.
      used: bool `[C]`, whether the place holds a lesson.
      birth: int32 `[C]`, a larger number was written later; -1 where nothing ever was.
    """

    emb: jax.Array
    lesson: jax.Array
    utility: jax.Array
    count: jax.Array
    success: jax.Array
    used: jax.Array
    birth: jax.Array


class TableMemory(NamedTuple):
    """The memory of K known tasks and L possible lessons: every pair has its place, so nothing is searched for.

    Attributes: as in `Memory`, all `[K, L]`.
    """

    utility: jax.Array
    count: jax.Array
    success: jax.Array
    used: jax.Array
    birth: jax.Array


def _check_sizes(**sizes):
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def _check_shapes(**shapes):
    """Every name comes with (array, expected shape)."""
    for name, (x, expected) in shapes.items():
        if jnp.shape(x) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {jnp.shape(x)}")


def _check_range(name, x, low, high=np.inf):
    """Of a number that is known; a traced one is not looked at."""
    if isinstance(x, jax.core.Tracer):
        return
    if not np.all((np.asarray(x) >= low) & (np.asarray(x) <= high)):
        expected = f"at least {low}" if high == np.inf else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {x}")


def _records(shape):
    return {
        "utility": jnp.full(shape, FRESH_UTILITY),
        "count": jnp.zeros(shape, jnp.int32),
        "success": jnp.zeros(shape, bool),
        "used": jnp.zeros(shape, bool),
        "birth": jnp.full(shape, -1, jnp.int32),
    }


def init_memory(capacity: int, dim: int, lesson_width: int) -> Memory:
    """A memory without lessons.

    Args:
      capacity: C. The paper's memory has no bound; here the least useful lesson makes room.
      dim: D.
      lesson_width: W.

    Raises:
      ValueError: a size below 1.
    """
    _check_sizes(capacity=capacity, dim=dim, lesson_width=lesson_width)
    lesson = jnp.zeros((capacity, lesson_width), jnp.int32)
    return Memory(emb=jnp.zeros((capacity, dim)), lesson=lesson, **_records((capacity,)))


def init_table(tasks: int, lessons: int) -> TableMemory:
    """A table without lessons, `[tasks, lessons]`.

    Raises:
      ValueError: a size below 1.
    """
    _check_sizes(tasks=tasks, lessons=lessons)
    return TableMemory(**_records((tasks, lessons)))


# --- Retrieval -------------------------------------------------------------------------------------------------------


def cosine(query: jax.Array, emb: jax.Array) -> jax.Array:
    """Cosine of every query `[Q, D]` with every embedding `[C, D]`, `[Q, C]`; 0 where one of them is all zeros."""

    def unit(x):
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.where(length > 0, length, 1.0)

    return jnp.matmul(unit(query), unit(emb).T, precision="highest")  # a threshold and ties hang on it


def _check_rule(alpha, kappa, mode, source):
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {SOURCES}, got {source!r}")
    _check_range("alpha", alpha, 0, 1)
    _check_range("kappa", kappa, 0)


def _usefulness(mem, alpha, kappa, mode):
    """The part of a score that no query changes, in the shape of the memory; 0 by relevance alone."""
    if mode == "relevance":
        return jnp.zeros_like(mem.utility)
    utility = mem.utility
    if mode == "ucb":
        total = jnp.where(mem.used, mem.count, 0).sum()  # of the whole memory, whatever is relevant
        log_total = jnp.log(jnp.maximum(total, 1).astype(utility.dtype))
        utility = utility + kappa * jnp.sqrt(log_total / jnp.maximum(mem.count, 1))
    return (1 - alpha) * utility


def _open_to(mem, source):
    return mem.used & {"both": True, "success": mem.success, "failure": ~mem.success}[source]


def _scores(relevance, mem, alpha, kappa, threshold, mode, source):
    """`[Q, *shape of mem]`, the relevance broadcast over what follows its own axes."""
    _check_rule(alpha, kappa, mode, source)
    weight = 1.0 if mode == "relevance" else alpha
    score = weight * relevance + _usefulness(mem, alpha, kappa, mode)
    shown = _open_to(mem, source) & (relevance >= threshold)
    return jax.lax.stop_gradient(jnp.where(shown, score, -jnp.inf))


def simutil_scores(
    query: jax.Array,
    mem: Memory,
    *,
    alpha: Number = 0.7,
    kappa: Number = 1.0,
    threshold: Number = 0.4,
    mode: str = "ucb",
    source: str = "both",
) -> jax.Array:
    """How much each lesson is wanted for each query (arXiv 2603.08561, eq. 8-10).

    `alpha cos + (1 - alpha) (u + kappa sqrt(ln(sum_j n_j) / n))`, the sum over the whole memory. Configurations of one
    program need no other mode: "greedy" is kappa = 0, "relevance" is alpha = 1.

    Args:
      query: embedding of the tasks to be done, any length, `[Q, D]`.
      mem: `Memory`.
      alpha: weight of the relevance in [0, 1], may be traced. The released code runs with 0.6.
      kappa: of the bonus for lessons used little, not negative, may be traced.
      threshold: least cosine, may be traced.
      mode: static. "ucb": as above, for training. "greedy": without the bonus, for evaluation. "relevance": the cosine.
      source: static, lessons of which episodes: "both", "success" or "failure".

    Returns:
      `[Q, C]`, -inf for a place that is empty, too far or of the other source; gradients stopped.

    Raises:
      ValueError: alpha outside [0, 1], a negative kappa, an unknown mode or source, or shapes that do not fit.
    """
    query = jnp.asarray(query)
    if query.ndim != 2:
        raise ValueError(f"query: expected [Q, D], got {query.shape}")
    _check_shapes(query=(query, (query.shape[0], mem.emb.shape[1])))
    return _scores(cosine(query, mem.emb), mem, alpha, kappa, threshold, mode, source)


def table_scores(
    relevance: jax.Array,
    table: TableMemory,
    *,
    alpha: Number = 0.7,
    kappa: Number = 1.0,
    threshold: Number = 0.4,
    mode: str = "ucb",
    source: str = "both",
) -> jax.Array:
    """`simutil_scores` of a table: how much each (task, lesson) pair is wanted for each query.

    Args:
      relevance: cosine of the queries' tasks with all tasks, `[Q, K]`: rows of a matrix that is computed once.
      table: `TableMemory`.
      alpha, kappa, threshold, mode, source: as in `simutil_scores`.

    Returns:
      `[Q, K L]`, for `retrieve_sampled` and `retrieve`; the lesson of an index is `index % L`, its task `index // L`.

    Raises:
      ValueError: as in `simutil_scores`.
    """
    relevance = _table_relevance(relevance, table)
    scores = _scores(relevance[..., None], table, alpha, kappa, threshold, mode, source)
    return scores.reshape(relevance.shape[0], table.used.size)


def _table_relevance(relevance, table):
    relevance = jnp.asarray(relevance)
    if relevance.ndim != 2:
        raise ValueError(f"relevance: expected [Q, K], got {relevance.shape}")
    _check_shapes(relevance=(relevance, (relevance.shape[0], table.used.shape[0])))
    return relevance


def retrieve(scores: jax.Array, k: int, *, birth: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The k best lessons of each query, best first; of equal ones the oldest (the released code's stable sort).

    Same task, same utility, relevance 1: ties are common, and by relevance alone they decide everything. See
    `retrieve_sampled` for other ways to break them.

    Args:
      scores: `[Q, C]`, -inf for what may not be taken.
      k: static, at least 1; may exceed C. RetroAgent: 1 in training, 3 in evaluation.
      birth: int `[C]`, `mem.birth` (of a table, its `ravel()`), which orders ties by age. None orders them by place,
        which is the same until a place is used again.

    Returns:
      (index int32 `[Q, k]`, valid bool `[Q, k]`), index -1 where no lesson is left.

    Raises:
      ValueError: k below 1, scores that are not `[Q, C]`, or another shape of birth.
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected [Q, C], got {scores.shape}")
    _check_sizes(k=k)
    C = scores.shape[1]
    order = jnp.arange(C)
    if birth is not None:
        _check_shapes(birth=(birth, (C,)))
        order = jnp.argsort(birth)
        scores = scores[:, order]
    top, at = jax.lax.top_k(scores, min(k, C))  # stable: the lower index first
    valid = top > -jnp.inf
    index = jnp.where(valid, order[at], -1).astype(jnp.int32)
    missing = ((0, 0), (0, k - index.shape[1]))
    return jnp.pad(index, missing, constant_values=-1), jnp.pad(valid, missing)


def table_retrieve(
    relevance: jax.Array,
    table: TableMemory,
    k: int = 1,
    *,
    alpha: Number = 0.7,
    kappa: Number = 1.0,
    threshold: Number = 0.4,
    mode: str = "ucb",
    source: str = "both",
) -> tuple[jax.Array, jax.Array]:
    """`retrieve(table_scores(...), k, birth=table.birth.ravel())` in one pass over the table, whatever the queries.

    All lessons of a task are equally relevant to a query, so the best of each task are the same for all queries, and a
    query chooses among those. Nothing is sorted and no array has the axes of both the queries and the table.

    Args:
      relevance, table, alpha, kappa, threshold, mode, source: as in `table_scores`.
      k: static, in 1..L.

    Returns:
      As `retrieve`.

    Raises:
      ValueError: as in `simutil_scores`, or k outside 1..L.
    """
    relevance = _table_relevance(relevance, table)
    _check_rule(alpha, kappa, mode, source)
    K, L = table.used.shape
    if not 1 <= k <= L:
        raise ValueError(f"k: expected 1 to {L}, got {k}")
    value = jnp.where(_open_to(table, source), _usefulness(table, alpha, kappa, mode), -jnp.inf)
    value, lesson = _best(value, table.birth, k)
    birth = jnp.take_along_axis(table.birth, lesson, axis=1).ravel()
    place = (jnp.arange(K)[:, None] * L + lesson).ravel()
    relevance = relevance[..., None]
    score = jnp.where(relevance >= threshold, (1.0 if mode == "relevance" else alpha) * relevance + value, -jnp.inf)
    top, at = _best(score.reshape(score.shape[0], K * k), birth, k)
    valid = top > -jnp.inf
    return jnp.where(valid, place[at], -1).astype(jnp.int32), valid


def _best(score, birth, k):
    """The k largest along the last axis and their places, the oldest of equals first."""
    places = jnp.arange(score.shape[-1])
    top, at = [], []
    for _ in range(k):
        largest = score.max(axis=-1, keepdims=True)
        place = _first(score == largest, birth)[..., None]
        top.append(largest)
        at.append(place)
        score = jnp.where(places == place, -jnp.inf, score)
    return jnp.concatenate(top, axis=-1), jnp.concatenate(at, axis=-1)


def _first(among, birth):
    """Place of the smallest birth among those allowed, along the last axis."""
    return jnp.argmin(jnp.where(among, birth, jnp.iinfo(birth.dtype).max), axis=-1)


def retrieve_sampled(
    key: jax.Array, scores: jax.Array, k: int, *, temperature: Number = 1.0
) -> tuple[jax.Array, jax.Array]:
    """k lessons of each query drawn without replacement, with probabilities softmax(scores / temperature).

    A temperature near 0 takes the best and breaks ties at random.

    Args:
      key: typed key.
      scores, k: as in `retrieve`.
      temperature: above 0, may be traced.

    Returns:
      As `retrieve`.

    Raises:
      ValueError: as `retrieve`, or a temperature that is not positive.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    scores = jnp.asarray(scores)
    # Perturbing by Gumbel noise and taking the k largest is drawing one after the other.
    return retrieve(scores / temperature + jax.random.gumbel(key, scores.shape, scores.dtype), k)


def lesson_slots(group_size: int, share: Number = 0.5) -> jax.Array:
    """Which members of a group of rollouts get a lesson: the last `share` of them, bool `[group_size]`.

    All of them share one group of advantages.

    Args:
      group_size: static.
      share: in [0, 1], may be traced; 1/2 is the paper's half group, 0 none, 1 the full group.

    Raises:
      ValueError: a group size below 1, or a share outside [0, 1] or that cuts a rollout in two (half of an odd group).
    """
    _check_sizes(group_size=group_size)
    _check_range("share", share, 0, 1)
    if not isinstance(share, jax.core.Tracer) and abs(share * group_size - round(float(share * group_size))) > 1e-6:
        raise ValueError(f"group_size: expected one of which a share of {share} is whole, got {group_size}")
    return jnp.arange(group_size) >= jnp.round(group_size * (1 - share))


# --- What was used ---------------------------------------------------------------------------------------------------


def update_utility(
    mem: AnyMemory, index: jax.Array, outcome: jax.Array, valid: jax.Array, beta: Number = 0.05
) -> AnyMemory:
    """`u <- (1 - beta) u + beta outcome` and `n <- n + 1` for each use of a lesson, one use after the other.

    A lesson that half a group used moves N/2 times. Its B uses are folded into one sum (`B^2` numbers), so that nothing
    runs in sequence: `u (1 - beta)^k + beta sum_j (1 - beta)^(k - j) I_j`.

    Args:
      mem: `Memory` or `TableMemory`.
      index: int `[B]`, of `retrieve`, in the order of the rollouts.
      outcome: in [0, 1], whether the rollout succeeded, `[B]`.
      valid: bool `[B]`, which to take in; a negative index never is.
      beta: in [0, 1], may be traced.

    Returns:
      The memory with new utilities and counts.

    Raises:
      ValueError: different shapes, or a beta outside [0, 1].
    """
    index, dtype = jnp.asarray(index), mem.utility.dtype
    if index.ndim != 1:
        raise ValueError(f"index: expected [B], got {index.shape}")
    _check_shapes(outcome=(outcome, index.shape), valid=(valid, index.shape))
    _check_range("beta", beta, 0, 1)
    utility, count = mem.utility.ravel(), mem.count.ravel()
    valid = jnp.asarray(valid, bool) & (index >= 0) & (index < utility.size)
    same = (index[:, None] == index) & valid
    later = jnp.triu(same, 1).sum(axis=1)  # uses of the same lesson that come after this one
    keep = jnp.asarray(1 - beta, dtype)
    weight = jnp.where(valid, jnp.asarray(beta, dtype) * jnp.power(keep, later), 0.0)
    at = jnp.where(valid, index, utility.size)  # out of range: dropped
    uses = jnp.zeros_like(count).at[at].add(1, mode="drop")
    utility = utility * jnp.power(keep, uses)
    utility = utility.at[at].add(weight * jnp.asarray(outcome, dtype), mode="drop")
    shape = mem.utility.shape
    return mem._replace(utility=jax.lax.stop_gradient(utility.reshape(shape)), count=(count + uses).reshape(shape))


# --- What was learned ------------------------------------------------------------------------------------------------


def add_lessons(
    mem: Memory,
    emb: jax.Array,
    lesson: jax.Array,
    success: jax.Array,
    valid: jax.Array,
    merge_cos: Number = 0.85,
    beta: Number = 0.05,
) -> Memory:
    """Writes lessons one after the other.

    A lesson that is there already, code for code, from a task whose cosine is above `merge_cos`, is not written again:
    the oldest such entry counts one more and its utility moves towards 1/2. Any other takes the first empty place, or
    that of the lowest utility, the oldest of equals, with utility 1/2 and count 1.

    The paper stores a lesson only if the reflection predicted the outcome rightly: `valid = (c == I) & ...`.

    Args:
      mem: `Memory`.
      emb: of the tasks that taught the lessons, `[B, D]`.
      lesson: int `[B, W]`.
      success: bool `[B]`, outcome of the episodes that taught them.
      valid: bool `[B]`, which to write.
      merge_cos: may be traced; above 1 nothing merges.
      beta: step of a merged lesson's utility, in [0, 1], may be traced.

    Returns:
      The new `Memory`.

    Raises:
      ValueError: shapes that do not fit, or a beta outside [0, 1].
    """
    emb, lesson = jnp.asarray(emb, mem.emb.dtype), jnp.asarray(lesson, mem.lesson.dtype)
    B = emb.shape[0]
    _check_shapes(
        emb=(emb, (B, mem.emb.shape[1])),
        lesson=(lesson, (B, mem.lesson.shape[1])),
        success=(success, (B,)),
        valid=(valid, (B,)),
    )
    _check_range("beta", beta, 0, 1)

    def write(mem, entry):
        emb, lesson, success, valid = entry
        cos = cosine(emb[None], mem.emb)[0]
        match = mem.used & (mem.lesson == lesson).all(axis=1) & (cos > merge_cos)
        merges = match.any()
        oldest_match = _first(match, mem.birth)
        worst = jnp.where(mem.used, mem.utility, jnp.inf)
        replaced = _first(worst == worst.min(), mem.birth)
        place = jnp.where(mem.used.all(), replaced, jnp.argmin(mem.used))
        at = jnp.where(valid, jnp.where(merges, oldest_match, place), mem.used.size)  # out of range: dropped
        moved = (1 - beta) * mem.utility[oldest_match] + beta * FRESH_UTILITY
        fresh = {"emb": emb, "lesson": lesson, "success": success, "used": True, "birth": mem.birth.max() + 1}
        put = {name: jnp.where(merges, getattr(mem, name)[oldest_match], x) for name, x in fresh.items()}
        put["utility"] = jnp.where(merges, moved, FRESH_UTILITY)
        put["count"] = jnp.where(merges, mem.count[oldest_match] + 1, 1)
        return Memory(
            **{
                name: old.at[at].set(jnp.asarray(put[name], old.dtype), mode="drop")
                for name, old in mem._asdict().items()
            }
        ), None

    entries = (emb, lesson, jnp.asarray(success, bool), jnp.asarray(valid, bool))
    return jax.lax.scan(write, mem, jax.lax.stop_gradient(entries))[0]


def add_to_table(
    table: TableMemory,
    task: jax.Array,
    lesson: jax.Array,
    success: jax.Array,
    valid: jax.Array,
    beta: Number = 0.05,
) -> TableMemory:
    """`add_lessons` of a table, at once: a pair is the same when task and lesson are.

    Args:
      table: `TableMemory`.
      task: int `[B]` in 0..K-1.
      lesson: int `[B]` in 0..L-1.
      success, valid: bool `[B]`, as in `add_lessons`. What is out of range is not written.
      beta: as in `add_lessons`.

    Returns:
      The new `TableMemory`.

    Raises:
      ValueError: different shapes, or a beta outside [0, 1].
    """
    task, lesson = jnp.asarray(task), jnp.asarray(lesson)
    if task.ndim != 1:
        raise ValueError(f"task: expected [B], got {task.shape}")
    _check_shapes(lesson=(lesson, task.shape), success=(success, task.shape), valid=(valid, task.shape))
    _check_range("beta", beta, 0, 1)
    shape, size, B = table.used.shape, table.used.size, task.size
    utility, count, won, used, birth = (x.ravel() for x in table)
    inside = (task >= 0) & (task < shape[0]) & (lesson >= 0) & (lesson < shape[1])
    at = jnp.where(jnp.asarray(valid, bool) & inside, task * shape[1] + lesson, size)  # out of range: dropped
    first = jnp.full(size, B).at[at].min(jnp.arange(B), mode="drop")
    written, new = first < B, (first < B) & ~used
    times = jnp.zeros_like(count).at[at].add(1, mode="drop")
    pull = jnp.power(jnp.asarray(1 - beta, utility.dtype), times)
    utility = jnp.where(written, FRESH_UTILITY + (utility - FRESH_UTILITY) * pull, utility)
    by_first = jnp.asarray(success, bool)[jnp.minimum(first, B - 1)]
    fields = {
        "utility": jnp.where(new, FRESH_UTILITY, utility),
        "count": jnp.where(new, times, count + times),
        "success": jnp.where(new, by_first, won),
        "used": used | written,
        "birth": jnp.where(new, birth.max() + 1 + first, birth).astype(birth.dtype),
    }
    return TableMemory(**{name: jax.lax.stop_gradient(x.reshape(shape)) for name, x in fields.items()})


# --- Pruning ---------------------------------------------------------------------------------------------------------


def _ranks(used, utility, birth, same):
    """How many lessons of the same task come before each: a higher utility, or the same and older."""
    before = (utility[:, None] < utility) | ((utility[:, None] == utility) & (birth[:, None] > birth))
    return (before & same & used).sum(axis=1)


def _pruned(mem, rank, keep_per_task, decay):
    kept = mem.used & (rank < keep_per_task)
    return mem._replace(
        utility=jnp.where(kept, decay * mem.utility, FRESH_UTILITY),
        count=jnp.where(kept, 1, 0),
        used=kept,
    )


def prune(mem: AnyMemory, keep_per_task: int | jax.Array, decay: Number = 0.9) -> AnyMemory:
    """Keeps the most useful lessons of every task; the utility of what stays is scaled and its count starts again.

    The released code has the routine (with 3, at 25, 50 and 75 % of training) and does not call it.

    Args:
      mem: `Memory`, in which tasks are the same when their embeddings are equal, or `TableMemory`.
      keep_per_task: static or traced, at least 1; of equal utilities the oldest stay.
      decay: in [0, 1], may be traced.

    Returns:
      The memory, its lessons in the places they had.

    Raises:
      ValueError: keep_per_task below 1 or a decay outside [0, 1].
    """
    _check_range("keep_per_task", keep_per_task, 1)
    _check_range("decay", decay, 0, 1)
    if isinstance(mem, TableMemory):
        everywhere = jnp.ones((mem.used.shape[1],) * 2, bool)
        rank = jax.lax.map(lambda row: _ranks(*row, everywhere), (mem.used, mem.utility, mem.birth))
    else:
        same = jax.lax.map(lambda emb: (mem.emb == emb).all(axis=1), mem.emb)
        rank = _ranks(mem.used, mem.utility, mem.birth, same)
    return _pruned(mem, rank, keep_per_task, decay)
