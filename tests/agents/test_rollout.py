"""Rollouts: bookkeeping of turns, and that training scores what generation sampled."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives
from rollax.agents.generation import Sampling
from rollax.agents.rollout import first_observations, play, reactive, rollout, score, sequential_sampler
from rollax.agents.tabular import tabular
from rollax.agents.transformer import TransformerConfig, transformer
from rollax.envs.cartpole import cartpole
from rollax.envs.environment import Environment, Step, Tokens, TokenSpec

VOCAB, STOP = 11, 10


class EchoState(NamedTuple):
    secret: jax.Array
    turn: jax.Array


def echo(max_turns):
    """Says a number of varying length, is answered, says the answer's length back; ends when turn = secret."""

    def tokens(value, length):
        return Tokens(jnp.where(jnp.arange(3) < length, value, 0).astype(jnp.int32), length)

    def reset(key):
        secret = jax.random.randint(key, (), 1, 5)
        return EchoState(secret, jnp.int32(0)), tokens(secret, 1 + secret % 3)

    def step(key, state, action):
        length = jnp.sum(jnp.cumsum(action == STOP) == 0)
        turn = state.turn + 1
        over = turn >= state.secret
        observation = tokens(length % 10, 1 + length % 3)
        reward = length.astype(jnp.float32)
        return EchoState(state.secret, turn), Step(
            observation, reward, over, ~over & (turn >= max_turns), {"length": length}
        )

    spec = TokenSpec(tuple("0123456789."), 3, 4, max_turns, (STOP,), 0)
    return Environment(reset, step, spec)


@functools.cache
def lm(num_layers=2):
    """Two layers where what a token attends to must be right for all tokens, not just for those that are sampled."""
    model = transformer(TransformerConfig(VOCAB, width=32, num_layers=num_layers, num_heads=4, num_kv_heads=2))
    return model, jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, model.init(key)))(jax.random.key(0))


@functools.cache
def played(max_turns, prefix=()):
    model, params = lm()
    ids = jnp.array(prefix, jnp.int32) if prefix else None
    return jax.jit(
        lambda key: rollout(
            key, model, params, echo(max_turns), num_prompts=6, group_size=4, prefix=ids, sampling=Sampling(top_k=9)
        )
    )(jax.random.key(3))


PREFIX = (7, 3, 3, 1)
# A prefix comes with several turns, whose programs are shared.
PLAYED = [(1, ()), pytest.param(3, (), marks=pytest.mark.slow), (3, PREFIX)]


@pytest.mark.parametrize(("max_turns", "prefix"), PLAYED)
def test_bookkeeping(max_turns, prefix):
    trajectory = jax.device_get(played(max_turns, prefix))
    width = 3 + 4
    assert trajectory.tokens.shape == (24, max_turns * width)
    assert trajectory.reward.shape == (24, max_turns)
    for row in range(24):
        secret = trajectory.tokens[row, 0]
        turns = min(secret, max_turns)
        assert trajectory.terminated[row] == (secret <= max_turns)
        assert trajectory.truncated[row] == (secret > max_turns)
        positions = trajectory.positions[row]
        real = positions[positions >= 0]
        np.testing.assert_array_equal(real, len(prefix) + np.arange(len(real)))  # no gap, in order
        for turn in range(max_turns):
            own = trajectory.mask[row, turn * width + 3 : (turn + 1) * width]
            action = trajectory.tokens[row, turn * width + 3 : (turn + 1) * width]
            assert not trajectory.mask[row, turn * width : turn * width + 3].any()
            assert (trajectory.turn[row, turn * width : (turn + 1) * width] == turn).all()
            if turn >= turns:
                assert not own.any()
                assert trajectory.reward[row, turn] == 0
                continue
            stops = np.flatnonzero(action == STOP)
            spoken = stops[0] + 1 if stops.size else 4
            np.testing.assert_array_equal(own, np.arange(4) < spoken)
            assert trajectory.reward[row, turn] == (stops[0] if stops.size else 4)
            if turn + 1 < turns:  # the next observation answers this action
                assert trajectory.tokens[row, (turn + 1) * width] == trajectory.reward[row, turn]
    group = trajectory.tokens[:, :3].reshape(6, 4, 3)
    assert (group == group[:, :1]).all()  # a group shares its start
    assert (trajectory.log_prob[~trajectory.mask] == 0).all()


@pytest.mark.parametrize(("max_turns", "stages"), [(3, 3), pytest.param(5, 9, marks=pytest.mark.slow)])
def test_a_cache_that_grows_by_stages_changes_nothing(max_turns, stages):
    model, params = lm()
    trajectory, prefix = played(max_turns, (7, 3, 3, 1)), jnp.array([7, 3, 3, 1])
    how = dict(num_prompts=6, group_size=4, prefix=prefix, sampling=Sampling(top_k=9))
    ours = jax.jit(lambda k: rollout(k, model, params, echo(max_turns), stages=stages, **how))(jax.random.key(3))
    for name, x, y in zip(trajectory._fields, ours, trajectory, strict=True):
        close = name in ("log_prob", "full_log_prob")
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * close, rtol=0), x, y)  # noqa: B023


@pytest.mark.parametrize(("stages", "turns"), [(1, [1, 8]), (3, [1, 3, 6, 8]), (8, [*range(1, 9)])])
def test_the_cache_has_room_for_the_turns_of_a_stage(stages, turns):
    model, params = lm()
    rooms = set()

    def init_cache(batch, slots, dtype=None):
        rooms.add(slots)
        return model.init_cache(batch, slots, dtype)

    watched = model._replace(init_cache=init_cache)
    key = jax.random.key(0)
    jax.eval_shape(lambda k: rollout(k, watched, params, echo(8), num_prompts=2, stages=stages), key)
    width = echo(8).spec.max_observation + echo(8).spec.max_action
    assert rooms == {turn * width for turn in turns}


def test_a_group_computes_its_first_observation_once():
    model, params = lm()
    rows = []

    def hidden(params, tokens, *rest):
        rows.append(tokens.shape)
        return model.hidden(params, tokens, *rest)

    how = dict(group=jnp.array([1, 0, 1, 2, 2, 1]), num_groups=3)
    some = jax.tree.map(lambda x: x[:6], played(1))
    jax.eval_shape(lambda p: score(model._replace(hidden=hidden), p, some, echo(1), **how), params)
    assert rows[0] == (3, echo(1).spec.max_observation) and rows[1][0] == 6


@pytest.mark.parametrize(
    ("max_turns", "prefix"), [pytest.param(turns, (), marks=pytest.mark.slow) for turns in (1, 3)] + [(3, PREFIX)]
)
def test_score_equals_sampler(max_turns, prefix):
    model, params = lm()
    trajectory = played(max_turns, prefix)
    ids = jnp.array(prefix, jnp.int32) if prefix else None
    run = jax.jit(lambda p, g: score(model, p, trajectory, echo(max_turns), group_size=g, prefix=ids), static_argnums=1)
    for group in (1, 4):
        log_prob, entropy = run(params, group)
        np.testing.assert_allclose(log_prob, trajectory.full_log_prob, atol=1e-4)
        assert (np.asarray(entropy)[np.asarray(trajectory.mask)] > 0).all()
        assert (np.asarray(entropy)[~np.asarray(trajectory.mask)] == 0).all()
    assert (
        np.asarray(trajectory.log_prob) >= np.asarray(trajectory.full_log_prob) - 1e-5
    ).all()  # truncation adds mass


@functools.cache
def gradient_of_groups():
    """`(gradient, log_prob)` of `(params, weights [24, S])`: weighted log-probs and entropies, starts shared."""
    model, _ = lm()
    trajectory, prefix = played(3, (7, 3, 3, 1)), jnp.array([7, 3, 3, 1])

    def total(params, weights):
        log_prob, entropy = score(model, params, trajectory, echo(3), group_size=4, prefix=prefix)
        return jnp.sum(weights * (log_prob + 0.1 * entropy)), log_prob

    return jax.jit(jax.grad(total, has_aux=True))


def test_groups_may_differ_in_size_and_order():
    model, params = lm()
    trajectory, env, prefix = played(3, (7, 3, 3, 1)), echo(3), jnp.array([7, 3, 3, 1])
    kept = jnp.array([23, 0, 13, 1, 12, 2, 22, 8])  # of groups 5, 0, 3, 0, 3, 0, 5, 2; nothing is left of 1 and 4

    def some(params):
        rows = jax.tree.map(lambda x: x[kept], trajectory)
        log_prob, entropy = score(model, params, rows, env, group=kept // 4, num_groups=6, prefix=prefix)
        return jnp.sum(log_prob + 0.1 * entropy), log_prob

    ours, log_prob = jax.jit(jax.grad(some, has_aux=True))(params)
    theirs, expected = gradient_of_groups()(params, jnp.zeros(trajectory.mask.shape).at[kept].set(1))
    np.testing.assert_allclose(log_prob, expected[kept], atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), ours, theirs)


def test_shared_start_has_the_same_gradient():
    """A prompt computed once for its group, and a prefix once for all, give the gradient of the plain forward."""
    model, params = lm()
    trajectory = played(3, (7, 3, 3, 1))
    weights = jax.random.normal(jax.random.key(5), trajectory.mask.shape)
    ids = np.concatenate([np.tile([7, 3, 3, 1], (24, 1)), trajectory.tokens], axis=1)
    positions = np.concatenate([np.tile(np.arange(4), (24, 1)), trajectory.positions], axis=1)
    columns = np.arange(ids.shape[1])
    # The last real token before each column of the trajectory.
    before = np.stack([np.where(positions[:, :c] >= 0, columns[:c], -1).max(axis=1) for c in columns[4:]], axis=1)

    def plain(params):
        logits, _ = model.apply(params, ids, positions)
        here = jnp.take_along_axis(jax.nn.log_softmax(logits), before[..., None], axis=1)
        chosen = jnp.take_along_axis(here, ids[:, 4:, None], axis=2)[..., 0]
        term = chosen - 0.1 * jnp.sum(jnp.exp(here) * here, axis=-1)
        return jnp.sum(jnp.where(trajectory.mask, weights * term, 0.0))

    expected, (got, _) = jax.jit(jax.grad(plain))(params), gradient_of_groups()(params, weights)
    apart = jax.tree.map(lambda x, y: jnp.linalg.norm(x - y) / jnp.linalg.norm(y), got, expected)
    assert max(jax.tree.leaves(apart)) < 5e-5


def test_rows_depend_on_their_index_alone():
    """More prompts add rows and change none."""
    model, params = lm()
    how = dict(num_prompts=2, group_size=4, sampling=Sampling(top_k=9))
    small = jax.jit(lambda k: rollout(k, model, params, echo(1), **how))(jax.random.key(3))
    np.testing.assert_array_equal(small.tokens, played(1).tokens[:8])


PROMPTS, K_INIT, K_MAX = 2, 2, 5


@functools.cache
def everything():
    """All episodes of a seed, of which a sequential rollout is a part."""
    model, params = lm(1)
    how = dict(num_prompts=PROMPTS, group_size=K_MAX, early_exit=False)
    return jax.jit(lambda key: rollout(key, model, params, echo(2), **how))


def test_vmap_over_seeds_equals_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(everything()))(keys)
    for i in range(3):
        np.testing.assert_array_equal(together.tokens[i], everything()(keys[i]).tokens)


def test_tabular_policy_speaks_the_protocol():
    """The table's own probabilities, in generation and in training."""
    logits = jax.random.normal(jax.random.key(1), (3, 4, 9))
    model = tabular(logits)

    def reset(key):
        prompt = jax.random.randint(key, (), 0, 3)
        return prompt, Tokens(prompt[None] + 9, jnp.int32(1))

    def step(key, state, action):
        return state, Step(Tokens(state[None] + 9, jnp.int32(1)), 1.0, jnp.bool_(True), jnp.bool_(False), {})

    env = Environment(reset, step, TokenSpec(tuple("abcdefghi012"), 1, 4, 1, (), 0))
    params = model.init(jax.random.key(0))
    trajectory = jax.jit(lambda k: rollout(k, model, params, env, num_prompts=5, group_size=2))(jax.random.key(2))
    prompt, action = trajectory.tokens[:, 0] - 9, trajectory.tokens[:, 1:]
    expected = jax.nn.log_softmax(logits)[prompt[:, None], jnp.arange(4), action]
    np.testing.assert_allclose(trajectory.log_prob[:, 1:], expected, rtol=1e-6)
    for group in (1, 2):
        read = jax.jit(functools.partial(score, model, env=env, group_size=group))
        log_prob, entropy = read(params, trajectory=trajectory)
        np.testing.assert_allclose(log_prob[:, 1:], expected, rtol=1e-6)
    table = jax.nn.softmax(logits)[prompt[:, None], jnp.arange(4)]
    np.testing.assert_allclose(entropy[:, 1:], -(table * jnp.log(table)).sum(-1), rtol=1e-5)


def test_an_ordinary_policy_trains_in_the_same_rollout():
    """GRPO on CartPole: `play`, group advantages, the clipped surrogate, a masked mean, and a linear policy."""
    env, starts, samples, steps = cartpole(100), 4, 16, 100
    group = np.arange(starts * samples) // samples

    def act(params, key, observation):
        log_probs = jax.nn.log_softmax(observation @ params)
        action = jax.random.categorical(key, log_probs)
        return action, log_probs[action]

    def loss(params, episodes, advantage):
        observation, action, old = episodes.record
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(observation @ params), action[..., None], axis=-1)[..., 0]
        bounds = objectives.clip_bounds(0.2)
        return objectives.aggregate(
            objectives.clipped_surrogate(log_prob - old, advantage[:, None], *bounds), episodes.mask, "token_mean"
        )

    def update(params, key):
        policy = reactive(functools.partial(act, params))
        episodes = play(key, env, policy, num_starts=starts, group_size=samples, num_steps=steps)
        reward = episodes.reward.sum(axis=1)
        grads = jax.grad(loss)(params, episodes, objectives.grpo_advantages(reward, group, num_groups=starts))
        return params - 5.0 * grads, reward.mean()

    keys = jax.random.split(jax.random.key(0), 60)
    _, reward = jax.jit(lambda params: jax.lax.scan(update, params, keys))(jnp.zeros((4, 2)))
    assert reward[0] < 35
    assert reward[-5:].mean() > 70, reward


def test_play_stops_counting_at_the_end():
    env = cartpole(100)
    policy = reactive(lambda key, observation: (jnp.int32(1), ()))  # always right: it falls
    episodes = jax.jit(lambda key: play(key, env, policy, num_starts=3, group_size=2, num_steps=30))(jax.random.key(1))
    assert episodes.terminated.all()
    assert not episodes.truncated.any()
    length = episodes.mask.sum(axis=1)
    np.testing.assert_array_equal(episodes.reward.sum(axis=1), length)  # 1 a step, none after the end
    np.testing.assert_array_equal(episodes.mask, np.arange(30) < length[:, None])
    assert (length[::2] == length[1::2]).all()  # a group shares its start, and the physics is deterministic
    assert (jnp.abs(episodes.record[0][:, 0]) <= 0.05).all()


def test_bad_input():
    model, params = lm()
    with pytest.raises(ValueError, match=r"group_size.*24.*5"):
        score(model, params, played(1), echo(1), group_size=5)
    with pytest.raises(ValueError, match=r"group, num_groups.*\[24\].*\(23,\)"):
        score(model, params, played(1), echo(1), group=jnp.zeros(23, int), num_groups=1)
    for how in (dict(group_size=2, num_groups=1), dict(num_groups=0)):
        with pytest.raises(ValueError, match=r"group, num_groups: expected \[24\] and at least 1"):
            score(model, params, played(1), echo(1), group=jnp.zeros(24, int), **how)
    with pytest.raises(ValueError, match=r"group: expected.*num_groups=6"):
        score(model, params, played(1), echo(1), num_groups=6)
    with pytest.raises(ValueError, match=r"stages.*1.*0"):
        jax.eval_shape(lambda k: rollout(k, model, params, echo(3), num_prompts=2, stages=0), jax.random.key(0))
    with pytest.raises(ValueError, match=r"logits.*\[P, T, V\].*\(3,\)"):
        tabular(jnp.zeros(3))


# --- Budgets that each prompt's rewards decide ------------------------------------------------------------------------


def while_long(reward, drawn, limit):
    """A prompt goes on while what it has said in all is below the limit."""
    return jnp.where(drawn, reward, 0.0).sum(axis=1) < limit


def sampler(max_turns=2, more=while_long, **options):
    model, _ = lm(1)
    return sequential_sampler(model, echo(max_turns), more, num_prompts=PROMPTS, k_init=K_INIT, k_max=K_MAX, **options)


@functools.cache
def drawn_inside():
    return jax.device_get(jax.jit(sampler())(jax.random.key(3), lm(1)[1], 14.0))


def test_a_sequential_rollout_is_a_part_of_the_whole():
    full = everything()(jax.random.key(3))
    result = drawn_inside()
    count = result.drawn.sum(axis=1)
    assert (result.drawn == (np.arange(K_MAX) < count[:, None])).all()
    assert count.min() >= K_INIT and len(set(count)) > 1  # some went on, some did not
    reward = np.asarray(full.reward).sum(axis=1).reshape(PROMPTS, K_MAX)
    for p in range(PROMPTS):  # exactly as long as the rule asked
        sums = np.cumsum(reward[p])
        assert all(sums[k - 1] < 14 for k in range(K_INIT, count[p]))
        assert count[p] == K_MAX or sums[count[p] - 1] >= 14
    rows = result.drawn.ravel()
    for name, part, whole in zip(full._fields, result.trajectory, full, strict=True):
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(x[rows], np.asarray(y)[rows], atol=1e-5, err_msg=name)
    blank = jax.tree.map(lambda x: x[~rows], result.trajectory)
    assert (blank.positions == -1).all() and not blank.mask.any() and not blank.reward.any()
    assert rows.sum() <= result.rows < PROMPTS * K_MAX  # a round costs the prompts that go on, up to the next size


def test_a_sequential_rollout_is_scored_like_any_other():
    model, params = lm(1)
    trajectory = drawn_inside().trajectory
    log_prob, _ = jax.jit(lambda p: score(model, p, trajectory, echo(2), group_size=K_MAX))(params)
    np.testing.assert_allclose(log_prob, trajectory.full_log_prob, atol=1e-4)


def test_rounds_outside_the_program_are_the_same_and_compile_once_a_size():
    traced = []

    def more(reward, drawn, limit):
        traced.append(drawn.shape)
        return while_long(reward, drawn, limit)

    sample = sampler(more=more, compiled=True)
    result = jax.device_get(sample(jax.random.key(3), lm(1)[1], 14.0))
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(drawn_inside()), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for seed in range(4):
        sample(jax.random.key(seed), lm(1)[1], 4.0 + 6 * seed)
    assert len(traced) <= 1 + 2  # the beginning, and sizes 1 and 2


@pytest.mark.slow
def test_seeds_of_sequential_rollouts_in_one_vmap():
    run = sampler(buckets=(PROMPTS,))
    keys = jax.random.split(jax.random.key(5), 2)
    limits = jnp.array([2.0, 30.0])
    together = jax.jit(jax.vmap(run, (0, None, 0)))(keys, lm(1)[1], limits)
    counts = together.drawn.sum(axis=(1, 2))
    assert counts[0] < counts[1]
    for i in range(2):
        alone = jax.jit(run)(keys[i], lm(1)[1], limits[i])
        np.testing.assert_array_equal(alone.drawn, together.drawn[i])
        np.testing.assert_array_equal(alone.trajectory.tokens, together.trajectory.tokens[i])


def test_bad_budgets():
    with pytest.raises(ValueError, match=r"k_init: expected 1 to k_max=5, got 6"):
        sequential_sampler(lm(1)[0], echo(1), while_long, num_prompts=6, k_init=6, k_max=5)
    with pytest.raises(ValueError, match=r"buckets: expected sizes from 1 to num_prompts=2 and that one, got \(2, 4\)"):
        sampler(buckets=(4, 2))


def test_first_observations_are_those_of_the_rollout():
    _, observation = first_observations(jax.random.key(3), echo(1), 6)
    np.testing.assert_array_equal(played(1).tokens[::4, : echo(1).spec.max_observation], observation.ids)
