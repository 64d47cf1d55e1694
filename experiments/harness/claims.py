"""A claim of a paper, and the verdict that an experiment gives it. Seeds are the unit of analysis.

A claim is a list of numbers, one per seed (usually the difference of two arms at equal seeds), and what it says of
their mean. The interval is Student's t at the given level, or a confidence sequence where seeds were added after a
look; the verdict follows from the interval alone. `judge_all` also says which verdicts are owed to there being many.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rollax.experiments.harness.statistics import (
    CORRECTIONS,
    adjust,
    always_valid_test,
    confidence_sequence,
    effect_size,
    t_interval,
    t_test,
)


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
      rival: not the paper's sentence: something simpler or cheaper is better at equal cost. Reports begin with those
        that hold.
    """

    name: str
    statement: str
    effect: Callable[[Any], np.ndarray]
    says: str = "above"
    bound: float = 0.0
    unit: str = ""
    applies: Callable[[Any], bool] | None = None
    needs: tuple[str, ...] = ()
    rival: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of a claim.

    Attributes:
      verdict: "holds", "fails" or "inconclusive".
      effect: mean over seeds.
      low, high: bound the mean at `level`; at every number of seeds together if `looks` is above 1.
      p_value: of the claim's own test, one-sided for "above" and "below", of equivalence (the larger of two one-sided)
        for "within". The claim holds where it is below (1 - level) / 2. NaN where nothing was tested.
      effect_size: distance of the mean from `bound` (from 0 for "within") in standard deviations over seeds, with
        Hedges' correction (`statistics.effect_size`).
      looks: how often the seeds so far have been looked at with the choice to add more, this look included.
      p_adjusted: `p_value` corrected over the claims of `judge_all`; NaN from `judge`.
      correction: how, see `statistics.adjust`.
      note: why a verdict is not what the interval alone says, or what weakens it.
      rival: as in `Claim`.
    """

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
    p_value: float = np.nan
    effect_size: float = np.nan
    looks: int = 1
    p_adjusted: float = np.nan
    correction: str = ""
    rival: bool = False

    def as_dict(self) -> dict:
        return asdict(self)


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of `values` `[n]` by Student's t; the whole line for n < 2, a point for equal values."""
    mean, low, high = t_interval(np.ravel(values), level)
    return float(mean), float(low), float(high)


def judge(claim: Claim, results: Any, level: float = 0.95, looks: int = 1) -> Verdict:
    """Holds if the whole interval agrees with the claim, fails if none of it does, else inconclusive.

    Args:
      looks: 1 for a number of seeds that was fixed beforehand. Above 1, seeds were added after a look at the results:
        Student's interval would miss too often, so a confidence sequence replaces it, which may be looked at any number
        of times and needs no plan (a correction over looks would need their number in advance). It is wider, and a
        study that means to add seeds passes 2 from its first look on: who stops at a first look that used Student's and
        otherwise goes on has up to twice the error.

    Raises:
      ValueError: for an unknown `claim.says`, a level outside (0, 1), or looks below 1.
    """
    if claim.says not in ("above", "below", "within"):
        raise ValueError(f"claim.says: expected 'above', 'below' or 'within', got {claim.says!r}")
    if looks < 1:
        raise ValueError(f"looks: expected at least 1, got {looks}")
    values, bound = np.ravel(np.asarray(claim.effect(results), np.float64)), claim.bound
    interval, test = (t_interval, t_test) if looks == 1 else (confidence_sequence, always_valid_test)
    mean, low, high = (float(x) for x in interval(values, level))
    holds = {"above": low > bound, "below": high < bound, "within": -bound <= low and high <= bound}[claim.says]
    fails = {"above": high <= bound, "below": low >= bound, "within": low > bound or high < -bound}[claim.says]
    verdict, notes = "holds" if holds else "fails" if fails else "inconclusive", []
    p_value = claim_p_value(claim, values, test)
    if not np.isfinite(values).all():
        verdict, notes, p_value = "inconclusive", ["some seeds gave no number"], np.nan
    elif claim.applies is not None and not claim.applies(results):
        verdict, notes, p_value = "inconclusive", ["outside the regime that the claim presupposes"], np.nan
    if looks > 1:
        notes.append(f"look {looks}: the interval allows for added seeds")
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
        note="; ".join(notes),
        p_value=p_value,
        effect_size=float(effect_size(values - (0.0 if claim.says == "within" else bound))),
        looks=looks,
        rival=claim.rival,
    )


def claim_p_value(claim: Claim, values: np.ndarray, test: Callable = t_test) -> float:
    """p-value of what the claim says of the mean of `values` `[seeds]`; for "within" of two one-sided tests (TOST)."""
    if claim.says == "within":
        return float(np.maximum(test(values, -claim.bound, "greater"), test(values, claim.bound, "less")))
    return float(test(values, claim.bound, {"above": "greater", "below": "less"}[claim.says]))


def judge_all(
    claims: Sequence[Claim], results: Any, level: float = 0.95, correction: str = "holm", looks: int = 1
) -> list[Verdict]:
    """Judges the claims whose rows have run, as one family.

    A verdict stays what its own interval says. That several claims were tested shows in `p_adjusted`, and where a claim
    holds alone but not after the correction, its note says so. Claims that could not be tested (too few seeds, a seed
    without a number, outside their regime) do not count. The correction guards against claims that falsely hold;
    "fails" is not corrected.

    Args:
      results: `results.train` has the rows that ran.
      correction: "holm", "bonferroni", "benjamini_hochberg" or "none", see `statistics.adjust`.
      looks: see `judge`.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction: expected one of {', '.join(CORRECTIONS)}, got {correction!r}")
    alone = [judge(c, results, level, looks) for c in claims if all(row in results.train for row in c.needs)]
    p_adjusted = adjust(np.array([v.p_value for v in alone]), correction)
    family = int(np.isfinite(p_adjusted).sum())
    return [_in_family(verdict, float(p), correction, family) for verdict, p in zip(alone, p_adjusted, strict=True)]


def _in_family(verdict: Verdict, p_adjusted: float, correction: str, family: int) -> Verdict:
    note = verdict.note
    if verdict.verdict == "holds" and p_adjusted > (1 - verdict.level) / 2:
        asked = f"{(1 - verdict.level) / 2:.2g}"
        weak = f"alone; among {family} claims its p is {p_adjusted:.2g}, above {asked} ({correction})"
        note = f"{note}; {weak}" if note else weak
    return replace(verdict, note=note, p_adjusted=p_adjusted, correction=correction)
