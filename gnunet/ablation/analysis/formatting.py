"""Numbers in words, as tables and figures have them."""

import math
from dataclasses import dataclass

from gnunet.ablation.analysis.statistics import ENOUGH_PAIRS, Difference


@dataclass(frozen=True)
class Described:
    """A difference in the columns of a table."""

    mean: str
    interval: str
    """Or why there is none."""
    pairs: str


def describe(difference: Difference) -> Described:
    """The mean of a difference, its interval and the number of pairs, or why there is none."""
    pairs, lost, interval = str(difference.pairs or ""), difference.diverged, difference.interval
    if difference.pairs == 0:
        return Described("", "both diverged" if lost else "missing", pairs)
    if lost == difference.pairs + difference.both_diverged:
        return Described("", f"{lost} of {lost} diverged", pairs)
    if difference.relative is None:
        return Described("", "relative to 0", pairs)
    if not any(difference.by_seed):
        return Described("0", "identical", pairs)
    reach = f"{percent(interval.low)} to {percent(interval.high)}" if interval else "one seed: none"
    mean = percent(difference.relative) if math.isfinite(difference.relative) else ""
    return Described(mean, f"{reach}, {lost} diverged" if lost else reach, pairs)


def is_clear(difference: Difference) -> bool:
    """Whether the interval leaves out zero and stands on enough seeds."""
    interval = difference.interval
    return difference.pairs >= ENOUGH_PAIRS and interval is not None and not interval.low <= 0 <= interval.high


def percent(value: float) -> str:
    """A relative difference with two digits behind the point, fewer where it is large: `+1.53%`, `+12.4%`."""
    if math.isinf(value):
        return _signed("\N{INFINITY}" if value > 0 else "-\N{INFINITY}")
    share = 100 * value
    digits = 2 if abs(share) < 9.995 else 1 if abs(share) < 99.95 else 0
    return _signed(f"{share:+.{digits}f}%")


def percent_tick(value: float, _: int | None = None) -> str:
    """A relative difference as an axis has it, a matplotlib formatter: `+2.5%`."""
    return _signed(f"{100 * value:+.3g}%") if value else "0"


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
