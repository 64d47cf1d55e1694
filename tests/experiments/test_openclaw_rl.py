"""OpenClaw-RL: a row's loss is that of its method, masks hold, counters count, the parts run (arXiv 2603.10165)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives
from rollax.envs.persona_chat import CONTEXT, EOS, HINT, PAD, REPLY, VOCAB, write_hint
from rollax.experiments import openclaw_agents as agents
from rollax.experiments import openclaw_base, openclaw_chat
from rollax.experiments import openclaw_rl as openclaw
from rollax.experiments.harness.loop import Results
from rollax.experiments.openclaw_chat import Batch

TINY = openclaw.Config(
    part="chat", width=16, layers=1, heads=2, sessions=3, updates=2, chunk=2, eval_prompts=4, base_steps=2, base_batch=4
)
V, B, M = len(VOCAB), 6, 3


def as_numbers(n, **changes):
    """Arrays, as `loop.stack` makes them."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if isinstance(x, float) else jnp.int32), n._replace(**changes)
    )


# --- A step on a batch ----------------------------------------------------------------------------------------------


def log_probs_of(params, context, reply):
    """A small law of everything that was read: bags of words, and the word before."""
    read = jax.nn.one_hot(context, V).sum(axis=1)[:, None]
    before = jnp.concatenate([context[:, -1:], reply[:, :-1]], axis=1)
    return jax.nn.log_softmax(read @ params["read"] + params["before"][before])


def law(seed):
    keys = jax.random.split(jax.random.key(seed))
    return {"read": jax.random.normal(keys[0], (V, V)), "before": jax.random.normal(keys[1], (V, V))}


@pytest.fixture(scope="module")
def batch():
    """Six turns: three with hints, one of them neutral; one that was not made."""
    keys = jax.random.split(jax.random.key(5), 3)
    reply = jax.random.randint(keys[0], (B, REPLY), 5, V)
    mask = jnp.arange(REPLY) < jnp.array([12, 5, 8, 3, 7, 0])[:, None]
    hinted = jnp.array([True, False, True, False, True, False])
    exact = jax.random.randint(keys[1], (B,), HINT, V)
    hints = jnp.stack([jnp.stack([exact, x], axis=1) for x in (jnp.full(B, PAD), jnp.full(B, 25), jnp.full(B, 26))], 1)
    reward = jnp.array([-1.0, 1.0, 0.0, -1.0, 1.0, 0.0])
    return Batch(
        context=jax.random.randint(keys[2], (B, CONTEXT), 0, 20).at[:, 5:9].set(PAD),
        reply=jnp.where(mask, reply, PAD),
        mask=mask,
        reward=reward,
        scored=reward != 0,
        hints=jnp.where(hinted[:, None, None], hints, PAD),
        hinted=jnp.broadcast_to(hinted[:, None], (B, M)),
    )


@functools.partial(jax.jit, static_argnums=0)
def by_hand(row, batch, params, teacher, key):
    """Loss and gradient of a method, from the objectives alone."""
    n = openclaw.CHAT[row]
    teacher = params if n.self_teacher else teacher
    old = log_probs_of(params, batch.context, batch.reply)
    told = [jax.vmap(write_hint)(batch.context, batch.hints[:, m]) for m in range(M)]
    candidates = jnp.stack([log_probs_of(teacher, context, batch.reply) for context in told])
    mode = openclaw.SELECTIONS[n.select]
    length = (batch.hints != PAD).sum(axis=-1)
    reward = jnp.where(batch.scored, batch.reward, 0.0)
    sampled = lambda x: jnp.take_along_axis(x, batch.reply[..., None], axis=-1)[..., 0]  # noqa: E731

    def version_1(params):
        score = jnp.where(batch.hinted, 1, -1)
        picked = objectives.select_longest(score, length, 0) if mode == "longest" else jnp.zeros(B, int)
        chosen = candidates[jnp.maximum(picked, 0), jnp.arange(B)]
        gap = objectives.token_gap_advantage(sampled(chosen), sampled(old), batch.mask)
        has_hint = batch.hinted.any(axis=1)
        advantage = objectives.combined_advantage(batch.reward, gap, batch.scored, has_hint, n.w_b, n.w_o)
        cur = sampled(log_probs_of(params, batch.context, batch.reply))
        losses = objectives.asymmetric_ppo(cur, sampled(old), advantage, batch.mask)
        return objectives.sample_mean(losses, batch.mask, B)

    def version_2(params):
        return objectives.hybrid_loss(
            log_probs_of(params, batch.context, batch.reply),
            old,
            candidates,
            batch.reply,
            reward,
            batch.mask,
            k=openclaw.KS[n.k],
            select=mode,
            diff_clip=None if np.isinf(n.diff_clip) else n.diff_clip,
            w_rl=n.w_b,
            w_opd=n.w_opd,
            valid=batch.hinted.T,
            length=length.T,
            key=key,
        )[0]

    return jax.value_and_grad(version_2 if n.w_opd else version_1)(params)


@jax.jit
def ours(params, teacher, batch, key, n):
    teacher = jax.tree.map(lambda own, first: jnp.where(n.self_teacher, own, first), params, teacher)

    def loss(params):
        log_probs = log_probs_of(params, batch.context, batch.reply)
        targets = openclaw_chat.targets_of(jax.lax.stop_gradient(log_probs), log_probs_of, teacher, batch, key, n)
        return openclaw_chat.batch_loss(log_probs, batch, targets, n)

    return jax.value_and_grad(loss)(params)


ALONE = [row for row in openclaw.CHAT if "q=" not in row and "p_dir" not in row]
BY_HAND = (
    "binary", "combined v1", "combined v1, exact", "opd v2, C=0.5", "hybrid v2, no clip", "hybrid v2, k=2",
    "hybrid v2, by token", "hybrid v2, random", "hybrid v2, self",
)  # fmt: skip


@pytest.mark.parametrize("row", BY_HAND)
def test_a_row_has_the_loss_of_its_method(row, batch):
    params, teacher, key = law(0), law(1), jax.random.key(9)
    value, grads = ours(params, teacher, batch, key, as_numbers(openclaw.CHAT[row]))
    wanted, wanted_grads = by_hand(row, batch, params, teacher, key)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    assert max(np.abs(g).max() for g in jax.tree.leaves(wanted_grads)) > 1e-2
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wanted_grads[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_all_rows_differ(batch):
    numbers = jax.tree.map(lambda *x: jnp.stack(x), *(as_numbers(openclaw.CHAT[row]) for row in ALONE))
    run = jax.vmap(ours, in_axes=(None, None, None, None, 0))
    _, grads = run(law(0), law(1), batch, jax.random.key(9), numbers)
    flat = np.concatenate([np.asarray(g).reshape(len(ALONE), -1) for g in jax.tree.leaves(grads)], axis=1)
    apart = np.abs(flat[:, None] - flat[None]).max(axis=2) + np.eye(len(ALONE))
    assert apart.min() > 1e-6


def test_turns_that_were_not_made_count_in_the_denominator_alone(batch):
    n, key = as_numbers(openclaw.COMBINED), jax.random.key(0)
    value, grads = ours(law(0), law(1), batch, key, n)
    fewer = jax.tree.map(lambda x: x[:-1], batch)
    for nonsense in (batch, batch._replace(reply=batch.reply.at[-1].set(7), context=batch.context.at[-1].set(3))):
        again, again_grads = ours(law(0), law(1), nonsense, key, n)
        np.testing.assert_allclose(again, value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), again_grads, grads)
    value_of_fewer, _ = ours(law(0), law(1), fewer, key, n)
    np.testing.assert_allclose(value_of_fewer * (B - 1), value * B, rtol=1e-5)


# --- Sessions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return jax.jit(openclaw_base.chat_model(TINY).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def trained(base):
    """Two updates of a model that knows nothing, three rows in one program."""
    train = openclaw_chat.chat_train(TINY, base)
    rows = {row: openclaw.CHAT[row]._replace(lr=0.01) for row in ("binary, p_dir=0", "hybrid v2, p_dir=0", "hybrid v2")}
    rows["hybrid v2"] = rows["hybrid v2"]._replace(p_dir=1.0)
    numbers = jax.tree.map(lambda *x: jnp.stack(x), *map(as_numbers, rows.values()))
    state = jax.jit(train.init)(jax.random.key(4))
    after, told = jax.jit(jax.vmap(train.advance, in_axes=(None, 0)))(state, numbers)
    return state, after, told, train


def test_hybrid_is_binary_where_nobody_says_what_is_wrong(trained):
    """D9 of the study: bit for bit."""
    state, after, told, _ = trained
    assert not told["hinted turns"][:2].any() and (told["hinted turns"][2] > 0).all()
    for moved, began in zip(jax.tree.leaves(after.learner.params), jax.tree.leaves(state.learner.params), strict=True):
        np.testing.assert_array_equal(moved[0], moved[1])
        assert np.abs(moved[0] - began).max() > 0 and np.abs(moved[2] - moved[0]).max() > 0


def test_what_is_told_of_sessions(trained):
    _, after, told, train = trained
    S, turns = TINY.sessions, TINY.turns
    assert told["persona"].shape == (3, 2, S) and set(np.unique(told["persona"])) <= {0, 1, 2}
    pleased = told["first reply pleased"].sum(axis=2)
    assert (told["scored turns"] <= S * turns - pleased).all()
    np.testing.assert_allclose(told["chosen hints"].sum(axis=2), told["hinted turns"], atol=1e-4)
    assert (after.learner.updates == 2).all()
    first = jax.tree.map(lambda x: x[0], after)
    evaluated = jax.jit(train.evaluate)(first, None)
    assert {"satisfied", "content", "satisfied, teacher", "base, hinted"} <= set(evaluated)
    assert all(np.isfinite(x) for x in evaluated.values())


def test_turns_of_a_batch_follow_the_users(base):
    """A session that ended has no second turn; complaints stand in the context of the second."""
    run = jax.jit(functools.partial(openclaw_chat.play_sessions, TINY))
    n = as_numbers(openclaw.BINARY, p_dir=1.0, flip=0.0)
    batch, info, made = run(jax.random.key(1), base, n)
    S, turns = made.shape
    assert made[:, 0].all()
    np.testing.assert_array_equal(made[:, 1], ~info["satisfied"][:, 0])
    mask = np.asarray(batch.mask).reshape(S, turns, -1)
    np.testing.assert_array_equal(mask.any(axis=2), made)
    context = np.asarray(batch.context).reshape(S, turns, -1)
    assert (context[:, 0, 5:9] == PAD).all()
    np.testing.assert_array_equal(context[made[:, 1], 1, 5:7], np.asarray(info["reaction"])[made[:, 1], 0])
    # The judge never errs and is at times in doubt: -1, 0, or 1 where the reply pleased.
    reward, pleased = np.asarray(batch.reward).reshape(S, turns), np.asarray(info["satisfied"])
    assert (reward[made & ~pleased] <= 0).all() and (reward[made & pleased] >= 0).all()
    np.testing.assert_array_equal(np.asarray(batch.hinted).any(axis=1).reshape(S, turns), info["directive"])
    ends = np.asarray(batch.reply) == EOS
    assert (ends.sum(axis=1) <= 1).all()


def test_the_forward_of_training_is_that_of_sampling(base):
    """At temperature 0 a reply is the most likely token at every place."""
    context = jax.random.randint(jax.random.key(2), (8, CONTEXT), 0, V)
    model = openclaw_base.chat_model(TINY)

    @jax.jit
    def both(context):
        said = openclaw_base.sample_replies(model, jax.random.split(jax.random.key(3), 8), base, context, 0.0)
        return said, openclaw_base.reply_log_probs(model, base, context, said.ids).argmax(axis=-1)

    said, best = both(context)
    np.testing.assert_array_equal(np.where(said.mask, best, PAD), said.ids)


def test_a_users_change_of_mind(base):
    """First all replies without bold type please, then those with a warm word."""
    config = dataclasses.replace(TINY, part="talk")
    train = openclaw_chat.chat_train(config, base)
    jaxpr = jax.eval_shape(train.evaluate, jax.eval_shape(train.init, jax.random.key(0)), None)
    assert {"old wish", "new wish"} <= set(jaxpr)
    pleased = np.array([[[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]]], bool)
    results = Results({"a": {"first reply pleased": pleased, "persona": np.zeros(pleased.shape, int)}}, {}, None, {})
    assert openclaw_chat.align(results, "a").tolist() == [3]
    assert openclaw_chat.align_again(results, "a").tolist() == [5]


# --- Measures -------------------------------------------------------------------------------------------------------


def test_sessions_until_three_in_a_row_please():
    draw = np.random.default_rng(0)
    pleased, persona = draw.random((20, 6, 5)) < 0.5, draw.integers(-1, 3, (20, 6, 5))
    for whose in range(3):
        wanted = []
        for seed in range(20):
            in_a_row = sessions = 0
            for good, who in zip(pleased[seed].ravel(), persona[seed].ravel(), strict=True):
                if who != whose:
                    continue
                sessions += 1
                in_a_row = in_a_row + 1 if good else 0
                if in_a_row == 3:
                    break
            wanted.append(sessions)
        found = openclaw_chat.sessions_to_align(pleased, persona, whose)
        np.testing.assert_array_equal(found, wanted)
        assert len(set(wanted)) > 3


def test_staleness_leaves_the_first_batch_out():
    stale = np.array([[[-1, -1], [0, 0], [-1, -1], [1, 1], [1, 3]]])
    results = Results({"a": {"staleness": stale}}, {}, None, {})
    assert openclaw.staleness(results, "a").tolist() == [1.5]
    assert openclaw.one_version_stale(results, "a").tolist() == [0.75]


def test_the_share_of_the_exact_hint():
    told = {"hinted turns": np.array([[2.0, 2.0], [0.0, 0.0]]), "chosen hints": np.zeros((2, 2, 3))}
    told["chosen hints"][0] = [[2, 0, 0], [1, 0.5, 0.5]]
    results = Results({"a": told}, {}, None, {})
    np.testing.assert_allclose(openclaw_chat.exact_share(results, "a"), [0.75, np.nan])


def test_pleased_share_is_that_of_the_last_ticks():
    persona = np.array([[[0, -1], [1, 2], [-1, -1], [0, 0]]])
    pleased = np.array([[[1, 1], [0, 1], [1, 1], [1, 0]]])
    share = openclaw.pleased_share({"persona": persona, "first reply pleased": pleased}, window=2)
    np.testing.assert_allclose(share, [[1, 2 / 3, 1 / 2, 1 / 2]])


# --- Serving and training side by side ------------------------------------------------------------------------------


@pytest.mark.slow  # what a loop serves while it trains is for agents/test_async_loop.py
def test_every_batch_after_the_first_is_one_version_stale(base):
    config = dataclasses.replace(TINY, part="asynchronous", slots=3, updates=12, chunk=12, longest_delay=2)
    train = openclaw_chat.asynchronous_train(config, "after_next_batch", base)
    numbers = as_numbers(openclaw.HYBRID, lr=0.01)
    state, told = jax.jit(train.advance)(jax.jit(train.init)(jax.random.key(0)), numbers)
    told = {name: np.asarray(x)[None] for name, x in told.items()}
    results = Results({"a": told}, {}, None, {})
    assert openclaw.one_version_stale(results, "a").tolist() == [1]
    assert told["updated"].sum() == int(state.learner.updates) == 6  # a batch is two ticks long
    assert (told["served"] == 3).all() and not told["paused"].any()
    first = told["persona"][0] >= 0
    assert first[0].all() and 0 < first.mean() < 1


# --- Agents ---------------------------------------------------------------------------------------------------------


def test_a_judge_of_steps_sees_subtasks():
    done, none, unpaid = jnp.array([[0, 1, 1, 3]]), jnp.array([0]), jnp.zeros((1, 4))
    signs = lambda *x: np.repeat(np.array(x)[:, None], agents.VOTES, axis=1)  # noqa: E731
    judge = functools.partial(agents.judge_steps, jax.random.key(0), flip=0.0)
    votes = judge(done, none, unpaid)
    np.testing.assert_array_equal(votes[0], signs(-1, 1, -1, 1))
    paid = judge(done, none, unpaid.at[0, 2].set(0.5).at[0, 0].set(-0.1))
    np.testing.assert_array_equal(paid[0], signs(-1, 1, 1, 1))
    again = judge(jnp.array([[1, 0, 1, 2]]), jnp.array([1]), unpaid)  # done at the start, undone and done again
    np.testing.assert_array_equal(again[0], signs(-1, -1, -1, 1))
    many = agents.judge_steps(
        jax.random.key(1), jnp.broadcast_to(done, (500, 4)), jnp.zeros(500, int), jnp.zeros((500, 4)), 0.25
    )
    np.testing.assert_allclose((many != votes).mean(), 0.25, atol=0.02)


@pytest.mark.parametrize("bench", [pytest.param("minesweeper", marks=pytest.mark.slow), "sokoban"])
def test_a_first_move_that_does_nothing_earns_nothing(bench):
    config = dataclasses.replace(TINY, part=bench, bench=bench, horizon=6)
    env = agents.environment(config, jax.random.key(0))

    @jax.jit
    @jax.vmap
    def first(task):
        state, _ = env.reset(jax.random.key(0), task)
        return env.step(jax.random.key(0), state, jnp.array([0]))[1]  # no action

    told = first(jnp.arange(32))
    done = told.info["progress"].sum(axis=-1)[:, None]
    assert (done > 0).any()
    votes = agents.judge_steps(jax.random.key(0), done, told.info["done before"], told.reward[:, None], 0.0)
    assert (votes == -1).all()


def test_agents_get_the_advantages_of_their_arm():
    keys = jax.random.split(jax.random.key(7), 3)
    G, N, T = 3, 4, 5
    won = jax.random.bernoulli(keys[0], 0.5, (G, N)).at[0].set(False)
    made = jnp.arange(T) < jax.random.randint(keys[1], (G, N, 1), 2, T + 1)
    votes = jnp.where(jax.random.bernoulli(keys[2], 0.5, (G, N, T, agents.VOTES)), 1, -1)
    outcome = jnp.where(won, 1.0, -1.0)
    step = votes.mean(axis=-1)
    arm = jax.jit(agents.step_advantages)
    of = lambda row: arm(won, votes, made, as_numbers(agents.AGENTS[row]))  # noqa: E731
    by_bucket = jax.jit(objectives.step_index_advantage, static_argnames="bucket")

    advantage, kept = of("outcome")
    for g in range(G):
        std = outcome[g].std(ddof=1)
        wanted = (outcome[g] - outcome[g].mean()) / (std + 1e-6) if std else jnp.zeros(N)
        np.testing.assert_allclose(advantage[g], jnp.where(made[g], wanted[:, None], 0.0), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(kept[g], made[g] & bool(std))
    for row, reward, bucket in (
        ("outcome + step", outcome[..., None] + step, "step"),
        ("outcome + step, by task", outcome[..., None] + step, "task"),
        ("step", step, "step"),
    ):
        advantage, kept = of(row)
        wanted, wanted_kept = by_bucket(reward, made, bucket=bucket)
        np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(kept, wanted_kept)


def test_buckets_without_a_signal_are_counted():
    made = jnp.array([[[1, 1], [1, 1]], [[1, 0], [1, 0]]], bool)
    kept = made.at[1].set(False)
    advantage = jnp.where(kept, jnp.array([[1.0], [-1.0]]), 0.0)
    told = agents.bucket_metrics(advantage, kept, made)
    np.testing.assert_allclose(told["dropped buckets"], 1 / 3)
    np.testing.assert_allclose(told["advantage variance"], 2 / 3)


@pytest.mark.parametrize(
    "bench",
    ["household", *(pytest.param(bench, marks=pytest.mark.slow) for bench in ("shop", "minesweeper", "sokoban"))],
)
def test_agents_train_and_are_watched(bench):
    config = dataclasses.replace(
        TINY, part="agents", bench=bench, tasks=2, group=3, horizon=6, num_first=4, num_second=3, updates=1, chunk=1,
        passes=1,
    )  # fmt: skip
    base = jax.jit(agents.agent_model(config).init)(jax.random.key(0))
    train = agents.agents_train(config, base)
    state = jax.jit(train.init)(jax.random.key(0))
    numbers = as_numbers(agents.AGENTS["outcome + step"], lr=0.01)
    after, told = jax.jit(train.advance)(state, numbers)
    assert told["gradient norm"] > 0 and 0 <= told["dropped buckets"] <= 1 and 1 <= told["steps"] <= 6
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0
    (episode,) = agents.watch_tasks(config, after, "outcome + step", 1)
    if bench in agents.BENCHES:
        assert len(episode.frames) == 1 and "> " in episode.frames[0]
    else:
        assert 2 <= len(episode.frames) <= 7 and len(set(episode.frames)) > 1


def test_boards_are_tasks_of_a_seed_and_their_demonstrator_slips():
    config = dataclasses.replace(TINY, part="sokoban", bench="sokoban", horizon=8)
    reset = jax.jit(lambda seed, key, task: agents.environment(config, seed).reset(key, task))
    starts = [reset(*map(jax.random.key, keys), task) for *keys, task in ((0, 0, 3), (0, 9, 3), (0, 0, 4), (1, 0, 3))]
    first, again, other_task, other_seed = (np.asarray(observation.ids) for _, observation in starts)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other_task) and not np.array_equal(first, other_seed)
    env, state = agents.environment(config, jax.random.key(0)), starts[0][0]
    keys = jax.random.split(jax.random.key(2), 400)
    chosen = np.asarray(jax.jit(jax.vmap(env.demonstrate, (0, None)))(keys, state))[:, 0]
    wanted = int(jax.jit(env.expert)(keys[0], state)[0])
    assert {env.spec.vocab[token] for token in chosen} == {"up", "right", "down", "left"}
    np.testing.assert_allclose((chosen == wanted).mean(), 1 - agents.SLIP * 3 / 4, atol=0.08)


# --- The command line -----------------------------------------------------------------------------------------------


def test_every_claim_asks_for_rows_of_one_part():
    for claim in openclaw.CLAIMS:
        assert any(set(claim.needs) <= set(arms) for arms in openclaw.ARMS.values()), claim.name
        parts = {part for part, arms in openclaw.ARMS.items() if set(claim.needs) <= set(arms)}
        assert len(parts) == 1 or parts == set(openclaw.AGENT_PARTS), claim.name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--part", "letters"],
            "part: expected chat, talk, asynchronous, agents, minesweeper, sokoban or all, got 'letters'",
        ),
        (["--part", "talk", "--arms", "binary"], "arms: expected some of binary, talk"),
        (["--part", "chat", "--updates", "30"], "chunk: expected a divisor of updates=30, got 4"),
        (["--part", "asynchronous", "--chunk", "8"], "chunk: expected all updates=96 in part asynchronous, got 8"),
        (
            ["--part", "asynchronous", "--longest-delay", "8"],
            "longest_delay: expected at least 12 for these arms, got 8",
        ),
        (["--part", "talk", "--updates", "7"], "updates: expected an even number in part talk, got 7"),
        (["--part", "chat", "--ambiguous", "2"], "ambiguous: expected a share, 0 to 1, got 2.0"),
        (
            ["--part", "agents", "--bench", "chess"],
            "bench: expected one of household, shop, sokoban, minesweeper, got 'chess'",
        ),
        (["--part", "agents", "--horizon", "3"], "horizon: expected at least 4, got 3"),
        (["--part", "agents", "--pool", "4"], "pool: expected tasks=8 to 256, got 4"),
        (["--width", "30"], "width: expected a multiple of 2 * heads=8, got 30"),
    ],
)
def test_bad_options_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        openclaw.configs_of(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1


def test_the_parts_have_their_presets():
    assert list(openclaw.configs_of([])) == ["chat", "talk", "asynchronous", "agents", "minesweeper", "sokoban"]
    assert openclaw.configs_of(["--bench", "shop"])["agents"].bench == "shop"
    for board in ("minesweeper", "sokoban"):  # its bench, whatever is said
        assert openclaw.configs_of(["--part", board, "--bench", "shop"])[board].bench == board
    configs = openclaw.configs_of([])
    assert configs["asynchronous"].chunk == configs["asynchronous"].updates
