"""Long episodes with a reward for each step, for the study openclaw_rl: outcome, judged steps, or both.

The general track of OpenClaw-RL (arXiv 2603.10165): a judge reads every action with its next state and votes; rewards
are compared among episodes of a task at the same step index. The worlds are those of RetroAgent, boards included.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import envs, objectives
from rollax.agents import LanguageModel, Trajectory
from rollax.envs import Environment, scripted_episode
from rollax.envs.hidden_clusters import NO_LESSON
from rollax.envs.minesweeper import progress as progress_of_minesweeper
from rollax.envs.sokoban import progress as progress_of_sokoban
from rollax.experiments.harness.loop import Train
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.supervised import cached, fit
from rollax.experiments.openclaw_chat import CLIP, VOTES
from rollax.experiments.retroagent_base import (
    BENCHES,
    Packed,
    at_the_end,
    pack,
    play_tasks,
    read,
    small_model,
    with_positions,
)

if TYPE_CHECKING:
    from rollax.experiments.openclaw_rl import Config

BASELINES = ("episodes", "step", "task")
# A turn shows the whole board, so boards are small.
BOARDS = {
    "sokoban": (
        lambda horizon: envs.sokoban(5, 6, 1, max_pushes=3, max_solution=horizon - 2, horizon=horizon),
        progress_of_sokoban,
    ),
    "minesweeper": (lambda horizon: envs.minesweeper(4, 4, 3, horizon=horizon), progress_of_minesweeper),
}
BOARD_ACTIONS = ("open-", "up", "right", "down", "left")
SLIP = 0.6  # how often the demonstrator of a board moves at random


class StepNumbers(NamedTuple):
    """What an arm rewards, all traced."""

    w_outcome: float = 1.0
    coef: float = 0.0  # of the mean vote of a step
    baseline: int = BASELINES.index("step")
    flip: float = 0.05  # of a vote
    lr: float = 0.0
    kl: float = 0.0


AGENTS = {
    "outcome": StepNumbers(baseline=BASELINES.index("episodes")),
    "outcome + step": StepNumbers(coef=1.0),
    "outcome + step, by task": StepNumbers(coef=1.0, baseline=BASELINES.index("task")),
    "step": StepNumbers(w_outcome=0.0, coef=1.0),
}
AGENTS |= {f"{row}, q=.25": n._replace(flip=0.25) for row, n in AGENTS.items() if n.coef}


class AgentState(NamedTuple):
    """What training carries."""

    params: Any
    opt: Any
    key: jax.Array
    step: jax.Array


def environment(config: "Config", key: jax.Array | None = None) -> Environment:
    """The bench with the study's horizon; `reset(key, task, lesson)`.

    Args:
      key: of a fixed world and its numbered tasks; without it, each episode has a world of its own.
    """
    if config.bench in BOARDS:
        make, progress_of = BOARDS[config.bench]
        return board_tasks(make(config.horizon), progress_of, key)
    bench, level = BENCHES[config.bench], (config.num_first, config.num_second)
    world = None if key is None else bench.draw(jax.random.fold_in(key, 2**20), *level)
    return bench.make(*level, world=world, horizon=config.horizon)


def board_tasks(env: Environment, progress_of: Callable, key: jax.Array | None) -> Environment:
    """Boards with numbers for tasks and no room for lessons, and a demonstrator: the expert, often moving at random.

    Some subtasks are done before the first move, so that the info of a step also says how many were before it.
    """
    actions = np.flatnonzero([word.startswith(BOARD_ACTIONS) for word in env.spec.vocab])

    def reset(own_key, task=None, lesson=None):
        del lesson
        return env.reset(own_key if task is None else jax.random.fold_in(jax.random.fold_in(key, 2**20), task))

    def step(own_key, state, action):
        after, told = env.step(own_key, state, action)
        return after, told._replace(info=told.info | {"done before": progress_of(state).sum()})

    def demonstrate(key, state):
        slip_key, action_key, expert_key = jax.random.split(key, 3)
        slip = jax.random.choice(action_key, jnp.asarray(actions, jnp.int32), (1,))
        return jnp.where(jax.random.bernoulli(slip_key, SLIP), slip, env.expert(expert_key, state)).astype(jnp.int32)

    return env._replace(reset=reset, step=step, demonstrate=demonstrate)


def agent_model(config: "Config") -> LanguageModel:
    return small_model(config, environment(config))


def packed(config: "Config", trajectory: Trajectory) -> Packed:
    spec = environment(config).spec
    return pack(trajectory, spec, BENCHES[config.bench].answer if config.bench in BENCHES else spec.max_observation)


def agent_base(config: "Config"):
    """Parameters after imitation of the bench's noisy demonstrator; kept on disk."""
    env, model = environment(config), agent_model(config)

    def loss(params, key):
        told = functools.partial(scripted_episode, environment=env, act=env.demonstrate)
        seen = jax.vmap(told)(jax.random.split(key, config.base_batch))
        said = read(model, {"policy": params}, packed(config, with_positions(seen, env.spec)))
        return objectives.aggregate(-said.log_prob, seen.mask, "token_mean")

    def make():
        init_key, key = jax.random.split(jax.random.key(config.base_seed))
        schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
        return fit(key, model.init(init_key), loss, steps=config.base_steps, optimizer=optax.adam(schedule))

    fields = ("bench", "num_first", "num_second", "horizon", "width", "layers", "heads", "base_batch", "base_lr")
    wanted = {field: getattr(config, field) for field in (*fields, "base_steps", "base_seed")} | {"recipe": 2}
    return jax.tree.map(jnp.asarray, cached("openclaw-agents", wanted, make))


# --- Rewards --------------------------------------------------------------------------------------------------------


def judge_steps(key: jax.Array, done: jax.Array, before: jax.Array, reward: jax.Array, flip) -> jax.Array:
    """Votes on every step, int8 `[..., T, m]`: +1 where more subtasks are done than ever before or it paid, else -1.

    Args:
      done: int `[..., T]`, subtasks done after each step; some can be undone, and pay once.
      before: int `[...]`, before the first step.
      reward: the environment's, `[..., T]`: minesweeper pays for every cell opened, the others for winning.
      flip: probability that a vote has the wrong sign; may be traced.
    """
    most = jax.lax.cummax(jnp.concatenate([before[..., None], done], axis=-1), axis=done.ndim - 1)
    sign = jnp.where((done > most[..., :-1]) | (reward > 0), 1, -1)[..., None]
    return jnp.where(jax.random.bernoulli(key, flip, (*done.shape, VOTES)), -sign, sign).astype(jnp.int8)


def step_advantages(won: jax.Array, votes: jax.Array, made: jax.Array, n: StepNumbers) -> tuple[jax.Array, jax.Array]:
    """Advantages of an arm.

    Args:
      won: bool `[G, N]`.
      votes: `[G, N, T, m]`.
      made: bool `[G, N, T]`, the step belongs to its episode.

    Returns:
      (advantage `[G, N, T]`; kept bool `[G, N, T]`, steps that are trained on).
    """
    outcome = jnp.where(won, 1.0, -1.0)
    tasks, episodes = won.shape
    group = np.arange(tasks * episodes) // episodes
    spread = lambda x: jnp.broadcast_to(x[..., None], made.shape)  # noqa: E731
    of_episodes = objectives.grpo_advantages(outcome.ravel(), group, num_groups=tasks).reshape(won.shape)
    mixed = ~objectives.group_is_constant(outcome.ravel(), group, num_groups=tasks)
    choices = [(jnp.where(made, spread(of_episodes), 0.0), made & mixed.reshape(won.shape)[..., None])]
    reward = objectives.step_reward(
        n.w_outcome * outcome, votes, jnp.broadcast_to(made[..., None], votes.shape), n.coef
    )
    choices += [objectives.step_index_advantage(reward, made, bucket=bucket) for bucket in BASELINES[1:]]
    advantage, kept = (jnp.stack(x)[n.baseline] for x in zip(*choices, strict=True))
    return advantage, kept


def bucket_metrics(advantage: jax.Array, kept: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """Of the buckets (task, step) that hold a step: mean variance of the advantages, share that does not train."""
    exists = made.any(axis=1)
    mean = objectives.masked_mean(advantage, made, axis=1)
    variance = objectives.masked_mean(jnp.square(advantage - mean[:, None]), made, axis=1)
    return {
        "advantage variance": objectives.masked_mean(variance, exists),
        "dropped buckets": objectives.masked_mean(~kept.any(axis=1), exists),
    }


# --- Training -------------------------------------------------------------------------------------------------------


def no_lesson(count: int) -> jax.Array:
    return jnp.full((count, 2), NO_LESSON, jnp.int32)


def agents_train(config: "Config", base=None) -> Train:
    """The functions of one run: a fixed world of a seed, episodes of a few of its tasks, `passes` gradient steps."""
    base = agent_base(config) if base is None else base
    model = agent_model(config)
    optimiser = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(b2=0.98))
    tasks, group, turns = config.tasks, config.group, config.horizon

    def init(key):
        return AgentState(base, optimiser.init(base), key, jnp.int32(0))

    def update(state, n):
        task_key, play_key, judge_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        env = environment(config, state.key)
        task = jnp.repeat(jax.random.choice(task_key, config.pool, (tasks,), replace=False), group)
        played = play_tasks(play_key, model, state.params, env, task, no_lesson(tasks * group))
        made = played.info["active"]
        by_task = lambda x: x.reshape(tasks, group, *x.shape[1:])  # noqa: E731
        won = at_the_end(played.info["won"], made)
        done = played.info["progress"].sum(axis=-1)
        before = played.info.get("done before", jnp.zeros_like(done))[:, 0]
        votes = judge_steps(judge_key, by_task(done), by_task(before), by_task(played.reward), n.flip)
        advantage, kept = step_advantages(by_task(won), votes, by_task(made), n)
        of_turns = lambda x: x.reshape(tasks * group, turns)  # noqa: E731
        mask = made & of_turns(kept)
        sampled = played.full_log_prob.reshape(tasks * group, turns, -1)[..., -1]
        episodes = packed(config, played)
        reference = read(model, {"policy": base}, episodes).log_prob

        def loss(params):
            said = read(model, {"policy": params}, episodes)
            losses = objectives.asymmetric_ppo(said.log_prob, sampled, of_turns(advantage), mask, CLIP)
            losses += n.kl * objectives.kl_estimate(said.log_prob, reference, "k3")
            return objectives.aggregate(losses, mask, "token_mean"), objectives.masked_mean(said.entropy, made)

        def step(carry, _):
            params, opt = carry
            grads, entropy = jax.grad(loss, has_aux=True)(params)
            change, opt = optimiser.update(grads, opt)
            params = optax.apply_updates(params, jax.tree.map(lambda x: -n.lr * x, change))
            return (params, opt), (optax.global_norm(grads), entropy)

        (params, opt), (norm, entropy) = jax.lax.scan(step, (state.params, state.opt), length=config.passes)
        told = bucket_metrics(advantage, kept, by_task(made)) | {
            "success": won.mean(dtype=jnp.float32),
            "steps": made.sum(axis=1).mean(dtype=jnp.float32),
            "entropy": entropy[0],
            "gradient norm": norm[0],
            "tokens": played.mask.sum(),
        }
        return AgentState(params, opt, state.key, state.step + 1), told

    def advance(state, n):
        return jax.lax.scan(lambda s, _: update(s, n), state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        del n
        key = jax.random.fold_in(state.key, 2**21)  # all tasks of the pool, the same draws at every evaluation
        task = jnp.arange(config.eval_prompts) % config.pool
        env = environment(config, state.key)
        played = play_tasks(key, model, state.params, env, task, no_lesson(config.eval_prompts))
        made = played.info["active"]
        return {
            "success": at_the_end(played.info["won"], made).mean(dtype=jnp.float32),
            "subtasks": at_the_end(played.info["progress"], made).sum(axis=1).mean(dtype=jnp.float32),
        }

    return Train(init, advance, evaluate)


def watch_tasks(config: "Config", state: AgentState, title: str, count: int = 2) -> list[Episode]:
    """Whole episodes of a trained agent in its own world, in words."""
    env = environment(config, state.key)
    key, task = jax.random.key(config.seed), jnp.arange(count)
    play = jax.jit(lambda params: play_tasks(key, agent_model(config), params, env, task, no_lesson(count)))
    played: Trajectory = jax.device_get(play(state.params))
    reset, step, episodes = jax.jit(env.reset), jax.jit(env.step), []
    for row in range(count):
        world_state, _ = reset(key, task[row])
        frames = [env.render(world_state)]
        for action in played.tokens[row][played.mask[row]]:  # one token a turn; the worlds draw nothing
            world_state, _ = step(key, world_state, jnp.asarray(action)[None])
            frames.append(env.render(world_state))
        if config.bench in BENCHES:  # the last one tells all that happened
            frames = frames[-1:]
        episodes.append(Episode(f"{title}, task {row}", frames, float(played.reward[row].sum())))
    return episodes
