"""Whether a series of measurements grows: a robust slope with its interval, against a limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
LEAST_VALUES = 5
"""Fewer say nothing of a trend."""

Verdict = Literal["flat", "grows", "open"]


@dataclass(frozen=True)
class Quantity:
    """Something that must not grow in a long run."""

    title: str
    unit: str
    limit: float | None
    """The growth in an hour that is still flat, in `unit`, or in percent of the median; None is not judged."""
    relative: bool = False
    """Whether growth is counted in percent of the median."""

    @property
    def slope_unit(self) -> str:
        """Of slopes and of the limit."""
        return ("%" if self.relative else self.unit) + "/hour"


@dataclass(frozen=True)
class Slope:
    """Growth in an hour, and the ends of its interval."""

    value: float
    low: float
    high: float


def theil_sen(hours: Sequence[float], values: Sequence[float]) -> Slope:
    """The median of the slopes between all pairs of points, which outliers do not move (Sen, 1968).

    The interval, at CONFIDENCE, takes the points' deviations from the line to be independent; it is
    scipy.stats.theilslopes' where no two values are equal, and wider where some are.

    Args:
        hours: two or more times, ascending.
        values: finite, one for each.
    """
    x, y = np.asarray(hours, np.float64), np.asarray(values, np.float64)
    first, second = np.triu_indices(len(x), k=1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    pairs, n = len(slopes), len(x)
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low, high = max(round((pairs - spread) / 2) - 1, 0), min(round((pairs + spread) / 2), pairs - 1)
    return Slope(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))


def judge(quantity: Quantity, hours: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """What a record says of a quantity.

    Args:
        hours: times, ascending.
        values: one for each; NaN where there is none.

    Returns:
        `median`, `slope`, `low`, `high` and `limit`, and the `verdict`: `flat` where the whole interval of the slope
        is at or below the limit, `grows` where the whole of it is above, `open` where the limit is in it or there are
        too few values; None where there is no limit.
    """
    known = [(hour, value) for hour, value in zip(hours, values, strict=True) if math.isfinite(value)]
    about = {"unit": quantity.unit, "slope_unit": quantity.slope_unit, "limit": quantity.limit}
    if len(known) < LEAST_VALUES:
        verdict = None if quantity.limit is None else "open"
        return {**about, "median": None, "slope": None, "low": None, "high": None, "verdict": verdict}
    level = median(value for _, value in known)
    slope = theil_sen(*zip(*known, strict=True))
    scale = 100 / level if quantity.relative else 1.0
    value, low, high = (scale * each for each in (slope.value, slope.low, slope.high))
    verdict = None if quantity.limit is None else _verdict(low, high, quantity.limit)
    return {**about, "median": level, "slope": value, "low": low, "high": high, "verdict": verdict}


def _verdict(low: float, high: float, limit: float) -> Verdict:
    if high <= limit:
        return "flat"
    return "grows" if low > limit else "open"
