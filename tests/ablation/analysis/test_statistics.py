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
    judge,
    judge_all,
    paired_difference,
    resample_losses,
    student_interval,
)
from gnunet.evaluation.validation import summarize

BINS = np.arange(60) % 4
DIVERGED = Score(inf)
UNKNOWN = "not enough evidence"


def loss_of(errors):
    return summarize(errors, BINS, 4).validation_loss


def trials(errors):
    """Outcomes by seed from rows of errors."""
    return {seed: Score(loss_of(row), resample_losses(row, BINS)) for seed, row in enumerate(errors)}


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
    return Difference(3, (low + high) / 2, (low, (low + high) / 2, high), Interval(low, high), None)


class TestResamples:
    def test_resamples_have_the_spread_of_the_stratified_mean(self):
        bins = np.repeat([0, 1, 2], 40)
        errors = np.random.default_rng(0).standard_normal(120) + 10 * bins  # bins far apart: they are not mixed
        resampled = resample_losses(errors, bins)
        assert resampled.shape == (RESAMPLES,)
        expected = math.sqrt(sum(errors[bins == b].var() / 40 for b in range(3))) / 3
        assert resampled.std() == pytest.approx(expected, rel=0.06)
        loss = summarize(errors, bins, 3).validation_loss
        assert resampled.mean() == pytest.approx(loss, abs=4 * expected / math.sqrt(RESAMPLES))

    def test_every_trial_has_the_same_resamples(self):
        a, b = draw(2)
        one, other, both = (resample_losses(errors, BINS) for errors in (a, b, a + b))
        np.testing.assert_allclose(one + other, both, rtol=1e-12)


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
        assert difference.relative == pytest.approx(0.1)
        assert difference.interval == difference.student == student_interval(np.array([1.0, 1.2, 1.1]) - 1)

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
        scale = np.mean([right[seed].value for seed in (0, 2, 3)])
        assert difference.by_seed == pytest.approx([0.01 * right[s].value / scale for s in (0, 2, 3)])

    def test_relative_to_the_size_of_a_right_below_zero(self):
        assert paired_difference(values(-0.5, -0.5), values(-1.0, -1.0)).relative == pytest.approx(0.5)
        assert paired_difference(values(0.5, 0.5), values(0.0, 0.0)).relative is None

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
            scale = loss_of(examples)  # relative to what is measured
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
        assert difference.relative == pytest.approx(0.1) and difference.interval.high < inf
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
            (-0.03, -0.005, "lower", 0.01, UNKNOWN),
            (-0.005, 0.02, "lower", 0.01, "refuted"),
            (-0.01, 0.01, "same", 0.01, "supported"),
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
