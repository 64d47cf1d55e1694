"""V_0.5 with language models: how many rollouts does a value model's prior save? (arXiv 2603.10848, 2602.03584)

A small causal transformer learns arithmetic (or countdown) under GRPO, under V_0.5 with a fixed and with its own budget
per prompt, and under critics; `v05.py` has the same objective on a table and on a GRU, with all rivals. With
`--model smollm2` a pretrained model learns questions in English: V_0 reads the questions as a sentence encoder does
(all-MiniLM-L6-v2), rollouts are decided round by round outside of the program, and what is not drawn is not computed.

    python experiments/v05_language.py
    python experiments/v05_language.py --model smollm2

Results come to runs/v05_language/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import envs, objectives
from rollax.agents import (
    Sampling,
    ValueBatch,
    critic,
    first_observations,
    named_shardings,
    pretrain_critic,
    rollout,
    score,
    sequential_sampler,
    state_shardings,
    values_before,
)
from rollax.agents.value_model import context_for, empty_records, record, v0_from_features
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.v05_baselines import (
    SLOTS,
    Numbers,
    advantage_of,
    at_rollouts,
    gap_at_equal_rollouts,
    index,
    mean_of,
    variance,
)
from rollax.experiments.v05_tasks import TASKS, Task, pretrained_task, small_task
from rollax.experiments.v05_values import shown

WIDE = 4  # as many times the prompts
FEW = 4  # rollouts of the arms with few


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for a pretrained model."""

    model: str = "transformer"
    """transformer, smollm2, or the path of a Hugging Face directory or GGUF file."""
    task: str = "arithmetic"
    """For the transformer arithmetic or countdown; for a pretrained model one of envs.QUESTIONS."""
    arms: tuple[str, ...] = ()
    """Rows; all that the model has when empty."""
    seeds: int = 10
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 100
    """Rollouts, each followed by `passes` gradient steps."""
    chunk: int = 10
    """Updates between evaluations."""
    prompts: int = 16
    """Prompts of a rollout."""
    passes: int = 2
    """Gradient steps on each rollout."""
    lr: float = 5e-4
    """Adam's learning rate."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient."""
    cost: float = 1 / 256
    """Of a rollout, in squared error of the baseline: the price at which drawing ends."""
    contexts: int = 64
    """(prompt, success) pairs that V_0 reads."""
    queries: int = 48
    """Queries of a task on which V_0 is trained."""
    tasks: int = 4
    """Tasks of a step on which V_0 is trained, each a policy with its context."""
    head_updates: int = 1500
    """Steps on random tables that fit V_0's head; it is frozen then."""
    value_updates: int = 400
    """Steps of V_0's adapter before RL, on policies that are not trained here."""
    value_lr: float = 2e-3
    """Peak learning rate of V_0's adapter, and the learning rate of the critics."""
    soft_context: bool = True
    """V_0 reads success rates in its context, not whether they are above a half as the paper does."""
    critic_start: int = 100
    """Steps of VAPO's value pre-training."""
    warm_start: int = 60
    """Supervised steps that give the small transformer its start, one for all seeds, kept on disk."""
    layers: int = 2
    """Of the small transformer."""
    width: int = 64
    """Of the small transformer."""
    heads: int = 4
    """Of the small transformer."""
    eval_prompts: int = 128
    """Prompts of an evaluation; of a pretrained model, held out."""
    eval_samples: int = 4
    """Rollouts of each."""
    encoder: str = "minilm"
    """Pretrained: the sentence encoder that V_0 reads with, a name or a directory."""
    dtype: str = "float32"
    """Pretrained: type of the computation, float32 or bfloat16."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        if not self.small and self.model != "smollm2" and not Path(self.model).exists():
            raise ValueError(f"model: expected transformer, smollm2 or an existing path, got {self.model!r}")
        at_least_one = (
            "seeds updates chunk prompts passes contexts queries tasks head_updates value_updates layers width heads "
            "eval_prompts eval_samples"
        )
        for field in at_least_one.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("lr", "max_grad_norm", "cost", "value_lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected above 0, got {getattr(self, field)}")
        for field in ("critic_start", "warm_start"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if self.prompts > self.contexts:
            raise ValueError(f"prompts: expected at most contexts={self.contexts}, got {self.prompts}")
        tasks = tuple(TASKS) if self.small else tuple(envs.QUESTIONS)
        if self.task not in tasks:
            raise ValueError(f"task: expected one of {', '.join(tasks)} for --model {self.model}, got {self.task!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        known = arms_of(self)
        for arm in self.arms:
            if arm not in known:
                raise ValueError(f"arms: expected some of {', '.join(known)} for {self.model}, got {arm!r}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")

    @property
    def small(self) -> bool:
        return self.model == "transformer"


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "pretrained": dict(
        task="largest_of_three", arms=("grpo_4", "grpo_16", "osla, v0"), seeds=1, updates=20, chunk=4, prompts=12,
        passes=2, lr=1e-5, eval_prompts=64, eval_samples=4,
    ),
}  # fmt: skip

PRIOR = 1
ARMS = {
    "grpo_4": Numbers(index("group_mean"), by_std=1),
    "grpo_16": Numbers(index("group_mean"), SLOTS, SLOTS, by_std=1),
    "dr_grpo_4": Numbers(index("group_mean")),
    "static_4, v0": Numbers(index("fused"), source=PRIOR),
    "osla, v0": Numbers(index("fused"), k_max=SLOTS, source=PRIOR),
    "osla, no prior": Numbers(index("fused"), k_max=SLOTS),
    "beta_4, v0": Numbers(index("beta_posterior"), source=PRIOR),
}
# These have a program of their own: four times the prompts, a critic.
APART = {
    "grpo_4, wide": Numbers(index("group_mean"), by_std=1, wide=1),
    "ppo_4": Numbers(critic=1),
    # VAPO's alpha of .05 is for long answers: lambda is 0 below 20 tokens. At 1 it is .5 to .75 for two to four.
    "vapo_4": Numbers(critic=2),
    "vapo_4, alpha 1": Numbers(critic=2, alpha=1.0),
}


def arms_of(config: Config) -> dict[str, Numbers]:
    """What the model can run: wide and critical arms need a program beside the others, which one run alone has not."""
    return ARMS | APART if config.small else ARMS


# --- Training -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt: Any
    critic: Any
    critic_opt: Any
    records: Any  # V_0's context
    key: jax.Array
    step: jax.Array
    spent: jax.Array  # rollouts


def optimiser_of(config: Config) -> optax.GradientTransformation:
    """Up to the learning rate, which is traced."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(b2=0.99))


def prompt_ids(observation: envs.Tokens) -> jax.Array:
    """The same number for the same prompt, `[P]`, not negative."""
    odd = 2 * jax.random.randint(jax.random.key(3), (observation.ids.shape[1],), 0, 2**30) + 1
    real = jnp.arange(observation.ids.shape[1]) < observation.length[:, None]
    return (jnp.where(real, observation.ids + 1, 0) * odd).sum(axis=1) & (2**31 - 1)


def rewards_of(reward: jax.Array) -> jax.Array:
    """-1 and 1: an answer is right or wrong."""
    return jnp.where(reward > 0.5, 1.0, -1.0)


def more(reward: jax.Array, drawn: jax.Array, prior: jax.Array, n: Numbers) -> jax.Array:
    """V_0.5's stopping rule, between the arm's least and most rollouts."""
    count = drawn.sum(axis=1)
    total = jnp.where(drawn, rewards_of(reward), 0.0).sum(axis=1)
    fused = objectives.shrinkage_fuse(total, count, prior, noise_var=variance(n)(total, count))
    worth = objectives.osla_continue(fused, count, cost=n.cost, k_max=drawn.shape[1])
    return (count < n.k_init) | (worth & (count < n.k_max))


def first_state(key: jax.Array, params: Any, config: Config, task: Task, critical: bool = False) -> State:
    opt = optimiser_of(config).init(params)
    state, observation = jax.eval_shape(lambda key: first_observations(key, task.env, 1), key)
    features = jax.eval_shape(task.features, state, observation)
    records = empty_records(config.contexts, jax.ShapeDtypeStruct(features.shape[1:], features.dtype))
    value = value_opt = ()
    if critical:
        value = critic(task.model).init(jax.random.fold_in(key, 2), params)
        value_opt = optax.adam(config.value_lr).init(value)
    return State(params, opt, value, value_opt, records, key, jnp.int32(0), jnp.float32(0))


def prior_of(state: State, task: Task, features: jax.Array, ids: jax.Array, soft: bool) -> jax.Array:
    """V_0's prior in [-1, 1] from the latest records, none of them of these prompts."""
    visible = context_for(state.records, ids).all(axis=0)
    labels = shown(state.records.rate, int(soft))
    asked = v0_from_features(task.head, state.records.features, labels, features, visible, soft_labels=True)
    return 2 * jax.nn.sigmoid(asked) - 1


def make_train(config: Config, task: Task, kind: str = "budget", staged: bool = False) -> Train:
    """The functions of one run.

    Args:
      kind: "budget", or "wide" (four times the prompts, FEW rollouts), or "critic".
      staged: rounds of rollouts are decided outside of the program, and the loss is computed of what was drawn alone.
    """
    critical, prompts = kind == "critic", config.prompts * (WIDE if kind == "wide" else 1)
    slots = SLOTS if kind == "budget" else FEW
    model, env, optimiser, critic_optimiser = task.model, task.env, optimiser_of(config), optax.adam(config.value_lr)
    how = dict(num_prompts=prompts, k_max=slots, prefix=task.prefix)
    evaluator = critic(model) if critical else None

    def init(key):
        state = first_state(key, task.start(key), config, task, critical)
        if not (critical and config.critic_start):
            return state

        def sample(key):
            played = rollout(key, model, state.params, env, num_prompts=prompts, group_size=slots)
            returns = jnp.broadcast_to(rewards_of(played.reward.sum(axis=1))[:, None], played.tokens.shape)
            # A value belongs where the next token is the policy's.
            mask = jnp.roll(played.mask, -1, axis=1).at[:, -1].set(False) & (played.positions >= 0)
            return ValueBatch(played.tokens, played.positions, returns, mask)

        value, _ = pretrain_critic(
            jax.random.fold_in(key, 3), evaluator.apply, state.critic, sample, config.critic_start, lr=config.value_lr
        )
        return state._replace(critic=value)

    def ask(state):
        """Before anything is drawn: the prompts' numbers and features, V_0's prior."""
        key = jax.random.fold_in(state.key, state.step)
        start, observation = first_observations(key, env, prompts)
        ids, features = prompt_ids(observation), task.features(start, observation)
        return key, ids, features, prior_of(state, task, features, ids, config.soft_context)

    def learn(state, trajectory, reward, drawn, prior, asked, n):
        """`passes` gradient steps on rows of rollouts.

        reward, drawn: `[P, slots]`; trajectory: its rows, `asked` their numbers among all.
        """
        rewards, weight = rewards_of(reward), drawn / jnp.maximum(drawn.sum(1, keepdims=True), 1) / prompts
        advantage = advantage_of(rewards, drawn.astype(jnp.float32), n, prior).ravel()[asked][:, None]
        weight, mask = weight.ravel()[asked], trajectory.mask
        tokens = jnp.maximum(mask.sum(axis=1), 1)
        old = trajectory.full_log_prob
        told = {}
        value, value_opt = state.critic, state.critic_opt
        if critical:
            apply = lambda params: values_before(  # noqa: E731
                evaluator.apply(params, trajectory.tokens, trajectory.positions), trajectory.positions
            )
            last = mask & (jnp.cumsum(mask, axis=1) == tokens[:, None])
            paid = jnp.where(last, rewards.ravel()[:, None], 0.0)
            before = jnp.where(mask, apply(value), 0.0)
            plain, target = objectives.gae(paid, before, mask, 1.0, 1.0)
            adapted, _ = objectives.vapo_gae(paid, before, mask, 1.0, alpha=n.alpha)
            advantage = jnp.where(n.critic == 2, adapted, plain)
            error = lambda params: objectives.masked_mean((apply(params) - target) ** 2, mask)  # noqa: E731

            def fit_value(carry, _):
                value, opt = carry
                change, opt = critic_optimiser.update(jax.grad(error)(value), opt)
                return (optax.apply_updates(value, change), opt), None

            (value, value_opt), _ = jax.lax.scan(fit_value, (value, value_opt), length=config.passes)
        live = mask & (jnp.abs(advantage) > 0)
        # Staged rows come in another order, the drawn ones first, and not all of them.
        groups = dict(group=asked // slots, num_groups=prompts) if staged else dict(group_size=slots)

        def loss(params):
            log_prob, entropy = score(model, params, trajectory, env, prefix=task.prefix, **groups)
            losses = objectives.clipped_surrogate(log_prob - old, advantage, *objectives.clip_bounds(0.2))
            rows = jnp.where(mask, losses, 0.0).sum(axis=1) / tokens
            return weight @ rows, weight @ (jnp.where(mask, entropy, 0.0).sum(axis=1) / tokens)

        def step(carry, _):
            params, opt = carry
            grads, entropy = jax.grad(loss, has_aux=True)(params)
            change, opt = optimiser.update(grads, opt)
            params = optax.apply_updates(params, jax.tree.map(lambda x: -n.lr * x, change))
            return (params, opt), (optax.global_norm(grads), entropy)

        (params, opt), (norm, entropy) = jax.lax.scan(step, (state.params, state.opt), length=config.passes)
        told |= {"gradient norm": norm[0], "entropy": entropy[0], "live rows": (weight * live.any(axis=1)).sum()}
        return params, opt, value, value_opt, told

    def finish(state, learnt, ids, features, prior, reward, drawn, played_rows, mask):
        """The state after the update, and its metrics."""
        params, opt, value, value_opt, told = learnt
        mean = mean_of(rewards_of(reward), drawn)
        first = slice(0, config.prompts)
        records = record(state.records, ids[first], features[first], (mean[first] + 1) / 2, state.step)
        spent = state.spent + drawn.sum()
        told = told | {
            "reward": (mean.mean() + 1) / 2,
            "rollouts": drawn.sum() / config.prompts,
            "rows computed": played_rows / config.prompts,
            "dead groups": jnp.round(1 - told["live rows"], 4),  # the weights add up to 1 but for a rounding
            "prior less mean": jnp.sqrt(jnp.mean((prior - mean) ** 2)),
            "tokens": mask.sum(),
        }
        del told["live rows"]
        return State(params, opt, value, value_opt, records, state.key, state.step + 1, spent), told

    def evaluate(state, n):
        key = jax.random.fold_in(state.key, 2**20)  # the same episodes and draws at every evaluation
        played = rollout(
            key,
            model,
            state.params,
            task.held_out,
            num_prompts=config.eval_prompts,
            group_size=config.eval_samples,
            sampling=Sampling(1.0),
            prefix=task.prefix,
            early_exit=staged,
        )
        return {"reward": (played.reward.sum(axis=1) > 0.5).mean(dtype=jnp.float32), "spent": state.spent}

    if not staged:
        sample = sequential_sampler(model, env, more, k_init=FEW, buckets=(prompts,), early_exit=False, **how)

        def update(state, n):
            key, ids, features, prior = ask(state)
            prior = jnp.where(n.source == PRIOR, prior, 0.0)
            drawn = sample(key, state.params, prior, n)
            reward = drawn.trajectory.reward.sum(axis=1).reshape(prompts, slots)
            rows = jnp.arange(prompts * slots)
            learnt = learn(state, drawn.trajectory, reward, drawn.drawn, prior, rows, n)
            return finish(state, learnt, ids, features, prior, reward, drawn.drawn, drawn.rows, drawn.trajectory.mask)

        def advance(state, n):
            return jax.lax.scan(lambda s, _: update(s, n), state, length=min(config.chunk, config.updates))

        return Train(init, advance, evaluate)

    samplers = functools.cache(lambda k: sequential_sampler(model, env, more, k_init=k, compiled=True, **how))
    ask = jax.jit(ask)
    quarter = -(-prompts * slots // 4)

    @functools.partial(jax.jit, static_argnames="rows", donate_argnums=0)
    def learn_and_finish(state, sampled, ids, features, prior, n, *, rows):
        """On the rows that were drawn, in the smallest of four shapes."""
        drawn = sampled.drawn
        reward = sampled.trajectory.reward.sum(axis=1).reshape(prompts, slots)
        kept = jnp.argsort(~drawn.ravel(), stable=True)[:rows]
        trajectory = jax.tree.map(lambda x: x[kept], sampled.trajectory)
        learnt = learn(state, trajectory, reward, drawn, prior, kept, n)
        return finish(state, learnt, ids, features, prior, reward, drawn, sampled.rows, trajectory.mask)

    def advance_staged(state, n):
        told = []
        for _ in range(min(config.chunk, config.updates)):
            key, ids, features, prior = ask(state)
            prior = jnp.where(n.source == PRIOR, prior, 0.0)
            sampled = samplers(int(n.k_init))(key, state.params, prior, n)
            rows = min(-(-int(sampled.drawn.sum()) // quarter) * quarter, prompts * slots)
            state, metrics = learn_and_finish(state, sampled, ids, features, prior, n, rows=rows)
            told.append(metrics)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *told)

    return Train(init, advance_staged, jax.jit(evaluate), staged=True)


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    arms = config.arms or tuple(arms_of(config))
    rows = {arm: arms_of(config)[arm]._replace(cost=config.cost, lr=config.lr) for arm in arms}
    task = small_task(config) if config.small else pretrained_task(config)
    episodes = functools.partial(sample_episodes, config, task, arms)
    if config.small:
        kinds = {arm: "wide" if n.wide else "critic" if n.critic else "budget" for arm, n in rows.items()}
        trains = {kind: make_train(config, task, kind) for kind in dict.fromkeys(kinds.values())}
        return Build({arm: trains[kind] for arm, kind in kinds.items()}, rows, episodes)
    train = make_train(config, task, staged=True)
    start = functools.partial(first_state, config=config, task=task)
    shapes = jax.eval_shape(start, jax.random.key(0), task.shapes)
    places = named_shardings(task.model.axes, task.shapes, task.mesh)
    places = state_shardings(shapes, task.shapes, places, task.mesh)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    place = jax.jit(start, out_shardings=places, donate_argnums=1)
    return Build(train._replace(init=lambda key: place(key, task.start(key))), rows, episodes, state)


def sample_episodes(config: Config, task: Task, arms: Sequence[str], state_of: Callable) -> list[Episode]:
    """Two episodes of the first and the last arm, after training."""
    env, episodes = task.held_out, []
    play = jax.jit(
        lambda params: rollout(jax.random.key(config.seed), task.model, params, env, num_prompts=2, prefix=task.prefix)
    )
    for arm in dict.fromkeys((arms[0], arms[-1])):
        state = state_of(arm)
        if state is None:
            continue
        seen = jax.device_get(play(state.params))
        width = env.spec.max_observation
        for row, reward in enumerate(seen.reward.sum(axis=1)):
            real = seen.positions[row] >= 0
            question, answer = (
                envs.decode(ids, ids.size, env.spec.vocab)
                for ids in (seen.tokens[row, side][real[side]] for side in (slice(None, width), slice(width, None)))
            )
            episodes.append(Episode(f"{arm}, prompt {row + 1}", [f"{question}\n=> {answer}"], float(reward)))
    return episodes


def rollouts_to(results: Results, row: str, level: np.ndarray) -> np.ndarray:
    """Rollouts until the best evaluation so far reached each seed's level, `[seeds]`; NaN where it never did."""
    found = []
    for goal, spent, reward in zip(level, results.held_out[row]["spent"], results.held_out[row]["reward"], strict=True):
        best = np.maximum.accumulate(reward)
        # Linear within the part in which the level was passed.
        at = int(np.argmax(best >= goal))
        if best[at] < goal:
            found.append(np.nan)
        elif at == 0:
            found.append(spent[0])
        else:
            share = (goal - best[at - 1]) / (best[at] - best[at - 1])
            found.append(spent[at - 1] + share * (spent[at] - spent[at - 1]))
    return np.array(found)


def saved(row: str, baseline: str) -> Callable[[Results], np.ndarray]:
    """Share of the baseline's rollouts that the row saves up to the lower of their two last rewards, `[seeds]`."""

    def measure(results):
        level = np.minimum(*(results.held_out[r]["reward"].max(axis=1) for r in (row, baseline)))
        ours, theirs = (rollouts_to(results, r, level) for r in (row, baseline))
        return 1 - ours / np.maximum(theirs, 1)

    return measure


CLAIMS = [
    Claim("L1", "At 4 rollouts V_0.5 ends better than GRPO", gap("static_4, v0", "grpo_4", final), unit="reward",
          needs=("static_4, v0", "grpo_4")),
    Claim("L2a", "OSLA ends as good as GRPO with 16 at equal steps", gap("osla, v0", "grpo_16", final), "above", -0.05,
          "reward", needs=("osla, v0", "grpo_16")),
    Claim("L2b", "... and is better at equal rollouts", gap_at_equal_rollouts("osla, v0", "grpo_16"), unit="reward",
          needs=("osla, v0", "grpo_16")),
    Claim("L2c", "At equal reward OSLA saves at least half of the rollouts of GRPO with 16",
          saved("osla, v0", "grpo_16"), "above", 0.5, "share", needs=("osla, v0", "grpo_16")),
    Claim("L3a", "A rival: four times the prompts with GRPO's 4 rollouts is better than OSLA at equal rollouts",
          gap_at_equal_rollouts("grpo_4, wide", "osla, v0"), unit="reward", rival=True,
          needs=("grpo_4, wide", "osla, v0")),
    Claim("L3b", "A rival: GRPO with 4 rollouts is better than OSLA at equal rollouts",
          gap_at_equal_rollouts("grpo_4", "osla, v0"), unit="reward", rival=True,
          needs=("grpo_4", "osla, v0")),
    Claim("L4", "The prior helps: OSLA with V_0 is better than with a prior of 0 at equal rollouts",
          gap_at_equal_rollouts("osla, v0", "osla, no prior"), unit="reward", needs=("osla, v0", "osla, no prior")),
    Claim("L5a", "At 4 rollouts V_0.5 ends better than PPO with a critic of its own",
          gap("static_4, v0", "ppo_4", final), unit="reward", needs=("static_4, v0", "ppo_4")),
    Claim("L5b", "... and than VAPO", gap("static_4, v0", "vapo_4", final), unit="reward",
          needs=("static_4, v0", "vapo_4")),
    Claim("L5c", "... also where its lambda is fit for short answers", gap("static_4, v0", "vapo_4, alpha 1", final),
          unit="reward", needs=("static_4, v0", "vapo_4, alpha 1")),
]  # fmt: skip


def mean(metric: str) -> Callable[[Results, str], np.ndarray]:
    return lambda results, row: results.train[row][metric].mean(axis=1)


def to_half_the_gain(results: Results, row: str) -> np.ndarray:
    """Rollouts until half of what the best row gained; NaN where the row never gained as much."""
    rewards = [held_out["reward"] for held_out in results.held_out.values()]
    start = results.held_out[row]["reward"][:, 0]
    best = np.max([reward.max(axis=1) for reward in rewards], axis=0)
    return rollouts_to(results, row, (start + best) / 2)


COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "reward, end": final,
    "reward, start": lambda r, row: r.held_out[row]["reward"][:, 0],
    "rollouts to half the best gain": to_half_the_gain,
    "rollouts a prompt": mean("rollouts"),
    "rows computed": mean("rows computed"),
    "dead groups": mean("dead groups"),
    "prior less mean": mean("prior less mean"),
    "gradient norm": mean("gradient norm"),
    "entropy": mean("entropy"),
}
FIGURE = ("grpo_4", "grpo_16", "grpo_4, wide", "static_4, v0", "osla, v0", "ppo_4", "vapo_4, alpha 1")


def panels(results: Results) -> list[Panel]:
    rows = [row for row in results.train if row in FIGURE] or list(results.train)
    least = min(results.held_out[row]["spent"][:, -1].min() for row in rows)
    grid = np.linspace(0, least, 30)
    by_rollouts = {
        row: np.stack([at_rollouts(results, row, np.full(len(results.held_out[row]["spent"]), x)) for x in grid], 1)
        for row in rows
    }
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    curves = lambda metric: {row: results.train[row][metric] for row in rows}  # noqa: E731
    return [
        Panel("reward in evaluation", results.evaluated_at, {row: results.held_out[row]["reward"] for row in rows}),
        Panel("reward in evaluation", grid, by_rollouts, "rollouts"),
        Panel("rollouts a prompt", updates, curves("rollouts")),
        Panel("share of dead groups", updates, curves("dead groups")),
        Panel("prior less the rollouts' mean", updates, curves("prior less mean")),
        Panel("entropy (nats)", updates, curves("entropy")),
    ]


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line over the defaults of the model's preset."""
    model = glance(Config(), argv).model
    preset = PRESETS["small" if model == "transformer" else "pretrained"]
    config = parse(Config(**{"model": model} | preset), __doc__, argv, check=False)
    with one_line_errors():
        config.check()
    return {Path(config.model).name.removesuffix(".gguf"): config}


STUDY = Study(
    name="v05_language",
    title="V_0.5 with language models (arXiv 2603.10848)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=("cost", "lr"),
    order=FIGURE,
    smoke=("--seeds", "2", "--updates", "2", "--chunk", "1", "--prompts", "4", "--width", "16", "--layers", "1",
           "--warm-start", "6", "--head-updates", "2", "--value-updates", "2", "--eval-prompts", "4",
           "--arms", "grpo_16", "osla, v0"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
