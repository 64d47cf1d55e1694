"""FlashPrefill in RL: what does sparse prefill on the sampler's side do to the policy ratio? (arXiv 2603.06199)

The sampler reads few-shot prompts with sparse attention, the learner with dense attention, so their log-probs differ
before any gradient step. How much is measured for every way of selecting on one policy, that of the dense arm as it
learns: equal parameters, prompts and draws, so that nothing but the prefill differs. Beside it arms learn with GRPO
from what a sparse sampler at their alpha plays. The paper says nothing of this; the claims are ours.

    python experiments/flash_prefill_rl.py
    python experiments/flash_prefill_rl.py --prefill "v2 corrected" --alpha 0.1 0.5 --task arithmetic

Results come to runs/flash_prefill_rl/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import envs, objectives
from rollax.agents import LanguageModel, TransformerConfig, rollout, score, transformer
from rollax.agents.generation import padded_positions
from rollax.agents.language_model import token_log_probs
from rollax.envs import Environment, Step, Tokens
from rollax.envs.tokens import decode
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, late
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.harness.supervised import fit
from rollax.experiments.sparse_rules import PAPER_ALPHA, at_share
from rollax.experiments.sparse_tasks import check_bounds
from rollax.kernels.flash_prefill import FlashPrefillConfig, PackedPrefillConfig, flash_prefill, flash_prefill_packed

PREFILLS = ("v1", "v2", "v2 corrected", "v2 causal")
GROUP = 2  # query heads of the key head: V2 has one list for them, v1 a list each
INF = float("inf")


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    alpha: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Thresholds of the arms beside the dense one: 0 keeps all blocks, 1 the best."""
    prefill: str = "v1"
    """Which selection the arms' samplers have: v1, v2, v2 corrected or v2 causal. All are measured in any case."""
    measured: tuple[float, ...] = (0.1, 0.2, 0.5, 0.75, 1.0)
    """Thresholds at which every selection is measured."""
    seeds: int = 8
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 60
    """Rollouts, each followed by `passes` times `mini_batches` gradient steps."""
    chunk: int = 20
    """Updates between evaluations: one call of the compiled program."""
    block: int = 8
    """Tokens of a block, a power of two."""
    sink: int = 1
    """First blocks, which a sampler reads in any case, as it does the diagonal one."""
    width: int = 64
    """D of the policy, a transformer of two layers."""
    task: str = "sorting"
    """sorting, arithmetic or countdown."""
    shots: int = 7
    """Solved examples before a question, at most; each prompt has half of them or more."""
    steps: int = 100
    """Supervised steps on the examples: the start of the policy."""
    teach_lr: float = 2e-3
    """Adam's learning rate in them."""
    prompts: int = 16
    """Of a rollout."""
    samples: int = 16
    """Rollouts of each prompt, the group of the advantage."""
    mini_batches: int = 2
    """Gradient steps of a pass; a prompt's group stays together."""
    passes: int = 1
    """Passes over each rollout."""
    lr: float = 3e-4
    """Adam's learning rate."""
    clip: float = 0.2
    """Clip range of the ratio."""
    eval_prompts: int = 512
    """Of an evaluation of the reward."""
    ratio_prompts: int = 32
    """Of a measurement of the ratio."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        check_bounds(self, BOUNDS)
        for name, known in (("prefill", PREFILLS), ("task", tuple(TASKS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.block & (self.block - 1):
            raise ValueError(f"block: expected a power of two, at least 2, got {self.block}")
        if self.width % (2 * GROUP):
            raise ValueError(f"width: expected a multiple of {2 * GROUP}, got {self.width}")
        if self.prompts % self.mini_batches:
            raise ValueError(f"mini_batches: expected a divisor of prompts={self.prompts}, got {self.mini_batches}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


BOUNDS = {
    **dict.fromkeys(("seeds", "updates", "chunk", "width", "shots", "prompts", "samples"), (1, INF)),
    **dict.fromkeys(("mini_batches", "passes", "eval_prompts", "ratio_prompts"), (1, INF)),
    **dict.fromkeys(("seed", "sink", "steps", "teach_lr", "lr", "clip"), (0, INF)),
    **dict.fromkeys(("alpha", "measured"), (0, 1)),
    "block": (2, INF),
}


# --- The task: solved examples, then a question ---------------------------------------------------------------------

# All instances, none held out: this is about the sampler, not about generalisation.
TASKS: dict[str, Callable[[], Environment]] = {
    "sorting": lambda: envs.sorting(4, split="all"),
    "arithmetic": lambda: envs.arithmetic("+", 1, split="all"),
    "countdown": lambda: envs.countdown(3, 20, 99, split="all"),
}


def few_shot(env: Environment, shots: int) -> Environment:
    """Questions of `env` after solved ones, half of `shots` or more: prompts of several blocks, of various lengths."""
    one = env.spec.max_observation + env.spec.max_action
    width = shots * one + env.spec.max_observation

    def solved(key):
        state, question = env.reset(key)
        answer = env.expert(key, state)
        stop = jnp.argmax(jnp.isin(answer, jnp.asarray(env.spec.stop_ids)))
        real = (jnp.arange(question.ids.size) < question.length, jnp.arange(answer.size) <= stop)
        return state, jnp.concatenate([question.ids, answer]), jnp.concatenate(real)

    def reset(key):
        count_key, key = jax.random.split(key)
        count = jax.random.randint(count_key, (), -(-shots // 2), shots + 1)
        states, ids, real = jax.vmap(solved)(jax.random.split(key, shots + 1))
        # The last one is the question: without its answer, at the end of the row.
        real &= (jnp.arange(shots + 1) < count).at[shots].set(True)[:, None]
        ids, real = ids.ravel()[:width], real.ravel()[:width]
        place = jnp.where(real, jnp.cumsum(real) - 1, width)
        prompt = jnp.full(width, env.spec.pad_id, jnp.int32).at[place].set(ids, mode="drop")
        return jax.tree.map(lambda x: x[shots], states), Tokens(prompt, real.sum())

    def step(key, state, action):
        state, step = env.step(key, state, action)
        silence = Tokens(jnp.full(width, env.spec.pad_id, jnp.int32), jnp.int32(0))
        return state, Step(silence, *step[1:])

    return env._replace(reset=reset, step=step, spec=env.spec._replace(max_observation=width))


def policy_model(config: Config, env: Environment) -> LanguageModel:
    shape = TransformerConfig(len(env.spec.vocab), config.width, num_layers=2, num_heads=GROUP, num_kv_heads=1)
    return transformer(shape)


def warm_start(key, *, model: LanguageModel, env: Environment, config: Config):
    """Parameters after supervised steps on 32 prompts each, every token of theirs, and so on the solved examples."""

    def loss(params, key):
        _, prompt = jax.vmap(env.reset)(jax.random.split(key, 32))
        positions = padded_positions(prompt.length, env.spec.max_observation)
        fed = (prompt.ids[:, :-1], positions[:, :-1])
        log_prob, _ = token_log_probs(model, params, *fed, prompt.ids[:, 1:])
        return -objectives.masked_mean(log_prob, positions[:, 1:] >= 0)

    return fit(key, model.init(key), loss, steps=config.steps, optimizer=optax.adam(config.teach_lr))


# --- The sampler ----------------------------------------------------------------------------------------------------


def prefill_of(name: str, alpha, config: Config, densities: list) -> Callable:
    """Attention over prompts, a `LanguageModel.prefill`; appends the density of each layer to a list.

    "v2 causal" selects position by position: a later token of the same block cannot change what an earlier one reads.
    """
    choice = dict(alpha=alpha, block_size=config.block, sink_blocks=config.sink, window_blocks=1)
    rows = GROUP if name == "v2 causal" else GROUP * config.block

    def one(q, k, v, length):
        how = dict(length=length, implementation="reference")  # prompts are too short for loops over blocks to pay
        if name == "v1":
            return flash_prefill(q, k, v, FlashPrefillConfig(last_full_blocks=0, **choice), **how)
        cfg = PackedPrefillConfig(tile_rows=rows, last_full_tiles=0, **choice)
        return flash_prefill_packed(q, k, v, cfg, correction=name == "v2 corrected", **how)

    def prefill(q, k, v, length):
        out, stats = jax.vmap(one)(q, k, v, length)
        densities.append(stats.density.mean())
        return out

    return prefill


class Sampler(NamedTuple):
    """What differs between the rows, all traced."""

    alpha: jax.Array
    lr: jax.Array
    clip: jax.Array


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


def make_train(config: Config) -> Train:
    """GRPO with a clipped ratio. The sampler reads prompts at `numbers.alpha`; decoding and learning are dense."""
    env = few_shot(TASKS[config.task](), config.shots)
    model = policy_model(config, env)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    group = np.arange(config.prompts * config.samples) // config.samples

    def play(key, params, name, alpha, **how):
        """What a sparse sampler plays, and the density of its prefill."""
        densities = []
        sampler = model._replace(prefill=prefill_of(name, alpha, config, densities))
        played = rollout(key, sampler, params, env, early_exit=False, **how)
        return played, jnp.stack(densities).mean()

    def init(key):
        params = warm_start(key, model=model, env=env, config=config)
        return State(params, optimizer.init(params), key, jnp.int32(0))

    def loss(params, batch, numbers):
        trajectory, advantage = batch
        log_prob, entropy = score(model, params, trajectory, env, group_size=config.samples)
        old, mask = trajectory.full_log_prob, trajectory.mask
        bounds = objectives.clip_bounds(numbers.clip)
        token_loss = objectives.clipped_surrogate(log_prob - old, advantage, *bounds)
        seen = objectives.clip_metrics(log_prob - old, old, *bounds, advantage, mask)
        metrics = {
            "log ratio": objectives.masked_mean(jnp.abs(log_prob - old), mask),
            "clipped": seen["clip_fraction"],
            "entropy": objectives.masked_mean(entropy, mask),
        }
        return objectives.aggregate(token_loss, mask, "token_mean"), metrics

    def update(state, numbers):
        play_key, order_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        how = dict(num_prompts=config.prompts, group_size=config.samples)
        trajectory, density = play(play_key, state.params, config.prefill, numbers.alpha, **how)
        reward = trajectory.reward.sum(axis=1)
        advantage = objectives.grpo_advantages(reward, group, num_groups=config.prompts)
        everything = (trajectory._replace(info={}), advantage)
        blocks = jnp.arange(group.size).reshape(config.prompts, config.samples)
        orders = [jax.random.permutation(key, blocks) for key in jax.random.split(order_key, config.passes)]

        def step(carry, rows):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows], everything)
            grads, metrics = jax.grad(loss, has_aux=True)(params, batch, numbers)
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, jax.tree.map(lambda s: -numbers.lr * s, steps)), opt_state), metrics

        picked = jnp.stack(orders).reshape(config.passes * config.mini_batches, -1)
        (params, opt_state), metrics = jax.lax.scan(step, (state.params, state.opt_state), picked)
        metrics = jax.tree.map(jnp.mean, metrics)
        metrics |= {"reward": reward.mean(), "density": density, "tokens": trajectory.mask.sum()}
        return State(params, opt_state, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=min(config.chunk, config.updates))

    def mismatch(params, key, name, alpha, clip):
        """Of learner and sampler with the same parameters: what their ratio shows is the prefill's doing alone."""
        played, density = play(key, params, name, alpha, num_prompts=config.ratio_prompts)
        log_prob, _ = score(model, params, played, env)
        ratio, mask = log_prob - played.full_log_prob, played.mask
        low, high = objectives.clip_bounds(clip)
        outside = (jnp.exp(ratio) < low) | (jnp.exp(ratio) > high)
        return {
            "log ratio": objectives.masked_mean(jnp.abs(ratio), mask),
            "outside": objectives.masked_mean(outside.astype(jnp.float32), mask),
            "density": density,
        }

    def evaluate(state, numbers):
        """What the policy earns on new prompts when nothing is sparse, and every selection's mismatch on it."""
        reward_key, ratio_key = (jax.random.fold_in(state.key, 2**20 + i) for i in (0, 1))  # alike at every evaluation
        seen = rollout(reward_key, model, state.params, env, num_prompts=config.eval_prompts, early_exit=False)
        metrics = {"reward": seen.reward.sum(axis=1).mean(), "measured at": jnp.asarray(config.measured)}
        for name in PREFILLS:
            measure = functools.partial(mismatch, state.params, ratio_key, name, clip=numbers.clip)
            found = jax.lax.map(lambda alpha, measure=measure: measure(alpha=alpha), jnp.asarray(config.measured))
            metrics |= {f"{metric}/{name}": values for metric, values in found.items()}
        return metrics

    return Train(init, advance, evaluate)


def sampler_rows(config: Config) -> dict[str, Sampler]:
    """Dense, which is alpha 0, then every alpha."""
    named = {"dense": 0.0} | {f"alpha {alpha:g}": float(alpha) for alpha in config.alpha}
    return {name: Sampler(alpha, config.lr, config.clip) for name, alpha in named.items()}


def sample_episodes(config: Config, state_of: Callable) -> list[Episode]:
    """Two episodes of the dense arm after training."""
    env, state = few_shot(TASKS[config.task](), config.shots), state_of("dense")
    model, vocab, width = policy_model(config, env), env.spec.vocab, env.spec.max_observation
    played = jax.jit(lambda params: rollout(jax.random.key(config.seed), model, params, env, num_prompts=2))
    seen, episodes = jax.device_get(played(state.params)), []
    for row, reward in enumerate(seen.reward.sum(axis=1)):
        real = seen.positions[row] >= 0
        sides = (seen.tokens[row, side][real[side]] for side in (slice(None, width), slice(width, None)))
        question, answer = (decode(ids, ids.size, vocab) for ids in sides)
        episodes.append(Episode(f"dense, prompt {row + 1}", [f"{question}\n=> {answer}"], float(reward)))
    return episodes


def build(config: Config) -> Build:
    """All arms and seeds in one program."""
    return Build(make_train(config), sampler_rows(config), functools.partial(sample_episodes, config))


# --- Claims ---------------------------------------------------------------------------------------------------------

DENSITY = 0.65  # at which selections are compared
LEARNS = 0.05  # reward that the dense arm must gain before anything can be said of the others


def measured_at(results: Results) -> np.ndarray:
    """The alphas of `mismatch`."""
    return results.held_out["dense"]["measured at"][0, 0]


def on_dense(results: Results, metric: str, name: str) -> np.ndarray:
    """Of a selection on the dense arm's policy, `[seeds, alphas]`, the mean over all evaluations."""
    return results.held_out["dense"][f"{metric}/{name}"].mean(axis=1)


def at_alpha(name: str, alpha: float, metric: str = "log ratio") -> Callable[[Results], np.ndarray]:
    """`[seeds]`; NaN where this alpha was not measured."""

    def measure(results):
        values, index = on_dense(results, metric, name), np.flatnonzero(np.isclose(measured_at(results), alpha))
        return values[:, index[0]] if index.size else np.full(values.shape[0], np.nan)

    return measure


def at_density(results: Results, name: str, share: float, metric: str = "log ratio") -> np.ndarray:
    """On a selection's curve at a density, `[seeds]`; towards dense prefill the ratio is 1."""
    x, y = on_dense(results, "density", name), on_dense(results, metric, name)
    ends = np.ones((x.shape[0], 1))
    return at_share(np.concatenate([x, ends], axis=1), np.concatenate([y, 0 * ends], axis=1), share)


def less(more: Callable, fewer: Callable) -> Callable[[Results], np.ndarray]:
    return lambda results: more(results) - fewer(results)


def gain(results: Results) -> float:
    """Reward that the dense arm gains, the mean over seeds."""
    reward = results.held_out["dense"]["reward"]
    return float(np.mean(reward[:, -1] - reward[:, 0]))


def shortfall(row: str) -> Callable[[Results], np.ndarray]:
    """What an arm ends below the dense one, in units of the dense arm's gain, `[seeds]`; NaN without a gain."""
    return lambda results: (final(results, "dense") - final(results, row)) / (gain(results) or np.nan)


def learning(name: str, statement: str, row: str, *test: Any) -> Claim:
    return Claim(name, statement, shortfall(row), *test, "of the dense arm's gain", lambda r: gain(r) > LEARNS,
                 ("dense", row))  # fmt: skip


CLAIMS = [
    Claim("10a", "Ours: prefill at alpha .1 on the sampler's side alone moves the ratio by more than .01 nats a token",
          at_alpha("v1", PAPER_ALPHA), "above", 0.01, "nats", needs=("dense",)),
    Claim("10b", "Ours: by more at alpha .5, on the same policy",
          less(at_alpha("v1", 0.5), at_alpha("v1", PAPER_ALPHA)), unit="nats", needs=("dense",)),
    Claim("10c", "Ours: mean correction lowers it (V2 at alpha .5)",
          less(at_alpha("v2", 0.5), at_alpha("v2 corrected", 0.5)), unit="nats", needs=("dense",)),
    Claim("10d", "Ours: ... and at alpha .1",
          less(at_alpha("v2", PAPER_ALPHA), at_alpha("v2 corrected", PAPER_ALPHA)), unit="nats", needs=("dense",)),
    Claim("10e", "V2's premise: one list for the heads of a group costs nothing: at a density of .65 it moves the "
          "ratio by at most .01 nats more than a list each",
          lambda r: at_density(r, "v2", DENSITY) - at_density(r, "v1", DENSITY), "below", 0.01, "nats",
          needs=("dense",)),
    Claim("10f", "Ours: at this density a list a position, which cannot leak, moves it less than a list a tile",
          lambda r: at_density(r, "v2", DENSITY) - at_density(r, "v2 causal", DENSITY), unit="nats",
          needs=("dense",)),
    Claim("10g", "Ours: at alpha .5 more than 1 % of the tokens are outside the clip range before any step",
          at_alpha("v1", 0.5, "outside"), "above", 0.01, "share", needs=("dense",)),
    learning("11a", "Ours: at alpha .1 the policy learns as with dense prefill, within a fifth of its gain",
             "alpha 0.1", "within", 0.2),
    learning("11b", "Ours: at alpha 1 it learns less", "alpha 1", "above", 0.0),
]  # fmt: skip


# --- Results --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "reward, dense prefill": final,
    "reward in training": late,
    "density": lambda r, row: r.train[row]["density"].mean(axis=1),
    "|log ratio|, all steps": lambda r, row: r.train[row]["log ratio"].mean(axis=1),
    "clipped": lambda r, row: r.train[row]["clipped"].mean(axis=1),
}


def panels(results: Results) -> list[Panel]:
    """The ratio of every selection on the dense arm's policy, against alpha and density; the arms' learning."""
    rows, updates = list(results.train), np.arange(1, results.evaluated_at[-1] + 1)
    shares = np.linspace(0.5, 1, 26)
    titles = {"log ratio": "|log ratio| (nats)", "outside": "share outside the clip range", "density": "density"}
    by_density = {name: np.stack([at_density(results, name, share) for share in shares], axis=1) for name in PREFILLS}
    return [
        *(
            Panel(title, measured_at(results), {name: on_dense(results, metric, name) for name in PREFILLS}, "alpha")
            for metric, title in titles.items()
        ),
        Panel("|log ratio| (nats)", shares, by_density, "density"),
        Panel("reward in training", updates, {row: results.train[row]["reward"] for row in rows}),
        Panel("reward, dense prefill", results.evaluated_at, {row: results.held_out[row]["reward"] for row in rows}),
    ]


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    config = parse(Config(), __doc__, argv)
    return {config.task: config}


STUDY = Study(
    name="flash_prefill_rl",
    title="FlashPrefill in RL (arXiv 2603.06199, 2608.19758)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=("lr", "clip"),
    order=PREFILLS,
    smoke=("--seeds", "2", "--updates", "1", "--chunk", "1", "--steps", "2", "--width", "16", "--shots", "3",
           "--prompts", "2", "--samples", "2", "--eval-prompts", "2", "--ratio-prompts", "2",
           "--measured", "0.1", "0.5"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
