"""Statistics of runs: pure functions of scores `[seeds]` or `[tasks, seeds]`. Seeds are the unit of analysis.

Aggregates and probability of improvement follow "Deep RL at the edge of the statistical precipice" (arXiv 2108.13264):
scores are normalised per task, the bootstrap draws the seeds of each task anew (stratified) and keeps the tasks.
Numbers of arms that ran with equal seeds are paired: `paired_tests`. Many comparisons need `adjust`. Seeds that are
added until the result pleases need `confidence_sequence`, which holds at every number of seeds at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

Statistic = Callable[[np.ndarray], np.ndarray]
ALTERNATIVES = ("two-sided", "greater", "less")
CORRECTIONS = ("holm", "bonferroni", "benjamini_hochberg", "none")
_CHUNK = 4_000_000  # numbers that a bootstrap holds at a time


class Interval(NamedTuple):
    estimate: Any
    low: Any
    high: Any


# --- Aggregates: `[..., tasks, seeds] -> [...]`; `[seeds]` is one task ----------------------------------------------


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over all runs."""
    return _tasks(scores).mean(axis=(-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of their means over seeds; of a single task the median over its seeds."""
    scores = _tasks(scores)
    return np.median(scores[..., 0, :] if scores.shape[-2] == 1 else scores.mean(axis=-1), axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: of the runs of all tasks together, without the lowest and the highest quarter.

    Both quarters are rounded down to whole runs, so that fewer than four runs give their mean.
    """
    scores = _tasks(scores)
    return stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> np.ndarray:
    """Mean of max(target - score, 0): how much the runs lack to `target`, those beyond it counted as there."""
    return np.maximum(target - _tasks(scores), 0.0).mean(axis=(-2, -1))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(a run of X scores above a run of Y) on a task, ties counted half, averaged over tasks.

    It is Mann and Whitney's U / (n m) of each task.

    Args:
      x: `[..., tasks, n]` or `[n]`.
      y: `[..., tasks, m]` or `[m]`.
    """
    x, y = _tasks(x, "x"), _tasks(y, "y")
    return (1 + np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-3, -2, -1))) / 2


# --- Bootstrap ------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    scores: np.ndarray,
    statistic: Statistic = iqm,
    level: float = 0.95,
    resamples: int = 10_000,
    method: str = "percentile",
    seed: int = 0,
) -> Interval:
    """Stratified bootstrap interval of a statistic: seeds are drawn with replacement within each task.

    With few seeds the percentile interval is too narrow, as the tests measure; prefer Student's t for the mean of one
    task, and "bca" (bias-corrected and accelerated) for other statistics of one task.

    Args:
      scores: `[tasks, seeds]` or `[seeds]`, no NaN: give a run that broke the score that it deserves.
      statistic: `[..., tasks, seeds] -> [...]`, for example one of this module.
      method: "percentile" or, for one task, "bca".

    Raises:
      ValueError: for NaN, a level outside (0, 1), no resamples, an unknown method, "bca" with several tasks.
    """
    scores = _complete(_tasks(scores), "scores")
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    estimate = float(statistic(scores[None])[0])
    if method == "percentile":
        return Interval(estimate, *_percentiles(_resampled(statistic, [scores], resamples, seed), level))
    if method != "bca":
        raise ValueError(f"method: expected 'percentile' or 'bca', got {method!r}")
    if scores.shape[0] != 1 or scores.shape[1] < 2:
        raise ValueError(f"method: 'bca' expects one task and at least two seeds, got scores {list(scores.shape)}")
    result = stats.bootstrap(
        (scores[0],),
        lambda x, axis: statistic(np.moveaxis(x, axis, -1)[..., None, :]),
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CHUNK // scores.size),
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high))


def probability_of_improvement_interval(
    x: np.ndarray,
    y: np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    paired: bool = False,
    seed: int = 0,
) -> Interval:
    """`probability_of_improvement` with its stratified percentile bootstrap interval.

    Args:
      x: `[tasks, n]` or `[n]`.
      y: `[tasks, m]` or `[m]`.
      paired: seed i of X and seed i of Y are one unit (equal starts), drawn together; the paper draws them apart.

    Raises:
      ValueError: for NaN, differing numbers of tasks, or of seeds where paired.
    """
    x, y = _complete(_tasks(x, "x"), "x"), _complete(_tasks(y, "y"), "y")
    _check_level(level)
    if x.shape[0] != y.shape[0] or (paired and x.shape != y.shape):
        raise ValueError(f"y: expected the {'seeds' if paired else 'tasks'} of x {x.shape}, got {y.shape}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    draws = _resampled(probability_of_improvement, [x, y], resamples, seed, paired, x.size * y.shape[1])
    return Interval(float(probability_of_improvement(x, y)), *_percentiles(draws, level))


def _resampled(
    statistic: Callable, arrays: list[np.ndarray], resamples: int, seed: int, paired: bool = False, size: int = 0
) -> np.ndarray:
    """The statistic of `resamples` stratified resamples of arrays `[tasks, seeds]`, in chunks that bound memory.

    Args:
      paired: the arrays share the drawn seeds.
      size: numbers that the statistic holds per resample, if more than the arrays.
    """
    generators = np.random.default_rng(seed).spawn(len(arrays))  # one each, so that chunks change no draw
    chunk = max(1, _CHUNK // max(size, *(array.size for array in arrays)))
    draws = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = []
        for index, (generator, array) in enumerate(zip(generators, arrays, strict=True)):
            if index == 0 or not paired:
                seeds = generator.integers(array.shape[1], size=(count, *array.shape))
            drawn.append(np.take_along_axis(array[None], seeds, axis=-1))
        draws.append(statistic(*drawn))
    return np.concatenate(draws)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


# --- One sample and pairs at equal seeds: the last axis is the seeds ------------------------------------------------


class PairedTests(NamedTuple):
    """Two arms at equal seeds; each entry a number, or `[tasks]`.

    Attributes:
      difference: mean of x - y.
      low, high: its interval by Student's t, always two-sided.
      effect_size: see `effect_size`.
      t_p: paired t test. Presumes normal differences; robust to much else from ten or so seeds on.
      wilcoxon_p: signed-rank test: differences symmetric about 0. Seeds that tie drop out.
      sign_flip_p: permutation test of the mean under flips of the differences' signs: presumes symmetry, nothing else.
    """

    difference: Any
    low: Any
    high: Any
    effect_size: Any
    t_p: Any
    wilcoxon_p: Any
    sign_flip_p: Any


def paired_tests(
    x: np.ndarray,
    y: np.ndarray,
    level: float = 0.95,
    alternative: str = "two-sided",
    resamples: int = 2**14,
    seed: int = 0,
) -> PairedTests:
    """Compares two arms that ran with the same seeds.

    With n seeds no two-sided p-value of the rank and the permutation test is below 2 / 2^n: five never reach .05.

    Args:
      x, y: `[seeds]` or `[tasks, seeds]`, at least two seeds, no NaN.
      alternative: of the p-values: "two-sided", "greater" (x above y) or "less".
      resamples: random sign flips; all of them, exactly, where there are no more than these.

    Raises:
      ValueError: for shapes that differ, fewer than two seeds, NaN, or an unknown alternative.
    """
    x, y = _complete(np.asarray(x, np.float64), "x"), _complete(np.asarray(y, np.float64), "y")
    if x.shape != y.shape or x.ndim not in (1, 2) or x.shape[-1] < 2:
        raise ValueError(f"x, y: expected two equal shapes [seeds >= 2] or [tasks, seeds], got {x.shape}, {y.shape}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    _check_level(level)
    difference = x - y
    t_p = t_test(difference, alternative=alternative)
    flips = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CHUNK // difference.size),
        alternative=alternative,
        axis=-1,
        rng=np.random.default_rng(seed),
    )
    with np.errstate(invalid="ignore"):  # where all seeds tie
        wilcoxon = stats.wilcoxon(difference, alternative=alternative, axis=-1)
    return PairedTests(
        *t_interval(difference, level), effect_size(difference), t_p, wilcoxon.pvalue[()], flips.pvalue[()]
    )


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of `[..., seeds]`: the whole line for one seed, a point for equal values."""
    _check_level(level)
    center, error, count = _moments(values)
    half = stats.t.ppf(0.5 + level / 2, count - 1) * error if count > 1 else np.full(center.shape, np.inf)
    return Interval(center[()], (center - half)[()], (center + half)[()])


def t_test(values: np.ndarray, reference: float = 0.0, alternative: str = "two-sided") -> np.ndarray:
    """p-value of Student's test that the mean of `[..., seeds]` is `reference`; NaN for one seed.

    Args:
      alternative: "two-sided", "greater" (the mean is above) or "less".
    """
    t, count = _t_statistic(values, reference), np.shape(values)[-1]
    _check_alternative(alternative)
    if count < 2:
        return np.full(t.shape, np.nan)[()]
    if alternative == "two-sided":
        return 2 * stats.t.sf(np.abs(t), count - 1)
    return stats.t.sf(t if alternative == "greater" else -t, count - 1)


def effect_size(differences: np.ndarray) -> np.ndarray:
    """Standardised mean of paired differences `[..., seeds]`: Cohen's d_z with Hedges' correction for few seeds.

    The mean in units of the standard deviation over seeds: for normal differences a fresh seed shows the sign with
    probability Phi(d_z), 58 % at 0.2, 69 % at 0.5, 79 % at 0.8. It is not the d of unpaired arms, which is in units of
    the spread within an arm. Infinite for equal values other than 0, NaN for fewer than three seeds.

    Source: Hedges 1981, "Distribution theory for Glass's estimator of effect size": the exact factor.
    """
    t, count = _t_statistic(differences, 0.0), np.shape(differences)[-1]
    if count < 3:
        return np.full(t.shape, np.nan)[()]
    freedom = count - 1
    log_factor = special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2) - np.log(freedom / 2) / 2
    return np.exp(log_factor) * t / np.sqrt(count)


# --- Many comparisons -----------------------------------------------------------------------------------------------


def adjust(p_values: np.ndarray, method: str = "holm") -> np.ndarray:
    """p-values corrected for being many, `[n] -> [n]`; NaN stays NaN and does not count.

    Args:
      method: "holm" (bounds the chance of any false rejection, under any dependence; Holm 1979), "bonferroni" (the
        same with less power), "benjamini_hochberg" (bounds the expected share of rejections that are false, under
        independence or positive dependence; Benjamini and Hochberg 1995) or "none".

    Raises:
      ValueError: for a p-value outside [0, 1] or an unknown method.
    """
    p_values = np.asarray(p_values, np.float64)
    if method not in CORRECTIONS:
        raise ValueError(f"method: expected one of {', '.join(CORRECTIONS)}, got {method!r}")
    known = ~np.isnan(p_values)
    p = p_values[known]
    if p_values.ndim != 1 or (p < 0).any() or (p > 1).any():
        raise ValueError(f"p_values: expected a list of numbers in [0, 1] or NaN, got {p_values}")
    adjusted = np.full(p_values.shape, np.nan)
    if method == "holm":
        order = np.argsort(p)
        steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
        adjusted[known] = np.minimum(steps, 1.0)[np.argsort(order)]
    elif method == "bonferroni":
        adjusted[known] = np.minimum(p * p.size, 1.0)
    elif method == "benjamini_hochberg" and p.size:
        adjusted[known] = stats.false_discovery_control(p)
    else:
        adjusted[known] = p
    return adjusted


# --- Sequential use -------------------------------------------------------------------------------------------------


def confidence_sequence(values: np.ndarray, level: float = 0.95, spread: float = 1.0) -> Interval:
    """Interval of the mean that may be looked at after every seed: with probability `level` it is right at all of them.

    An interval for a fixed number of seeds, computed again and again as seeds are added, misses more often than it
    says. This one inverts the t test martingale that mixes the standardised mean over N(0, spread^2); it is exact for
    normal values at any number of seeds, which is what Student's t presumes, where asymptotic sequences (arXiv
    2103.06476) need more seeds than a study has. The whole line for fewer than five seeds (level .95, spread 1).

    Args:
      values: `[..., seeds]` in the order in which the seeds ran, all seeds so far.
      spread: standardised effect for which it is tight: small for small effects and many seeds.

    Source: Wang and Ramdas, arXiv 2310.03722, "Anytime-valid t-tests and confidence sequences for Gaussian means with
    unknown variance", the Gaussian mixture in the scale-invariant filtration.
    """
    _check_level(level)
    center, error, count = _moments(values)
    growth = 1 + count * _check_spread(spread) ** 2
    # The martingale is below 1 / (1 - level) exactly where (1 + q) / (1 + q / growth) < ratio, with q = t^2 / (n - 1).
    ratio = np.exp((np.log(growth) - 2 * np.log1p(-level)) / count)
    if ratio >= growth:
        half = np.full(center.shape, np.inf)
    else:
        half = error * np.sqrt((count - 1) * (ratio - 1) / (1 - ratio / growth))
    return Interval(center[()], (center - half)[()], (center + half)[()])


def always_valid_test(
    values: np.ndarray, reference: float = 0.0, alternative: str = "two-sided", spread: float = 1.0
) -> np.ndarray:
    """p-value that stays valid however often seeds are added and it is computed again: `confidence_sequence`'s.

    It is below p exactly where the sequence at level 1 - p excludes `reference`. One-sided, it is half of that on the
    right side and 1 on the other, by symmetry (up to sequences that would reject on both sides at different times).

    Args:
      values: `[..., seeds]`, all seeds so far.
      alternative: "two-sided", "greater" (the mean is above `reference`) or "less".
    """
    _check_alternative(alternative)
    t, count = _t_statistic(values, reference), np.shape(values)[-1]
    if count < 2:
        return np.full(t.shape, np.nan)[()]
    growth = 1 + count * _check_spread(spread) ** 2
    # (1 + q) / (1 + q / growth), in a form that has its limit at infinite t.
    quotient = growth - (growth - 1) / (1 + t**2 / ((count - 1) * growth))
    both = np.minimum(np.exp((np.log(growth) - count * np.log(quotient)) / 2), 1.0)
    if alternative == "two-sided":
        return both[()]
    right_side = t > 0 if alternative == "greater" else t < 0
    return np.where(np.isnan(t), np.nan, np.where(right_side & (both < 1), both / 2, 1.0))[()]


# --- Checks ---------------------------------------------------------------------------------------------------------


def _tasks(scores: np.ndarray, name: str = "scores") -> np.ndarray:
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    if scores.size == 0:
        raise ValueError(f"{name}: expected [seeds] or [tasks, seeds], not empty, got shape {scores.shape}")
    return scores


def _complete(scores: np.ndarray, name: str) -> np.ndarray:
    if scores.ndim > 2:
        raise ValueError(f"{name}: expected [seeds] or [tasks, seeds], got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected finite numbers, got {np.sum(~np.isfinite(scores))} that are not")
    return scores


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(mean, standard error of the mean, seeds); the error is NaN for one seed."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values: expected [..., seeds] with at least one seed, got shape {values.shape}")
    count = values.shape[-1]
    error = values.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(values.shape[:-1], np.nan)
    return np.asarray(values.mean(axis=-1)), np.asarray(error), count


def _t_statistic(values: np.ndarray, reference: float) -> np.ndarray:
    """(mean - reference) / standard error: for equal values 0 or infinite."""
    center, error, _ = _moments(values)
    gap = center - reference
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((gap == 0) & ~np.isnan(error), 0.0, gap / error)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected between 0 and 1, got {level}")


def _check_alternative(alternative: str) -> None:
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative: expected one of {', '.join(ALTERNATIVES)}, got {alternative!r}")


def _check_spread(spread: float) -> float:
    if not spread > 0:
        raise ValueError(f"spread: expected above 0, got {spread}")
    return spread
