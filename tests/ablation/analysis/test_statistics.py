import math
from math import inf

import numpy as np
import pytest
from scipy import stats

from gnunet.ablation.analysis.statistics import (
    RESAMPLES,
    Difference,
    Interval,
    Score,
    exact_interval,
    holm,
    judge,
    judge_all,
    p_of_verdict,
    paired_difference,
    resample_losses,
    student_interval,
    word_for,
)

BINS, ROWS, UNIFORM = np.arange(60) % 4, np.arange(60), np.full(60, 1 / 60)
DIVERGED = Score(inf)
UNKNOWN = "not enough evidence"


def trials(errors):
    """Outcomes by seed from rows of errors."""
    return {seed: Score(row.mean(), resample_losses(row, UNIFORM, ROWS, BINS)) for seed, row in enumerate(errors)}


def values(*numbers):
    """Outcomes by seed of a metric without examples."""
    return {seed: Score(number) for seed, number in enumerate(numbers)}


def draw(seeds=3, *, spread=0.1, seed=0):
    """Errors (seeds, 60): examples that differ much, the same way in every trial, and trials that differ a little."""
    shared = np.random.default_rng(99).lognormal(size=60)
    own = np.random.default_rng(seed)
    return shared * (1 + spread * own.standard_normal((seeds, 1))) * np.exp(0.05 * own.standard_normal((seeds, 60)))


def between(low, high):
    """A difference of three seeds with this interval."""
    ends = Interval(math.log1p(low), math.log1p(high))
    return Difference(3, (sum(ends) / 2,) * 3, resampled=ends)


class TestResamples:
    @pytest.mark.parametrize("images", [120, 60, 12])
    def test_have_the_spread_of_a_mean_over_images(self, images):
        """Of errors that images share, with bins far apart, which are not mixed; 6 or 2 images have the same bins."""
        rng, rows = np.random.default_rng(0), np.arange(120) % images
        bins = (np.arange(120) + np.arange(120) // images) % 6
        of_image = rng.standard_normal(images)
        errors = of_image[rows] + 100 * bins
        resampled = resample_losses(errors, np.full(120, 1 / 120), rows, bins)
        assert resampled.shape == (RESAMPLES,)
        groups = [of_image[np.arange(images) % 6 == group] for group in range(6)]
        expected = math.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)) / 6
        assert resampled.std() == pytest.approx(expected, rel=0.06)
        assert resampled.mean() == pytest.approx(errors.mean(), abs=4 * expected / math.sqrt(RESAMPLES))

    def test_every_trial_has_the_same_resamples_by_any_weights(self):
        a, b = draw(2)
        weights = np.linspace(0, 1, 60)
        one, other, both = (resample_losses(errors, weights, ROWS // 2, BINS) for errors in (a, b, a + b))
        np.testing.assert_allclose(one + other, both, rtol=1e-12)
        np.testing.assert_allclose(resample_losses(a * weights, np.ones(60), ROWS // 2, BINS), one, rtol=1e-12)


class TestIntervals:
    def test_student_agrees_with_scipy(self):
        numbers = np.array([0.1, 0.4, -0.2, 0.3])
        interval = student_interval(numbers)
        expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert student_interval(numbers[:1]) is None

    @pytest.mark.parametrize(("count", "low", "high"), [(0, 0.0, 0.5218), (2, 0.0527, 0.8534), (5, 0.4782, 1.0)])
    def test_exact_interval_of_a_count_in_five(self, count, low, high):
        assert exact_interval(count, 5) == pytest.approx((low, high), abs=5e-5)

    def test_the_interval_reaches_over_both(self):
        difference = paired_difference(trials(draw(seed=1)), trials(draw(seed=2)))
        student, bootstrap = difference.student, difference.bootstrap
        assert difference.interval.low == min(student.low, bootstrap.low)
        assert difference.interval.high == max(student.high, bootstrap.high)

    def test_without_examples_it_is_students(self):
        difference = paired_difference(values(1.0, 1.2, 1.1), values(1.0, 1.0, 1.0))
        assert difference.bootstrap is None
        steps = np.log([1.0, 1.2, 1.1])
        assert difference.relative == pytest.approx(math.exp(steps.mean()) - 1)
        assert difference.interval == difference.student
        assert difference.interval == pytest.approx(np.expm1(student_interval(steps)))

    def test_one_seed_has_the_bootstrap_alone(self):
        difference = paired_difference(trials(draw(1, seed=1)), trials(draw(1, seed=2)))
        assert difference.student is None and difference.pairs == 1
        assert difference.interval == difference.bootstrap
        assert difference.interval.low < difference.relative < difference.interval.high

    def test_what_pairs_share_cancels(self):
        """Seeds and examples differ much more than the sides do."""
        right = draw(spread=0.3)
        difference = paired_difference(trials(1.02 * right), trials(right))
        assert difference.relative == pytest.approx(0.02, rel=1e-12)
        assert difference.bootstrap.low == pytest.approx(0.02) == difference.bootstrap.high
        assert 0 < difference.interval.low < 0.02 < difference.interval.high < 0.04

    def test_pairs_are_by_seed_whatever_their_order(self):
        right = trials(draw(4, spread=0.5))
        left = trials(1.01 * draw(4, spread=0.5))
        shuffled = {seed: left[seed] for seed in (2, 0, 3)}  # one is missing
        difference = paired_difference(shuffled, right)
        assert difference.pairs == 3
        assert difference.by_seed == pytest.approx([left[s].value / right[s].value - 1 for s in (0, 2, 3)])

    def test_relative_to_the_size_of_right_where_a_value_is_not_above_zero(self):
        difference = paired_difference(values(-0.5, 0.5), values(-1.0, -1.0))
        assert difference.by_seed == pytest.approx([0.5, 1.5]) and difference.relative == pytest.approx(1.0)
        assert difference.student == pytest.approx(student_interval(np.array([0.5, 1.5])))
        assert difference.within(0.5) == (-0.5, 0.5)
        assert paired_difference(values(0.5, 0.5), values(0.0, 0.0)).relative is None

    def test_no_interval_of_ratios_reaches_below_zero(self):
        difference = paired_difference(values(0.01, 1.0), values(1.0, 1.0))
        assert -1 < difference.interval.low < difference.relative < 0 < difference.interval.high
        assert difference.relative == pytest.approx(0.1 - 1)

    @pytest.mark.parametrize("seeds", [2, 3, 6])
    def test_covers_the_truth_as_often_as_it_says(self, seeds):
        """Both the seeds and the examples are new draws; the expected difference is 5% of 1."""
        rng = np.random.default_rng(seeds)
        runs, covered = 300, 0
        for _ in range(runs):
            examples = np.exp(rng.standard_normal(60) * 0.3 - 0.045)  # mean 1
            effect = 0.05 + 0.02 * rng.standard_normal(60)
            right = np.tile(examples, (seeds, 1))
            left = right + effect + 0.02 * rng.standard_normal((seeds, 1))
            interval = paired_difference(trials(left), trials(right)).interval
            scale = examples.mean()  # relative to what is measured
            covered += interval.low * scale <= 0.05 <= interval.high * scale
        assert covered / runs > 0.93


class TestDivergence:
    def test_all_of_left(self):
        difference = paired_difference(dict.fromkeys(range(3), DIVERGED), trials(draw()))
        assert difference.interval == Interval(inf, inf)
        assert difference.relative == inf and difference.diverged == 3
        assert judge(difference, "higher", 0.5) == "supported"
        assert judge(difference, "lower") == judge(difference, "same", 0.5) == "refuted"

    def test_one_of_left_extends_the_interval_upwards(self):
        right = draw()
        whole = trials(1.1 * right)
        difference = paired_difference(whole | {0: DIVERGED}, trials(right))
        without = paired_difference({s: whole[s] for s in (1, 2)}, {s: trials(right)[s] for s in (1, 2)})
        assert difference.interval == Interval(without.interval.low, inf)
        assert (difference.pairs, difference.diverged, len(difference.by_seed)) == (3, 1, 2)
        assert judge(difference, "lower") == judge(difference, "same", 0.01) == "refuted"

    def test_a_finite_pair_that_says_otherwise(self):
        left, right = trials(0.9 * draw(1)), trials(draw(1))
        difference = paired_difference(left | {1: DIVERGED}, right | {1: right[0]})
        assert difference.interval.low < 0 and difference.interval.high == inf
        assert judge(difference, "higher") == UNKNOWN

    @pytest.mark.parametrize(
        ("left", "right", "relative", "interval", "verdicts"),
        [
            ([1, 1, 1], [1, 1, inf], -inf, (-inf, 0), {"lower": UNKNOWN, "higher": "refuted"}),
            ([1, inf], [inf, 1], math.nan, (-inf, inf), dict.fromkeys(("higher", "lower", "same"), UNKNOWN)),
            ([inf], [1], inf, (inf, inf), {"higher": UNKNOWN}),  # one pair is no evidence
            ([-inf, -inf], [0.7, 0.8], -inf, (-inf, -inf), {"lower": "supported"}),  # where high is good
        ],
    )
    def test_of_metrics_without_examples(self, left, right, relative, interval, verdicts):
        difference = paired_difference(values(*left), values(*right))
        assert difference.relative == pytest.approx(relative, nan_ok=True)
        assert difference.interval == Interval(*interval)
        assert {expect: judge(difference, expect, 0.01) for expect in verdicts} == verdicts

    def test_both_sides_of_a_pair_say_nothing(self):
        difference = paired_difference(values(1.1, inf, 1.1), values(1.0, inf, 1.0))
        assert difference.pairs == 2 and difference.both_diverged == 1
        assert difference.relative == pytest.approx(0.1) and 0.09 < difference.interval.high < inf
        assert judge(paired_difference(values(inf), values(inf)), "higher") == UNKNOWN


class TestVerdicts:
    @pytest.mark.parametrize(
        ("low", "high", "expect", "margin", "verdict"),
        [
            (0.011, 0.03, "higher", 0.01, "supported"),
            (0.005, 0.03, "higher", 0.01, UNKNOWN),
            (-0.02, 0.005, "higher", 0.01, "refuted"),  # higher, if at all, by less than the margin
            (0.001, 0.03, "higher", 0.0, "supported"),
            (-0.03, 0.0, "higher", 0.0, UNKNOWN),
            (-0.03, -0.011, "lower", 0.01, "supported"),
            (-0.6, -0.51, "lower", 1.0, "supported"),  # by over a factor of 2
            (-0.6, -0.49, "lower", 1.0, UNKNOWN),
            (-0.03, -0.005, "lower", 0.01, UNKNOWN),
            (-0.005, 0.02, "lower", 0.01, "refuted"),
            (-0.0099, 0.0099, "same", 0.01, "supported"),
            (-0.4, 0.9, "same", 1.0, "supported"),
            (-0.51, 0.9, "same", 1.0, UNKNOWN),
            (0.002, 0.008, "same", 0.01, "supported"),  # a difference, but a small one
            (-0.02, 0.005, "same", 0.01, UNKNOWN),
            (0.011, 0.02, "same", 0.01, "refuted"),
            (-0.02, -0.011, "same", 0.01, "refuted"),
        ],
    )
    def test_by_where_the_interval_is(self, low, high, expect, margin, verdict):
        assert judge(between(low, high), expect, margin) == verdict

    @pytest.mark.parametrize(
        ("left", "right", "verdict"),
        [
            (trials(2 * draw(1)), trials(draw(1)), UNKNOWN),  # one seed
            ({}, trials(draw()), "missing"),
            ({0: Score(1.0)}, {1: Score(1.0)}, "missing"),
            (values(1.0, 2.0), values(0.0, 0.0), UNKNOWN),  # relative to 0: no interval
        ],
        ids=["one seed", "no left", "no pair", "no interval"],
    )
    def test_needs_pairs_and_an_interval(self, left, right, verdict):
        assert judge(paired_difference(left, right), "higher") == verdict

    @pytest.mark.parametrize(
        ("low", "high", "margin", "word"),
        [
            (0.002, 0.03, 0.01, "worse"),
            (-0.03, -0.002, 0.01, "better"),
            (0.002, 0.008, 0.01, "same"),
            (-0.008, 0.02, 0.01, "unclear"),
        ],
    )
    def test_in_a_word(self, low, high, margin, word):
        assert word_for(between(low, high), margin, higher_is_better=False) == word
        other = {"worse": "better", "better": "worse"}.get(word, word)
        assert word_for(between(low, high), margin, higher_is_better=True) == other
        assert word_for(Difference(1, (0.1,)), margin, higher_is_better=False) == "unclear"

    @pytest.mark.parametrize(
        ("verdicts", "verdict"),
        [
            (["supported", "supported"], "supported"),
            (["supported", UNKNOWN], UNKNOWN),
            ([UNKNOWN, "missing"], "missing"),
            (["missing", "refuted", "supported"], "refuted"),
        ],
    )
    def test_a_claim_stands_on_all_its_comparisons(self, verdicts, verdict):
        assert judge_all(verdicts) == verdict


class TestPValues:
    @pytest.mark.parametrize(
        ("expect", "margin", "limit"),
        [("higher", 0.0, 0.0), ("higher", 0.05, 0.05), ("lower", 0.25, -0.2), ("same", 0.05, 0.05), ("same", 0.2, 0.2)],
    )
    def test_are_those_of_student_at_the_nearest_end_of_the_range(self, expect, margin, limit):
        left = [1.1, 1.02, 1.15, 1.2]
        p = p_of_verdict(paired_difference(values(*left), values(1.0, 1.0, 1.0, 1.0)), expect, margin)
        assert p == pytest.approx(stats.ttest_1samp(np.log(left), math.log1p(limit)).pvalue)

    @pytest.mark.parametrize(
        ("left", "right", "p"),
        [
            ([inf] * 5, [1.0] * 5, 2 / 2**5),
            ([inf, 2.0, 2.0, 2.0, 0.5], [1.0] * 5, 12 / 2**5),  # four of five
            ([4e-3, 2e-3, 4e-3, 2e-3], [2e-3, 1e-3, 2e-3, 1e-3], 2 / 2**4),  # on a grid
            ([1.0, 1.0], [1.0, 1.0], 1.0),
            ([1.0], [2.0], None),
            ([1.0, 2.0], [0.0, 0.0], None),
        ],
    )
    def test_by_signs_where_seeds_do_not_vary_or_diverge(self, left, right, p):
        assert paired_difference(values(*left), values(*right)).p_value(0.0) == (p and pytest.approx(p))

    def test_holm(self):
        """By hand: 3 x 0.01; 2 x 0.03; the next is smaller, so not below the one before it."""
        assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
        assert holm([0.01, None, 0.9]) == [pytest.approx(0.03), None, 1.0] and holm([]) == []


@pytest.mark.parametrize("count", [2, 5])
def test_the_power_margin_is_met_by_four_of_five_studies(count):
    steps = 0.02 * np.random.default_rng(0).standard_normal((4000, count))
    half = stats.t.ppf(0.975, count - 1) * steps.std(axis=1, ddof=1) / math.sqrt(count)
    unit = np.resize([1.0, -1.0], count)
    scaled = unit - unit.mean()
    exact = Difference(count, tuple(0.02 * scaled / scaled.std(ddof=1)))  # whose standard deviation is 0.02
    shown = np.abs(steps.mean(axis=1)) + half <= math.log1p(exact.power_margin)
    assert shown.mean() == pytest.approx(0.8, abs=0.02)
    assert Difference(count, (0.1,) * (count - 1), above=1).power_margin is None
