"""Episodes on the host are those of `rollout`: in copies of compiled environments, and in a game written in Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents import (
    Sampling,
    TransformerConfig,
    host_demonstrate,
    host_rollout,
    host_sampler,
    rollout,
    score,
    transformer,
)
from rollax.envs import Environment, HostEnvironment, Step, Tokens, TokenSpec, arithmetic, on_host, persona_chat

PROMPTS, GROUP = 3, 2


@functools.cache
def lm(vocab_size):
    model = transformer(TransformerConfig(vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2))
    return model, jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, model.init(key)))(jax.random.key(0))


def same(got, wanted):
    """The trajectories are equal to the last bit wherever they mean something."""
    got, wanted = jax.device_get((got, wanted))
    real, played = wanted.positions >= 0, wanted.mask.reshape(*wanted.reward.shape, -1).any(axis=2)
    assert got._fields == wanted._fields
    for name, x, y in zip(got._fields, got, wanted, strict=True):
        if name in ("tokens", "info"):
            continue
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    np.testing.assert_array_equal(got.tokens[real], wanted.tokens[real])
    assert got.info.keys() == wanted.info.keys()
    for name, y in wanted.info.items():
        np.testing.assert_array_equal(got.info[name][played], y[played], err_msg=name)
        assert not got.info[name][~played].any(), name


@pytest.mark.slow  # the small game below has several turns and a prefix too
@pytest.mark.parametrize("name", ["several turns", "one turn", "with a prefix"])
def test_a_copy_on_the_host_plays_the_same_episodes(name):
    env = arithmetic("+", 1) if name == "one turn" else persona_chat(0.5, max_turns=3)
    model, params = lm(len(env.spec.vocab))
    options = dict(num_prompts=PROMPTS, group_size=GROUP, sampling=Sampling(temperature=0.8, top_k=9))
    if name == "with a prefix":
        options["prefix"] = jnp.array([4, 7, 1], jnp.int32)
    sample = host_sampler(model, on_host(env), **options)
    wanted = jax.jit(lambda key, params: rollout(key, model, params, env, **options))
    for seed in (3, 4):
        same(sample(jax.random.key(seed), params), wanted(jax.random.key(seed), params))


# --- A game in Python -------------------------------------------------------------------------------------------------

STOP, PAD = 10, 11
SPEC = TokenSpec((*"0123456789.", "_"), 2, 3, 3, (STOP,), PAD)


class Count:
    """Says a number n, then how many digits it heard; over after n turns, or the fourth digit. n is 1 to 4."""

    def __init__(self, number):
        self.number, self.turn, self.heard = number, 0, 0

    def step(self, digits):
        self.turn, self.heard = self.turn + 1, self.heard + len(digits)
        return self.heard % 10, float(len(digits)), self.turn == self.number or self.heard > 3


def counting(**changes):
    """The game on the host; every row a `Count`, and object arrays in its info."""
    released = []

    def write(values):
        ids, length = np.full((len(values), 2), PAD, np.int32), np.zeros(len(values), np.int32)
        for i, value in enumerate(values):
            if value is not None:
                ids[i, 0], length[i] = value, 1
        return Tokens(ids, length)

    def reset(keys):
        games = [Count(int(jax.random.randint(key, (), 1, 5))) for key in keys]
        return games, write([game.number for game in games])

    def step(keys, games, action, alive):
        rows = len(games)
        said, reward = [None] * rows, np.zeros(rows, np.float32)
        over, long = np.zeros(rows, bool), np.zeros(rows, bool)
        for i in np.flatnonzero(alive):
            digits = action[i][np.cumsum(action[i] == STOP) == 0]
            answer, reward[i], over[i] = games[i].step(digits)
            long[i] = not over[i] and games[i].turn == SPEC.max_turns
            said[i] = None if over[i] or long[i] else answer
        info = {"reward_again": reward.copy(), "texts": np.array(["x"] * rows, object)}
        return games, Step(write(said), reward, over, long, info)

    def expert(keys, games):
        return np.array([[game.number, STOP, PAD] for game in games], np.int32)

    return HostEnvironment(reset, step, SPEC, expert, released.append)._replace(**changes), released


def compiled_counting():
    """The same game as a pure function."""

    def write(value, there):
        return Tokens(jnp.where(there, jnp.array([value, PAD]), PAD).astype(jnp.int32), there.astype(jnp.int32))

    def reset(key):
        number = jax.random.randint(key, (), 1, 5)
        return (number, jnp.int32(0), jnp.int32(0)), write(number, jnp.bool_(True))

    def step(key, state, action):
        number, turn, heard = state
        digits = jnp.sum(jnp.cumsum(action == STOP) == 0)
        turn, heard = turn + 1, heard + digits
        over = (turn == number) | (heard > 3)
        long = ~over & (turn == SPEC.max_turns)
        reward = digits.astype(jnp.float32)
        info = {"reward_again": reward}
        return (number, turn, heard), Step(write(heard % 10, ~(over | long)), reward, over, long, info)

    return Environment(reset, step, SPEC)


HOW = dict(group_size=GROUP, prefix=jnp.array([4, 7, 1], jnp.int32), sampling=Sampling(temperature=0.8, top_k=9))


@functools.cache
def counted():
    """(what is played, the states that were released)."""
    env, released = counting()
    model, params = lm(12)
    return host_rollout(jax.random.key(0), model, params, env, num_prompts=4, **HOW), released


@functools.cache
def inside():
    """The same game in one program."""
    model, _ = lm(12)
    return jax.jit(lambda key, params: rollout(key, model, params, compiled_counting(), num_prompts=4, **HOW))


def test_a_game_in_python_is_played_as_its_compiled_form():
    _, params = lm(12)
    trajectory, released = counted()
    same(trajectory, inside()(jax.random.key(0), params))
    assert trajectory.terminated.any() and set(np.sum(trajectory.mask.reshape(8, 3, 5).any(2), 1).tolist()) > {1}
    assert "texts" not in trajectory.info and len(released) == 1  # the games may be used again


def test_a_copy_of_it_on_the_host_plays_the_same_episodes():
    model, params = lm(12)
    sample = host_sampler(model, on_host(compiled_counting()), num_prompts=4, **HOW)
    for seed in (3, 4):
        same(sample(jax.random.key(seed), params), inside()(jax.random.key(seed), params))


def test_it_is_scored_like_any_other():
    model, params = lm(12)
    trajectory, _ = counted()
    env, _ = counting()
    how = dict(group_size=GROUP, prefix=HOW["prefix"], temperature=HOW["sampling"].temperature)
    log_prob, _ = jax.jit(lambda params, t: score(model, params, t, env, **how))(params, trajectory)
    np.testing.assert_allclose(log_prob, trajectory.full_log_prob, atol=1e-4)


def test_workers_share_a_rollout_and_a_sampler_compiles_once():
    """Prompts 2 and 3 alone, from a sampler of two, are those of the whole."""
    model, params = lm(12)
    whole, _ = counted()
    traced = []

    def apply(*arguments):
        traced.append(len(arguments))
        return (model.hidden or model.apply)(*arguments)

    sample = host_sampler(model._replace(hidden=apply), counting()[0], num_prompts=2, **HOW)
    part = sample(jax.random.key(0), params, 2)
    for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y[4:], atol=1e-5)
    before = len(traced)
    for seed in range(1, 4):
        sample(jax.random.key(seed), params)
    assert before and len(traced) == before


def test_when_all_are_over_nothing_more_is_asked():
    """Turns that no episode reaches are padding, and the environment does not see them."""
    model, params = lm(12)
    calls = []
    env, _ = counting()

    def step(keys, games, action, alive):
        calls.append(alive.copy())
        games, step = env.step(keys, games, action, alive)
        return games, step._replace(terminated=alive, truncated=~alive)

    trajectory = host_rollout(jax.random.key(1), model, params, env._replace(step=step), num_prompts=2)
    assert len(calls) == 1 and trajectory.terminated.all() and not trajectory.truncated.any()
    assert trajectory.tokens.shape == (2, 15) and trajectory.reward.shape == (2, 3)
    assert (trajectory.positions[:, 5:] == -1).all() and (trajectory.tokens[:, 5:] == PAD).all()
    assert not trajectory.mask[:, 5:].any() and trajectory.mask[:, 2].all()


def test_a_script_is_laid_out_like_a_rollout():
    """The expert says the number and a stop in each turn; a forward pass over its episodes is an ordinary one."""
    env, released = counting()
    trajectory = jax.device_get(host_demonstrate(jax.random.key(0), env, env.expert, 5))
    assert len(released) == 1 and trajectory.tokens.shape == (5, 15)
    np.testing.assert_array_equal(trajectory.info["reward_again"], trajectory.reward)
    for row in range(5):
        number = int(trajectory.tokens[row, 0])
        turns = min(number, SPEC.max_turns)
        assert trajectory.terminated[row] == (number <= SPEC.max_turns) == (not trajectory.truncated[row])
        np.testing.assert_array_equal(trajectory.reward[row], np.arange(3) < turns)
        spoken = [number, PAD, number, STOP, PAD]
        for turn in range(3):
            at = slice(5 * turn, 5 * turn + 5)
            wanted = [*([number] if turn == 0 else [turn]), *spoken[1:]] if turn < turns else [PAD] * 5
            np.testing.assert_array_equal(trajectory.tokens[row, at], wanted)
            np.testing.assert_array_equal(trajectory.mask[row, at], [False, False, *[turn < turns] * 2, False])
            assert (trajectory.turn[row, at] == turn).all()
        real = trajectory.positions[row][trajectory.positions[row] >= 0]
        np.testing.assert_array_equal(real, np.arange(3 * turns))
    model, params = lm(12)
    log_prob, _ = jax.jit(lambda params, t: score(model, params, t, env))(params, trajectory)
    assert (np.asarray(log_prob)[trajectory.mask] < 0).all()


def test_bad_input():
    model, params = lm(12)
    env, _ = counting()
    for name in ("num_prompts", "group_size"):
        with pytest.raises(ValueError, match=rf"{name}: expected at least 1, got 0"):
            host_sampler(model, env, **{"num_prompts": 2, name: 0})

    def reset(keys):
        games, observation = env.reset(keys)
        observation.ids[3] = 7
        return games, observation

    with pytest.raises(ValueError, match=r"env.reset: expected equal observations for equal keys, got .* ids .*\[1\]"):
        host_rollout(jax.random.key(0), model, params, env._replace(reset=reset), num_prompts=3, group_size=2)
