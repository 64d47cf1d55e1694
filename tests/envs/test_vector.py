"""Every engine on any number of devices gives the same trajectories, bit for bit; auto-reset loses nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rollax.envs import (
    ControlSpec,
    Environment,
    PromptBank,
    Step,
    TokenKinds,
    arithmetic,
    cartpole,
    episode_statistics,
    prompt_bank,
    sorting,
    tail_forks,
    vectorize,
)

NUM_ENVS, NUM_STEPS = 16, 60


def random_policy(params, key, observation):
    """Pushes at random with the odds `params`; the extras show that the observation arrives."""
    return jax.random.bernoulli(key, params).astype(jnp.int32), {"angle": observation[2]}


def trajectory(environments):
    state, observation = environments.reset(jax.random.key(7))
    return environments.unroll(random_policy, NUM_STEPS)(jnp.float32(0.5), state, observation)


def raw(tree):
    def to_bytes(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return x.shape, str(x.dtype), np.asarray(x).tobytes()

    return [to_bytes(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def reference():
    return trajectory(vectorize(cartpole(), NUM_ENVS))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_devices", [1, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
@pytest.mark.parametrize("engine", ["pmap", "shard_map", "auto"])
def test_engines_agree_bitwise(reference, engine, num_devices):
    devices = jax.devices()[:num_devices]
    result = trajectory(vectorize(cartpole(), NUM_ENVS, engine=engine, devices=devices))
    assert raw(result) == raw(reference)
    if num_devices > 1:  # and the work really was spread
        assert len(result[0].env.physics.sharding.device_set) == num_devices


@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["shard_map", "auto"])
def test_a_model_parallel_mesh_changes_nothing(reference, engine):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    assert raw(trajectory(vectorize(cartpole(), NUM_ENVS, engine=engine, mesh=mesh))) == raw(reference)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["shard_map", "auto"])
def test_parameters_already_on_the_mesh(engine):
    def policy(odds, key, observation):
        return jax.random.bernoulli(key, odds[0]).astype(jnp.int32), odds[3]

    def play(environments, odds):
        run = environments.unroll(policy, 5)
        return run, run(odds, *environments.reset(jax.random.key(7)))

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    odds = jnp.asarray([0.5, 0.1, 0.2, 0.3])
    sharded = jax.device_put(odds, NamedSharding(mesh, PartitionSpec("model")))
    _, result = play(vectorize(cartpole(), 4, engine=engine, mesh=mesh), sharded)
    assert raw(result) == raw(play(vectorize(cartpole(), 4), odds)[1])
    if engine == "auto":  # the compiled program takes each device's quarter, not a copy of the whole
        seen = []

        def spy(odds, key, observation):
            jax.debug.inspect_array_sharding(odds, callback=seen.append)
            return policy(odds, key, observation)

        environments = vectorize(cartpole(), 4, engine=engine, mesh=mesh)
        environments.unroll(spy, 1)(sharded, *environments.reset(jax.random.key(7)))
        assert seen and all(s.shard_shape((4,)) == (1,) for s in seen)


def tiny_bank():
    bank = PromptBank(np.array([[1, 2], [2, 2]]), np.array([1, 2]), np.array([[1], [2]]), np.array([1, 1]))
    stop, no = np.array([True, False, False]), np.zeros(3, bool)
    return prompt_bank(bank, TokenKinds(stop, no, no, no), ("<end>", "a", "b"), max_action=3)


# Without countdown, whose machine takes each engine three seconds to compile.
TOKEN_ENVIRONMENTS = {
    "arithmetic": lambda: arithmetic("+-", 2),
    "prompts": tiny_bank,
    "sorting": sorting,
    "tail_forks": tail_forks,
}


@pytest.mark.timeout(120)
# One stands for the others, whose programs are larger.
@pytest.mark.parametrize(
    "name", ["prompts", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sorting", "tail_forks", "arithmetic"))]
)
def test_single_steps_agree_bitwise_on_token_environments(name):
    environment = TOKEN_ENVIRONMENTS[name]()
    expert = jax.jit(jax.vmap(environment.expert, in_axes=(None, 0)))

    def play(environments):
        state, observation = environments.reset(jax.random.key(3))
        results = [observation]
        for wrong in range(3):  # the second reply and the third are wrong more and more often
            action = expert(jax.random.key(5), state.env)
            action = jnp.where(jnp.arange(NUM_ENVS)[:, None] % 3 < wrong, 0, action)
            state, step = environments.step(state, action)
            results.append((state, step))
        return results

    expected = raw(play(vectorize(environment, NUM_ENVS)))
    for engine in ("pmap", "shard_map", "auto"):
        assert raw(play(vectorize(environment, NUM_ENVS, engine=engine, devices=jax.devices()[:2]))) == expected, engine


@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["shard_map", "auto"])
def test_mesh_engines_work_inside_jit_and_scan(reference, engine):
    @jax.jit
    def run(key):
        state, observation = environments.reset(key)

        def body(carry, _):
            state, observation = carry
            # The same use of the streams as in unroll, so that the trajectory must be the reference's.
            stream, key = jax.vmap(jax.random.split, out_axes=1)(state.key)
            action, _ = jax.vmap(random_policy, in_axes=(None, 0, 0))(jnp.float32(0.5), key, observation)
            state, step = environments.step(state._replace(key=stream), action)
            return (state, step.observation), step

        return jax.lax.scan(body, (state, observation), None, length=NUM_STEPS)[1]

    environments = vectorize(cartpole(), NUM_ENVS, engine=engine)
    assert raw(run(jax.random.key(7))) == raw(reference[2].step)


def test_environments_do_not_depend_on_how_many_there_are(reference):
    # Streams come from the global index alone: the first eight of sixteen are the first eight of eight.
    state, observation = vectorize(cartpole(), 8).reset(jax.random.key(7))
    start = vectorize(cartpole(), NUM_ENVS).reset(jax.random.key(7))
    assert raw((state, observation)) == raw(jax.tree.map(lambda x: x[:8], start))
    assert len({row.tobytes() for row in np.asarray(start[1])}) == NUM_ENVS


class CountState(NamedTuple):
    time: jax.Array
    stop_at: jax.Array


def counter(max_steps=5):
    """Observes its clock; terminates at a random time unless the limit truncates it; step t pays t."""

    def reset(key):
        state = CountState(jnp.int32(0), jax.random.randint(key, (), 2, 9))
        return state, state.time

    def step(key, state, action):
        del key
        state = state._replace(time=state.time + 1)
        terminated = state.time >= state.stop_at
        truncated = (state.time >= max_steps) & ~terminated
        return state, Step(state.time, state.time * action, terminated, truncated, {"stop_at": state.stop_at})

    return Environment(reset, step, ControlSpec((), 2, max_steps))


@pytest.fixture(scope="module")
def counted():
    environments = vectorize(counter(), 64)

    @jax.jit  # the vmap engine inside the user's own jit and scan
    def run(key):
        def body(state, _):
            return environments.step(state, jnp.ones(64))

        state, observation = environments.reset(key)
        return observation, jax.lax.scan(body, state, None, length=23)

    return run(jax.random.key(0))


def test_auto_reset_keeps_the_final_observation_and_the_statistics(counted):
    observation, (state, steps) = counted
    steps = jax.tree.map(np.asarray, steps)
    time, done = np.zeros(64, int), np.asarray(steps.done)
    assert np.all(np.asarray(observation) == 0)
    for t in range(23):
        time += 1
        np.testing.assert_array_equal(steps.final_observation[t], time)
        np.testing.assert_array_equal(steps.observation[t], np.where(done[t], 0, time))
        np.testing.assert_array_equal(steps.episode_length[t], time)
        np.testing.assert_array_equal(steps.episode_return[t], time * (time + 1) / 2)
        np.testing.assert_array_equal(steps.terminated[t], time >= steps.info["stop_at"][t])
        np.testing.assert_array_equal(steps.truncated[t], (time >= 5) & (time < steps.info["stop_at"][t]))
        time[done[t]] = 0
    np.testing.assert_array_equal(state.episode_length, time)
    assert steps.terminated.any() and steps.truncated.any() and not (steps.terminated & steps.truncated).any()
    # A new episode is a new draw.
    assert len({tuple(row) for row in steps.info["stop_at"].T}) > 32


def test_statistics_average_finished_episodes_only(counted):
    _, (_, steps) = counted
    statistics = jax.jit(episode_statistics)(steps)
    done = np.asarray(steps.done)
    assert statistics["episodes"] == done.sum()
    np.testing.assert_allclose(statistics["episode_length"], np.asarray(steps.episode_length)[done].mean(), rtol=1e-6)
    np.testing.assert_allclose(statistics["episode_return"], np.asarray(steps.episode_return)[done].mean(), rtol=1e-6)
    nothing = episode_statistics(jax.tree.map(lambda x: x[:1], steps))
    assert nothing["episodes"] == 0 and np.isnan(nothing["episode_return"]) and np.isnan(nothing["episode_length"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"engine": "gpu"}, "engine must be one of"),
        ({"engine": "pmap", "num_envs": 9}, "multiple of the 8 devices"),
        ({"engine": "auto", "num_envs": 9}, "multiple of the 8 devices"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"num_envs": 16.0}, "num_envs must be at least 1 and an integer, got 16.0"),
        ({"engine": "vmap", "devices": [None]}, "one device"),
        ({"engine": "pmap", "devices": []}, "multiple of the 0 devices"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        vectorize(counter(), **{"num_envs": 16} | arguments)


def test_bad_meshes():
    mesh = jax.make_mesh((8,), ("model",))
    with pytest.raises(ValueError, match="axis must name an axis of the mesh"):
        vectorize(counter(), 16, engine="auto", mesh=mesh)
    explicit = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    for engine in ("shard_map", "auto"):
        with pytest.raises(ValueError, match=r"axis_types=\(AxisType.Auto,\) \* 2"):
            vectorize(counter(), 16, engine=engine, mesh=explicit)
    with pytest.raises(ValueError, match="mesh excludes"):
        vectorize(counter(), 16, engine="pmap", mesh=mesh)
    with pytest.raises(ValueError, match="num_steps"):
        vectorize(counter(), 16).unroll(random_policy, 0)
