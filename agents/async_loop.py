"""Serving, judging and training side by side: OpenClaw-RL's asynchronous loops as a simulation (arXiv 2603.10165).

A deployed policy answers its users tick by tick; a judge reads what came back, a trainer takes batches of judged turns
and hands new weights to the server. What runs in four processes there is one deterministic scan here, and a sweep may
trace the delays. Alphabet: `S` slots (users at a time), `B` turns of a batch, `N` ticks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PUSH = ("after_next_batch", "immediate")
LATE = ("keep", "drop", "wait")
STALENESS_BINS = 16


class Service(NamedTuple):
    """S users and the policy that answers them, as functions of rows.

    Attributes:
      reset: `reset(keys [S]) -> sessions [S, ...]`.
      turn: `turn(keys [S], params, sessions) -> (sessions, turns [S, ...], info [S, ...])`: one response to each user
        and the user's next state. `turns` goes to the judge, `info` into the trace.
    """

    reset: Callable[[jax.Array], Any]
    turn: Callable[[jax.Array, Any, Any], tuple[Any, Any, Any]]


class Turn(NamedTuple):
    """What a `session_service` hands to the judge, `[S, ...]`.

    Attributes:
      observation, action: what the policy read, and what it answered.
      extras: what `act` kept, log-probs for example.
      step: the environment's `Step`; its info is the next state that a judge reads.
    """

    observation: Any
    action: Any
    extras: Any
    step: Any


class Session(NamedTuple):
    """A slot of a `session_service`: the environment's state, what the policy reads next, and whether it is over."""

    state: Any
    observation: Any
    over: jax.Array


def session_service(env, act: Callable[[jax.Array, Any, Any], tuple[Any, Any]]) -> Service:
    """Users of an environment whose every observation can be answered by itself; a new session follows on each end.

    Args:
      env: `reset(key) -> (state, observation)` and `step(key, state, action) -> (state, Step)` (`rollax.envs`).
      act: `act(keys [S], params, observations [S, ...]) -> (actions [S, ...], extras [S, ...])`.

    Returns:
      The service. Its turns are `Turn`, its info is the environment's.
    """

    def reset(keys):
        state, observation = jax.vmap(env.reset)(keys)
        return Session(state, observation, jnp.zeros(keys.shape, bool))

    def turn(keys, params, sessions):
        reset_keys, act_keys, step_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        state, observation, _ = _where(sessions.over, reset(reset_keys), sessions)
        action, extras = act(act_keys, params, observation)
        state, step = jax.vmap(env.step)(step_keys, state, action)
        sessions = Session(state, step.observation, step.terminated | step.truncated)
        return sessions, Turn(observation, action, extras, step), step.info

    return Service(reset, turn)


class AsyncState(NamedTuple):
    """All that the loops hold between two ticks. Alphabet: `C` places of the queue, a ring.

    Attributes:
      serve_params, train_params: of the server and of the trainer.
      version: int32 `[]`, updates that the server's weights have seen.
      updates: int32 `[]`, those that the trainer's have.
      busy: int32 `[]`, ticks until the running update is done.
      unpushed: bool `[]`, the trainer has weights that the server has not.
      sessions: `[S, ...]`.
      samples, sampled_at, ready: `[C, ...]`, int32 `[C]` twice: what the judge made of a turn, the version that
        answered it, the tick at which the judge is done.
      head, tail: int32 `[]`, turns ever taken from the queue, and ever put into it.
    """

    serve_params: Any
    train_params: Any
    version: jax.Array
    updates: jax.Array
    busy: jax.Array
    unpushed: jax.Array
    sessions: Any
    samples: Any
    sampled_at: jax.Array
    ready: jax.Array
    head: jax.Array
    tail: jax.Array


class Trace(NamedTuple):
    """What happened, tick by tick.

    Attributes:
      served: int32 `[N]`, turns answered.
      active: bool `[N, S]`, which slots they were of.
      paused: bool `[N]`, the collection was closed to at least one slot.
      version: int32 `[N]`, of the weights that served.
      waiting: int32 `[N]`, judged turns in the queue at the end of the tick.
      judging: int32 `[N]`, turns before the judge then.
      dropped: int32 `[N]`, turns thrown away.
      updated: bool `[N]`, a batch was taken.
      staleness: int32 `[N, B]`, of the turns of the batch: updates that the trainer's weights had seen at its start
        and the weights that answered had not; -1 where there was no batch.
      info: `[N, S, ...]` of the service; means nothing where not active.
      metrics: `[N, ...]` of the updates; 0 where there was none.
      staleness_counts: int32 `[16]`, turns trained on by staleness; the last counts all from 15 on.
      paused_share: float32 `[]`, slots that were not served, of all.
    """

    served: jax.Array
    active: jax.Array
    paused: jax.Array
    version: jax.Array
    waiting: jax.Array
    judging: jax.Array
    dropped: jax.Array
    updated: jax.Array
    staleness: jax.Array
    info: Any
    metrics: Any
    staleness_counts: jax.Array
    paused_share: jax.Array


def simulate(
    key: jax.Array,
    params: Any,
    env: Service,
    judge: Callable[[jax.Array, Any], tuple[Any, jax.Array]],
    update_fn: Callable[[Any, Any], tuple[Any, Any]],
    *,
    slots: int,
    ticks: int,
    batch: int,
    judge_delay: int | jax.Array,
    train_delay: int | jax.Array,
    push: str = "after_next_batch",
    late: str = "keep",
    max_judge_delay: int | None = None,
) -> tuple[Any, Trace]:
    """Runs the loops for a number of ticks. In a tick:

    1. Each slot is answered by the server's weights, unless the collection is closed: B judged turns wait.
    2. Turns that were answered `judge_delay` ticks ago join the queue.
    3. Weights of a finished update are pushed to the server: at once, or ("after_next_batch", the released code)
       when the next collection is full, so that no collection sees two versions.
    4. An idle trainer with nothing to push takes the oldest B turns. Its update is done `train_delay` ticks later, and
       the collection is open again.

    A judge that takes time must cost something, and `late` says what. With "keep" (the released code) turns still
    before the judge when a collection closes go to the next ones, each a version older. "drop" throws them away, and
    anything else left over. "wait" answers no more turns than the batch lacks, and users wait for the judge. With the
    last two every batch but the first is exactly one version stale under "after_next_batch"; with the first two users
    wait only for a trainer that needs more ticks than a collection.

    Under a `vmap` whose rows disagree about when to update, each row computes an update every tick.

    Args:
      key: folded with the tick and the slot.
      params: what the trainer trains, optimiser included if it has a state; the service reads the weights from it.
      env: the users and the policy, see `Service` and `session_service`.
      judge: `judge(keys [S], turns [S, ...]) -> (samples [S, ...], valid bool [S])`; turns that are not valid (a side
        request, no next state) are no samples. It sees nothing of the weights but what a turn holds.
      update_fn: `update_fn(params, samples [B, ...]) -> (params, metrics)`, the samples in the order of serving.
      slots, ticks, batch: S, N, B, static.
      judge_delay: in ticks, may be traced.
      train_delay: in ticks, may be traced.
      push: static, see above.
      late: static, see above.
      max_judge_delay: static bound of a traced `judge_delay`, which sizes the queue; None for `judge_delay` itself.

    Returns:
      (the trainer's params; `Trace`).

    Raises:
      ValueError: slots, ticks or batch below 1, a negative delay, a delay above `max_judge_delay`, a traced
        `judge_delay` without that bound, an unknown `push` or `late`.
    """
    for name, size in (("slots", slots), ("ticks", ticks), ("batch", batch)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    for name, choice, known in (("push", push, PUSH), ("late", late, LATE)):
        if choice not in known:
            raise ValueError(f"{name} must be one of {known}, got {choice!r}")
    max_judge_delay = _longest(judge_delay, max_judge_delay)
    _check_delay("train_delay", train_delay)
    judge_delay, train_delay = (jnp.asarray(x, jnp.int32) for x in (judge_delay, train_delay))
    # Slots are served while fewer than B turns are ready, so this is never full.
    capacity = batch - 1 + slots * (max_judge_delay + 1)
    row = jnp.arange(slots)

    def keys_of(tick, part):
        base = jax.random.fold_in(jax.random.fold_in(key, tick), part)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, row)

    def serve(state, tick):
        """The sessions that go on, which slots were answered, and what the judge will say of them."""
        sessions, turns, info = env.turn(keys_of(tick, 0), state.serve_params, state.sessions)
        samples, valid = judge(keys_of(tick, 1), turns)
        if late == "wait":
            active = row < batch - (state.tail - state.head)
        else:
            active = jnp.broadcast_to(_ready(state, tick - 1) < batch, row.shape)
        return _where(active, sessions, state.sessions), active, samples, active & valid, info

    def put(state, samples, valid, tick):
        """Valid turns at the end of the queue, in the order of the slots."""
        place = jnp.where(valid, (state.tail + jnp.cumsum(valid) - 1) % capacity, capacity)  # outside: dropped
        return state._replace(
            samples=jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), state.samples, samples),
            sampled_at=state.sampled_at.at[place].set(state.version, mode="drop"),
            ready=state.ready.at[place].set(tick + judge_delay, mode="drop"),
            tail=state.tail + valid.sum(dtype=jnp.int32),
        )

    def pushed(state, allowed):
        go = state.unpushed & (state.busy == 0) & allowed
        return state._replace(
            serve_params=_where(go, state.train_params, state.serve_params),
            version=jnp.where(go, state.updates, state.version),
            unpushed=state.unpushed & ~go,
        )

    def train(state):
        place = (state.head + jnp.arange(batch)) % capacity
        params, metrics = update_fn(state.train_params, jax.tree.map(lambda x: x[place], state.samples))
        return params, metrics, state.updates - state.sampled_at[place]

    def rest(state):
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(train, state)[1])
        return state.train_params, metrics, jnp.full(batch, -1, jnp.int32)

    def tick_of(state, tick):
        version = state.version
        sessions, active, samples, valid, info = serve(state, tick)
        state = put(state._replace(sessions=sessions, busy=jnp.maximum(state.busy - 1, 0)), samples, valid, tick)
        full = _ready(state, tick) >= batch
        state = pushed(state, True if push == "immediate" else full)
        take = full & ~state.unpushed
        params, metrics, staleness = jax.lax.cond(take, train, rest, state)
        left = jnp.where(take & (late == "drop"), state.tail - state.head - batch, 0)
        state = state._replace(
            train_params=params,
            updates=state.updates + take,
            busy=jnp.where(take, train_delay, state.busy),
            unpushed=state.unpushed | take,
            head=state.head + jnp.where(take, batch + left, 0),
        )
        if push == "immediate":
            state = pushed(state, True)  # an update that takes no time
        waiting = _ready(state, tick)
        return state, dict(
            served=active.sum(dtype=jnp.int32),
            active=active,
            paused=~active.all(),
            version=version,
            waiting=waiting,
            judging=state.tail - state.head - waiting,
            dropped=left,
            updated=take,
            staleness=staleness,
            info=info,
            metrics=metrics,
        )

    state = _start(params, env, judge, keys_of(0, 2), capacity)
    state, told = jax.lax.scan(tick_of, state, jnp.arange(ticks, dtype=jnp.int32))
    stale = told["staleness"].ravel()
    bins = jnp.where(stale < 0, STALENESS_BINS, jnp.minimum(stale, STALENESS_BINS - 1))
    counts = jnp.zeros(STALENESS_BINS, jnp.int32).at[bins].add(1, mode="drop")
    return state.train_params, Trace(
        **told, staleness_counts=counts, paused_share=jnp.mean(~told["active"], dtype=jnp.float32)
    )


def _start(params, env, judge, keys, capacity):
    sessions = env.reset(keys)

    def sample(keys, params, sessions):
        return judge(keys, env.turn(keys, params, sessions)[1])[0]

    samples = jax.eval_shape(sample, keys, params, sessions)
    zero = jnp.int32(0)
    return AsyncState(
        serve_params=jax.tree.map(jnp.asarray, params),
        train_params=jax.tree.map(jnp.asarray, params),
        version=zero,
        updates=zero,
        busy=zero,
        unpushed=jnp.zeros((), bool),
        sessions=sessions,
        samples=jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), samples),
        sampled_at=jnp.zeros(capacity, jnp.int32),
        ready=jnp.zeros(capacity, jnp.int32),
        head=zero,
        tail=zero,
    )


def _ready(state, tick):
    """int32 `[]`, turns in the queue that the judge has done by the end of a tick."""
    age = (jnp.arange(state.ready.size) - state.head) % state.ready.size
    return jnp.sum((age < state.tail - state.head) & (state.ready <= tick), dtype=jnp.int32)


def _where(condition, new, old):
    """Leaf by leaf; a condition `[S]` chooses rows."""

    def choose(a, b):
        return jnp.where(jnp.reshape(condition, condition.shape + (1,) * (jnp.ndim(a) - condition.ndim)), a, b)

    return jax.tree.map(choose, new, old)


def _known(delay):
    return None if isinstance(delay, jax.core.Tracer) else int(np.max(delay))


def _check_delay(name, delay):
    known = _known(delay)
    if known is not None and known < 0:
        raise ValueError(f"{name} must not be negative, got {known}")


def _longest(judge_delay, bound):
    """The static length that the queue must allow for."""
    _check_delay("judge_delay", judge_delay)
    known = _known(judge_delay)
    if bound is None:
        if known is None:
            raise ValueError("max_judge_delay must be given for a traced judge_delay, got None")
        return known
    if bound < 0:
        raise ValueError(f"max_judge_delay must not be negative, got {bound}")
    if known is not None and known > bound:
        raise ValueError(f"judge_delay must be at most max_judge_delay={bound}, got {known}")
    return bound
