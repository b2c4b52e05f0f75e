"""Forest plot: the paired difference of each variant to the baseline, with its interval."""

import math

from matplotlib.axes import Axes

from gnunet.ablation.analysis.formatting import DifferenceText, describe, is_clear
from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.statistics import Difference
from gnunet.ablation.figures.scales import relative_axis
from gnunet.ablation.figures.style import (
    GREY,
    LIGHT,
    ROW,
    Picture,
    VariantStyle,
    hatch_row,
    new_figure,
    render,
    set_rows,
)

_COLUMNS = ((0.22, "right"), (0.28, "left"), (1.0, "right"))
"""Columns of the table next to the panel: position, as a share of its width, and alignment."""


def draw(results: Results, styles: dict[str, VariantStyle], metric: str) -> Picture | None:
    """The differences in a metric, sorted; None where there is nothing to compare with the baseline."""
    rows = results.contrast_rows(metric)
    if not rows:
        return None
    figure = new_figure(ROW * (len(rows) + 1) + 0.7)
    panel, table = figure.subplots(1, 2, sharey=True, width_ratios=[2.5, 1])
    table.set_axis_off()
    set_rows(panel, ["" if row.difference is None else row.label for row in rows])
    differences = [row.difference for row in rows if row.difference]
    ends = [end for d in differences if d.interval for end in (d.interval.low, d.interval.high)]
    base, info = results.study.baseline, metric_info(metric)
    values = [*ends, *(value for difference in differences for value in difference.by_seed)]
    relative_axis(panel, "x", values, f"{info.title}: difference to {base}, relative to it")
    panel.axvline(0, color="black", linewidth=1)
    _write(table, -1, DifferenceText("difference", "95% interval", "n"), color=GREY)
    for y, row in enumerate(rows):
        if row.difference is None:
            panel.axhspan(y - 0.5, y + 0.5, facecolor="white", zorder=2.5)
            panel.text(0.005, y + 0.1, row.label, transform=panel.get_yaxis_transform(), va="center", weight="bold")
        else:
            _write(table, y, describe(row.difference))
            _draw_row(panel, y, row.difference, styles[row.contrast.left.variant])
    caption = (
        f"Paired differences to {base}, relative to it, with 95% intervals (see Statistics). Grey dots: the seeds. "
        "Filled markers: the interval excludes zero, at two seeds or more. Arrows: trials diverged, which is worse "
        "than any number. Hatched: missing."
    )
    return render(figure, f"forest_{metric}", f"{info.heading}: difference to {base}", caption)


def _write(table: Axes, y: float, text: DifferenceText, **style: str) -> None:
    for (x, alignment), part in zip(_COLUMNS, (text.mean, text.interval, text.pairs), strict=True):
        table.text(x, y, part, transform=table.get_yaxis_transform(), ha=alignment, va="center", fontsize=8, **style)


def _draw_row(panel: Axes, y: int, difference: Difference, style: VariantStyle) -> None:
    if difference.pairs == 0:
        hatch_row(panel, y, diverged=bool(difference.both_diverged))
        return
    panel.axhline(y, color=LIGHT, linewidth=0.5, zorder=0)
    left, right = panel.get_xlim()
    if interval := difference.interval:
        ends = [min(max(end, left), right) for end in (interval.low, interval.high)]
        panel.plot(ends, [y, y], color=style.colour, linewidth=1.8, solid_capstyle="butt")
        for end, at in ((interval.low, ends[0]), (interval.high, ends[1])):
            if math.isinf(end):
                panel.plot(at, y, marker=">" if end > 0 else "<", color=style.colour, markersize=8, clip_on=False)
    panel.plot(difference.by_seed, [y + 0.3] * len(difference.by_seed), ".", color=GREY, markersize=3, zorder=3)
    if difference.relative is not None and math.isfinite(difference.relative):
        fill = style.colour if is_clear(difference) else "white"
        marker = {"marker": style.marker, "markersize": 6, "markerfacecolor": fill}
        panel.plot(difference.relative, y, color=style.colour, zorder=4, **marker)
