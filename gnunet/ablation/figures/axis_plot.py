"""A metric against one of a study's axes, as in Wu & He (2018), with intervals."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.analysis.statistics import Interval, student_interval
from gnunet.ablation.figures.scales import (
    PREDICTORS,
    clip,
    dodge,
    draw_predictors,
    loss_axis,
    positions,
    relative_axis,
    study_axis,
)
from gnunet.ablation.figures.style import Picture, VariantStyle, legend_height, new_figure, render, variant_legend
from gnunet.ablation.plan import Setting, settings_of
from gnunet.ablation.records import LOSSES
from gnunet.ablation.study import Axis


@dataclass(frozen=True)
class _Mark:
    """What is drawn of one condition."""

    value: float  # NaN where there is nothing finite
    interval: Interval | None
    diverged: int  # number of seeds that diverged


Marks = Mapping[str, Sequence[_Mark]]
"""By variant: a mark at each value of the axis, or one mark where the variant does not depend on it."""


def draw(results: Results, styles: dict[str, VariantStyle], axis: str, metric: str) -> Picture:
    """A metric, and its difference to the baseline, against an axis; a row of panels in each setting of the others."""
    study, base, info = results.study, results.study.baseline, metric_info(metric)
    crossings = [set(study.axes_of(variant)) for variant in study.variants if axis in study.axes_of(variant)]
    settings = settings_of(study, set().union(*crossings) - {axis})
    drawn = [variant for variant in study.variants if set(study.axes_of(variant)) <= {axis, *dict(settings[0])}]
    figure = new_figure(2.1 * len(settings) + legend_height([*drawn, PREDICTORS["wiener"][0]]) + 0.2)
    for (left, right), setting in zip(figure.subplots(len(settings), 2, squeeze=False), settings, strict=True):
        values = {
            v: [_value(results, results.at(v, at), metric) for at in _along(results, axis, setting, v)] for v in drawn
        }
        flat = [v for v in drawn if axis not in study.axes_of(v)]
        known = results.predictors(metric) if metric in LOSSES else {}
        wiener = {name: loss for name, loss in known.items() if name == "wiener"}
        loss_axis(left, "y", [*_extent(values), *wiener.values()])
        _draw_panel(left, study.axes[axis], styles, values, flat)
        lines = draw_predictors(left, wiener)
        left.set_ylabel(info.title)
        left.set_title(results.describe_setting(setting))
        if base in drawn:
            draw_differences(right, results, styles, axis, metric, setting)
        else:
            right.set_visible(False)
    figure.supxlabel(study.axes[axis].label, fontsize=9)
    variant_legend(figure, styles, drawn, lines)
    caption = (
        "Left: mean over the seeds with Student's 95% interval, without the uncertainty of the validation set, which "
        f"all variants share. Right: paired difference to {base} with the 95% interval that verdicts use (see "
        "Statistics). Flat lines with a band: variants that do not cross the axis. Crosses at the upper edge: seeds "
        "collapsed or diverged, and a hollow marker is the mean of those left. Arrows: beyond the axis. No marker: "
        "missing."
    )
    return render(figure, f"axis_{axis}_{metric}", f"{info.heading} against {study.axes[axis].label}", caption)


def draw_differences(
    panel: Axes, results: Results, styles: dict[str, VariantStyle], axis: str, metric: str, setting: Setting
) -> None:
    """The paired difference in a metric to the baseline against an axis, in a setting of the others."""
    study, base = results.study, results.study.baseline
    axes = {axis, *dict(setting)}
    differences = {
        v: [
            _difference(results, results.at(v, at), results.at(base, at), metric)
            for at in _along(results, axis, setting, v, base)
        ]
        for v in study.variants
        if v != base and set(study.axes_of(v)) <= axes
    }
    flat = [] if axis in study.axes_of(base) else [v for v in differences if axis not in study.axes_of(v)]
    relative_axis(panel, "y", _extent(differences), f"difference to {base}")
    _draw_panel(panel, study.axes[axis], styles, differences, flat)
    panel.axhline(0, color=styles[base].colour, linewidth=1)


def _along(results: Results, axis: str, setting: Setting, *variants: str) -> list[Setting]:
    """The settings along the axis, or the first of them where none of the variants crosses it."""
    values = [(*setting, (axis, value)) for value in results.study.axes[axis].values]
    return values if any(axis in results.study.axes_of(variant) for variant in variants) else values[:1]


def _value(results: Results, condition: Condition, metric: str) -> _Mark:
    values = [score.value for score in results.scores(condition, metric).values()]
    finite = np.array([value for value in values if math.isfinite(value)])
    diverged = len(values) - len(finite)
    interval = None if diverged else student_interval(finite)
    return _Mark(float(finite.mean()) if len(finite) else math.nan, interval, diverged)


def _difference(results: Results, left: Condition, right: Condition, metric: str) -> _Mark:
    difference = results.compare(left, right, metric)
    mean = difference.finite_mean
    return _Mark(
        math.nan if mean is None else mean, None if difference.diverged else difference.interval, difference.diverged
    )


def _extent(marks: Marks) -> list[float]:
    """What the panel must show: every mean, and a part of very wide intervals."""
    finite = [mark for mark in itertools.chain(*marks.values()) if math.isfinite(mark.value)]
    means = [mark.value for mark in finite]
    if not means:
        return []
    room = max(max(means) - min(means), 0.02 * max(map(abs, means))) / 2
    ends = [end for mark in finite for end in mark.interval or ()]
    return [*means, *np.clip(ends, min(means) - room, max(means) + room)]


def _draw_panel(panel: Axes, axis: Axis, styles: dict[str, VariantStyle], marks: Marks, flat: Iterable[str]) -> None:
    study_axis(panel, axis)
    panel.set_xlabel("")
    crossing = [variant for variant in marks if variant not in flat]
    for variant, shift in zip(crossing, dodge(axis, len(crossing)), strict=True):
        _draw_along(panel, positions(axis) + shift, marks[variant], styles[variant])
    crosses = 0
    for variant in marks:
        if variant in flat:
            style, mark = styles[variant], marks[variant][0]
            panel.axhline(mark.value, color=style.colour, linestyle=style.line)
            if mark.interval:
                panel.axhspan(*mark.interval, color=style.colour, alpha=0.08, linewidth=0)
            if mark.diverged:
                _draw_cross(panel, 0.99 - 0.03 * crosses, style, panel.transAxes)
                crosses += 1


def _draw_along(panel: Axes, x: np.ndarray, marks: Sequence[_Mark], style: VariantStyle) -> None:
    panel.plot(x, [mark.value for mark in marks], color=style.colour, linestyle=style.line)
    for at, mark in zip(x, marks, strict=True):
        if mark.interval:
            panel.plot([at, at], mark.interval, color=style.colour, linewidth=1)
        fill = "white" if mark.diverged else style.colour
        panel.plot(at, mark.value, marker=style.marker, color=style.colour, markerfacecolor=fill, zorder=3)
        if mark.diverged:
            _draw_cross(panel, at, style, panel.get_xaxis_transform())
        y, arrow = clip(panel, "y", mark.value)
        if arrow:
            panel.plot(at, y, marker=arrow, color=style.colour, markersize=6, clip_on=False)


def _draw_cross(panel: Axes, x: float, style: VariantStyle, transform) -> None:
    cross = {"markersize": 5, "markeredgewidth": 1.5, "transform": transform, "clip_on": False, "zorder": 4}
    panel.plot(x, 0.985, "x", color=style.colour, **cross)
