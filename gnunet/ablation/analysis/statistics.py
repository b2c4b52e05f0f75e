"""Paired differences between the two sides of a comparison, their intervals, and verdicts on expectations.

Two trials with the same seed saw the same images, noise and noise levels, and were scored on the same validation set,
so their difference is taken seed by seed, and example by example where the metric is a mean over that set. There are
two intervals, each of 95%:

- Student's t over the seeds' differences. It accounts for the variance of retraining, but not for the choice of
  validation examples; at two or three seeds it is wide, as it should be.
- A bootstrap on two levels: seeds are drawn with replacement, and so are the validation examples within their bins of
  log-SNR, the same draws for every trial (Efron & Tibshirani, 1993; percentiles). It accounts for the examples, but is
  too narrow at few seeds.

Figures and verdicts use the smallest interval that contains both. One seed contains no information on retraining:
there is a bootstrap interval, over the examples alone, and no verdict.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
ENOUGH_PAIRS = 2  # fewest pairs of seeds for a verdict

Expectation = Literal["higher", "lower", "same"]
Verdict = Literal["supported", "refuted", "not enough evidence", "missing"]


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


@dataclass(frozen=True)
class Difference:
    """Left minus right over the seeds that both have, relative to the absolute mean of right.

    A pair in which one side diverged counts as an infinite difference; a pair in which both did does not count.
    """

    pairs: int  # pairs that count
    relative: float | None
    """Mean difference over |mean of right|; infinite where a side diverged, NaN where both did at different seeds;
    None without pairs or where right's mean is 0."""
    by_seed: tuple[float, ...]  # relative, of each pair in which neither diverged
    student: Interval | None  # relative, over the pairs in which neither diverged; None below two of them
    bootstrap: Interval | None
    """Relative, over the pairs in which neither diverged; None where the metric has no examples."""
    above: int = 0  # pairs in which left is infinitely above right: one of them diverged
    below: int = 0  # pairs in which left is infinitely below right
    both_diverged: int = 0  # pairs in which both diverged; not among `pairs`

    @property
    def diverged(self) -> int:
        """Pairs of which at least one side diverged."""
        return self.above + self.below + self.both_diverged

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero and there are enough seeds for a verdict."""
        interval = self.interval
        return self.pairs >= ENOUGH_PAIRS and interval is not None and not interval.low <= 0 <= interval.high

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


def paired_difference(left: Mapping[int, Score], right: Mapping[int, Score]) -> Difference:
    """The difference of two sides with scores by seed; seeds that only one side has are ignored."""
    pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
    finite = [(a, b) for a, b in pairs if math.isfinite(a.value) and math.isfinite(b.value)]
    above = sum(a.value - b.value == math.inf for a, b in pairs)
    below = sum(a.value - b.value == -math.inf for a, b in pairs)
    relative = student = bootstrap = None
    by_seed: tuple[float, ...] = ()
    if finite:
        lefts, rights = (np.array([side.value for side in sides]) for sides in zip(*finite, strict=True))
        scale = abs(rights.mean())
        if scale:
            relative = float((lefts - rights).mean()) / scale
            by_seed = tuple(((lefts - rights) / scale).tolist())
            student = student_interval((lefts - rights) / scale)
            bootstrap = _bootstrap_interval(finite)
    if above or below:
        relative = math.nan if above and below else math.inf if above else -math.inf
    return Difference(
        pairs=len(finite) + above + below, relative=relative, by_seed=by_seed,
        student=student, bootstrap=bootstrap, above=above, below=below,
        both_diverged=len(pairs) - len(finite) - above - below,
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


def judge(difference: Difference, expect: Expectation, margin: float = 0.0) -> Verdict:
    """Judge whether left is higher or lower than right by more than `margin` of right's mean, or the same within it.

    Supported where the whole interval is in the expected range, refuted where the whole interval is outside it.
    """
    interval = difference.interval
    if difference.pairs + difference.both_diverged == 0:
        return "missing"
    if difference.pairs < ENOUGH_PAIRS or interval is None:
        return "not enough evidence"
    low, high = interval
    holds, fails = {
        "higher": (low > margin, high < margin),
        "lower": (high < -margin, low > -margin),
        "same": (-margin <= low and high <= margin, low > margin or high < -margin),
    }[expect]
    return "supported" if holds else "refuted" if fails else "not enough evidence"


def judge_all(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim that holds where all its comparisons do: one refuted comparison refutes it."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("refuted", "missing", "not enough evidence", "supported")
    return next(verdict for verdict in order if verdict in found)


def _bootstrap_interval(pairs: Sequence[tuple[Score, Score]]) -> Interval | None:
    scores = [score for pair in pairs for score in pair]
    if any(score.resampled is None for score in scores) or len({score.fingerprint for score in scores}) > 1:
        return None
    weights = _seed_weights(len(pairs))
    left, right = (
        (weights * np.stack([side.resampled for side in sides], axis=1)).sum(axis=1)
        for sides in zip(*pairs, strict=True)
    )
    tail = (1 - LEVEL) / 2
    return Interval(*np.quantile((left - right) / np.abs(right), [tail, 1 - tail]).tolist())


def resample_losses(errors: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """The loss of errors (n,), the mean of the means over their bins (n,), on each resample of the examples,
    (RESAMPLES,): the same draws for all errors."""
    return _example_weights(tuple(bins.tolist())) @ errors


@lru_cache(maxsize=64)
def _example_weights(bins: tuple[int, ...]) -> np.ndarray:
    """The weight of each example in each resample, (RESAMPLES, n)."""
    rng, found = np.random.default_rng(0), np.unique(bins)
    weights = np.empty((RESAMPLES, len(bins)))
    for members in (np.equal(bins, b) for b in found):
        size = members.sum()
        weights[:, members] = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size
    return weights / len(found)


@lru_cache(maxsize=64)
def _seed_weights(count: int) -> np.ndarray:
    """The weight of each of `count` seeds in each resample of them, (RESAMPLES, count)."""
    return np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


@lru_cache(maxsize=64)
def _t_quantile(degrees: int) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, degrees))
