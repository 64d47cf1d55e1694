"""Statistics of runs: published examples, brute force, and simulated coverage."""

import functools
import itertools

import numpy as np
import pytest
from scipy import integrate, stats

from rollax.experiments.harness import statistics
from rollax.experiments.harness.statistics import (
    adjust,
    always_valid_test,
    bootstrap_interval,
    confidence_sequence,
    effect_size,
    iqm,
    mean,
    median,
    optimality_gap,
    paired_tests,
    probability_of_improvement,
    probability_of_improvement_interval,
    t_interval,
    t_test,
)

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(3, 7))
AGGREGATES = {"mean": mean, "median": median, "iqm": iqm, "gap": functools.partial(optimality_gap, target=0.5)}

# Darwin's maize, cross- minus self-fertilised, eighths of an inch (Fisher, The Design of Experiments, 1935, III).
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48.0])
# Student 1908: hours of sleep gained under two drugs by the same ten patients.
SLEEP_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def test_aggregates_by_hand():
    scores = np.array([[0.0, 1.0, 2.0, 9.0], [4.0, 4.0, -8.0, 8.0], [0.2, 0.4, 0.6, 0.8]])
    assert mean(scores) == pytest.approx(22 / 12)
    assert median(scores) == 2.0  # of the tasks' means 3, 2, 0.5
    assert iqm(scores) == pytest.approx((0.4 + 0.6 + 0.8 + 1.0 + 2.0 + 4.0) / 6)  # without -8, 0, 0.2 and 4, 8, 9
    assert optimality_gap(scores) == pytest.approx((1.0 + 9.0 + 0.8 + 0.6 + 0.4 + 0.2) / 12)
    assert optimality_gap(scores, target=-1.0) == pytest.approx(7 / 12)
    one = np.array([1.0, 2.0, 4.0, 100.0])
    assert [f(one) for f in (mean, median, iqm, optimality_gap)] == [26.75, 3.0, 3.0, 0.0]


def test_aggregates_against_loops():
    ordered = sorted(SCORES.ravel())
    cut = len(ordered) // 4
    assert iqm(SCORES) == pytest.approx(sum(ordered[cut:-cut]) / (len(ordered) - 2 * cut))
    for aggregate in AGGREGATES.values():
        batch = np.stack([SCORES, SCORES + 1, 2 * SCORES])
        np.testing.assert_allclose(aggregate(batch), [aggregate(scores) for scores in batch])
        assert aggregate(SCORES[0]) == pytest.approx(aggregate(SCORES[:1]))


def test_probability_of_improvement_is_mann_whitney():
    x, y = RNG.integers(0, 5, (4, 6)).astype(float), RNG.integers(0, 5, (4, 9)).astype(float)  # with ties
    u = [stats.mannwhitneyu(x[task], y[task]).statistic / (6 * 9) for task in range(4)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))
    pairs = [(a > b) + (a == b) / 2 for task in range(4) for a in x[task] for b in y[task]]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(pairs))
    assert probability_of_improvement(x[0], y[0]) == pytest.approx(u[0])
    assert probability_of_improvement(x, x + 9) == 0.0


def drawn_seeds(seed, arrays, resamples):
    """The indices that the bootstrap draws."""
    generators = np.random.default_rng(seed).spawn(len(arrays))
    return [g.integers(a.shape[1], size=(resamples, *a.shape)) for g, a in zip(generators, arrays, strict=True)]


@pytest.mark.parametrize("name", AGGREGATES)
def test_bootstrap_against_a_loop(name, monkeypatch):
    aggregate = AGGREGATES[name]
    (indices,) = drawn_seeds(3, [SCORES], 200)
    draws = [aggregate(np.array([[SCORES[task, i] for i in row] for task, row in enumerate(rows)])) for rows in indices]
    expected = [aggregate(SCORES), *np.quantile(draws, [0.05, 0.95])]
    np.testing.assert_allclose(bootstrap_interval(SCORES, aggregate, 0.9, 200, seed=3), expected)
    monkeypatch.setattr(statistics, "_CHUNK", 150)  # seven resamples at a time
    np.testing.assert_allclose(bootstrap_interval(SCORES, aggregate, 0.9, 200, seed=3), expected)


@pytest.mark.parametrize("paired", [False, True])
def test_bootstrap_of_improvement_against_a_loop(paired, monkeypatch):
    x, y = SCORES + 0.5, SCORES[:, ::-1]
    of_x, of_y = drawn_seeds(5, [x, y], 150)
    of_y = of_x if paired else of_y
    draws = [
        np.mean([stats.mannwhitneyu(x[t][i[t]], y[t][j[t]]).statistic / 49 for t in range(3)])
        for i, j in zip(of_x, of_y, strict=True)
    ]
    expected = [probability_of_improvement(x, y), *np.quantile(draws, [0.025, 0.975])]
    np.testing.assert_allclose(probability_of_improvement_interval(x, y, 0.95, 150, paired, 5), expected)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    np.testing.assert_allclose(probability_of_improvement_interval(x, y, 0.95, 150, paired, 5), expected)


@pytest.mark.parametrize("name", AGGREGATES)
def test_percentiles_are_those_of_all_resamples(name):
    """Two tasks of three seeds have 3^3 * 3^3 resamples: the exact bootstrap distribution."""
    scores = SCORES[:2, :3]
    picks = np.array(list(itertools.product(range(3), repeat=3)))
    every = np.stack([np.stack([scores[0][i], scores[1][j]]) for i in picks for j in picks])
    exact = AGGREGATES[name](every)
    assert exact.shape == (729,)
    _, low, high = bootstrap_interval(scores, AGGREGATES[name], 0.8, 40_000)
    for value, share in ((low, 0.1), (high, 0.9)):  # 0.006: four standard errors of the share
        assert np.quantile(exact, share - 0.006) - 1e-12 <= value <= np.quantile(exact, share + 0.006) + 1e-12


def test_bootstrap_is_stratified():
    assert bootstrap_interval(np.array([[0.0] * 5, [1.0] * 5]), mean, resamples=100) == (0.5, 0.5, 0.5)


def test_bca_is_that_of_all_resamples():
    """Efron 1987, with the exact bootstrap distribution of five seeds and a jackknife by loops."""
    values = np.array([0.1, 0.2, 0.35, 0.7, 2.0])
    every = np.array(list(itertools.product(values, repeat=5))).mean(axis=1)
    centre = stats.norm.ppf(np.mean(every < values.mean()) + np.mean(np.isclose(every, values.mean())) / 2)
    left_out = np.array([np.delete(values, i).mean() for i in range(5)])
    pull = left_out.mean() - left_out
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    shares = []
    for z in stats.norm.ppf([0.05, 0.95]):
        shares.append(stats.norm.cdf(centre + (centre + z) / (1 - acceleration * (centre + z))))
    _, low, high = bootstrap_interval(values, mean, 0.9, 40_000, method="bca")
    for value, share in ((low, shares[0]), (high, shares[1])):
        assert np.quantile(every, share - 0.008) <= value <= np.quantile(every, share + 0.008)
    assert high > bootstrap_interval(values, mean, 0.9, 40_000).high  # follows the long tail


def test_published_paired_tests():
    darwin = paired_tests(DARWIN, np.zeros(15), resamples=2**15)
    assert DARWIN.sum() == 314
    assert DARWIN.mean() / (DARWIN.std(ddof=1) / np.sqrt(15)) == pytest.approx(2.148, abs=5e-4)  # Fisher's t
    assert darwin.t_p == pytest.approx(0.0497, abs=5e-5)
    assert darwin.sign_flip_p == 2 * 863 / 2**15  # Fisher: 863 of 32768 sums reach 314
    assert darwin.wilcoxon_p == pytest.approx(0.041259765625, rel=1e-9)  # scipy.stats.wilcoxon's documentation
    sleep = paired_tests(SLEEP_1, SLEEP_2)  # R's ?sleep: t.test(extra ~ group, paired)
    assert sleep.t_p == pytest.approx(0.002833, abs=5e-7)
    assert sleep.difference == pytest.approx(-1.58)
    assert (sleep.low, sleep.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_paired_tests_against_enumeration(alternative):
    """All 2^7 flips of the differences' signs and of their ranks' signs."""
    x, y = SCORES, SCORES[:, ::-1] - 0.4 * np.arange(7)
    tests = paired_tests(x, y, alternative=alternative)
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=7)))
    for task, difference in enumerate(x - y):
        rank = stats.rankdata(np.abs(difference))
        for measure, p_value in ((np.abs(difference), tests.sign_flip_p), (rank, tests.wilcoxon_p)):
            sums, observed = signs @ measure, np.sign(difference) @ measure
            above, below = np.mean(sums >= observed - 1e-9), np.mean(sums <= observed + 1e-9)
            expected = {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]
            assert p_value[task] == pytest.approx(expected), (task, alternative)
        t = stats.ttest_rel(x[task], y[task], alternative=alternative)
        assert tests.t_p[task] == pytest.approx(t.pvalue)
    one = paired_tests(x[1], y[1], alternative=alternative)
    assert [float(value) for value in one] == pytest.approx([float(value[1]) for value in tests])


def test_random_flips_approach_all_flips():
    exact = paired_tests(DARWIN, np.zeros(15), resamples=2**15).sign_flip_p
    assert paired_tests(DARWIN, np.zeros(15), resamples=9999).sign_flip_p == pytest.approx(exact, abs=0.009)


def test_equal_arms():
    same = paired_tests(SLEEP_1, SLEEP_1)
    assert same == (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    shifted = paired_tests(np.ones(4), np.zeros(4))
    assert (shifted.low, shifted.high, shifted.effect_size, shifted.t_p) == (1.0, 1.0, np.inf, 0.0)
    assert shifted.sign_flip_p == shifted.wilcoxon_p == 2 / 2**4


def test_t_is_students():
    test = stats.ttest_1samp(SCORES, 0.3, axis=1)
    expected = test.confidence_interval(0.9)
    estimate, low, high = t_interval(SCORES, 0.9)
    np.testing.assert_allclose([estimate, low, high], [SCORES.mean(axis=1), expected.low, expected.high])
    for alternative in statistics.ALTERNATIVES:
        expected = stats.ttest_1samp(SCORES, 0.3, axis=1, alternative=alternative).pvalue
        np.testing.assert_allclose(t_test(SCORES, 0.3, alternative), expected)
    assert t_interval(np.array([2.0])) == (2.0, -np.inf, np.inf)
    assert np.isnan(t_test(np.array([2.0])))


def test_effect_size():
    raw = DARWIN.mean() / DARWIN.std(ddof=1)
    assert effect_size(DARWIN) == pytest.approx(raw * (1 - 3 / (4 * 14 - 1)), rel=1e-3)  # Hedges' approximation
    assert effect_size(-3 * DARWIN) == pytest.approx(-effect_size(DARWIN))
    assert np.isnan(effect_size(np.array([1.0, 2.0])))
    draws = effect_size(np.random.default_rng(1).normal(0.8, 1.0, (40_000, 6)))  # unbiased where the raw one is not
    assert draws.mean() == pytest.approx(0.8, abs=4 * draws.std() / 200)


def test_published_corrections():
    np.testing.assert_allclose(adjust([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # by hand
    # Benjamini and Hochberg 1995, section 4.1: at .05 theirs rejects four, Bonferroni's three.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    rejected = {method: int((adjust(p, method) <= 0.05).sum()) for method in statistics.CORRECTIONS}
    assert rejected == {"holm": 3, "bonferroni": 3, "benjamini_hochberg": 4, "none": 9}
    assert adjust(p, "benjamini_hochberg")[3] == pytest.approx(15 / 4 * 0.0095)


def step_down(p, alpha):
    """Holm's procedure as he states it: which hypotheses are rejected."""
    rejected = set()
    while remaining := [i for i in range(len(p)) if i not in rejected]:
        smallest = min(remaining, key=lambda i: p[i])
        if p[smallest] > alpha / len(remaining):
            break
        rejected.add(smallest)
    return rejected


def step_up(p, alpha):
    """Benjamini and Hochberg's procedure as they state it."""
    ordered = sorted(range(len(p)), key=lambda i: p[i])
    passing = [k for k, i in enumerate(ordered, 1) if p[i] <= k / len(p) * alpha]
    return set(ordered[: max(passing, default=0)])


@pytest.mark.parametrize(("method", "procedure"), [("holm", step_down), ("benjamini_hochberg", step_up)])
def test_corrections_against_their_procedures(method, procedure):
    for p in np.random.default_rng(2).random((200, 6)) ** 3:
        adjusted = adjust(p, method)
        for alpha in (0.01, 0.05, 0.2, 0.5):
            assert set(np.flatnonzero(adjusted <= alpha)) == procedure(p, alpha)


@pytest.mark.parametrize("method", statistics.CORRECTIONS)
def test_corrections_leave_out_nan(method):
    p = np.array([0.04, 0.01, 0.03])
    np.testing.assert_array_equal(adjust([np.nan, 0.04, 0.01, np.nan, 0.03], method)[[1, 2, 4]], adjust(p, method))
    assert np.isnan(adjust([np.nan, np.nan], method)).all()
    assert adjust([], method).shape == (0,)


def test_sequential_p_value_is_a_mixture():
    """1 / p is the likelihood ratio of t under a standardised mean ~ N(0, spread^2) against 0, here by quadrature."""
    for values, spread in ((SLEEP_2, 1.0), (DARWIN[2:10], 0.6), (SLEEP_1 + 1.5, 2.0)):
        n = len(values)
        t = values.mean() / stats.sem(values)
        mixture, _ = integrate.quad(
            lambda d, n=n, t=t, spread=spread: stats.nct.pdf(t, n - 1, d * np.sqrt(n)) * stats.norm.pdf(d, 0, spread),
            -8,
            8,
        )
        ratio = mixture / stats.t.pdf(t, n - 1)
        assert ratio > 1
        assert always_valid_test(values, spread=spread) == pytest.approx(1 / ratio, rel=1e-4)


def test_sequence_and_its_p_value_agree():
    for values in (SCORES[0], SLEEP_1, DARWIN):
        for level in (0.5, 0.9, 0.95):
            _, low, high = confidence_sequence(values, level)
            inside, outside = values.mean() + 0.999 * (high - values.mean()), low - 1e-6 * (high - low)
            assert always_valid_test(values, inside) > 1 - level > always_valid_test(values, outside)
            assert always_valid_test(values, outside, "greater") == always_valid_test(values, outside) / 2
            assert always_valid_test(values, outside, "less") == 1.0
    weak = SCORES[0] - SCORES[0].mean() + 0.01  # on the right side, but no evidence
    assert always_valid_test(weak) == always_valid_test(weak, 0.0, "greater") == 1.0
    assert confidence_sequence(SLEEP_1[:4])[1:] == (-np.inf, np.inf)
    assert confidence_sequence(np.ones(3)) == (1.0, -np.inf, np.inf)  # equal values of too few seeds say nothing
    assert confidence_sequence(np.ones(9)) == (1.0, 1.0, 1.0)
    assert always_valid_test(np.ones(9)) == pytest.approx(10.0**-4)


def asymptotic_sequence(values, level=0.95, tuned_for=16):
    """Waudby-Smith et al., arXiv 2103.06476: the Gaussian mixture boundary with an estimated standard deviation."""
    n, alpha = values.shape[-1], 1 - level
    rho2 = (-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / tuned_for
    width = np.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * np.log(np.sqrt(n * rho2 + 1) / alpha))
    center, half = values.mean(axis=-1), values.std(axis=-1) * width
    return center, center - half, center + half


def test_looking_after_every_seed():
    """3000 studies of no effect that grow from 3 to 40 seeds: Student's misses often, the sequence keeps its level."""
    seeds = np.random.default_rng(4).normal(size=(3000, 40))
    intervals = {"t": t_interval, "sequence": confidence_sequence, "asymptotic": asymptotic_sequence}
    missed, up = {name: np.zeros(3000, bool) for name in intervals}, np.zeros(3000, bool)
    for n in range(3, 41):
        for name, interval in intervals.items():
            _, low, high = interval(seeds[:, :n])
            missed[name] |= (low > 0) | (high < 0)
        up |= always_valid_test(seeds[:, :n], 0.0, "greater") < 0.025
    assert missed["t"].mean() > 0.2
    assert missed["asymptotic"].mean() > 0.1  # too few seeds for it
    assert missed["sequence"].mean() < 0.05
    assert up.mean() < 0.025
    assert missed["sequence"].mean() > 0.01  # not by being idle


def test_coverage():
    """Of the true value by 400 studies each: few seeds make percentiles too narrow, tasks together make up for it."""
    rng = np.random.default_rng(6)

    def covered(tasks, seeds, interval):
        intervals = [interval(rng.normal(size=(tasks, seeds))) for _ in range(400)]
        return np.mean([low <= 0 <= high for _, low, high in intervals])

    percentile = functools.partial(bootstrap_interval, statistic=iqm, resamples=400)
    assert covered(1, 5, percentile) < 0.9
    assert covered(1, 5, lambda x: t_interval(x[0])) == pytest.approx(0.95, abs=0.03)
    assert covered(8, 10, percentile) == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iqm(np.zeros((2, 0))), r"scores.*not empty.*\(2, 0\)"),
        (lambda: bootstrap_interval([1.0, np.nan]), r"scores: expected finite numbers, got 1"),
        (lambda: bootstrap_interval(np.zeros((1, 2, 3))), r"scores: expected \[seeds\].*\(1, 2, 3\)"),
        (lambda: bootstrap_interval(SCORES, level=95), r"level.*between 0 and 1.*95"),
        (lambda: bootstrap_interval(SCORES, resamples=0), r"resamples: expected at least 1, got 0"),
        (lambda: bootstrap_interval(SCORES, method="bca"), r"method: 'bca' expects one task.*\[3, 7\]"),
        (lambda: bootstrap_interval(SCORES, method="basic"), r"method: expected 'percentile' or 'bca', got 'basic'"),
        (lambda: probability_of_improvement_interval(SCORES, SCORES[:2]), r"y: expected the tasks of x"),
        (lambda: probability_of_improvement_interval(SCORES, SCORES[:, :2], paired=True), r"y: expected the seeds"),
        (lambda: paired_tests([1.0, 2.0], [1.0]), r"x, y: expected two equal shapes.*\(2,\), \(1,\)"),
        (lambda: paired_tests([1.0], [1.0]), r"x, y: expected"),
        (lambda: paired_tests([1.0, np.inf], [1.0, 2.0]), r"x: expected finite"),
        (lambda: paired_tests([1.0, 3.0], [1.0, 2.0], alternative="up"), r"alternative: expected one of.*'up'"),
        (lambda: adjust([0.1, 1.1]), r"p_values: expected.*\[0, 1\].*1\.1"),
        (lambda: adjust([0.1], "sidak"), r"method: expected one of holm.*'sidak'"),
        (lambda: confidence_sequence(SCORES, spread=0.0), r"spread: expected above 0, got 0"),
        (lambda: t_interval(np.zeros((3, 0))), r"values: expected.*\(3, 0\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
