"""RetroAgent: does an agent learn faster that looks back on what happened? (arXiv 2603.08561)

After each episode the agent reflects: how many subtasks were done (an intrinsic reward where that is more than it could
before), was it a success, what is to be learnt. Lessons go to a memory, and half of each group gets one in its prompt,
chosen by similarity, usefulness and a bonus for what was tried little. All configurations and seeds are rows of one
program: policy, environments, memory and reflection never leave it.

    python experiments/retroagent.py
    python experiments/retroagent.py --bench shop --arms grpo "dual, half"

Results come to runs/retroagent/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import objectives
from rollax.agents import (
    TableMemory,
    Trajectory,
    add_to_table,
    init_table,
    lesson_slots,
    table_retrieve,
    update_utility,
)
from rollax.agents.reflection_memory import cosine
from rollax.envs.hidden_clusters import MAX_FIRST, MAX_SECOND, NO_LESSON, task_embeddings
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.retroagent_base import (
    BENCHES,
    SUBTASKS,
    at_the_end,
    base_model,
    calibration,
    expert_episodes,
    hallucinate,
    lesson_number,
    numbered_lesson,
    pack,
    play_tasks,
    read,
    small_model,
    wrong_lessons,
)

TASKS = 256  # of a world


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    bench: str = "household"
    """household or shop."""
    arms: tuple[str, ...] = ()
    """Rows (see ARMS); all when empty."""
    seeds: int = 10
    """Seeds, the unit of every interval, in one vmap; each has a world of its own."""
    seed: int = 0
    """The first seed."""
    updates: int = 150
    """Iterations: rollouts, reflection, memory, one gradient step."""
    chunk: int = 25
    """Iterations between evaluations."""
    num_first: int = 16
    """Level: values of the first hidden fact (places, search words); the paper's bench has 8, 12 and 16."""
    num_second: int = 8
    """Level: values of the second (appliances, filters): 4, 5 and 8."""
    tasks: int = 16
    """Tasks of an iteration."""
    group: int = 8
    """Rollouts of each, N."""
    lr: float = 2e-3
    """Adam's learning rate."""
    gamma: float = 0.95
    """Discount of a turn."""
    kl: float = 0.01
    """Weight of the divergence from the base model (k3)."""
    penalty: float = 0.5
    """What a turn loses whose token is no action."""
    floor: float = 0.3
    """Added to the deviation of a group where an arm has a floor."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient."""
    eval_samples: int = 2
    """Rollouts of each of the 256 tasks in an evaluation."""
    width: int = 32
    """Of the transformer."""
    layers: int = 2
    """Of the transformer."""
    heads: int = 4
    """Of the transformer."""
    base_steps: int = 1500
    """Supervised steps of the base model."""
    base_batch: int = 64
    """Episodes of the demonstrator, and of the expert, in each."""
    base_lr: float = 3e-3
    """Adam's learning rate; a short rise, then a cosine to 0."""
    base_seed: int = 0
    """Of the base model, one for all rows and seeds."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        if self.bench not in BENCHES:
            raise ValueError(f"bench: expected one of {', '.join(BENCHES)}, got {self.bench!r}")
        least = "seeds updates chunk tasks eval_samples width layers heads base_steps base_batch"
        for field in least.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not 1 <= self.tasks <= TASKS:
            raise ValueError(f"tasks: expected 1 to {TASKS}, got {self.tasks}")
        if self.group < 2 or self.group % 2:
            raise ValueError(
                f"group: expected an even number of at least 2, half of it gets a lesson, got {self.group}"
            )
        for field, most in (("num_first", MAX_FIRST), ("num_second", MAX_SECOND)):
            if not 2 <= getattr(self, field) <= most:
                raise ValueError(f"{field}: expected 2 to {most}, got {getattr(self, field)}")
        for field in ("lr", "base_lr", "max_grad_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected above 0, got {getattr(self, field)}")
        for field in ("kl", "penalty", "floor"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: expected 0 to 1, got {self.gamma}")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {arm!r}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


# --- Arms -----------------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What may differ between the rows of the one program, all traced."""

    intrinsic: float = 0.0  # weight of the intrinsic reward
    progress: int = 0  # it is made of success instead of subtasks
    uniform: int = 0  # the return as printed, which grows with the length
    has_floor: int = 1  # of the deviation that advantages are divided by
    gigpo: int = 0
    share: float = 0.0  # of a group that gets a lesson
    alpha: float = 0.7  # relevance against usefulness; 1 is relevance alone
    kappa: float = 1.0  # of the bonus; 0 is none
    invented: float = 0.3  # how often a slot of a lesson is invented: .3 with one trajectory, .1 with a pair
    trained: int = 0  # reflection by the policy's own heads, trained
    weight: float = 0.0  # lambda, of its loss
    rule: int = 0  # of its reward: consistency, eq3, r_int
    poison: int = 0  # the memory begins with a wrong lesson for every task
    merges: int = 0  # a lesson told again counts as a use, and pulls its utility to the start, as in the released code
    lr: float = 2e-3
    gamma: float = 0.95
    kl: float = 0.01
    penalty: float = 0.5
    floor: float = 0.3


CAP = dict(intrinsic=1.0)
SIMILARITY = dict(share=0.5, alpha=1.0)
GREEDY = dict(share=0.5, kappa=0.0)
UCB = dict(share=0.5)
ARMS = {
    "grpo, printed return": Numbers(uniform=1),
    "grpo": Numbers(),
    "grpo, no floor": Numbers(has_floor=0),
    "gigpo": Numbers(gigpo=1),
    "progress": Numbers(**CAP, progress=1),
    "progress, no floor": Numbers(**CAP, progress=1, has_floor=0),
    "capability": Numbers(**CAP),
    "capability, no floor": Numbers(**CAP, has_floor=0),
    "similarity, half": Numbers(**SIMILARITY),
    "similarity, full": Numbers(**SIMILARITY | dict(share=1.0)),
    "utility, half": Numbers(**GREEDY),
    "kappa .1, half": Numbers(**UCB | dict(kappa=0.1)),
    "kappa .3, half": Numbers(**UCB | dict(kappa=0.3)),
    "ucb, half": Numbers(**UCB),
    "ucb, half, merges count": Numbers(**UCB, merges=1),
    "ucb, full": Numbers(**UCB | dict(share=1.0)),
    "dual, half": Numbers(**CAP, **UCB),
    "dual, full": Numbers(**CAP, **UCB | dict(share=1.0)),
    "dual, utility": Numbers(**CAP, **GREEDY),
    "dual, pairs": Numbers(**CAP, **UCB, invented=0.1),
    "dual, poisoned": Numbers(**CAP, **UCB, poison=1),
    "similarity, poisoned": Numbers(**SIMILARITY, poison=1),
    "dual, trained": Numbers(**CAP, **UCB, trained=1, weight=1.0),
    "dual, trained, half weight": Numbers(**CAP, **UCB, trained=1, weight=0.5),
    "dual, untrained heads": Numbers(**CAP, **UCB, trained=1),
    "dual, trained, eq. 3": Numbers(**CAP, **UCB, trained=1, weight=1.0, rule=1),
    "dual, trained, r_int": Numbers(**CAP, **UCB, trained=1, weight=1.0, rule=2),
}


# --- Training -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training carries. The base model's parameters are the study's, not the state's."""

    params: Any
    opt: Any
    memory: TableMemory
    baseline: jax.Array  # Phi of the tasks, [256]
    key: jax.Array
    step: jax.Array


class Reflected(NamedTuple):
    """What came of looking back on N episodes."""

    outcome: jax.Array  # c, bool [N]
    subtasks: jax.Array  # called completed, [N]
    lesson: jax.Array  # [N, 2]


def make_train(config: Config, base: dict) -> Train:
    """The functions of one run."""
    bench, level = BENCHES[config.bench], (config.num_first, config.num_second)
    spec = bench.make(*level).spec
    model = small_model(config, bench.make(*level))
    optimiser = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam())
    lessons = (1 + 2 * level[0]) * (1 + 2 * level[1])
    rows, turns = config.tasks * config.group, spec.max_turns
    group = jnp.arange(rows) // config.group
    columns = spec.max_observation + spec.max_action
    discounted, of_group = objectives.discounted_reward_to_go, objectives.group_advantage

    def world_of(key):
        """The seed's world, and how near its tasks are to one another."""
        world = bench.draw(jax.random.fold_in(key, 2**20), *level)
        embedding = task_embeddings(jax.random.fold_in(key, 2**20 + 1), world.facts, world.name)
        return world, cosine(embedding, embedding)

    def empty_memory():
        return init_table(TASKS, lessons)

    def poisoned(key, memory, world):
        """A wrong lesson for every task."""
        everywhere = jnp.ones(TASKS, bool)
        number = lesson_number(wrong_lessons(key, world, *level), *level)
        return add_to_table(memory, jnp.arange(TASKS), number, everywhere, everywhere)

    def init(key):
        return State(base, optimiser.init(base), empty_memory(), jnp.zeros(TASKS), key, jnp.int32(0))

    def looked_back(key, said, won, progress, lesson, n) -> Reflected:
        """In context: told the outcome, it counts rightly and invents some lessons. Trained: what its heads say."""
        outcome_key, subtask_key, *lesson_keys, invent_key = jax.random.split(key, 5)
        outcome = jax.random.bernoulli(outcome_key, jax.nn.sigmoid(said.outcome))
        subtasks = jax.random.bernoulli(subtask_key, jax.nn.sigmoid(said.subtasks)).sum(axis=1)
        slots = [jax.random.categorical(k, x) for k, x in zip(lesson_keys, (said.first, said.second), strict=True)]
        own = Reflected(outcome, subtasks, jnp.stack(slots, axis=1).astype(jnp.int32))
        told = Reflected(won, progress.sum(axis=1), hallucinate(invent_key, lesson, n.invented, *level))
        return jax.tree.map(lambda a, b: jnp.where(n.trained, a, b), own, told)

    def advantages(trajectory, active, won, intrinsic, n):
        """Of the turns, `[N, K]`; those behind an end are a group of their own."""
        length = active.sum(axis=1)
        last = active & (jnp.arange(turns) == length[:, None] - 1)
        earned = trajectory.reward + jnp.where(last, n.intrinsic * intrinsic[:, None], 0.0)
        total = earned.sum(axis=1)
        to_go = discounted(earned, active, n.gamma)
        printed = jnp.broadcast_to(objectives.uniform_return(total, length, n.gamma)[:, None], to_go.shape)
        wrong = active & ~trajectory.info["valid"]
        row = (jnp.where(n.uniform, printed, to_go) - n.penalty * wrong).ravel()
        groups = jnp.where(active, group[:, None], config.tasks).ravel()
        floor = jnp.where(n.has_floor, n.floor, 0.0)
        plain = of_group(row, groups, config.tasks + 1, norm="std_floor", floor=floor)
        seen = trajectory.tokens.reshape(rows, turns, columns)[..., : spec.max_observation]
        anchor = (seen * np.random.default_rng(0).integers(1, 2**30, spec.max_observation)).sum(axis=-1).ravel()
        whole = jnp.broadcast_to(total[:, None], to_go.shape).ravel()
        gigpo = objectives.gigpo_advantage(whole, row, groups, anchor, norm="mean_std")
        return jnp.where(active.ravel(), jnp.where(n.gigpo, gigpo, plain), 0.0).reshape(rows, turns)

    def loss(told, reference, sampled, advantage, active, reflection, n):
        """Of the decisions, and of the prediction of the outcome, from what the model reads."""
        decided, metrics = objectives.dual_clip_loss(
            told.log_prob, sampled, advantage, active, ref_logp=reference, kl=n.kl
        )
        entropy = objectives.masked_mean(told.entropy, active)
        outcome, credit = reflection
        log_c = -optax.sigmoid_binary_cross_entropy(told.reflection.outcome, outcome.astype(jnp.float32))
        looked = -(jax.lax.stop_gradient(credit) * log_c).mean()
        return decided - 0.001 * entropy + n.weight * looked, metrics | {"entropy": entropy}

    def update(state, world, near, n):
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        memory = jax.tree.map(
            lambda bad, own: jnp.where(n.poison * (state.step == 0), bad, own),
            poisoned(jax.random.fold_in(state.key, 2**23), state.memory, world),
            state.memory,
        )
        task = jax.random.choice(keys[0], TASKS, (config.tasks,), replace=False)
        index, found = table_retrieve(near[task], memory, 1, alpha=n.alpha, kappa=n.kappa)
        index, found = index[:, 0], found[:, 0]
        helped = (lesson_slots(config.group, n.share)[None] & found[:, None]).ravel()
        shown = numbered_lesson(jnp.repeat(index, config.group) % lessons, *level)
        shown = jnp.where(helped[:, None], shown, NO_LESSON)
        tasks = jnp.repeat(task, config.group)
        env = bench.make(world=world)
        trajectory = play_tasks(keys[1], model, state.params["policy"], env, tasks, shown)
        active = trajectory.info["active"]
        won, progress, lesson = (at_the_end(trajectory.info[x], active) for x in ("won", "progress", "lesson"))

        memory = update_utility(memory, jnp.repeat(index, config.group), won.astype(jnp.float32), helped)
        # One pass of the model over its episodes serves looking back and, through its pullback, learning.
        episodes = pack(trajectory, spec, bench.answer)
        told, pullback = jax.vjp(lambda params: read(model, params, episodes), state.params)
        back = looked_back(keys[2], told.reflection, won, progress, lesson, n)
        potential = objectives.subtask_potential(back.subtasks, SUBTASKS, won)
        potential = jnp.where(n.progress, won.astype(jnp.float32), potential)
        intrinsic = objectives.capability_reward(potential, state.baseline[tasks])
        success = won.reshape(config.tasks, config.group).mean(axis=1, dtype=jnp.float32)
        baseline = objectives.update_baseline(state.baseline, task, success)
        right = back.outcome == won
        worth = (back.lesson != NO_LESSON).any(axis=1) & right
        number = lesson_number(back.lesson, *level)
        place = tasks * lessons + number
        worth &= number < lessons  # heads may say what is no statement about their fact
        told_before = memory.used.ravel()[place] | jnp.tril((place[:, None] == place) & worth, -1).any(axis=1)
        memory = add_to_table(memory, tasks, number, won, worth & (~told_before | (n.merges > 0)))

        advantage = advantages(trajectory, active, won, intrinsic, n)
        paid = jnp.stack(
            [
                objectives.reflection_reward(back.outcome, won, intrinsic, rule=rule)
                for rule in ("consistency", "eq3", "r_int")
            ]
        )[n.rule]
        credit = objectives.reflection_advantage(paid[:, None], jnp.ones((rows, 1), bool))[:, 0]
        reference = read(model, {"policy": base["policy"]}, episodes).log_prob
        sampled = trajectory.log_prob.reshape(rows, turns, columns)[..., -1]
        pull, metrics = jax.grad(loss, has_aux=True)(
            told, reference, sampled, advantage, active, (back.outcome, credit), n
        )
        (grads,) = pullback(pull)
        change, opt = optimiser.update(grads, state.opt)
        params = optax.apply_updates(state.params, jax.tree.map(lambda x: -n.lr * x, change))
        plain = ~helped
        metrics = {
            "success": won.mean(dtype=jnp.float32),
            "success with a lesson": (won & helped).sum() / jnp.maximum(helped.sum(), 1),
            "success without": (won & plain).sum() / jnp.maximum(plain.sum(), 1),
            "intrinsic reward": intrinsic.mean(),
            "reflections right": right.mean(dtype=jnp.float32),
            "lessons": memory.used.sum().astype(jnp.float32),
            "gradient norm": optax.global_norm(grads),
            "entropy": metrics["entropy"],
            "divergence": metrics["kl"],
            "env_steps": active.sum(),
        }
        return State(params, opt, memory, baseline, state.key, state.step + 1), metrics

    def advance(state, n):
        world, near = world_of(state.key)
        return jax.lax.scan(lambda s, _: update(s, world, near, n), state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        """All tasks, with and without the memory, and on a harder world with and without the right lessons."""
        world, near = world_of(state.key)
        key = jax.random.fold_in(state.key, 2**21)
        task = jnp.tile(jnp.arange(TASKS), config.eval_samples)

        def success(world, lesson):
            played = play_tasks(key, model, state.params["policy"], bench.make(world=world), task, lesson)
            active = played.info["active"]
            return at_the_end(played.info["won"], active), played.tokens

        nothing = jnp.full((task.size, 2), NO_LESSON)
        index, found = table_retrieve(near, state.memory, 1, alpha=n.alpha, kappa=0.0)
        lesson = jnp.where(found, numbered_lesson(index[:, 0] % lessons, *level), NO_LESSON)
        harder = bench.draw(jax.random.fold_in(state.key, 2**22), MAX_FIRST, MAX_SECOND)
        true = jnp.stack([harder.facts.first, harder.facts.second], axis=1)[harder.name][task]
        right = true + jnp.asarray([1, 1 + 2 * MAX_FIRST])  # IS_FIRST, IS_SECOND
        # One program for all four, since its compilation is most of what an evaluation costs.
        worlds = jax.tree.map(lambda a, b: jnp.stack([a, a, b, b]), world, harder)
        won, tokens = jax.vmap(success)(worlds, jnp.stack([nothing, lesson[task], nothing, right]))
        alone, helped, elsewhere, told = won
        used = state.memory.used
        ways = tokens[0].reshape(task.size, turns, columns)[..., -1] @ (31 ** jnp.arange(turns))
        ways = jnp.sort(jnp.where(alone, ways, -1))
        often = (used & (state.memory.count > 16)).sum()  # more than 15 uses: the count begins at 1
        return {
            "memory off": alone.mean(dtype=jnp.float32),
            "memory on": helped.mean(dtype=jnp.float32),
            "elsewhere": elsewhere.mean(dtype=jnp.float32),
            "elsewhere, told": told.mean(dtype=jnp.float32),
            "ways to win": ((jnp.diff(ways) != 0).sum() + 1 - (~alone).any()).astype(jnp.float32),
            "used often": often.astype(jnp.float32),
            "share used often": often / jnp.maximum(used.sum(), 1),
        }

    return Train(init, advance, evaluate)


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    base = base_model(config)
    told = jax.device_get(jax.jit(functools.partial(calibration, config=config))(jax.random.key(1), base))
    print("base model: " + ", ".join(f"{share:.3f} with {what} lesson" for what, share in told.items()), flush=True)
    arms = config.arms or tuple(ARMS)
    shared = {field: getattr(config, field) for field in ("lr", "gamma", "kl", "penalty", "floor")}
    rows = {arm: ARMS[arm]._replace(**shared) for arm in arms}
    return Build(make_train(config, base), rows, functools.partial(sample_episodes, config, arms))


def sample_episodes(config: Config, arms: Sequence[str], state_of: Callable) -> list[Episode]:
    """Two episodes of the first and the last arm after training, in words, and one of the expert in every world."""
    bench, level = BENCHES[config.bench], (config.num_first, config.num_second)
    model, episodes = small_model(config, bench.make(*level)), []
    for arm in dict.fromkeys((arms[0], arms[-1])):
        state = state_of(arm)
        if state is None:
            continue
        world = bench.draw(jax.random.fold_in(state.key, 2**20), *level)
        env = bench.make(world=world)
        lesson = jnp.full((2, 2), NO_LESSON)
        played = jax.device_get(
            jax.jit(functools.partial(play_tasks, model=model, env=env))(
                jax.random.key(0), params=state.params["policy"], task=jnp.arange(2), lesson=lesson
            )
        )
        for row in range(2):
            episodes.append(
                Episode(f"{arm}, task {row}", [told_again(env, played, row)], float(played.reward[row].sum()))
            )
    return episodes + expert_episodes(jax.random.key(config.seed))


def told_again(env, played: Trajectory, row: int) -> str:
    """An episode in words: its actions once more in the environment."""
    width = env.spec.max_observation + env.spec.max_action
    state, _ = jax.jit(env.reset)(jax.random.key(0), row)
    step = jax.jit(env.step)
    for turn in range(int(played.info["active"][row].sum())):
        action = played.tokens[row, turn * width + env.spec.max_observation : (turn + 1) * width]
        state, _ = step(jax.random.key(0), state, action)
    return env.render(jax.device_get(state))


OFF, ON = "memory off", "memory on"


def steps_to(level: float) -> Callable[[Results, str], np.ndarray]:
    """Updates until success without memory is above a level, at the evaluations, `[seeds]`; NaN where it never is."""

    def measure(results, row):
        reached = results.held_out[row][OFF] >= level
        return np.where(reached.any(axis=1), results.evaluated_at[reached.argmax(axis=1)], np.nan)

    return measure


def better(first: str, second: str, metric: str = OFF) -> Callable[[Results], np.ndarray]:
    return gap(first, second, final, metric)


CLAIMS = [
    Claim("C1a", "The intrinsic reward helps: capability ends better than GRPO with the same returns",
          better("capability", "grpo"), unit="success", needs=("capability", "grpo")),
    Claim("C1b", "... also where the group's deviation has no floor", better("capability, no floor", "grpo, no floor"),
          unit="success", needs=("capability, no floor", "grpo, no floor")),
    Claim("C1c", "Discounted returns alone end better than the printed return", better("grpo", "grpo, printed return"),
          unit="success", needs=("grpo", "grpo, printed return")),
    Claim("C2a", "Capability ends better than progress-guided", better("capability", "progress"), unit="success",
          needs=("capability", "progress")),
    Claim("C2b", "Without a floor progress-guided ends as GRPO does (± .03)",
          better("progress, no floor", "grpo, no floor"), "within", 0.03, "success",
          needs=("progress, no floor", "grpo, no floor")),
    Claim("C3a", "SimUtil-UCB ends better than similarity, memory on", better("ucb, half", "similarity, half", ON),
          unit="success", needs=("ucb, half", "similarity, half")),
    Claim("C3b", "... and memory off", better("ucb, half", "similarity, half"), unit="success",
          needs=("ucb, half", "similarity, half")),
    Claim("C3c", "The bonus helps: UCB ends better than similarity and utility, memory on",
          better("ucb, half", "utility, half", ON), unit="success", needs=("ucb, half", "utility, half")),
    Claim("C3d", "A lesson told again is no use: UCB that does not count it ends better, memory on",
          better("ucb, half", "ucb, half, merges count", ON), unit="success",
          needs=("ucb, half", "ucb, half, merges count")),
    Claim("C4", "UCB flattens use: fewer lessons are used more than 15 times than with similarity",
          lambda r: final(r, "similarity, half", "used often") - final(r, "ucb, half", "used often"), unit="lessons",
          needs=("ucb, half", "similarity, half")),
    Claim("C5a", "Lessons for half of a group end better than for all, memory off", better("dual, half", "dual, full"),
          unit="success", needs=("dual, half", "dual, full")),
    Claim("C5b", "... and memory on", better("dual, half", "dual, full", ON), unit="success",
          needs=("dual, half", "dual, full")),
    Claim("C6", "Better reflection helps: a tenth of invented statements ends better than three tenths, memory on",
          better("dual, pairs", "dual, half", ON), unit="success", needs=("dual, pairs", "dual, half")),
    Claim("C7a", "What the memory taught stays without it: dual ends better than GRPO, memory off",
          better("dual, half", "grpo"), unit="success", needs=("dual, half", "grpo")),
    Claim("C7b", "... and close to its success with memory (within .05)",
          lambda r: final(r, "dual, half", OFF) - final(r, "dual, half", ON), "within", 0.05, "success",
          needs=("dual, half",)),
    Claim("C8a", "Both channels end better than the reward alone, memory on",
          lambda r: final(r, "dual, half", ON) - final(r, "capability", OFF), unit="success",
          needs=("dual, half", "capability")),
    Claim("C8b", "Both channels end better than the lessons alone, memory on", better("dual, half", "ucb, half", ON),
          unit="success", needs=("dual, half", "ucb, half")),
    Claim("C9a", "Trained reflection ends better than in context, memory on", better("dual, trained", "dual, half", ON),
          unit="success", needs=("dual, trained", "dual, half")),
    Claim("C9b", "Training keeps reflection right: late, more predictions are right than by heads left as they were",
          lambda r: late_of(r, "dual, trained") - late_of(r, "dual, untrained heads"), unit="share",
          needs=("dual, trained", "dual, untrained heads")),
    Claim("C9c", "The reward of either outcome ends better than eq. 3 as printed, memory on",
          better("dual, trained", "dual, trained, eq. 3", ON), unit="success",
          needs=("dual, trained", "dual, trained, eq. 3")),
    Claim("C10", "A poisoned memory harms similarity more than dual with UCB, memory on",
          lambda r: (final(r, "similarity, half", ON) - final(r, "similarity, poisoned", ON))
          - (final(r, "dual, half", ON) - final(r, "dual, poisoned", ON)), unit="success",
          needs=("similarity, half", "similarity, poisoned", "dual, half", "dual, poisoned")),
    Claim("C12", "Learning with lessons keeps one able to use them: told the truth in a world never seen, dual"
          " ends better than GRPO", better("dual, half", "grpo", "elsewhere, told"), unit="success",
          needs=("dual, half", "grpo")),
    Claim("C11", "GiGPO ends better than GRPO", better("gigpo", "grpo"), unit="success", needs=("gigpo", "grpo")),
]  # fmt: skip


def late_of(results: Results, row: str, metric: str = "reflections right") -> np.ndarray:
    values = results.train[row][metric]
    return values[:, -max(1, values.shape[1] // 6) :].mean(axis=1)


COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    OFF: lambda r, row: final(r, row, OFF),
    ON: lambda r, row: final(r, row, ON),
    "updates to .1": steps_to(0.1),
    "used often": lambda r, row: final(r, row, "used often"),
    "reflections right": late_of,
    "ways to win": lambda r, row: final(r, row, "ways to win"),
    "elsewhere": lambda r, row: final(r, row, "elsewhere"),
    "elsewhere, told": lambda r, row: final(r, row, "elsewhere, told"),
    "entropy": lambda r, row: late_of(r, row, "entropy"),
}
FIGURE = ("grpo", "capability", "similarity, half", "utility, half", "ucb, half", "dual, half", "dual, trained")


def panels(results: Results) -> list[Panel]:
    rows = [row for row in results.train if row in FIGURE] or list(results.train)
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    held = lambda metric: {row: results.held_out[row][metric] for row in rows}  # noqa: E731
    trained = lambda metric: {row: results.train[row][metric] for row in rows}  # noqa: E731
    return [
        Panel("success, memory off", results.evaluated_at, held(OFF)),
        Panel("success, memory on", results.evaluated_at, held(ON)),
        Panel("success in training", updates, trained("success")),
        Panel("intrinsic reward", updates, trained("intrinsic reward")),
        Panel("reflections that are right", updates, trained("reflections right")),
        Panel("entropy (nats)", updates, trained("entropy")),
    ]


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line; by the bench's name."""
    config = parse(Config(), __doc__, argv, check=False)
    with one_line_errors():
        config.check()
    return {config.bench: config}


STUDY = Study(
    name="retroagent",
    title="RetroAgent (arXiv 2603.08561)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=("lr", "gamma", "kl", "penalty", "floor"),
    order=FIGURE,
    smoke=("--seeds", "2", "--updates", "2", "--chunk", "1", "--num-first", "4", "--num-second", "2", "--tasks", "2",
           "--group", "2", "--width", "8", "--heads", "2", "--layers", "1", "--eval-samples", "1", "--base-steps", "2",
           "--base-batch", "4"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
