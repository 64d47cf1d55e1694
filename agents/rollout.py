"""Episodes of a policy in an environment, single- or multi-turn, inside one program.

`play` is the loop for any policy (a language model or an ordinary one) and any environment. For language models
`rollout` returns what was played as tokens in, tokens out (ids, positions and masks; nothing is decoded or encoded on
the way), and `score` gives the log-probs of the same tokens with gradients; that the two agree is a test.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rollax.agents.generation import Sampling, decode, padded_positions, prefill, start
from rollax.agents.language_model import LanguageModel, features, log_prob_and_entropy, repeat_rows


class Policy(NamedTuple):
    """How something with a memory acts in N environments at once.

    Attributes:
      begin: `begin(observation [P, ...]) -> memory [P, ...]`, of first observations, one per start.
      see: `see(memory, observation, alive [N]) -> memory`, of the observations that follow.
      act: `act(keys [N], memory, alive) -> (action [N, ...], memory, record [N, ...])`; the record is kept.
    """

    begin: Callable[[Any], Any]
    see: Callable[[Any, Any, jax.Array], Any]
    act: Callable[[jax.Array, Any, jax.Array], tuple[Any, Any, Any]]


class Episodes(NamedTuple):
    """N episodes of at most K steps; nothing counts after an episode's end.

    Attributes:
      record: what the policy kept of each step, `[N, K, ...]`.
      mask: bool `[N, K]`, the step belongs to the episode.
      reward: float32 `[N, K]`, 0 after the end.
      terminated, truncated: bool `[N]`, how the episode ended.
      info: the environment's info of each step, `[N, K, ...]`.
    """

    record: Any
    mask: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]


def reactive(act: Callable[[jax.Array, Any], tuple[Any, Any]]) -> Policy:
    """An ordinary policy without memory: `act(key, observation) -> (action, extras)` for ONE environment.

    Its record is `(observation, action, extras)`.
    """

    def act_rows(keys, observation, alive):
        action, extras = jax.vmap(act)(keys, observation)
        return action, observation, (observation, action, extras)

    return Policy(
        begin=lambda observation: observation, see=lambda memory, observation, alive: observation, act=act_rows
    )


def play(key: jax.Array, env, policy: Policy, *, num_starts: int, num_steps: int, group_size: int = 1) -> Episodes:
    """Plays `num_starts` starts `group_size` times each; row `p * group_size + g` is sample g of start p.

    Args:
      env: `reset(key) -> (state, observation)` and `step(key, state, action) -> (state, Step)` (`rollax.envs`).
      num_steps: K; an episode that is longer is cut, neither terminated nor truncated.
    """
    rows = num_starts * group_size
    reset_key, sample_key, step_key = jax.random.split(key, 3)
    keys_of = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    state, observation = jax.vmap(env.reset)(keys_of(reset_key, jnp.arange(num_starts)))
    sample_keys = keys_of(sample_key, jnp.arange(rows))
    step_keys = keys_of(step_key, jnp.arange(rows))
    at_step = jax.vmap(jax.random.fold_in, in_axes=(0, None))

    def act(index, memory, state, alive):
        action, memory, record = policy.act(at_step(sample_keys, index), memory, alive)
        state, step = jax.vmap(env.step)(at_step(step_keys, index), state, action)
        terminated, truncated = alive & step.terminated, alive & step.truncated
        kept = (record, alive, jnp.where(alive, step.reward, 0.0), terminated, truncated, step.info)
        return (memory, state, step.observation, alive & ~(terminated | truncated)), kept

    def see_and_act(carry, index):
        memory, state, observation, alive = carry
        return act(index, policy.see(memory, observation, alive), state, alive)

    # A group shares its start, and so what its policy makes of the first observation.
    memory, state = repeat_rows((policy.begin(observation), state), group_size)
    carry, kept = act(0, memory, state, jnp.ones(rows, bool))
    kept = jax.tree.map(lambda x: x[:, None], kept)
    if num_steps > 1:
        _, rest = jax.lax.scan(see_and_act, carry, jnp.arange(1, num_steps))
        kept = jax.tree.map(lambda x, y: jnp.concatenate([x, jnp.moveaxis(y, 0, 1)], axis=1), kept, rest)
    record, mask, reward, terminated, truncated, info = kept
    return Episodes(record, mask, reward, terminated.any(axis=1), truncated.any(axis=1), info)


class Trajectory(NamedTuple):
    """N episodes of K turns. A turn is T observation columns, then A action columns: S = K * (T + A).

    Attributes:
      tokens: int32 `[N, S]`.
      positions: int32 `[N, S]`, -1 on padding and on turns after the end.
      mask: bool `[N, S]`, the policy's own tokens.
      turn: int32 `[N, S]`, the turn a column belongs to.
      log_prob: float32 `[N, S]`, nats, of own tokens under the distribution that sampled them; 0 elsewhere.
      full_log_prob: the same without top-k and top-p truncation.
      reward: float32 `[N, K]`, 0 after the end.
      terminated, truncated: bool `[N]`, how the episode ended.
      info: the environment's info of each turn, `[N, K, ...]`.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    turn: jax.Array
    log_prob: jax.Array
    full_log_prob: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]


class Memory(NamedTuple):
    """What a language model remembers: its context, the observation just seen, the last sampled column."""

    context: Any
    ids: jax.Array
    positions: jax.Array
    sampled: tuple[jax.Array, jax.Array] | None


def language_policy(
    model: LanguageModel,
    params,
    spec,
    *,
    sampling: Sampling | None = None,
    prefix: jax.Array | None = None,
    early_exit: bool = True,
) -> Policy:
    """A language model as a policy; its record is the columns of one turn of a `Trajectory`."""
    width = spec.max_observation

    def begin(observation):
        slots = spec.max_turns * (width + spec.max_action)
        cache, first = start(model, params, observation.ids.shape[0], slots, prefix)
        positions = padded_positions(observation.length, width, first)
        return Memory(
            prefill(model, params, observation.ids, positions, cache, first), observation.ids, positions, None
        )

    def see(memory, observation, alive):
        context = memory.context
        positions = jnp.where(alive[:, None], padded_positions(observation.length, width, context.position), -1)
        # The last sampled column has not been fed yet: it goes in with the observation (see `decode`).
        ids, at = (
            jnp.concatenate([last, new], axis=1)
            for last, new in zip(memory.sampled, (observation.ids, positions), strict=True)
        )
        context = prefill(model, params, ids, at, context.cache, context.position)
        return Memory(context, observation.ids, positions, memory.sampled)

    def act(keys, memory, alive):
        generation, context = decode(
            model,
            params,
            keys,
            memory.context,
            max_new_tokens=spec.max_action,
            stop_ids=spec.stop_ids,
            pad_id=spec.pad_id,
            sampling=sampling,
            active=alive,
            early_exit=early_exit,
        )
        positions = padded_positions(generation.mask.sum(axis=1), spec.max_action, memory.context.position)
        blank = jnp.zeros(memory.ids.shape, jnp.float32)
        record = dict(
            tokens=jnp.concatenate([memory.ids, generation.tokens], axis=1),
            positions=jnp.concatenate([memory.positions, positions], axis=1),
            mask=jnp.concatenate([blank > 0, generation.mask], axis=1),
            log_prob=jnp.concatenate([blank, generation.log_prob], axis=1),
            full_log_prob=jnp.concatenate([blank, generation.full_log_prob], axis=1),
        )
        sampled = (generation.tokens[:, -1:], positions[:, -1:])
        return generation.tokens, Memory(context, memory.ids, memory.positions, sampled), record

    return Policy(begin, see, act)


def rollout(
    key: jax.Array,
    model: LanguageModel,
    params,
    env,
    *,
    num_prompts: int,
    group_size: int = 1,
    sampling: Sampling | None = None,
    prefix: jax.Array | None = None,
    early_exit: bool = True,
) -> Trajectory:
    """Episodes of a language model: `play` with `language_policy`, its turns side by side as columns of tokens.

    Args:
      env: an environment of tokens (`rollax.envs`): `reset(key)`, `step(key, state, action)` and a `spec` with
        `max_observation` (T), `max_action` (A), `max_turns` (K), `stop_ids`, `pad_id`.
      sampling, prefix, early_exit: see `agents.generation`.
    """
    spec = env.spec
    policy = language_policy(model, params, spec, sampling=sampling, prefix=prefix, early_exit=early_exit)
    played = play(key, env, policy, num_starts=num_prompts, num_steps=spec.max_turns, group_size=group_size)
    rows = num_prompts * group_size
    turn = jnp.repeat(jnp.arange(spec.max_turns, dtype=jnp.int32), spec.max_observation + spec.max_action)
    return Trajectory(
        **{name: x.reshape(rows, -1) for name, x in played.record.items()},
        turn=jnp.broadcast_to(turn, (rows, turn.size)),
        reward=played.reward,
        terminated=played.terminated,
        truncated=played.truncated,
        info=played.info,
    )


def demonstrate(key: jax.Array, env, act: Callable, num_episodes: int) -> Trajectory:
    """Episodes of one turn by a script, in the form that `rollout` returns: what a supervised loss is computed on.

    Args:
      env: as in `rollout`; it is reset, never stepped, so rewards are 0 and info is empty.
      act: `act(key, state) -> ids [A]`, for example `env.expert`.
    """
    spec = env.spec
    keys = jax.vmap(jax.random.split)(jax.random.split(key, num_episodes))
    state, observation = jax.vmap(env.reset)(keys[:, 0])
    action = jax.vmap(act)(keys[:, 1], state)
    stops = jnp.isin(action, jnp.asarray(spec.stop_ids, jnp.int32))
    own = jnp.cumsum(stops, axis=1) - stops == 0  # up to the first stop token and with it
    positions = padded_positions(observation.length, spec.max_observation)
    positions = jnp.concatenate(
        [positions, padded_positions(own.sum(axis=1), spec.max_action, observation.length)], axis=1
    )
    blank = jnp.zeros(positions.shape, jnp.float32)
    return Trajectory(
        tokens=jnp.concatenate([observation.ids, action], axis=1),
        positions=positions,
        mask=jnp.concatenate([jnp.zeros(observation.ids.shape, bool), own], axis=1),
        turn=blank.astype(jnp.int32),
        log_prob=blank,
        full_log_prob=blank,
        reward=jnp.zeros((num_episodes, 1), jnp.float32),
        terminated=jnp.ones(num_episodes, bool),
        truncated=jnp.zeros(num_episodes, bool),
        info={},
    )


def score(
    model: LanguageModel,
    params,
    trajectory: Trajectory,
    env,
    *,
    group_size: int = 1,
    temperature: jax.Array | float = 1.0,
    prefix: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the policy's own tokens and the entropies of the distributions that they came from, with gradients.

    The first observation is computed once per group and the prefix once in all, exactly: the rows share their keys and
    values, and so the gradients. A group is `group_size` rows in a row that begin with the same observation.

    Returns:
      (log_prob, entropy), float32 `[N, S]`, nats, 0 outside `trajectory.mask`.
    """
    spec = env.spec
    rows, slots = trajectory.tokens.shape
    width = spec.max_observation
    if rows % group_size:
        raise ValueError(f"group_size: expected a divisor of the {rows} rows, got {group_size}")

    starts = jax.tree.map(lambda x: x[::group_size, :width], (trajectory.tokens, trajectory.positions))
    dense = model._replace(prefill=None)  # a sampler's sparse prefill is no part of the policy that is trained
    cache, _ = start(dense, params, rows // group_size, slots, prefix)
    hidden, cache = features(model, params, *starts, cache)
    last = jnp.argmax(starts[1], axis=1)[:, None, None]
    opening = jnp.repeat(jnp.take_along_axis(hidden, last, axis=1), group_size, axis=0)

    tokens, positions, mask = (x[:, width:] for x in (trajectory.tokens, trajectory.positions, trajectory.mask))
    following = opening[:, :0]
    if tokens.shape[1] > 1:
        fed = (tokens[:, :-1], positions[:, :-1])
        following, _ = features(model, params, *fed, repeat_rows(cache, group_size))
    hidden = jnp.concatenate([opening, following], axis=1)
    # A token is predicted at the last real slot before it, which padding may separate from it.
    real = jnp.concatenate([jnp.ones((rows, 1), bool), positions[:, :-1] >= 0], axis=1)
    before = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    own = [
        turn * (width + spec.max_action) + column for turn in range(spec.max_turns) for column in range(spec.max_action)
    ]
    own = jnp.asarray(own)
    hidden = jnp.take_along_axis(hidden, before[:, own][..., None], axis=1)
    log_prob, entropy = log_prob_and_entropy(model, params, hidden, tokens[:, own], temperature=temperature)

    def scatter(x):
        blank = jnp.zeros(mask.shape, jnp.float32)
        return jnp.pad(jnp.where(mask, blank.at[:, own].set(x), 0.0), ((0, 0), (width, 0)))

    return scatter(log_prob), scatter(entropy)
