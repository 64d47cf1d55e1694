"""Episodes of a language-model policy in a token environment, single- or multi-turn, inside one program.

Tokens in, tokens out: an episode is ids, positions and masks; nothing is decoded or encoded on the way. `rollout`
samples, `score` gives the log-probs of the same tokens with gradients; that the two agree is a test.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.agents.generation import Sampling, decode, padded_positions, prefill, start
from rollax.agents.language_model import LanguageModel, features, log_prob_and_entropy, repeat_rows


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
    """Plays `num_prompts` episodes starts, `group_size` times each; row `p * group_size + g` is sample g of start p.

    Args:
      env: an environment of tokens (`rollax.envs`): `reset(key)`, `step(key, state, action)` and a `spec` with
        `max_observation` (T), `max_action` (A), `max_turns` (K), `stop_ids`, `pad_id`.
      sampling, prefix, early_exit: see `agents.generation`.
    """
    spec = env.spec
    width, turns = spec.max_observation, spec.max_turns
    rows = num_prompts * group_size
    reset_key, sample_key, step_key = jax.random.split(key, 3)
    keys_of = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    state, observation = jax.vmap(env.reset)(keys_of(reset_key, jnp.arange(num_prompts)))
    sample_keys = keys_of(sample_key, jnp.arange(rows))
    step_keys = keys_of(step_key, jnp.arange(rows))
    at_turn = jax.vmap(jax.random.fold_in, in_axes=(0, None))

    # A group shares its start: the first prompt is computed once for all its rows.
    cache, begin = start(model, params, num_prompts, turns * (width + spec.max_action), prefix)
    positions = padded_positions(observation.length, width, begin)
    context = prefill(model, params, observation.ids, positions, cache, begin)
    context, state, ids, positions = repeat_rows((context, state, observation.ids, positions), group_size)

    def act(turn, context, state, alive):
        first = context.position
        generation, context = decode(
            model,
            params,
            at_turn(sample_keys, turn),
            context,
            max_new_tokens=spec.max_action,
            stop_ids=spec.stop_ids,
            pad_id=spec.pad_id,
            sampling=sampling,
            active=alive,
            early_exit=early_exit,
        )
        state, step = jax.vmap(env.step)(at_turn(step_keys, turn), state, generation.tokens)
        positions = padded_positions(generation.mask.sum(axis=1), spec.max_action, first)
        step = step._replace(
            reward=jnp.where(alive, step.reward, 0.0),
            terminated=alive & step.terminated,
            truncated=alive & step.truncated,
        )
        return generation, context, state, step, positions

    def record(turn, ids, positions, generation, action_positions, step):
        blank = jnp.zeros(ids.shape, jnp.float32)
        return dict(
            tokens=jnp.concatenate([ids, generation.tokens], axis=1),
            positions=jnp.concatenate([positions, action_positions], axis=1),
            mask=jnp.concatenate([blank > 0, generation.mask], axis=1),
            turn=jnp.full((rows, width + spec.max_action), turn, jnp.int32),
            log_prob=jnp.concatenate([blank, generation.log_prob], axis=1),
            full_log_prob=jnp.concatenate([blank, generation.full_log_prob], axis=1),
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            info=step.info,
        )

    alive = jnp.ones(rows, bool)
    generation, context, state, step, action_positions = act(0, context, state, alive)
    first = record(0, ids, positions, generation, action_positions, step)

    def next_turn(carry, turn):
        context, state, alive, generation, action_positions, step = carry
        alive &= ~(step.terminated | step.truncated)
        observation = step.observation
        positions = jnp.where(alive[:, None], padded_positions(observation.length, width, context.position), -1)
        # The last sampled column has not been fed yet: it goes in with the observation (see `decode`).
        tokens = jnp.concatenate([generation.tokens[:, -1:], observation.ids], axis=1)
        fed = jnp.concatenate([action_positions[:, -1:], positions], axis=1)
        context = prefill(model, params, tokens, fed, context.cache, context.position)
        generation, context, state, step, action_positions = act(turn, context, state, alive)
        columns = record(turn, observation.ids, positions, generation, action_positions, step)
        return (context, state, alive, generation, action_positions, step), columns

    columns = jax.tree.map(lambda x: x[:, None], first)
    if turns > 1:
        carry = (context, state, alive, generation, action_positions, step)
        _, rest = jax.lax.scan(next_turn, carry, jnp.arange(1, turns))
        columns = jax.tree.map(lambda x, y: jnp.concatenate([x, jnp.moveaxis(y, 0, 1)], axis=1), columns, rest)
    flat = {
        name: columns[name].reshape(rows, -1)
        for name in ("tokens", "positions", "mask", "turn", "log_prob", "full_log_prob", "reward")
    }
    ended = {name: columns[name].any(axis=1) for name in ("terminated", "truncated")}
    return Trajectory(**flat, **ended, info=columns["info"])


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
    cache, _ = start(model, params, rows // group_size, slots, prefix)
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
