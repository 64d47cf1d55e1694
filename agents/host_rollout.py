"""Episodes of a language model in environments that no program can hold, with the policy of `rollout` and its result.

What the policy does is compiled once; between two calls of it N environments step on the host (`envs.host`: games in
Python, and any compiled environment as one of them). Keys are those of `rollout`: in a copy on the host of a compiled
environment the two play the same episodes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.generation import Sampling
from rollax.agents.language_model import LanguageModel, repeat_rows
from rollax.agents.rollout import Episodes, Trajectory, as_trajectory, language_policy


def host_sampler(
    model: LanguageModel,
    env,
    *,
    num_prompts: int,
    group_size: int = 1,
    sampling: Sampling | None = None,
    prefix: jax.Array | None = None,
    early_exit: bool = True,
) -> Callable[..., Trajectory]:
    """`sample(key, params, first=0) -> Trajectory`: what `rollout` returns, of an environment on the host.

    Make it once and call it often: a call compiles nothing new. Row `p * group_size + g` is sample g of prompt
    `first + p`, whose start and keys depend on that number alone, so that several workers can share a rollout.

    Args:
      env: N environments on the host (`envs.host`): `reset(keys)`, `step(keys, state, action, alive)`, `release(state)`
        and a `spec`. Rows of a group are reset with the same key and must show the same first observation.
      num_prompts, group_size, sampling, prefix, early_exit: see `rollout`; none of them is an argument of `sample`.

    Returns:
      The sampler. In a trajectory, tokens at padding are `pad_id` or what the policy was shown; `info` has the
      environment's arrays of numbers, 0 after the end, and not those of objects.

    Raises:
      ValueError: sizes below 1; from `sample`, a group that does not begin alike.
    """
    for name, value in {"num_prompts": num_prompts, "group_size": group_size}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    spec = env.spec
    policy = functools.partial(
        language_policy, model, spec=spec, sampling=sampling, prefix=prefix, early_exit=early_exit
    )

    def apart(action, memory, record):
        """The cache, most of the memory, taken out of it, so that the next turn may change it in place."""
        context = memory.context
        return action, record, context.cache, memory._replace(context=context._replace(cache=None))

    @jax.jit
    def first_turn(params, observation, keys, alive):
        own = policy(params)
        action, memory, record = own.act(keys, repeat_rows(own.begin(observation), group_size), alive)
        return apart(action, own.grow(memory, spec.max_turns), record)

    @functools.partial(jax.jit, donate_argnums=1)
    def next_turn(params, cache, memory, observation, keys, alive):
        own, memory = policy(params), memory._replace(context=memory.context._replace(cache=cache))
        return apart(*own.act(keys, own.see(memory, observation, alive), alive))

    def sample(key, params, first=0):
        reset_keys, sample_keys, step_keys = keys_of(key, first, num_prompts, group_size, spec.max_turns)
        state, observation = env.reset(reset_keys)
        check_groups(observation, group_size)
        starts = jax.tree.map(lambda x: x[::group_size], observation)
        alive, kept = np.ones(num_prompts * group_size, bool), []
        for turn in range(spec.max_turns):
            if turn == 0:
                action, record, *memory = first_turn(params, starts, sample_keys[0], alive)
            else:
                action, record, *memory = next_turn(params, *memory, observation, sample_keys[turn], alive)
            state, step = env.step(step_keys[turn], state, np.asarray(action), alive)
            kept.append(turn_of(record, alive, step))
            observation, alive = step.observation, alive & ~(step.terminated | step.truncated)
            if not alive.any():
                break
        env.release(state)
        return side_by_side(kept, spec)

    return sample


def host_rollout(key: jax.Array, model: LanguageModel, params, env, **options) -> Trajectory:
    """`rollout` in an environment on the host: a `host_sampler` that is used once, and compiled for that."""
    return host_sampler(model, env, **options)(key, params)


def host_demonstrate(key: jax.Array, env, act: Callable[[jax.Array, Any], np.ndarray], num_episodes: int) -> Trajectory:
    """Episodes by a script in an environment on the host: what a supervised loss is computed on.

    Args:
      env: as for `host_sampler`.
      act: `act(keys [N], state) -> action int32 [N, A]`, for example `env.expert`.

    Returns:
      N episodes in the form that `rollout` returns, rewards and info included; log-probs are 0.
    """
    spec, rows = env.spec, num_episodes
    reset_keys, act_keys, step_keys = keys_of(key, 0, rows, 1, spec.max_turns)
    state, observation = env.reset(reset_keys)
    alive, begin, kept = np.ones(rows, bool), np.zeros(rows, np.int32), []

    def place(counts, width):
        """Positions of the next tokens, `counts` of `width` in each row."""
        nonlocal begin
        index = np.arange(width)
        positions = np.where(alive[:, None] & (index < counts[:, None]), begin[:, None] + index, -1)
        begin = np.maximum(begin, positions.max(axis=1) + 1)
        return positions.astype(np.int32)

    for turn in range(spec.max_turns):
        action = np.where(alive[:, None], act(act_keys[turn], state), spec.pad_id).astype(np.int32)
        stops = np.isin(action, spec.stop_ids)
        own = alive[:, None] & (np.cumsum(stops, axis=1) - stops == 0)  # up to the first stop token and with it
        seen = place(observation.length, spec.max_observation)
        positions = np.concatenate([seen, place(own.sum(axis=1), spec.max_action)], axis=1)
        blank = np.zeros(positions.shape, np.float32)
        record = dict(
            tokens=np.concatenate([observation.ids, np.where(own, action, spec.pad_id)], axis=1),
            positions=positions,
            mask=np.concatenate([seen < -1, own], axis=1),
            log_prob=blank,
            full_log_prob=blank,
        )
        state, step = env.step(step_keys[turn], state, action, alive)
        kept.append(turn_of(record, alive, step))
        observation, alive = step.observation, alive & ~(step.terminated | step.truncated)
        if not alive.any():
            break
    env.release(state)
    return side_by_side(kept, spec)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def keys_of(key, first, num_prompts: int, group_size: int, turns: int):
    """Of the starts `[N]`, of the samples and of the environments' steps `[K, N]`, as `play` makes them."""
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    prompt = first + jnp.repeat(jnp.arange(num_prompts), group_size)
    row = prompt * group_size + jnp.tile(jnp.arange(group_size), num_prompts)
    reset_key, *keys = jax.random.split(key, 3)
    at_turn = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(None, 0))
    return fold_in(reset_key, prompt), *(at_turn(fold_in(key, row), jnp.arange(turns)) for key in keys)


def turn_of(record, alive: np.ndarray, step):
    """What is kept of a turn; texts and other objects are not."""
    info = {name: x for name, x in step.info.items() if x.dtype != object}
    return record, alive, step.reward, alive & step.terminated, alive & step.truncated, info


def side_by_side(kept, spec) -> Trajectory:
    """A trajectory of the turns that were played; those that all episodes lack are padding."""
    missing = [jax.tree.map(jnp.zeros_like, kept[0])] * (spec.max_turns - len(kept))
    return _side_by_side([*kept, *missing], len(kept), spec._replace(vocab=()))


@functools.partial(jax.jit, static_argnums=2)
def _side_by_side(kept, played, spec):
    record, *rest = jax.tree.map(lambda *turns: jnp.stack(turns, axis=1), *kept)
    over = jnp.arange(spec.max_turns)[:, None] >= played
    record["tokens"] = jnp.where(over, spec.pad_id, record["tokens"])
    record["positions"] = jnp.where(over, -1, record["positions"])
    mask, reward, terminated, truncated, info = rest
    reward = jnp.where(mask, reward, 0.0).astype(jnp.float32)
    return as_trajectory(Episodes(record, mask, reward, terminated.any(axis=1), truncated.any(axis=1), info), spec)


def check_groups(observation, group_size: int) -> None:
    """Raises ValueError where rows of a group do not begin with the same observation."""
    for name, x in zip(("ids", "length"), observation, strict=True):
        groups = np.reshape(x, (-1, group_size, *np.shape(x)[1:]))
        alike = (groups == groups[:, :1]).reshape(len(groups), -1).all(axis=1)
        if not alike.all():
            raise ValueError(
                f"env.reset: expected equal observations for equal keys, got different {name} in the groups "
                f"{np.flatnonzero(~alike).tolist()}"
            )
