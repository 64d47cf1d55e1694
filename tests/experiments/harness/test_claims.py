"""Claims: the p-value and the interval say the same, looks widen, a family is corrected."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from rollax.experiments.harness.claims import Claim, judge, judge_all, mean_interval
from rollax.experiments.harness.statistics import confidence_sequence, effect_size

FIVE = np.array([0.1, 0.3, 0.2, 0.25, 0.15])  # mean 0.2, t interval [0.102, 0.298]
VALUES = np.array([0.1, 0.3, 0.2, 0.25, 0.15, 0.22, 0.18])


def claim(values, says="above", bound=0.0, name="C", **others):
    return Claim(name, "a claim", lambda results: np.asarray(values), says, bound, **others)


def with_p_value(p, seeds=8):
    """Values whose one-sided Student's test against 0 has the p-value `p`."""
    base = np.linspace(-1, 1, seeds)
    return base + stats.t.isf(p, seeds - 1) * stats.sem(base)


@pytest.mark.parametrize("looks", [1, 3])
@pytest.mark.parametrize("says", ["above", "below", "within"])
def test_holds_is_a_small_p_value(says, looks):
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        values, level = rng.normal(rng.normal(), 0.3, 8), rng.choice([0.8, 0.95])
        judged = judge(claim(values, says, 0.4), None, level, looks)
        assert (judged.verdict == "holds") == (judged.p_value < (1 - level) / 2), judged
        held += judged.verdict == "holds"
    assert 10 < held < 290


def test_p_values_are_students():
    assert judge(claim(VALUES, "above", 0.1), None).p_value == pytest.approx(
        stats.ttest_1samp(VALUES, 0.1, alternative="greater").pvalue
    )
    assert judge(claim(VALUES, "below", 0.1), None).p_value == pytest.approx(
        stats.ttest_1samp(VALUES, 0.1, alternative="less").pvalue
    )
    lower = stats.ttest_1samp(VALUES, -0.25, alternative="greater").pvalue
    upper = stats.ttest_1samp(VALUES, 0.25, alternative="less").pvalue
    assert judge(claim(VALUES, "within", 0.25), None).p_value == pytest.approx(max(lower, upper))


def test_effect_size_is_measured_from_what_is_asked():
    assert judge(claim(VALUES, "above", 0.15), None).effect_size == pytest.approx(effect_size(VALUES - 0.15))
    assert judge(claim(VALUES, "below", 0.3), None).effect_size == pytest.approx(effect_size(VALUES - 0.3))
    assert judge(claim(VALUES, "within", 0.3), None).effect_size == pytest.approx(effect_size(VALUES))


def test_what_was_not_tested_has_no_p_value():
    for untested in (claim([1.0]), claim([1.0, np.nan, 2.0]), claim(VALUES, applies=lambda results: False)):
        judged = judge(untested, None)
        assert np.isnan(judged.p_value)
        assert judged.verdict == "inconclusive"


def test_equal_seeds_are_a_point():
    for says, bound, verdict, p in (
        ("above", 0.5, "holds", 0.0),
        ("above", 2.0, "fails", 1.0),
        ("within", 1.5, "holds", 0),
    ):
        judged = judge(claim(np.ones(6), says, bound), None)
        assert (judged.verdict, judged.low, judged.high, judged.p_value) == (verdict, 1.0, 1.0, p)


def test_looks_widen_the_interval_and_say_so():
    once, again = judge(claim(VALUES), None), judge(claim(VALUES), None, looks=2)
    assert (once.looks, again.looks, once.note) == (1, 2, "")
    assert again.low < once.low < once.high < again.high
    assert (again.effect, again.low, again.high) == confidence_sequence(VALUES)
    assert "look 2" in again.note
    assert once.p_value < again.p_value
    doubtful = with_p_value(0.01)  # enough for one look, not for one of many
    assert judge(claim(doubtful), None).verdict == "holds"
    assert judge(claim(doubtful), None, looks=2).verdict == "inconclusive"
    with pytest.raises(ValueError, match="looks: expected at least 1, got 0"):
        judge(claim(VALUES), None, looks=0)


def test_seeds_added_until_the_claim_holds():
    """200 studies without an effect add one seed at a time, up to 30: how often does the claim come to hold?"""
    rng, came_to_hold = np.random.default_rng(1), {1: 0, 2: 0}
    for _ in range(200):
        values = rng.normal(size=30)
        for looks in came_to_hold:
            came_to_hold[looks] += any(
                judge(claim(values[:n]), None, looks=looks).verdict == "holds" for n in range(3, 31)
            )
    assert came_to_hold[1] / 200 > 0.08
    assert came_to_hold[2] / 200 < 0.025 + 3 * np.sqrt(0.025 / 200)


def test_family_is_corrected_by_holm():
    p = [0.01, 0.002, 0.3, 0.005]  # Holm: .02, .008, .3, .015, to be compared with .025
    claims = [claim(with_p_value(value), name=str(value)) for value in p]
    judged = judge_all(claims, None)
    assert [v.name for v in judged] == [str(value) for value in p]
    np.testing.assert_allclose([v.p_value for v in judged], p, rtol=1e-6)
    np.testing.assert_allclose([v.p_adjusted for v in judged], [0.02, 0.008, 0.3, 0.015], rtol=1e-6)
    assert [v.verdict for v in judged] == ["holds", "holds", "inconclusive", "holds"]
    assert [v.note for v in judged] == [""] * 4
    assert {v.correction for v in judged} == {"holm"}
    strict = judge_all(claims, None, correction="bonferroni")  # .04, .008, 1, .02
    assert [v.verdict for v in strict] == [v.verdict for v in judged]  # nothing is downgraded
    assert strict[0].note == "alone; among 4 claims its p is 0.04, above 0.025 (bonferroni)"
    assert [v.note for v in strict[1:]] == [""] * 3
    with pytest.raises(ValueError, match=r"correction: expected one of holm.*'sidak'"):
        judge_all(claims, None, correction="sidak")


def test_family_is_of_the_claims_that_could_be_tested():
    results = SimpleNamespace(train={"clip": {}, "band": {}})
    claims = [
        claim(with_p_value(0.02), needs=("clip", "band"), name="ran"),
        Claim("absent", "its rows did not run", lambda r: r.train["dcpo"], needs=("clip", "dcpo")),
        claim(with_p_value(0.001), applies=lambda r: False, needs=("clip",), name="outside"),
        claim(-with_p_value(0.02), needs=("clip",), name="against"),
    ]
    ran, outside, against = judge_all(claims, results, looks=1)
    assert [v.name for v in (ran, outside, against)] == ["ran", "outside", "against"]
    assert ran.p_adjusted == pytest.approx(0.04)  # of two
    assert "among 2 claims" in ran.note
    assert np.isnan(outside.p_adjusted)
    assert (against.verdict, against.note) == ("fails", "")
    assert judge_all([], results) == []
    (late,) = judge_all([claim(np.r_[VALUES, VALUES])], results, looks=4)
    assert late.looks == 4
    assert "look 4" in late.note


def test_a_verdict_becomes_json():
    saved = json.loads(json.dumps(judge_all([claim(VALUES, unit="nats")], None)[0].as_dict()))
    assert saved["verdict"] == "holds"
    assert saved["unit"] == "nats"
    assert saved["p_adjusted"] == saved["p_value"] < 0.001
    assert saved["effect_size"] > 1
    assert (saved["looks"], saved["correction"], saved["seeds"]) == (1, "holm", 7)


def test_interval_is_students():
    mean, low, high = mean_interval(FIVE)
    expected = stats.ttest_1samp(FIVE, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [FIVE.mean(), expected.low, expected.high])
    assert mean_interval(np.array([1.0])) == (1.0, -np.inf, np.inf)
    assert mean_interval(np.ones(4)) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("says", "bound", "verdict"),
    [
        ("above", 0.0, "holds"),
        ("above", 0.2, "inconclusive"),
        ("above", 0.5, "fails"),
        ("below", 0.5, "holds"),
        ("below", 0.2, "inconclusive"),
        ("below", 0.0, "fails"),
        ("within", 0.5, "holds"),
        ("within", 0.2, "inconclusive"),
        ("within", 0.05, "fails"),
    ],
)
def test_verdicts(says, bound, verdict):
    assert judge(Claim("C", "a claim", lambda r: FIVE, says, bound), None).verdict == verdict


def test_a_claim_outside_its_regime_is_inconclusive():
    claim = Claim("C", "a claim", lambda r: FIVE, applies=lambda r: False)
    judged = judge(claim, None)
    assert (judged.verdict, judged.seeds) == ("inconclusive", 5)
    assert "regime" in judged.note
    assert judge(Claim("C", "a claim", lambda r: np.array([1.0, np.nan])), None).verdict == "inconclusive"
    assert judge(Claim("C", "a claim", lambda r: np.array([1.0])), None).verdict == "inconclusive"  # one seed
    with pytest.raises(ValueError, match=r"claim.says.*above.*sideways"):
        judge(Claim("C", "a claim", lambda r: FIVE, "sideways"), None)
