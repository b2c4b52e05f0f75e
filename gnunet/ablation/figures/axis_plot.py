"""A metric against one of a study's axes: the figure of Wu & He (2018), with intervals."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.statistics import Interval, student_interval
from gnunet.ablation.figures.scales import dodge, loss_axis, places, relative_axis, study_axis
from gnunet.ablation.figures.style import Picture, VariantStyle, legend_rows, new_figure, put_legend, render
from gnunet.ablation.plan import Setting


@dataclass(frozen=True)
class _Mark:
    """What is drawn of one condition."""

    value: float
    """NaN where there is nothing finite."""
    interval: Interval | None
    lost: int
    """Seeds that diverged."""


@dataclass(frozen=True)
class _Series:
    """What is drawn of one variant: a mark at each value of the axis, or one mark where it does not depend on it."""

    variant: str
    marks: list[_Mark]
    flat: bool


def draw(results: Results, styles: dict[str, VariantStyle], axis: str, metric: str) -> Picture:
    """A metric, and its difference to the baseline, against an axis; a row of panels at each setting of the others."""
    study, shown_as = results.study, metric_info(metric)
    rest = list(_other_settings(results, axis))
    drawn = [variant for variant in study.variants if set(study.axes_of(variant)) <= {axis, *dict(rest[0])}]
    figure = new_figure(3.3 * len(rest) + 0.2 * legend_rows(len(drawn)) + 0.2)
    for panels, setting in zip(figure.subplots(len(rest), 2, squeeze=False), rest, strict=True):
        values = [
            _series(results, variant, setting, axis, _value_mark(results, metric), [variant]) for variant in drawn
        ]
        _draw_panel(panels[0], results, styles, axis, values)
        loss_axis(panels[0], "y", _extent(values))
        panels[0].set_ylabel(shown_as.label)
        panels[0].set_title(results.place(setting))
        others = [variant for variant in drawn if variant != study.baseline and study.baseline in drawn]
        mark = _difference_mark(results, metric)
        differences = [_series(results, variant, setting, axis, mark, [variant, study.baseline]) for variant in others]
        _draw_panel(panels[1], results, styles, axis, differences)
        relative_axis(panels[1], "y", _extent(differences), f"difference to {study.baseline}")
        panels[1].axhline(0, color=styles[study.baseline].colour, linewidth=1)
    put_legend(figure, [Line2D([], [], label=variant, **styles[variant].drawn) for variant in drawn])
    caption = (
        "Left: mean over the seeds with Student's 95% interval; what the validation bank adds is the same for all "
        f"variants and is not in it. Right: paired difference to {study.baseline} with the 95% interval that verdicts "
        "use (see Statistics). Flat lines with a band: variants that do not cross the axis. Crosses at the upper edge: "
        "seeds diverged, and a hollow marker is the mean of those left. No marker: missing."
    )
    return render(figure, f"axis_{axis}_{metric}", f"{shown_as.heading} against {study.axes[axis].label}", caption)


def _other_settings(results: Results, axis: str) -> Iterator[Setting]:
    """Every combination of the other axes that variants with this axis cross."""
    study = results.study
    crossed = {
        other for variant in study.variants if axis in study.axes_of(variant) for other in study.axes_of(variant)
    } - {axis}
    others = [other for other in study.axes if other in crossed]
    yield from itertools.product(*([(other, value) for value in study.axes[other].values] for other in others))


def _series(
    results: Results,
    variant: str,
    setting: Setting,
    axis: str,
    mark: Callable[[str, Setting], _Mark],
    depends_on: list[str],
) -> _Series:
    flat = not any(axis in results.study.axes_of(one) for one in depends_on)
    values = list(results.study.axes[axis].values)
    return _Series(
        variant, [mark(variant, (*setting, (axis, value))) for value in (values[:1] if flat else values)], flat
    )


def _value_mark(results: Results, metric: str) -> Callable[[str, Setting], _Mark]:
    def mark(variant: str, setting: Setting) -> _Mark:
        values = [score.value for score in results.scores(results.at(variant, setting), metric).values()]
        finite = np.array([value for value in values if math.isfinite(value)])
        lost = len(values) - len(finite)
        interval = None if lost else student_interval(finite)
        return _Mark(float(finite.mean()) if len(finite) else math.nan, interval, lost)

    return mark


def _difference_mark(results: Results, metric: str) -> Callable[[str, Setting], _Mark]:
    def mark(variant: str, setting: Setting) -> _Mark:
        difference = results.compare(results.at(variant, setting), results.at(results.study.baseline, setting), metric)
        lost = difference.diverged
        value = float(np.mean(difference.by_seed)) if difference.by_seed else math.nan
        return _Mark(value, None if lost else difference.interval, lost)

    return mark


def _extent(series: Sequence[_Series]) -> list[float]:
    """What the panel must show: every mean, and of intervals that are very wide a part."""
    marks = [mark for one in series for mark in one.marks if math.isfinite(mark.value)]
    means = [mark.value for mark in marks]
    if not means:
        return []
    room = max(max(means) - min(means), 0.02 * max(map(abs, means))) / 2
    ends = [end for mark in marks if mark.interval for end in (mark.interval.low, mark.interval.high)]
    return [*means, *(min(max(end, min(means) - room), max(means) + room) for end in ends)]


def _draw_panel(
    panel: Axes, results: Results, styles: dict[str, VariantStyle], axis: str, series: Sequence[_Series]
) -> None:
    study_axis(panel, results.study.axes[axis])
    along = [one for one in series if not one.flat]
    for one, step in zip(along, dodge(results.study.axes[axis], len(along)), strict=True):
        _draw_along(panel, places(results.study.axes[axis]) + step, one.marks, styles[one.variant])
    lost = 0
    for one in series:
        if one.flat:
            look, mark = styles[one.variant], one.marks[0]
            panel.axhline(mark.value, color=look.colour, linestyle=look.line)
            if mark.interval:
                panel.axhspan(mark.interval.low, mark.interval.high, color=look.colour, alpha=0.08, linewidth=0)
            if mark.lost:
                _draw_cross(panel, 0.99 - 0.03 * lost, look, panel.transAxes)
                lost += 1


def _draw_along(panel: Axes, x: np.ndarray, marks: Sequence[_Mark], look: VariantStyle) -> None:
    panel.plot(x, [mark.value for mark in marks], color=look.colour, linestyle=look.line)
    for at, mark in zip(x, marks, strict=True):
        if mark.interval:
            panel.plot([at, at], [mark.interval.low, mark.interval.high], color=look.colour, linewidth=1)
        fill = "white" if mark.lost else look.colour
        panel.plot(at, mark.value, marker=look.marker, color=look.colour, markerfacecolor=fill, zorder=3)
        if mark.lost:
            _draw_cross(panel, at, look, panel.get_xaxis_transform())


def _draw_cross(panel: Axes, x: float, look: VariantStyle, transform) -> None:
    panel.plot(
        x, 0.985, "x", color=look.colour, markersize=7, markeredgewidth=2, transform=transform, clip_on=False, zorder=4
    )
