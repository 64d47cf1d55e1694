"""The asynchronous loops against plain lists, and what OpenClaw-RL says of delays and staleness (arXiv 2603.10165)."""

import functools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents import Service, session_service, simulate
from rollax.envs.persona_chat import (
    CONTEXT,
    EOS,
    FEEDBACK,
    REPLY,
    Reaction,
    base_reply,
    hints,
    judge,
    persona_chat,
)

# Weights that count their updates, so that a turn knows the version that answered it; sessions count their turns.
COUNTING = Service(
    reset=lambda keys: jnp.zeros(keys.shape, jnp.int32),
    turn=lambda keys, params, n: (n + 1, {"version": jnp.full(n.shape, params), "n": n}, {"n": n}),
)


def always(keys, turns):
    return turns, jnp.ones(keys.shape, bool)


def sometimes(keys, turns):
    return turns, jax.vmap(jax.random.bernoulli)(keys)


def count(params, samples):
    return params + 1, samples


@functools.partial(jax.jit, static_argnames=("slots", "ticks", "batch", "push", "late", "max_judge_delay", "says"))
def run(key, judge_delay, train_delay, *, says=always, max_judge_delay=8, **options):
    return simulate(
        key,
        jnp.int32(0),
        COUNTING,
        says,
        count,
        judge_delay=judge_delay,
        train_delay=train_delay,
        max_judge_delay=max_judge_delay,
        **options,
    )


def by_hand(valid, slots, ticks, batch, judge_delay, train_delay, push, late):
    """The rules of `simulate` with lists: what served, what was trained on."""
    queue, serving, trained, busy, unpushed = deque(), 0, 0, 0, False
    served, batches, sessions = [], [], [0] * slots
    for t in range(ticks):
        ready = [turn for turn in queue if turn["ready"] <= t - 1]
        room = batch - len(queue) if late == "wait" else slots if len(ready) < batch else 0
        active = min(slots, room)
        served.append((active, serving))
        for s in range(active):
            if valid[t][s]:
                queue.append({"ready": t + judge_delay, "version": serving, "n": sessions[s]})
            sessions[s] += 1
        busy = max(busy - 1, 0)

        full = sum(turn["ready"] <= t for turn in queue) >= batch
        if unpushed and busy == 0 and (push == "immediate" or full):
            serving, unpushed = trained, False
        if full and not unpushed:
            taken = [queue.popleft() for _ in range(batch)]
            batches.append((t, trained, taken))
            if late == "drop":
                queue.clear()
            trained, busy, unpushed = trained + 1, train_delay, True
        if push == "immediate" and unpushed and busy == 0:
            serving, unpushed = trained, False
    return served, batches, trained


UNEVEN = dict(slots=5, batch=4, ticks=60, says=sometimes)  # turns that are no samples, and some left over


@pytest.mark.parametrize(
    ("late", "push"),
    [
        ("keep", "after_next_batch"),
        ("drop", "after_next_batch"),
        ("wait", "after_next_batch"),
        ("keep", "immediate"),
        # A push and what becomes of late turns do not touch each other.
        pytest.param("drop", "immediate", marks=pytest.mark.slow),
        pytest.param("wait", "immediate", marks=pytest.mark.slow),
    ],
)
def test_against_plain_lists(late, push):
    slots, ticks, batch = UNEVEN["slots"], UNEVEN["ticks"], UNEVEN["batch"]
    key = jax.random.key(3)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def judged(t, s):  # the judge's keys: tick, part 1, slot
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, t), 1), s))

    valid = np.asarray(judged(jnp.arange(ticks), jnp.arange(slots)))
    assert 0.3 < valid.mean() < 0.7
    for judge_delay, train_delay in ((0, 0), (0, 4), (1, 1), (2, 0), (5, 3), (8, 9)):
        params, trace = run(key, judge_delay, train_delay, push=push, late=late, **UNEVEN)
        served, batches, trained = by_hand(valid, slots, ticks, batch, judge_delay, train_delay, push, late)
        assert int(params) == trained == len(batches)
        np.testing.assert_array_equal(np.stack([trace.served, trace.version], axis=1), served)
        np.testing.assert_array_equal(trace.active.sum(axis=1), trace.served)
        np.testing.assert_array_equal(trace.paused, trace.served < slots)
        np.testing.assert_array_equal(np.flatnonzero(trace.updated), [t for t, *_ in batches])
        assert np.all(trace.staleness[~trace.updated] == -1)
        for t, updates, taken in batches:
            np.testing.assert_array_equal(trace.metrics["version"][t], [turn["version"] for turn in taken])
            np.testing.assert_array_equal(trace.metrics["n"][t], [turn["n"] for turn in taken])
            np.testing.assert_array_equal(trace.staleness[t], [updates - turn["version"] for turn in taken])
        # No turn is lost: it was trained on, dropped, or is still on its way.
        came = np.cumsum((trace.active & valid).sum(axis=1))
        went = batch * np.cumsum(trace.updated) + np.cumsum(trace.dropped)
        np.testing.assert_array_equal(came, went + trace.waiting + trace.judging)
        assert late == "drop" or not trace.dropped.any()
        stale = np.asarray(trace.staleness)
        counts = np.bincount(np.minimum(stale[stale >= 0], 15), minlength=16)
        np.testing.assert_array_equal(trace.staleness_counts, counts)
        np.testing.assert_allclose(trace.paused_share, 1 - trace.served.sum() / (ticks * slots), atol=1e-6)


def staleness_after_the_first(trace):
    stale = np.asarray(trace.staleness)[np.asarray(trace.updated)]
    assert len(stale) > 3 and np.all(stale[0] == 0)
    return set(stale[1:].ravel().tolist())


SIZES = dict(slots=4, batch=8, ticks=80)  # a collection is two ticks long


@pytest.mark.parametrize("late", ["keep", "drop", "wait"])
def test_after_the_next_batch_everything_is_one_version_stale(late):
    for judge_delay in (0, 2, 8):
        for train_delay in (1, 4):
            _, trace = run(jax.random.key(0), judge_delay, train_delay, late=late, push="after_next_batch", **SIZES)
            found = staleness_after_the_first(trace)
            if late != "keep" or judge_delay == 0:
                assert found == {1}
            elif train_delay == 1:  # every collection that goes by before the judge makes a turn older by one
                assert max(found) == 1 + judge_delay // 2
                assert set(np.asarray(trace.staleness)[-5:].ravel().tolist()) - {-1} == {1 + judge_delay // 2}
            else:
                assert 1 < max(found) <= 1 + judge_delay // 2


def test_weights_never_change_within_a_collection():
    _, trace = run(jax.random.key(0), 2, 3, push="after_next_batch", late="keep", **SIZES)
    changes = np.flatnonzero(np.diff(np.asarray(trace.version))) + 1
    assert len(changes) > 10
    # New weights serve from the tick after a batch was taken, which is when a collection opens.
    assert np.all(np.asarray(trace.updated)[changes - 1])


def test_without_delays_an_immediate_push_is_on_policy():
    _, trace = run(jax.random.key(0), 0, 0, push="immediate", late="keep", **SIZES)
    assert np.all(trace.served == 4) and float(trace.paused_share) == 0
    assert trace.staleness_counts.tolist() == [320] + [0] * 15
    np.testing.assert_array_equal(trace.updated, np.arange(80) % 2 == 1)
    np.testing.assert_array_equal(trace.version, np.arange(80) // 2)


@pytest.mark.parametrize("push", ["after_next_batch", "immediate"])
@pytest.mark.parametrize("late", ["keep", "drop"])
def test_throughput_does_not_depend_on_delays_unless_paused(push, late):
    for judge_delay in (0, 2, 8):
        for train_delay in (0, 1, 2):
            _, trace = run(jax.random.key(0), judge_delay, train_delay, push=push, late=late, **SIZES)
            assert np.all(trace.served == 4) and not trace.paused.any()
        # A trainer slower than a collection (and its judge, where the late are dropped) makes users wait.
        _, trace = run(jax.random.key(0), judge_delay, 13, push=push, late=late, **SIZES)
        assert trace.paused.any() and np.all(trace.served[~trace.paused] == 4) and not trace.served[trace.paused].any()
        assert np.all(np.diff(np.flatnonzero(trace.updated)) >= 13)


def test_waiting_for_the_judge_costs_throughput_and_nothing_else():
    for judge_delay in (0, 2, 8):
        _, trace = run(jax.random.key(0), judge_delay, 1, push="immediate", late="wait", **SIZES)
        # Two ticks to answer eight turns, then the judge.
        np.testing.assert_array_equal(np.flatnonzero(trace.updated), np.arange(1 + judge_delay, 80, 2 + judge_delay))
        np.testing.assert_allclose(trace.paused_share, judge_delay / (2 + judge_delay), atol=1e-6)


def test_prefix_determinism_and_compilation():
    options = UNEVEN | dict(push="after_next_batch", late="keep")
    key = jax.random.key(1)
    params, trace = run(key, 2, 3, **options)
    again = run(key, 2, 3, **options)
    jax.tree.map(np.testing.assert_array_equal, (params, trace), again)
    _, other = run(jax.random.key(2), 2, 3, **options)
    assert not np.array_equal(trace.metrics["n"], other.metrics["n"])
    # Fewer ticks are the first ones of more, in a queue that has no room to spare, and without compilation.
    del options["says"]
    options["ticks"] = 24
    _, shorter = simulate(key, jnp.int32(0), COUNTING, sometimes, count, judge_delay=2, train_delay=3, **options)
    for name in ("served", "version", "staleness", "info", "metrics", "active", "waiting", "judging", "updated"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b[:24]), getattr(shorter, name), getattr(trace, name)
        )


def test_vmap_over_keys_and_delays_is_a_loop():
    options = UNEVEN | dict(push="after_next_batch", late="keep")
    keys = jax.random.split(jax.random.key(0), 4)
    judge_delay, train_delay = jnp.asarray([0, 2, 8, 3]), jnp.asarray([1, 4, 0, 7])
    batch = jax.vmap(functools.partial(run, **options))(keys, judge_delay, train_delay)
    for i in range(4):
        one = run(keys[i], judge_delay[i], train_delay[i], **options)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, one)
    assert len(set(batch[0].tolist())) > 1


# --- A policy that learns, and persona chat ---------------------------------------------------------------------------


def bandit(wanted):
    """Users who want one of four replies, and a policy of four logits."""

    def turn(keys, logits, sessions):
        action = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
        return sessions, {"action": action, "pleased": action == wanted}, {"pleased": action == wanted}

    return Service(lambda keys: jnp.zeros(keys.shape), turn)


def thanks(keys, turns):
    return {"action": turns["action"], "reward": jnp.where(turns["pleased"], 1.0, -1.0)}, jnp.ones(keys.shape, bool)


def reinforce(logits, samples):
    def loss(logits):
        return -jnp.mean(samples["reward"] * jax.nn.log_softmax(logits)[samples["action"]])

    value, grad = jax.value_and_grad(loss)(logits)
    return logits - grad, {"loss": value}


def test_a_policy_learns_while_it_serves():
    @functools.partial(jax.jit, static_argnames="push")
    def learn(judge_delay, train_delay, push):
        return simulate(
            jax.random.key(0),
            jnp.zeros(4),
            bandit(2),
            thanks,
            reinforce,
            slots=8,
            ticks=120,
            batch=16,
            judge_delay=judge_delay,
            train_delay=train_delay,
            push=push,
            max_judge_delay=8,
        )

    share = {}
    for push, judge_delay, train_delay in (("immediate", 0, 0), ("after_next_batch", 0, 1), ("after_next_batch", 8, 4)):
        logits, trace = learn(judge_delay, train_delay, push)
        pleased = (trace.info["pleased"] & trace.active).sum(axis=1) / np.maximum(trace.served, 1)
        assert jax.nn.softmax(logits)[2] > 0.9
        share[push, judge_delay] = float(pleased[:40].mean())
    # Old weights serve longer: fewer users are pleased meanwhile.
    assert share["immediate", 0] > share["after_next_batch", 0] > share["after_next_batch", 8]


def test_sessions_of_persona_chat():
    env = persona_chat(p_dir=0.5)

    def act(keys, params, observation):
        reply = jax.vmap(base_reply)(keys, observation.ids)
        return reply, {"version": jnp.full(keys.shape, params)}

    def votes_and_hints(keys, turns):
        info = turns.step.info
        reaction = Reaction(info["satisfied"], info["directive"], info["reaction"])
        votes = jax.vmap(functools.partial(judge, votes=3, flip=0.0, ambiguous=0.0))(keys, reaction)
        samples = dict(context=turns.observation.ids, reply=turns.action, votes=votes, hints=jax.vmap(hints)(reaction))
        return samples, jnp.ones(keys.shape, bool)

    slots, ticks = 8, 60
    _, trace = jax.jit(
        lambda key: simulate(
            key,
            jnp.int32(0),
            session_service(env, act),
            votes_and_hints,
            count,
            slots=slots,
            ticks=ticks,
            batch=16,
            judge_delay=0,
            train_delay=1,
        )
    )(jax.random.key(0))
    assert not trace.paused.any() and int(trace.updated.sum()) == 30
    context = np.asarray(trace.metrics["context"])[np.asarray(trace.updated)].reshape(ticks, slots, CONTEXT)
    reply = np.asarray(trace.metrics["reply"])[np.asarray(trace.updated)].reshape(ticks, slots, REPLY)
    votes = np.asarray(trace.metrics["votes"])[np.asarray(trace.updated)].reshape(ticks, slots, 3)
    pleased, reaction = np.asarray(trace.info["satisfied"]), np.asarray(trace.info["reaction"])
    np.testing.assert_array_equal(votes, np.where(pleased, 1, -1)[..., None].repeat(3, axis=2))
    assert 20 < pleased.sum() < ticks * slots - 20 and np.all((reply == EOS).any(axis=-1))
    for s in range(slots):
        turn = 0
        for t in range(ticks):
            feedback = context[t, s, FEEDBACK]
            if turn == 0:  # a new session, whose user has said nothing yet
                assert not feedback.any()
            else:  # the same question again, and what the user said to the first reply
                np.testing.assert_array_equal(context[t, s, :5], context[t - 1, s, :5])
                np.testing.assert_array_equal(feedback[:2], reaction[t - 1, s])
            turn = 0 if pleased[t, s] or turn == 1 else 1
    digits = context[:, :, 2:5].reshape(-1, 3)
    assert len(np.unique(digits, axis=0)) > 150


def test_python_numbers_are_parameters_too():
    service = Service(
        reset=lambda keys: jnp.zeros(keys.shape),
        turn=lambda keys, params, n: (n + 1.0, n + params["w"], {}),
    )
    params, _ = simulate(
        jax.random.key(0),
        {"w": 0.5, "steps": 0},
        service,
        always,
        lambda params, samples: (dict(w=params["w"] + samples.mean(), steps=params["steps"] + 1), None),
        slots=2,
        ticks=2,
        batch=2,
        judge_delay=0,
        train_delay=0,
        push="immediate",
    )
    assert int(params["steps"]) == 2 and float(params["w"]) == 3.0  # 0.5 + 0.5, then + 2.0


def test_bad_input():
    def call(**options):
        options = dict(slots=2, ticks=3, batch=2, judge_delay=0, train_delay=0) | options
        return simulate(jax.random.key(0), jnp.int32(0), COUNTING, always, count, **options)

    for options, message in (
        (dict(slots=0), "slots must be at least 1, got 0"),
        (dict(ticks=0), "ticks must be at least 1, got 0"),
        (dict(batch=-1), "batch must be at least 1, got -1"),
        (dict(judge_delay=-1), "judge_delay must not be negative, got -1"),
        (dict(train_delay=-2), "train_delay must not be negative, got -2"),
        (dict(push="later"), "push must be one of .*, got 'later'"),
        (dict(late="lose"), "late must be one of .*, got 'lose'"),
        (dict(judge_delay=3, max_judge_delay=2), "judge_delay must be at most max_judge_delay=2, got 3"),
        (dict(max_judge_delay=-1), "max_judge_delay must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(ValueError, match="max_judge_delay must be given for a traced judge_delay, got None"):
        jax.jit(lambda delay: call(judge_delay=delay))(1)
