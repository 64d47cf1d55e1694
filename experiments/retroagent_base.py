"""The base model of the study retroagent: a transformer that knows the grammar of its world, and lessons, but no fact.

It imitates a noisy demonstrator in worlds that are drawn anew in every episode, and learns on the same episodes to
reflect: to say of a finished one whether it was won, which subtasks were done and what it taught. This stands for the
pretrained model of the paper (arXiv 2603.08561), without which a lesson in a prompt would mean nothing.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import envs, objectives
from rollax.agents import LanguageModel, Sampling, Trajectory, TransformerConfig, language_policy, transformer
from rollax.agents.generation import padded_positions
from rollax.agents.language_model import log_prob_and_entropy
from rollax.agents.rollout import Start, as_trajectory, play_rows
from rollax.envs import Environment
from rollax.envs.hidden_clusters import (
    IS_FIRST,
    IS_SECOND,
    NO_LESSON,
    NOT_FIRST,
    NOT_SECOND,
    NUM_LESSONS,
    draw_lesson,
)
from rollax.envs.minesweeper import frame as frame_of_minesweeper
from rollax.envs.scripts import ScriptedEpisode, scripted_episode
from rollax.envs.sokoban import frame as frame_of_sokoban
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.supervised import CACHE, cached, fit

if TYPE_CHECKING:
    from rollax.experiments.retroagent import Config

SUBTASKS = 4


class Bench(NamedTuple):
    """A world of hidden facts as the study sees it.

    Attributes:
      make: `make(num_first, num_second, world=None) -> Environment`.
      draw: `draw(key, num_first, num_second) -> world`, with `facts`, and the `name` of each of 256 tasks.
      answer: tokens of the longest observation after the first.
    """

    make: Callable[..., Environment]
    draw: Callable[..., Any]
    answer: int


BENCHES = {
    "household": Bench(envs.household, envs.household_world, answer=1),
    "shop": Bench(envs.shop, envs.shop_world, answer=13),
}


def small_model(config: "Config", env: Environment) -> LanguageModel:
    return transformer(TransformerConfig(len(env.spec.vocab), config.width, config.layers, config.heads))


# --- Episodes -------------------------------------------------------------------------------------------------------


def with_positions(episodes: ScriptedEpisode, spec) -> Trajectory:
    """Scripted episodes `[N, ...]` in the form that `rollout` returns, without log-probs."""
    seen, action, mask = episodes.observation, episodes.action, episodes.mask
    rows, turns = mask.shape
    length = jnp.where(mask, seen.length, 0)
    begin = jnp.cumsum(length + mask * spec.max_action, axis=1) - length - mask * spec.max_action
    flat = lambda x: x.reshape(rows * turns, *x.shape[2:])  # noqa: E731
    positions = jnp.concatenate(
        [
            padded_positions(flat(length), spec.max_observation, flat(begin)),
            padded_positions(flat(mask * spec.max_action), spec.max_action, flat(begin + length)),
        ],
        axis=1,
    ).reshape(rows, -1)
    own = jnp.concatenate([jnp.zeros(seen.ids.shape, bool), jnp.broadcast_to(mask[..., None], action.shape)], axis=2)
    blank = jnp.zeros(positions.shape, jnp.float32)
    width = spec.max_observation + spec.max_action
    return Trajectory(
        tokens=jnp.concatenate([seen.ids, action], axis=2).reshape(rows, -1),
        positions=positions,
        mask=own.reshape(rows, -1),
        turn=jnp.broadcast_to(jnp.repeat(jnp.arange(turns, dtype=jnp.int32), width), positions.shape),
        log_prob=blank,
        full_log_prob=blank,
        reward=jnp.where(mask, episodes.step.reward, 0.0),
        terminated=(mask & episodes.step.terminated).any(axis=1),
        truncated=(mask & episodes.step.truncated).any(axis=1),
        info=episodes.step.info,
    )


def play_tasks(
    key: jax.Array, model: LanguageModel, params, env: Environment, task, lesson, greedy=False
) -> Trajectory:
    """Episodes of given tasks `[N]` with the lessons `[N, 2]` in their prompts."""
    row = jnp.arange(task.shape[0])
    reset_key, *keys = jax.random.split(key, 3)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    state, observation = jax.vmap(env.reset)(fold(reset_key, row), task, lesson)
    policy = language_policy(model, params, env.spec, sampling=Sampling(0.0 if greedy else 1.0), early_exit=False)
    start = Start(policy.begin(observation), state)
    played = play_rows(tuple(keys), env, policy, start, row, jnp.ones(row.shape, bool), env.spec.max_turns)
    return as_trajectory(played, env.spec)._replace(info=played.info | {"active": played.mask})


def at_the_end(value: jax.Array, active: jax.Array) -> jax.Array:
    """Of `[N, K, ...]`, the entry of each episode's last turn, `[N, ...]`."""
    last = jnp.maximum(active.sum(axis=1) - 1, 0)
    return jax.vmap(lambda x, i: x[i])(value, last)


def expert_episodes(key: jax.Array) -> list[Episode]:
    """An episode of the expert in each of the paper's worlds, and in the house with rooms: words, or pictures."""
    worlds = {
        "household": (envs.household(), None),
        "household with rooms": (envs.alfworld_household(), None),
        "shop": (envs.shop(), None),
        "sokoban": (envs.sokoban(), frame_of_sokoban),
        "minesweeper": (envs.minesweeper(), frame_of_minesweeper),
    }
    episodes = []
    for title, (env, frame) in worlds.items():
        act, step = jax.jit(env.expert), jax.jit(env.step)
        state, _ = jax.jit(env.reset)(key)
        seen, earned, ended = [state], 0.0, False
        while not ended:
            move_key, step_key = jax.random.split(jax.random.fold_in(key, len(seen)))
            state, told = step(step_key, state, act(move_key, state))
            seen.append(jax.device_get(state))
            earned, ended = earned + float(told.reward), bool(told.terminated | told.truncated)
        frames = [env.render(seen[-1])] if frame is None else np.stack([frame(state) for state in seen])
        episodes.append(Episode(f"the expert, {title}", frames, earned))
    return episodes


# --- Reading finished episodes -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Episodes without the padding between their tokens, and without what came of the last action.

    Attributes:
      tokens: int32 `[N, C]`.
      positions: int32 `[N, C]`, -1 behind the last action.
      action: int32 `[N, K]`, the column of each turn's action; behind an end -1.
    """

    tokens: jax.Array
    positions: jax.Array
    action: jax.Array


class Reflection(NamedTuple):
    """What is said of an episode, log-odds and logits: the outcome `[N]`, subtasks `[N, 4]`, two lessons `[N, L]`."""

    outcome: jax.Array
    subtasks: jax.Array
    first: jax.Array
    second: jax.Array


class Read(NamedTuple):
    """Log-prob and entropy (nats) of every action, `[N, K]`, without meaning behind an end; and the reflection."""

    log_prob: jax.Array
    entropy: jax.Array
    reflection: Reflection


def pack(trajectory: Trajectory, spec, answer: int) -> Packed:
    """What a model reads of a trajectory of one-token actions, without its padding where answers are short.

    Args:
      answer: tokens of the longest observation after the first.
    """
    rows, turns = trajectory.tokens.shape[0], spec.max_turns
    columns = spec.max_observation + turns + (turns - 1) * answer
    # A real token's position is its number among the real ones.
    place = jnp.where(trajectory.positions >= 0, trajectory.positions, columns)
    move = lambda ids, at: jnp.zeros(columns, jnp.int32).at[at].set(ids, mode="drop")  # noqa: E731
    action = jnp.where(trajectory.mask, trajectory.positions, -1).reshape(rows, turns, -1)[..., -1]
    positions = padded_positions(action.max(axis=1) + 1, columns)
    return Packed(jax.vmap(move)(trajectory.tokens, place), positions, action)


def read(model: LanguageModel, params: dict, episodes: Packed) -> Read:
    """What the model says of its episodes, in one pass.

    Each is read up to its last action: what came of that is not shown, so that the outcome must be judged.

    Args:
      params: `{"policy": ..., "heads": ...}`; without heads, no reflection.
    """
    hidden, _ = model.hidden(params["policy"], episodes.tokens, episodes.positions)
    of_columns = lambda x, columns: jnp.take_along_axis(x, columns[..., None], axis=1)  # noqa: E731
    action = jnp.maximum(episodes.action, 1)
    chosen = jnp.take_along_axis(episodes.tokens, action, axis=1)
    log_prob, entropy = log_prob_and_entropy(model, params["policy"], of_columns(hidden, action - 1), chosen)
    if "heads" not in params:
        return Read(log_prob, entropy, ())
    last = of_columns(hidden, action.max(axis=1, keepdims=True))[:, 0]
    said = {name: last @ head["kernel"] + head["bias"] for name, head in params["heads"].items()}
    return Read(log_prob, entropy, Reflection(said["outcome"][:, 0], said["subtasks"], said["first"], said["second"]))


def heads_init(key: jax.Array, width: int, lessons: int) -> dict:
    """Linear heads of a reflection."""
    sizes = {"outcome": 1, "subtasks": SUBTASKS, "first": lessons, "second": lessons}
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"kernel": 0.02 * jax.random.normal(k, (width, size)), "bias": jnp.zeros(size)}
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def reflection_loss(said: Reflection, won: jax.Array, progress: jax.Array, lesson: jax.Array) -> jax.Array:
    """Cross-entropy with the truth, `[N]`."""
    of_codes = optax.softmax_cross_entropy_with_integer_labels
    losses = optax.sigmoid_binary_cross_entropy(said.outcome, won.astype(jnp.float32))
    losses += optax.sigmoid_binary_cross_entropy(said.subtasks, progress.astype(jnp.float32)).mean(axis=1)
    return losses + of_codes(said.first, lesson[:, 0]) + of_codes(said.second, lesson[:, 1])


# --- Pre-training ---------------------------------------------------------------------------------------------------


def pretrain(key: jax.Array, config: "Config") -> dict:
    """Imitation of the demonstrator and reflection on its episodes and on the expert's, in worlds drawn anew."""
    bench, level = BENCHES[config.bench], (config.num_first, config.num_second)
    env = bench.make(*level)
    model = small_model(config, env)

    def episodes(key):
        keys = jax.random.split(key, 5)
        world = bench.draw(keys[0], *level)
        task = jax.random.randint(keys[1], (), 0, world.name.size)
        name = world.name[task]
        truth = jnp.stack([IS_FIRST + world.facts.first[name], IS_SECOND + world.facts.second[name]])
        # Who knows no fact hardly ever comes far: half of the demonstrators are told it, and show later turns.
        told_truth = jax.random.bernoulli(keys[2])
        shown = jnp.where(told_truth, truth, draw_lesson(keys[3], *level))
        own = bench.make(world=world)
        told = functools.partial(scripted_episode, keys[4], own, task_id=task, lesson=shown)
        return told(own.demonstrate), told(own.expert), told_truth

    def loss(params, key):
        *seen, told_truth = jax.vmap(episodes)(jax.random.split(key, config.base_batch))
        total = 0.0
        for episode, imitate in zip(seen, (True, False), strict=True):
            told = read(model, params, pack(with_positions(episode, env.spec), env.spec, bench.answer))
            if imitate:
                total += objectives.aggregate(-told.log_prob, episode.mask, "token_mean")
            end = functools.partial(at_the_end, active=episode.mask)
            truth = (end(episode.step.info[name]) for name in ("won", "progress", "lesson"))
            # Lessons that are true half of the time would be repeated instead of learnt from what happened.
            total += 0.3 * objectives.masked_mean(reflection_loss(told.reflection, *truth), ~told_truth)
        return total

    policy_key, heads_key, key = jax.random.split(key, 3)
    lessons = NUM_LESSONS
    params = {"policy": model.init(policy_key), "heads": heads_init(heads_key, config.width, lessons)}
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.base_lr, min(100, config.base_steps // 2), config.base_steps
    )
    return fit(key, params, loss, steps=config.base_steps, optimizer=optax.adam(schedule))


def base_model(config: "Config") -> dict:
    """`pretrain` from the configuration's seed, or what an earlier run with the same settings kept."""
    fields = ("bench", "num_first", "num_second", "width", "layers", "heads", "base_batch", "base_lr", "base_steps")
    wanted = {field: getattr(config, field) for field in (*fields, "base_seed")}
    wanted["recipe"] = 3  # to be raised when `pretrain` changes
    make = functools.partial(pretrain, jax.random.key(config.base_seed), config)
    return jax.tree.map(jnp.asarray, cached("retroagent", wanted, make, CACHE))


def calibration(key: jax.Array, params: dict, config: "Config", episodes: int = 4096) -> dict[str, jax.Array]:
    """How often the base model wins without a lesson, with the right one and with a wrong one."""
    bench = BENCHES[config.bench]
    world_key, play_key, task_key = jax.random.split(key, 3)
    world = bench.draw(world_key, config.num_first, config.num_second)
    env = bench.make(world=world)
    facts, names = world.facts, world.name
    task = jax.random.randint(task_key, (episodes,), 0, names.size)
    name = names[task]
    first, second = facts.first[name], facts.second[name]
    right = jnp.stack([IS_FIRST + first, IS_SECOND + second], axis=1)
    wrong = jnp.stack([IS_FIRST + (first + 1) % config.num_first, IS_SECOND + (second + 1) % config.num_second], axis=1)
    told = {}
    for label, lesson in {"none": jnp.full_like(right, NO_LESSON), "right": right, "wrong": wrong}.items():
        played = play_tasks(play_key, small_model(config, env), params["policy"], env, task, lesson)
        told[label] = at_the_end(played.info["won"], played.info["active"]).mean(dtype=jnp.float32)
    return told


def lesson_number(lesson: jax.Array, num_first: int, num_second: int) -> jax.Array:
    """The place of a lesson `[..., 2]` among all of its level, `[...]`: about each fact nothing, "is", or "is not"."""
    first, second = lesson[..., 0], lesson[..., 1]
    a = jnp.where(first >= NOT_FIRST, 1 + num_first + first - NOT_FIRST, first)
    b = jnp.where(second >= NOT_SECOND, 1 + num_second + second - NOT_SECOND, second - IS_SECOND + 1)
    b = jnp.where(second == NO_LESSON, 0, b)
    return a * (1 + 2 * num_second) + b


def numbered_lesson(number: jax.Array, num_first: int, num_second: int) -> jax.Array:
    """The lesson `[..., 2]` of a number `[...]`; the inverse of `lesson_number`."""
    a, b = number // (1 + 2 * num_second), number % (1 + 2 * num_second)
    first = jnp.where(a > num_first, NOT_FIRST + a - num_first - 1, a)
    second = jnp.where(b > num_second, NOT_SECOND + b - num_second - 1, jnp.where(b == 0, NO_LESSON, IS_SECOND + b - 1))
    return jnp.stack([first, second], axis=-1)


def wrong_lessons(key: jax.Array, world: Any, num_first: int, num_second: int) -> jax.Array:
    """For every task two statements that are wrong at random, `[256, 2]`: wrong by one everywhere reads like truth."""
    names, sizes = world.name, (num_first, num_second)
    off = [jax.random.randint(k, names.shape, 1, size) for k, size in zip(jax.random.split(key), sizes, strict=True)]
    first = IS_FIRST + (world.facts.first[names] + off[0]) % num_first
    return jnp.stack([first, IS_SECOND + (world.facts.second[names] + off[1]) % num_second], axis=1)


def hallucinate(key: jax.Array, lesson: jax.Array, rate, num_first: int, num_second: int) -> jax.Array:
    """Lessons `[N, 2]` of which each slot is, at this rate, a random statement instead."""
    replaced_key, drawn_key = jax.random.split(key)
    replaced = jax.random.bernoulli(replaced_key, rate, lesson.shape)
    draw = functools.partial(draw_lesson, num_first=num_first, num_second=num_second, silent=0.0)
    drawn = jax.vmap(draw)(jax.random.split(drawn_key, lesson.shape[0]))
    return jnp.where(replaced, drawn, lesson)
