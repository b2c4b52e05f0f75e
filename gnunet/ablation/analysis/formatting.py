"""Differences as text, for tables and figures."""

import math
from dataclasses import dataclass

from gnunet.ablation.analysis.statistics import ENOUGH_PAIRS, Difference


@dataclass(frozen=True)
class DifferenceText:
    """A difference as the columns of a table."""

    mean: str
    interval: str
    """Or why there is none."""
    pairs: str


def describe(difference: Difference) -> DifferenceText:
    """The mean of a difference, its interval and the number of pairs, or why there is none."""
    pairs, diverged, interval = str(difference.pairs or ""), difference.diverged, difference.interval
    if difference.pairs == 0:
        return DifferenceText("", "both diverged" if diverged else "missing", pairs)
    if diverged == difference.pairs + difference.both_diverged:
        return DifferenceText("", f"{diverged} of {diverged} diverged", pairs)
    if difference.relative is None:
        return DifferenceText("", "relative to 0", pairs)
    if not any(difference.by_seed):
        return DifferenceText("0", "identical", pairs)
    text = f"{percent(interval.low)} to {percent(interval.high)}" if interval else "one seed: none"
    mean = percent(difference.relative) if math.isfinite(difference.relative) else ""
    return DifferenceText(mean, f"{text}, {diverged} diverged" if diverged else text, pairs)


def is_clear(difference: Difference) -> bool:
    """Whether the interval excludes zero and there are enough seeds for a verdict."""
    interval = difference.interval
    return difference.pairs >= ENOUGH_PAIRS and interval is not None and not interval.low <= 0 <= interval.high


def percent(value: float) -> str:
    """A relative difference with two decimals, fewer where it is large: `+1.53%`, `+12.4%`."""
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    size = abs(100 * value)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return _with_minus_sign(f"{100 * value:+.{decimals}f}%")


def percent_tick(value: float, _: int | None = None) -> str:
    """A matplotlib formatter of relative differences: `+2.5%`."""
    return _with_minus_sign(f"{100 * value:+.3g}%") if value else "0"


def _with_minus_sign(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
