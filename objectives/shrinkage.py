"""Baselines of few rollouts and a prior: V_0.5's shrinkage, its stopping rule, and simpler rivals (arXiv 2603.10848).

A value model says what a policy earns on a prompt before anything is drawn. Its prior V is kept as the baseline until
the rollouts contradict it; then the baseline moves towards their mean, and where that is uncertain more are drawn.
Rewards are -1 or +1 (`2 r - 1` of rewards in 0..1), V = `2 P - 1` of a probability. Alphabet: `P` prompts, `K` most
rollouts of a prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, check_same_shape, concrete, masked, promoted, ratio_or_zero
from rollax.objectives.reduction import masked_mean

RULES = ("discrete", "derivative")


class FusedBaseline(NamedTuple):
    """A prior and the mean of k rollouts made one, each `[P]`.

    Attributes:
      mean: of the rollouts.
      deviation: mean - prior.
      delta2: estimate of the prior's squared error, `max(0, deviation^2 - noise_var / k)`.
      weight: of the mean, `delta2 / (delta2 + noise_var / k)`; 0 where the prior stands.
      baseline: `prior + weight deviation`.
      mse: estimate of the baseline's squared error, `weight noise_var / k`.
      reject: bool, the rollouts contradict the prior: `k deviation^2 > noise_var`; a tie does not.
    """

    mean: jax.Array
    deviation: jax.Array
    delta2: jax.Array
    weight: jax.Array
    baseline: jax.Array
    mse: jax.Array
    reject: jax.Array


def _inputs(reward_sum, count, prior):
    """Checked, in a common type of at least float32, the prior clipped to [-1, 1]."""
    reward_sum, count, prior = (jnp.asarray(x) for x in (reward_sum, count, prior))
    jnp.broadcast_shapes(reward_sum.shape, count.shape, prior.shape)
    known = concrete(count)
    if known is not None and known.size and known.min() < 1:
        raise ValueError(f"count must be at least 1, got {known.min()}")
    _check_prior(prior)
    reward_sum, count, prior = promoted(accurate(reward_sum), count, accurate(prior))
    return reward_sum, count, jnp.clip(prior, -1.0, 1.0)


def _check_prior(prior):
    known = concrete(prior)
    if known is not None and known.size and not np.abs(known).max() <= 1 + 1e-6:
        raise ValueError(f"prior must lie in [-1, 1], got {known.min()} to {known.max()}")


def _check_budget(k_init, k_max, cost, rule):
    if not 1 <= k_init <= k_max:
        raise ValueError(f"k_init must be in 1..k_max={k_max}, got {k_init}")
    _check_rule(cost, rule)


def _check_rule(cost, rule):
    known = concrete(cost)
    if known is not None and not np.all(known > 0):
        raise ValueError(f"cost must be positive, got {cost}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")


def shrinkage_fuse(reward_sum, count, prior, *, noise_var=1.0):
    """V_0.5's baseline: the positive-part shrinkage of the empirical mean towards the prior (arXiv 2603.10848).

    The weight that minimises the squared error of `w mean + (1 - w) prior`, with the prior's error estimated from the
    same rollouts. It moves the baseline from the mean by `min(|d|, noise_var / (k |d|))`, d the deviation.

    Args:
      reward_sum: of the k rollouts, `[P]`.
      count: k >= 1, `[P]`.
      prior: in [-1, 1], `[P]`; what is outside by rounding is clipped.
      noise_var: variance of one reward, scalar or `[P]`, may be traced. 1 bounds that of every reward in [-1, 1]; for
        rewards in 0..1 (with a prior in 0..1) it is 1/4. See `plug_in_variance` for an estimate.

    Returns:
      `FusedBaseline`, float32 or wider.

    Raises:
      ValueError: a concrete count below 1, or a prior outside [-1, 1] by more than 1e-6.
    """
    reward_sum, count, prior = _inputs(reward_sum, count, prior)
    mean = reward_sum / count
    # Times k: the sum is an integer, so that a tie is one in float32 too.
    squared, noise = jnp.square(reward_sum - count * prior), count * noise_var
    reject = squared > noise
    delta2 = jnp.where(reject, squared - noise, 0.0) / jnp.square(count)
    weight = ratio_or_zero(delta2, delta2 + noise_var / count)
    deviation = mean - prior
    return FusedBaseline(
        mean, deviation, delta2, weight, prior + weight * deviation, weight * noise_var / count, reject
    )


def osla_gain(fused, count, *, rule="discrete"):
    """By how much one more rollout would lower the fused baseline's squared error, `[P]` (arXiv 2603.10848).

    Args:
      fused: a `FusedBaseline`.
      count: k, `[P]`.
      rule: "discrete", `mse(k) - mse(k + 1)` at the same estimate of the prior's error, or "derivative", `-d mse / dk`.
    """
    count = accurate(count)
    step = {"discrete": fused.weight, "derivative": 0.0}[rule]
    return fused.mse * fused.weight / (count + step)


def osla_continue(fused, count, *, cost=1 / 256, k_max=16, rule="discrete", confirmed=True):
    """Whether to draw once more: one-step look-ahead on error plus cost (arXiv 2603.10848).

    Where the prior stands, the gain is 0 and drawing ends. The paper's inequality is not published in full; this one
    ends at k_max for a hopeless prior exactly when cost = 1 / k_max^2, which is the paper's cost.

    Args:
      fused: a `FusedBaseline` of `count` rollouts.
      count: k, `[P]`.
      cost: of one rollout, in units of the squared error; may be traced.
      k_max: most rollouts of a prompt; may be traced.
      rule: see `osla_gain`.
      confirmed: bool `[P]`, false draws once more also where the prior stands. With "the prior stood at k - 1 too" a
        prior must stand twice in a row, so that a single lucky draw cannot end the test.

    Returns:
      bool `[P]`.

    Raises:
      ValueError: a concrete cost that is not positive, or an unknown rule.
    """
    _check_rule(cost, rule)
    undecided = ~fused.reject & ~jnp.asarray(confirmed)
    return (jnp.asarray(count) < k_max) & ((osla_gain(fused, count, rule=rule) > cost) | undecided)


def osla_count(rewards, prior, *, k_init=4, k_max=16, cost=1 / 256, rule="discrete", noise_var=1.0, confirm=False):
    """How many of K rewards that lie ready the rule would have drawn, int32 `[P]`: `osla_continue`, one at a time.

    Args:
      rewards: `[P, K]`, in [-1, 1].
      prior: `[P]`, in [-1, 1].
      k_init, k_max: least and most draws, in 1..K; may be traced, so that arms of different budgets share a program.
      cost, rule: see `osla_continue`.
      noise_var: see `shrinkage_fuse`, or a function `noise_var(reward_sum, count) -> [P]` such as `plug_in_variance`.
      confirm: the prior must stand twice in a row; may be traced.
    """
    rewards = accurate(rewards)
    variance = noise_var if callable(noise_var) else lambda total, count: noise_var

    def more(carry, reward):
        total, count, active, stood = carry
        fused = shrinkage_fuse(total, count, prior, noise_var=variance(total, count))
        confirmed = (stood & (count > k_init)) | ~jnp.asarray(confirm, bool)
        goes_on = osla_continue(fused, count, cost=cost, k_max=k_max, rule=rule, confirmed=confirmed)
        active &= goes_on | (count < k_init)
        return (total + jnp.where(active, reward, 0.0), count + active, active, ~fused.reject), None

    one = jnp.ones(rewards.shape[:1], jnp.int32)
    (_, count, _, _), _ = jax.lax.scan(more, (rewards[:, 0], one, one > 0, one < 0), rewards[:, 1:].T)
    return count


def sequential_rollout(key, sample_fn, prior, *, k_init=4, k_max=16, cost=1 / 256, **options):
    """Rewards of a budget that each prompt's own draws decide: `k_init`, then one at a time while `osla_continue`.

    Everything is drawn in fixed shapes, and what the rule did not ask for is neither counted nor returned: for
    simulators, whose draws are cheap. `agents.sequential_sampler` saves the work of a language model.

    Args:
      key: folded with j for draw j.
      sample_fn: `sample_fn(key, j) -> reward [P]`, the j-th draw of every prompt, in [-1, 1].
      prior: `[P]`, in [-1, 1].
      k_init, k_max: static.
      cost, **options: see `osla_count`.

    Returns:
      (rewards `[P, k_max]`, 0 where not drawn; mask bool `[P, k_max]`; count int32 `[P]`).

    Raises:
      ValueError: k_init outside 1..k_max, a concrete cost that is not positive, a prior outside [-1, 1].
    """
    _check_budget(k_init, k_max, cost, options.get("rule", "discrete"))
    _check_prior(prior)
    drawn = accurate(jax.lax.map(lambda j: sample_fn(jax.random.fold_in(key, j), j), jnp.arange(k_max))).T
    count = osla_count(drawn, prior, k_init=k_init, k_max=k_max, cost=cost, **options)
    mask = jnp.arange(k_max) < count[:, None]
    return jnp.where(mask, drawn, 0.0), mask, count


def fused_advantage(rewards, mask, baseline, *, normalise="none"):
    """`reward - baseline` of what was drawn (arXiv 2603.10848): not divided by the group's deviation, which is 0 in the
    groups that are all right or all wrong and would silence them again.

    Args:
      rewards: `[P, K]`.
      mask: bool or 0/1, `[P, K]`.
      baseline: `[P]`, or `[P, K]` for `leave_one_out_fuse`; no gradient flows through it.
      normalise: static; "none", or "batch_std": divided by the root mean square over the batch.

    Returns:
      `[P, K]`, 0 where nothing was drawn.

    Raises:
      ValueError: different shapes, or an unknown `normalise`.
    """
    if normalise not in ("none", "batch_std"):
        raise ValueError(f"normalise must be 'none' or 'batch_std', got {normalise!r}")
    check_same_shape(rewards=rewards, mask=mask)
    baseline = jax.lax.stop_gradient(accurate(baseline))
    advantage = masked(accurate(rewards) - (baseline[:, None] if baseline.ndim == 1 else baseline), mask)
    if normalise == "none":
        return advantage
    return advantage / jnp.sqrt(masked_mean(jnp.square(advantage), mask) + 1e-8)


def expected_stop_table(p_grid, prior_grid, k_init=4, k_max=16, cost=1 / 256, *, rule="discrete", noise_var=1.0):
    """What the rule does on average, exactly, by dynamic programming over (rollouts, successes).

    Args:
      p_grid: probabilities of success, `[A]`; rewards are +1 with p and -1 else.
      prior_grid: priors in [-1, 1], `[V]`.
      k_init, k_max: static; equal ones are a fixed number of rollouts.
      cost, rule, noise_var: see `osla_continue` and `shrinkage_fuse`.

    Returns:
      (expected k; mean squared error; bias, baseline less `2 p - 1`; probability that the prior is rejected in the
      end), each `[A, V]`.

    Raises:
      ValueError: as `sequential_rollout`.
    """
    _check_budget(k_init, k_max, cost, rule)
    p, prior = promoted(accurate(p_grid), accurate(prior_grid))
    _check_prior(prior)
    p, prior, truth = p[:, None, None], prior[None, :, None], 2 * p[:, None, None] - 1
    wins = jnp.arange(k_max + 1)
    zeros = jnp.zeros((p.shape[0], prior.shape[1]), p.dtype)
    mass = jnp.zeros((*zeros.shape, k_max + 1), p.dtype).at[..., 0].set(1.0)

    def draw(mass):
        won = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
        return (1 - p) * mass + p * won

    def settle(carry, k):
        mass, sums = carry
        fused = shrinkage_fuse((2 * wins - k).astype(p.dtype), jnp.asarray(k, p.dtype), prior, noise_var=noise_var)
        goes_on = osla_continue(fused, k, cost=cost, k_max=k_max, rule=rule)
        stopped = jnp.where(goes_on, 0.0, mass)
        error = fused.baseline - truth
        told = (k * jnp.ones_like(error), jnp.square(error), error, jnp.broadcast_to(fused.reject, error.shape))
        sums = tuple(total + (stopped * x).sum(axis=-1) for total, x in zip(sums, told, strict=True))
        return (draw(mass - stopped), sums), None

    for _ in range(k_init):
        mass = draw(mass)
    (_, sums), _ = jax.lax.scan(settle, (mass, (zeros,) * 4), jnp.arange(k_init, k_max + 1))
    return sums


# --- Rivals: what else one may make of a prior and a few rollouts ----------------------------------------------------


def plug_in_variance(reward_sum, count, *, floor=0.1):
    """A ±1 reward's variance, estimated: `max(1 - mean^2, floor)`, `[P]`, the `noise_var` that 1 is the worst case of.

    Without the floor a group that is all equal would have no noise, and reject every prior but its own mean.
    """
    return jnp.maximum(1 - jnp.square(accurate(reward_sum) / accurate(count)), floor)


def beta_posterior_baseline(reward_sum, count, prior, strength):
    """Posterior mean of a Beta prior worth `strength` rollouts: `(strength V + sum) / (strength + k)`, `[P]`.

    Args:
      reward_sum, count, prior: as in `shrinkage_fuse`.
      strength: >= 0, scalar or `[P]`, may be traced.

    Raises:
      ValueError: as `shrinkage_fuse`, or a concrete strength below 0.
    """
    known = concrete(strength)
    if known is not None and not np.all(known >= 0):
        raise ValueError(f"strength must not be negative, got {strength}")
    reward_sum, count, prior = _inputs(reward_sum, count, prior)
    return (strength * prior + reward_sum) / (strength + count)


def leave_one_out_fuse(rewards, mask, prior, *, noise_var=1.0):
    """`shrinkage_fuse` of the *other* rollouts of each prompt: a baseline that no rollout has a part in, `[P, K]`.

    It keeps the gradient unbiased where the prior is rejected; a prompt's only rollout gets the prior.

    Args:
      rewards: `[P, K]`.
      mask: bool or 0/1, `[P, K]`.
      prior, noise_var: as in `shrinkage_fuse`.
    """
    check_same_shape(rewards=rewards, mask=mask)
    rewards, others = masked(rewards, mask), accurate(mask).sum(axis=1, keepdims=True) - accurate(mask)
    rest = rewards.sum(axis=1, keepdims=True) - rewards
    prior = accurate(prior)[:, None]
    fused = shrinkage_fuse(rest, jnp.maximum(others, 1.0), prior, noise_var=noise_var)
    return jnp.where(others > 0, fused.baseline, jnp.clip(prior, -1.0, 1.0))


class MovingAverage(NamedTuple):
    """What each prompt of a training set earned lately: `value` and `seen`, `[number of prompts]`."""

    value: jax.Array
    seen: jax.Array


def moving_average_init(num_prompts):
    """Of prompts that have earned nothing yet."""
    return MovingAverage(jnp.zeros(num_prompts), jnp.zeros(num_prompts, bool))


def moving_average_baseline(average, prompt_ids, *, fallback=0.0):
    """The moving average of each prompt, `[P]`; `fallback` (scalar or `[P]`) of one that has earned nothing yet."""
    return jnp.where(average.seen[prompt_ids], average.value[prompt_ids], fallback)


def moving_average_update(average, prompt_ids, mean, *, decay=0.7, valid=None):
    """Takes in the mean reward of each prompt's rollouts: `decay old + (1 - decay) mean`, the mean itself at first.

    Args:
      average: `MovingAverage`.
      prompt_ids: int `[P]`; of a prompt that comes twice, one of its means is taken.
      mean: `[P]`.
      decay: in 0..1; may be traced.
      valid: bool `[P]`, which to take in; None for all.
    """
    valid = jnp.ones(jnp.shape(mean), bool) if valid is None else valid
    check_same_shape(prompt_ids=prompt_ids, mean=mean, valid=valid)
    old = moving_average_baseline(average, prompt_ids, fallback=mean)
    at = jnp.where(valid, prompt_ids, average.value.shape[0])  # out of range: dropped
    value = average.value.at[at].set(decay * old + (1 - decay) * mean, mode="drop")
    return MovingAverage(value, average.seen.at[at].set(True, mode="drop"))


# --- V_0's budget ---------------------------------------------------------------------------------------------------


def rollout_utility(budget, p):
    """What B rollouts of a prompt teach: `B (1 - p) (1 - (1 - p)^(B - 1))` (V_0, arXiv 2602.03584).

    The expected number of failures, counted in groups that are not all equal.

    Args:
      budget: B >= 1, `[...]`.
      p: probability of success, `[...]`.
    """
    budget, p = promoted(accurate(budget), accurate(p))
    fails = 1 - p
    # expm1 keeps the small probability of a single success; p = 1 has no logarithm.
    log_fails = jnp.log1p(-jnp.where(p < 1, p, 0.0))
    mixed = jnp.where(p < 1, -jnp.expm1((budget - 1) * log_fails), jnp.where(budget > 1, 1.0, 0.0))
    return budget * fails * mixed


def greedy_budget(p, total, lo=2, hi=128):
    """Shares `total` rollouts among prompts: `lo` each, then one at a time to the largest gain in `rollout_utility`.

    Args:
      p: probability of success of each prompt, `[P]`.
      total: static, `lo P <= total <= hi P`.
      lo, hi: static, least and most rollouts of a prompt.

    Returns:
      int32 `[P]`, summing to total; ties go to the first prompt.

    Raises:
      ValueError: a total out of reach, or lo > hi or lo < 1.
    """
    p = accurate(p)
    if not 1 <= lo <= hi:
        raise ValueError(f"lo must be in 1..hi={hi}, got {lo}")
    if p.ndim != 1 or not lo * p.size <= total <= hi * p.size:
        raise ValueError(f"total must be in {lo * p.size}..{hi * p.size} for p {p.shape}, got {total}")

    def give(_, budget):
        gain = rollout_utility(budget + 1, p) - rollout_utility(budget, p)
        return budget.at[jnp.argmax(jnp.where(budget < hi, gain, -jnp.inf))].add(1)

    return jax.lax.fori_loop(0, total - lo * p.size, give, jnp.full(p.shape, lo, jnp.int32))
