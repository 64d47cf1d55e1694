"""Many copies of an environment in lock step: vmap on a device, and over devices pmap, shard_map or automatic sharding.

The classic PureJaxRL pattern (vectorised reset and step, auto-reset inside the program) with one key stream per
*global* environment index, so that a trajectory depends neither on the engine nor on the number of devices. `N`
environments, `T` time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rollax.envs.environment import Environment

ENGINES = ("vmap", "pmap", "shard_map", "auto")


class VectorState(NamedTuple):
    """State of N environments; every leaf has N as leading axis, whatever the engine, so engines can be swapped.

    Attributes:
      env: the environments' own states.
      key: typed keys `[N]`, the stream of each environment; it travels with the state and so with a checkpoint.
      episode_return: float32 `[N]`, rewards of the running episode so far.
      episode_length: int32 `[N]`, steps of the running episode so far.
    """

    env: Any
    key: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array


class VectorStep(NamedTuple):
    """A transition of N environments: the fields of `Step`, and what auto-reset would otherwise lose.

    Attributes:
      observation: what to act on next; after an end, the first observation of the next episode.
      reward: float32 `[N]`.
      terminated: bool `[N]`, the task ended: nothing to bootstrap from.
      truncated: bool `[N]`, time ran out: bootstrap from `final_observation`.
      info: the environments' info, `[N, ...]`.
      final_observation: what this transition led to, before any reset; equals `observation` where nothing ended.
      episode_return: float32 `[N]`, rewards of the episode up to and with this step; final where the episode ended.
      episode_length: int32 `[N]`, its steps, likewise.
    """

    observation: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]
    final_observation: Any
    episode_return: jax.Array
    episode_length: jax.Array

    @property
    def done(self) -> jax.Array:
        """bool `[N]`: the episode ended, for whichever reason."""
        return self.terminated | self.truncated


class Transition(NamedTuple):
    """One acting step inside `unroll`: what was seen, what was done (and the policy's extras), what came of it."""

    observation: Any
    action: Any
    extras: Any
    step: VectorStep


class VectorEnvironment(NamedTuple):
    """N environments as functions, compiled.

    Attributes:
      reset: `reset(key) -> (VectorState, observation[N, ...])`.
      step: `step(state, action[N, ...]) -> (VectorState, VectorStep)`; what ended starts anew.
      unroll: `unroll(policy, num_steps) -> run`, with `run(params, state, observation) -> (state, observation,
        Transition[T, N, ...])`: the policy scanned inside the engine. `policy(params, key, observation) -> (action,
        extras)` acts for ONE environment; its keys come from the environments' own streams. Keep `run`, it is compiled.
      environment: the single environment.
      num_envs: N.
    """

    reset: Callable[[jax.Array], tuple[VectorState, Any]]
    step: Callable[[VectorState, Any], tuple[VectorState, VectorStep]]
    unroll: Callable[..., Callable[..., tuple[VectorState, Any, Transition]]]
    environment: Environment
    num_envs: int


def vectorize(
    environment: Environment,
    num_envs: int,
    *,
    engine: str = "vmap",
    devices: Sequence[jax.Device] | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> VectorEnvironment:
    """Run `num_envs` copies of an environment with auto-reset, on one device or many.

    Environment i draws from `fold_in(key, i)` alone: every engine on any number of devices gives bitwise the same
    trajectories, as long as the environment (and, in `unroll`, the policy) computes each row alike at any batch size.

    Args:
      environment: a single environment (`envs.environment`).
      num_envs: N, a multiple of the number of devices.
      engine: "vmap" (one device; free to use inside jit, scan, vmap or another mesh), "pmap" (the classic form; steps
        and unrolls from Python), "shard_map" (manual over every axis of the mesh: every device computes with the
        whole of the policy's parameters, however they come) or "auto" (jit with NamedSharding; the policy's parameters
        keep the sharding they come with: the choice for model-parallel ones). The last two also work inside jit and
        scan.
      devices: the devices to spread over (default: all); not with "vmap" or `mesh`.
      mesh: instead of devices, a mesh of Auto axes that may have other axes than `axis`, for "shard_map" and "auto".
      axis: the mesh axis that carries environments.

    Raises:
      ValueError: unknown engine, N not a positive integer or not divisible by the devices, a mesh without `axis` or
        with axes that are not Auto, or devices or a mesh given to an engine that has no use for them.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    if not isinstance(num_envs, int | np.integer) or num_envs < 1:
        raise ValueError(f"num_envs must be at least 1 and an integer, got {num_envs!r}")
    if engine == "vmap" and (devices is not None or mesh is not None):
        raise ValueError('engine="vmap" runs on one device: devices and mesh must be None')
    if mesh is not None and (devices is not None or engine == "pmap"):
        raise ValueError(f'mesh excludes devices and engine="pmap", got devices={devices} and engine={engine!r}')

    split = _distribute(num_envs, engine, devices, mesh, axis)
    reset_rows = split(_reset_rows(environment), in_axes=(None, 0), out_axes=(0, 0))
    step = split(_step_rows(environment), in_axes=(0, 0), out_axes=(0, 0))

    def reset(key):
        return reset_rows(key, jnp.arange(num_envs))

    def unroll(policy, num_steps):
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return split(_unroll_rows(environment, policy, num_steps), in_axes=(None, 0, 0), out_axes=(0, 0, 1))

    return VectorEnvironment(reset, step, unroll, environment, num_envs)


def episode_statistics(steps: VectorStep) -> dict[str, jax.Array]:
    """Mean return and length over the episodes that *finished* in `steps` (any leading axes); NaN where none did.

    Returns:
      dict of float32 scalars `episodes` (how many finished), `episode_return`, `episode_length` (steps).
    """
    done = steps.done.astype(jnp.float32)
    episodes = done.sum()

    def mean(values):
        return jnp.where(episodes > 0, (values * done).sum() / jnp.maximum(episodes, 1.0), jnp.nan)

    return {
        "episodes": episodes,
        "episode_return": mean(steps.episode_return),
        "episode_length": mean(steps.episode_length.astype(jnp.float32)),
    }


def _reset_rows(environment):
    def reset_row(key, index):
        stream, reset_key = jax.random.split(jax.random.fold_in(key, index))
        state, observation = environment.reset(reset_key)
        return VectorState(state, stream, jnp.float32(0.0), jnp.int32(0)), observation

    return jax.vmap(reset_row, in_axes=(None, 0))


def _step_rows(environment):
    def step_row(state, action):
        # The keys of split(key, 3), one by one: what an environment does not use is never computed.
        stream, step_key, reset_key = (jax.random.fold_in(state.key, i) for i in range(3))
        env_state, step = environment.step(step_key, state.env, action)
        done = step.terminated | step.truncated
        # Under vmap a cond runs both branches anyway, so the fresh episode is always drawn and selected.
        fresh = environment.reset(reset_key)
        env_state, observation = jax.tree.map(
            lambda new, old: jnp.where(done, new, old), fresh, (env_state, step.observation)
        )
        episode_return = state.episode_return + step.reward
        episode_length = state.episode_length + 1
        state = VectorState(env_state, stream, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length))
        return state, VectorStep(
            observation=observation,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            info=step.info,
            final_observation=step.observation,
            episode_return=episode_return,
            episode_length=episode_length,
        )

    return jax.vmap(step_row)


def _unroll_rows(environment, policy, num_steps):
    step_rows = _step_rows(environment)

    def act_row(params, stream, observation):
        stream, key = jax.random.split(stream)
        return stream, policy(params, key, observation)

    def unroll_rows(params, state, observation):
        def body(carry, _):
            state, observation = carry
            stream, (action, extras) = jax.vmap(act_row, in_axes=(None, 0, 0))(params, state.key, observation)
            state, step = step_rows(state._replace(key=stream), action)
            return (state, step.observation), Transition(observation, action, extras, step)

        (state, observation), transitions = jax.lax.scan(body, (state, observation), None, length=num_steps)
        return state, observation, transitions

    return unroll_rows


def _distribute(num_envs, engine, devices, mesh, axis):
    """`split(function, in_axes, out_axes)`: None marks an argument every device has whole, a number its axis of N."""
    if engine == "vmap":
        return lambda function, in_axes, out_axes: jax.jit(function)

    if mesh is None:
        devices = list(jax.devices() if devices is None else devices)
        num_devices = len(devices)
        mesh = Mesh(np.asarray(devices), (axis,))
    elif axis not in mesh.axis_names:
        raise ValueError(f"axis must name an axis of the mesh, {mesh.axis_names}, got {axis!r}")
    elif any(kind != AxisType.Auto for kind in mesh.axis_types):
        how = f"jax.make_mesh(..., axis_types=(AxisType.Auto,) * {len(mesh.axis_names)})"
        raise ValueError(f"mesh must have Auto axes, as of {how}, got {mesh.axis_types}")
    else:
        num_devices = mesh.shape[axis]
    if num_devices < 1 or num_envs % num_devices:
        raise ValueError(f"num_envs must be a multiple of the {num_devices} devices, got {num_envs}")

    def specs(axes):
        return tuple(PartitionSpec() if at is None else PartitionSpec(*(None,) * at, axis) for at in axes)

    def split_pmap(function, in_axes, out_axes):
        compiled = jax.pmap(function, axis_name=axis, in_axes=in_axes, out_axes=out_axes, devices=devices)

        def fold(x, at):
            return x.reshape(*x.shape[:at], num_devices, num_envs // num_devices, *x.shape[at + 1 :])

        def unfold(x, at):
            return x.reshape(*x.shape[:at], num_envs, *x.shape[at + 2 :])

        def run(*args):
            return _map_split(unfold, out_axes, compiled(*_map_split(fold, in_axes, args)))

        return run

    def split_shard_map(function, in_axes, out_axes):
        in_specs, out_specs = specs(in_axes), specs(out_axes)
        # Environments may start a scan's carry from constants, which the check of varying axes would refuse.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        compiled = jax.jit(mapped)
        shardings = tuple(NamedSharding(mesh, spec) for spec in in_specs)
        return lambda *args: compiled(*(jax.device_put(x, at) for x, at in zip(args, shardings, strict=True)))

    def split_auto(function, in_axes, out_axes):
        compiled = jax.jit(function, out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs(out_axes)))

        def place(x, at):
            return jax.device_put(x, NamedSharding(mesh, *specs((at,))))

        # What is not split (the parameters) keeps the sharding it comes with, model-parallel ones included.
        return lambda *args: compiled(*_map_split(place, in_axes, args))

    return {"pmap": split_pmap, "shard_map": split_shard_map, "auto": split_auto}[engine]


def _map_split(function, axes, values):
    """`function(leaf, axis)` over the leaves of each value that is split; the others as they are."""
    return tuple(
        value if at is None else jax.tree.map(lambda x, at=at: function(x, at), value)
        for value, at in zip(values, axes, strict=True)
    )
