"""A claim of a paper, and the verdict that an experiment gives it. Seeds are the unit of analysis.

A claim is a list of numbers, one per seed (usually the difference of two arms at equal seeds), and what it says of
their mean. The interval is Student's t at the given level; the verdict follows from the interval alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper and its test.

    Attributes:
      name: short label, for example "R2a".
      statement: the sentence.
      effect: `effect(results) -> [seeds]`, the numbers whose mean the claim is about.
      says: what the claim says of the mean: "above" `bound`, "below" `bound`, or "within" plus or minus `bound` of 0.
      bound: see `says`.
      unit: of the effect, for the table.
      applies: `applies(results) -> bool`: the regime that the claim presupposes; outside it it is inconclusive.
      needs: arms that must have run.
    """

    name: str
    statement: str
    effect: Callable[[Any], np.ndarray]
    says: str = "above"
    bound: float = 0.0
    unit: str = ""
    applies: Callable[[Any], bool] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`verdict` is "holds", "fails" or "inconclusive"; `low` and `high` bound the mean effect at `level`."""

    name: str
    statement: str
    verdict: str
    effect: float
    low: float
    high: float
    says: str
    bound: float
    unit: str
    seeds: int
    level: float
    note: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of `values` `[n]` by Student's t; the whole line for n < 2, a point for equal values."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf(0.5 + level / 2, values.size - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def judge(claim: Claim, results: Any, level: float = 0.95) -> Verdict:
    """Holds if the whole interval agrees with the claim, fails if none of it does, else inconclusive."""
    if claim.says not in ("above", "below", "within"):
        raise ValueError(f"claim.says: expected 'above', 'below' or 'within', got {claim.says!r}")
    values = np.asarray(claim.effect(results), np.float64)
    mean, low, high = mean_interval(values, level)
    bound = claim.bound
    holds = {"above": low > bound, "below": high < bound, "within": -bound <= low and high <= bound}[claim.says]
    fails = {"above": high <= bound, "below": low >= bound, "within": low > bound or high < -bound}[claim.says]
    verdict, note = "holds" if holds else "fails" if fails else "inconclusive", ""
    if not np.isfinite(values).all():
        verdict, note = "inconclusive", "some seeds gave no number"
    elif claim.applies is not None and not claim.applies(results):
        verdict, note = "inconclusive", "outside the regime that the claim presupposes"
    return Verdict(
        name=claim.name,
        statement=claim.statement,
        verdict=verdict,
        effect=mean,
        low=low,
        high=high,
        says=claim.says,
        bound=bound,
        unit=claim.unit,
        seeds=values.size,
        level=level,
        note=note,
    )
