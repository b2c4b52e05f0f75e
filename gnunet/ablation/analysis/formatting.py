"""Metrics and differences as text, for tables and figures, and which direction of a metric is good."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gnunet.ablation.analysis.statistics import Difference
from gnunet.ablation.records import HIGHER_IS_BETTER, TIMES
from gnunet.ablation.study import STABILITY_EDGE

_TITLES = {
    "training_loss": ("loss weighted as in training", ""),
    "training_loss_precise": ("loss weighted as in training, precise statistics", ""),
    "training_loss_batch": ("loss weighted as in training, batch statistics", ""),
    "validation_loss": ("validation loss", ""),
    "validation_loss_precise": ("validation loss, precise statistics", ""),
    "validation_loss_batch": ("validation loss, batch statistics", ""),
    "error_rate": ("error rate", ""),
    "error_rate_batch": ("error rate, batch statistics", ""),
    "error_rate_precise": ("error rate, precise statistics", ""),
    "images_per_second": ("training speed", "images/s"),
    "wall_seconds": ("training time", "s"),
    "norm_share": ("norms' share of a step's time", ""),
    "peak_memory_mib": ("peak memory", "MiB"),
    "saved_mib": ("saved for backward", "MiB"),
    "nearest_distance_ratio": ("nearest training image, distance ratio", ""),
    "nearest_near_share": ("share of near-duplicates of training images", ""),
    STABILITY_EDGE: ("stability edge", ""),
    "fid": ("FID", ""),
    "kid": ("KID", ""),
}
"""Titles and units."""
_FAMILIES = {"fd": "Fréchet distance", "kid": "KID", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown."""

    title: str
    unit: str  # empty where there is none
    worst: float | None
    """The value of a diverged trial: infinity, or minus infinity where higher is better; None for costs, of which
    divergence says nothing."""

    @property
    def label(self) -> str:
        """The title with the unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def heading(self) -> str:
        """The title with a capital."""
        return self.title[0].upper() + self.title[1:]


def metric_info(name: str) -> MetricInfo:
    """The metric of this name in study files: a validation loss, a cost, `nearest_...`, or a metric of samples."""
    family, _, extractor = name.partition("_")
    default = (f"{_FAMILIES[family]}, {extractor}" if family in _FAMILIES else name, "")
    worst = -math.inf if name.startswith(HIGHER_IS_BETTER) else math.inf
    return MetricInfo(*_TITLES.get(name, default), None if name in (*TIMES, "saved_mib") else worst)


def sample_metrics(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of samples that any record has, in the order of the records."""
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    return [name for name in names if not name.endswith("_standard_error")]


def describe(difference: Difference) -> tuple[str, str, str]:
    """The mean of a difference, its interval or why there is none, and the number of pairs.

    A pair failed where a side diverged or collapsed.
    """
    pairs, diverged, interval = str(difference.pairs or ""), difference.diverged, difference.interval
    if difference.pairs == 0:
        return "", "both failed" if diverged else "missing", pairs
    if diverged == difference.pairs + difference.both_diverged:
        return "", f"{diverged} of {diverged} failed", pairs
    if difference.relative is None:
        return "", "relative to 0", pairs
    if not any(difference.by_seed) and (interval is None or interval.low == interval.high):
        return "0", "identical", pairs
    text = f"{percent(interval.low)} to {percent(interval.high)}" if interval else "one seed: none"
    mean = percent(difference.relative) if math.isfinite(difference.relative) else ""
    return mean, f"{text}, {diverged} failed" if diverged else text, pairs


def counted(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


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
