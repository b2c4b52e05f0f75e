"""Axes of figures: relative differences about 0, losses, and a study's own axes."""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from gnunet.ablation.analysis.formatting import percent_tick
from gnunet.ablation.study import Axis

_LINEAR_TO = 0.1  # relative difference beyond which a wide axis is logarithmic
_FAR_TICKS = ((0.6, (0.05, 0.1, 0.2, 0.5)), (6.0, (0.05, 0.1, 0.3, 1, 3)), (math.inf, (0.1, 1, 10, 100, 1000, 10_000)))
"""Ticks of such an axis, by the largest difference on it."""


def relative_axis(panel: Axes, which: str, values: Iterable[float], label: str) -> None:
    """Scale and label a panel's x or y for relative differences: linear, or logarithmic beyond +-10% where a few are
    far from the others. Infinite values are ignored: the caller draws them at the edge."""
    axis: MatplotlibAxis = getattr(panel, f"{which}axis")
    finite = [0.0, *(value for value in values if math.isfinite(value))]
    low, high = min(finite), max(finite)
    farthest, typical = max(-low, high), float(np.median(np.abs(finite)))
    if farthest > 0.25 and farthest > 4 * typical:
        getattr(panel, f"set_{which}scale")("symlog", linthresh=_LINEAR_TO, linscale=1)
        far = next(ticks for reach, ticks in _FAR_TICKS if farthest <= reach)
        ticks = sorted([0.0, *far, *(-tick for tick in far)])
        axis.set_major_locator(FixedLocator([tick for tick in ticks if 1.2 * low <= tick <= 1.2 * high]))
        axis.set_minor_locator(NullLocator())
        label += (" " if which == "x" else "\n") + "(logarithmic beyond \N{PLUS-MINUS SIGN}10%)"
    else:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(percent_tick))
    axis.set_label_text(label)
    _set_limits(panel, which, low, high)


def loss_axis(panel: Axes, which: str, values: Iterable[float]) -> None:
    """Scale a panel's x or y for a metric: logarithmic where its values are positive and differ by a factor of 3."""
    axis: MatplotlibAxis = getattr(panel, f"{which}axis")
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    if low > 0 and high > 3 * low:
        getattr(panel, f"set_{which}scale")("log")
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    _set_limits(panel, which, low, high)


def positions(axis: Axis) -> np.ndarray:
    """Where the values of a study's axis are drawn, float64 (n,): 0, 1, ... with scale category."""
    if axis.scale == "category":
        return np.arange(len(axis.values), dtype=np.float64)
    numbers = np.array([float(value) for value in axis.values])
    return np.log2(numbers) if axis.scale == "log" else numbers


def study_axis(panel: Axes, axis: Axis) -> None:
    """Label a panel's x with a study's axis, and its ticks with the axis values."""
    at = positions(axis)
    panel.set_xlabel(axis.label)
    panel.set_xticks(at, list(axis.values))
    panel.xaxis.set_minor_locator(NullLocator())
    room = max(0.06 * (at.max() - at.min()), 0.3 * _step(axis))
    panel.set_xlim(at.min() - room, at.max() + room)


def dodge(axis: Axis, count: int) -> np.ndarray:
    """Small shifts along x for `count` variants, float64 (count,), so that none hides another at the same value."""
    return (np.arange(count) - (count - 1) / 2) * min(0.05, 0.4 / max(count, 1)) * _step(axis)


def _step(axis: Axis) -> float:
    """The smallest distance between two values of an axis."""
    at = np.sort(positions(axis))
    return float(np.diff(at).min()) if len(at) > 1 else 1.0


def _set_limits(panel: Axes, which: str, low: float, high: float) -> None:
    """Fix the limits at low and high with some room, measured on the axis scale."""
    transform = getattr(panel, f"{which}axis").get_transform()
    ends = transform.transform(np.array([low, high], dtype=np.float64))
    room = 0.06 * (ends[1] - ends[0]) or 0.05 * abs(ends[1]) or 0.5
    getattr(panel, f"set_{which}lim")(*transform.inverted().transform(ends + [-room, room]))


def _log_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers between low and high."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 8:
            break
    return ticks
