"""Paired differences between the two sides of a comparison, their intervals, and verdicts on expectations.

Two trials with the same seed saw the same images, noise and noise levels, and were scored on the same validation set,
so their difference is taken seed by seed, and example by example where the metric is a mean over that set. It is the
mean of the seeds' log ratios, log(left) - log(right), shown as a relative difference, exp(mean) - 1. There are two
intervals, each of 95%:

- Student's t over the seeds' differences. It accounts for the variance of retraining, but not for the choice of
  validation examples; at two or three seeds it is wide, as it should be.
- A bootstrap on two levels: seeds are drawn with replacement, and so are the images of the validation set, each with
  all its examples, the same draws for every trial (Efron & Tibshirani, 1993; percentiles). It accounts for the images,
  but is too narrow at few seeds.

Figures and verdicts use the smallest interval that contains both. This envelope is of about 95%: in simulations with 3
to 8 seeds and 64 or 256 images it contains a true difference 93 to 96 times of 100, where one of the two may do so less
than 80 times. One seed contains no information on retraining: there is a bootstrap interval, over the images alone, and
no verdict.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
NORMAL_QUANTILE = float(stats.norm.ppf(0.5 + LEVEL / 2))
RESAMPLES = 2000
ENOUGH_PAIRS = 2  # fewest pairs of seeds for a verdict
POWER = 0.8
TOLERANCE = 1e-9  # differences up to it are rounding errors

Expectation = Literal["higher", "lower", "same"]
Verdict = Literal["supported", "refuted", "not enough evidence", "missing"]
Word = Literal["better", "worse", "same", "unclear"]


class Interval(NamedTuple):
    """From `low` to `high`; an end is infinite where a side diverged."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Score:
    """The value of a metric for one trial."""

    value: float  # infinite where the trial diverged: worse than any number (`-inf` where higher is better)
    resampled: np.ndarray | None = None
    """The value on each resample of the validation set, (RESAMPLES,); None for a metric that is not a mean over it."""
    fingerprint: str = ""  # of the validation set: values on different sets cannot be paired by example
    rounding: float = 0.0  # of a value on a grid: the log of the step to the next


@dataclass(frozen=True)
class Difference:
    """The relative difference of left to right over the seeds that both have: exp of the mean log ratio, minus 1.

    Where a value is not above 0, as KID's may be, it is the mean of left minus right over the absolute mean of right.
    A pair in which one side diverged counts as an infinite difference; a pair in which both did does not count.
    """

    pairs: int  # pairs that count
    steps: tuple[float, ...] = ()
    """What is averaged: the log ratio or the relative difference of each pair in which neither side diverged; empty
    where right's mean is 0."""
    is_ratio: bool = True  # whether `steps` are log ratios
    resampled: Interval | None = None
    """Of the mean of `steps`: the bootstrap's or, of values on a grid, that of their rounding; None where there is
    neither."""
    above: int = 0  # pairs in which left is infinitely above right: one of them diverged
    below: int = 0  # pairs in which left is infinitely below right
    both_diverged: int = 0  # pairs in which both diverged; not among `pairs`

    @property
    def diverged(self) -> int:
        """Pairs of which at least one side diverged."""
        return self.above + self.below + self.both_diverged

    @property
    def finite_mean(self) -> float | None:
        """Relative, over the pairs in which neither diverged; None without one or where right's mean is 0."""
        return self._relative(float(np.mean(self.steps))) if self.steps else None

    @property
    def relative(self) -> float | None:
        """Infinite where a side diverged, NaN where both did at different seeds; None without pairs or where right's
        mean is 0."""
        if self.above and self.below:
            return math.nan
        return math.inf if self.above else -math.inf if self.below else self.finite_mean

    @property
    def by_seed(self) -> tuple[float, ...]:
        """Relative, of each pair in which neither diverged."""
        return tuple(map(self._relative, self.steps))

    @property
    def student(self) -> Interval | None:
        """Relative, over the pairs in which neither diverged; None below two of them."""
        return self._relative_interval(student_interval(np.array(self.steps)))

    @property
    def bootstrap(self) -> Interval | None:
        """`resampled` as a relative difference."""
        return self._relative_interval(self.resampled)

    @property
    def interval(self) -> Interval | None:
        """Relative: contains both intervals, and extends to infinity on the side of a divergence."""
        if self.pairs and self.pairs == self.above + self.below:
            return Interval(-math.inf if self.below else math.inf, math.inf if self.above else -math.inf)
        both = [interval for interval in (self.student, self.bootstrap) if interval]
        known = Interval(min(i.low for i in both), max(i.high for i in both)) if both else None
        if not (self.above or self.below):
            return known
        low, high = known or (-math.inf, math.inf)
        return Interval(-math.inf if self.below else low, math.inf if self.above else high)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero and there are enough seeds for a verdict."""
        interval = self.interval
        return self.pairs >= ENOUGH_PAIRS and interval is not None and not interval.low <= 0 <= interval.high

    @property
    def power_margin(self) -> float | None:
        """The smallest margin within which as many seeds would show sides that do not differ to be the same, with 80%
        probability at the measured standard deviations, by either interval; None below two pairs and where a side
        diverged."""
        if self.pairs < ENOUGH_PAIRS or self.pairs > len(self.steps):
            return None
        by_seeds = _power_reach(self.pairs) * np.std(self.steps, ddof=1).item() / math.sqrt(self.pairs)
        by_examples = self._standard_error * (NORMAL_QUANTILE + stats.norm.ppf(0.5 + POWER / 2).item())
        return self._relative(max(by_seeds, by_examples))

    def within(self, margin: float) -> Interval:
        """The differences that a margin allows: factors up to 1 + margin, on both sides."""
        return Interval(-margin / (1 + margin) if self.is_ratio else -margin, margin)

    def p_value(self, *limits: float) -> float | None:
        """The two-sided p of a true difference at the nearest of relative `limits`; None below two pairs.

        It is of Student's t, or of the sign test where no differences differ, as on a coarse grid, or a side diverged.
        """
        if self.pairs < ENOUGH_PAIRS or self.relative is None:
            return None
        return float(max(self._p_of(math.log1p(limit) if self.is_ratio else limit) for limit in limits))

    def _p_of(self, limit: float) -> float:
        away, infinite = np.array(self.steps) - limit, self.above + self.below
        if not infinite and np.ptp(away) > TOLERANCE:
            return stats.ttest_1samp(away, 0).pvalue
        above, below = self.above + int((away > TOLERANCE).sum()), self.below + int((away < -TOLERANCE).sum())
        return stats.binomtest(above, above + below).pvalue if above + below else 1.0

    @property
    def _standard_error(self) -> float:
        """That of `resampled`; 0 without it."""
        return (self.resampled.high - self.resampled.low) / (2 * NORMAL_QUANTILE) if self.resampled else 0.0

    def _relative(self, step: float) -> float:
        return math.expm1(step) if self.is_ratio else step

    def _relative_interval(self, interval: Interval | None) -> Interval | None:
        return interval and Interval(*map(self._relative, interval))


def paired_difference(left: Mapping[int, Score], right: Mapping[int, Score]) -> Difference:
    """The difference of two sides with scores by seed; seeds that only one side has are ignored."""
    pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
    finite = [(a, b) for a, b in pairs if math.isfinite(a.value) and math.isfinite(b.value)]
    above = sum(a.value - b.value == math.inf for a, b in pairs)
    below = sum(a.value - b.value == -math.inf for a, b in pairs)
    values = np.array([[score.value for score in pair] for pair in finite]).reshape(-1, 2)
    is_ratio = bool((values > 0).all())
    if is_ratio:
        steps = np.log(values[:, 0] / values[:, 1])
    else:
        scale = abs(values[:, 1].mean())
        steps = (values[:, 0] - values[:, 1]) / scale if scale else np.empty(0)
    return Difference(
        pairs=len(finite) + above + below, steps=tuple(steps.tolist()), is_ratio=is_ratio,
        resampled=(_rounding_interval(finite, steps) or _bootstrap_interval(finite)) if finite and is_ratio else None,
        above=above, below=below, both_diverged=len(pairs) - len(finite) - above - below,
    )  # fmt: skip


def student_interval(values: np.ndarray) -> Interval | None:
    """Student's t interval of the mean of values (n,), with n - 1 degrees of freedom; None where n is below 2."""
    n = len(values)
    if n < 2:
        return None
    reach = _t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return Interval(mean - reach, mean + reach)


def exact_interval(count: int, trials: int) -> Interval:
    """The 95% interval of a probability that was seen `count` times in `trials` (Clopper & Pearson, 1934)."""
    return Interval(*stats.binomtest(count, trials).proportion_ci(LEVEL, method="exact"))


def word_for(difference: Difference, margin: float, *, higher_is_better: bool) -> Word:
    """Left against right in a word: the same where the whole interval is within the margin, else better or worse where
    it excludes zero; unclear otherwise."""
    higher, lower = ("better", "worse") if higher_is_better else ("worse", "better")
    words = (("same", "same", margin), (higher, "higher", 0.0), (lower, "lower", 0.0))
    return next((word for word, expect, by in words if judge(difference, expect, by) == "supported"), "unclear")


def judge(difference: Difference, expect: Expectation, margin: float = 0.0) -> Verdict:
    """Judge whether left is higher or lower than right by more than `margin`, or the same within it.

    Supported where the whole interval is in the expected range, refuted where the whole interval is outside it.
    """
    interval = difference.interval
    if difference.pairs + difference.both_diverged == 0:
        return "missing"
    if difference.pairs < ENOUGH_PAIRS or interval is None:
        return "not enough evidence"
    (low, high), (lower, upper) = interval, difference.within(margin)
    holds, fails = {
        "higher": (low > upper, high < upper),
        "lower": (high < lower, low > lower),
        "same": (lower <= low and high <= upper, low > upper or high < lower),
    }[expect]
    return "supported" if holds else "refuted" if fails else "not enough evidence"


def p_of_verdict(difference: Difference, expect: Expectation, margin: float = 0.0) -> float | None:
    """The p-value of `judge` by the seeds alone: two-sided, of the nearest end of the expected range; None without
    enough pairs. Below 0.05 where Student's interval holds no end of the range."""
    lower, upper = difference.within(margin)
    return difference.p_value(*{"higher": (upper,), "lower": (lower,), "same": (lower, upper)}[expect])


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p-values adjusted for their number (Holm, 1979); None, of a comparison without data, counts as 1."""
    known = [1.0 if p is None else p for p in ps]
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * known[i]))
        adjusted[i] = largest
    return [None if p is None else value for p, value in zip(ps, adjusted, strict=True)]


def judge_all(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim that holds where all its comparisons do: one refuted comparison refutes it."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("refuted", "missing", "not enough evidence", "supported")
    return next(verdict for verdict in order if verdict in found)


def _rounding_interval(pairs: Sequence[tuple[Score, Score]], ratios: np.ndarray) -> Interval | None:
    """What the mean of log ratios of values on a grid can be, where each true value is below the next on the grid; None
    for others."""
    up, down = (float(np.mean([side.rounding for side in sides])) for sides in zip(*pairs, strict=True))
    mean = float(ratios.mean())
    return Interval(mean - down + TOLERANCE, mean + up - TOLERANCE) if up or down else None


def _bootstrap_interval(pairs: Sequence[tuple[Score, Score]]) -> Interval | None:
    """Of the mean log ratio."""
    scores = [score for pair in pairs for score in pair]
    if any(score.resampled is None for score in scores) or len({score.fingerprint for score in scores}) > 1:
        return None
    ratios = np.log(np.stack([left.resampled / right.resampled for left, right in pairs], axis=1))
    means = (_seed_weights(len(pairs)) * ratios).sum(axis=1)
    tail = (1 - LEVEL) / 2
    return Interval(*np.quantile(means, [tail, 1 - tail]).tolist())


def resample_losses(errors: np.ndarray, weights: np.ndarray, rows: Sequence[int], bins: Sequence[int]) -> np.ndarray:
    """The loss weights (n,) @ errors (n,) on each resample of the images, (RESAMPLES,): the same draws for all errors.

    `rows` and `bins` are the image and the bin of log-SNR of each example. An image is drawn with all its examples,
    from those that have examples in the same bins, so that each bin keeps its number.
    """
    counts, of_example = _image_counts(tuple(rows), tuple(bins))
    return counts @ np.bincount(of_example, weights * errors)


@lru_cache(maxsize=16)
def _image_counts(rows: tuple[int, ...], bins: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """How often each image counts in each resample, (RESAMPLES, images), and the image of each example, (n,)."""
    images, of_example = np.unique(rows, return_inverse=True)
    bins_of = [tuple(sorted(np.array(bins)[of_example == image])) for image in range(len(images))]
    rng, counts = np.random.default_rng(0), np.ones((RESAMPLES, len(images)))
    for found in dict.fromkeys(bins_of):
        members = [image for image, other in enumerate(bins_of) if other == found]
        # One fewer than there are, scaled up: the variance is unbiased in small groups, too (Rao & Wu, 1988).
        if (size := len(members)) > 1:
            counts[:, members] = rng.multinomial(size - 1, np.full(size, 1 / size), RESAMPLES) * (size / (size - 1))
    return counts, of_example


@lru_cache(maxsize=64)
def _seed_weights(count: int) -> np.ndarray:
    """The weight of each of `count` seeds in each resample of them, (RESAMPLES, count); one fewer, as of images."""
    drawn = max(count - 1, 1)
    return np.random.default_rng(1).multinomial(drawn, np.full(count, 1 / count), RESAMPLES) / drawn


@lru_cache(maxsize=64)
def _t_quantile(degrees: int) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, degrees))


@lru_cache(maxsize=64)
def _power_reach(count: int) -> float:
    """The margin in standard errors of the mean within which Student's interval of `count` normal values of mean 0 lies
    with probability POWER."""
    quantiles = (np.arange(1000) + 0.5) / 1000
    reach = _t_quantile(count - 1) * np.sqrt(stats.chi2.ppf(quantiles, count - 1) / (count - 1))

    def excess(margin: float) -> float:
        return float((2 * stats.norm.cdf(np.maximum(margin - reach, 0)) - 1).mean()) - POWER

    return float(optimize.brentq(excess, 0, reach[-1] + 10))
