"""Episodes of a policy in an environment, single- or multi-turn, inside one program.

`play` is the loop for any policy (a language model or an ordinary one) and any environment. For language models
`rollout` returns what was played as tokens in, tokens out (ids, positions and masks; nothing is decoded or encoded on
the way), and `score` gives the log-probs of the same tokens with gradients; that the two agree is a test.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.generation import Sampling, decode, padded_positions, prefill, start
from rollax.agents.language_model import LanguageModel, features, log_prob_and_entropy, repeat_rows


class Policy(NamedTuple):
    """How something with a memory acts in N environments at once.

    Attributes:
      begin: `begin(observation [P, ...]) -> memory [P, ...]`, of first observations, one per start.
      see: `see(memory, observation, alive [N]) -> memory`, of the observations that follow.
      act: `act(keys [N], memory, alive) -> (action [N, ...], memory, record [N, ...])`; the record is kept.
      grow: `grow(memory, steps) -> memory` with room for so many steps from the beginning, static; `begin` makes room
        for one. Returns the memory unchanged where it does not grow.
    """

    begin: Callable[[Any], Any]
    see: Callable[[Any, Any, jax.Array], Any]
    act: Callable[[jax.Array, Any, jax.Array], tuple[Any, Any, Any]]
    grow: Callable[[Any, int], Any] = lambda memory, steps: memory


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


class Start(NamedTuple):
    """P starts, ready to be played any number of times: what the policy made of each, and the environments' states."""

    memory: Any
    state: Any


def open_starts(key: jax.Array, env, policy: Policy, num_starts: int) -> Start:
    """Resets the environments and shows the policy their first observations."""
    state, observation = reset_starts(key, env, num_starts)
    return Start(policy.begin(observation), state)


def reset_starts(key: jax.Array, env, num_starts: int):
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_starts))
    return jax.vmap(env.reset)(keys)


def first_observations(key: jax.Array, env, num_prompts: int):
    """`(state, observation)` that `rollout(key, ...)` and a `sequential_sampler` begin with, `[P, ...]`.

    What a value model reads before anything is drawn.
    """
    return reset_starts(jax.random.split(key, 3)[0], env, num_prompts)


def take_rows(rows: Any, index: jax.Array) -> Any:
    """Of every array in a tree the rows `index` `[N]`; scalars, which all rows share, as they are."""
    return jax.tree.map(lambda x: x[index] if x.ndim else x, rows)


def play_rows(
    keys: tuple[jax.Array, jax.Array],
    env,
    policy: Policy,
    start: Start,
    row: jax.Array,
    alive: jax.Array,
    num_steps: int,
    stages: int = 1,
) -> Episodes:
    """Plays N opened starts to their end; what happens in a row depends on its number and on nothing beside it.

    Args:
      keys: of the samples and of the environments' steps; folded with the row's number and the step's.
      start: `[N]`, one a row.
      row: int `[N]`.
      alive: bool `[N]`, the others are not played.
      num_steps: K; an episode that is longer is cut, neither terminated nor truncated.
      stages: the steps after the first run in so many loops, each compiled on its own with a memory that ends where the
        loop does: less of what is empty is read. To grow holds two memories for a moment.
    Raises:
      ValueError: stages below 1.
    """
    if stages < 1:
        raise ValueError(f"stages: expected at least 1, got {stages}")
    sample_keys, step_keys = (jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row) for key in keys)
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

    carry, kept = act(0, *start, alive)
    parts, done = [jax.tree.map(lambda x: x[None], kept)], 1
    for stage in range(1, stages + 1):
        end = -(-num_steps * stage // stages)
        if end > done:
            memory, *rest = carry
            carry, kept = jax.lax.scan(see_and_act, (policy.grow(memory, end), *rest), jnp.arange(done, end))
            parts, done = [*parts, kept], end
    kept = jax.tree.map(lambda *x: jnp.moveaxis(jnp.concatenate(x), 0, 1), *parts)
    record, mask, reward, terminated, truncated, info = kept
    return Episodes(record, mask, reward, terminated.any(axis=1), truncated.any(axis=1), info)


def play(
    key: jax.Array,
    env,
    policy: Policy,
    *,
    num_starts: int,
    num_steps: int,
    group_size: int = 1,
    stages: int = 1,
) -> Episodes:
    """Plays `num_starts` starts `group_size` times each; row `p * group_size + g` is sample g of start p.

    Args:
      env: `reset(key) -> (state, observation)` and `step(key, state, action) -> (state, Step)` (`rollax.envs`).
      num_steps: K; an episode that is longer is cut, neither terminated nor truncated.
      stages: see `play_rows`.
    """
    reset_key, *keys = jax.random.split(key, 3)
    row = jnp.arange(num_starts * group_size)
    # A group shares its start, and so what its policy makes of the first observation.
    start = repeat_rows(open_starts(reset_key, env, policy, num_starts), group_size)
    return play_rows(tuple(keys), env, policy, start, row, jnp.ones(row.shape, bool), num_steps, stages)


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
    """A language model as a policy; its record is the columns of one turn of a `Trajectory`.

    Its cache holds one turn until `grow` is called, which has to be before the second.
    """
    width = spec.max_observation

    def slots_of(turns):
        return turns * (width + spec.max_action)

    def begin(observation):
        cache, first = start(model, params, observation.ids.shape[0], slots_of(1), prefix)
        positions = padded_positions(observation.length, width, first)
        return Memory(
            prefill(model, params, observation.ids, positions, cache, first), observation.ids, positions, None
        )

    def grow(memory, turns):
        context, rows = memory.context, memory.ids.shape[0]
        room = model.init_cache(rows, slots_of(turns) + (0 if prefix is None else prefix.shape[0]))
        cache = jax.tree.map(
            lambda empty, old: jax.lax.dynamic_update_slice(empty, old, (0,) * old.ndim), room, context.cache
        )
        return memory._replace(context=context._replace(cache=cache))

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

    return Policy(begin, see, act, grow)


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
    stages: int = 1,
) -> Trajectory:
    """Episodes of a language model: `play` with `language_policy`, its turns side by side as columns of tokens.

    Args:
      env: an environment of tokens (`rollax.envs`): `reset(key)`, `step(key, state, action)` and a `spec` with
        `max_observation` (T), `max_action` (A), `max_turns` (K), `stop_ids`, `pad_id`.
      sampling, prefix, early_exit: see `agents.generation`.
      stages: how often the cache grows after the first turn, see `play_rows`; 1 compiles fastest.
    """
    spec = env.spec
    policy = language_policy(model, params, spec, sampling=sampling, prefix=prefix, early_exit=early_exit)
    how = dict(num_starts=num_prompts, num_steps=spec.max_turns, group_size=group_size, stages=stages)
    return as_trajectory(play(key, env, policy, **how), spec)


def as_trajectory(played: Episodes, spec) -> Trajectory:
    """Episodes of `language_policy` with their turns side by side."""
    rows = played.mask.shape[0]
    turn = jnp.repeat(jnp.arange(spec.max_turns, dtype=jnp.int32), spec.max_observation + spec.max_action)
    return Trajectory(
        **{name: x.reshape(rows, -1) for name, x in played.record.items()},
        turn=jnp.broadcast_to(turn, (rows, turn.size)),
        reward=played.reward,
        terminated=played.terminated,
        truncated=played.truncated,
        info=played.info,
    )


class Sequential(NamedTuple):
    """A rollout whose number of episodes each prompt's own rewards decided. Alphabet: `P` prompts, `K` most episodes.

    Attributes:
      trajectory: `[P * K]` rows, row `p * K + j` is episode j of prompt p; rows that were not drawn hold padding alone
        (positions -1, mask false, reward 0).
      drawn: bool `[P, K]`.
      rounds: int32 `[]`, calls of the sampler.
      rows: int32 `[]`, rows that it computed, idle ones of a bucket included: what the rollout cost.
    """

    trajectory: Trajectory
    drawn: jax.Array
    rounds: jax.Array
    rows: jax.Array


def sequential_sampler(
    model: LanguageModel,
    env,
    more: Callable[[jax.Array, jax.Array, Any], jax.Array],
    *,
    num_prompts: int,
    k_init: int,
    k_max: int,
    sampling: Sampling | None = None,
    prefix: jax.Array | None = None,
    early_exit: bool = True,
    buckets: tuple[int, ...] | None = None,
    compiled: bool = False,
) -> Callable[..., Sequential]:
    """`sample(key, params, *arguments) -> Sequential`: `k_init` episodes a prompt, then one more while `more` asks.

    Episode j of prompt p is that of `rollout(key, ..., group_size=k_max)`, whatever was drawn beside it. Each round
    computes only the prompts that go on, in the smallest of a few static sizes.

    Args:
      more: `more(reward [P, K], drawn bool [P, K], *arguments) -> bool [P]`, of episodes' total rewards, such as
        `objectives.osla_continue` of `objectives.shrinkage_fuse` with priors among the arguments. A prompt that has
        stopped stays stopped.
      buckets: static sizes of a round, P among them; None for P and its halves down to an eighth. Under `vmap` over
        seeds all sizes would be computed: pass `(P,)` there.
      compiled: false gives a pure function, to be jitted, that loops inside the program. True gives one that loops
        outside, over programs compiled once for each size, with nothing but `more`'s answer crossing in a round: for
        models that fill the devices, whose caches a loop inside the program would hold twice.

    Raises:
      ValueError: k_init outside 1..k_max, buckets without P, or a size outside 1..P.
    """
    if not 1 <= k_init <= k_max:
        raise ValueError(f"k_init: expected 1 to k_max={k_max}, got {k_init}")
    halves = tuple(dict.fromkeys(-(-num_prompts // part) for part in (8, 4, 2, 1)))
    sizes = tuple(sorted(set(buckets))) if buckets else halves
    if sizes[-1] != num_prompts or sizes[0] < 1:
        raise ValueError(f"buckets: expected sizes from 1 to num_prompts={num_prompts} and that one, got {sizes}")
    spec = env.spec
    jit = jax.jit if compiled else lambda f, **_: f

    def episodes(keys, params, start, prompt, j, alive):
        policy = language_policy(model, params, spec, sampling=sampling, prefix=prefix, early_exit=early_exit)
        played = play_rows(
            keys, env, policy, take_rows(start, prompt), prompt * k_max + j, alive, num_steps=spec.max_turns
        )
        return as_trajectory(played, spec)

    def begin(key, params, arguments):
        """The starts, and the first k_init episodes of each in a buffer of `[P * k_max]` rows."""
        reset_key, *keys = jax.random.split(key, 3)
        policy = language_policy(model, params, spec, prefix=prefix)
        start = open_starts(reset_key, env, policy, num_prompts)
        prompt, j = (x.ravel() for x in jnp.indices((num_prompts, k_init)))
        first = episodes(keys, params, start, prompt, j, jnp.ones(prompt.shape, bool))
        blank = jax.tree.map(lambda x: jnp.zeros((num_prompts * k_max, *x.shape[1:]), x.dtype), first)
        blank = blank._replace(
            tokens=jnp.full_like(blank.tokens, spec.pad_id),
            positions=jnp.full_like(blank.positions, -1),
            turn=jnp.broadcast_to(first.turn[0], blank.turn.shape),
        )
        trajectory = jax.tree.map(lambda all_, new: all_.at[prompt * k_max + j].set(new), blank, first)
        drawn = jnp.broadcast_to(jnp.arange(k_max) < k_init, (num_prompts, k_max))
        result = Sequential(trajectory, drawn, jnp.int32(1), jnp.int32(num_prompts * k_init))
        return keys, start, result, asked(result, jnp.ones(num_prompts, bool), arguments)

    def asked(result, active, arguments):
        """Which of the active prompts go on."""
        reward = result.trajectory.reward.sum(axis=1).reshape(num_prompts, k_max)
        return active & more(reward, result.drawn, *arguments)

    def draw(size, keys, params, start, result, active, arguments):
        """Episode j of the active prompts, of which there are at most `size`."""
        prompt = jnp.argsort(~active, stable=True)[:size]
        alive, j = active[prompt], jnp.sum(result.drawn, axis=1).max()
        new = episodes(keys, params, start, prompt, j, alive)
        place = jnp.where(alive, prompt * k_max + j, num_prompts * k_max)  # outside: dropped
        trajectory = jax.tree.map(lambda all_, x: all_.at[place].set(x, mode="drop"), result.trajectory, new)
        drawn = result.drawn | (active[:, None] & (jnp.arange(k_max) == j))
        result = Sequential(trajectory, drawn, result.rounds + 1, result.rows + size)
        return result, asked(result, active, arguments)

    begin = jit(begin)
    draws = [jit(functools.partial(draw, size), donate_argnums=3) for size in sizes]

    def inside(key, params, *arguments):
        keys, start, result, active = begin(key, params, arguments)

        def go_on(carry):
            result, active = carry
            return active.any() & ~result.drawn[:, -1].any()

        def body(carry):
            result, active = carry
            chosen = jnp.searchsorted(jnp.asarray(sizes), active.sum())
            return jax.lax.switch(chosen, draws, keys, params, start, result, active, arguments)

        return jax.lax.while_loop(go_on, body, (result, active))[0]

    def outside(key, params, *arguments):
        keys, start, result, active = begin(key, params, arguments)
        for _ in range(k_init, k_max):
            count = int(active.sum())
            if not count:
                break
            chosen = next(i for i, size in enumerate(sizes) if size >= count)
            result, active = draws[chosen](keys, params, start, result, active, arguments)
        return result

    return outside if compiled else inside


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
    group: jax.Array | None = None,
    num_groups: int = 0,
    temperature: jax.Array | float = 1.0,
    prefix: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the policy's own tokens and the entropies of the distributions that they came from, with gradients.

    The first observation is computed once per group and the prefix once in all, exactly: the rows share their keys and
    values, and so the gradients.

    Args:
      group_size: so many rows in a row begin with the same observation.
      group: int `[N]` below `num_groups`, the group of each row, instead: groups of any size in any order. A group's
        observation is that of its first row.
    Returns:
      (log_prob, entropy), float32 `[N, S]`, nats, 0 outside `trajectory.mask`.
    Raises:
      ValueError: a `group_size` that does not divide the rows, or beside a `group`; a `group` of another shape; one of
        `group` and `num_groups` without the other.
    """
    spec = env.spec
    rows, slots = trajectory.tokens.shape
    width = spec.max_observation
    if rows % group_size:
        raise ValueError(f"group_size: expected a divisor of the {rows} rows, got {group_size}")
    if group is None and num_groups:
        raise ValueError(f"group: expected the groups of the rows beside num_groups={num_groups}, got None")
    if group is None:
        num_groups, first = rows // group_size, slice(None, None, group_size)
        spread = functools.partial(repeat_rows, times=group_size)
    else:
        if group.shape != (rows,) or num_groups < 1 or group_size != 1:
            raise ValueError(
                f"group, num_groups: expected [{rows}] and at least 1, without a group_size, got {group.shape}, "
                f"{num_groups} and group_size={group_size}"
            )
        # Of a group without rows any row does, and nothing reads it.
        first = jnp.minimum(jax.ops.segment_min(jnp.arange(rows), group, num_groups), rows - 1)
        spread = functools.partial(take_rows, index=group)

    starts = jax.tree.map(lambda x: x[first, :width], (trajectory.tokens, trajectory.positions))
    dense = model._replace(prefill=None)  # a sampler's sparse prefill is no part of the policy that is trained
    cache, _ = start(dense, params, num_groups, slots, prefix)
    hidden, cache = features(model, params, *starts, cache)
    last = jnp.argmax(starts[1], axis=1)[:, None, None]
    opening = spread(jnp.take_along_axis(hidden, last, axis=1))

    tokens, positions, mask = (x[:, width:] for x in (trajectory.tokens, trajectory.positions, trajectory.mask))
    following = opening[:, :0]
    if tokens.shape[1] > 1:
        fed = (tokens[:, :-1], positions[:, :-1])
        following, _ = features(model, params, *fed, spread(cache))
    hidden = jnp.concatenate([opening, following], axis=1)
    # A token is predicted at the last real slot before it, which padding may separate from it.
    real = jnp.concatenate([jnp.ones((rows, 1), bool), positions[:, :-1] >= 0], axis=1)
    before = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    own = [
        turn * (width + spec.max_action) + column for turn in range(spec.max_turns) for column in range(spec.max_action)
    ]
    own = np.asarray(own)
    hidden = jnp.take_along_axis(hidden, before[:, own][..., None], axis=1)
    log_prob, entropy = log_prob_and_entropy(model, params, hidden, tokens[:, own], temperature=temperature)

    def scatter(x):
        blank = jnp.zeros(mask.shape, jnp.float32)
        return jnp.pad(jnp.where(mask, blank.at[:, own].set(x), 0.0), ((0, 0), (width, 0)))

    return scatter(log_prob), scatter(entropy)
