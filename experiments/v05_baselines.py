"""Arms of the study v05: how an arm draws and what it subtracts. Its first part, where the truth is known."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax import objectives
from rollax.experiments.harness.loop import Results, Train

if TYPE_CHECKING:
    from rollax.experiments.v05 import Config

SLOTS = 16  # most rollouts of a prompt

# --- Baselines ------------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """How an arm draws and what it subtracts, all traced; `part policy` reads the lower half."""

    baseline: int = 0  # index into BASELINES
    k_init: int = 4
    k_max: int = 4
    confirm: int = 0  # the prior must stand twice in a row
    plug_in: int = 0  # variance of the rewards estimated instead of its bound
    sd: float = 0.0  # of the prior's error
    bias: float = -1.0  # its size at p = 1/2 instead, where >= 0
    source: int = 0  # index into SOURCES
    refresh: int = 1  # updates between two contexts of V_0
    by_std: int = 0  # GRPO divides by the group's deviation
    drop_dead: int = 0  # DAPO draws on until all groups are mixed
    wide: int = 0  # WIDE times the prompts
    critic: int = 0  # a critic is "given", else a moving average
    learn_after: int = 0  # updates in which only the critic learns
    alpha: float = 0.05  # of VAPO's lambda by length, 1 - 1 / (alpha n)
    cost: float = 1 / 256
    strength: float = 4.0
    floor: float = 0.1
    lr: float = 0.0


def group_mean(rewards, mask, n, prior, other):
    return jnp.broadcast_to(mean_of(rewards, mask)[:, None], mask.shape)


def others_mean(rewards, mask, n, prior, other):
    """Of the other rollouts; a prompt's only rollout gets 0."""
    rest = (rewards * mask).sum(1, keepdims=True) - rewards * mask
    return rest / jnp.maximum(mask.sum(1, keepdims=True) - mask, 1)


def fused(rewards, mask, n, prior, other):
    total, count = (rewards * mask).sum(1), mask.sum(1)
    baseline = objectives.shrinkage_fuse(total, count, prior, noise_var=variance(n)(total, count)).baseline
    return jnp.broadcast_to(baseline[:, None], mask.shape)


def fused_of_others(rewards, mask, n, prior, other):
    return objectives.leave_one_out_fuse(rewards, mask, prior)


def beta_posterior(rewards, mask, n, prior, other):
    baseline = objectives.beta_posterior_baseline((rewards * mask).sum(1), mask.sum(1), prior, n.strength)
    return jnp.broadcast_to(baseline[:, None], mask.shape)


def prior_alone(rewards, mask, n, prior, other):
    return jnp.broadcast_to(prior[:, None], mask.shape)


def given(rewards, mask, n, prior, other):
    """A moving average or a critic."""
    return jnp.broadcast_to(other[:, None], mask.shape)


BASELINES = {
    f.__name__: f for f in (group_mean, others_mean, fused, fused_of_others, beta_posterior, prior_alone, given)
}


def mean_of(rewards, mask):
    return (rewards * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def variance(n: Numbers) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Of a reward: 1 is the most that it can be."""
    return lambda total, count: jnp.where(n.plug_in, objectives.plug_in_variance(total, count, floor=n.floor), 1.0)


def count_of(rewards: jax.Array, prior: jax.Array, n: Numbers) -> jax.Array:
    """Rollouts that the arm draws of each prompt, `[P]`."""
    return objectives.osla_count(
        rewards, prior, k_init=n.k_init, k_max=n.k_max, cost=n.cost, noise_var=variance(n), confirm=n.confirm
    )


def baseline_of(rewards, mask, n: Numbers, prior, other=None):
    """What the arm subtracts from each rollout, `[P, K]`."""
    other = jnp.zeros(prior.shape) if other is None else other
    return jax.lax.switch(n.baseline, list(BASELINES.values()), rewards, mask, n, prior, other)


def advantage_of(rewards, mask, n: Numbers, prior, other=None):
    """Advantages of the rollouts that count, `[P, K]`; exact zeros where rounding alone is left."""
    advantage = objectives.fused_advantage(rewards, mask, baseline_of(rewards, mask, n, prior, other))
    spread = (mask * (rewards - mean_of(rewards, mask)[:, None]) ** 2).sum(1) / jnp.maximum(mask.sum(1) - 1, 1)
    advantage = jnp.where(n.by_std, advantage / (jnp.sqrt(spread)[:, None] + 1e-6), advantage)
    return jnp.where(jnp.abs(advantage) < 1e-5, 0.0, advantage)


def rank_correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Spearman's, with mean ranks for ties; 0 where one of them does not vary."""
    ranks = [((v[None] < v[:, None]).sum(1) + (v[None] <= v[:, None]).sum(1)) / 2.0 for v in (x, y)]
    x, y = (v - v.mean() for v in ranks)
    return (x * y).mean() / jnp.maximum(jnp.sqrt((x**2).mean() * (y**2).mean()), 1e-9)


# --- Rewards against rollouts, of any study whose evaluations say what was spent ---


def at_rollouts(results: Results, row: str, spent: np.ndarray) -> np.ndarray:
    """Held-out reward when the row had drawn so many rollouts, `[seeds]`: linear between evaluations, never beyond."""
    curves = zip(spent, results.held_out[row]["spent"], results.held_out[row]["reward"], strict=True)
    return np.array([np.interp(x, xs, ys) if x <= xs[-1] else np.nan for x, xs, ys in curves])


def gap_at_equal_rollouts(better: str, worse: str) -> Callable[[Results], np.ndarray]:
    """When the one that draws less has drawn all of its rollouts."""

    def measure(results):
        ends = [results.held_out[row]["spent"][:, -1] for row in (better, worse)]
        spent = np.minimum(*ends)
        return at_rollouts(results, better, spent) - at_rollouts(results, worse, spent)

    return measure


# --- Part 1: estimators on prompts whose rate is known --------------------------------------------------------------

index = list(BASELINES).index
ERRORS = (0.0, 0.2, 0.5, 1.0)  # standard deviation of the prior's error, on the scale of -1 to 1
BIASES = (0.2, 0.4, 0.8)  # at p = 1/2
DRAWS = {
    "static 4": Numbers(index("fused")),
    "osla": Numbers(index("fused"), k_max=SLOTS),
    "osla, of others": Numbers(index("fused_of_others"), k_max=SLOTS),
    "osla, confirmed": Numbers(index("fused"), k_max=SLOTS, confirm=1),
    "osla, plug-in": Numbers(index("fused"), k_max=SLOTS, plug_in=1),
    "beta 4": Numbers(index("beta_posterior")),
    "beta, osla's draws": Numbers(index("beta_posterior"), k_max=SLOTS),
}
ESTIMATES = (
    {"mean 4": Numbers(index("group_mean")), "mean 16": Numbers(index("group_mean"), SLOTS, SLOTS)}
    | {f"{name}, sd {sd}": n._replace(sd=sd) for sd in ERRORS for name, n in DRAWS.items()}
    | {f"{name}, bias {bias}": n._replace(bias=bias) for bias in BIASES for name, n in DRAWS.items()}
)


def estimators_train(config: "Config") -> Train:
    """An "update" is a batch of prompts: nothing is trained."""

    def metrics(key, n):
        p_key, prior_key, draw_key = jax.random.split(key, 3)
        fixed = n.bias >= 0
        p = jnp.where(fixed, 0.5, jax.random.uniform(p_key, (config.prompts,)))
        truth = 2 * p - 1
        error = jax.random.normal(prior_key, p.shape)
        prior = jnp.clip(truth + jnp.where(fixed, n.bias * jnp.sign(error), n.sd * error), -1.0, 1.0)
        rewards = jnp.where(jax.random.uniform(draw_key, (*p.shape, SLOTS)) < p[:, None], 1.0, -1.0)
        count = count_of(rewards, prior, n)
        mask = (jnp.arange(SLOTS) < count[:, None]).astype(jnp.float32)
        baseline = baseline_of(rewards, mask, n, prior)
        squared = mean_of((baseline - truth[:, None]) ** 2, mask)
        advantage = objectives.fused_advantage(rewards, mask, baseline)
        return {
            "squared error": squared.mean(),
            "rollouts": count.mean(),
            "plain mean's": (1 - truth**2).mean() / count.mean(),  # with as many rollouts
            "prior's": ((prior - truth) ** 2).mean(),
            "dead groups": (jnp.abs(advantage) < 1e-6).all(axis=1).mean(),
            "rank correlation": rank_correlation(count, jnp.abs(prior - truth)),
        }

    def init(key):
        return key, jnp.int32(0)

    def advance(state, n):
        key, step = state
        steps = min(config.chunk, config.updates)
        told = jax.lax.map(lambda i: metrics(jax.random.fold_in(key, i), n), step + jnp.arange(steps))
        return (key, step + steps), told

    return Train(init, advance, lambda state, n: metrics(jax.random.fold_in(state[0], 2**20), n))
