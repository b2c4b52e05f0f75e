"""Axes of figures: relative differences about 0, losses, and a study's own axes."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from gnunet.ablation.analysis.formatting import percent_tick
from gnunet.ablation.figures.style import GREY
from gnunet.ablation.study import Axis

PREDICTORS = {
    "wiener": ("Wiener filter", (0, (4, 1.5))),
    "scalar": ("scalar filter", (0, (1, 1.2))),
    "mean": ("mean image", (0, (4, 1.5, 1, 1.5))),
    "identity": ("noisy image", (0, (8, 2))),
}
"""Labels and lines of the trivial predictors, by what they know of the training images."""
_FARTHEST = 4  # how many times as far as three quarters of the values an axis of differences goes


def relative_axis(panel: Axes, which: str, values: Iterable[float], label: str) -> None:
    """Scale and label a panel's x or y for relative differences, so far that a few that are far from the others do not
    squeeze them: the caller draws what is beyond at the edge, see `clip`."""
    axis: MatplotlibAxis = getattr(panel, f"{which}axis")
    finite = [0.0, *(value for value in values if math.isfinite(value))]
    reach = _FARTHEST * float(np.quantile(np.abs(finite), 0.75)) or math.inf
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(percent_tick))
    axis.set_label_text(label)
    _set_limits(panel, which, max(min(finite), -reach), min(max(finite), reach))


def clip(panel: Axes, which: str, value: float) -> tuple[float, str]:
    """Where a value is drawn on a panel's x or y, and the marker of an arrow if that is at an edge; else ''."""
    low, high = getattr(panel, f"get_{which}lim")()
    arrows = "<>" if which == "x" else "v^"
    return min(max(value, low), high), arrows[0] if value < low else arrows[1] if value > high else ""


def draw_predictors(
    panel: Axes, losses: Mapping[str, float | Sequence[float]], x: Sequence[float] = ()
) -> list[Line2D]:
    """Draw the losses of trivial predictors, see `gnunet.ablation.bank`: at each of `x`, or as horizontal lines.

    Returns the lines, for a legend.
    """
    lines = []
    for name, loss in losses.items():
        label, line = PREDICTORS[name]
        style = {"label": label, "color": GREY, "linestyle": line, "linewidth": 0.9, "zorder": 2}
        lines += panel.plot(x, loss, **style) if len(x) else [panel.axhline(loss, **style)]
    return lines


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
    is_long = len("".join(axis.values)) > 24
    panel.set_xticks(at, list(axis.values), **({"rotation": 40, "ha": "right"} if is_long else {}))
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
