"""BandPO: does a trust region per token beat a fixed clip range? (arXiv 2603.04918)

PPO and GRPO clip the ratio pi_new / pi_old to one interval, so a token may change its probability only in proportion
to it, and rare good tokens hardly grow. Band takes the widest interval inside an f-divergence ball instead. The study
trains every arm from the same starts on the paper's mechanism (rare good tokens beside common mediocre ones), all arms
and seeds in one program, and judges the claims R1 to R5.

    python experiments/bandpo.py                                     # both small policies, all claims
    python experiments/bandpo.py --model tabular --arms clip band_kl --delta 0.02
    python experiments/bandpo.py --model smollm2 --task largest_of_three

Results come to runs/bandpo/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet, checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rollax import envs, objectives
from rollax.agents import (
    LanguageModel,
    Sampling,
    Trajectory,
    TransformerConfig,
    batch_sharding,
    demonstrate,
    named_shardings,
    rollout,
    score,
    state_shardings,
    tabular,
    transformer,
)
from rollax.envs import Environment
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.language_task import load_language_task
from rollax.experiments.harness.loop import Results, Train, early, final, gap, late
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.harness.supervised import fit

SMALL = ("tabular", "transformer")


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for each kind of model."""

    model: str = "both"
    """tabular, transformer, both of them, smollm2, or the path of a Hugging Face directory or GGUF file."""
    task: str = "tail_forks"
    """For the transformer also sorting, arithmetic, countdown; for a pretrained model one of envs.QUESTIONS."""
    arms: tuple[str, ...] = ()
    """Objectives to compare (see ARMS); the preset of the model when empty."""
    seeds: int = 16
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 60
    """Rollouts, each followed by `passes` times `mini_batches` gradient steps."""
    prompts: int = 8
    """Prompts of a rollout."""
    samples: int = 16
    """Rollouts of each prompt: the group of the advantage."""
    mini_batches: int = 8
    """Gradient steps of a pass. With one step in all the ratio is 1 and nothing clips."""
    passes: int = 2
    """Passes over each rollout."""
    block: int = 1
    """Rows of a prompt that stay together in a mini-batch and share the computation of their prompt."""
    micro_batches: int = 1
    """Parts of a mini-batch whose gradients are accumulated, under the denominators of the whole."""
    lr: float = 0.1
    """Adam's learning rate."""
    warmup: int = 0
    """Updates over which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient."""
    delta: float = 0.05
    """Radius of Band's and DPPO's trust region: nats for KL, dimensionless for TV and chi-squared."""
    upper_max: float = 10.0
    """Largest upper bound of Band."""
    dual_clip: float = 10.0
    """Largest loss of a token with a negative advantage, in units of the advantage."""
    clip_low: float = 0.2
    """PPO's clip range, and the lower one of Clip-Higher."""
    clip_high: float = 0.28
    """Clip-Higher's upper range."""
    ratio_cap: float = 20.0
    """Truncation of DPPO's ratio."""
    kl_coefficient: float = 0.0
    """Weight of the k3 estimate of the divergence from the starting policy."""
    aggregation: str = "seq_mean_token_mean"
    """How the losses of tokens become one number (objectives.aggregate)."""
    temperature: float = 1.0
    """Of sampling and of all log-probs."""
    control_lr: float = 0.3
    """Learning rate of the small-update control, as a share of `lr`."""
    staleness: int = 4
    """Updates by which the sampling policy lags in the stress regime; 0 leaves the regime out."""
    shuffle_rewards: bool = False
    """A control that must destroy learning: rewards are permuted over the whole batch."""
    eval_prompts: int = 16
    """Prompts of an evaluation."""
    eval_samples: int = 32
    """Rollouts of each prompt of an evaluation, for pass@k."""
    chunk: int = 10
    """Updates between evaluations: one call of the compiled program."""
    good_prob: float = 0.03
    """tail_forks: initial probability of the good token."""
    horizon: int = 6
    """tail_forks: tokens of an episode; sorting: digits."""
    vocab_size: int = 32
    """tail_forks: tokens to choose from."""
    layers: int = 2
    """Of the small transformer."""
    width: int = 64
    """Of the small transformer."""
    heads: int = 4
    """Of the small transformer."""
    warm_start: int = 300
    """Supervised steps that give the small transformer its start."""
    label_noise: float = 0.0
    """Share of wrong labels in the supervised start."""
    train_questions: int = 0
    """Pretrained: questions to train on; 0 takes what suits the task."""
    held_out_questions: int = 0
    """Pretrained: questions to hold out; 0 takes what suits the task."""
    bare: bool = False
    """Pretrained: examples as bare lines ("7 * 4 = 28") instead of "Question: ... Answer: ..."."""
    max_answer: int = 4
    """Pretrained: the most tokens of an answer, its end included."""
    dtype: str = "float32"
    """Pretrained: type of the computation, float32 or bfloat16."""
    remat: bool = False
    """Pretrained: recompute activations in the backward pass."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        if self.model not in SMALL and self.model != "smollm2" and not Path(self.model).exists():
            known = ", ".join((*SMALL, "both", "smollm2"))
            raise ValueError(f"model: expected {known} or an existing path, got {self.model!r}")
        at_least_one = ("seeds updates prompts samples mini_batches passes block micro_batches chunk eval_prompts "
                        "eval_samples horizon vocab_size layers width heads max_answer")  # fmt: skip
        not_negative = ("lr delta kl_coefficient staleness warm_start warmup label_noise control_lr "
                        "clip_low clip_high seed train_questions held_out_questions")  # fmt: skip
        for least, fields in ((1, at_least_one), (0, not_negative)):
            for field in fields.split():
                if not getattr(self, field) >= least:
                    raise ValueError(f"{field}: expected at least {least}, got {getattr(self, field)}")
        for field in ("temperature", "max_grad_norm", "ratio_cap"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected above 0, got {getattr(self, field)}")
        for field in ("upper_max", "dual_clip"):
            if not getattr(self, field) >= 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("lr", "delta"):
            if not np.isfinite(getattr(self, field)):
                raise ValueError(f"{field}: expected a finite number, got {getattr(self, field)}")
        if self.label_noise > 1:
            raise ValueError(f"label_noise: expected a share, at most 1, got {self.label_noise}")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {arm!r}")
        if self.aggregation not in objectives.MODES:
            raise ValueError(f"aggregation: expected one of {', '.join(objectives.MODES)}, got {self.aggregation!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if self.samples % self.block:
            raise ValueError(f"block: expected a divisor of samples={self.samples}, got {self.block}")
        blocks, parts = self.prompts * self.samples // self.block, self.mini_batches * self.micro_batches
        if blocks % parts:
            raise ValueError(f"mini_batches: {parts} parts do not divide the {blocks} blocks of a rollout")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")
        if self.model in SMALL and self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)} for --model {self.model}, got {self.task!r}")
        if self.model == "tabular" and self.task != "tail_forks":
            raise ValueError(f"task: the tabular policy knows tail_forks alone, got {self.task!r}")
        if self.model not in SMALL and self.task not in envs.QUESTIONS:
            known = ", ".join(envs.QUESTIONS)
            raise ValueError(f"task: expected one of {known} for a pretrained model, got {self.task!r}")


# The transformer is slower than the table, so it runs the arms that the claims need. A pretrained model fills the
# machine: one arm, one seed, few large updates.
PRESETS: dict[str, dict[str, Any]] = {
    "tabular": dict(
        arms=("clip", "clip_higher", "dcpo", "band_kl", "band_tv", "band_chi2", "band_kl_relax", "band_kl_upper",
              "dppo_kl", "dppo_tv", "no_clip"),
    ),
    "transformer": dict(
        lr=2e-4,
        staleness=0,
        arms=("clip", "clip_higher", "band_kl", "band_tv", "band_chi2", "band_kl_relax", "no_clip"),
    ),
    "pretrained": dict(
        task="largest_of_three", arms=("band_kl",), seeds=1, updates=30, chunk=5, prompts=16, samples=8, block=8,
        mini_batches=2, passes=1, lr=1e-5, warmup=4, eval_prompts=64, eval_samples=4,
    ),
}  # fmt: skip


# --- Arms: the paper's comparison -----------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What may differ between the rows of one program: all traced, so none of it costs a compilation."""

    arm: jax.Array  # index into the arms of the program
    lr: jax.Array
    staleness: jax.Array
    delta: jax.Array
    upper_max: jax.Array
    dual_clip: jax.Array
    clip_low: jax.Array
    clip_high: jax.Array
    ratio_cap: jax.Array
    kl_coefficient: jax.Array
    temperature: jax.Array


class Arm(NamedTuple):
    """An objective: bounds of the ratio, computed once per rollout, and the loss of each token."""

    bounds: Callable[[jax.Array, Numbers], tuple[jax.Array, jax.Array]]
    loss: Callable[..., jax.Array]


def clipped(log_prob, old_log_prob, advantage, lower, upper, n):
    return objectives.clipped_surrogate(log_prob - old_log_prob, advantage, lower, upper, dual_clip=n.dual_clip)


def unclipped(log_prob, old_log_prob, advantage, lower, upper, n):
    return objectives.clipped_surrogate(log_prob - old_log_prob, advantage, lower, upper)


def masked(divergence):
    def loss(log_prob, old_log_prob, advantage, lower, upper, n):
        keep = objectives.dppo_mask(log_prob, old_log_prob, advantage, n.delta, divergence)
        return objectives.masked_surrogate(log_prob, old_log_prob, advantage, keep, ratio_cap=n.ratio_cap)

    return loss


def fixed(old, low, high):
    return tuple(jnp.full_like(old, bound) for bound in objectives.clip_bounds(low, high))


def band(divergence):
    # Six Newton steps are one more than float64 needs.
    return lambda old, n: objectives.band_bounds(old, n.delta, divergence, upper_max=n.upper_max, newton_steps=6)


def band_relaxed(old, n):
    return objectives.relax_bounds(*band("kl")(old, n), n.clip_low, n.clip_high)


def band_upper(old, n):
    return fixed(old, n.clip_low, 0.0)[0], band("kl")(old, n)[1]


ARMS: dict[str, Arm] = {
    "clip": Arm(lambda old, n: fixed(old, n.clip_low, n.clip_low), clipped),
    "clip_higher": Arm(lambda old, n: fixed(old, n.clip_low, n.clip_high), clipped),
    "dcpo": Arm(lambda old, n: objectives.dcpo_bounds(old), clipped),
    "band_kl": Arm(band("kl"), clipped),
    "band_tv": Arm(band("tv"), clipped),
    "band_chi2": Arm(band("chi2"), clipped),
    "band_kl_relax": Arm(band_relaxed, clipped),
    "band_kl_upper": Arm(band_upper, clipped),
    "dppo_kl": Arm(band("kl"), masked("kl")),
    "dppo_tv": Arm(band("tv"), masked("tv")),
    "no_clip": Arm(lambda old, n: fixed(old, 1.0, jnp.inf), unclipped),
    # Not in the paper, so only on request: the other divergences, whose bounds are found by bisection.
    "band_rkl": Arm(band("rkl"), clipped),
    "band_neyman": Arm(band("neyman"), clipped),
    "band_hellinger": Arm(band("hellinger"), clipped),
    "band_js": Arm(band("js"), clipped),
}


# --- Tasks and policies ---------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Environments to train on and to hold out, and how a small policy is shown the task before it is trained."""

    env: Environment
    held_out: Environment
    show: Callable | None = None  # (key, state) -> action


def tail_forks_task(config: Config) -> Task:
    env = envs.tail_forks(config.prompts, config.horizon, config.vocab_size, config.good_prob)
    return Task(env, env, env.demonstrate)


def expert_task(make_env: Callable[..., Environment], *arguments: Any) -> Task:
    env = make_env(*arguments, split="train")
    return Task(env, make_env(*arguments, split="held_out"), env.expert)


TASKS: dict[str, Callable[[Config], Task]] = {
    "tail_forks": tail_forks_task,
    "sorting": lambda config: expert_task(envs.sorting, config.horizon),
    "arithmetic": lambda config: expert_task(envs.arithmetic, "+", 2),
    "countdown": lambda config: expert_task(envs.countdown, 3, 20, 99),
}


class Policy(NamedTuple):
    """A language model, `start(key) -> params`, and for a pretrained one the ids before every prompt and its mesh."""

    model: LanguageModel
    start: Callable[[jax.Array], Any]
    prefix: jax.Array | None = None
    mesh: Mesh | None = None
    shapes: Any = None  # of the parameters of a pretrained one


def small_policy(config: Config, task: Task) -> Policy:
    """The table of the initial law, or a transformer that has seen demonstrations of it."""
    if config.model == "tabular":
        model = tabular(envs.initial_logits(config.prompts, config.horizon, config.vocab_size, config.good_prob))
        return Policy(model, model.init)
    model = transformer(TransformerConfig(len(task.env.spec.vocab), config.width, config.layers, config.heads))
    return Policy(model, functools.partial(warm_start, model=model, task=task, config=config))


def prepare(config: Config) -> tuple[Task, Policy]:
    """The task and the policy of a configuration; all that can be wrong with files and names comes out here."""
    if config.model in SMALL:
        task = TASKS[config.task](config)
        return task, small_policy(config, task)
    loaded = load_language_task(
        config.model,
        config.task,
        mesh=config.mesh,
        train_questions=config.train_questions,
        held_out_questions=config.held_out_questions,
        bare=config.bare,
        max_answer=config.max_answer,
        dtype=config.dtype,
        remat=config.remat,
    )
    policy = Policy(loaded.model, lambda key: loaded.take(), loaded.prefix, loaded.mesh, loaded.shapes)
    return Task(loaded.env, loaded.held_out), policy


def warm_start(key, *, model: LanguageModel, task: Task, config: Config):
    """Supervised steps (AdamW, 1e-3, batch 256), some on the answer to another prompt: the start that RL needs."""

    def teach(key, state):
        wrong_key, other_key, key = jax.random.split(key, 3)
        wrong = jax.random.bernoulli(wrong_key, config.label_noise)
        other, _ = task.env.reset(other_key)
        return task.show(key, jax.tree.map(lambda x, y: jnp.where(wrong, x, y), other, state))

    def loss(params, key):
        shown = demonstrate(key, task.env, teach, 256)
        return objectives.aggregate(-score(model, params, shown, task.env)[0], shown.mask, "token_mean")

    return fit(key, model.init(key), loss, steps=config.warm_start, optimizer=optax.adamw(1e-3))


# --- Training -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training carries. `past` holds the parameters of the last updates, newest first, for stale sampling."""

    params: Any
    opt_state: Any
    reference: Any
    past: Any
    key: jax.Array
    step: jax.Array


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Up to the learning rate, which is traced."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(b2=0.99))


def first_state(key, params, config: Config, max_staleness: int = 0) -> State:
    past = jax.tree.map(lambda x: jnp.repeat(x[None], max_staleness, axis=0), params) if max_staleness else ()
    reference = params if config.kl_coefficient else ()
    return State(params, optimizer_of(config).init(params), reference, past, key, jnp.int32(0))


def make_train(config: Config, task: Task, policy: Policy, arms: tuple[str, ...], max_staleness: int = 0) -> Train:
    """The functions of one run: `advance` is a chunk of updates, `evaluate` plays held-out prompts.

    Args:
      arms: what `numbers.arm` chooses from.
      max_staleness: the largest `numbers.staleness`.
    """
    model, env = policy.model, task.env
    rows = config.prompts * config.samples
    group = np.arange(rows) // config.samples
    optimizer = optimizer_of(config)
    play = functools.partial(rollout, model=model, prefix=policy.prefix, early_exit=config.model not in SMALL)

    def spread(batch):
        """Rows over the devices of the mesh."""
        if policy.mesh is None:
            return batch
        place = lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(policy.mesh, x.shape[0]))  # noqa: E731
        return jax.tree.map(place, batch)

    def init(key):
        return first_state(key, policy.start(key), config, max_staleness)

    def loss(params, batch, norm, numbers, reference):
        """Of a micro-batch, over the denominator of its whole mini-batch."""
        trajectory, advantage, lower, upper = batch
        again = functools.partial(score, model, trajectory=trajectory, env=env, group_size=config.block)
        again = functools.partial(again, temperature=numbers.temperature, prefix=policy.prefix)
        log_prob, entropy = again(params)
        old, mask = trajectory.full_log_prob, trajectory.mask
        losses = [functools.partial(ARMS[arm].loss, n=numbers) for arm in arms]
        token_loss = jax.lax.switch(numbers.arm, losses, log_prob, old, advantage, lower, upper)
        if config.kl_coefficient:
            token_loss += numbers.kl_coefficient * objectives.kl_estimate(log_prob, again(reference)[0], "k3")
        metrics = objectives.clip_metrics(log_prob - old, old, lower, upper, advantage, mask) | {
            "entropy": objectives.masked_mean(entropy, mask),
            "kl_reached": objectives.masked_mean(objectives.binary_divergence(old, log_prob, "kl"), mask),
        }
        return objectives.aggregate(token_loss, mask, config.aggregation, norm=norm), metrics

    def gradient_step(carry, batch, numbers, reference, lr):
        """One mini-batch, `[micro_batches, rows, ...]`."""
        params, opt_state = carry
        mask = batch[0].mask
        norm = objectives.denominator(mask.reshape(-1, mask.shape[-1]), config.aggregation)

        def accumulate(total, part):
            grads, metrics = jax.grad(loss, has_aux=True)(params, spread(part), norm, numbers, reference)
            return jax.tree.map(jnp.add, total, grads), metrics

        grads, metrics = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), batch)
        steps, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda step: -lr * step, steps))
        tokens = mask.sum(axis=(1, 2))
        whole = {  # of the parts: counts add up, means weigh by tokens
            name: x.max(axis=0)
            if name == "ratio_max"
            else x.sum(axis=0)
            if "count" in name
            else tokens @ x / jnp.maximum(tokens.sum(), 1)
            for name, x in metrics.items()
        }
        return (params, opt_state), whole

    def update(state, numbers):
        """Sample, judge, and take `passes` times `mini_batches` gradient steps."""
        play_key, shuffle_key, batch_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        actor = state.params
        if max_staleness:
            choose = lambda new, old: jnp.where(numbers.staleness > 0, old[numbers.staleness - 1], new)  # noqa: E731
            actor = jax.tree.map(choose, state.params, state.past)
        trajectory = spread(
            play(
                play_key,
                params=actor,
                env=env,
                num_prompts=config.prompts,
                group_size=config.samples,
                sampling=Sampling(numbers.temperature),
            )
        )
        reward = trajectory.reward.sum(axis=1)
        learned = jax.random.permutation(shuffle_key, reward) if config.shuffle_rewards else reward
        advantage = objectives.grpo_advantages(learned, group, num_groups=config.prompts)
        old = trajectory.full_log_prob
        bounds = [functools.partial(ARMS[arm].bounds, n=numbers) for arm in arms]
        lower, upper = jax.lax.switch(numbers.arm, [lambda old, f=f: f(old) for f in bounds], old)
        everything = (trajectory._replace(info={}), advantage, lower, upper)

        lr = numbers.lr * jnp.minimum(1.0, (state.step + 1) / max(config.warmup, 1))
        blocks = jnp.arange(rows).reshape(-1, config.block)
        orders = [jax.random.permutation(k, blocks) for k in jax.random.split(batch_key, config.passes)]
        picked = jnp.stack(orders).reshape(config.passes * config.mini_batches, config.micro_batches, -1)

        def step(carry, rows):
            return gradient_step(carry, jax.tree.map(lambda x: x[rows], everything), numbers, state.reference, lr)

        (params, opt_state), metrics = jax.lax.scan(step, (state.params, state.opt_state), picked)
        # Means over the gradient steps; what the last one saw tells how far the policy went.
        metrics = jax.tree.map(lambda x: x.mean(axis=0), metrics) | {"kl_reached": metrics["kl_reached"][-1]}
        past = state.past
        if max_staleness:
            past = jax.tree.map(lambda new, old: jnp.concatenate([new[None], old[:-1]]), state.params, past)
        state = State(params, opt_state, state.reference, past, state.key, state.step + 1)
        return state, metrics | episode_metrics(trajectory, group, config.prompts)

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        key = jax.random.fold_in(state.key, 2**20)  # the same episodes and draws at every evaluation
        prompts, samples = config.eval_prompts, config.eval_samples
        trajectory = play(
            key,
            params=state.params,
            env=task.held_out,
            num_prompts=prompts,
            group_size=samples,
            sampling=Sampling(numbers.temperature),
        )
        correct = (trajectory.reward.sum(axis=1) > 0.5).reshape(prompts, samples).sum(axis=1)
        metrics = {f"pass@{k}": objectives.pass_at_k(correct, samples, k).mean() for k in (1, 4, 32) if k <= samples}
        return metrics | episode_metrics(trajectory, np.arange(prompts * samples) // samples, prompts)

    return Train(init, advance, evaluate)


def episode_metrics(trajectory: Trajectory, group: np.ndarray, groups: int) -> dict[str, jax.Array]:
    """Means over episodes, and the number of sampled tokens."""
    reward = trajectory.reward.sum(axis=1)
    return {
        "reward": reward.mean(),
        "dead_groups": objectives.group_is_constant(reward, group, num_groups=groups).mean(),
        "tokens": trajectory.mask.sum(),
    } | {name: value.astype(jnp.float32).mean() for name, value in trajectory.info.items()}


# --- The study ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the study: an arm in the main regime, with small updates, or with stale samples."""

    label: str
    arm: str
    lr: float
    staleness: int = 0


def make_rows(config: Config) -> list[Row]:
    """All arms; Band and no clipping with small updates, where they must agree; the main arms with stale samples."""
    arms = dict.fromkeys(config.arms)
    rows = [Row(arm, arm, config.lr) for arm in arms]
    if config.model not in SMALL:
        return rows
    rows += [Row(f"{a}/small", a, config.lr * config.control_lr) for a in ("band_kl", "no_clip") if a in arms]
    stale = [a for a in ("clip", "clip_higher", "band_kl", "dppo_kl", "no_clip") if a in arms and config.staleness]
    return rows + [Row(f"{a}/stale", a, config.lr, config.staleness) for a in stale]


def numbers_of(config: Config, rows: list[Row]) -> tuple[dict[str, Numbers], tuple[str, ...]]:
    """The rows' numbers by label, and the arms that they choose from."""
    arms = tuple(dict.fromkeys(row.arm for row in rows))
    shared = {field: getattr(config, field) for field in Numbers._fields if field not in Row._fields}
    return {
        row.label: Numbers(arm=arms.index(row.arm), lr=row.lr, staleness=row.staleness, **shared) for row in rows
    }, arms


def build(config: Config) -> Build:
    """A small policy trains all rows and seeds in one program; a pretrained one fills the devices, run by run."""
    task, policy = prepare(config)
    rows = make_rows(config)
    numbers, arms = numbers_of(config, rows)
    max_staleness = max(row.staleness for row in rows)
    train = make_train(config, task, policy, arms, max_staleness)
    episodes = functools.partial(sample_episodes, config, task, policy, rows)
    if config.model in SMALL:
        return Build(train, numbers, episodes)
    # The optimiser's state lies where its parameters lie.
    start = functools.partial(first_state, config=config)
    shapes = jax.eval_shape(start, jax.random.key(0), policy.shapes)
    places = named_shardings(policy.model.axes, policy.shapes, policy.mesh)
    places = state_shardings(shapes, policy.shapes, places, policy.mesh)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    place = jax.jit(start, out_shardings=places, donate_argnums=1)
    return Build(train._replace(init=lambda key: place(key, policy.start(key))), numbers, episodes, state)


def sample_episodes(config: Config, task: Task, policy: Policy, rows: list[Row], state_of: Callable) -> list[Episode]:
    """Two held-out episodes of each of the arms that the paper is about, after training."""
    arms = [arm for arm in ("clip", "band_kl") if arm in config.arms] or [rows[0].label]
    env, vocab = task.held_out, task.held_out.spec.vocab
    played = jax.jit(
        lambda params: rollout(
            jax.random.key(config.seed),
            policy.model,
            params,
            env,
            num_prompts=2,
            sampling=Sampling(config.temperature),
            prefix=policy.prefix,
        )
    )
    episodes = []
    for arm in arms:
        state = state_of(arm)
        if state is None:
            continue
        seen = jax.device_get(played(state.params))
        for row, reward in enumerate(seen.reward.sum(axis=1)):
            width, real = env.spec.max_observation, seen.positions[row] >= 0
            sides = (slice(None, width), slice(width, None))
            question, answer = (seen.tokens[row, side][real[side]] for side in sides)
            question, answer = (envs.decode(ids, ids.size, vocab) for ids in (question, answer))
            episodes.append(Episode(f"{arm}, prompt {row + 1}", [f"{question}\n=> {answer}"], float(reward)))
    return episodes


# --- Claims ---------------------------------------------------------------------------------------------------------


def tail_share(results: Results, row: str) -> np.ndarray:
    """Share of the actively clipped tokens with an old probability below 0.2, `[seeds]`; NaN where none was clipped."""
    bins = results.train[row]["clip_count_by_prob"].sum(axis=1)
    clipped = bins.sum(axis=1)
    return np.where(clipped > 0, bins[:, 0] / np.maximum(clipped, 1), np.nan)


def clipping_binds(results: Results) -> bool:
    """The regime that R2 and R4 presuppose: PPO's clip is active on at least 1 % of the tokens."""
    return float(results.train["clip"]["clip_fraction"].mean()) >= 0.01


CLAIMS = [
    Claim("R1a", "With a fixed clip, at least 80 % of the clipped tokens had a probability below 0.2",
          lambda r: tail_share(r, "clip"), "above", 0.8, "share", needs=("clip",)),
    Claim("R1b", "With Band, fewer than 15 % of them had",
          lambda r: tail_share(r, "band_kl"), "below", 0.15, "share", needs=("band_kl",)),
    Claim("R2a", "Where clipping binds, Clip-Higher ends with more reward than clip",
          gap("clip_higher", "clip"), unit="reward", applies=clipping_binds, needs=("clip", "clip_higher")),
    Claim("R2b", "Where clipping binds, Band ends with more reward than Clip-Higher",
          gap("band_kl", "clip_higher"), unit="reward", applies=clipping_binds,
          needs=("clip", "clip_higher", "band_kl")),
    Claim("R2c", "Where clipping binds, Clip-Higher ends with a higher pass@4 than clip",
          gap("clip_higher", "clip", final, "pass@4"), unit="pass@4", applies=clipping_binds,
          needs=("clip", "clip_higher")),
    Claim("R2d", "Where clipping binds, Band ends with a higher pass@4 than Clip-Higher",
          gap("band_kl", "clip_higher", final, "pass@4"), unit="pass@4", applies=clipping_binds,
          needs=("clip", "clip_higher", "band_kl")),
    Claim("R3a", "Early, Band keeps more entropy than clip",
          gap("band_kl", "clip", early, "entropy"), unit="nats", needs=("clip", "band_kl")),
    Claim("R3b", "Late, Band keeps more entropy than clip",
          gap("band_kl", "clip", late, "entropy"), unit="nats", needs=("clip", "band_kl")),
    Claim("R4a", "Where clipping binds, Band ends with more reward than no clipping",
          gap("band_kl", "no_clip"), unit="reward", applies=clipping_binds,
          needs=("clip", "band_kl", "no_clip")),
    Claim("R4b", "With small updates, Band and no clipping end equal",
          gap("band_kl/small", "no_clip/small"), "within", 0.02, "reward", needs=("band_kl/small", "no_clip/small")),
    Claim("R5a", "Band TV ends as good as Band KL",
          gap("band_tv", "band_kl"), "within", 0.05, "reward", needs=("band_tv", "band_kl")),
    Claim("R5b", "Band chi-squared ends as good as Band KL",
          gap("band_chi2", "band_kl"), "within", 0.05, "reward", needs=("band_chi2", "band_kl")),
    Claim("R5c", "Relaxing Band to the union with Clip-Higher is not better",
          gap("band_kl_relax", "band_kl"), "below", 0.02, "reward", needs=("band_kl_relax", "band_kl")),
]  # fmt: skip


# --- Results --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "reward": late,
    "held out, start": lambda r, row: r.held_out[row]["reward"][:, 0],
    "held out, end": final,
    "pass@4": lambda r, row: final(r, row, "pass@4"),
    "entropy, early": lambda r, row: early(r, row, "entropy"),
    "entropy, late": lambda r, row: late(r, row, "entropy"),
    "clipped": lambda r, row: r.train[row]["clip_fraction"].mean(axis=1),
    "of these p < 0.2": tail_share,
    "binary KL": lambda r, row: r.train[row]["kl_reached"].mean(axis=1),
}


# The mask forms have the curves of their Band, and relaxing changes little: seven arms can still be told apart.
FIGURE = ("clip", "clip_higher", "dcpo", "band_kl", "band_tv", "band_kl_upper", "no_clip")


def panels(results: Results) -> list[Panel]:
    """The rows of the main regime: what they earned, how they explored, what was clipped."""
    rows = [row for row in results.train if row in FIGURE] or list(results.train)
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    titles = {"reward": "reward", "share_good": "share of good tokens", "entropy": "entropy (nats per token)",
              "clip_fraction": "share of tokens clipped", "kl_reached": "binary KL(old, new) (nats)"}  # fmt: skip
    shown = [
        Panel(title, updates, {row: results.train[row][metric] for row in rows})
        for metric, title in titles.items()
        if metric in results.train[rows[0]]
    ]
    for metric in ("reward", "pass@4"):
        curves = {row: results.held_out[row][metric] for row in rows if metric in results.held_out[row]}
        if curves and len(shown) < 6:
            shown.append(Panel(f"held-out {metric}", results.evaluated_at, curves))
    return shown


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line, read once for each model over the defaults of its preset; by the model's name."""
    model = glance(Config(), argv).model
    models = SMALL if model == "both" else (model,)
    kinds = [model if model in SMALL else "pretrained" for model in models]
    defaults = [Config(**{"model": model} | PRESETS[kind]) for model, kind in zip(models, kinds, strict=True)]
    parsed = [parse(default, __doc__, argv, check=False) for default in defaults]
    parsed = [dataclasses.replace(config, model=model) for config, model in zip(parsed, models, strict=True)]
    with one_line_errors():
        for config in parsed:
            config.check()
    return {Path(config.model).name.removesuffix(".gguf"): config for config in parsed}


STUDY = Study(
    name="bandpo",
    title="BandPO (arXiv 2603.04918)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=tuple(field for field in Numbers._fields if field not in ("arm", "staleness")),
    order=FIGURE,
    smoke=("--seeds", "2", "--updates", "2", "--chunk", "1", "--warm-start", "2", "--width", "16", "--layers", "1",
           "--eval-prompts", "2", "--eval-samples", "4"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
